//! Acks of JetStream (NATS ADR-15, "Acknowledgements") and how they are written, and whether a delivery is still ours.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use async_nats::{HeaderMap, Subject};
use log::warn;
use tokio::time::{Instant, sleep};

use super::Consumer;

/// How long to keep asking the server to confirm an ack.
const CONFIRM_WITHIN: Duration = Duration::from_secs(6);

/// How long to wait before asking it again.
const CONFIRM_AGAIN: Duration = Duration::from_millis(250);

/// How long a message can be assumed to be still ours.
const MOMENT: Duration = Duration::from_secs(1);

/// How long a delivery that the server has counted may take to reach us.
const UNDER_WAY: Duration = Duration::from_millis(250);

/// Acknowledges a JetStream delivery.
pub struct Ack {
    /// The position of the message in the stream.
    pub(super) position: Position,
    /// The number of the delivery in the consumer.
    number: u64,
    subject: Subject,
    consumer: Arc<Consumer>,
    /// When the consumer that handed it out was created.
    created: i128,
    /// How many deliveries we had received, including this one.
    received: u64,
    /// Whether it has been sent.
    is_sent: AtomicBool,
    is_acknowledged: AtomicBool,
}

/// The position of a message in its stream. The sequence alone is not unique, because a restored stream
/// assigns it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    sequence: u64,
    /// When the stream stored it, in nanoseconds since 1970.
    time: u64,
}

/// What became of a message.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// It was relayed.
    Relayed,
    /// The relay gave up on it.
    GivenUp,
}

impl Ack {
    /// Returns the ack of a message that the consumer handed out, and how many follow it.
    ///
    /// # Errors
    /// If `subject` is not an ack subject.
    pub(super) fn of(subject: Subject, consumer: &Arc<Consumer>) -> anyhow::Result<(Self, u64)> {
        let [sequence, number, time, pending] = numbers(&subject)
            .with_context(|| format!("an ack subject has an unknown format: {subject}"))?;
        let mut deliveries = consumer.deliveries.lock();
        deliveries.received += 1;
        let ack = Self {
            position: Position { sequence, time },
            number,
            created: deliveries.created,
            received: deliveries.received,
            consumer: Arc::clone(consumer),
            is_sent: AtomicBool::new(false),
            is_acknowledged: AtomicBool::new(false),
            subject,
        };
        Ok((ack, pending))
    }

    /// Returns the id of the message for a webhook and for the stream behind the relay: `<stream>-<sequence>-<time>`.
    /// With the sequence alone, new messages would look like old ones after the stream was created anew.
    pub fn id(&self) -> String {
        let Position { sequence, time } = self.position;
        format!("{}-{sequence}-{time}", self.consumer.stream)
    }

    /// Returns when the stream stored the message.
    pub fn stored(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.position.time)
    }

    /// Returns whether the server has confirmed the ack.
    pub(super) fn is_acknowledged(&self) -> bool {
        self.is_acknowledged.load(Relaxed)
    }

    /// Returns whether the consumer handed out the same message again right after `earlier`, without having been
    /// reset or created anew.
    pub(super) fn repeats(&self, earlier: &Self) -> bool {
        self.position == earlier.position
            && self.created == earlier.created
            && self.number == earlier.number + 1
    }

    /// Sends the ack until the server has confirmed it; returns whether it has. A server that was killed may have
    /// forgotten that it had handed the message out, and then never confirms; it hands the message out again. The same
    /// happens if the ack never reached the server.
    ///
    /// Returns `None` if the connection was lost, the one of `epoch`, because what was published on it before the ack
    /// may have been lost as well. The ack must not overtake that: the client may send it on a later connection, unless
    /// it gets both at the same time. So an ack that has to wait, or is repeated, follows a round trip, which shows that
    /// everything before it has arrived.
    ///
    /// This is not async-nats's `double_ack`, because that one takes any answer for a confirmation, even the 503 of a
    /// server without the consumer.
    pub async fn confirm(&self, outcome: Outcome, epoch: u64) -> Option<bool> {
        let connection = &self.consumer.connection;
        let text = match outcome {
            Outcome::Relayed => "+ACK",
            // Without a reason: whether one is understood depends on the stream's server, which need not be the
            // one that we are connected to.
            Outcome::GivenUp => "+TERM",
        };
        let now = (SystemTime::now(), epoch);
        let start = Instant::now();
        let mut is_apart = connection.is_busy() || self.is_acknowledged();
        loop {
            if is_apart {
                connection.round_trip().await;
                if connection.epoch() != epoch {
                    return None;
                }
                if self.is_acknowledged() {
                    return Some(true);
                }
            }
            self.is_sent.store(true, Relaxed);
            let (subject, headers) = (self.subject.clone(), HeaderMap::new());
            let answer = connection.ask(subject, headers, text.into(), |_| Some(()));
            if answer.await.is_ok() {
                let mut deliveries = self.consumer.deliveries.lock();
                if deliveries.received == self.received {
                    // The next message is handed out only after this ack.
                    deliveries.complete_at = now;
                }
                self.is_acknowledged.store(true, Relaxed);
                return (is_apart || connection.epoch() == epoch).then_some(true);
            }
            // Nobody confirms: the consumer has no leader at the moment.
            sleep(CONFIRM_AGAIN).await;
            is_apart = true;
            if start.elapsed() >= CONFIRM_WITHIN {
                warn!(
                    "{} may be redelivered: NATS does not confirm its ack; if it never does, JetStream may be \
                     imported from another account: export and import the service $JS.ACK.> as well",
                    self.id()
                );
                return Some(false);
            }
        }
    }

    /// Resolves once there is a connection to a server.
    pub(super) async fn up(&self) {
        self.consumer.connection.up().await;
    }

    /// Acknowledges a message that was handed out again although it had already been acknowledged.
    pub(super) async fn again(&self) {
        self.is_acknowledged.store(true, Relaxed);
        self.tell("+ACK").await;
    }

    /// Tells the server that the message is in progress, so that it does not hand it out again.
    pub(super) async fn in_progress(&self) {
        self.tell("+WPI").await;
    }

    /// Hands the message back, so that another relay gets it at once.
    pub(super) async fn nak(&self) {
        self.tell("-NAK").await;
    }

    /// Sends the server something that it need not confirm. If the client has crashed it is not sent, and
    /// the server hands the message out again.
    async fn tell(&self, text: &'static str) {
        let client = self.consumer.connection.client();
        let _ = client.publish(self.subject.clone(), text.into()).await;
    }

    /// Returns whether the message is still ours. It is not if the server has handed it, or a later one, to another
    /// relay. That happens if this relay was suspended; if the message has left the stream, for example because of a
    /// limit, which makes room for the next one; and if the consumer was reset or created anew.
    ///
    /// The server hands out one message at a time, so a message is ours exactly as long as everything that the
    /// consumer has handed out since has come to us as well. This asks the server, but at most once a second.
    ///
    /// # Errors
    /// With the reason, if the server cannot tell at the moment.
    pub(super) async fn is_ours(&self) -> Result<bool, String> {
        let deliveries = &self.consumer.deliveries;
        let now = (SystemTime::now(), self.consumer.connection.epoch());
        let received_since = || deliveries.lock().received - self.received;
        let (complete_at, epoch) = deliveries.lock().complete_at;
        let is_recent = complete_at.elapsed().is_ok_and(|age| age < MOMENT);
        // The server hands out nothing else while this one is outstanding. An ack on an earlier connection may have got
        // through unconfirmed.
        if received_since() == 0 && is_recent && epoch == now.1 {
            return Ok(true);
        }
        if !self.consumer.connection.is_up() {
            return Err("there is no connection to it".to_owned());
        }
        let info = self.consumer.info().await;
        let info = info.map_err(|error| error.to_string())?;
        if info.created.unix_timestamp_nanos() != self.created {
            return Ok(false);
        }
        let handed_out = info.delivered.consumer_sequence.checked_sub(self.number);
        if handed_out != Some(received_since()) {
            // The answer may have overtaken a delivery.
            sleep(UNDER_WAY).await;
            if handed_out != Some(received_since()) {
                // It may have got through on a connection that is lost.
                let is_below_floor = info.ack_floor.stream_sequence >= self.position.sequence;
                let is_acknowledged = self.is_sent.load(Relaxed) && is_below_floor;
                self.is_acknowledged.store(is_acknowledged, Relaxed);
                return Ok(false);
            }
        }
        deliveries.lock().complete_at = now;
        Ok(true)
    }
}

/// Returns the last four numbers of an ack subject,
/// `$JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<times>.<sequence>.<number>.<time>.<pending>`. With a domain, more
/// tokens may follow. (async-nats's own parser takes a copy of the client for each message.)
fn numbers(subject: &str) -> Option<[u64; 4]> {
    let has_domain = subject.split('.').count() >= 11;
    let mut tokens = subject.split('.').skip(if has_domain { 7 } else { 5 });
    let mut next = || tokens.next()?.parse().ok();
    Some([next()?, next()?, next()?, next()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ack_subject_is_read_with_and_without_a_domain() {
        for (subject, expected) in [
            ("$JS.ACK.CMS.relay.1.2.3.4.5", Some([2, 3, 4, 5])),
            ("$JS.ACK.hub.hash.CMS.relay.1.2.3.4.5", Some([2, 3, 4, 5])),
            ("$JS.ACK._.hash.CMS.relay.1.2.3.4.5.x", Some([2, 3, 4, 5])),
            ("$JS.ACK._.hash.CMS.relay.1.2.3.4.5.x.y", Some([2, 3, 4, 5])),
            ("$JS.ACK.CMS.relay.1.2.3.4.x", None),
            ("$JS.ACK.CMS.relay.1.2.3.4", None),
            ("", None),
        ] {
            assert_eq!(numbers(subject), expected, "{subject}");
        }
    }
}
