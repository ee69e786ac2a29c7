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
//!
//! Its `double_ack` takes any answer for a confirmation, that of a server without the consumer (503) too;
//! hence [`Ack::confirm`]. On headers that it cannot parse async-nats drops the connection, and on a lone
//! carriage return in a header value it panics (<https://github.com/nats-io/nats.rs/pull/1612>), as it did
//! on a subject that is not UTF-8 (<https://github.com/nats-io/nats.rs/pull/1573>); hence [`unreadable`].

use std::{collections::VecDeque, future::pending, pin::Pin, sync::Arc, time::Duration};

use anyhow::{anyhow, bail};
use async_nats::{Message, Subscriber};
use futures::{FutureExt, StreamExt};
use log::{debug, info, warn};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::{
    Ack, Delivery,
    ack::{HandedOut, Position},
    consumer::{Consumer, Trouble},
    pull::Meaning,
    unreadable,
};
use crate::{
    backoff::Backoff,
    monitor::Monitor,
    nats::{Connection, ConnectionEvent, ConnectionEvents, inbox_refused},
};

/// How long a pull request stays with the server.
const PULL_EXPIRES: Duration = Duration::from_secs(30);

/// How often the server says that a pull request is still with it.
const PULL_HEARTBEAT: Duration = Duration::from_secs(1);

/// When the server has said nothing about a pull request for this long, the request is taken for lost,
/// along with the server that had it.
const SILENCE: Duration = Duration::from_millis(3500);

/// How often the server is told that a message is worked on, and its silence is noticed.
const TICK: Duration = Duration::from_secs(1);

/// How often the consumer is verified: its operator may edit it at any time.
const VERIFY_EVERY: Duration = Duration::from_secs(5);

/// Pull requests that fail one upon another are reported at most this often.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// Growing waits for a JetStream that does not answer, as without a leader.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(5),
};

/// How long a stop waits for what it has handed back to be sent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// A durable consumer.
pub struct Durable {
    connection: Connection,
    events: ConnectionEvents,
    monitor: Arc<Monitor>,
    consumer: Arc<Consumer>,
    handed_out: HandedOut,
    /// Pull request `n` is answered on `<inbox>.<n>`.
    inbox: String,
    subscriber: Option<Subscriber>,
    /// Whether the subscription has been ended by ourselves.
    is_stopped: bool,
    pull: Pull,
    /// When the server last answered anything.
    last_answer: Instant,
    /// When the consumer was last verified.
    verified: Instant,
    /// How many pull requests in a row have failed.
    failed_pulls: u32,
    /// When that was last reported.
    failure_reported: Option<Instant>,
    tick: Pin<Box<Sleep>>,
    /// What is to be worked on next, in this order.
    arrived: VecDeque<Delivery>,
    /// What is worked on.
    current: Option<Ack>,
    /// The last message of the stream that was acknowledged.
    acknowledged: Option<Position>,
}

/// What has become of the pull request; there is one at a time.
#[derive(Clone, Copy, PartialEq)]
enum Pull {
    /// Request `n` is with the server.
    UnderWay(u64),
    /// Request `n` has ended; the next one may follow at once.
    Ended(u64),
    /// Request `n` has failed; before the next one, at the next tick, the consumer is verified.
    Failed(u64),
}

impl Durable {
    pub(super) fn new(
        connection: Connection,
        events: ConnectionEvents,
        monitor: Arc<Monitor>,
        consumer: Consumer,
    ) -> Self {
        Self {
            inbox: connection.client().new_inbox(),
            consumer: Arc::new(consumer),
            handed_out: HandedOut::default(),
            connection,
            events,
            monitor,
            subscriber: None,
            is_stopped: false,
            pull: Pull::Ended(0),
            last_answer: Instant::now(),
            verified: Instant::now(),
            failed_pulls: 0,
            failure_reported: None,
            tick: Box::pin(sleep(TICK)),
            arrived: VecDeque::new(),
            current: None,
            acknowledged: None,
        }
    }

    pub(super) async fn open(&mut self) -> anyhow::Result<()> {
        let mut failures = 0;
        loop {
            let epoch = self.connection.epoch();
            self.subscribe().await;
            let reason = tokio::select! {
                biased;
                reason = self.events.fatal(true) => return Err(reason),
                ready = self.consumer.ensure() => match ready {
                    Ok(()) => {
                        // What it means that there is no answer was said where it became known.
                        let _ = unreadable::try_to_look(&self.consumer).await;
                        if let Some(warning) = self.consumer.stream_warning().await {
                            warn!("{warning}");
                        }
                        self.find_unreadable().await;
                        if self.connection.epoch().is_of_the_same_client(epoch) {
                            return Ok(());
                        }
                        continue;
                    }
                    Err(Trouble::Fatal(reason) | Trouble::NobodyAnswers(reason)) => {
                        return Err(reason);
                    }
                    // Deleted as soon as it was created; once more, then.
                    Err(Trouble::Missing) => "the consumer is missing".to_owned(),
                    Err(Trouble::Temporary(reason)) => reason,
                },
            };
            failures += 1;
            let wait = BACKOFF.wait(failures);
            // Without a connection that is what the log says already.
            if self.connection.is_up() {
                warn!("JetStream is not ready: {reason}; next attempt in {wait:.1?}");
            }
            tokio::select! {
                biased;
                reason = self.events.fatal(true) => return Err(reason),
                () = sleep(wait) => {}
            }
        }
    }

    async fn subscribe(&mut self) {
        let client = self.connection.client();
        // It only fails where the client has broken down, and then there will be another one.
        self.subscriber = client.subscribe(format!("{}.*", self.inbox)).await.ok();
    }

    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Delivery>> {
        loop {
            if self.is_stopped {
                return Ok(None);
            }
            self.request_next().await;
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
            // The next request is with the server before the ack is, so that no time is lost.
            self.request_next().await;
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
        let Pull::Ended(last) = self.pull else {
            return;
        };
        let pull = last + 1;
        let request = format!(
            r#"{{"batch":1,"expires":{},"idle_heartbeat":{}}}"#,
            PULL_EXPIRES.as_nanos(),
            PULL_HEARTBEAT.as_nanos()
        );
        let subject = format!(
            "$JS.API.CONSUMER.MSG.NEXT.{}.{}",
            self.consumer.stream, self.consumer.name
        );
        let answers = format!("{}.{pull}", self.inbox);
        // Were there no client to send it, it would be sent anew by the next one.
        let client = self.connection.client();
        let _ = client
            .publish_with_reply(subject, answers, request.into())
            .await;
        self.pull = Pull::UnderWay(pull);
        self.last_answer = Instant::now();
    }

    /// Does the one thing that is due first.
    async fn step(&mut self) -> anyhow::Result<()> {
        tokio::select! {
            biased;
            event = self.events.next() => match event {
                ConnectionEvent::Fatal(reason) => return Err(reason),
                ConnectionEvent::InboxRefused => return Err(inbox_refused()),
                ConnectionEvent::LookRefused | ConnectionEvent::ProbeRefused => {}
                ConnectionEvent::Replaced => {
                    if !self.is_stopped {
                        self.subscribe().await;
                    }
                }
                ConnectionEvent::Connected => {
                    if self.current.is_none() {
                        self.find_unreadable().await;
                    }
                    // The server has forgotten the request along with the old connection.
                    self.end_pull();
                }
            },
            message = next_of(&mut self.subscriber) => match message {
                Some(message) => self.take_answer(message)?,
                // The client has broken down, which is noticed in a moment.
                None => self.subscriber = None,
            },
            () = &mut self.tick => {
                self.tick.as_mut().reset(Instant::now() + TICK);
                self.on_tick().await?;
            }
        }
        Ok(())
    }

    fn end_pull(&mut self) {
        let (Pull::UnderWay(n) | Pull::Ended(n) | Pull::Failed(n)) = self.pull;
        self.pull = Pull::Ended(n);
    }

    /// Takes a message of the stream, or what the server says about a pull request.
    fn take_answer(&mut self, message: Message) -> anyhow::Result<()> {
        let current = match self.pull {
            Pull::UnderWay(n) => Some(n),
            Pull::Ended(_) | Pull::Failed(_) => None,
        };
        let meaning = Meaning::of(&message, &self.inbox, current);
        if meaning != Meaning::Other {
            self.last_answer = Instant::now();
        }
        match meaning {
            Meaning::Delivery => {
                // It comes on its own subject, which does not tell what request it answers.
                self.end_pull();
                self.take(message)?;
            }
            Meaning::Ended => {
                self.failed_pulls = 0;
                self.end_pull();
            }
            Meaning::Failed(reason) => {
                let (Pull::UnderWay(n) | Pull::Ended(n) | Pull::Failed(n)) = self.pull;
                self.pull = Pull::Failed(n);
                self.report_failed_pull(&format!(
                    "the NATS server refuses to hand out the next one: {reason}"
                ));
            }
            Meaning::Unusable(reason) => {
                bail!(
                    "the consumer {} cannot be used: {reason}; delete it, or set NATS_CONSUMER to \
                     another name",
                    self.consumer.name
                );
            }
            Meaning::Heartbeat | Meaning::Stale | Meaning::Other => {}
        }
        Ok(())
    }

    /// A failure now and then is regular, one upon another is not: then no message comes.
    fn report_failed_pull(&mut self, reason: &str) {
        self.failed_pulls += 1;
        let is_due = self
            .failure_reported
            .is_none_or(|reported| reported.elapsed() > REPORT_EVERY);
        if self.failed_pulls > 1 && is_due {
            warn!("no message can come: {reason}");
            self.failure_reported = Some(Instant::now());
        } else {
            debug!("a pull request failed: {reason}");
        }
    }

    fn take(&mut self, message: Message) -> anyhow::Result<()> {
        self.failed_pulls = 0;
        let (ack, pending) = Ack::of(&message, &self.consumer, &self.handed_out)?;
        self.monitor.set_waiting(pending, 0);
        let position = ack.position;
        let delivery = Delivery {
            subject: message.subject,
            headers: message.headers.unwrap_or_default(),
            payload: message.payload,
            ack: Some(ack),
            fault: None,
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
            let arrived = self
                .arrived
                .iter()
                .filter_map(|delivery| delivery.ack.as_ref());
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
        let suspicious = match self.pull {
            Pull::UnderWay(_) => self.last_answer.elapsed() > SILENCE,
            Pull::Ended(_) => false,
            Pull::Failed(_) => true,
        };
        // Somebody may have edited the consumer; and while there is a current message, nothing else
        // tells how many wait behind it.
        let due = self.verified.elapsed() > VERIFY_EVERY;
        if connected && (suspicious || due) {
            let is_verified = self.verify().await?;
            if suspicious && is_verified {
                if matches!(self.pull, Pull::UnderWay(_)) {
                    // Newer servers do not even say that.
                    self.report_failed_pull(
                        "the NATS server does not answer requests for the next one; max_waiting of the \
                         consumer may be used up",
                    );
                }
                self.last_answer = Instant::now();
                self.end_pull();
            }
        }
        Ok(())
    }

    /// Whether the consumer is still as it must be; an error if it is not. False where nobody can tell
    /// just now.
    async fn verify(&mut self) -> anyhow::Result<bool> {
        self.verified = Instant::now();
        match self.consumer.verify().await {
            Ok(pending) => {
                self.monitor.set_waiting(pending, 0);
                return Ok(true);
            }
            Err(Trouble::Fatal(reason)) => return Err(reason),
            Err(Trouble::Missing) => return Err(deleted(&self.consumer.name)),
            // Such as a leaf node that has lost its hub.
            Err(Trouble::NobodyAnswers(_)) => warn!("JetStream is not ready: nobody answers"),
            Err(Trouble::Temporary(reason)) => warn!("JetStream is not ready: {reason}"),
        }
        Ok(false)
    }
}

/// The next message of a subscription, as long as there is one.
async fn next_of(subscriber: &mut Option<Subscriber>) -> Option<Message> {
    match subscriber {
        Some(subscriber) => subscriber.next().await,
        None => pending().await,
    }
}

fn deleted(consumer: &str) -> anyhow::Error {
    anyhow!("the consumer {consumer} was deleted; the next start creates it anew")
}
