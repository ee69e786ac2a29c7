//! A stream that has to confirm the messages published under a prefix. A plain publish is fire and forget; with such
//! a stream, each message is published again, with the same `Nats-Msg-Id`, until its publish acknowledgement arrives.

use std::sync::{Arc, OnceLock};

use anyhow::bail;
use async_nats::{
    HeaderMap, Message,
    jetstream::{ErrorCode, publish::PublishAck, response::Response, stream::Info},
};
use log::warn;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    monitor::Monitor,
    nats::{ANSWER_TIMEOUT, Connection, Failure, JETSTREAM_BACKOFF, NoAnswer},
    source::Delivery,
    subject::Prefix,
};

/// A stream that has to confirm the messages published under a prefix.
pub struct ConfirmingStream {
    connection: Connection,
    monitor: Arc<Monitor>,
    /// The variable that names the stream.
    variable: &'static str,
    /// The name of the stream.
    stream: String,
}

impl ConfirmingStream {
    /// Returns the stream that `variable` names.
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

    /// Returns the name of the stream.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.stream
    }

    /// Verifies that the stream exists and stores everything published under `prefix`.
    ///
    /// # Errors
    /// If it does not.
    pub async fn open(&self, prefix: &Prefix) -> Result<(), Failure> {
        let Self {
            variable, stream, ..
        } = self;
        let request = format!("STREAM.INFO.{stream}");
        let answer = self.connection.request(&request, &json!({})).await;
        let Info { config, .. } = answer
            .and_then(|answer| Ok(serde_json::from_value(answer)?))
            .map_err(|error| self.connection.failure(error, variable, stream))?;
        for (is_set, effect) in [
            (config.no_ack, "confirms nothing (no_ack)"),
            (config.sealed, "accepts no more messages (sealed)"),
        ] {
            if is_set {
                return Err(Failure::Permanent(format!(
                    "the stream {stream} {effect}; change that, or set {variable} to another one"
                )));
            }
        }
        let mut subjects = config.subjects.iter();
        if !subjects.any(|subject| prefix.is_covered_by(subject)) {
            return Err(Failure::Permanent(format!(
                "none of the subjects of the stream {stream}, {:?}, covers {prefix}.>; add it to them, or \
                 set {variable} to the stream that keeps it",
                config.subjects
            )));
        }
        Ok(())
    }

    /// Publishes a message on `subject` until the stream has confirmed it. Returns `false` if the message turns
    /// out not to be ours any more.
    ///
    /// # Errors
    /// If the stream or the server refuses it permanently.
    pub async fn publish(
        &self,
        delivery: &Delivery,
        subject: &str,
        headers: &HeaderMap,
    ) -> anyhow::Result<bool> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            self.connection.up().await;
            if !delivery.may_be_published().await {
                return Ok(false);
            }
            let reason = match self.publish_once(delivery, subject, headers).await {
                Ok(()) => return Ok(true),
                Err(Failure::Permanent(reason)) => bail!(reason),
                Err(Failure::Temporary(reason)) => reason,
            };
            let wait = JETSTREAM_BACKOFF.wait(attempts);
            warn!(
                subject:% = delivery.subject, relayed_subject = subject, attempts, reason;
                "{}: the stream {} has not confirmed {subject}, attempt {attempts}: {reason}; next \
                 attempt in {wait:.1?}",
                delivery.subject, self.stream
            );
            self.monitor.add_unconfirmed();
            let what = format!("The stream {}, which has to keep {subject},", self.stream);
            self.monitor.set_failing(what, reason, wait);
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
        let refusals = self.connection.refusals();
        let (headers, payload) = (headers.clone(), delivery.payload.clone());
        let domain = self.connection.domain();
        // Other subscribers may reply as well.
        let other = OnceLock::new();
        let confirmation = |answer: &Message| judge(answer, &self.stream, domain, &other);
        let confirmed = self
            .connection
            .ask(subject.into(), headers, payload, confirmation);
        match confirmed.await {
            Ok(confirmed) => confirmed,
            Err(NoAnswer::Nobody) => Err(Failure::Temporary(
                "no stream accepts it at the moment".to_owned(),
            )),
            Err(NoAnswer::Refused(reason)) => Err(Failure::Permanent(reason)),
            Err(NoAnswer::TimedOut) if self.connection.refusals() > refusals => {
                Err(Failure::Permanent("NATS refuses it".to_owned()))
            }
            Err(NoAnswer::TimedOut) => Err(Failure::Temporary(match other.get() {
                Some(other) => format!("not confirmed within {ANSWER_TIMEOUT:?}, but by {other}"),
                None => format!("not confirmed within {ANSWER_TIMEOUT:?}"),
            })),
        }
    }
}

/// Returns what an answer to a published message says about `stream`, if anything. Every stream that gets the message
/// answers, including those of another account or of the leaf node that the relay is connected to; `other` notes the
/// first of these.
fn judge(
    answer: &Message,
    stream: &str,
    domain: Option<&str>,
    other: &OnceLock<String>,
) -> Option<Result<(), Failure>> {
    let answer: Value = serde_json::from_slice(&answer.payload).ok()?;
    let (found, found_domain) = (answer["stream"].as_str()?, answer["domain"].as_str());
    // A refusal does not name the domain.
    let is_refusal = answer.get("error").is_some();
    if found != stream || !is_refusal && domain.is_some() && found_domain != domain {
        other.get_or_init(|| match found_domain {
            Some(domain) => format!("the stream {found} of the domain {domain}"),
            None => format!("the stream {found}"),
        });
        return None;
    }
    Some(match serde_json::from_value(answer).ok()? {
        Response::Ok(PublishAck { .. }) => Ok(()),
        Response::Err { error } => {
            let is_temporary = match error.error_code() {
                // An account at its limit is like a full stream: it drains, or somebody raises the limit.
                ErrorCode::ACCOUNT_RESOURCES_EXCEEDED => true,
                // No leader (503), a full stream (503), too many in flight (429), the same message
                // already in flight (409).
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns in a word what this answer says about `RELAYED`.
    fn said(payload: &'static str, domain: Option<&str>) -> &'static str {
        let answer = message(payload);
        match judge(&answer, "RELAYED", domain, &OnceLock::new()) {
            None => "nothing",
            Some(Ok(())) => "confirmed",
            Some(Err(Failure::Temporary(_))) => "temporary",
            Some(Err(Failure::Permanent(_))) => "permanent",
        }
    }

    #[test]
    fn only_a_publish_acknowledgement_of_the_right_stream_confirms() {
        for (payload, expected) in [
            (r#"{"stream":"RELAYED","seq":7}"#, "confirmed"),
            (
                r#"{"stream":"RELAYED","seq":7,"domain":"hub","duplicate":true}"#,
                "confirmed",
            ),
            (r#"{"stream":"OTHER","seq":7}"#, "nothing"),
            // Other subscribers may reply too.
            ("", "nothing"),
            ("ok", "nothing"),
            ("{}", "nothing"),
            (r#"{"stream":"RELAYED"}"#, "nothing"),
            (r#"{"error":"no","stream":"RELAYED"}"#, "nothing"),
        ] {
            assert_eq!(said(payload, None), expected, "{payload}");
        }
    }

    #[test]
    fn a_refusal_is_temporary_unless_the_message_is_at_fault() {
        for (error, expected) in [
            (r#"{"code":503,"err_code":10077}"#, "temporary"),
            (r#"{"code":503,"err_code":10008}"#, "temporary"),
            (r#"{"code":400,"err_code":10002}"#, "temporary"),
            (r#"{"code":429,"err_code":10167}"#, "temporary"),
            (r#"{"code":409,"err_code":10158}"#, "temporary"),
            (r#"{"code":400,"err_code":10054}"#, "permanent"),
            (r#"{"code":400,"err_code":10109}"#, "permanent"),
        ] {
            let payload = format!(r#"{{"error":{error},"stream":"RELAYED","seq":0}}"#);
            assert_eq!(said(payload.leak(), None), expected, "{error}");
            let payload = format!(r#"{{"error":{error},"stream":"OTHER","seq":0}}"#);
            assert_eq!(said(payload.leak(), None), "nothing", "{error}");
        }
    }

    #[test]
    fn only_the_stream_of_the_right_domain_confirms() {
        for (payload, expected) in [
            (
                r#"{"stream":"RELAYED","seq":7,"domain":"hub"}"#,
                "confirmed",
            ),
            (r#"{"stream":"RELAYED","seq":7,"domain":"leaf"}"#, "nothing"),
            (r#"{"stream":"RELAYED","seq":7}"#, "nothing"),
            (r#"{"stream":"OTHER","seq":7,"domain":"hub"}"#, "nothing"),
            (
                r#"{"error":{"code":503,"err_code":10077},"stream":"RELAYED","seq":0}"#,
                "temporary",
            ),
        ] {
            assert_eq!(said(payload, Some("hub")), expected, "{payload}");
        }
    }

    fn message(payload: &'static str) -> Message {
        Message {
            subject: "_INBOX.x.1".into(),
            reply: None,
            payload: payload.into(),
            headers: None,
            status: None,
            description: None,
            length: 0,
        }
    }
}
