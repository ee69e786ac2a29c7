//! Requests to NATS and their answers: messages with a reply subject of ours.

use std::{fmt, time::Duration};

use async_nats::{HeaderMap, Message, Subject, Subscriber};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use super::{Connection, connection::crashed};

/// How long to wait for an answer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Receives the answers to requests, one request at a time.
///
/// async-nats's own `send_request` accepts the first answer, no matter from whom; it needs a channel, a random subject
/// and an entry in a map for each request, and leaks that entry if no answer comes. Here one subscription receives all
/// answers, and the caller decides which one counts.
pub(super) struct Inbox {
    /// Request `n` is answered on `<prefix>.<n>`, so that a late answer is not mistaken for another one.
    prefix: String,
    /// The number of the last request.
    last: u64,
    subscription: Option<Subscriber>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// The client refuses to publish the request, for this reason.
    Refused(String),
    /// None came within [`ANSWER_TIMEOUT`].
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
    pub(super) fn new(prefix: String) -> Self {
        Self {
            prefix,
            last: 0,
            subscription: None,
        }
    }

    /// Publishes a message, and waits for its answer: the first that `read` accepts.
    pub(super) async fn ask<T>(
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

    /// Publishes to the inbox itself, and returns whether that message came back or was refused: either way the server
    /// has processed everything sent before. Nobody else's subscription can take it away.
    pub(super) async fn echo(&mut self, connection: &Connection, refused: &Notify) -> bool {
        if refused.notified().now_or_never().is_some() {
            // That did not answer this one, and there may be no subscription.
            self.subscription = None;
        }
        let reply = self.next_reply();
        let subscriber = self.subscriber(connection).await;
        let sent = connection.publish(reply.clone(), None, HeaderMap::new(), Bytes::new());
        // The client refuses only messages that are too large.
        let _ = sent.await;
        tokio::select! {
            _ = answer_on(&reply, subscriber, |_| Some(())) => true,
            () = refused.notified() => {
                // The next one will be refused again.
                self.subscription = None;
                true
            }
            () = sleep(ANSWER_TIMEOUT) => false,
        }
    }

    /// Returns the reply subject of the next request.
    fn next_reply(&mut self) -> Subject {
        self.last += 1;
        format!("{}.{}", self.prefix, self.last).into()
    }

    /// Subscribes when the first request is made.
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

/// Returns the first message on `reply` that `read` accepts.
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
