//! The JetStream API: that of the server, or of another domain that is reached through it, as behind a leaf node.

use async_nats::{
    Client, HeaderMap,
    jetstream::{self, Context, ErrorCode},
};
use bytes::Bytes;
use serde_json::Value;

use super::{Connection, NoAnswer};
use crate::config::Config;

/// Returns the prefix of the subjects of all requests.
pub(super) fn api_prefix(config: &Config) -> String {
    match &config.domain {
        Some(domain) => format!("$JS.{domain}.API."),
        None => "$JS.API.".to_owned(),
    }
}

pub(super) fn context(client: Client, config: &Config) -> Context {
    match &config.domain {
        Some(domain) => jetstream::with_domain(client, domain),
        None => jetstream::new(client),
    }
}

impl Connection {
    /// Returns the name of the domain that has the streams, if it is not the server's own.
    #[must_use]
    pub fn domain(&self) -> Option<&str> {
        self.config.domain.as_deref()
    }

    /// Returns the subject of a request such as `STREAM.INFO.CMS`.
    #[must_use]
    pub fn api_subject(&self, request: &str) -> String {
        api_prefix(&self.config) + request
    }

    /// Sends a request to the JetStream API, and returns the answer, a [`Response`](jetstream::response::Response) as
    /// JSON. Uses our own inbox, because a request of the client's that gets no answer leaks an entry in the client.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn request(&self, request: &str, question: &Value) -> Result<Bytes, NoAnswer> {
        let subject = self.api_subject(request).into();
        let question = question.to_string().into();
        self.ask(subject, HeaderMap::new(), question, |answer| {
            Some(answer.payload.clone())
        })
        .await
    }

    /// Returns the failure of a request that nobody answers. It is temporary with a domain, because a leaf node can lose
    /// its hub and find it again. `variable` names the stream.
    #[must_use]
    pub fn silence(&self, variable: &str) -> Failure {
        match self.domain() {
            Some(domain) => Failure::Temporary(format!(
                "nobody answers for the domain {domain}; check NATS_JS_DOMAIN, and that the leaf node is \
                 connected to it"
            )),
            None => Failure::Permanent(format!(
                "JetStream is not enabled on the NATS server; enable it (behind a leaf node: set \
                 NATS_JS_DOMAIN to the domain of the stream), or unset {variable}"
            )),
        }
    }
}

/// Why JetStream does not carry out a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// It may do so later.
    Temporary(String),
    /// It will never do so.
    Permanent(String),
}

/// Interprets an error of JetStream about `what`, in the stream that `variable` names (NATS ADR-7).
#[must_use]
pub fn refused(error: &jetstream::Error, what: &str, variable: &str) -> Failure {
    match error.error_code() {
        ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => {
            Failure::Permanent(format!(
                "JetStream is not enabled: {error}; enable it, or unset {variable}"
            ))
        }
        _ if error.code() >= 500 => Failure::Temporary(error.to_string()),
        _ => Failure::Permanent(format!("{what} cannot be used: {error}")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{from_value, json};

    #[test]
    fn a_refusal_is_temporary_where_the_server_is_at_fault() {
        for (code, err_code, expected) in [
            (503, 10008, Failure::Temporary("no (code 503, error code 10008)".to_owned())),
            (500, 10049, Failure::Temporary("no (code 500, error code 10049)".to_owned())),
            (
                400,
                10003,
                Failure::Permanent("it cannot be used: no (code 400, error code 10003)".to_owned()),
            ),
            (
                503,
                10076,
                Failure::Permanent(
                    "JetStream is not enabled: no (code 503, error code 10076); enable it, or unset X"
                        .to_owned(),
                ),
            ),
            (
                503,
                10039,
                Failure::Permanent(
                    "JetStream is not enabled: no (code 503, error code 10039); enable it, or unset X"
                        .to_owned(),
                ),
            ),
        ] {
            let error = json!({ "code": code, "err_code": err_code, "description": "no" });
            let error: jetstream::Error = from_value(error).unwrap();
            assert_eq!(refused(&error, "it", "X"), expected);
        }
    }
}
