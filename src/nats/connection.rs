//! The connection to NATS, which all parts of the relay share.

use std::{
    collections::HashSet,
    fmt,
    future::pending,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use anyhow::bail;
use async_nats::{
    Client, HeaderMap, Message, PublishError, Subject, client::PublishErrorKind, connection::State,
    jetstream::Context,
};
use bytes::Bytes;
use tokio::{
    sync::{Mutex, Notify},
    task::yield_now,
};

use super::{
    Api,
    inbox::{Inbox, NoAnswer},
};

/// How many of the subjects on which a message was not refused are remembered.
const MAX_PERMITTED: usize = 1024;

/// The connection to NATS.
#[derive(Clone)]
pub struct Connection {
    /// Shared, because a copy costs an allocation.
    client: Arc<Client>,
    /// Only one, because each starts a task.
    jetstream: Context,
    api: Api,
    refusals: Arc<Refusals>,
    inbox: Arc<Mutex<Inbox>>,
}

/// Messages that NATS has refused to publish. The observer notes them, because a refusal is only an event, and the
/// client drops events beyond 128.
#[derive(Default)]
pub(super) struct Refusals {
    count: AtomicU64,
    /// Subjects on which this connection may publish, as a round trip has shown; none after a refusal, and on a
    /// new connection.
    permitted: parking_lot::Mutex<HashSet<String>>,
    /// Notified when our own inbox is refused, which is as good an answer as any.
    pub(super) inbox: Notify,
    /// The prefix of our own inbox.
    own_inbox: OnceLock<String>,
}

impl Refusals {
    pub(super) fn add(&self, refused: u64) {
        self.count.fetch_add(refused, Relaxed);
        self.permitted.lock().clear();
    }

    /// Returns whether the next message may be refused: on this very subject, or where `is_sure` is false, on any.
    fn are_possible(&self, subject: &Subject, is_sure: bool) -> bool {
        let permitted = self.permitted.lock();
        permitted.is_empty() || is_sure && !permitted.contains(&subject[..])
    }

    fn permit(&self, subject: Subject) {
        let mut permitted = self.permitted.lock();
        if permitted.len() >= MAX_PERMITTED {
            permitted.clear();
        }
        permitted.insert(subject.to_string());
    }

    pub(super) fn is_own_inbox(&self, subject: &str) -> bool {
        let inbox = self.own_inbox.get();
        inbox.is_some_and(|inbox| subject.starts_with(&inbox[..]))
    }
}

/// The task of the NATS client has panicked, as it does on a lone carriage return in a header value. It can no longer
/// send or receive anything.
#[derive(Debug)]
pub struct ClientCrashed;

impl fmt::Display for ClientCrashed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the NATS client crashed")
    }
}

impl Connection {
    pub(super) fn new(client: Client, api: Api, refusals: Arc<Refusals>) -> Self {
        let inbox = client.new_inbox();
        let _ = refusals.own_inbox.set(inbox.clone());
        Self {
            inbox: Arc::new(Mutex::new(Inbox::new(inbox))),
            jetstream: api.context(client.clone()),
            client: Arc::new(client),
            api,
            refusals,
        }
    }

    /// Returns the client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the API of the JetStream that has the streams.
    #[must_use]
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// Returns the client's own JetStream context.
    #[must_use]
    pub fn jetstream(&self) -> &Context {
        &self.jetstream
    }

    /// Returns the number of this connection to a server. Data sent on an earlier one may be lost.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.client.statistics().connects.load(Relaxed)
    }

    /// Returns whether there is a connection to a server at the moment.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Resolves once there is a connection to a server.
    pub async fn up(&self) {
        if !self.is_up() {
            self.flush().await;
        }
    }

    /// Resolves once everything published before has been sent.
    pub async fn flush(&self) {
        if self.client.flush().await.is_err() {
            crashed::<()>().await;
        }
    }

    /// Resolves once the server has processed everything sent before, and it is known what it refused.
    pub async fn round_trip(&self) {
        loop {
            self.up().await;
            let mut inbox = self.inbox.lock().await;
            if inbox.echo(self, &self.refusals.inbox).await {
                break;
            }
        }
        // A refusal comes from a task of the client's, which was woken before this one.
        yield_now().await;
    }

    /// Publishes a message. With `is_sure`, or if NATS has refused one before, this finds out whether it is refused,
    /// which takes a round trip, but only once for each subject, because permissions are by subject.
    ///
    /// # Errors
    /// If the client or the server refuses it.
    pub async fn publish_for_good(
        &self,
        subject: Subject,
        headers: HeaderMap,
        payload: Bytes,
        is_sure: bool,
    ) -> anyhow::Result<()> {
        let refusals = self.refusals();
        self.publish(subject.clone(), None, headers, payload)
            .await?;
        if self.refusals.are_possible(&subject, is_sure) {
            self.round_trip().await;
            if self.refusals() > refusals {
                bail!("NATS refuses it");
            }
            self.refusals.permit(subject);
        }
        Ok(())
    }

    /// Returns how many messages NATS has refused to publish so far.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals.count.load(Relaxed)
    }

    /// Publishes a message with a reply subject.
    ///
    /// # Errors
    /// If the client refuses it.
    pub async fn publish(
        &self,
        subject: Subject,
        reply: Option<Subject>,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<(), PublishError> {
        let client = &self.client;
        let published = match reply {
            Some(reply) => {
                client
                    .publish_with_reply_and_headers(subject, reply, headers, payload)
                    .await
            }
            None => client.publish_with_headers(subject, headers, payload).await,
        };
        match published {
            Err(error) if error.kind() == PublishErrorKind::Send => crashed().await,
            published => published,
        }
    }

    /// Publishes a message, and waits for its answer: the first that `read` accepts. One question at a time; another one
    /// waits.
    ///
    /// # Errors
    /// If there is none.
    pub async fn ask<T>(
        &self,
        subject: Subject,
        headers: HeaderMap,
        payload: Bytes,
        read: impl Fn(&Message) -> Option<T>,
    ) -> Result<T, NoAnswer> {
        let mut inbox = self.inbox.lock().await;
        inbox.ask(self, subject, headers, payload, read).await
    }
}

/// Never resolves: a crashed client does nothing any more, and the listener of the connection's events starts
/// over or exits.
pub(super) async fn crashed<T>() -> T {
    pending().await
}
