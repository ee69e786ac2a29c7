//! JetStream: at least once. A durable pull consumer with `max_ack_pending: 1`, so that the server
//! hands out one message at a time, across all replicas, and the next one only after the ack.
//!
//! The requests and answers are those of NATS ADR-13 (pull) and ADR-15 (ack subjects).
//!
//! The relay makes its own pull requests instead of using async-nats's `Consumer::stream`, because that
//! one, as of 0.51, has these problems:
//!
//! - It takes any message with a status in its headers for the server's answer. A publisher can put one
//!   there, and then a stored `NATS/1.0 408` would be swallowed, never be acked, and block all that follow.
//! - After a reconnect it renews its request only if no message waits to be taken, so that with several
//!   relays nobody may get a message for half a minute.
//! - Dropping it loses the messages that it has prefetched. Another relay gets them only after the ack wait,
//!   whereas we hand them back.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use async_nats::{
    Message, Subject, Subscriber,
    jetstream::consumer::{Info, ReplayPolicy},
};
use futures::FutureExt;
use log::{info, warn};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, timeout};

use super::{
    Ack, Delivery,
    consumer::Consumer,
    next_of,
    requests::{Meaning, Requests},
    unreadable,
};
use crate::{
    monitor::Monitor,
    nats::{ConnectionEvents, Failure},
};

/// How often the server is told that a message is in progress, and is checked for silence.
const TICK: Duration = Duration::from_secs(1);

/// How often the consumer is verified, because somebody may edit it at any time.
const VERIFY_EVERY: Duration = Duration::from_secs(5);

/// How long a stop waits for its naks to be sent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// A durable consumer.
pub struct Durable {
    events: ConnectionEvents,
    monitor: Arc<Monitor>,
    consumer: Arc<Consumer>,
    /// The subject on which the server accepts pull requests.
    pull_subject: Subject,
    requests: Requests,
    subscriber: Option<Subscriber>,
    /// Whether we have ended the subscription.
    is_stopped: bool,
    /// Whether the consumer hands out messages no faster than they were published.
    is_slow: bool,
    /// Whether the consumer is paused.
    is_paused: bool,
    /// When the consumer was last verified.
    verified: Instant,
    tick: Interval,
    /// The deliveries to process next, in this order.
    arrived: VecDeque<Delivery>,
    /// The ack of the message being processed.
    current: Option<Arc<Ack>>,
    /// The last confirmed ack.
    acknowledged: Option<Arc<Ack>>,
}

impl Durable {
    pub(super) fn new(events: ConnectionEvents, monitor: Arc<Monitor>, consumer: Consumer) -> Self {
        let connection = &consumer.connection;
        let request = format!("CONSUMER.MSG.NEXT.{}.{}", consumer.stream, consumer.name);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            pull_subject: connection.api_subject(&request).into(),
            requests: Requests::new(connection.client().new_inbox()),
            consumer: Arc::new(consumer),
            events,
            monitor,
            subscriber: None,
            is_stopped: false,
            is_slow: false,
            is_paused: false,
            verified: Instant::now(),
            tick,
            arrived: VecDeque::new(),
            current: None,
            acknowledged: None,
        }
    }

    /// Subscribes to the inbox, and finds or creates the consumer.
    pub(super) async fn open(&mut self) -> anyhow::Result<()> {
        let inbox = format!("{}.*", self.requests.inbox);
        let client = self.consumer.connection.client();
        // It fails only if the client has crashed, which the events report.
        self.subscriber = client.subscribe(inbox).await.ok();
        let ensure = || self.consumer.ensure();
        let info = tokio::select! {
            biased;
            reason = self.events.fatal() => return Err(reason),
            info = self.consumer.connection.until_ready(&self.monitor, ensure) => info?,
        };
        self.learn(&info);
        // If there is no answer, the reason has already been logged.
        let _ = unreadable::try_to_look(&self.consumer).await;
        self.find_unreadable().await;
        Ok(())
    }

    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Delivery>> {
        if let Some(ended) = self.current.take()
            && ended.is_acknowledged()
        {
            self.acknowledged = Some(ended);
        }
        loop {
            if self.is_stopped {
                return Ok(None);
            }
            // Here as well as at a tick, because a verification that a tick has begun is dropped when the current
            // message ends.
            if self.is_verification_due() {
                self.verify().await?;
            }
            let is_strange =
                |delivery: &Delivery| !self.consumer.config.prefix.contains(&delivery.subject);
            if self.arrived.front().is_some_and(is_strange) && !self.verify().await? {
                // The consumer may have been edited; wait until it has been verified.
                self.step().await?;
                continue;
            }
            let Some(delivery) = self.arrived.pop_front() else {
                self.request_next().await;
                self.step().await?;
                continue;
            };
            if let (Some(ack), Some(last)) = (&delivery.ack, &self.acknowledged)
                && ack.repeats(last)
            {
                info!(
                    "{} was handed out again while it was being relayed; acknowledged once more",
                    ack.id()
                );
                ack.again().await;
                self.acknowledged = delivery.ack;
                continue;
            }
            self.current = delivery.ack.clone();
            return Ok(Some(delivery));
        }
    }

    /// Takes the message that is handed out but not acked, if no client can read it.
    async fn find_unreadable(&mut self) {
        if let Some(delivery) = unreadable::find(&self.consumer).await {
            self.enqueue(delivery);
        }
    }

    pub(super) async fn attend(&mut self) -> anyhow::Error {
        loop {
            if let Err(reason) = self.step().await {
                return reason;
            }
        }
    }

    /// Unsubscribes, so that the server hands out nothing more to us. Returns 0, because messages wait in the stream.
    pub(super) async fn stop(&mut self) -> u64 {
        self.is_stopped = true;
        if let Some(subscriber) = &mut self.subscriber {
            // It fails only if the client has crashed, and then the subscription is gone as well.
            let _ = subscriber.unsubscribe().await;
            while let Some(Some(message)) = next_of(&mut self.subscriber).now_or_never() {
                let _ = self.take(message);
            }
            self.subscriber = None;
        }
        0
    }

    /// Hands back the unfinished messages, so that another replica can continue at once.
    pub(super) async fn close(mut self) {
        self.stop().await;
        let unfinished: Vec<_> = self.unfinished().collect();
        for ack in &unfinished {
            ack.nak().await;
        }
        // Without a connection, there is no point in waiting.
        let flush = timeout(FLUSH_TIMEOUT, self.consumer.connection.client().flush());
        if self.consumer.connection.is_up() && matches!(flush.await, Ok(Ok(()))) {
            for ack in unfinished {
                info!("{} is handed back to its stream", ack.id());
            }
        }
    }

    /// Returns the acks of the messages that we hold unacknowledged.
    fn unfinished(&self) -> impl Iterator<Item = &Arc<Ack>> {
        let arrived = self.arrived.iter().flat_map(|delivery| &delivery.ack);
        let all = self.current.iter().chain(arrived);
        all.filter(|ack| !ack.is_acknowledged())
    }

    /// Sends a pull request if none is under way.
    async fn request_next(&mut self) {
        let Some((reply, text)) = self.requests.next() else {
            return;
        };
        // It fails only if the client has crashed, which the events report.
        let (client, subject) = (self.consumer.connection.client(), self.pull_subject.clone());
        let _ = client.publish_with_reply(subject, reply, text.into()).await;
    }

    /// Handles the next event.
    async fn step(&mut self) -> anyhow::Result<()> {
        tokio::select! {
            biased;
            connected = self.events.next() => {
                connected?;
                // The server has dropped the request together with the old connection.
                self.requests.end();
                self.find_unreadable().await;
            }
            message = next_of(&mut self.subscriber) => match message {
                Some(message) => self.take(message)?,
                // The client has crashed, which will be noticed in a moment.
                None => self.subscriber = None,
            },
            _ = self.tick.tick() => self.on_tick().await?,
        }
        Ok(())
    }

    /// Takes a message of the stream, or the server's answer to a pull request.
    fn take(&mut self, message: Message) -> anyhow::Result<()> {
        match self.requests.take_answer(&message) {
            Meaning::Delivery => {
                let subject = message.reply.clone().context("there is no ack subject")?;
                let (ack, pending) = Ack::of(subject, &self.consumer)?;
                self.monitor.set_waiting(pending, 0);
                self.enqueue(Delivery {
                    ack: Some(Arc::new(ack)),
                    ..message.into()
                });
            }
            Meaning::Failed(_) => self.consumer.doubt(),
            Meaning::Ended | Meaning::Heartbeat | Meaning::Other => {}
        }
        Ok(())
    }

    /// Queues a delivery. It replaces an earlier delivery of the same message, left by a request that was considered
    /// lost.
    fn enqueue(&mut self, delivery: Delivery) {
        let position = |delivery: &Delivery| delivery.ack.as_ref().map(|ack| ack.position);
        self.arrived
            .retain(|waiting| position(waiting) != position(&delivery));
        self.arrived.push_back(delivery);
    }

    /// Does the work of a tick.
    async fn on_tick(&mut self) -> anyhow::Result<()> {
        if !self.consumer.connection.is_up() {
            return Ok(());
        }
        for ack in self.unfinished() {
            ack.in_progress().await;
        }
        if self.subscriber.is_some() && self.arrived.is_empty() {
            // Also while there is a current message: a server that was killed may have forgotten that
            // it had handed the message out, and confirms no ack until it has done so again. Not when
            // another message is already waiting (the current one has left the stream), so that never more than
            // one batch waits.
            self.request_next().await;
        }
        // Somebody may have edited the consumer. Besides, while there is a current message, nothing else
        // tells how many messages wait behind it.
        let is_suspicious = self.requests.is_suspicious();
        let is_due = is_suspicious || self.is_verification_due();
        let is_verified = is_due && self.verify().await?;
        if is_verified && is_suspicious {
            self.requests.start_over(match self.is_slow {
                true => "with replay_policy original it waits as long as the publisher did",
                false => "the consumer's max_waiting may be used up",
            });
        }
        Ok(())
    }

    fn is_verification_due(&self) -> bool {
        self.consumer.connection.is_up() && self.verified.elapsed() >= VERIFY_EVERY
    }

    /// Returns whether the consumer is still configured correctly; `false` if the server cannot tell at the moment.
    ///
    /// # Errors
    /// If it is not.
    async fn verify(&mut self) -> anyhow::Result<bool> {
        let found = self.consumer.verify().await;
        self.verified = Instant::now();
        let obstacle = match found {
            Ok(Some(info)) => {
                self.learn(&info);
                None
            }
            Ok(None) => bail!(
                "the consumer {} was deleted; the next start creates it anew",
                self.consumer.name
            ),
            Err(Failure::Permanent(reason)) => bail!(reason),
            Err(Failure::Temporary(reason)) => Some(format!("JetStream is not ready: {reason}")),
        };
        let is_verified = obstacle.is_none();
        if let Some(obstacle) = &obstacle {
            warn!("{obstacle}");
        }
        self.monitor.set_obstacle(obstacle);
        Ok(is_verified)
    }

    /// Applies the server's information about the consumer.
    fn learn(&mut self, info: &Info) {
        self.monitor.set_waiting(info.num_pending, 0);
        self.requests.limit_batch(info.config.max_batch);
        self.is_slow = info.config.replay_policy == ReplayPolicy::Original;
        if self.is_paused != info.paused {
            self.is_paused = info.paused;
            let name = &self.consumer.name;
            match info.paused {
                true => info!("the consumer {name} is paused, so no messages come"),
                false => info!("the consumer {name} is no longer paused"),
            }
        }
        self.consumer.deliveries.lock().created = info.created.unix_timestamp_nanos();
    }
}
