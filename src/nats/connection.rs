//! The connection to NATS, as all parts of the relay share it: a client, and another one in its place
//! once it has broken down. The client does so on some messages (a carriage return in a header value), and
//! that must not end the relay.

use std::{
    fmt,
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
use tokio::sync::{Mutex, watch};

use super::{
    Api,
    inbox::{Inbox, NoAnswer},
};

/// How long a request to the JetStream API may take.
const API_TIMEOUT: Duration = Duration::from_secs(2);

/// The connection to NATS.
#[derive(Clone)]
pub struct Connection {
    current: watch::Receiver<Current>,
    api: Api,
    refusals: Refusals,
    inbox: Arc<Mutex<Inbox>>,
}

/// The client that there is now.
#[derive(Clone)]
pub(super) struct Current {
    /// Shared, because a copy of it costs an allocation.
    client: Arc<Client>,
    /// Its JetStream. Only one, for each starts a task.
    jetstream: Context,
    /// How many clients there were before it.
    number: u64,
}

/// Tells one connection to a server from another, also where that is the same server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch {
    client: u64,
    connects: u64,
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

/// The client has broken down; there will be another one.
#[derive(Debug)]
pub struct ClientEnded;

impl fmt::Display for ClientEnded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the NATS client has broken down")
    }
}

impl std::error::Error for ClientEnded {}

impl Epoch {
    /// Whether it is of the same client, which keeps its subscriptions.
    #[must_use]
    pub fn is_of_the_same_client(self, other: Self) -> bool {
        self.client == other.client
    }
}

impl Connection {
    /// The first client.
    pub(super) fn new(
        client: Client,
        api: Api,
        refusals: Refusals,
    ) -> (watch::Sender<Current>, Self) {
        let inbox = Inbox::new(client.new_inbox());
        let (sender, current) = watch::channel(Current::new(client, &api, 0));
        let connection = Self {
            current,
            api,
            refusals,
            inbox: Arc::new(Mutex::new(inbox)),
        };
        (sender, connection)
    }

    /// How many messages NATS has refused to publish so far.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals.count()
    }

    /// The client that there is now.
    #[must_use]
    pub fn client(&self) -> Arc<Client> {
        Arc::clone(&self.current.borrow().client)
    }

    /// The JetStream that the streams are in.
    #[must_use]
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// The JetStream API, with a bound on how long a request takes.
    #[must_use]
    pub fn jetstream(&self) -> Context {
        self.current.borrow().jetstream.clone()
    }

    /// What JetStream tells about a stream.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn stream_info(&self, stream: &str) -> Result<Response<Info>, RequestError> {
        let request = format!("STREAM.INFO.{stream}");
        self.jetstream().request(request, &()).await
    }

    /// Which connection to a server this is. What was sent on an earlier one may be lost.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        let current = self.current.borrow();
        Epoch {
            client: current.number,
            connects: current.client.statistics().connects.load(Relaxed),
        }
    }

    /// Whether there is a connection to a server just now.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.current.borrow().client.connection_state() == State::Connected
    }

    /// Resolves once there is a connection to a server, or the client has broken down.
    pub async fn up(&self) {
        if !self.is_up() {
            // It completes only with a connection.
            let _ = self.client().flush().await;
        }
    }

    /// Resolves once there is another client than in that epoch.
    pub async fn replaced(&self, epoch: Epoch) {
        let mut receiver = self.current.clone();
        // It only fails where nobody is left to replace the client, as when the relay ends.
        let _ = receiver
            .wait_for(|current| current.number != epoch.client)
            .await;
    }

    /// Publishes a message, with where it is to be answered.
    ///
    /// # Errors
    /// If the client refuses it; [`ClientEnded`] if there is none just now.
    pub async fn publish(
        &self,
        subject: Subject,
        reply: Option<Subject>,
        headers: HeaderMap,
        payload: Bytes,
    ) -> anyhow::Result<()> {
        let client = self.client();
        let published = match reply {
            Some(reply) => {
                client
                    .publish_with_reply_and_headers(subject, reply, headers, payload)
                    .await
            }
            None => client.publish_with_headers(subject, headers, payload).await,
        };
        published.map_err(|error: PublishError| match error.kind() {
            PublishErrorKind::Send => ClientEnded.into(),
            PublishErrorKind::MaxPayloadExceeded | PublishErrorKind::InvalidSubject => error.into(),
        })
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

impl Current {
    pub(super) fn new(client: Client, api: &Api, number: u64) -> Self {
        let mut jetstream = api.context(client.clone());
        jetstream.set_timeout(API_TIMEOUT);
        Self {
            client: Arc::new(client),
            jetstream,
            number,
        }
    }

    /// What comes after it.
    pub(super) fn followed_by(&self, client: Client, api: &Api) -> Self {
        Self::new(client, api, self.number + 1)
    }
}
