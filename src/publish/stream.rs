//! A stream that keeps what is published under a prefix. A plain publish is fire and forget; such a stream
//! has to confirm each message (its publish acknowledgement), and until then it is published again, with
//! the same `Nats-Msg-Id`.

use std::{sync::Arc, time::Duration};

use anyhow::bail;
use async_nats::{
    HeaderMap, Message, StatusCode,
    jetstream::{
        ErrorCode, context::RequestErrorKind, publish::PublishAck, response::Response, stream::Info,
    },
};
use log::warn;
use serde_json::Value;
use tokio::time::sleep;

use crate::{
    backoff::Backoff,
    monitor::Monitor,
    nats::{ANSWER_TIMEOUT, Connection, Failure, NoAnswer, refused},
    source::Delivery,
    subject::Prefix,
};

/// Growing waits for a stream that does not confirm, as without a leader, or that is full.
pub const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(5),
};

/// A stream that keeps what is published under a prefix, and has to confirm it.
pub struct ConfirmingStream {
    connection: Connection,
    monitor: Arc<Monitor>,
    /// The variable that names the stream.
    variable: &'static str,
    /// The stream.
    stream: String,
}

impl ConfirmingStream {
    /// The stream that `variable` names.
    #[must_use]
    pub fn new(
        connection: Connection,
        monitor: Arc<Monitor>,
        variable: &'static str,
        stream: String,
    ) -> Self {
        Self {
            connection,
            monitor,
            variable,
            stream,
        }
    }

    /// The name of the stream.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.stream
    }

    /// Verifies that the stream is there and keeps all that is published under `prefix`; its subjects.
    ///
    /// # Errors
    /// If it is not, or does not.
    pub async fn open(&self, prefix: &Prefix) -> Result<Vec<String>, Failure> {
        let Self {
            variable, stream, ..
        } = self;
        let config = match self.connection.stream_info(stream).await {
            Ok(Response::Ok(Info { config, .. })) => config,
            Ok(Response::Err { error }) => {
                return Err(match error.error_code() {
                    ErrorCode::STREAM_NOT_FOUND => Failure::Permanent(format!(
                        "there is no stream {stream}; create it, or set {variable} to one that exists"
                    )),
                    _ => refused(&error, &format!("the stream {stream}"), variable),
                });
            }
            Err(error) => {
                return Err(match error.kind() {
                    RequestErrorKind::NoResponders => self.connection.api().silence(variable),
                    _ => Failure::Temporary(error.to_string()),
                });
            }
        };
        for (is_set, effect) in [
            (config.no_ack, "confirms nothing (no_ack)"),
            (config.sealed, "takes nothing any more (sealed)"),
        ] {
            if is_set {
                return Err(Failure::Permanent(format!(
                    "the stream {stream} {effect}; change that, or set {variable} to another one"
                )));
            }
        }
        if !prefix.is_covered_by(&config.subjects) {
            return Err(Failure::Permanent(format!(
                "the stream {stream} does not keep {prefix}.>, but {:?}; add it to its subjects, or \
                 set {variable} to the stream that does",
                config.subjects
            )));
        }
        Ok(config.subjects)
    }

    /// Publishes a message on `subject` until the stream has confirmed it.
    ///
    /// # Errors
    /// If the stream, or the server, refuses it for good.
    pub async fn publish(
        &self,
        delivery: &Delivery,
        subject: &str,
        headers: &HeaderMap,
    ) -> anyhow::Result<()> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let reason = match self.publish_once(delivery, subject, headers).await {
                Ok(()) => return Ok(()),
                Err(Failure::Permanent(reason)) => bail!(reason),
                Err(Failure::Temporary(reason)) => reason,
            };
            let wait = BACKOFF.wait(attempts);
            let failure = format!(
                "{}: the stream {} has not confirmed {subject}, attempt {attempts}: {reason}",
                delivery.subject, self.stream
            );
            warn!(
                subject:% = delivery.subject, relayed_subject = subject, attempts, reason;
                "{failure}; next attempt in {wait:.1?}"
            );
            self.monitor.set_last_failure(failure);
            sleep(wait).await;
        }
    }

    /// Publishes a message once, and waits for the stream to confirm it.
    async fn publish_once(
        &self,
        delivery: &Delivery,
        subject: &str,
        headers: &HeaderMap,
    ) -> Result<(), Failure> {
        self.connection.up().await;
        let refusals = self.connection.refusals();
        let (headers, payload) = (headers.clone(), delivery.payload.clone());
        let domain = self.connection.api().domain();
        // Others that listen to the prefix may answer as well.
        let confirmation = |answer: &Message| judge(answer, &self.stream, domain);
        let confirmed = self
            .connection
            .ask(subject.into(), headers, payload, confirmation);
        match confirmed.await {
            Ok(confirmed) => confirmed,
            Err(NoAnswer::Refused(reason)) => Err(Failure::Permanent(reason)),
            Err(NoAnswer::TimedOut) if self.connection.refusals() > refusals => {
                Err(Failure::Permanent("NATS refuses it".to_owned()))
            }
            Err(NoAnswer::TimedOut) => Err(Failure::Temporary(format!(
                "not confirmed within {ANSWER_TIMEOUT:?}"
            ))),
        }
    }
}

/// What an answer to a message says about whether `stream` has it; nothing if it is none of a stream, or of
/// one in another domain than that of `stream`, where that is known: the leaf node that a relay is connected to
/// may keep the same subjects.
fn judge(answer: &Message, stream: &str, domain: Option<&str>) -> Option<Result<(), Failure>> {
    if answer.status == Some(StatusCode::NO_RESPONDERS) {
        let reason = "no stream takes it just now";
        return Some(Err(Failure::Temporary(reason.to_owned())));
    }
    if domain.is_some_and(|domain| is_foreign(&answer.payload, stream, domain)) {
        return None;
    }
    Some(match serde_json::from_slice(&answer.payload).ok()? {
        Response::Ok(PublishAck { stream: found, .. }) if found == stream => Ok(()),
        Response::Ok(PublishAck { stream: found, .. }) => Err(Failure::Permanent(format!(
            "it went into the stream {found}, not into {stream}"
        ))),
        Response::Err { error } => {
            let is_temporary = match error.error_code() {
                // An account at its limit is like a full stream: it drains, or is given more room.
                ErrorCode::ACCOUNT_RESOURCES_EXCEEDED => true,
                // Such as no leader (503), a full stream (503), too many at a time (429), the same
                // message just on its way (409).
                _ => matches!(error.code(), 408 | 409 | 429 | 500..),
            };
            Err(if is_temporary {
                Failure::Temporary(error.to_string())
            } else {
                Failure::Permanent(format!("the stream {stream} refuses it: {error}"))
            })
        }
    })
}

/// Whether an answer comes from another stream than this one of this domain.
fn is_foreign(answer: &[u8], stream: &str, domain: &str) -> bool {
    let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
    // An error tells the stream, but not the domain.
    match answer.get("error") {
        None => answer["stream"] != stream || answer["domain"] != domain,
        Some(_) => answer.get("stream").is_some_and(|found| found != stream),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_publish_acknowledgement_of_the_right_stream_confirms() {
        let (confirmed, temporary, permanent) = ("confirmed", "temporary", "permanent");
        for (payload, expected) in [
            (r#"{"stream":"RELAYED","seq":7}"#, confirmed),
            (
                r#"{"stream":"RELAYED","seq":7,"domain":"hub","duplicate":true}"#,
                confirmed,
            ),
            (r#"{"stream":"OTHER","seq":7}"#, permanent),
            // What else listens to the prefix may answer too.
            ("", "nothing"),
            ("ok", "nothing"),
            ("{}", "nothing"),
            (r#"{"stream":"RELAYED"}"#, "nothing"),
            (r#"{"error":"no"}"#, "nothing"),
            (
                r#"{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"}}"#,
                temporary,
            ),
            (
                r#"{"error":{"code":503,"err_code":10008,"description":"unavailable"}}"#,
                temporary,
            ),
            (
                r#"{"error":{"code":400,"err_code":10002,"description":"limits exceeded"}}"#,
                temporary,
            ),
            (
                r#"{"error":{"code":429,"err_code":10167,"description":"too many requests"}}"#,
                temporary,
            ),
            (
                r#"{"error":{"code":409,"err_code":10158,"description":"conflict"}}"#,
                temporary,
            ),
            (
                r#"{"error":{"code":400,"err_code":10060,"description":"expected stream"}}"#,
                permanent,
            ),
            (
                r#"{"error":{"code":400,"err_code":10054,"description":"message size"}}"#,
                permanent,
            ),
            (
                r#"{"error":{"code":400,"err_code":10109,"description":"sealed"}}"#,
                permanent,
            ),
        ] {
            let answer = message(payload, None);
            let found = match judge(&answer, "RELAYED", None) {
                None => "nothing",
                Some(Ok(())) => confirmed,
                Some(Err(Failure::Temporary(_))) => temporary,
                Some(Err(Failure::Permanent(_))) => permanent,
            };
            assert_eq!(found, expected, "{payload}");
        }
        let nobody = judge(
            &message("", Some(StatusCode::NO_RESPONDERS)),
            "RELAYED",
            None,
        );
        assert!(matches!(nobody, Some(Err(Failure::Temporary(_)))));
    }

    #[test]
    fn only_the_stream_of_the_right_domain_confirms() {
        for (payload, counts) in [
            (r#"{"stream":"RELAYED","seq":7,"domain":"hub"}"#, true),
            (r#"{"stream":"RELAYED","seq":7,"domain":"leaf"}"#, false),
            (r#"{"stream":"RELAYED","seq":7}"#, false),
            (r#"{"stream":"OTHER","seq":7,"domain":"hub"}"#, false),
            (
                r#"{"error":{"code":503,"err_code":10077},"stream":"RELAYED","seq":0}"#,
                true,
            ),
            (
                r#"{"error":{"code":400,"err_code":10060},"stream":"OTHER","seq":0}"#,
                false,
            ),
            (r#"{"error":{"code":503,"err_code":10008}}"#, true),
            ("ok", false),
        ] {
            let found = judge(&message(payload, None), "RELAYED", Some("hub"));
            assert_eq!(found.is_some(), counts, "{payload}");
        }
    }

    fn message(payload: &'static str, status: Option<StatusCode>) -> Message {
        Message {
            subject: "_INBOX.x.1".into(),
            reply: None,
            payload: payload.into(),
            headers: None,
            status,
            description: None,
            length: 0,
        }
    }
}
