//! The connection to NATS, as all parts of the relay share it.

use std::{
    fmt,
    future::pending,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::bail;
use async_nats::{
    Client, HeaderMap, Message, PublishError, Subject, Subscriber, client::PublishErrorKind,
    connection::State, jetstream::Context,
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use tokio::{
    sync::{Mutex, Notify},
    task::yield_now,
    time::{sleep, timeout},
};

use super::Api;

/// The connection to NATS.
#[derive(Clone)]
pub struct Connection {
    /// Shared, because a copy of it costs an allocation.
    client: Arc<Client>,
    /// Only one, because each starts a task.
    jetstream: Context,
    api: Api,
    refusals: Arc<Refusals>,
    inbox: Arc<Mutex<Inbox>>,
}

/// Messages that NATS has refused to publish, as the observer notes them for those who publish. A refusal
/// shows only as an event, and the client drops events beyond 128.
#[derive(Default)]
pub(super) struct Refusals {
    count: AtomicU64,
    /// Whether the next one may be refused as well: so after a refusal, and on a new connection.
    is_doubtful: AtomicBool,
    /// Notified when our own inbox is refused, which is as good an answer as any.
    pub(super) inbox: Notify,
    /// What our own inbox begins with.
    own_inbox: OnceLock<String>,
}

impl Refusals {
    pub(super) fn add(&self, refused: u64) {
        self.count.fetch_add(refused, Relaxed);
        self.is_doubtful.store(true, Relaxed);
    }

    pub(super) fn is_own_inbox(&self, subject: &str) -> bool {
        let inbox = self.own_inbox.get();
        inbox.is_some_and(|inbox| subject.starts_with(&inbox[..]))
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

    /// The client's own JetStream.
    #[must_use]
    pub fn jetstream(&self) -> &Context {
        &self.jetstream
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

    /// Resolves once the server has processed all that was sent before, and what it refused of that is known.
    pub async fn round_trip(&self) {
        loop {
            self.up().await;
            let mut inbox = self.inbox.lock().await;
            if inbox.echo(self, &self.refusals.inbox).await {
                break;
            }
        }
        // A refusal comes by a task of the client's, which was woken before this one.
        yield_now().await;
    }

    /// Publishes a message. With `is_sure`, or where NATS may refuse it because it did so before, that is found
    /// out.
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
        self.publish(subject, None, headers, payload).await?;
        if is_sure || self.refusals.is_doubtful.load(Relaxed) {
            self.round_trip().await;
            if self.refusals() > refusals {
                bail!("NATS refuses it");
            }
            self.refusals.is_doubtful.store(false, Relaxed);
        }
        Ok(())
    }

    /// Returns how many messages NATS has refused to publish so far.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals.count.load(Relaxed)
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
async fn crashed<T>() -> T {
    pending().await
}

/// How long an answer may take.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Where the answers to questions come, to one at a time.
///
/// async-nats's own `send_request` takes the first answer, whoever's it is, needs a channel, a random subject and
/// an entry in a map for each question, and keeps that entry where no answer comes. Here one subscription takes
/// all answers, and the asker says what is one.
struct Inbox {
    /// Question `n` is answered on `<prefix>.<n>`, so that a late answer is not taken for another one.
    prefix: String,
    /// The number of the last question.
    last: u64,
    subscription: Option<Subscriber>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// The client refuses to publish the question, for this reason.
    Refused(String),
    /// There was none within [`ANSWER_TIMEOUT`].
    TimedOut,
}

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(reason) => f.write_str(reason),
            Self::TimedOut => write!(f, "no answer within {ANSWER_TIMEOUT:?}"),
        }
    }
}

impl Inbox {
    fn new(prefix: String) -> Self {
        Self {
            prefix,
            last: 0,
            subscription: None,
        }
    }

    /// Publishes a message, and waits for its answer: the first that `read` makes something of.
    async fn ask<T>(
        &mut self,
        connection: &Connection,
        subject: Subject,
        headers: HeaderMap,
        payload: Bytes,
        read: impl Fn(&Message) -> Option<T>,
    ) -> Result<T, NoAnswer> {
        let reply = self.next_reply();
        let subscriber = self.subscriber(connection).await;
        connection
            .publish(subject, Some(reply.clone()), headers, payload)
            .await
            .map_err(|error| NoAnswer::Refused(error.to_string()))?;
        let answer = timeout(ANSWER_TIMEOUT, answer_on(&reply, subscriber, read)).await;
        answer.map_err(|_| NoAnswer::TimedOut)
    }

    /// Publishes to the inbox itself, and returns whether that came back or was refused: either way the server
    /// has processed all that was sent before. Nobody else's subscription can take it away.
    async fn echo(&mut self, connection: &Connection, refused: &Notify) -> bool {
        if refused.notified().now_or_never().is_some() {
            // That was no answer to this one, and there may be no subscription.
            self.subscription = None;
        }
        let reply = self.next_reply();
        let subscriber = self.subscriber(connection).await;
        let sent = connection.publish(reply.clone(), None, HeaderMap::new(), Bytes::new());
        // The client refuses nothing so small.
        let _ = sent.await;
        tokio::select! {
            _ = answer_on(&reply, subscriber, |_| Some(())) => true,
            () = refused.notified() => {
                // The next one is to be refused again.
                self.subscription = None;
                true
            }
            () = sleep(ANSWER_TIMEOUT) => false,
        }
    }

    /// Where the next question is to be answered.
    fn next_reply(&mut self) -> Subject {
        self.last += 1;
        format!("{}.{}", self.prefix, self.last).into()
    }

    /// Subscribes, the first time that an answer is wanted.
    async fn subscriber(&mut self, connection: &Connection) -> &mut Subscriber {
        let subscriber = match self.subscription.take() {
            Some(subscriber) => subscriber,
            None => {
                let subject = format!("{}.*", self.prefix);
                match connection.client().subscribe(subject).await {
                    Ok(subscriber) => subscriber,
                    Err(_) => crashed().await,
                }
            }
        };
        self.subscription.insert(subscriber)
    }
}

/// The first message on `reply` that `read` makes something of.
async fn answer_on<T>(
    reply: &Subject,
    subscriber: &mut Subscriber,
    read: impl Fn(&Message) -> Option<T>,
) -> T {
    loop {
        let Some(message) = subscriber.next().await else {
            return crashed().await;
        };
        if message.subject == *reply
            && let Some(answer) = read(&message)
        {
            return answer;
        }
    }
}
