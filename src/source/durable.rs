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

mod opening;

use std::{collections::VecDeque, pin::Pin, sync::Arc, time::Duration};

use anyhow::bail;
use async_nats::{
    Message, Subscriber,
    jetstream::consumer::{Info, ReplayPolicy},
};
use futures::{FutureExt, StreamExt};
use log::{info, warn};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::{
    Ack, Delivery, ack::Deliveries, consumer::Consumer, next_of, pull::Meaning, requests::Requests,
    unreadable,
};
use crate::{
    monitor::Monitor,
    nats::{Connection, ConnectionEvents},
};

/// How often the server is told that a message is in progress, and is checked for silence.
const TICK: Duration = Duration::from_secs(1);

/// How often the consumer is verified, because somebody may edit it at any time.
const VERIFY_EVERY: Duration = Duration::from_secs(5);

/// How long a stop waits until the messages that it hands back have been sent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// A durable consumer.
pub struct Durable {
    connection: Connection,
    events: ConnectionEvents,
    monitor: Arc<Monitor>,
    consumer: Arc<Consumer>,
    deliveries: Deliveries,
    requests: Requests,
    subscriber: Option<Subscriber>,
    /// Whether we have ended the subscription.
    is_stopped: bool,
    /// When the consumer was last verified.
    verified: Instant,
    /// Whether it hands out messages at the pace at which they were published.
    is_slow: bool,
    tick: Pin<Box<Sleep>>,
    /// The deliveries to process next, in this order.
    arrived: VecDeque<Delivery>,
    /// The ack of the message being processed.
    current: Option<Arc<Ack>>,
    /// The last acknowledged ack.
    acknowledged: Option<Arc<Ack>>,
}

impl Durable {
    pub(super) fn new(
        connection: Connection,
        events: ConnectionEvents,
        monitor: Arc<Monitor>,
        consumer: Consumer,
    ) -> Self {
        let Consumer { stream, name, .. } = &consumer;
        let subject = connection.api_subject(&format!("CONSUMER.MSG.NEXT.{stream}.{name}"));
        Self {
            requests: Requests::new(subject.into(), connection.client().new_inbox()),
            consumer: Arc::new(consumer),
            deliveries: Deliveries::new(),
            connection,
            events,
            monitor,
            subscriber: None,
            is_stopped: false,
            verified: Instant::now(),
            is_slow: false,
            tick: Box::pin(sleep(TICK)),
            arrived: VecDeque::new(),
            current: None,
            acknowledged: None,
        }
    }

    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Delivery>> {
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
                |delivery: &Delivery| !self.consumer.prefix.contains(&delivery.subject);
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
                    ack.id
                );
                ack.again().await;
                self.acknowledged = delivery.ack;
                continue;
            }
            self.current = delivery.ack.clone();
            return Ok(Some(delivery));
        }
    }

    /// Notes that the current message has been processed. If the server has not acknowledged that, the message
    /// may be redelivered, and is then processed again, because it may not have been republished.
    pub(super) fn done(&mut self, is_acknowledged: bool) {
        let ended = self.current.take();
        if is_acknowledged {
            self.acknowledged = ended;
        }
    }

    /// Takes the message that is handed out but not acked, if no client can read it.
    async fn find_unreadable(&mut self) {
        if let Some(delivery) = unreadable::find(&self.consumer, &self.deliveries).await {
            self.wait(delivery);
        }
    }

    pub(super) async fn attend(&mut self) -> anyhow::Error {
        loop {
            if let Err(reason) = self.step().await {
                return reason;
            }
        }
    }

    /// Unsubscribes, so that the server hands out nothing more to us.
    pub(super) async fn stop(&mut self) {
        self.is_stopped = true;
        if let Some(mut subscriber) = self.subscriber.take() {
            // It fails only if the client has crashed, and the subscription is gone as well.
            let _ = subscriber.unsubscribe().await;
            while let Some(Some(message)) = subscriber.next().now_or_never() {
                let _ = self.take_answer(message);
            }
        }
    }

    /// Hands back the unfinished messages, so that another replica can continue at once.
    pub(super) async fn close(mut self) {
        self.stop().await;
        let arrived = self
            .arrived
            .iter()
            .filter_map(|delivery| delivery.ack.as_ref());
        let unfinished: Vec<_> = self.current.iter().chain(arrived).collect();
        for ack in &unfinished {
            ack.nak().await;
        }
        // Without a connection, there is no point in waiting.
        let is_flushed = self.connection.is_up()
            && matches!(
                timeout(FLUSH_TIMEOUT, self.connection.client().flush()).await,
                Ok(Ok(()))
            );
        for ack in unfinished {
            match is_flushed {
                true => info!("{} is handed back to its stream", ack.id),
                false => info!(
                    "{} stays in its stream, which hands it out again after the ack wait",
                    ack.id
                ),
            }
        }
    }

    /// Sends a pull request if none is under way.
    async fn request_next(&mut self) {
        let Some(request) = self.requests.next() else {
            return;
        };
        // It fails only if the client has crashed, which the events report.
        let client = self.connection.client();
        let _ = client
            .publish_with_reply(request.subject, request.reply, request.text)
            .await;
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
                Some(message) => self.take_answer(message)?,
                // The client has crashed, which will be noticed in a moment.
                None => self.subscriber = None,
            },
            () = &mut self.tick => {
                self.tick.as_mut().reset(Instant::now() + TICK);
                self.on_tick().await?;
            }
        }
        Ok(())
    }

    /// Takes a message of the stream, or the server's answer to a pull request.
    fn take_answer(&mut self, message: Message) -> anyhow::Result<()> {
        let meaning = Meaning::of(&message, self.requests.inbox(), self.requests.under_way());
        match meaning {
            Meaning::Delivery => {
                // It comes on its own subject, which does not tell which request it answers.
                self.requests.delivered();
                self.take(message)?;
            }
            Meaning::Ended => self.requests.expired(),
            Meaning::Failed(reason) => {
                self.deliveries.doubt_consumer();
                self.requests.failed(&reason);
            }
            Meaning::Unusable(reason) => {
                bail!(
                    "the consumer {} cannot be used: {reason}; delete it, or set NATS_CONSUMER to \
                     another name",
                    self.consumer.name
                );
            }
            Meaning::Heartbeat => self.requests.answered(),
            Meaning::Stale | Meaning::Other => {}
        }
        Ok(())
    }

    fn take(&mut self, message: Message) -> anyhow::Result<()> {
        let (ack, pending) = Ack::of(&message, &self.consumer, &self.deliveries)?;
        self.monitor.set_waiting(pending, 0);
        self.wait(Delivery {
            ack: Some(Arc::new(ack)),
            ..message.into()
        });
        Ok(())
    }

    /// Queues a delivery. It replaces an earlier delivery of the same message, which there may be after a request
    /// that was considered lost.
    fn wait(&mut self, delivery: Delivery) {
        let position = |delivery: &Delivery| delivery.ack.as_ref().map(|ack| ack.position);
        self.arrived
            .retain(|waiting| position(waiting) != position(&delivery));
        self.arrived.push_back(delivery);
    }

    /// Does the work of a tick.
    async fn on_tick(&mut self) -> anyhow::Result<()> {
        if !self.connection.is_up() {
            return Ok(());
        }
        let arrived = self.arrived.iter().flat_map(|delivery| &delivery.ack);
        for ack in self.current.iter().chain(arrived) {
            ack.in_progress().await;
        }
        if self.subscriber.is_some() && self.arrived.is_empty() {
            // Also while there is a current message: a server that was killed may have forgotten that
            // it had handed the message out, and confirms no ack until it has done so again. Not when
            // another message is already waiting (the current one has left the stream), so that never more than
            // one batch waits.
            self.request_next().await;
        }
        let is_suspicious = self.requests.is_suspicious();
        // Somebody may have edited the consumer. Besides, while there is a current message, nothing else
        // tells how many messages wait behind it.
        let is_due = is_suspicious || self.is_verification_due();
        let is_verified = is_due && self.verify().await?;
        if is_suspicious && is_verified {
            self.requests.start_over(match self.is_slow {
                true => "with replay_policy original it waits as long as the publisher did",
                false => "the consumer's max_waiting may be used up",
            });
        }
        Ok(())
    }

    fn is_verification_due(&self) -> bool {
        self.connection.is_up() && self.verified.elapsed() >= VERIFY_EVERY
    }

    /// Returns whether the consumer is still configured correctly; `false` if the server cannot tell at the moment.
    ///
    /// # Errors
    /// If it is not.
    async fn verify(&mut self) -> anyhow::Result<bool> {
        let found = self.consumer.verify_again().await?;
        self.verified = Instant::now();
        match &found {
            Ok(info) => self.learn(info),
            Err(reason) => warn!("{reason}"),
        }
        let is_verified = found.is_ok();
        self.monitor.set_obstacle(found.err());
        Ok(is_verified)
    }

    /// Applies the server's information about the consumer.
    fn learn(&mut self, info: &Info) {
        self.monitor.set_waiting(info.num_pending, 0);
        self.requests.limit_batch(info.config.max_batch);
        self.is_slow = info.config.replay_policy == ReplayPolicy::Original;
        self.deliveries.come_from(info);
    }
}
