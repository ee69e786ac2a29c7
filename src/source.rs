//! Where messages come from: a core NATS subscription.
//!
//! A source hands out one [`Delivery`] at a time. While that one is worked on, the source is
//! attended to, so that nothing is lost meanwhile.

mod core;

use std::sync::Arc;

use async_nats::{Client, HeaderMap, Subject};
use bytes::Bytes;

use crate::{nats::Faults, status::Status, subject::Prefix};

pub use self::core::Core;

/// A message to relay.
#[derive(Debug)]
pub struct Delivery {
    /// The subject on which it was published.
    pub subject: Subject,
    /// Its headers; empty if it has none.
    pub headers: HeaderMap,
    /// Its payload.
    pub payload: Bytes,
}

/// Where messages come from.
pub enum Source {
    /// A core NATS subscription: at most once.
    Core(Core),
}

impl Source {
    /// A source of everything below `prefix`.
    #[must_use]
    pub fn new(client: Client, faults: Faults, prefix: &Prefix, status: &Arc<Status>) -> Self {
        Self::Core(Core::new(
            client,
            faults,
            prefix.wildcard(),
            Arc::clone(status),
        ))
    }

    /// Subscribes; resolves once the server has accepted that.
    ///
    /// # Errors
    /// If the server refuses the login or the subscription.
    pub async fn open(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Core(core) => core.open().await,
        }
    }

    /// The next message.
    ///
    /// # Errors
    /// If there can be no further one.
    pub async fn next(&mut self) -> anyhow::Result<Delivery> {
        match self {
            Self::Core(core) => core.next().await,
        }
    }

    /// Does what the source needs done while a message is worked on. Resolves only when the relay
    /// cannot go on, with the reason.
    pub async fn attend(&mut self) -> anyhow::Error {
        match self {
            Self::Core(core) => core.attend().await,
        }
    }

    /// Ends the source, and says what it leaves behind.
    pub fn close(self) {
        match self {
            Self::Core(core) => core.close(),
        }
    }
}
