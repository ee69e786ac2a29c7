//! Where and how to POST: destinations, proxies, headers.

use std::{fmt, ops::RangeInclusive, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use hyper_util::client::proxy::matcher::Matcher;
use reqwest::{
    Url,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use secrecy::SecretSlice;

use super::{
    Mode,
    files::Tls,
    reader::{Reader, any_text, parse_bool, parse_duration},
    variables::*,
};

/// Where and how to POST.
#[derive(Debug)]
pub struct Webhook {
    /// The URLs; at least one. All must succeed.
    pub destinations: Vec<Destination>,
    /// The headers to add to every request.
    pub headers: HeaderMap,
    /// Every request is signed with each of these keys.
    pub signing_keys: Vec<SecretSlice<u8>>,
    /// Longest time for one attempt, including the connection.
    pub timeout: Duration,
    /// Attempts per message; `None` means no limit.
    pub max_attempts: Option<u32>,
    /// The statuses for which the message is at fault, instead of the usual ones.
    pub give_up_on: Option<Vec<RangeInclusive<u16>>>,
    /// The message headers that the request carries too.
    pub pass_headers: PassHeaders,
    /// The CAs to trust for https, and the client certificate.
    pub tls: Tls,
}

/// A URL to POST to. `Display` and `Debug` show neither its userinfo nor its query.
#[derive(Clone)]
pub struct Destination {
    /// The URL with all its secrets.
    pub secret_url: Url,
    /// The URL of the proxy through which it is reached, if any, including the login.
    pub secret_proxy: Option<Url>,
    /// Whether every address of its name has to succeed.
    pub every_address: bool,
}

impl Webhook {
    pub(super) fn read(reader: &mut Reader<'_>, mode: &Mode) -> Self {
        let destinations = Destination::read_all(reader);
        let is_verified = destinations.iter().any(Destination::needs_tls);
        Self {
            destinations,
            headers: read_headers(reader),
            signing_keys: reader
                .optional(SECRET, |text| parse_list(text, parse_signing_key))
                .unwrap_or_default(),
            timeout: reader.value(TIMEOUT, parse_timeout),
            max_attempts: match mode {
                // In durable mode, the relay gives up on a message only if its operator wants that.
                Mode::Durable { .. } if !reader.is_set(MAX_ATTEMPTS) => None,
                _ => reader.value(MAX_ATTEMPTS, parse_max_attempts),
            },
            give_up_on: reader.optional(GIVE_UP_ON, parse_statuses),
            pass_headers: reader
                .optional(PASS_HEADERS, PassHeaders::parse)
                .unwrap_or_default(),
            tls: Tls::read(reader, [WEBHOOK_CA, WEBHOOK_CERT, WEBHOOK_KEY], is_verified),
        }
    }

    /// Returns the destinations as the log and the page name them.
    #[must_use]
    pub fn names(&self) -> String {
        let names = self.destinations.iter().map(|it| match it.every_address {
            true => format!("{it} at every address of its name"),
            false => it.to_string(),
        });
        names.collect::<Vec<_>>().join(" and ")
    }
}

impl Destination {
    /// Reads the destinations, each with the proxy through which it is reached.
    fn read_all(reader: &mut Reader<'_>) -> Vec<Self> {
        let urls = reader.value(DESTINATION, |text| {
            let example = "write it like http://localhost:3000/api/cache/webhook";
            parse_list(text, |entry| parse_url(entry, example))
        });
        let every_address = reader.value(EVERY_ADDRESS, parse_bool);
        let read = |url: Url| {
            let destination = Self {
                secret_proxy: read_proxy(reader, &url),
                // An IP address needs no lookup.
                every_address: every_address && url.domain().is_some(),
                secret_url: url,
            };
            if let (true, Some(proxy)) = (destination.every_address, destination.proxy()) {
                let problem = format!(
                    "is true, but {destination} is reached through the proxy {proxy}, which looks the name \
                     up by itself; add {} to NO_PROXY, or unset it",
                    destination.secret_url.host_str().unwrap_or_default()
                );
                reader.note(EVERY_ADDRESS, &problem);
            }
            destination
        };
        urls.into_iter().map(read).collect()
    }

    /// Returns the proxy's URL without secrets.
    #[must_use]
    pub fn proxy(&self) -> Option<String> {
        self.secret_proxy.as_ref().map(without_secrets)
    }

    /// Returns whether it, or its proxy, uses TLS.
    #[must_use]
    pub fn needs_tls(&self) -> bool {
        let urls = [Some(&self.secret_url), self.secret_proxy.as_ref()];
        urls.iter().flatten().any(|url| url.scheme() == "https")
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&without_secrets(&self.secret_url))
    }
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Returns the host and port of a URL, as `host:port`.
pub(crate) fn authority(url: &Url) -> String {
    let port = url.port_or_known_default().unwrap_or_default();
    format!("{}:{port}", url.host_str().unwrap_or_default())
}

/// Returns `url` without its userinfo, query and fragment.
#[must_use]
pub fn without_secrets(url: &Url) -> String {
    let mut shown = url.clone();
    // Fails if there can be none.
    let _ = (shown.set_username(""), shown.set_password(None));
    shown.set_query(None);
    shown.set_fragment(None);
    shown.into()
}

/// Hosts for which no proxy is used, as in Go's net/http, because to the proxy they are another machine.
const LOOPBACK: &str = "localhost,127.0.0.0/8,0.0.0.0,::1,::,::ffff:127.0.0.0/104";

/// Reads the proxy through which a URL is reached, if any. A proxy that is not used is ignored, because it may be
/// meant for other programs.
fn read_proxy(reader: &mut Reader<'_>, url: &Url) -> Option<Url> {
    let exempt = reader.optional(&as_set(reader, NO_PROXY), any_text);
    let exempt = format!("{LOOPBACK},{}", exempt.unwrap_or_default());
    let rules = Matcher::builder().all("http://proxy").no(exempt).build();
    let uri = url.as_str().parse().ok()?;
    rules.intercept(&uri)?;
    let name = match url.scheme() {
        "https" => HTTPS_PROXY,
        _ => HTTP_PROXY,
    };
    reader.optional(&as_set(reader, name), parse_proxy)
}

/// Returns the name under which a variable is set: proxy variables may be in lower case.
fn as_set(reader: &Reader<'_>, name: &str) -> String {
    match reader.is_set(name) {
        true => name.to_owned(),
        false => name.to_lowercase(),
    }
}

fn parse_proxy(text: &str) -> Result<Url, String> {
    let example = "write it like http://proxy.example.com:3128";
    match text.contains("://") {
        true => parse_url(text, example),
        false => parse_url(&format!("http://{text}"), example),
    }
}

/// Parses entries separated by white space; at least one.
fn parse_list<T>(
    text: &str,
    parse: impl FnMut(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    if text.trim().is_empty() {
        return Err("holds nothing but white space; set it to a value, or unset it".into());
    }
    text.split_whitespace().map(parse).collect()
}

/// Parses an http(s) URL.
fn parse_url(text: &str, example: &str) -> Result<Url, String> {
    let url = text.parse::<Url>();
    let url = url.map_err(|error| format!("is not a valid URL ({error}); {example}"))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        other => Err(format!(
            "starts with {other}:, not with http:// or https://; {example}"
        )),
    }
}

/// Parses a Standard Webhooks secret: `whsec_` and base64 of 24 to 64 bytes.
fn parse_signing_key(text: &str) -> Result<SecretSlice<u8>, String> {
    let encoded = text.strip_prefix("whsec_");
    let key = encoded.and_then(|encoded| STANDARD.decode(encoded).ok());
    match key.filter(|key| (24..=64).contains(&key.len())) {
        Some(key) => Ok(key.into()),
        None => Err("has an entry that is not whsec_ and the base64 of 24 to 64 bytes".into()),
    }
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("is zero, so no attempt could succeed; write it like 15s".into()),
        timeout => Ok(timeout),
    }
}

/// Parses statuses such as `400 404 4xx`, or `none`.
fn parse_statuses(text: &str) -> Result<Vec<RangeInclusive<u16>>, String> {
    let parse = |word: &str| match (word, word.parse()) {
        ("3xx", _) => Ok(300..=399),
        ("4xx", _) => Ok(400..=499),
        ("5xx", _) => Ok(500..=599),
        (_, Ok(status @ 300..=599)) => Ok(status..=status),
        _ => Err(format!(
            "has the entry {word:?}; write statuses such as 400 404 422, 4xx, or none"
        )),
    };
    match text.trim() {
        "none" => Ok(Vec::new()),
        text => text.split_whitespace().map(parse).collect(),
    }
}

fn parse_max_attempts(text: &str) -> Result<Option<u32>, String> {
    let attempts = text.parse().map_err(|_| {
        format!("{text:?} is not a valid count; write a whole number such as 5, or 0 for no limit")
    })?;
    Ok((attempts > 0).then_some(attempts))
}

/// Reads the headers of all `WEBHOOK_HEADER_<NAME>`.
fn read_headers(reader: &mut Reader<'_>) -> HeaderMap {
    let names = reader.environment.names();
    names
        .filter_map(|name| name.strip_prefix(HEADER_PREFIX))
        .filter_map(|name| {
            let name = name.strip_suffix(FILE_SUFFIX).unwrap_or(name);
            let variable = format!("{HEADER_PREFIX}{name}");
            reader.optional(&variable, |value| parse_header(name, value))
        })
        .collect()
}

/// Headers that the relay sets itself, or that would break the request (RFC 9110, 7.6.1).
const RESERVED_HEADERS: &str = "connection content-length content-type expect host keep-alive proxy-connection te \
     traceparent tracestate trailer transfer-encoding upgrade user-agent webhook-id webhook-signature \
     webhook-timestamp x-nats-subject";

fn is_reserved(name: &str) -> bool {
    RESERVED_HEADERS.split(' ').any(|reserved| reserved == name)
}

/// Headers that no publisher may set.
const LOGINS: [&str; 3] = ["authorization", "proxy-authorization", "cookie"];

/// Parses a header: `X_KEY` is the header `x-key`.
fn parse_header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), String> {
    let name = name.to_lowercase().replace('_', "-");
    if is_reserved(&name) {
        return Err(format!(
            "would set {name}, which the relay sets itself; unset it"
        ));
    }
    let name: HeaderName = name
        .parse()
        .map_err(|_| "does not end in the name of a header; write it like WEBHOOK_HEADER_X_KEY")?;
    let mut value = HeaderValue::from_str(value)
        .map_err(|_| "has a line break or another control character, which no header may have")?;
    value.set_sensitive(true);
    Ok((name, value))
}

/// Names of message headers, or their beginnings, such as `ce-*`.
#[derive(Clone, Debug, Default)]
pub struct PassHeaders(Vec<String>);

impl PassHeaders {
    /// Returns whether a header of this name, in lower case, is one of them.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        let is_it = |entry: &String| match entry.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == entry,
        };
        !is_reserved(name) && !LOGINS.contains(&name) && self.0.iter().any(is_it)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let names = parse_list(text, |entry| Ok(entry.to_lowercase()))?;
        let all = Self(names);
        let is_bad = |entry: &&String| {
            let name = entry.trim_end_matches('*');
            HeaderName::try_from(name).is_err() || (name == entry.as_str() && !all.contains(name))
        };
        match all.0.iter().find(is_bad) {
            Some(entry) => Err(format!(
                "has the entry {entry:?}, which no message may set; write names of other headers, such as ce-*"
            )),
            None => Ok(all),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::tests::{assert_refused, problems, with};

    #[test]
    fn headers_and_several_destinations_are_taken() {
        let config = with(&[
            (DESTINATION, " http://a/\n\thttps://b/ "),
            ("WEBHOOK_HEADER_X_REVALIDATE_SECRET", "hunter2"),
            ("WEBHOOK_HEADER_AUTHORIZATION", "Bearer hunter2"),
            ("WEBHOOK_HEADER_WEBHOOK_HEADER_X", "x"),
            ("WEBHOOK_HEADER_FILE", "f"),
            (
                SECRET,
                "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            ),
            (REPUBLISH_DELAY, "100ms"),
        ])
        .unwrap();
        assert_eq!(config.webhook.destinations.len(), 2);
        assert_eq!(config.webhook.headers["x-revalidate-secret"], "hunter2");
        assert_eq!(config.webhook.headers["authorization"], "Bearer hunter2");
        assert_eq!(config.webhook.headers["webhook-header-x"], "x");
        assert_eq!(config.webhook.headers["file"], "f");
        assert_eq!(config.webhook.signing_keys.len(), 2);
        assert_eq!(config.republish_delay, Duration::from_millis(100));
        let shown = format!("{config:?}");
        assert!(
            !shown.contains("hunter2") && !shown.contains("MfKQ9"),
            "{shown}"
        );
    }

    #[test]
    fn every_refusal_names_the_variable_and_the_fault() {
        assert_refused(&[
            (DESTINATION, "", "not set"),
            (DESTINATION, "localhost:3000", "starts with localhost:"),
            (DESTINATION, "/hook", "is not a valid URL"),
            (DESTINATION, "ftp://host/", "starts with ftp:"),
            (DESTINATION, "http://", "is not a valid URL"),
            (DESTINATION, " ", "nothing but white space"),
            (DESTINATION, "http://a b", "is not a valid URL"),
            ("WEBHOOK_HEADER_HOST", "x", "would set host"),
            (
                "WEBHOOK_HEADER_WEBHOOK_SIGNATURE",
                "x",
                "would set webhook-signature",
            ),
            ("WEBHOOK_HEADER_", "x", "does not end in the name"),
            ("WEBHOOK_HEADER_X-Ä", "x", "does not end in the name"),
            ("WEBHOOK_HEADER_X_KEY", "a\r\nb: c", "line break"),
            (SECRET, "secret", "whsec_"),
            (SECRET, "whsec_ä", "base64"),
            (SECRET, "whsec_c2hvcnQ=", "24 to 64 bytes"),
            (SECRET, " \n", "nothing but white space"),
            (TIMEOUT, "15", "is not a valid duration"),
            (TIMEOUT, "-1s", "is not a valid duration"),
            (TIMEOUT, "1day 1s", "is not a valid duration"),
            (TIMEOUT, "0s", "is zero"),
            (TIMEOUT, "500000000000y", "at most a day"),
            (MAX_ATTEMPTS, "many", "is not a valid count"),
            (MAX_ATTEMPTS, "-1", "is not a valid count"),
            (EVERY_ADDRESS, "yes", "write true or false"),
            (
                PASS_HEADERS,
                "ce-* Authorization",
                "\"authorization\", which no message",
            ),
            (PASS_HEADERS, "webhook-id", "which no message may set"),
            (
                PASS_HEADERS,
                "transfer-encoding",
                "which no message may set",
            ),
            (PASS_HEADERS, "*", "which no message may set"),
            (PASS_HEADERS, "a:b", "which no message may set"),
            (GIVE_UP_ON, "400 200", "has the entry \"200\""),
            (GIVE_UP_ON, "none 400", "has the entry \"none\""),
            (GIVE_UP_ON, "6xx", "has the entry \"6xx\""),
        ]);
    }

    #[test]
    fn every_address_is_for_names_that_no_proxy_looks_up() {
        let urls = "http://app.example/ http://10.0.0.1/ http://[fd00::1]/ http://localhost/";
        let set = |changes: &[(&'static str, &'static str)]| {
            with(&[&[(DESTINATION, urls), (EVERY_ADDRESS, "true")], changes].concat())
        };
        let destinations = set(&[]).unwrap().webhook.destinations;
        let every_address: Vec<_> = destinations.iter().map(|d| d.every_address).collect();
        assert_eq!(every_address, [true, false, false, true]);
        let proxy = (HTTP_PROXY, "http://user:hunter2@proxy:3128");
        assert_eq!(
            set(&[proxy]).unwrap_err(),
            [
                "WEBHOOK_EVERY_ADDRESS is true, but http://app.example/ is reached through the proxy \
                 http://proxy:3128/, which looks the name up by itself; add app.example to NO_PROXY, \
                 or unset it"
            ]
        );
        assert!(set(&[proxy, (NO_PROXY, "app.example")]).is_ok());
    }

    /// Returns the proxy for each of `destinations` with these variables set.
    fn chosen(variables: &[(&str, &str)], destinations: &[&str]) -> Vec<Option<String>> {
        let urls = destinations.join(" ");
        let config = with(&[&[(DESTINATION, &urls[..])], variables].concat()).unwrap();
        let destinations = config.webhook.destinations;
        destinations.iter().map(Destination::proxy).collect()
    }

    #[test]
    fn the_scheme_decides_and_what_is_exempt_or_loopback_is_reached_directly() {
        let proxies = [
            (HTTP_PROXY, "user:hunter2@plain:3128"),
            (HTTPS_PROXY, "https://secure"),
            (NO_PROXY, "intern.example, 10.0.0.0/8"),
        ];
        let reached = [
            ("http://app.example/hook", Some("http://plain:3128/")),
            ("https://app.example/hook", Some("https://secure/")),
            ("http://11.1.2.3/", Some("http://plain:3128/")),
            ("http://localhost.example/", Some("http://plain:3128/")),
            ("http://app.intern.example/", None),
            ("https://10.1.2.3/", None),
            ("http://localhost:3000/", None),
            ("http://app.localhost/", None),
            ("https://127.0.0.1/", None),
            ("http://127.1/", None),
            ("http://0.0.0.0:3000/", None),
            ("http://[::1]:3000/", None),
            ("http://[::ffff:127.0.0.1]/", None),
        ];
        let (destinations, expected): (Vec<_>, Vec<_>) = reached
            .map(|(url, proxy)| (url, proxy.map(str::to_owned)))
            .into_iter()
            .unzip();
        assert_eq!(chosen(&proxies, &destinations), expected);
    }

    #[test]
    fn names_in_lower_case_count_where_those_in_upper_case_are_not_set() {
        let lower = ("http_proxy", "http://lower");
        let upper = (HTTP_PROXY, "http://upper");
        let destination = ["http://app.example/"];
        for (variables, expected) in [
            (&[lower][..], Some("http://lower/")),
            (&[lower, upper], Some("http://upper/")),
            (&[lower, ("no_proxy", "*")], None),
            (&[], None),
        ] {
            let expected = [expected.map(str::to_owned)];
            assert_eq!(chosen(variables, &destination), expected);
        }
    }

    #[test]
    fn what_no_destination_needs_is_not_looked_at() {
        let foreign = [
            (HTTP_PROXY, "socks5://127.0.0.1:1080"),
            (HTTPS_PROXY, ""),
            (TRUST, "/nowhere.pem"),
        ];
        let destination = |url| [&[(DESTINATION, url)][..], &foreign].concat();
        assert_eq!(problems(&destination("http://localhost:3000/")), [""; 0]);
        let found = problems(&destination("http://app.example/ http://other.example/"));
        assert!(
            found.len() == 1 && found[0].starts_with("HTTP_PROXY starts with socks5:"),
            "{found:?}"
        );
        let found = problems(&destination("https://app.example/"));
        assert!(
            found.len() == 1 && found[0].starts_with("SSL_CERT_FILE names"),
            "{found:?}"
        );
        let found = problems(&[(HOST, "tls://nats.example"), (TRUST, "/nowhere.pem")]);
        assert_eq!(found.len(), 1, "{found:?}");
    }
}
