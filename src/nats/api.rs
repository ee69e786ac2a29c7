//! The JetStream API: that of the server, or of another domain that is reached through it, as behind a leaf node.

use std::{fmt, time::Duration};

use anyhow::bail;
use async_nats::{
    HeaderMap,
    jetstream::{self, ErrorCode, response::Response, stream},
};
use log::warn;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{Connection, NoAnswer};
use crate::{backoff::Backoff, config::Config, monitor::Monitor};

/// Growing waits while JetStream is not ready, because it has no leader or a stream is full.
pub const JETSTREAM_BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(5),
};

/// Returns the prefix of the subjects of all requests.
pub(super) fn api_prefix(config: &Config) -> String {
    match &config.domain {
        Some(domain) => format!("$JS.{domain}.API."),
        None => "$JS.API.".to_owned(),
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

    /// Sends a request to the JetStream API, and returns the answer. Uses our own inbox, because a request of the
    /// client's that gets no answer leaks an entry in the client.
    ///
    /// # Errors
    /// If it is not carried out.
    pub async fn request(&self, request: &str, question: &Value) -> Result<Value, ApiError> {
        let subject = self.api_subject(request).into();
        let question = question.to_string().into();
        let answer = self.ask(subject, HeaderMap::new(), question, |answer| {
            Some(answer.payload.clone())
        });
        match serde_json::from_slice(&answer.await?)? {
            Response::Ok(answer) => Ok(answer),
            Response::Err { error } => Err(ApiError::Refused(error)),
        }
    }

    /// Returns the configuration of a stream.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn stream_config(&self, stream: &str) -> Result<stream::Config, ApiError> {
        let request = format!("STREAM.INFO.{stream}");
        let answer = self.request(&request, &json!({})).await?;
        Ok(serde_json::from_value::<stream::Info>(answer)?.config)
    }

    /// Interprets the error of a request about `stream`, which `variable` names.
    #[must_use]
    pub fn failure(&self, error: ApiError, variable: &str, stream: &str) -> Failure {
        match (error, self.domain()) {
            (ApiError::Refused(error), _) => refused(&error, variable, stream),
            // A leaf node can lose its hub and find it again.
            (ApiError::NoAnswer(NoAnswer::Nobody), Some(domain)) => Failure::Temporary(format!(
                "nobody answers for the domain {domain}; check NATS_JS_DOMAIN, and that the leaf node is \
                 connected to it"
            )),
            (ApiError::NoAnswer(NoAnswer::Nobody), None) => Failure::Permanent(format!(
                "JetStream is not enabled on the NATS server; enable it (behind a leaf node: set \
                 NATS_JS_DOMAIN to the domain of the stream), or unset {variable}"
            )),
            (error, _) => Failure::Temporary(error.to_string()),
        }
    }

    /// Tries something until JetStream is ready for it; logs why it is not.
    ///
    /// # Errors
    /// If it can never succeed.
    pub async fn until_ready<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        monitor: &Monitor,
        attempt: impl Fn() -> F,
    ) -> anyhow::Result<T> {
        let mut failures = 0;
        loop {
            let reason = match attempt().await {
                Ok(done) => return Ok(done),
                Err(Failure::Permanent(reason)) => bail!(reason),
                Err(Failure::Temporary(reason)) => reason,
            };
            failures += 1;
            let wait = JETSTREAM_BACKOFF.wait(failures);
            // A lost connection is already in the log.
            if self.is_up() {
                let obstacle = format!("JetStream is not ready: {reason}");
                warn!("{obstacle}; next attempt in {wait:.1?}");
                monitor.set_obstacle(Some(obstacle));
            }
            sleep(wait).await;
        }
    }
}

/// Why the API has not carried out a request.
#[derive(Debug)]
pub enum ApiError {
    /// There was no answer.
    NoAnswer(NoAnswer),
    /// The answer cannot be parsed.
    Unreadable(serde_json::Error),
    /// JetStream refuses it.
    Refused(jetstream::Error),
}

impl From<NoAnswer> for ApiError {
    fn from(error: NoAnswer) -> Self {
        Self::NoAnswer(error)
    }
}

impl From<serde_json::Error> for ApiError {
    fn from(error: serde_json::Error) -> Self {
        Self::Unreadable(error)
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAnswer(error) => error.fmt(f),
            Self::Unreadable(error) => write!(f, "its answer cannot be parsed: {error}"),
            Self::Refused(error) => error.fmt(f),
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

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Temporary(reason) | Self::Permanent(reason)) = self;
        f.write_str(reason)
    }
}

impl std::error::Error for Failure {}

/// Interprets an error of JetStream about `stream`, which `variable` names (NATS ADR-7).
fn refused(error: &jetstream::Error, variable: &str, stream: &str) -> Failure {
    match error.error_code() {
        ErrorCode::STREAM_NOT_FOUND => Failure::Permanent(format!(
            "there is no stream {stream}; create it, or set {variable} to one that exists"
        )),
        ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => {
            Failure::Permanent(format!(
                "JetStream is not enabled: {error}; enable it, or unset {variable}"
            ))
        }
        _ if error.code() >= 500 => Failure::Temporary(error.to_string()),
        _ => Failure::Permanent(format!("the stream {stream} cannot be used: {error}")),
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
                Failure::Permanent("the stream Y cannot be used: no (code 400, error code 10003)".to_owned()),
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
            assert_eq!(refused(&error, "X", "Y"), expected);
        }
    }
}
