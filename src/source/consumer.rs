//! The JetStream consumer: created if it is missing, else verified.

use std::time::Duration;

use anyhow::{anyhow, bail};
use async_nats::jetstream::{
    consumer::{self, AckPolicy, pull},
    context::ConsumerInfoErrorKind,
    response::Response,
    stream::{self, ConsumerErrorKind, DiscardPolicy, Stream},
};
use log::{info, warn};

use crate::nats::{Connection, Failure, refused};

/// How long the server waits for a sign of life about a message before it hands it out again. It
/// bounds how long a dead replica holds up the others.
const ACK_WAIT: Duration = Duration::from_secs(5);

/// Why a consumer cannot be used.
pub(crate) enum ConsumerError {
    /// It does not exist.
    Missing,
    /// It never can.
    Fatal(anyhow::Error),
    /// There is no JetStream to ask; it never can, unless there was one before.
    NobodyAnswers(anyhow::Error),
    /// Later it may.
    Temporary(String),
}

/// The consumer that a relay needs.
pub(crate) struct Consumer {
    /// By which it asks.
    pub(crate) connection: Connection,
    /// The stream that it consumes.
    pub(crate) stream: String,
    /// Its name.
    pub(crate) name: String,
    /// The subject that it consumes.
    pub(crate) filter: String,
}

impl Consumer {
    /// Whether the consumer is to hand out what has this subject.
    pub(crate) fn wants(&self, subject: &str) -> bool {
        let prefix = self.filter.trim_end_matches('>');
        subject.starts_with(prefix)
    }

    /// Verifies that the consumer is there and as it must be; creates it if it is missing.
    pub(crate) async fn ensure(&self) -> Result<(), ConsumerError> {
        match self.verify().await {
            Err(ConsumerError::Missing) => self.create().await,
            verified => verified.map(drop),
        }
    }

    /// Verifies that the consumer is there and as it must be; how many messages it has yet to hand
    /// out.
    pub(crate) async fn verify(&self) -> Result<u64, ConsumerError> {
        let Self { stream, name, .. } = self;
        let error = match self.handle().await?.consumer_info(name).await {
            Ok(info) => {
                self.compare(&info.config).map_err(ConsumerError::Fatal)?;
                return Ok(info.num_pending);
            }
            Err(error) => error,
        };
        Err(match error.kind() {
            ConsumerInfoErrorKind::NotFound => ConsumerError::Missing,
            ConsumerInfoErrorKind::StreamNotFound => ConsumerError::Fatal(anyhow!(
                "there is no stream {stream}; create it, or set NATS_STREAM to one that exists"
            )),
            ConsumerInfoErrorKind::NoResponders => {
                match self.connection.api().silence("NATS_STREAM") {
                    Failure::Temporary(reason) => ConsumerError::Temporary(reason),
                    Failure::Permanent(reason) => ConsumerError::NobodyAnswers(anyhow!(reason)),
                }
            }
            ConsumerInfoErrorKind::JetStream(error) => self.judge(&error),
            ConsumerInfoErrorKind::InvalidName => ConsumerError::Fatal(anyhow!(
                "{stream} or {name} is no name for a stream or a consumer"
            )),
            ConsumerInfoErrorKind::Offline
            | ConsumerInfoErrorKind::Request
            | ConsumerInfoErrorKind::TimedOut => ConsumerError::Temporary(error.to_string()),
        })
    }

    /// Verifies that the consumer is still as it must be; how many messages it has yet to hand out, if
    /// anyone can tell just now.
    ///
    /// # Errors
    /// If it is gone, or was edited into one that cannot be used.
    pub(crate) async fn verify_again(&self) -> anyhow::Result<Option<u64>> {
        let reason = match self.verify().await {
            Ok(pending) => return Ok(Some(pending)),
            Err(ConsumerError::Fatal(reason)) => return Err(reason),
            Err(ConsumerError::Missing) => bail!(
                "the consumer {} was deleted; the next start creates it anew",
                self.name
            ),
            // Such as a leaf node that has lost its hub.
            Err(ConsumerError::NobodyAnswers(_)) => "nobody answers".to_owned(),
            Err(ConsumerError::Temporary(reason)) => reason,
        };
        warn!("JetStream is not ready: {reason}");
        Ok(None)
    }

    /// What makes a stream like this one dangerous to several relays, if anything does, as far as our user
    /// may know.
    pub(crate) async fn stream_warning(&self) -> Option<String> {
        let stream = &self.stream;
        let config = match self.connection.stream_info(stream).await {
            Ok(Response::Ok(info)) => info.config,
            Ok(Response::Err { .. }) | Err(_) => {
                return Some(format!(
                    "cannot look at the stream {stream}, and so not tell whether its limits can drop a \
                     message that is being relayed; allow {} for this NATS user",
                    self.connection
                        .api()
                        .subject(format_args!("STREAM.INFO.{stream}"))
                ));
            }
        };
        let limits = dropping_limits(&config);
        (!limits.is_empty()).then(|| {
            format!(
                "the stream {stream} can drop a message while it is being relayed ({}), and then another \
                 relay gets the next one too early; run one relay on it, not several",
                limits.join(", ")
            )
        })
    }

    /// The number of the last delivery that the consumer has handed out to anyone, if the server tells.
    pub(crate) async fn last_delivery(&self) -> Option<u64> {
        let info = self.handle().await.ok()?.consumer_info(&self.name).await;
        info.ok().map(|info| info.delivered.consumer_sequence)
    }

    async fn create(&self) -> Result<(), ConsumerError> {
        let Self { stream, name, .. } = self;
        match self.handle().await?.create_consumer(self.config()).await {
            Ok(_) => {
                info!("created the consumer {name} on the stream {stream}");
                Ok(())
            }
            Err(error) => Err(match error.kind() {
                ConsumerErrorKind::JetStream(error) => self.judge(&error),
                _ => ConsumerError::Temporary(error.to_string()),
            }),
        }
    }

    async fn handle(&self) -> Result<Stream<()>, ConsumerError> {
        let handle = self
            .connection
            .jetstream()
            .get_stream_no_info(&self.stream)
            .await;
        handle.map_err(|error| ConsumerError::Fatal(error.into()))
    }

    fn config(&self) -> pull::Config {
        pull::Config {
            durable_name: Some(self.name.clone()),
            description: Some("nats-webhook-relay".to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            filter_subject: self.filter.clone(),
            max_ack_pending: 1,
            ..pull::Config::default()
        }
    }

    /// Whether an existing consumer keeps the order and gets the right messages.
    fn compare(&self, found: &consumer::Config) -> anyhow::Result<()> {
        match difference(found, &self.filter) {
            None => Ok(()),
            Some((field, found, wanted)) => bail!(
                "the consumer {} of the stream {} exists with {field} {found:?}, but needs \
                 {wanted:?}; delete it, or set NATS_CONSUMER to another name",
                self.name,
                self.stream
            ),
        }
    }

    /// What an error of the JetStream API means.
    fn judge(&self, error: &async_nats::jetstream::Error) -> ConsumerError {
        let what = format!("the consumer {} of the stream {}", self.name, self.stream);
        match refused(error, &what, "NATS_STREAM") {
            Failure::Temporary(reason) => ConsumerError::Temporary(reason),
            Failure::Permanent(reason) => ConsumerError::Fatal(anyhow!(reason)),
        }
    }
}

/// A message does not wait so long while all is well.
const SHORT_AGE: Duration = Duration::from_secs(60 * 60);

/// The limits of a stream by which it can drop a message that is being relayed.
fn dropping_limits(config: &stream::Config) -> Vec<String> {
    let drops_old = config.discard == DiscardPolicy::Old;
    let age = config.max_age;
    [
        (config.max_messages_per_subject > 0)
            .then(|| format!("max_msgs_per_subject {}", config.max_messages_per_subject)),
        (drops_old && config.max_messages > 0)
            .then(|| format!("max_msgs {}, discard old", config.max_messages)),
        (drops_old && config.max_bytes > 0)
            .then(|| format!("max_bytes {}, discard old", config.max_bytes)),
        (!age.is_zero() && age < SHORT_AGE).then(|| format!("max_age {age:?}")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The essential in which an existing consumer differs from the one that a relay needs, with what it
/// has and what it needs. What an operator may tune, such as the deliver policy or replicas, is left
/// alone.
fn difference(found: &consumer::Config, filter: &str) -> Option<(&'static str, String, String)> {
    let essentials = [
        (
            "filter_subject",
            found.filter_subject.clone(),
            filter.to_owned(),
        ),
        (
            "ack_policy",
            format!("{:?}", found.ack_policy),
            format!("{:?}", AckPolicy::Explicit),
        ),
        (
            "max_ack_pending",
            found.max_ack_pending.to_string(),
            "1".to_owned(),
        ),
        (
            "deliver_subject",
            found.deliver_subject.clone().unwrap_or_default(),
            String::new(),
        ),
        // The server would drop a message that it has handed out so often.
        (
            "max_deliver",
            found.max_deliver.to_string(),
            "-1".to_owned(),
        ),
        (
            "headers_only",
            found.headers_only.to_string(),
            "false".to_owned(),
        ),
        // The server would answer no pull request that does not name its group.
        (
            "priority_groups",
            format!("{:?}", found.priority_groups),
            "[]".to_owned(),
        ),
        // Each of these makes the server hand out a message that is still worked on.
        ("backoff", format!("{:?}", found.backoff), "[]".to_owned()),
        (
            "ack_wait",
            format!("{:?}", found.ack_wait.min(ACK_WAIT)),
            format!("{ACK_WAIT:?}"),
        ),
    ];
    essentials
        .into_iter()
        .find(|(_, found, wanted)| found != wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_by_which_a_stream_drops_what_is_being_relayed_are_named() {
        let none = stream::Config {
            max_age: Duration::from_secs(3600),
            ..stream::Config::default()
        };
        assert_eq!(dropping_limits(&none), [""; 0]);
        let less_than_an_hour = stream::Config {
            max_age: Duration::from_secs(3599),
            ..stream::Config::default()
        };
        assert_eq!(dropping_limits(&less_than_an_hour), ["max_age 3599s"]);
        let all = stream::Config {
            max_messages_per_subject: 1,
            max_messages: 2,
            max_bytes: 3,
            max_age: Duration::from_secs(4),
            ..stream::Config::default()
        };
        assert_eq!(
            dropping_limits(&all),
            [
                "max_msgs_per_subject 1",
                "max_msgs 2, discard old",
                "max_bytes 3, discard old",
                "max_age 4s"
            ]
        );
        let refusing = stream::Config {
            max_messages: 2,
            max_bytes: 3,
            discard: DiscardPolicy::New,
            ..stream::Config::default()
        };
        assert_eq!(dropping_limits(&refusing), [""; 0]);
    }

    #[test]
    fn a_consumer_that_hands_out_messages_by_groups_is_refused_by_name() {
        let found = consumer::Config {
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            filter_subject: "cms.cache.>".to_owned(),
            max_ack_pending: 1,
            max_deliver: -1,
            ..consumer::Config::default()
        };
        assert_eq!(difference(&found, "cms.cache.>"), None);
        let found = consumer::Config {
            priority_groups: vec!["jobs".to_owned()],
            ..found
        };
        let field = difference(&found, "cms.cache.>").map(|(field, ..)| field);
        assert_eq!(field, Some("priority_groups"));
    }
}
