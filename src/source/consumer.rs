//! The JetStream consumer: created if it is missing, else verified.

use std::time::Duration;

use anyhow::{anyhow, bail};
use async_nats::jetstream::{
    ErrorCode,
    consumer::{self, AckPolicy, DeliverPolicy, Info, ReplayPolicy},
    response::Response,
    stream::{self, DiscardPolicy},
};
use log::info;
use serde_json::{Value, json};

use crate::{
    nats::{Connection, Failure, NoAnswer, refused},
    subject::Prefix,
};

/// How long the server waits for a sign of life about a message before it hands it out again. This is
/// how long a dead replica holds up the others.
const ACK_WAIT: Duration = Duration::from_secs(5);

/// The shortest ack wait that is worth a warning.
const LONG_ACK_WAIT: Duration = Duration::from_secs(30);

/// The description of a consumer that a relay has created begins with this; its relayed prefix follows.
const DESCRIPTION: &str = "nats-webhook-relay republishes under ";

/// Why a consumer cannot be used.
pub(crate) enum ConsumerError {
    /// It does not exist.
    Missing,
    /// It can never be used.
    Fatal(anyhow::Error),
    /// There is no JetStream; it can never be used, unless there was one before.
    NobodyAnswers(anyhow::Error),
    /// It cannot be used at the moment.
    Temporary(String),
}

/// The consumer that a relay needs.
pub(crate) struct Consumer {
    /// The connection for its requests.
    pub(crate) connection: Connection,
    /// The name of its stream.
    pub(crate) stream: String,
    /// Its name.
    pub(crate) name: String,
    /// It consumes everything below this prefix.
    pub(crate) prefix: Prefix,
    /// Its messages are republished under this prefix.
    pub(crate) relayed_prefix: Prefix,
    /// The message at which a consumer that the relay creates begins.
    pub(crate) deliver_policy: DeliverPolicy,
}

impl Consumer {
    /// Verifies that the consumer exists and is configured correctly; creates it if it is missing.
    pub(crate) async fn ensure(&self) -> Result<Info, ConsumerError> {
        match self.verify().await {
            Err(ConsumerError::Missing) => self.create().await,
            verified => verified,
        }
    }

    /// Verifies that the consumer exists and is configured correctly; returns the server's information about it.
    pub(crate) async fn verify(&self) -> Result<Info, ConsumerError> {
        let info = self.info().await?;
        self.compare(&info.config).map_err(ConsumerError::Fatal)?;
        Ok(info)
    }

    /// Returns the server's information about the consumer.
    pub(crate) async fn info(&self) -> Result<Info, ConsumerError> {
        let Self { stream, name, .. } = self;
        let request = format!("CONSUMER.INFO.{stream}.{name}");
        self.read(self.connection.request(&request, &json!({})).await)
    }

    /// Verifies that the consumer is still configured correctly; returns the server's information about it, or why
    /// there is none at the moment.
    ///
    /// # Errors
    /// If it is gone, or was changed so that it cannot be used.
    pub(crate) async fn verify_again(&self) -> anyhow::Result<Result<Info, String>> {
        let reason = match self.verify().await {
            Ok(info) => return Ok(Ok(info)),
            Err(ConsumerError::Fatal(reason)) => return Err(reason),
            Err(ConsumerError::Missing) => bail!(
                "the consumer {} was deleted; the next start creates it anew",
                self.name
            ),
            // A leaf node that has lost its hub, for example.
            Err(ConsumerError::NobodyAnswers(_)) => "nobody answers".to_owned(),
            Err(ConsumerError::Temporary(reason)) => reason,
        };
        Ok(Err(format!("JetStream is not ready: {reason}")))
    }

    /// Verifies that the stream stores subjects below the prefix, as far as this NATS user may read its configuration;
    /// returns a warning if its settings can disturb the order.
    ///
    /// # Errors
    /// If the stream stores none of them.
    pub(crate) async fn verify_stream(&self) -> anyhow::Result<Option<String>> {
        let stream = &self.stream;
        let request = format!("STREAM.INFO.{stream}");
        let answer = self.connection.request(&request, &json!({})).await;
        let config = match answer.map(|answer| serde_json::from_slice(&answer)) {
            Ok(Ok(Response::Ok(stream::Info { config, .. }))) => config,
            // If it is missing, the request for the consumer reports it.
            Ok(Ok(Response::Err { .. })) => return Ok(None),
            Ok(Err(_)) | Err(_) => {
                return Ok(Some(format!(
                    "cannot look at the stream {stream}, so its limits may drop a message that is being \
                     relayed; allow {} for this NATS user",
                    self.connection.api_subject(&request)
                )));
            }
        };
        // Messages from other streams have the subjects of those.
        let is_original = config.mirror.is_none() && config.sources.is_none();
        if is_original
            && !config
                .subjects
                .iter()
                .any(|subject| self.prefix.meets(subject))
        {
            bail!(
                "the stream {stream} does not keep {}, but {:?}; add it to its subjects, or set \
                 NATS_STREAM to the stream that does",
                self.prefix.wildcard(),
                config.subjects
            );
        }
        let limits = dropping_limits(&config);
        Ok((!limits.is_empty()).then(|| {
            format!(
                "the stream {stream} can drop a message while it is being relayed ({}), and then another \
                 relay gets the next one too early; run one relay on it, not several",
                limits.join(", ")
            )
        }))
    }

    /// Returns warnings about settings of the consumer that can cost messages or time.
    pub(crate) fn warnings(&self, config: &consumer::Config) -> Vec<String> {
        let Self { stream, name, .. } = self;
        let again = "then every message of the stream is POSTed again";
        let mut warnings = Vec::new();
        if !config.inactive_threshold.is_zero() {
            warnings.push(format!(
                "the server deletes the consumer {name} once no relay has used it for {:?} \
                 (inactive_threshold), and {again}; raise it: nats consumer edit {stream} {name} --force \
                 --inactive-threshold 87600h",
                config.inactive_threshold
            ));
        }
        if config.memory_storage {
            warnings.push(format!(
                "the server keeps the consumer {name} in memory only (mem_storage) and forgets it when it \
                 restarts, and {again}; once nothing waits, stop its relays, delete it (nats consumer rm \
                 {stream} {name} --force), and start them with NATS_DELIVER_POLICY=new"
            ));
        }
        if config.ack_wait >= LONG_ACK_WAIT {
            warnings.push(format!(
                "if a relay dies, another takes over its message only after {:?} (ack_wait); shorten it: \
                 nats consumer edit {stream} {name} --force --wait {ACK_WAIT:?}",
                config.ack_wait
            ));
        }
        if config.replay_policy == ReplayPolicy::Original {
            warnings.push(format!(
                "the consumer {name} hands out messages no faster than they were published (replay_policy \
                 original)"
            ));
        }
        warnings
    }

    async fn create(&self) -> Result<Info, ConsumerError> {
        let Self { stream, name, .. } = self;
        let config = self.config();
        let request = format!("CONSUMER.CREATE.{stream}.{name}.{}", config.filter_subject);
        let question = json!({ "stream_name": stream, "config": config, "action": "create" });
        let created = self.read(self.connection.request(&request, &question).await)?;
        info!("created the consumer {name} on the stream {stream}");
        Ok(created)
    }

    fn config(&self) -> consumer::Config {
        consumer::Config {
            durable_name: Some(self.name.clone()),
            description: Some(format!("{DESCRIPTION}{}", self.relayed_prefix)),
            deliver_policy: self.deliver_policy,
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            filter_subject: self.prefix.wildcard(),
            max_ack_pending: 1,
            ..consumer::Config::default()
        }
    }

    /// Verifies that an existing consumer preserves the order and gets the right messages, and that it is ours.
    fn compare(&self, found: &consumer::Config) -> anyhow::Result<()> {
        let Self { stream, name, .. } = self;
        if let Some((field, found, wanted)) = difference(found, &self.prefix.wildcard()) {
            bail!(
                "the consumer {name} of the stream {stream} exists with {field} {found}, but needs \
                 {wanted}; delete it, or set NATS_CONSUMER to another name"
            );
        }
        let description = found.description.as_deref().unwrap_or_default();
        let wanted = self.relayed_prefix.to_string();
        // A consumer without such a description was created by somebody else.
        if let Some(prefix) = description.strip_prefix(DESCRIPTION)
            && prefix != wanted
        {
            bail!(
                "the consumer {name} of the stream {stream} belongs to a relay that republishes under \
                 {prefix}, and this one republishes under {wanted}: each would get only a part of the \
                 messages; set NATS_CONSUMER to another name, or, if you have changed \
                 NATS_RELAYED_SUBJECT_PREFIX on purpose, take the consumer over: nats consumer edit {stream} \
                 {name} --force --description '{DESCRIPTION}{wanted}'"
            );
        }
        Ok(())
    }

    /// Parses an answer of the JetStream API about the consumer.
    fn read(&self, answer: Result<bytes::Bytes, NoAnswer>) -> Result<Info, ConsumerError> {
        let Self { stream, name, .. } = self;
        let answer = match answer {
            Ok(answer) => answer,
            Err(NoAnswer::Nobody) => {
                return Err(match self.connection.silence("NATS_STREAM") {
                    Failure::Temporary(reason) => ConsumerError::Temporary(reason),
                    Failure::Permanent(reason) => ConsumerError::NobodyAnswers(anyhow!(reason)),
                });
            }
            Err(error) => return Err(ConsumerError::Temporary(error.to_string())),
        };
        let error = match serde_json::from_slice(&answer) {
            Ok(Response::Ok(info)) => return Ok(info),
            Ok(Response::Err { error }) => error,
            Err(error) => {
                return Err(ConsumerError::Temporary(format!(
                    "its answer cannot be parsed: {error}"
                )));
            }
        };
        Err(match error.error_code() {
            ErrorCode::CONSUMER_NOT_FOUND => ConsumerError::Missing,
            ErrorCode::STREAM_NOT_FOUND => ConsumerError::Fatal(anyhow!(
                "there is no stream {stream}; create it, or set NATS_STREAM to one that exists"
            )),
            _ => {
                let what = format!("the consumer {name} of the stream {stream}");
                match refused(&error, &what, "NATS_STREAM") {
                    Failure::Temporary(reason) => ConsumerError::Temporary(reason),
                    Failure::Permanent(reason) => ConsumerError::Fatal(anyhow!(reason)),
                }
            }
        })
    }
}

impl ConsumerError {
    /// Describes the reason.
    pub(crate) fn reason(&self) -> String {
        match self {
            Self::Missing => "the consumer is missing".to_owned(),
            Self::Fatal(reason) | Self::NobodyAnswers(reason) => reason.to_string(),
            Self::Temporary(reason) => reason.clone(),
        }
    }
}

/// A shorter `max_age` can expire a message in progress.
const SHORT_AGE: Duration = Duration::from_secs(60 * 60);

/// Returns the settings because of which a stream can drop a message that is being relayed.
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
        config.allow_message_ttl.then(|| "allow_msg_ttl".to_owned()),
        config.allow_rollup.then(|| "allow_rollup_hdrs".to_owned()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Returns the first essential field in which an existing consumer differs from the one that a relay needs, with its
/// value and the one needed. Fields that an operator may tune, such as the deliver policy or replicas, are ignored.
fn difference(found: &consumer::Config, filter: &str) -> Option<(&'static str, String, String)> {
    if found.ack_wait < ACK_WAIT {
        let (found, wanted) = (found.ack_wait, ACK_WAIT);
        return Some(("ack_wait", format!("{found:?}"), format!("{wanted:?}")));
    }
    // In the server's format; a missing setting is null.
    let found = json!(found);
    [
        ("filter_subject", json!(filter)),
        ("ack_policy", json!("explicit")),
        ("max_ack_pending", json!(1)),
        ("deliver_subject", Value::Null),
        // The server would drop a message after that many deliveries.
        ("max_deliver", json!(-1)),
        ("headers_only", Value::Null),
        // The server would answer no pull request that does not name its group.
        ("priority_groups", Value::Null),
        // It would make the server hand out a message that is still in progress.
        ("backoff", Value::Null),
    ]
    .into_iter()
    .find(|(field, wanted)| found[field] != *wanted)
    .map(|(field, wanted)| {
        let wanted = match wanted {
            Value::Null => "none".to_owned(),
            wanted => wanted.to_string(),
        };
        (field, found[field].to_string(), wanted)
    })
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
