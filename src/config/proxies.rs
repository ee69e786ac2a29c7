//! Which destinations are reached through a proxy, as `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` say.

use std::{fmt, net::IpAddr};

use hyper_util::client::proxy::matcher::Matcher;
use reqwest::Url;

use super::{
    reader::{Noted, Reader, any_text},
    variables::{HTTP_PROXY, HTTPS_PROXY, NO_PROXY},
    without_secrets,
};

/// A proxy for requests. `Display` shows neither its userinfo nor its query.
#[derive(Clone)]
pub struct Proxy {
    url: Url,
}

impl Proxy {
    /// The URL with the login in it.
    #[must_use]
    pub fn expose_url(&self) -> &Url {
        &self.url
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&without_secrets(&self.url))
    }
}

/// The proxies that are set, and what is reached without one.
pub(super) struct Proxies {
    http: Option<Url>,
    https: Option<Url>,
    exempt: String,
}

impl Proxies {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, Noted> {
        let mut proxy = |name| {
            let name = as_set(reader, name);
            reader.optional(&name, parse)
        };
        let (http, https) = (proxy(HTTP_PROXY), proxy(HTTPS_PROXY));
        let name = as_set(reader, NO_PROXY);
        let exempt = reader.optional(&name, any_text);
        Ok(Self {
            http: http?,
            https: https?,
            exempt: exempt?.unwrap_or_default(),
        })
    }

    /// The proxy through which a destination is reached. A loopback address never is, as in Go's
    /// net/http: from the proxy's point of view it is another machine.
    pub(super) fn choose(&self, destination: &Url) -> Option<Proxy> {
        if is_loopback(destination) {
            return None;
        }
        let url = match destination.scheme() {
            "https" => self.https.as_ref()?,
            _ => self.http.as_ref()?,
        };
        let rules = Matcher::builder()
            .all(url.as_str())
            .no(self.exempt.as_str())
            .build();
        rules.intercept(&destination.as_str().parse().ok()?)?;
        Some(Proxy { url: url.clone() })
    }
}

/// The name by which a variable is set: these are written in lower case as well.
fn as_set(reader: &Reader<'_>, name: &str) -> String {
    let lower = name.to_lowercase();
    let is_lower = !reader.is_set(name) && reader.environment.raw(&lower) != Ok(None);
    if is_lower { lower } else { name.to_owned() }
}

fn parse(text: &str) -> Result<Url, String> {
    let example = "write it like http://proxy.example.com:3128";
    let with_scheme = match text.contains("://") {
        true => text.to_owned(),
        false => format!("http://{text}"),
    };
    let url: Url = with_scheme
        .parse()
        .map_err(|error| format!("is no URL ({error}); {example}"))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        other => Err(format!(
            "starts with {other}://, and only http:// and https:// proxies can be used; {example}"
        )),
    }
}

fn is_loopback(url: &Url) -> bool {
    // IPv6 addresses are in brackets in a URL.
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    match host.parse::<IpAddr>().map(|address| address.to_canonical()) {
        Ok(address) => address.is_loopback() || address.is_unspecified(),
        Err(_) => {
            let name = host.trim_end_matches('.');
            name == "localhost" || name.ends_with(".localhost")
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::environment::Environment;

    /// The proxy for each of `destinations` with these variables set.
    fn chosen(variables: &[(&str, &str)], destinations: &[&str]) -> Vec<Option<String>> {
        let environment: Environment = variables.iter().copied().collect();
        let mut reader = Reader::new(&environment);
        let proxies = Proxies::read(&mut reader).unwrap();
        let choose = |url: &&str| Some(proxies.choose(&url.parse().unwrap())?.to_string());
        destinations.iter().map(choose).collect()
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
            ("http://localhost./", None),
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
        assert_eq!(
            chosen(&[lower], &destination),
            [Some("http://lower/".to_owned())]
        );
        assert_eq!(
            chosen(&[lower, upper], &destination),
            [Some("http://upper/".to_owned())]
        );
        assert_eq!(chosen(&[lower, ("no_proxy", "*")], &destination), [None]);
        assert_eq!(chosen(&[], &destination), [None]);
    }
}
