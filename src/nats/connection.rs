//! The connection to NATS, which all parts of the relay share, and its requests: messages with a reply subject of ours.

use std::{
    collections::HashSet,
    fmt,
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::bail;
use async_nats::{
    Client, HeaderMap, Message, PublishError, StatusCode, Subject, Subscriber,
    client::PublishErrorKind, connection::State,
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use tokio::{
    sync::{Mutex, Notify},
    task::yield_now,
    time::{sleep, timeout},
};

use super::events::Observer;
use crate::config::Config;

/// How many permitted subjects are remembered.
const MAX_PERMITTED: usize = 1024;

/// How long to wait for an answer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// The connection to NATS.
#[derive(Clone)]
pub struct Connection {
    client: Client,
    pub(super) config: Arc<Config>,
    refusals: Arc<Refusals>,
    inbox: Arc<Mutex<Inbox>>,
}

/// Receives the answers to requests, one request at a time.
///
/// async-nats's own `send_request` accepts the first answer, no matter from whom; it needs a channel, a random subject
/// and an entry in a map for each request, and leaks that entry if no answer comes. Here one subscription receives all
/// answers, and the caller decides which one counts.
struct Inbox {
    /// Request `n` is answered on `<prefix>.<n>`, so that a late answer is not mistaken for another one.
    prefix: String,
    /// The number of the last request.
    last: u64,
    subscription: Option<Subscriber>,
}

impl Inbox {
    /// Returns the reply subject of the next request, and the subscription, which begins with the first request.
    async fn next(&mut self, client: &Client) -> (Subject, &mut Subscriber) {
        self.last += 1;
        let reply = format!("{}.{}", self.prefix, self.last).into();
        if self.subscription.is_none() {
            let subject = format!("{}.*", self.prefix);
            self.subscription = client.subscribe(subject).await.ok();
        }
        match &mut self.subscription {
            Some(subscription) => (reply, subscription),
            None => crashed().await,
        }
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// Nobody listens to such requests.
    Nobody,
    /// The client refuses to publish the request, for this reason.
    Refused(String),
    /// None came within [`ANSWER_TIMEOUT`].
    TimedOut,
}

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody => f.write_str("nobody answers"),
            Self::Refused(reason) => f.write_str(reason),
            Self::TimedOut => write!(f, "no answer within {ANSWER_TIMEOUT:?}"),
        }
    }
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
    /// Whether that has been logged.
    pub(super) is_inbox_known: AtomicBool,
}

impl Refusals {
    pub(super) fn add(&self) {
        self.count.fetch_add(1, Relaxed);
        self.forget_permitted();
    }

    pub(super) fn forget_permitted(&self) {
        self.permitted.lock().clear();
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
    pub(super) fn new(client: Client, observer: &Observer) -> Self {
        let inbox = Inbox {
            prefix: client.new_inbox(),
            last: 0,
            subscription: None,
        };
        Self {
            inbox: Arc::new(Mutex::new(inbox)),
            client,
            config: Arc::clone(&observer.config),
            refusals: Arc::clone(&observer.refusals),
        }
    }

    /// Returns the client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
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

    /// Returns whether a request has to wait for another one.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.inbox.try_lock().is_err()
    }

    /// Resolves once everything published before has been sent.
    pub async fn flush(&self) {
        if self.client.flush().await.is_err() {
            crashed::<()>().await;
        }
    }

    /// Resolves once the server has processed everything sent before, and it is known what it refused. For that it
    /// publishes to its own inbox, so that nobody else's subscription can take the message away; it comes back or is
    /// refused, and either is an answer.
    pub async fn round_trip(&self) {
        let refused = &self.refusals.inbox;
        loop {
            self.up().await;
            let mut inbox = self.inbox.lock().await;
            if refused.notified().now_or_never().is_some() {
                // That answered an earlier one, and the subscription may be gone.
                inbox.subscription = None;
            }
            let (reply, subscription) = inbox.next(&self.client).await;
            // It fails only if the client has crashed.
            let _ = self.client.publish(reply.clone(), Bytes::new()).await;
            tokio::select! {
                () = answer_on(&reply, subscription, |_| Some(())) => break,
                () = refused.notified() => {
                    // The next one will be refused again.
                    inbox.subscription = None;
                    break;
                }
                () = sleep(ANSWER_TIMEOUT) => {}
            }
        }
        // A refusal comes from a task of the client's, which was woken before this one.
        yield_now().await;
    }

    /// Publishes a message. The first one on a connection or after a refusal, and with `must_know` the first one on
    /// each subject, takes a round trip, which shows whether it is refused; permissions are by subject.
    ///
    /// # Errors
    /// If the client or the server refuses it.
    pub async fn publish(
        &self,
        subject: Subject,
        headers: HeaderMap,
        payload: Bytes,
        must_know: bool,
    ) -> anyhow::Result<()> {
        let (refusals, epoch) = (self.refusals(), self.epoch());
        let client = &self.client;
        let published = client.publish_with_headers(subject.clone(), headers, payload);
        sent(published.await).await?;
        let permitted = &self.refusals.permitted;
        let is_known = {
            let permitted = permitted.lock();
            !permitted.is_empty() && (!must_know || permitted.contains(&subject[..]))
        };
        if !is_known {
            self.round_trip().await;
            if self.refusals() > refusals {
                bail!("NATS refuses it");
            }
            let mut permitted = permitted.lock();
            if permitted.len() >= MAX_PERMITTED {
                permitted.clear();
            }
            // On another connection it has not been tried.
            if self.epoch() == epoch {
                permitted.insert(subject.to_string());
            }
        }
        Ok(())
    }

    /// Returns how many messages NATS has refused to publish so far.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals.count.load(Relaxed)
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
        let (reply, subscription) = inbox.next(&self.client).await;
        let client = &self.client;
        let read = |answer: &Message| match answer.status {
            Some(StatusCode::NO_RESPONDERS) => Some(Err(NoAnswer::Nobody)),
            _ => read(answer).map(Ok),
        };
        let asked = client.publish_with_reply_and_headers(subject, reply.clone(), headers, payload);
        let answered = async {
            sent(asked.await)
                .await
                .map_err(|error| NoAnswer::Refused(error.to_string()))?;
            answer_on(&reply, subscription, read).await
        };
        timeout(ANSWER_TIMEOUT, answered)
            .await
            .unwrap_or(Err(NoAnswer::TimedOut))
    }
}

/// Returns the first message on `reply` that `read` accepts.
async fn answer_on<T>(
    reply: &Subject,
    subscription: &mut Subscriber,
    read: impl Fn(&Message) -> Option<T>,
) -> T {
    while let Some(message) = subscription.next().await {
        if message.subject == *reply
            && let Some(answer) = read(&message)
        {
            return answer;
        }
    }
    crashed().await
}

/// Passes the client's answer on, and never resolves if the client has crashed.
async fn sent(published: Result<(), PublishError>) -> Result<(), PublishError> {
    match published {
        Err(error) if error.kind() == PublishErrorKind::Send => crashed().await,
        published => published,
    }
}

/// Never resolves: a crashed client does nothing any more, and the listener of the connection's events starts
/// over or exits.
async fn crashed<T>() -> T {
    pending().await
}
