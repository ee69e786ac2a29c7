//! The JetStream consumer: created if it is missing, else verified.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_nats::jetstream::{
    ErrorCode,
    consumer::{self, AckPolicy, Info, ReplayPolicy},
    stream::{self, DiscardPolicy},
};
use log::{info, warn};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::{
    config::Config,
    nats::{ApiError, Connection, Failure, NoAnswer},
    text::count,
};

/// How long the server waits for a sign of life about a message before it hands it out again. This is
/// how long a dead replica holds up the others.
const ACK_WAIT: Duration = Duration::from_secs(5);

/// The shortest ack wait that is worth a warning.
const LONG_ACK_WAIT: Duration = Duration::from_secs(30);

/// The description of a consumer that a relay has created begins with this; its relayed prefix follows.
const DESCRIPTION: &str = "nats-webhook-relay republishes under ";

/// The consumer that a relay needs.
pub(crate) struct Consumer {
    /// The connection for its requests.
    pub(crate) connection: Connection,
    /// The name of its stream.
    pub(crate) stream: String,
    /// Its name.
    pub(crate) name: String,
    pub(super) config: Arc<Config>,
    /// The bookkeeping of its deliveries to us.
    pub(super) deliveries: Mutex<Deliveries>,
}

/// What is known about the deliveries of a consumer to us.
pub(super) struct Deliveries {
    /// How many there were.
    pub(super) received: u64,
    /// When the consumer was created, in nanoseconds since 1970.
    pub(super) created: i128,
    /// The last moment at which certainly everything that was handed out had come to us, and the connection at that
    /// time. By the wall clock, because `Instant` may stop while a laptop sleeps.
    pub(super) complete_at: (SystemTime, u64),
}

impl Consumer {
    /// Returns the consumer of this name, on this stream.
    pub(crate) fn new(
        connection: Connection,
        stream: &str,
        name: &str,
        config: &Arc<Config>,
    ) -> Self {
        Self {
            connection,
            stream: stream.to_owned(),
            name: name.to_owned(),
            config: Arc::clone(config),
            deliveries: Mutex::new(Deliveries {
                received: 0,
                created: 0,
                complete_at: (SystemTime::UNIX_EPOCH, 0),
            }),
        }
    }

    /// Notes that the consumer may have been deleted, and created anew.
    pub(super) fn doubt(&self) {
        self.deliveries.lock().complete_at.0 = SystemTime::UNIX_EPOCH;
    }

    /// Finds the consumer, or creates it if it is missing; returns the server's information about it. Warns about
    /// settings that can cost messages or disturb the order.
    pub(super) async fn ensure(&self) -> Result<Info, Failure> {
        let stream_warning = self.verify_stream().await?;
        let info = match self.verify().await? {
            Some(info) => info,
            None => self.create().await.map_err(|error| self.failure(error))?,
        };
        let waiting = count(info.num_pending + info.num_ack_pending as u64, "message");
        info!("waiting for the consumer {}: {waiting}", self.name);
        for warning in stream_warning
            .into_iter()
            .chain(self.warnings(&info.config))
        {
            warn!("{warning}");
        }
        // Nothing has been handed out to us, because nothing has been asked for yet.
        self.deliveries.lock().complete_at = (SystemTime::now(), self.connection.epoch());
        Ok(info)
    }

    /// Returns the server's information about the consumer once it has verified that it is configured correctly;
    /// `None` if it is missing.
    pub(crate) async fn verify(&self) -> Result<Option<Info>, Failure> {
        match self.info().await {
            Ok(info) => self.compare(&info.config).map(|()| Some(info)),
            Err(ApiError::Refused(error))
                if error.error_code() == ErrorCode::CONSUMER_NOT_FOUND =>
            {
                Ok(None)
            }
            Err(error) => Err(self.failure(error)),
        }
    }

    /// Returns the server's information about the consumer.
    pub(super) async fn info(&self) -> Result<Info, ApiError> {
        let request = format!("CONSUMER.INFO.{}.{}", self.stream, self.name);
        let answer = self.connection.request(&request, &json!({})).await?;
        Ok(serde_json::from_value(answer)?)
    }

    fn failure(&self, error: ApiError) -> Failure {
        let was_there = self.deliveries.lock().created != 0;
        match error {
            ApiError::NoAnswer(NoAnswer::Nobody)
                if was_there && self.connection.domain().is_none() =>
            {
                Failure::Temporary(error.to_string())
            }
            error => self.connection.failure(error, "NATS_STREAM", &self.stream),
        }
    }

    /// Verifies that the stream stores subjects below the prefix, if this NATS user may read its configuration; returns
    /// a warning if its settings can disturb the order.
    pub(crate) async fn verify_stream(&self) -> Result<Option<String>, Failure> {
        let stream = &self.stream;
        // If it is missing, the request for the consumer reports it.
        let Ok(config) = self.connection.stream_config(stream).await else {
            return Ok(None);
        };
        // Messages from other streams keep their subjects, and transformed ones get new ones.
        let is_original = config.mirror.is_none()
            && config.sources.is_none()
            && config.subject_transform.is_none();
        if is_original
            && !config
                .subjects
                .iter()
                .any(|subject| self.config.prefix.meets(subject))
        {
            return Err(Failure::Permanent(format!(
                "the stream {stream} does not keep {}, but {:?}; add it to its subjects, or set \
                 NATS_STREAM to the stream that does",
                self.config.prefix.wildcard(),
                config.subjects
            )));
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

    /// Returns warnings about settings of the consumer that cause repeats or delays.
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
                "the server forgets the consumer {name} when it restarts (mem_storage), and {again}; once \
                 nothing waits, stop its relays, delete it (nats consumer rm {stream} {name} --force), and \
                 start them with NATS_DELIVER_POLICY=new"
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

    async fn create(&self) -> Result<Info, ApiError> {
        let Self { stream, name, .. } = self;
        let config = consumer::Config {
            durable_name: Some(name.clone()),
            description: Some(format!("{DESCRIPTION}{}", self.config.relayed_prefix)),
            deliver_policy: self.config.deliver_policy,
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            filter_subject: self.config.prefix.wildcard(),
            max_ack_pending: 1,
            ..consumer::Config::default()
        };
        let request = format!("CONSUMER.CREATE.{stream}.{name}.{}", config.filter_subject);
        let question = json!({ "stream_name": stream, "config": config, "action": "create" });
        let created = self.connection.request(&request, &question).await?;
        info!("created the consumer {name} on the stream {stream}");
        Ok(serde_json::from_value(created)?)
    }

    /// Verifies that an existing consumer preserves the order and gets the right messages, and that it is ours.
    fn compare(&self, found: &consumer::Config) -> Result<(), Failure> {
        let Self { stream, name, .. } = self;
        if let Some((field, found, wanted)) = difference(found, &self.config.prefix.wildcard()) {
            return Err(Failure::Permanent(format!(
                "the consumer {name} of the stream {stream} exists with {field} {found}, but needs \
                 {wanted}; delete it, or set NATS_CONSUMER to another name"
            )));
        }
        let description = found.description.as_deref().unwrap_or_default();
        match description.strip_prefix(DESCRIPTION) {
            Some(prefix) if prefix != self.config.relayed_prefix.to_string() => {
                let wanted = &self.config.relayed_prefix;
                Err(Failure::Permanent(format!(
                    "the consumer {name} of the stream {stream} belongs to a relay that republishes under \
                     {prefix}, and this one republishes under {wanted}: each would get only a part of the \
                     messages; set NATS_CONSUMER to another name, or, if you have changed \
                     NATS_RELAYED_SUBJECT_PREFIX on purpose, take the consumer over: nats consumer edit \
                     {stream} {name} --force --description '{DESCRIPTION}{wanted}'"
                )))
            }
            // A consumer without such a description was created by somebody else.
            _ => Ok(()),
        }
    }
}

/// A shorter `max_age` can expire a message in progress.
const SHORT_AGE: Duration = Duration::from_secs(60 * 60);

/// Returns the settings that let a stream drop a message that is being relayed.
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
        // The server would answer only pull requests that name a group.
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
