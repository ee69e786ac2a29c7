//! The heart: take a message, POST it until that succeeded, republish it; then the next one.

use std::{fmt, future::pending, ops::ControlFlow, pin::pin, sync::Arc, time::Duration};

use anyhow::{anyhow, bail};
use async_nats::HeaderMap;
use futures::{Stream, StreamExt, future::join_all};
use log::{error, info, warn};
use reqwest::{StatusCode, header::HeaderValue};
use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    backoff::Backoff,
    config::Config,
    heartbeat::Heartbeat,
    nats::{ClientEnded, Connection},
    outlet::{Outlet, Outlets},
    republish::{GivenUp, failed_headers, relayed_headers, target_subject},
    source::{Delivery, Outcome, Source},
    status::{AttemptOutcome, Cause, DestinationMetrics, Status},
    text::count,
    webhook::{Failure, Target, Webhook, message_id},
};

/// Growing waits between attempts to POST one message.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(30),
};

/// Everything it takes to relay messages.
pub struct Relay {
    source: Source,
    heartbeat: Heartbeat,
    worker: Worker,
}

/// What works on one message, while the source is attended to.
struct Worker {
    connection: Connection,
    outlets: Outlets,
    webhook: Webhook,
    config: Arc<Config>,
    status: Arc<Status>,
    /// In the order of the webhook's targets.
    destinations: Vec<DestinationMetrics>,
}

/// What is published.
struct Publication<'a> {
    outlet: &'a Outlet,
    subject: &'a str,
    headers: HeaderMap,
}

/// A destination has succeeded.
struct Posted {
    status: StatusCode,
    attempts: u32,
}

/// All destinations have succeeded, and the message was republished.
struct Relayed {
    target: String,
    posted: Vec<Posted>,
    is_acknowledged: bool,
}

impl fmt::Display for Relayed {
    /// The part of the log line that tells where to and how, up to how long it took.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (", self.target)?;
        for (place, Posted { status, attempts }) in self.posted.iter().enumerate() {
            let comma = if place > 0 { ", " } else { "" };
            write!(f, "{comma}{}", status.as_u16())?;
            if *attempts > 1 {
                write!(f, " after {attempts} attempts")?;
            }
        }
        Ok(())
    }
}

impl Relay {
    /// A relay that takes from `source`, POSTs to `webhook` and republishes by `connection`. Must be
    /// called within a tokio runtime.
    #[must_use]
    pub fn new(
        connection: Connection,
        source: Source,
        webhook: Webhook,
        config: Arc<Config>,
        status: Arc<Status>,
    ) -> Self {
        let heartbeat = Heartbeat::new(config.status_listen.is_some());
        let destinations = (0..webhook.targets().len()).map(|place| status.destination(place));
        let outlets = Outlets::new(connection.clone(), &config, &status);
        let worker = Worker {
            destinations: destinations.collect(),
            connection,
            outlets,
            webhook,
            config,
            status,
        };
        Self {
            source,
            heartbeat,
            worker,
        }
    }

    /// Relays one message after the other. The first item of `stop` lets the current message finish, and
    /// those that wait and that no server keeps, within [`Config::shutdown_timeout`]; the second one ends
    /// it at once.
    ///
    /// # Errors
    /// When it cannot go on.
    pub async fn run(mut self, mut stop: impl Stream<Item = ()> + Unpin) -> anyhow::Result<()> {
        let ended = self.relay_all(&mut stop).await;
        self.worker.status.set_subscribed(false);
        self.heartbeat.stopping(&self.worker.status);
        self.source.close().await;
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
            never = self.heartbeat.beat(&self.worker.status) => match never {},
        }
        let status = Arc::clone(&self.worker.status);
        tokio::select! {
            biased;
            _ = stop.next() => return Ok(()),
            opened = self.worker.outlets.open() => opened?,
            reason = meanwhile(&mut self.source, &mut self.heartbeat, &status) => return Err(reason),
        }
        let Worker {
            webhook,
            config,
            status,
            ..
        } = &self.worker;
        let destinations: Vec<_> = webhook
            .targets()
            .iter()
            .map(|target| target.destination.to_string())
            .collect();
        info!(
            "listening on {}.>; POST to {}, then republish on {}.>",
            config.prefix,
            destinations.join(" and "),
            config.relayed_prefix
        );
        status.set_subscribed(true);
        self.heartbeat.ready(status);
        // When a stop has waited long enough; none while nobody wants it to stop.
        let mut deadline = None;
        loop {
            let delivery = tokio::select! {
                biased;
                _ = stop.next() => match deadline {
                    None => {
                        deadline = Some(begin_to_stop(&mut self.source, &mut self.heartbeat, &self.worker, None).await);
                        continue;
                    }
                    Some(_) => return Ok(()),
                },
                () = reached(deadline) => return Ok(()),
                delivery = self.source.next() => match delivery? {
                    Some(delivery) => delivery,
                    None => return Ok(()),
                },
                never = self.heartbeat.beat(&self.worker.status) => match never {},
            };
            if self.relay(&delivery, stop, &mut deadline).await?.is_break() {
                return Ok(());
            }
        }
    }

    /// Relays one message; whether there is a next one to take.
    async fn relay(
        &mut self,
        delivery: &Delivery,
        stop: &mut (impl Stream<Item = ()> + Unpin),
        deadline: &mut Option<Instant>,
    ) -> anyhow::Result<ControlFlow<()>> {
        let Self {
            source,
            heartbeat,
            worker,
        } = self;
        let mut work = pin!(worker.work(delivery));
        loop {
            tokio::select! {
                biased;
                is_acknowledged = &mut work => {
                    source.done(is_acknowledged);
                    return Ok(ControlFlow::Continue(()));
                }
                reason = meanwhile(source, heartbeat, &worker.status) => {
                    worker.leave(delivery, "the relay cannot go on");
                    return Err(reason);
                }
                _ = stop.next() => match deadline {
                    None => {
                        *deadline = Some(begin_to_stop(source, heartbeat, worker, Some(delivery)).await);
                    }
                    Some(_) => {
                        worker.leave(delivery, "stopped at once");
                        return Ok(ControlFlow::Break(()));
                    }
                },
                () = reached(*deadline) => {
                    let timeout = worker.config.shutdown_timeout;
                    worker.leave(delivery, &format!("not finished within SHUTDOWN_TIMEOUT, {timeout:?}"));
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
    }
}

/// Takes no more messages, and says what is still to be done, and until when.
async fn begin_to_stop(
    source: &mut Source,
    heartbeat: &mut Heartbeat,
    worker: &Worker,
    current: Option<&Delivery>,
) -> Instant {
    let timeout = worker.config.shutdown_timeout;
    worker.status.set_subscribed(false);
    heartbeat.stopping(&worker.status);
    source.retire().await;
    if let Some(delivery) = current {
        let waiting = match source.waiting() {
            0 => String::new(),
            waiting => format!(" and {} still waiting", count(waiting, "message")),
        };
        info!(
            "stopping within {timeout:?}, for {} is being relayed{waiting}",
            delivery.subject
        );
    }
    Instant::now() + timeout
}

/// Resolves at the deadline, if there is one.
async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}

/// What goes on while a message is worked on. Resolves only when the relay cannot go on.
async fn meanwhile(
    source: &mut Source,
    heartbeat: &mut Heartbeat,
    status: &Status,
) -> anyhow::Error {
    tokio::select! {
        biased;
        reason = source.attend() => reason,
        never = heartbeat.beat(status) => match never {},
    }
}

impl Worker {
    /// Brings one message to its end: relayed, or given up. Whether that is settled with the server;
    /// if not, the message may come again, and counts then.
    async fn work(&self, delivery: &Delivery) -> bool {
        let start = Instant::now();
        self.status.add_received();
        let id = message_id(delivery);
        match self.try_relay(delivery, &id).await {
            Ok(relayed) => {
                if relayed.is_acknowledged {
                    let elapsed = start.elapsed();
                    self.status.add_relayed(elapsed);
                    info!("{} -> {relayed}, {elapsed:.1?})", delivery.subject);
                }
                relayed.is_acknowledged
            }
            Err(given_up) => self.give_up(delivery, &id, given_up).await,
        }
    }

    /// POSTs a message until that succeeded, and only then republishes it.
    async fn try_relay(&self, delivery: &Delivery, id: &HeaderValue) -> Result<Relayed, GivenUp> {
        let outlet = &self.outlets.relayed;
        let target = target_subject(delivery, &self.config.prefix, &outlet.prefix)
            .map_err(GivenUp::unpublishable)?;
        if let Some(fault) = delivery.fault {
            return Err(GivenUp::unpublishable(fault.to_owned()));
        }
        let marks = outlet.marks(delivery, id);
        let max_payload = self.connection.client().max_payload();
        let publication = Publication {
            outlet,
            subject: &target,
            headers: relayed_headers(delivery, marks, max_payload)
                .map_err(GivenUp::unpublishable)?,
        };
        let posted = self.post(delivery, id).await?;
        let delay = self.config.republish_delay;
        if !delay.is_zero() {
            sleep(delay).await;
        }
        let is_acknowledged = self
            .conclude(delivery, Some(publication), Outcome::Relayed)
            .await
            .map_err(|error| {
                GivenUp::unpublishable(format!("it cannot be published on {target}: {error:#}"))
            })?;
        Ok(Relayed {
            target,
            posted,
            is_acknowledged,
        })
    }

    /// POSTs to all destinations at the same time, until each has succeeded or is to be given up.
    async fn post(&self, delivery: &Delivery, id: &HeaderValue) -> Result<Vec<Posted>, GivenUp> {
        let targets = self.webhook.targets().iter().zip(&self.destinations);
        let ends = join_all(targets.map(|target| self.post_to(target, delivery, id))).await;
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
        (target, metrics): (&Target, &DestinationMetrics),
        delivery: &Delivery,
        id: &HeaderValue,
    ) -> Result<Posted, GivenUp> {
        let name = |reason: String| match self.webhook.targets() {
            [_] => reason,
            _ => format!("{}: {reason}", target.destination),
        };
        let max_attempts = self.config.webhook.max_attempts;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let start = Instant::now();
            let answer = self.webhook.post(target, delivery, id).await;
            metrics.add_attempt(attempt_outcome(&answer), start.elapsed());
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
            warn!("{failure}; next attempt in {wait:.1?}");
            self.status.set_last_failure(failure);
            sleep(wait).await;
        }
    }

    /// Says that a message is not relayed, and why; publishes it on the failed prefix. Whether that is
    /// settled with the server.
    async fn give_up(&self, delivery: &Delivery, id: &HeaderValue, given_up: GivenUp) -> bool {
        let line = format!("{} is not relayed: {}", delivery.subject, given_up.reason);
        error!("{line}");
        self.status.add_given_up(given_up.cause, line);
        let outcome = Outcome::GivenUp(&given_up.reason);
        if let Some(outlet) = &self.outlets.failed {
            let published = match target_subject(delivery, &self.config.prefix, &outlet.prefix) {
                Ok(target) => {
                    let marks = outlet.marks(delivery, id);
                    let max_payload = self.connection.client().max_payload();
                    let publication = Publication {
                        outlet,
                        subject: &target,
                        headers: failed_headers(delivery, &given_up, &marks, max_payload),
                    };
                    self.conclude(delivery, Some(publication), outcome).await
                }
                Err(reason) => Err(anyhow!(reason)),
            };
            match published {
                Ok(is_acknowledged) => return is_acknowledged,
                Err(error) => error!(
                    "{} is not published as failed either: {error:#}",
                    delivery.subject
                ),
            }
        }
        // It only fails where the client has ended, and with it all that could be told.
        self.conclude(delivery, None, outcome)
            .await
            .unwrap_or(false)
    }

    /// Says that a message was left unfinished. A stream keeps it, a core subscription does not.
    fn leave(&self, delivery: &Delivery, reason: &str) {
        let subject = &delivery.subject;
        match &delivery.ack {
            None => {
                let line = format!("{subject} is not relayed: {reason}");
                error!("{line}");
                self.status.add_given_up(Cause::Stopped, line);
            }
            Some(ack) => {
                warn!(
                    "{subject} is not finished: {reason}; {} stays in the stream",
                    ack.id
                )
            }
        }
    }

    /// Publishes a message, if there is one to publish, and tells the source's server what has
    /// become of the delivery; whether it has confirmed that. Both on one connection and in this order,
    /// so that a server that has seen the verdict has seen the message too; where a stream is to keep the
    /// message, only once it has.
    async fn conclude(
        &self,
        delivery: &Delivery,
        mut message: Option<Publication<'_>>,
        outcome: Outcome<'_>,
    ) -> anyhow::Result<bool> {
        if !is_current(delivery).await {
            return Ok(false);
        }
        if let Some(Publication {
            outlet,
            subject,
            headers,
        }) = &message
            && let Some(keeper) = &outlet.keeper
        {
            keeper.keep(delivery, subject, headers).await?;
            message = None;
        }
        loop {
            if !self.connection.is_up() {
                // Completes only with a connection.
                let _ = self.connection.client().flush().await;
            }
            if !is_current(delivery).await {
                return Ok(false);
            }
            let epoch = self.connection.epoch();
            let is_acknowledged = match self.try_to_conclude(delivery, &message, outcome).await {
                Err(error) if error.is::<ClientEnded>() => {
                    self.connection.replaced(epoch).await;
                    continue;
                }
                is_acknowledged => is_acknowledged?,
            };
            // What was under way on a connection that broke may be lost: once more, then.
            if self.connection.epoch() == epoch {
                return Ok(is_acknowledged);
            }
        }
    }

    async fn try_to_conclude(
        &self,
        delivery: &Delivery,
        message: &Option<Publication<'_>>,
        outcome: Outcome<'_>,
    ) -> anyhow::Result<bool> {
        let refused = self.status.publish_refused();
        if let Some(message) = message {
            let (subject, headers) = (message.subject.to_owned(), message.headers.clone());
            let payload = delivery.payload.clone();
            self.connection
                .publish(subject, None, headers, payload)
                .await?;
        }
        match &delivery.ack {
            None => {
                let flushed = self.connection.client().flush().await;
                flushed.map_err(|_| ClientEnded)?;
                Ok(true)
            }
            Some(ack) => {
                let is_acknowledged = ack.confirm(outcome).await;
                // A refusal comes before the confirmation of the ack.
                if message.is_some() && self.status.publish_refused() > refused {
                    bail!("NATS refuses it");
                }
                Ok(is_acknowledged)
            }
        }
    }
}

/// Whether a message is still ours to publish; says so if it is not.
async fn is_current(delivery: &Delivery) -> bool {
    let Some(ack) = &delivery.ack else {
        return true;
    };
    let is_current = ack.is_current().await;
    if !is_current {
        warn!(
            "{} is abandoned: NATS has handed it, or what follows it, to another relay meanwhile",
            delivery.subject
        );
    }
    is_current
}

/// How an attempt counts.
fn attempt_outcome(answer: &Result<StatusCode, Failure>) -> AttemptOutcome {
    match answer {
        Ok(_) => AttemptOutcome::Success,
        Err(Failure::Temporary { .. }) => AttemptOutcome::Temporary,
        Err(Failure::Permanent { .. }) => AttemptOutcome::Permanent,
    }
}
