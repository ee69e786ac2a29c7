//! Which JetStream the streams are in: that of the server, or one that is reached through it by the name of
//! its domain, as behind a leaf node.

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
    /// What the subjects of all requests begin with.
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

    /// The name of its domain, if it is known by one.
    #[must_use]
    pub fn domain(&self) -> Option<&str> {
        self.domain.as_deref()
    }

    /// The subject of a request, such as `STREAM.INFO.CMS`.
    #[must_use]
    pub fn subject(&self, request: fmt::Arguments<'_>) -> String {
        format!("{}{request}", self.prefix)
    }

    /// The request of which this is the subject, if it is one.
    pub(super) fn request<'a>(&self, subject: &'a str) -> Option<&'a str> {
        subject.strip_prefix(&*self.prefix)
    }

    pub(super) fn context(&self, client: Client) -> Context {
        match &self.domain {
            Some(domain) => jetstream::with_domain(client, domain),
            None => jetstream::new(client),
        }
    }

    /// What it means that nobody answers a request: a leaf node loses its hub, and finds it again.
    /// `variable` names the stream.
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
    /// There was no answer, for this reason.
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
    /// Asks the JetStream API, and returns its answer, a [`Response`](jetstream::response::Response) as JSON. By
    /// our own inbox: a request of the client that gets no answer leaves an entry behind in it for ever.
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

/// Why JetStream does not do what it was asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// Later it may.
    Temporary(String),
    /// It never will.
    Permanent(String),
}

/// What it means that JetStream refuses the use of `what`, in the stream that `variable` names (NATS ADR-7).
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
