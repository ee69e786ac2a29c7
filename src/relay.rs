//! The heart: take a message, POST it until that succeeded, republish it; then the next one.

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use async_nats::{Client, connection::State};
use futures::{Stream, StreamExt};
use log::{error, info, warn};
use reqwest::StatusCode;
use tokio::time::sleep;

use crate::{
    backoff::Backoff,
    config::Config,
    source::{Delivery, Source},
    status::Status,
    systemd::Systemd,
    webhook::{Failure, Webhook, message_id},
};

/// Growing waits between attempts to POST one message.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(30),
};

/// Everything it takes to relay messages.
pub struct Relay {
    source: Source,
    systemd: Systemd,
    worker: Worker,
}

/// What works on one message, while the source is attended to.
struct Worker {
    client: Client,
    webhook: Webhook,
    config: Config,
    status: Arc<Status>,
}

/// Whether there is a next message to take.
enum Then {
    Continue,
    Stop,
}

/// The webhook has succeeded.
struct Posted {
    status: StatusCode,
    attempts: u32,
}

impl Relay {
    /// A relay that takes from `source`, POSTs to `webhook` and republishes by `client`.
    #[must_use]
    pub fn new(
        client: Client,
        source: Source,
        webhook: Webhook,
        config: Config,
        status: Arc<Status>,
    ) -> Self {
        let systemd = Systemd::from_environment();
        Self {
            source,
            systemd,
            worker: Worker {
                client,
                webhook,
                config,
                status,
            },
        }
    }

    /// Relays one message after the other until the first item of `stop`.
    ///
    /// # Errors
    /// When it cannot go on.
    pub async fn run(mut self, mut stop: impl Stream<Item = ()> + Unpin) -> anyhow::Result<()> {
        let ended = self.relay_all(&mut stop).await;
        self.systemd.stopping(&self.worker.status);
        self.source.close();
        ended
    }

    async fn relay_all(
        &mut self,
        stop: &mut (impl Stream<Item = ()> + Unpin),
    ) -> anyhow::Result<()> {
        tokio::select! {
            biased;
            _ = stop.next() => return Ok(()),
            opened = self.source.open() => opened?,
        }
        let Worker {
            webhook,
            config,
            status,
            ..
        } = &self.worker;
        info!(
            "listening on {}.>; POST to {}, then republish on {}.>",
            config.prefix,
            webhook.destination(),
            config.relayed_prefix
        );
        self.systemd.ready(status);
        loop {
            let delivery = tokio::select! {
                biased;
                _ = stop.next() => return Ok(()),
                delivery = self.source.next() => delivery?,
                never = self.systemd.beat(&self.worker.status) => match never {},
            };
            match self.relay(&delivery, stop).await? {
                Then::Continue => {}
                Then::Stop => return Ok(()),
            }
        }
    }

    /// Relays one message. A request to stop meanwhile leaves it a while to finish.
    async fn relay(
        &mut self,
        delivery: &Delivery,
        stop: &mut (impl Stream<Item = ()> + Unpin),
    ) -> anyhow::Result<Then> {
        let Self {
            source,
            systemd,
            worker,
        } = self;
        let mut work = pin!(worker.work(delivery));
        tokio::select! {
            biased;
            () = &mut work => return Ok(Then::Continue),
            reason = meanwhile(source, systemd, &worker.status) => {
                worker.abandon(delivery, "the relay cannot go on");
                return Err(reason);
            }
            _ = stop.next() => {}
        }
        let patience = worker.config.shutdown_timeout;
        info!(
            "stopping; {} is in hand and has {patience:?} to finish",
            delivery.subject
        );
        systemd.stopping(&worker.status);
        tokio::select! {
            biased;
            () = work => {}
            reason = meanwhile(source, systemd, &worker.status) => {
                worker.abandon(delivery, "the relay cannot go on");
                return Err(reason);
            }
            _ = stop.next() => worker.abandon(delivery, "stopped at once"),
            () = sleep(patience) => {
                worker.abandon(delivery, &format!("not finished within SHUTDOWN_TIMEOUT, {patience:?}"));
            }
        }
        Ok(Then::Stop)
    }
}

/// What goes on while a message is worked on. Resolves only when the relay cannot go on.
async fn meanwhile(source: &mut Source, systemd: &mut Systemd, status: &Status) -> anyhow::Error {
    tokio::select! {
        biased;
        reason = source.attend() => reason,
        never = systemd.beat(status) => match never {},
    }
}

impl Worker {
    /// Brings one message to its end: relayed, or given up.
    async fn work(&self, delivery: &Delivery) {
        let start = Instant::now();
        let subject = &delivery.subject;
        let Config {
            prefix,
            relayed_prefix,
            ..
        } = &self.config;
        let Some(relayed_subject) = prefix.rewrite(subject, relayed_prefix) else {
            return self.abandon(delivery, &format!("it is not below {prefix}"));
        };
        let Posted { status, attempts } = match self.post(delivery).await {
            Ok(posted) => posted,
            Err(reason) => return self.abandon(delivery, &reason),
        };
        if let Err(reason) = self.republish(delivery, &relayed_subject).await {
            return self.abandon(delivery, &format!("{relayed_subject}: {reason:#}"));
        }
        self.status.add_relayed();
        let attempts = if attempts > 1 {
            format!(", {attempts} attempts")
        } else {
            String::new()
        };
        info!(
            "{subject} -> {relayed_subject} ({}, {:.1?}{attempts})",
            status.as_u16(),
            start.elapsed()
        );
    }

    /// Says that a message is not relayed, and why.
    fn abandon(&self, delivery: &Delivery, reason: &str) {
        let line = format!("{} is not relayed: {reason}", delivery.subject);
        error!("{line}");
        self.status.add_given_up(line);
    }

    /// POSTs until it succeeds, or until it is to be given up, with the reason.
    async fn post(&self, delivery: &Delivery) -> Result<Posted, String> {
        let id = message_id(delivery);
        let max_attempts = self.config.webhook.max_attempts.unwrap_or(u32::MAX);
        let mut attempts = 0;
        loop {
            attempts += 1;
            let (reason, retry_after) = match self.webhook.post(delivery, &id).await {
                Ok(status) => return Ok(Posted { status, attempts }),
                Err(Failure::Permanent { reason }) => return Err(reason),
                Err(Failure::Temporary {
                    reason,
                    retry_after,
                }) => (reason, retry_after),
            };
            if attempts == max_attempts {
                return Err(format!("given up after {attempts} attempts: {reason}"));
            }
            let wait = BACKOFF.wait(attempts).max(retry_after.unwrap_or_default());
            let failure = format!("{}, attempt {attempts}: {reason}", delivery.subject);
            warn!("{failure}; next attempt in {wait:.1?}");
            self.status.set_last_failure(failure);
            sleep(wait).await;
        }
    }

    /// Republishes a message; returns once it was handed to the network.
    async fn republish(&self, delivery: &Delivery, subject: &str) -> anyhow::Result<()> {
        let connections = || self.client.statistics().connects.load(Ordering::Relaxed);
        loop {
            if self.client.connection_state() != State::Connected {
                // Completes only with a connection.
                self.client.flush().await?;
            }
            let connection = connections();
            self.client
                .publish_with_headers(
                    subject.to_owned(),
                    delivery.headers.clone(),
                    delivery.payload.clone(),
                )
                .await?;
            self.client.flush().await?;
            // What was under way on a connection that broke is gone.
            if connections() == connection {
                return Ok(());
            }
        }
    }
}
