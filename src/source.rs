//! Where messages come from: a core NATS subscription, or a durable JetStream consumer.
//!
//! A source hands out one [`Delivery`] at a time. While a delivery is being processed, [`Source::attend`] keeps the
//! source going so that nothing is lost.

mod ack;
mod consumer;
mod core;
mod durable;
mod requests;
mod unreadable;

use std::{future::pending, sync::Arc, time::Duration};

use async_nats::{HeaderMap, Message, Subject, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use log::{info, warn};
use tokio::{task::coop::unconstrained, time::sleep};

use crate::{
    config::{Config, Mode},
    monitor::Monitor,
    nats::{Connection, ConnectionEvents},
};

#[cfg(any(fuzzing, test))]
pub(crate) use self::requests::Meaning;
pub use self::{
    ack::{Ack, Outcome},
    core::Core,
    durable::Durable,
};
pub(crate) use self::{
    consumer::Consumer,
    unreadable::{oldest_age, try_to_look},
};

/// A message to relay.
pub struct Delivery {
    /// The subject on which it was published.
    pub subject: Subject,
    /// Its headers; empty if it has none.
    pub headers: HeaderMap,
    /// Its payload.
    pub payload: Bytes,
    /// How it is acknowledged; `None` in core mode.
    pub ack: Option<Arc<Ack>>,
    /// Why it cannot be relayed at all, if that is so.
    pub unrelayable: Option<&'static str>,
}

impl From<Message> for Delivery {
    /// Converts a core NATS message, which has no ack.
    fn from(message: Message) -> Self {
        Self {
            subject: message.subject,
            headers: message.headers.unwrap_or_default(),
            payload: message.payload,
            ack: None,
            unrelayable: None,
        }
    }
}

/// How long to wait before asking again whether a message is still ours.
const ASK_AGAIN: Duration = Duration::from_millis(500);

impl Delivery {
    /// Returns whether the message may be POSTed: unless it is certainly no longer ours, which is logged.
    pub async fn may_be_posted(&self) -> bool {
        match &self.ack {
            None => true,
            // An unreachable server presumably hands out nothing to others either.
            Some(ack) => ack.is_ours().await.unwrap_or(true) || self.abandon(),
        }
    }

    /// Returns whether the message may be published: only if it is certainly still ours, so this waits until NATS can
    /// tell. Logs if it is not.
    pub async fn may_be_published(&self) -> bool {
        let Some(ack) = &self.ack else {
            return true;
        };
        // If the ack has overtaken the message, nobody else will publish it.
        if ack.is_acknowledged() {
            return true;
        }
        loop {
            ack.up().await;
            match ack.is_ours().await {
                Ok(is_ours) => return is_ours || self.abandon(),
                Err(reason) => warn!(
                    subject:% = self.subject, reason;
                    "{} cannot be published yet, because NATS does not say whether it is still ours: {reason}",
                    self.subject
                ),
            }
            sleep(ASK_AGAIN).await;
        }
    }

    /// Returns whether NATS is known to have taken the ack.
    pub fn is_acknowledged(&self) -> bool {
        self.ack.as_ref().is_some_and(|ack| ack.is_acknowledged())
    }

    fn abandon(&self) -> bool {
        let subject = &self.subject;
        match self.is_acknowledged() {
            true => info!(subject:% = subject; "{subject} was acknowledged in the meantime"),
            false => warn!(
                subject:% = subject;
                "{subject} is abandoned: NATS has since handed it, or a later message, to another relay"
            ),
        }
        false
    }
}

/// Where messages come from.
///
/// An enum rather than a trait, which would make everything that holds a source generic.
pub enum Source {
    /// A core NATS subscription: at most once.
    Core(Box<Core>),
    /// A durable JetStream consumer: at least once.
    Durable(Box<Durable>),
}

impl Source {
    /// Returns a source of everything below the prefix. Must be called within a tokio runtime.
    #[must_use]
    pub fn new(
        connection: Connection,
        events: ConnectionEvents,
        config: &Arc<Config>,
        monitor: &Arc<Monitor>,
    ) -> Self {
        let monitor = Arc::clone(monitor);
        match config.mode.clone() {
            Mode::Core { queue_group } => {
                let core = Core::new(
                    connection,
                    events,
                    config.prefix.wildcard(),
                    queue_group,
                    monitor,
                );
                Self::Core(Box::new(core))
            }
            Mode::Durable { stream, consumer } => {
                let consumer = Consumer::new(connection, &stream, &consumer, config);
                let durable = Durable::new(events, monitor, consumer);
                Self::Durable(Box::new(durable))
            }
        }
    }

    /// Subscribes; resolves once the server has accepted the subscription.
    ///
    /// # Errors
    /// If the server refuses the login or the subscription, or the stream is missing.
    pub async fn open(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Core(core) => core.open().await,
            Self::Durable(durable) => durable.open().await,
        }
    }

    /// Returns the next message; `None` if the source was [stopped](Self::stop) and has no more.
    ///
    /// # Errors
    /// If no more messages can come.
    pub async fn next(&mut self) -> anyhow::Result<Option<Delivery>> {
        match self {
            Self::Core(core) => core.next().await,
            Self::Durable(durable) => durable.next().await,
        }
    }

    /// Keeps the source going while a message is being processed. Resolves only if the relay cannot continue, with
    /// the reason.
    pub async fn attend(&mut self) -> anyhow::Error {
        match self {
            Self::Core(core) => core.attend().await,
            Self::Durable(durable) => durable.attend().await,
        }
    }

    /// Asks the server for no more messages. Messages that have arrived are still handed out, unless a server keeps
    /// them; returns how many these are.
    pub async fn stop(&mut self) -> u64 {
        match self {
            Self::Core(core) => core.stop().await,
            Self::Durable(durable) => durable.stop().await,
        }
    }

    /// Closes the source: hands back the messages that it can, and logs those that are left behind.
    pub async fn close(self) {
        match self {
            Self::Core(core) => core.close(),
            Self::Durable(durable) => durable.close().await,
        }
    }
}

/// Returns the next message of a subscription; never resolves without a subscription. The client puts as many into it
/// as the socket yields, so all of them have to be taken at once: if tokio made the task yield in between, as it does
/// by default, they would pile up in a queue without a limit.
async fn next_of(subscriber: &mut Option<Subscriber>) -> Option<Message> {
    match subscriber {
        Some(subscriber) => unconstrained(subscriber.next()).await,
        None => pending().await,
    }
}
