//! The headers that a request has beside the relay's own: those of the settings, and those of the message.

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use super::{
    reader::{Reader, parse_list},
    variables::{FILE_SUFFIX, HEADER_PREFIX},
};

/// Reads the headers of all `WEBHOOK_HEADER_<NAME>`.
pub(super) fn read_headers(reader: &mut Reader<'_>) -> HeaderMap {
    let environment = reader.environment;
    let names = environment.names().map(|name| {
        // WEBHOOK_HEADER_FILE is the header `file`.
        let stem = name.strip_suffix(FILE_SUFFIX);
        stem.filter(|stem| stem.starts_with(HEADER_PREFIX))
            .unwrap_or(name)
    });
    names
        .filter(|name| name.starts_with(HEADER_PREFIX))
        .filter_map(|name| reader.optional(name, |value| parse_header(name, value)))
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

/// `WEBHOOK_HEADER_X_KEY` is the header `x-key`.
fn parse_header(variable: &str, value: &str) -> Result<(HeaderName, HeaderValue), String> {
    let name = variable.strip_prefix(HEADER_PREFIX).unwrap_or(variable);
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

/// Names of message headers, some of them the beginnings of names.
#[derive(Clone, Debug, Default)]
pub struct PassHeaders(Vec<String>);

impl PassHeaders {
    /// Returns whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether a header of this name, in lower case, is one of them.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        let is_it = |entry: &String| match entry.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == entry,
        };
        !is_reserved(name) && !LOGINS.contains(&name) && self.0.iter().any(is_it)
    }

    pub(super) fn parse(text: &str) -> Result<Self, String> {
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
