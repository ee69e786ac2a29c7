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
use async_nats::{Message, Subscriber};
use futures::{FutureExt, StreamExt};
use log::info;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::{
    Ack, Delivery,
    ack::{HandedOut, Position},
    consumer::Consumer,
    next_of,
    pull::Meaning,
    requests::Requests,
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
    handed_out: HandedOut,
    requests: Requests,
    /// Whether the next message is asked for while one is worked on, so that no time is lost. Not on a web
    /// socket, which the client leaves with Nagle's algorithm (RFC 1122, 4.2.3.4): a pull request that the
    /// server has no answer to yet would hold back what is sent after it, the ack, for 40 ms.
    asks_ahead: bool,
    subscriber: Option<Subscriber>,
    /// Whether the subscription has been ended by ourselves.
    is_stopped: bool,
    /// When the consumer was last verified.
    verified: Instant,
    tick: Pin<Box<Sleep>>,
    /// What is to be worked on next, in this order.
    arrived: VecDeque<Delivery>,
    /// What is worked on.
    current: Option<Ack>,
    /// The last message of the stream that was acknowledged.
    acknowledged: Option<Position>,
}

impl Durable {
    pub(super) fn new(
        connection: Connection,
        events: ConnectionEvents,
        monitor: Arc<Monitor>,
        consumer: Consumer,
        asks_ahead: bool,
    ) -> Self {
        let Consumer { stream, name, .. } = &consumer;
        let request = format_args!("CONSUMER.MSG.NEXT.{stream}.{name}");
        let subject = connection.api().subject(request);
        Self {
            asks_ahead,
            requests: Requests::new(subject.into(), connection.client().new_inbox()),
            consumer: Arc::new(consumer),
            handed_out: HandedOut::default(),
            connection,
            events,
            monitor,
            subscriber: None,
            is_stopped: false,
            verified: Instant::now(),
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
            if self.asks_ahead || self.arrived.is_empty() {
                self.request_next().await;
            }
            let is_strange = |delivery: &Delivery| !self.consumer.wants(&delivery.subject);
            if self.arrived.front().is_some_and(is_strange) && !self.verify().await? {
                // It may be meant for someone else. Nobody can tell before the consumer is verified.
                self.step().await?;
                continue;
            }
            let Some(delivery) = self.arrived.pop_front() else {
                self.step().await?;
                continue;
            };
            if let (Some(ack), Some(last)) = (&delivery.ack, self.acknowledged)
                && last.covers(ack.position)
            {
                // Handed out again while it was worked on, as after a lost connection.
                ack.again().await;
                continue;
            }
            if delivery.ack.as_ref().is_some_and(Ack::is_late) {
                continue;
            }
            self.current = delivery.ack.clone();
            if self.asks_ahead {
                // The next request is with the server before the ack is.
                self.request_next().await;
            }
            return Ok(Some(delivery));
        }
    }

    /// The current message has come to its end. If the server has not acknowledged that, the message may
    /// come again, and is then worked on again: nobody knows whether it was republished.
    pub(super) fn done(&mut self, is_acknowledged: bool) {
        if let Some(ack) = self.current.take().filter(|_| is_acknowledged) {
            self.acknowledged = Some(ack.position);
        }
    }

    /// Takes the message that is out and not acked, if no client can read it.
    async fn find_unreadable(&mut self) {
        let found = unreadable::find(&self.consumer, &self.handed_out).await;
        self.arrived.extend(found);
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
        for ack in self.current.iter().chain(arrived) {
            info!("{} is handed back to its stream", ack.id);
            ack.nak().await;
        }
        // Without a connection it would wait in vain.
        if self.connection.is_up() {
            let _ = timeout(FLUSH_TIMEOUT, self.connection.client().flush()).await;
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
                ConnectionEvent::LookRefused | ConnectionEvent::ProbeRefused => {}
                ConnectionEvent::Connected => {
                    if self.current.is_none() {
                        self.find_unreadable().await;
                    }
                    // The server has forgotten the request along with the old connection.
                    self.requests.end();
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
                self.requests.succeeded();
                self.take(message)?;
            }
            Meaning::Ended => self.requests.succeeded(),
            Meaning::Failed(reason) => self.requests.failed(&reason),
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
        let (ack, pending) = Ack::of(&message, &self.consumer, &self.handed_out)?;
        self.monitor.set_waiting(pending, 0);
        let position = ack.position;
        let delivery = Delivery {
            ack: Some(ack),
            ..message.into()
        };
        // It may have been handed out again, as by a request that was taken for lost.
        self.arrived.retain(|waiting| {
            waiting
                .ack
                .as_ref()
                .is_none_or(|waiting| waiting.position != position)
        });
        self.arrived.push_back(delivery);
        Ok(())
    }

    /// What is due at every tick.
    async fn on_tick(&mut self) -> anyhow::Result<()> {
        let connected = self.connection.is_up();
        if connected {
            let arrived = self.arrived.iter().flat_map(|delivery| &delivery.ack);
            for ack in self.current.iter().chain(arrived) {
                ack.in_progress().await;
            }
        }
        if connected && self.subscriber.is_some() && self.arrived.is_empty() {
            // Also while there is a current message: a server that was killed may have forgotten that
            // it had handed the message out, and confirms no ack before it has done so again. Not when
            // another one waits already, as when the current one has left the stream: there would be
            // no end to those that wait.
            self.request_next().await;
        }
        let is_suspicious = self.requests.is_suspicious();
        // Somebody may have edited the consumer; and while there is a current message, nothing else
        // tells how many wait behind it.
        let due = self.verified.elapsed() >= VERIFY_EVERY;
        if connected && (is_suspicious || due) {
            let is_verified = self.verify().await?;
            if is_suspicious && is_verified {
                self.requests.start_over();
            }
        }
        Ok(())
    }

    /// Whether the consumer is still as it must be; an error if it is not. False where nobody can tell
    /// just now.
    async fn verify(&mut self) -> anyhow::Result<bool> {
        self.verified = Instant::now();
        let pending = self.consumer.verify_again().await?;
        if let Some(pending) = pending {
            self.monitor.set_waiting(pending, 0);
        }
        Ok(pending.is_some())
    }
}
