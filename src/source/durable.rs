//! JetStream: at least once. A durable pull consumer with `max_ack_pending: 1`, so that the server
//! hands out one message at a time, over all replicas, and the next one only after the ack.
//!
//! The requests and answers are those of NATS ADR-13 (pull) and ADR-15 (ack subjects).

use std::{collections::VecDeque, future::pending, pin::Pin, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use async_nats::{Message, Request, StatusCode, Subject, Subscriber};
use futures::{FutureExt, StreamExt};
use log::{debug, info, warn};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::{
    Delivery, Origin,
    consumer::{Consumer, Trouble},
    unreadable,
};
use crate::{
    backoff::Backoff,
    nats::{Connection, Faults, Notice, inbox_refused},
    status::Status,
};

/// How long a pull request stays with the server.
const PULL_EXPIRES: Duration = Duration::from_secs(30);

/// How often the server says that a pull request is still with it.
const PULL_HEARTBEAT: Duration = Duration::from_secs(1);

/// After this long without a word about a pull request it is taken for lost, along with the server
/// that had it.
const SILENCE: Duration = Duration::from_millis(3500);

/// Signs of life about the messages that were handed out, and a look at whether the server is silent.
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

/// How long the server may take to confirm a word about a message.
const CONFIRMATION_TIMEOUT: Duration = Duration::from_secs(2);

/// After this long an unconfirmed word is left at that.
const SETTLE_PATIENCE: Duration = Duration::from_secs(6);

/// When an unconfirmed word is repeated.
const SETTLE_AGAIN: Duration = Duration::from_millis(250);

/// A durable consumer.
pub struct Durable {
    connection: Connection,
    faults: Faults,
    status: Arc<Status>,
    consumer: Consumer,
    /// Pull request `n` is answered on `<inbox>.<n>`.
    inbox: String,
    subscriber: Option<Subscriber>,
    /// Whether the subscription has been ended by ourselves.
    is_retired: bool,
    pull: Pull,
    /// When the server last said anything.
    heard: Instant,
    /// When the consumer was last verified.
    verified: Instant,
    /// How many pull requests in a row have failed.
    failed_pulls: u32,
    /// When that was last reported.
    failure_reported: Option<Instant>,
    tick: Pin<Box<Sleep>>,
    /// What is to be worked on next, in this order.
    arrived: VecDeque<(Delivery, Receipt)>,
    /// What is worked on.
    in_hand: Option<Receipt>,
    /// What was settled last.
    finished: Option<Receipt>,
}

/// The one pull request at a time.
#[derive(Clone, Copy, PartialEq)]
enum Pull {
    /// Request `n` is with the server.
    UnderWay(u64),
    /// Request `n` has ended; the next one may follow at once.
    Ended(u64),
    /// Request `n` has failed; before the next one, at the next tick, the consumer is verified.
    Failed(u64),
}

/// What the server knows a delivery by.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// Where to say what becomes of it.
    pub(super) ack: Subject,
    /// Its sequence in the stream.
    pub(super) sequence: u64,
    /// When the stream got it, in nanoseconds since 1970.
    pub(super) time: u64,
}

impl Receipt {
    /// What the message is known by to a webhook and to the stream behind the relay. The sequence alone
    /// would do until the stream is created anew, and then new messages would pass for old ones.
    pub(super) fn id(&self, stream: &str) -> String {
        format!("{stream}-{}-{}", self.sequence, self.time)
    }

    /// Whether both are of one message. The sequence alone does not tell: a stream that was restored
    /// gives it away again.
    fn is_of_the_same(&self, other: &Self) -> bool {
        (self.sequence, self.time) == (other.sequence, other.time)
    }
}

/// What has become of a message (ADR-15).
#[derive(Clone, Copy, Debug)]
pub enum Verdict<'a> {
    /// It was relayed.
    Ack,
    /// It was given up, with the reason.
    Term(&'a str),
}

impl Durable {
    pub(super) fn new(
        connection: Connection,
        faults: Faults,
        status: Arc<Status>,
        consumer: Consumer,
    ) -> Self {
        Self {
            inbox: connection.client().new_inbox(),
            consumer,
            connection,
            faults,
            status,
            subscriber: None,
            is_retired: false,
            pull: Pull::Ended(0),
            heard: Instant::now(),
            verified: Instant::now(),
            failed_pulls: 0,
            failure_reported: None,
            tick: Box::pin(sleep(TICK)),
            arrived: VecDeque::new(),
            in_hand: None,
            finished: None,
        }
    }

    pub(super) async fn open(&mut self) -> anyhow::Result<()> {
        let mut failures = 0;
        loop {
            let epoch = self.connection.epoch();
            self.subscribe().await;
            let reason = tokio::select! {
                biased;
                reason = self.faults.fatal(true) => return Err(reason),
                ready = self.consumer.ensure() => match ready {
                    Ok(()) => {
                        // What it means that there is no answer was said where it became known.
                        let _ = unreadable::try_to_look(&self.consumer).await;
                        self.arrived.extend(unreadable::find(&self.consumer).await);
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
                reason = self.faults.fatal(true) => return Err(reason),
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
            if self.is_retired {
                return Ok(None);
            }
            self.request_next().await;
            let is_strange =
                |(delivery, _): &(Delivery, _)| !self.consumer.wants(&delivery.subject);
            if self.arrived.front().is_some_and(is_strange) && !self.verify().await? {
                // It may be meant for someone else. Nobody can tell before the consumer is verified.
                self.step().await?;
                continue;
            }
            let Some((delivery, receipt)) = self.arrived.pop_front() else {
                self.step().await?;
                continue;
            };
            if self
                .finished
                .as_ref()
                .is_some_and(|finished| finished.is_of_the_same(&receipt))
            {
                // Handed out again while it was worked on, as after a lost connection.
                self.tell(receipt.ack, "+ACK").await;
                continue;
            }
            self.in_hand = Some(receipt);
            // The next request is with the server before the ack is, so that no time is lost.
            self.request_next().await;
            return Ok(Some(delivery));
        }
    }

    /// The message in hand has come to its end. If that is not settled, it may come again, and is
    /// then worked on again: nobody knows whether it was republished.
    pub(super) fn done(&mut self, is_settled: bool) {
        self.finished = self.in_hand.take().filter(|_| is_settled);
    }

    pub(super) async fn attend(&mut self) -> anyhow::Error {
        loop {
            if let Err(reason) = self.step().await {
                return reason;
            }
        }
    }

    /// From now on the server hands out nothing to us.
    pub(super) async fn retire(&mut self) {
        self.is_retired = true;
        if let Some(mut subscriber) = self.subscriber.take() {
            // It only fails where the client has ended, and the subscription with it.
            let _ = subscriber.unsubscribe().await;
            while let Some(Some(message)) = subscriber.next().now_or_never() {
                let _ = self.hear(message);
            }
        }
    }

    /// Hands back what was not finished, so that another replica can go on at once.
    pub(super) async fn close(mut self) {
        self.retire().await;
        let arrived = std::mem::take(&mut self.arrived);
        let arrived = arrived.into_iter().map(|(_, receipt)| receipt);
        for receipt in self.in_hand.take().into_iter().chain(arrived) {
            info!(
                "message {} is handed back to the stream {}",
                receipt.sequence, self.consumer.stream
            );
            self.tell(receipt.ack, "-NAK").await;
        }
        // Without a connection it would wait in vain.
        if self.connection.is_up() {
            let _ = timeout(CONFIRMATION_TIMEOUT, self.connection.client().flush()).await;
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
        self.heard = Instant::now();
    }

    /// Tells the server something about a delivery that it need not confirm. What a client that has
    /// broken down did not send is made up for: the server hands the message out again.
    async fn tell(&self, ack: Subject, word: &'static str) {
        let _ = self.connection.client().publish(ack, word.into()).await;
    }

    /// Does the one thing that is due first.
    async fn step(&mut self) -> anyhow::Result<()> {
        tokio::select! {
            biased;
            notice = self.faults.notice() => match notice {
                Notice::Fatal(reason) => return Err(reason),
                Notice::InboxRefused => return Err(inbox_refused()),
                Notice::LookRefused | Notice::ProbeRefused => {}
                Notice::Replaced => {
                    if !self.is_retired {
                        self.subscribe().await;
                    }
                }
                Notice::Connected => {
                    if self.in_hand.is_none() {
                        self.arrived.extend(unreadable::find(&self.consumer).await);
                    }
                    // The server has forgotten the request along with the old connection.
                    self.end_pull();
                }
            },
            message = next_of(&mut self.subscriber) => match message {
                Some(message) => self.hear(message)?,
                // The client has broken down, which is noticed in a moment.
                None => self.subscriber = None,
            },
            () = &mut self.tick => {
                self.tick.as_mut().reset(Instant::now() + TICK);
                self.look_around().await?;
            }
        }
        Ok(())
    }

    fn end_pull(&mut self) {
        if let Pull::UnderWay(n) | Pull::Failed(n) = self.pull {
            self.pull = Pull::Ended(n);
        }
    }

    /// Takes a message, or what the server says about a pull request.
    fn hear(&mut self, message: Message) -> anyhow::Result<()> {
        self.heard = Instant::now();
        // A publisher can put a status into headers, but not an ack subject into a reply.
        let is_delivery = |reply: &Subject| {
            reply.starts_with("$JS.ACK.") && !message.subject.starts_with(&self.inbox)
        };
        if message.reply.as_ref().is_some_and(is_delivery) {
            // It comes on its own subject, and so without a word about which request it answers.
            self.end_pull();
            return self.take(message);
        }
        let Some(status) = message.status else {
            return Ok(());
        };
        let description = message.description.as_deref().unwrap_or_default();
        let number = message
            .subject
            .rsplit('.')
            .next()
            .and_then(|token| token.parse().ok());
        let is_current = matches!(self.pull, Pull::UnderWay(n) if Some(n) == number);
        match status {
            StatusCode::IDLE_HEARTBEAT => {}
            _ if description == "Consumer Deleted" => {
                return Err(deleted(&self.consumer.name));
            }
            _ if description == "Consumer is push based"
                || description.starts_with("Exceeded MaxRequest") =>
            {
                bail!(
                    "the consumer {} cannot be used: {description}; delete it, or set \
                     NATS_CONSUMER to another name",
                    self.consumer.name
                );
            }
            _ if !is_current => {}
            // "Request Timeout" and "No Messages" are regular ends.
            StatusCode::TIMEOUT | StatusCode::NOT_FOUND => {
                self.failed_pulls = 0;
                self.end_pull();
            }
            // Such as no responders, a new leader, a server that shuts down.
            status => {
                self.pull = Pull::Failed(number.unwrap_or_default());
                self.report_failed_pull(&format!("{status} {description}"));
            }
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
            warn!(
                "the NATS server answers the requests for the next message with {reason}; nothing is \
                 relayed until that ends"
            );
            self.failure_reported = Some(Instant::now());
        } else {
            debug!("a pull request failed: {reason}");
        }
    }

    fn take(&mut self, message: Message) -> anyhow::Result<()> {
        self.failed_pulls = 0;
        let ack = message
            .reply
            .context("a message came without an ack subject")?;
        let (sequence, time, pending) = parse_ack_subject(&ack)
            .with_context(|| format!("an ack subject of unknown form: {ack}"))?;
        self.status.set_waiting(pending, 0);
        let receipt = Receipt {
            ack,
            sequence,
            time,
        };
        let delivery = Delivery {
            subject: message.subject,
            headers: message.headers.unwrap_or_default(),
            payload: message.payload,
            origin: Origin::Stream {
                id: receipt.id(&self.consumer.stream),
                receipt: receipt.clone(),
            },
            fault: None,
        };
        // It may have been handed out again, as by a request that was taken for lost.
        self.arrived
            .retain(|(_, waiting)| !waiting.is_of_the_same(&receipt));
        self.arrived.push_back((delivery, receipt));
        Ok(())
    }

    /// What is due at every tick.
    async fn look_around(&mut self) -> anyhow::Result<()> {
        let connected = self.connection.is_up();
        if connected {
            let arrived = self.arrived.iter().map(|(_, receipt)| receipt);
            for receipt in self.in_hand.iter().chain(arrived) {
                self.tell(receipt.ack.clone(), "+WPI").await;
            }
        }
        if connected && self.subscriber.is_some() && self.arrived.is_empty() {
            // Also while a message is in hand: a server that was killed may have forgotten that it
            // had handed the message out, and confirms no ack before it has done so again. Not when
            // another one waits already, as when the one in hand has left the stream: there would be
            // no end to those that wait.
            self.request_next().await;
        }
        let suspicious = match self.pull {
            Pull::UnderWay(_) => self.heard.elapsed() > SILENCE,
            Pull::Ended(_) => false,
            Pull::Failed(_) => true,
        };
        // Somebody may have edited the consumer; and while a message is in hand, nothing else tells how
        // many wait behind it.
        let due = self.verified.elapsed() > VERIFY_EVERY;
        if connected && (suspicious || due) {
            let is_verified = self.verify().await?;
            if suspicious && is_verified {
                self.heard = Instant::now();
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
                self.status.set_waiting(pending, 0);
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

/// Tells the server what has become of a message, until it has confirmed that; whether it has.
/// Returns early when the connection was lost meanwhile, for what was sent before on it may be lost as
/// well. A server that was killed may have forgotten that it had handed the message out, and never
/// confirms; it then hands out the message again. So does one that a dead connection never reached.
pub async fn settle(connection: &Connection, receipt: &Receipt, verdict: Verdict<'_>) -> bool {
    let client = connection.client();
    let word = match verdict {
        Verdict::Ack => "+ACK".to_owned(),
        // Older servers do not know a `+TERM` with a reason.
        Verdict::Term(reason) if client.is_server_compatible(2, 10, 4) => format!("+TERM {reason}"),
        Verdict::Term(_) => "+TERM".to_owned(),
    };
    let (epoch, start) = (connection.epoch(), Instant::now());
    loop {
        let request = Request::new()
            .payload(word.clone().into())
            .timeout(Some(CONFIRMATION_TIMEOUT));
        let confirmed = client.send_request(receipt.ack.clone(), request).await;
        if confirmed.is_ok() || connection.epoch() != epoch {
            return confirmed.is_ok();
        }
        if start.elapsed() > SETTLE_PATIENCE {
            warn!(
                "message {} may come again: NATS does not confirm its ack",
                receipt.sequence
            );
            return false;
        }
        // Nobody confirms: the consumer has no leader just now.
        sleep(SETTLE_AGAIN).await;
    }
}

/// The sequence in the stream, the time, and the number of messages that follow, from an ack subject:
/// `$JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.<consumer sequence>.<time>.<pending>`, in
/// newer servers with a domain and an account before the stream (ADR-15).
fn parse_ack_subject(subject: &str) -> Option<(u64, u64, u64)> {
    let tokens: Vec<_> = subject.strip_prefix("$JS.ACK.")?.split('.').collect();
    let start = match tokens.len() {
        7 => 0,
        9.. => 2,
        _ => return None,
    };
    Some((
        tokens[start + 3].parse().ok()?,
        tokens[start + 5].parse().ok()?,
        tokens[start + 6].parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ack_subjects_of_old_and_new_servers_are_understood() {
        for (subject, expected) in [
            (
                "$JS.ACK.CMS.relay.1.17.3.1700000000000000000.5",
                Some((17, 1_700_000_000_000_000_000, 5)),
            ),
            (
                "$JS.ACK._.hash.CMS.relay.1.17.3.1700000000000000000.5",
                Some((17, 1_700_000_000_000_000_000, 5)),
            ),
            (
                "$JS.ACK.hub.hash.CMS.relay.2.17.3.1700000000000000000.5.random",
                Some((17, 1_700_000_000_000_000_000, 5)),
            ),
            ("$JS.ACK.CMS.relay.1.x.3.1700000000000000000.5", None),
            ("$JS.ACK.CMS.relay", None),
            ("_INBOX.x", None),
        ] {
            assert_eq!(parse_ack_subject(subject), expected, "{subject}");
        }
    }
}
