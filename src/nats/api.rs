//! The JetStream API: that of the server, or of another domain that is reached through it, as behind a leaf node.

use std::{fmt, sync::Arc};

use async_nats::{
    Client, HeaderMap, Message, StatusCode,
    jetstream::{self, Context, ErrorCode},
};

use bytes::Bytes;
use serde_json::Value;

use super::Connection;
use crate::config::Config;

/// The API of a JetStream.
#[derive(Clone)]
pub struct Api {
    domain: Option<Arc<str>>,
    /// The prefix of the subjects of all requests.
    prefix: Arc<str>,
}

impl Api {
    pub(super) fn of(config: &Config) -> Self {
        let domain = config.domain.as_deref();
        let prefix = match domain {
            Some(domain) => format!("$JS.{domain}.API."),
            None => "$JS.API.".to_owned(),
        };
        Self {
            domain: domain.map(Arc::from),
            prefix: prefix.into(),
        }
    }

    /// Returns the name of its domain, if it has one.
    #[must_use]
    pub fn domain(&self) -> Option<&str> {
        self.domain.as_deref()
    }

    /// Returns the subject of a request such as `STREAM.INFO.CMS`.
    #[must_use]
    pub fn subject(&self, request: fmt::Arguments<'_>) -> String {
        format!("{}{request}", self.prefix)
    }

    /// Returns the request that has this subject, if there is one.
    pub(super) fn request<'a>(&self, subject: &'a str) -> Option<&'a str> {
        subject.strip_prefix(&*self.prefix)
    }

    pub(super) fn context(&self, client: Client) -> Context {
        match &self.domain {
            Some(domain) => jetstream::with_domain(client, domain),
            None => jetstream::new(client),
        }
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

/// Why the API did not answer a request.
#[derive(Debug)]
pub enum ApiError {
    /// Nobody listens to such requests (see [`Api::silence`]).
    NobodyAnswers,
    /// There was no answer; the reason.
    NoAnswer(String),
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NobodyAnswers => "nobody answers",
            Self::NoAnswer(reason) => reason,
        })
    }
}

impl Connection {
    /// Sends a request to the JetStream API, and returns the answer, a [`Response`](jetstream::response::Response) as
    /// JSON. Uses our own inbox, because a request of the client's that gets no answer leaks an entry in the client.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn request(&self, request: &str, question: &Value) -> Result<Bytes, ApiError> {
        let subject = self.api().subject(format_args!("{request}")).into();
        let question = question.to_string().into();
        let read = |answer: &Message| {
            Some(match answer.status {
                Some(StatusCode::NO_RESPONDERS) => None,
                _ => Some(answer.payload.clone()),
            })
        };
        match self.ask(subject, HeaderMap::new(), question, read).await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(ApiError::NobodyAnswers),
            Err(error) => Err(ApiError::NoAnswer(error.to_string())),
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
