//! Where and how to POST.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    path::PathBuf,
    time::Duration,
};

use percent_encoding::percent_decode_str;
use reqwest::{
    Url,
    header::{HeaderMap, HeaderName, HeaderValue},
};

use super::{
    Mode, Proxy, Secrets,
    environment::FILE_SUFFIX,
    proxies::Proxies,
    reader::{Noted, Reader, parse_bool, parse_duration, parse_list},
    tls::{Tls, WEBHOOK_TLS},
    variables::{DESTINATION, EVERY_ADDRESS, HEADER_PREFIX, MAX_ATTEMPTS, SECRET, TIMEOUT},
};
use crate::webhook::signing::SigningSecret;

/// Where and how to POST.
#[derive(Debug)]
pub struct Webhook {
    /// The URLs; at least one. All must succeed.
    pub destinations: Vec<Destination>,
    /// Added to every request.
    pub headers: HeaderMap,
    /// Every request is signed with each of them.
    pub secrets: Vec<SigningSecret>,
    /// Longest time for one attempt, connecting included.
    pub timeout: Duration,
    /// Attempts per message; without end if none.
    pub max_attempts: Option<u32>,
    /// Whom to trust for https, and the client certificate.
    pub tls: Tls,
}

/// A URL to POST to. `Display` and `Debug` show neither its userinfo nor its query.
#[derive(Clone)]
pub struct Destination {
    pub(super) url: Url,
    pub(super) proxy: Option<Proxy>,
    pub(super) every_address: bool,
}

impl Webhook {
    /// `trust` is the file of `SSL_CERT_FILE`.
    pub(super) fn read(
        reader: &mut Reader<'_>,
        trust: Result<Option<PathBuf>, Noted>,
        mode: &Result<Mode, Noted>,
    ) -> Result<Self, Noted> {
        let destinations = Destination::read_all(reader);
        let timeout = reader.value(TIMEOUT, parse_timeout);
        let max_attempts = read_max_attempts(reader, mode);
        let headers = read_headers(reader);
        let secrets = reader.optional(SECRET, |text| parse_list(text, SigningSecret::parse));
        let tls = read_tls(reader, &destinations);
        Ok(Self {
            destinations: destinations?,
            headers: headers?,
            secrets: secrets?.unwrap_or_default(),
            timeout: timeout?,
            max_attempts: max_attempts?,
            tls: tls?.or_trust(trust?),
        })
    }

    /// The secrets that are sent to the destinations.
    #[must_use]
    pub fn sent_secrets(&self) -> Secrets {
        Secrets::of(&self.destinations, &self.headers)
    }
}

impl Destination {
    /// The destinations, each with the proxy through which it is reached.
    fn read_all(reader: &mut Reader<'_>) -> Result<Vec<Self>, Noted> {
        let urls = reader.value(DESTINATION, |text| parse_list(text, parse_destination));
        let proxies = Proxies::read(reader);
        let every_address = reader.value(EVERY_ADDRESS, parse_bool);
        let (urls, proxies, every_address) = (urls?, proxies?, every_address?);
        let through = |url: Url| Self {
            proxy: proxies.choose(&url),
            // What is written as an IP address is one.
            every_address: every_address && url.domain().is_some(),
            url,
        };
        let destinations: Vec<_> = urls.into_iter().map(through).collect();
        for destination in &destinations {
            if let (true, Some(proxy)) = (destination.every_address, &destination.proxy) {
                let problem = format!(
                    "is true, but {destination} is reached through the proxy {proxy}, which looks the \
                     name up by itself; add {} to NO_PROXY, or unset it",
                    destination.url.host_str().unwrap_or_default()
                );
                return Err(reader.note(EVERY_ADDRESS, &problem));
            }
        }
        Ok(destinations)
    }

    /// The URL with all its secrets.
    #[must_use]
    pub fn expose_url(&self) -> &Url {
        &self.url
    }

    /// The proxy through which it is reached, if it is.
    #[must_use]
    pub fn proxy(&self) -> Option<&Proxy> {
        self.proxy.as_ref()
    }

    /// Whether every address of its name is to be told.
    #[must_use]
    pub fn every_address(&self) -> bool {
        self.every_address
    }

    /// Whether it is reached by TLS.
    #[must_use]
    pub fn is_https(&self) -> bool {
        self.url.scheme() == "https"
    }

    /// Whether TLS is needed on the way to it, be it for its proxy.
    #[must_use]
    pub fn needs_tls(&self) -> bool {
        let proxy = self.proxy.as_ref().map(Proxy::expose_url);
        self.is_https() || proxy.is_some_and(|proxy| proxy.scheme() == "https")
    }

    /// Its host and port, as `host:port`.
    #[must_use]
    pub fn authority(&self) -> String {
        authority(&self.url)
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&without_secrets(&self.url))
    }
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The host and port of a URL, as `host:port`.
pub(crate) fn authority(url: &Url) -> String {
    let port = url.port_or_known_default().unwrap_or_default();
    format!("{}:{port}", url.host_str().unwrap_or_default())
}

/// `url` without its userinfo, query and fragment.
#[must_use]
pub fn without_secrets(url: &Url) -> String {
    let port = url
        .port()
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    format!(
        "{}://{}{port}{}",
        url.scheme(),
        url.host_str().unwrap_or_default(),
        url.path()
    )
}

/// The files for https. Whoever names them believes that it is used.
fn read_tls(
    reader: &mut Reader<'_>,
    destinations: &Result<Vec<Destination>, Noted>,
) -> Result<Tls, Noted> {
    let tls = Tls::read(reader, &WEBHOOK_TLS)?;
    if let Ok(destinations) = destinations
        && tls.is_set()
        && !destinations.iter().any(Destination::needs_tls)
    {
        let name = match tls.ca {
            Some(_) => WEBHOOK_TLS.ca,
            None => WEBHOOK_TLS.certificate,
        };
        let problem = format!(
            "is for https, but no URL in {DESTINATION} starts with https://; write it so, or unset \
             {name}"
        );
        return Err(reader.note(name, &problem));
    }
    Ok(tls)
}

/// The attempts per message; without end if none.
fn read_max_attempts(
    reader: &mut Reader<'_>,
    mode: &Result<Mode, Noted>,
) -> Result<Option<u32>, Noted> {
    match mode {
        // As the table's note says: what is durable is not given up unless its operator wants it.
        Ok(Mode::Durable { .. }) if !reader.is_set(MAX_ATTEMPTS) => Ok(None),
        _ => reader.value(MAX_ATTEMPTS, parse_max_attempts),
    }
}

/// The headers of all `WEBHOOK_HEADER_<NAME>`.
fn read_headers(reader: &mut Reader<'_>) -> Result<HeaderMap, Noted> {
    let variables: BTreeSet<_> = reader
        .environment
        .names()
        .filter(|name| name.starts_with(HEADER_PREFIX))
        .map(|name| {
            // WEBHOOK_HEADER_FILE is the header `file`.
            let stem = name.strip_suffix(FILE_SUFFIX);
            let stem = stem.filter(|stem| stem.starts_with(HEADER_PREFIX));
            stem.unwrap_or(name)
        })
        .collect();
    let mut headers = HeaderMap::new();
    let mut set_by = HashMap::new();
    let mut result = Ok(());
    for variable in variables {
        match reader.value(variable, |value| parse_header(variable, value)) {
            Ok((name, value)) => match set_by.insert(name.clone(), variable) {
                None => {
                    headers.insert(name, value);
                }
                Some(earlier) => {
                    let problem = format!("and {variable} both set {name}; keep one of them");
                    result = Err(reader.note(earlier, &problem));
                }
            },
            Err(noted) => result = Err(noted),
        }
    }
    result.map(|()| headers)
}

/// Headers that the relay sets itself, or that would break the request (RFC 9110, 7.6.1).
const RESERVED_HEADERS: [&str; 18] = [
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "te",
    "traceparent",
    "tracestate",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "webhook-id",
    "webhook-signature",
    "webhook-timestamp",
    "x-nats-subject",
];

/// `WEBHOOK_HEADER_X_KEY` is the header `x-key`.
fn parse_header(variable: &str, value: &str) -> Result<(HeaderName, HeaderValue), String> {
    let name = variable
        .strip_prefix(HEADER_PREFIX)
        .unwrap_or(variable)
        .to_lowercase()
        .replace('_', "-");
    if RESERVED_HEADERS.contains(&name.as_str()) {
        return Err(format!(
            "would set {name}, which is the relay's own matter; unset it"
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

fn parse_destination(text: &str) -> Result<Url, String> {
    let example = "write it like http://localhost:3000/api/cache/webhook";
    let url: Url = text
        .parse()
        .map_err(|error| format!("is no URL ({error}); {example}"))?;
    match url.scheme() {
        "http" | "https" => {}
        other => {
            return Err(format!(
                "starts with {other}:, not with http:// or https://; {example}"
            ));
        }
    }
    let login = [url.username(), url.password().unwrap_or_default()];
    if login
        .iter()
        .any(|part| percent_decode_str(part).decode_utf8().is_err())
    {
        return Err("has a login that is not UTF-8 once decoded; write it in UTF-8".to_owned());
    }
    // The HTTP client would find that at each message only.
    if let Err(error) = url.as_str().parse::<hyper::Uri>() {
        return Err(format!(
            "has a URL that no HTTP client can use ({error}); shorten it"
        ));
    }
    Ok(url)
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => {
            Err("is zero, so that no attempt could succeed; write it like 15s".into())
        }
        timeout => Ok(timeout),
    }
}

fn parse_max_attempts(text: &str) -> Result<Option<u32>, String> {
    match text.parse() {
        Ok(0) => Ok(None),
        Ok(attempts) => Ok(Some(attempts)),
        Err(_) => Err(format!(
            "{text:?} is no count; write a whole number such as 5, or 0 for attempts without end"
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{
        tests::{assert_refused, problems, with},
        variables::*,
    };

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
        assert_eq!(config.webhook.secrets.len(), 2);
        assert_eq!(config.republish_delay, Duration::from_millis(100));
        let shown = format!("{config:?}");
        assert!(
            !shown.contains("hunter2") && !shown.contains("MfKQ9"),
            "{shown}"
        );
    }

    #[test]
    fn two_variables_for_one_header_are_refused() {
        for second in ["WEBHOOK_HEADER_x_key", "WEBHOOK_HEADER_X-KEY"] {
            let problems = problems(&[("WEBHOOK_HEADER_X_KEY", "a"), (second, "b")]);
            assert_eq!(problems.len(), 1, "{problems:?}");
            for part in [
                "WEBHOOK_HEADER_X_KEY",
                second,
                "both set x-key; keep one of them",
            ] {
                assert!(problems[0].contains(part), "{problems:?}");
            }
        }
    }

    #[test]
    fn every_refusal_names_the_variable_and_the_fault() {
        assert_refused(&[
            (DESTINATION, "", "not set"),
            (DESTINATION, "localhost:3000", "starts with localhost:"),
            (DESTINATION, "/hook", "is no URL"),
            (DESTINATION, "ftp://host/", "starts with ftp:"),
            (DESTINATION, "http://", "is no URL"),
            (DESTINATION, " ", "nothing but white space"),
            (DESTINATION, "http://%ff:p@host", "is not UTF-8"),
            (DESTINATION, "http://u:%ff@host", "is not UTF-8"),
            (
                DESTINATION,
                &format!("http://host/{}", "x".repeat(66_000)),
                "no HTTP client can use (uri too long)",
            ),
            (DESTINATION, "http://a b", "is no URL"),
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
            (TIMEOUT, "15", "is no duration"),
            (TIMEOUT, "-1s", "is no duration"),
            (TIMEOUT, "1day 1s", "is no duration"),
            (TIMEOUT, "0s", "is zero"),
            (TIMEOUT, "500000000000y", "at most a day"),
            (MAX_ATTEMPTS, "many", "is no count"),
            (MAX_ATTEMPTS, "-1", "is no count"),
            (EVERY_ADDRESS, "yes", "write true or false"),
        ]);
    }

    #[test]
    fn every_address_is_for_names_that_no_proxy_looks_up() {
        let urls = "http://app.example/ http://10.0.0.1/ http://[fd00::1]/ http://localhost/";
        let set = |changes: &[(&'static str, &'static str)]| {
            with(&[&[(DESTINATION, urls), (EVERY_ADDRESS, "true")], changes].concat())
        };
        let destinations = set(&[]).unwrap().webhook.destinations;
        let every_address: Vec<_> = destinations.iter().map(|d| d.every_address()).collect();
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
}
