//! The connection to NATS, as all parts of the relay share it.

use std::{
    fmt,
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use async_nats::{
    Client, HeaderMap, Message, PublishError, Subject,
    client::PublishErrorKind,
    connection::State,
    jetstream::{Context, context::RequestError, response::Response, stream::Info},
};
use bytes::Bytes;
use tokio::sync::Mutex;

use super::{
    Api,
    inbox::{Inbox, NoAnswer},
};

/// How long a request to the JetStream API may take.
const API_TIMEOUT: Duration = Duration::from_secs(2);

/// The connection to NATS.
#[derive(Clone)]
pub struct Connection {
    /// Shared, because a copy of it costs an allocation.
    client: Arc<Client>,
    /// Only one, because each starts a task.
    jetstream: Context,
    api: Api,
    refusals: Refusals,
    inbox: Arc<Mutex<Inbox>>,
}

/// How many messages NATS has refused to publish.
#[derive(Clone, Default)]
pub struct Refusals(Arc<AtomicU64>);

impl Refusals {
    /// One more.
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// How many there have been.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The task of the NATS client panicked, as on a lone carriage return in a header value. Nothing can be sent
/// or received with it any more.
#[derive(Debug)]
pub struct ClientCrashed;

impl fmt::Display for ClientCrashed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the NATS client crashed")
    }
}

impl std::error::Error for ClientCrashed {}

impl Connection {
    pub(super) fn new(client: Client, api: Api, refusals: Refusals) -> Self {
        let mut jetstream = api.context(client.clone());
        jetstream.set_timeout(API_TIMEOUT);
        Self {
            inbox: Arc::new(Mutex::new(Inbox::new(client.new_inbox()))),
            client: Arc::new(client),
            jetstream,
            api,
            refusals,
        }
    }

    /// Returns how many messages NATS has refused to publish so far.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals.count()
    }

    /// The client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The JetStream that the streams are in.
    #[must_use]
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// The JetStream API, with a bound on how long a request takes.
    #[must_use]
    pub fn jetstream(&self) -> &Context {
        &self.jetstream
    }

    /// Asks JetStream for a stream's configuration and state.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn stream_info(&self, stream: &str) -> Result<Response<Info>, RequestError> {
        let request = format!("STREAM.INFO.{stream}");
        self.jetstream.request(request, &()).await
    }

    /// Returns the number of this connection to a server. What was sent on an earlier one may be lost.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.client.statistics().connects.load(Relaxed)
    }

    /// Returns whether there is a connection to a server just now.
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

    /// Resolves once all that was published before has been sent.
    pub async fn flush(&self) {
        if self.client.flush().await.is_err() {
            crashed::<()>().await;
        }
    }

    /// Publishes a message, with where it is to be answered.
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

    /// Publishes a message, and waits for its answer: the first that `read` makes something of. One question
    /// at a time; another one waits.
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

/// Never resolves: a crashed client does nothing any more, and who listens to the connection's events starts
/// over, or ends.
pub(super) async fn crashed<T>() -> T {
    pending().await
}
