//! One message: POST it until that succeeded, wait if told to, publish it, and acknowledge it; or give it
//! up. Promises 1, 3 and 4 are kept here (see the crate's documentation).

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::anyhow;
use futures::future::join_all;
use log::{error, info, warn};
use reqwest::{StatusCode, header::HeaderValue};
use tokio::time::sleep;

use crate::{
    backoff::Backoff,
    config::Config,
    monitor::{DestinationMetrics, Monitor},
    nats::Connection,
    publish::{Publication, Publishers},
    republish::{Cause, GivenUp, failed_headers, relayed_headers, relayed_subject},
    source::{Ack, Delivery, Outcome},
    webhook::{Destination, Failure, Webhook, message_id},
};

/// Growing waits between attempts to POST one message.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(30),
};

/// What forwards messages, one at a time.
pub struct Forward {
    connection: Connection,
    publishers: Publishers,
    webhook: Webhook,
    config: Arc<Config>,
    monitor: Arc<Monitor>,
    /// In the order of the webhook's destinations.
    metrics: Vec<DestinationMetrics>,
}

/// A destination has succeeded.
struct Posted {
    status: StatusCode,
    attempts: u32,
}

/// All destinations have succeeded, and the message was republished.
struct Relayed {
    subject: String,
    posted: Vec<Posted>,
    is_acknowledged: bool,
}

impl Relayed {
    /// How the first destination answered.
    fn status(&self) -> Option<u16> {
        self.posted.first().map(|posted| posted.status.as_u16())
    }

    /// How many attempts it took where it took most.
    fn attempts(&self) -> Option<u32> {
        self.posted.iter().map(|posted| posted.attempts).max()
    }
}

impl fmt::Display for Relayed {
    /// The part of the log line that tells where to and how, up to how long it took.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (", self.subject)?;
        for (index, Posted { status, attempts }) in self.posted.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{}", status.as_u16())?;
            if *attempts > 1 {
                write!(f, " after {attempts} attempts")?;
            }
        }
        Ok(())
    }
}

impl Forward {
    /// POSTs to `webhook` and publishes by `connection`.
    #[must_use]
    pub fn new(
        connection: Connection,
        webhook: Webhook,
        config: Arc<Config>,
        monitor: Arc<Monitor>,
    ) -> Self {
        let metrics = (0..webhook.destinations().len()).map(|index| monitor.destination(index));
        Self {
            metrics: metrics.collect(),
            publishers: Publishers::new(connection.clone(), &config, &monitor),
            connection,
            webhook,
            config,
            monitor,
        }
    }

    /// Verifies what it needs to publish.
    ///
    /// # Errors
    /// If a stream that is to confirm what is published cannot be used.
    pub async fn open(&mut self) -> anyhow::Result<()> {
        self.publishers.open().await
    }

    /// Where messages are POSTed to, in words.
    #[must_use]
    pub fn destinations(&self) -> String {
        let destinations = self.webhook.destinations().iter();
        let names: Vec<_> = destinations
            .map(|destination| destination.url.to_string())
            .collect();
        names.join(" and ")
    }

    /// Brings one message to its end: relayed, or given up. Whether the server has acknowledged that; if
    /// not, the message may come again, and counts then.
    pub async fn forward(&self, delivery: &Delivery) -> bool {
        let start = Instant::now();
        // In durable mode it has been waiting ever since the stream got it.
        let since = delivery.ack.as_ref().map(Ack::stored);
        let _working = self
            .monitor
            .add_received(since.unwrap_or_else(SystemTime::now));
        let id = message_id(delivery);
        match self.try_relay(delivery, &id).await {
            Ok(relayed) => {
                if relayed.is_acknowledged {
                    let elapsed = start.elapsed();
                    self.monitor.add_relayed(elapsed);
                    info!(
                        subject:% = delivery.subject,
                        relayed_subject = relayed.subject,
                        status = relayed.status(),
                        attempts = relayed.attempts(),
                        seconds = elapsed.as_secs_f64();
                        "{} -> {relayed}, {elapsed:.1?})",
                        delivery.subject
                    );
                }
                relayed.is_acknowledged
            }
            Err(given_up) => self.give_up(delivery, &id, given_up).await,
        }
    }

    /// POSTs a message until that succeeded, and only then republishes it (promise 1).
    async fn try_relay(&self, delivery: &Delivery, id: &HeaderValue) -> Result<Relayed, GivenUp> {
        let publisher = &self.publishers.relayed;
        let subject = relayed_subject(delivery, &self.config.prefix, &publisher.prefix)
            .map_err(GivenUp::unpublishable)?;
        if let Some(unrelayable) = delivery.unrelayable {
            return Err(GivenUp::unpublishable(unrelayable.to_owned()));
        }
        let stream_headers = publisher.stream_headers(delivery, id);
        let max_payload = self.connection.client().max_payload();
        let publication = Publication {
            publisher,
            subject: &subject,
            headers: relayed_headers(delivery, stream_headers, max_payload)
                .map_err(GivenUp::unpublishable)?,
        };
        let posted = self.post(delivery, id).await?;
        let delay = self.config.republish_delay;
        if !delay.is_zero() {
            sleep(delay).await;
        }
        let is_acknowledged = self
            .publishers
            .publish_and_ack(delivery, Some(publication), Outcome::Relayed)
            .await
            .map_err(|error| {
                GivenUp::unpublishable(format!("it cannot be published on {subject}: {error:#}"))
            })?;
        Ok(Relayed {
            subject,
            posted,
            is_acknowledged,
        })
    }

    /// POSTs to all destinations at the same time, until each has succeeded or is to be given up.
    async fn post(&self, delivery: &Delivery, id: &HeaderValue) -> Result<Vec<Posted>, GivenUp> {
        let destinations = self.webhook.destinations().iter().zip(&self.metrics);
        let ends =
            join_all(destinations.map(|destination| self.post_to(destination, delivery, id))).await;
        let (mut posted, mut given_up) = (Vec::new(), Vec::new());
        for end in ends {
            match end {
                Ok(success) => posted.push(success),
                Err(failure) => given_up.push(failure),
            }
        }
        GivenUp::all(given_up).map_or(Ok(posted), Err)
    }

    /// POSTs to one destination until it succeeds, or is to be given up.
    async fn post_to(
        &self,
        (destination, metrics): (&Destination, &DestinationMetrics),
        delivery: &Delivery,
        id: &HeaderValue,
    ) -> Result<Posted, GivenUp> {
        let name = |reason: String| match self.webhook.destinations() {
            [_] => reason,
            _ => format!("{}: {reason}", destination.url),
        };
        let max_attempts = self.config.webhook.max_attempts;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let start = Instant::now();
            let answer = self.webhook.post(destination, delivery, id).await;
            metrics.add_attempt(&answer, start.elapsed());
            let (reason, status, retry_after) = match answer {
                Ok(status) => return Ok(Posted { status, attempts }),
                Err(Failure::Permanent { reason, status }) => {
                    let (reason, status) = (name(reason), Some(status.as_u16()));
                    return Err(GivenUp {
                        reason,
                        status,
                        attempts,
                        cause: Cause::Refused,
                    });
                }
                Err(Failure::Temporary {
                    reason,
                    status,
                    retry_after,
                }) => (
                    name(reason),
                    status.map(|status| status.as_u16()),
                    retry_after,
                ),
            };
            if Some(attempts) == max_attempts {
                let reason = format!("given up after {attempts} attempts: {reason}");
                return Err(GivenUp {
                    reason,
                    status,
                    attempts,
                    cause: Cause::AttemptsUsed,
                });
            }
            let wait = BACKOFF.wait(attempts).max(retry_after.unwrap_or_default());
            let failure = format!("{}, attempt {attempts}: {reason}", delivery.subject);
            warn!(
                subject:% = delivery.subject, status, attempts, reason;
                "{failure}; next attempt in {wait:.1?}"
            );
            self.monitor.set_last_failure(failure);
            sleep(wait).await;
        }
    }

    /// Says that a message is not relayed, and why; publishes it on the failed prefix (promise 4). Whether
    /// the server has acknowledged that.
    async fn give_up(&self, delivery: &Delivery, id: &HeaderValue, given_up: GivenUp) -> bool {
        let line = format!("{} is not relayed: {}", delivery.subject, given_up.reason);
        error!(
            subject:% = delivery.subject,
            status = given_up.status,
            attempts = given_up.attempts,
            reason = given_up.reason;
            "{line}"
        );
        self.monitor.add_given_up(given_up.cause, line);
        let outcome = Outcome::GivenUp(&given_up.reason);
        if let Some(publisher) = &self.publishers.failed {
            let published = match relayed_subject(delivery, &self.config.prefix, &publisher.prefix)
            {
                Ok(subject) => {
                    let stream_headers = publisher.stream_headers(delivery, id);
                    let max_payload = self.connection.client().max_payload();
                    let publication = Publication {
                        publisher,
                        subject: &subject,
                        headers: failed_headers(delivery, &given_up, &stream_headers, max_payload),
                    };
                    self.publishers
                        .publish_and_ack(delivery, Some(publication), outcome)
                        .await
                }
                Err(reason) => Err(anyhow!(reason)),
            };
            match published {
                Ok(is_acknowledged) => return is_acknowledged,
                Err(error) => error!(
                    subject:% = delivery.subject, reason:% = error;
                    "{} is not published as failed either: {error:#}",
                    delivery.subject
                ),
            }
        }
        // It only fails where the client has ended, and with it all that could be told.
        self.publishers
            .publish_and_ack(delivery, None, outcome)
            .await
            .unwrap_or(false)
    }

    /// Says that a message was left unfinished. A stream keeps it, a core subscription does not.
    pub fn abandon(&self, delivery: &Delivery, reason: &str) {
        let subject = &delivery.subject;
        match &delivery.ack {
            None => {
                let line = format!("{subject} is not relayed: {reason}");
                error!(subject:% = subject, reason; "{line}");
                self.monitor.add_given_up(Cause::Stopped, line);
            }
            Some(ack) => {
                warn!(
                    subject:% = subject, reason;
                    "{subject} is not finished: {reason}; {} stays in the stream",
                    ack.id
                )
            }
        }
    }
}
