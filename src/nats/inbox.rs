//! Questions to NATS, and what is answered: messages with a reply subject of ours.
//!
//! async-nats's own `send_request` takes the first answer, whoever's it is, and needs a channel, a random
//! subject and an entry in a map for each question. Here one subscription takes all answers, and whoever asks
//! says what is one.

use std::{fmt, time::Duration};

use async_nats::{HeaderMap, Message, Subject, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use tokio::time::timeout;

use super::{Connection, connection::crashed};

/// How long an answer may take.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Where the answers come, to one question at a time.
pub(super) struct Inbox {
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
    pub(super) fn new(prefix: String) -> Self {
        Self {
            prefix,
            last: 0,
            subscription: None,
        }
    }

    /// Publishes a message, and waits for its answer: the first that `read` makes something of.
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
        let answer = async {
            loop {
                let Some(message) = subscriber.next().await else {
                    return crashed().await;
                };
                if message.subject == reply
                    && let Some(answer) = read(&message)
                {
                    return answer;
                }
            }
        };
        let answer = timeout(ANSWER_TIMEOUT, answer).await;
        answer.map_err(|_| NoAnswer::TimedOut)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_question_is_answered_on_a_subject_of_its_own() {
        let mut inbox = Inbox::new("inbox".to_owned());
        let replies = [(); 3].map(|()| inbox.next_reply().to_string());
        assert_eq!(replies, ["inbox.1", "inbox.2", "inbox.3"]);
    }
}
