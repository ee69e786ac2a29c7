//! JetStream: at least once. A durable pull consumer with `max_ack_pending: 1`, so that the server
//! hands out one message at a time, over all replicas, and the next one only after the ack.
//!
//! The requests and answers are those of NATS ADR-13 (pull) and ADR-15 (ack subjects).
//!
//! The pull requests are our own, and not those of async-nats's `Consumer::stream`, because of what that
//! one does as of 0.51:
//!
//! - It takes any message with a status in its headers for the server's answer. A publisher can put one
//!   there, and then a stored `NATS/1.0 408` would be swallowed, never be acked, and block all that follow.
//! - After a reconnect it renews its request only if no message waits to be taken, so that with several
//!   relays nobody may get a message for half a minute.
//! - Dropping it loses what it has fetched in advance. Another relay gets that only when the ack wait is
//!   over, whereas we hand it back.

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
    nats::{Connection, ConnectionEvent, ConnectionEvents},
};

/// How often the server is told that a message is worked on, and its silence is noticed.
const TICK: Duration = Duration::from_secs(1);

/// How often the consumer is verified: its operator may edit it at any time.
const VERIFY_EVERY: Duration = Duration::from_secs(5);

/// How long a stop waits for what it has handed back to be sent.
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
    /// Whether the subscription has been ended by ourselves.
    is_stopped: bool,
    /// When the consumer was last verified.
    verified: Instant,
    /// Whether it hands out messages at the pace at which they came.
    is_slow: bool,
    tick: Pin<Box<Sleep>>,
    /// What is to be worked on next, in this order.
    arrived: VecDeque<Delivery>,
    /// What is worked on.
    current: Option<Arc<Ack>>,
    /// The last one that was acknowledged.
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
        let request = format_args!("CONSUMER.MSG.NEXT.{stream}.{name}");
        let subject = connection.api().subject(request);
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
            // Here as well as at a tick, because what is done there ends with the current message.
            if self.is_verification_due() {
                self.verify().await?;
            }
            let is_strange =
                |delivery: &Delivery| !self.consumer.prefix.contains(&delivery.subject);
            if self.arrived.front().is_some_and(is_strange) && !self.verify().await? {
                // It may be meant for someone else. Nobody can tell before the consumer is verified.
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

    /// Notes that the current message has come to its end. If the server has not acknowledged that, the message
    /// may come again, and is then worked on again: nobody knows whether it was republished.
    pub(super) fn done(&mut self, is_acknowledged: bool) {
        let ended = self.current.take();
        if is_acknowledged {
            self.acknowledged = ended;
        }
    }

    /// Takes the message that is out and not acked, if no client can read it.
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

    /// From now on the server hands out nothing to us.
    pub(super) async fn stop(&mut self) {
        self.is_stopped = true;
        if let Some(mut subscriber) = self.subscriber.take() {
            // It only fails where the client has ended, and the subscription with it.
            let _ = subscriber.unsubscribe().await;
            while let Some(Some(message)) = subscriber.next().now_or_never() {
                let _ = self.take_answer(message);
            }
        }
    }

    /// Hands back what was not finished, so that another replica can go on at once.
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
        // Without a connection it would wait in vain.
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
        // It only fails where the client crashed, which the events tell.
        let client = self.connection.client();
        let _ = client
            .publish_with_reply(request.subject, request.reply, request.text)
            .await;
    }

    /// Does the one thing that is due first.
    async fn step(&mut self) -> anyhow::Result<()> {
        tokio::select! {
            biased;
            event = self.events.next() => match event {
                ConnectionEvent::Fatal(reason) | ConnectionEvent::InboxRefused(reason) => {
                    return Err(reason);
                }
                ConnectionEvent::LookRefused => {}
                ConnectionEvent::Connected => {
                    // The server has forgotten the request along with the old connection.
                    self.requests.end();
                    self.find_unreadable().await;
                }
            },
            message = next_of(&mut self.subscriber) => match message {
                Some(message) => self.take_answer(message)?,
                // The client crashed, which is noticed in a moment.
                None => self.subscriber = None,
            },
            () = &mut self.tick => {
                self.tick.as_mut().reset(Instant::now() + TICK);
                self.on_tick().await?;
            }
        }
        Ok(())
    }

    /// Takes a message of the stream, or what the server says about a pull request.
    fn take_answer(&mut self, message: Message) -> anyhow::Result<()> {
        let meaning = Meaning::of(&message, self.requests.inbox(), self.requests.under_way());
        match meaning {
            Meaning::Delivery => {
                // It comes on its own subject, which does not tell what request it answers.
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

    /// Has a delivery wait for its turn. It takes the place of an earlier one of the same message, as after a
    /// request that was taken for lost.
    fn wait(&mut self, delivery: Delivery) {
        let position = |delivery: &Delivery| delivery.ack.as_ref().map(|ack| ack.position);
        self.arrived
            .retain(|waiting| position(waiting) != position(&delivery));
        self.arrived.push_back(delivery);
    }

    /// Does what is due at every tick.
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
            // it had handed the message out, and confirms no ack before it has done so again. Not when
            // another one waits already, as when the current one has left the stream, so that no more wait
            // than one batch has.
            self.request_next().await;
        }
        let is_suspicious = self.requests.is_suspicious();
        // Somebody may have edited the consumer; and while there is a current message, nothing else
        // tells how many wait behind it.
        let is_due = is_suspicious || self.is_verification_due();
        let is_verified = is_due && self.verify().await?;
        if is_suspicious && is_verified {
            self.requests.start_over(match self.is_slow {
                true => "with replay_policy original it waits as long as the publisher did",
                false => "max_waiting of the consumer may be used up",
            });
        }
        Ok(())
    }

    fn is_verification_due(&self) -> bool {
        self.connection.is_up() && self.verified.elapsed() >= VERIFY_EVERY
    }

    /// Returns whether the consumer is still configured correctly; an error if it is not. False where nobody
    /// can tell just now.
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

    /// Takes in what the server tells of the consumer.
    fn learn(&mut self, info: &Info) {
        self.monitor.set_waiting(info.num_pending, 0);
        self.requests.limit_batch(info.config.max_batch);
        self.is_slow = info.config.replay_policy == ReplayPolicy::Original;
        self.deliveries.come_from(info);
    }
}
