//! One message: POST it until that succeeds, wait if told to, publish it, and acknowledge it; or give up
//! on it. Promises 1, 3 and 4 are kept here (see the crate's documentation).

mod posting;

use std::{sync::Arc, time::Instant};

use futures::future::{join, join_all};
use log::{error, info, warn};
use tokio::time::sleep;

use self::posting::Answers;
use crate::{
    commit::{Commit, Publication},
    config::Config,
    monitor::{Cause, DestinationMetrics, Monitor},
    nats::Connection,
    republish::{GivenUp, Unrelayed, failed_headers, relayed_headers, relayed_subject},
    source::{Delivery, Outcome},
    webhook::{Ids, Webhook},
};

/// Forwards messages, one at a time.
pub struct Forward {
    connection: Connection,
    commit: Commit,
    webhook: Webhook,
    /// In the order of the webhook's destinations.
    metrics: Vec<DestinationMetrics>,
    config: Arc<Config>,
    monitor: Arc<Monitor>,
}

impl Forward {
    /// Creates a `Forward` that POSTs to `webhook` and publishes on `connection`.
    #[must_use]
    pub fn new(
        connection: Connection,
        webhook: Webhook,
        config: Arc<Config>,
        monitor: Arc<Monitor>,
    ) -> Self {
        let metrics =
            (0..webhook.destinations.len()).map(|index| monitor.metrics.destination(index));
        Self {
            metrics: metrics.collect(),
            webhook,
            commit: Commit::new(connection.clone(), &config, &monitor),
            connection,
            config,
            monitor,
        }
    }

    /// Verifies the streams that have to confirm published messages, and looks up the names whose every address is a
    /// destination.
    ///
    /// # Errors
    /// If one of the streams cannot be used.
    pub async fn open(&self) -> anyhow::Result<()> {
        let destinations = self.webhook.destinations.iter();
        let names = destinations.filter(|destination| destination.url.every_address);
        // A failed lookup is ignored, because the first attempt will report it.
        let lookups = names.map(|name| name.addresses(self.config.webhook.timeout));
        let (opened, _) = join(self.commit.open(), join_all(lookups)).await;
        opened
    }

    /// Processes one message to completion: relays it, or gives up on it. If the server does not
    /// confirm the ack, the message may be redelivered, and is counted then.
    pub async fn forward(&self, delivery: &Delivery) {
        let start = Instant::now();
        // In durable mode it has been waiting since the stream stored it.
        let since = delivery.ack.as_ref().map(|ack| ack.stored());
        let _working = self.monitor.add_received(&delivery.subject, since);
        let ids = Ids::of(delivery);
        match self.try_relay(delivery, &ids, start).await {
            Ok(()) => {}
            Err(Unrelayed::GivenUp(given_up)) => self.give_up(delivery, &ids, given_up).await,
            Err(Unrelayed::Abandoned) => self.monitor.add_unfinished("another relay has it"),
        }
    }

    /// POSTs a message until that succeeds, and only then republishes it (promise 1).
    async fn try_relay(
        &self,
        delivery: &Delivery,
        ids: &Ids<'_>,
        start: Instant,
    ) -> Result<(), Unrelayed> {
        let publisher = &self.commit.relayed;
        let subject = relayed_subject(delivery, &self.config.prefix, &publisher.prefix)
            .map_err(GivenUp::unpublishable)?;
        if let Some(unrelayable) = delivery.unrelayable {
            return Err(GivenUp::unpublishable(unrelayable.to_owned()).into());
        }
        // One stream may keep the prefixes of several environments.
        let id = format!("{}@{}", ids.message, publisher.prefix);
        let max_payload = self.connection.client().max_payload();
        let publication = Publication {
            publisher,
            subject: &subject,
            headers: relayed_headers(delivery, id, max_payload).map_err(GivenUp::unpublishable)?,
        };
        if !delivery.may_be_posted().await {
            return Err(Unrelayed::Abandoned);
        }
        let posted = self.post(delivery, &ids.webhook).await?;
        self.monitor.set_posted();
        let delay = self.config.republish_delay;
        if !delay.is_zero() {
            sleep(delay).await;
        }
        let committed = self
            .commit
            .commit(delivery, Some(publication), Outcome::Relayed);
        let is_acknowledged = committed.await.map_err(|error| {
            GivenUp::unpublishable(format!("it cannot be published on {subject}: {error:#}"))
        })?;
        if is_acknowledged {
            let elapsed = start.elapsed();
            let status = posted.first().map(|posted| posted.status);
            self.monitor.add_relayed(status, elapsed);
            info!(
                subject:% = delivery.subject,
                relayed_subject = subject,
                status,
                attempts = posted.iter().map(|posted| posted.attempts).max(),
                seconds = elapsed.as_secs_f64();
                "{} -> {subject} ({}{elapsed:.1?})",
                delivery.subject,
                Answers(&posted)
            );
        }
        Ok(())
    }

    /// Logs that a message is not relayed, and why, and publishes it under the failed prefix (promise 4).
    async fn give_up(&self, delivery: &Delivery, ids: &Ids<'_>, given_up: GivenUp) {
        error!(
            subject:% = delivery.subject,
            status = given_up.status,
            attempts = given_up.attempts,
            reason = given_up.reason;
            "{} is not relayed: {}",
            delivery.subject,
            given_up.reason
        );
        let committed = match self.commit_failed(delivery, ids, &given_up).await {
            Err(error) => {
                error!(
                    subject:% = delivery.subject, reason:% = error;
                    "{} could not be published as a failed message either: {error:#}",
                    delivery.subject
                );
                self.commit.commit(delivery, None, Outcome::GivenUp).await
            }
            committed => committed,
        };
        // Without a message to publish, it can't fail.
        if committed.unwrap_or_default() {
            self.monitor.add_given_up(given_up.cause, &given_up.reason);
        }
    }

    /// Publishes a message under the failed prefix, if there is one, and acknowledges it.
    async fn commit_failed(
        &self,
        delivery: &Delivery,
        ids: &Ids<'_>,
        given_up: &GivenUp,
    ) -> anyhow::Result<bool> {
        let Some(publisher) = &self.commit.failed else {
            return self.commit.commit(delivery, None, Outcome::GivenUp).await;
        };
        let subject = relayed_subject(delivery, &self.config.prefix, &publisher.prefix);
        let subject = subject.map_err(anyhow::Error::msg)?;
        // A message that fails again after a replay is not a duplicate.
        let again = fastrand::u64(..);
        let id = format!("{}@{}@{again:x}", ids.message, publisher.prefix);
        let max_payload = self.connection.client().max_payload();
        let publication = Publication {
            publisher,
            subject: &subject,
            headers: failed_headers(delivery, given_up, &id, max_payload),
        };
        let committed = self
            .commit
            .commit(delivery, Some(publication), Outcome::GivenUp);
        committed.await
    }

    /// Logs that a message is left unfinished. A stream keeps it, a core subscription does not.
    pub fn abandon(&self, delivery: &Delivery, reason: &str) {
        let subject = &delivery.subject;
        match &delivery.ack {
            None => {
                let line = format!("{subject} is not relayed: {reason}");
                error!(subject:% = subject, reason; "{line}");
                self.monitor.add_given_up(Cause::Stopped, reason);
            }
            Some(ack) => {
                warn!(
                    subject:% = subject, reason;
                    "{subject} is not finished: {reason}; {} stays in the stream",
                    ack.id()
                );
                self.monitor.add_unfinished(reason);
            }
        }
    }
}
