//! The point of no return: a message is published, and then its delivery is acknowledged.
//!
//! A plain publish is fire and forget. If a stream has to confirm what is published under a prefix, each message is
//! published again, with the same `Nats-Msg-Id`, until its publish acknowledgement arrives.

use std::sync::{Arc, OnceLock};

use anyhow::bail;
use async_nats::{
    HeaderMap, Message,
    jetstream::{ErrorCode, publish::PublishAck, response::Response},
};
use log::warn;
use serde_json::Value;
use tokio::time::sleep;

use crate::{
    config::{Config, FAILED_STREAM, RELAYED_STREAM},
    monitor::Monitor,
    nats::{ANSWER_TIMEOUT, Connection, Failure, JETSTREAM_BACKOFF, NoAnswer},
    source::{Delivery, Outcome},
    subject::Prefix,
};

/// Publishes and acknowledges.
pub struct Commit {
    connection: Connection,
    monitor: Arc<Monitor>,
    /// Where relayed messages are published.
    pub relayed: Publisher,
    /// Where failed messages are published, if anywhere.
    pub failed: Option<Publisher>,
}

/// Where messages are published.
pub struct Publisher {
    /// The prefix of their subjects.
    pub prefix: Prefix,
    /// The stream that has to confirm them, if any.
    pub stream: Option<String>,
    /// The variable that names the stream.
    variable: &'static str,
}

/// A message to be published.
pub struct Publication<'a> {
    /// Where it is published.
    pub publisher: &'a Publisher,
    /// Its subject, below the publisher's prefix.
    pub subject: &'a str,
    /// Its headers; the payload is the delivery's.
    pub headers: HeaderMap,
}

impl Commit {
    /// Creates a `Commit` that publishes and acknowledges on `connection`.
    #[must_use]
    pub fn new(connection: Connection, config: &Config, monitor: &Arc<Monitor>) -> Self {
        Self {
            connection,
            monitor: Arc::clone(monitor),
            relayed: Publisher {
                prefix: config.relayed_prefix.clone(),
                stream: config.relayed_stream.clone(),
                variable: RELAYED_STREAM,
            },
            failed: config.failed_prefix.clone().map(|prefix| Publisher {
                prefix,
                stream: config.failed_stream.clone(),
                variable: FAILED_STREAM,
            }),
        }
    }

    /// Verifies the streams that have to confirm published messages; waits while JetStream is not ready.
    ///
    /// # Errors
    /// If one of them cannot be used.
    pub async fn open(&self) -> anyhow::Result<()> {
        for publisher in self.publishers() {
            self.connection
                .until_ready(&self.monitor, || self.verify(publisher))
                .await?;
        }
        Ok(())
    }

    /// Returns all publishers.
    pub fn publishers(&self) -> impl Iterator<Item = &Publisher> {
        [Some(&self.relayed), self.failed.as_ref()]
            .into_iter()
            .flatten()
    }

    /// Verifies that the stream that has to confirm messages, if any, exists and stores everything under the prefix.
    ///
    /// # Errors
    /// If it does not.
    pub async fn verify(&self, publisher: &Publisher) -> Result<(), Failure> {
        let Publisher {
            prefix,
            stream: Some(stream),
            variable,
        } = publisher
        else {
            return Ok(());
        };
        let config = self.connection.stream_config(stream).await;
        let config = config.map_err(|error| self.connection.failure(error, variable, stream))?;
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

    /// Publishes a message, if there is one to publish, and then acknowledges the delivery. Both go over one
    /// connection and in this order, so that a server that has seen the ack has seen the message too. If a
    /// stream has to confirm the message, the ack is sent only once it has. Returns whether the server
    /// confirmed the ack; if not, the message may be redelivered, and counts as unfinished.
    ///
    /// # Errors
    /// If the message cannot be published.
    pub async fn commit(
        &self,
        delivery: &Delivery,
        mut publication: Option<Publication<'_>>,
        outcome: Outcome,
    ) -> anyhow::Result<bool> {
        // In durable mode, a refused message must not be acked as relayed.
        let must_know = delivery.ack.is_some();
        let mut attempts = 0;
        loop {
            self.connection.up().await;
            if !delivery.may_be_published().await {
                let is_acknowledged = delivery.is_acknowledged();
                if !is_acknowledged {
                    self.monitor.add_unfinished("another relay has it");
                }
                return Ok(is_acknowledged);
            }
            let (epoch, refusals) = (self.connection.epoch(), self.connection.refusals());
            if let Some(unpublished) = &publication {
                if let Some(stream) = &unpublished.publisher.stream {
                    attempts += 1;
                    match self.publish_once(delivery, unpublished, stream).await {
                        Ok(()) => publication = None,
                        Err(Failure::Permanent(reason)) => bail!(reason),
                        Err(Failure::Temporary(reason)) => {
                            let subject = unpublished.subject;
                            self.wait(delivery, subject, stream, attempts, reason).await;
                        }
                    }
                    continue;
                }
                let (subject, headers) = (unpublished.subject.into(), unpublished.headers.clone());
                self.connection
                    .publish(subject, headers, delivery.payload.clone(), must_know)
                    .await?;
                if self.connection.epoch() != epoch {
                    continue;
                }
            }
            let is_acknowledged = match &delivery.ack {
                Some(ack) => ack.confirm(outcome, epoch).await,
                None => {
                    self.connection.flush().await;
                    (self.connection.epoch() == epoch).then_some(true)
                }
            };
            // Data in flight on a broken connection may be lost, so publish again.
            let Some(is_acknowledged) = is_acknowledged else {
                continue;
            };
            // The permission may have been withdrawn since the last round trip.
            if publication.is_some() && must_know && self.connection.refusals() > refusals {
                bail!("NATS refuses it");
            }
            if !is_acknowledged {
                self.monitor
                    .add_unfinished("NATS has not confirmed the ack");
            }
            return Ok(is_acknowledged);
        }
    }

    /// Publishes a message once, and waits for the stream to confirm it.
    async fn publish_once(
        &self,
        delivery: &Delivery,
        publication: &Publication<'_>,
        stream: &str,
    ) -> Result<(), Failure> {
        let refusals = self.connection.refusals();
        let (subject, headers) = (publication.subject.into(), publication.headers.clone());
        let domain = self.connection.domain();
        // Other subscribers may reply as well.
        let other = OnceLock::new();
        let confirmation = |answer: &Message| judge(answer, stream, domain, &other);
        let payload = delivery.payload.clone();
        let confirmed = self.connection.ask(subject, headers, payload, confirmation);
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
                Some(other) => {
                    format!("not confirmed within {ANSWER_TIMEOUT:?}; only {other} answered")
                }
                None => format!("not confirmed within {ANSWER_TIMEOUT:?}"),
            })),
        }
    }

    /// Waits after a failed attempt to publish a message that a stream has to confirm.
    async fn wait(
        &self,
        delivery: &Delivery,
        subject: &str,
        stream: &str,
        attempts: u32,
        reason: String,
    ) {
        let wait = JETSTREAM_BACKOFF.wait(attempts);
        warn!(
            subject:% = delivery.subject, relayed_subject = subject, attempts, reason;
            "{}: the stream {stream} has not confirmed {subject}, attempt {attempts}: {reason}; next attempt in \
             {wait:.1?}",
            delivery.subject
        );
        self.monitor.metrics.unconfirmed.inc();
        let what = format!("The stream {stream}, which has to keep {subject},");
        self.monitor.set_failing(what, reason, wait);
        sleep(wait).await;
    }
}

/// Interprets an answer to a published message; `None` if it is not about `stream`. Every stream that gets the message
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
            Some(domain) => format!("{found} of the domain {domain}"),
            None => found.to_owned(),
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
