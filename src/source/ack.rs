//! What JetStream is told about a delivery, and what it confirms (NATS ADR-15, "Acknowledgements"): all
//! that knows how that is written.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use async_nats::{HeaderMap, Message, StatusCode, Subject, jetstream};
use bytes::Bytes;
use log::warn;
use tokio::time::{Instant, sleep};

use super::Consumer;

/// After this long the server is no longer asked to confirm.
const CONFIRM_WITHIN: Duration = Duration::from_secs(6);

/// When the server is asked once more.
const CONFIRM_AGAIN: Duration = Duration::from_millis(250);

/// A message that was handed out longer ago than this may have been handed out to another relay too.
const MOMENT: Duration = Duration::from_secs(1);

/// How long a delivery that the server tells of may be under way to us.
const UNDER_WAY: Duration = Duration::from_millis(250);

/// How a delivery of JetStream is acknowledged.
#[derive(Clone)]
pub struct Ack {
    /// What the message is known by to a webhook and to the stream behind the relay:
    /// `<stream>-<sequence>-<time>`. The sequence alone would do until the stream is created anew, and
    /// then new messages would pass for old ones.
    pub id: String,
    /// Which message of the stream it is.
    pub(super) position: Position,
    /// Which of all that the consumer has ever handed out it is.
    consumer_sequence: u64,
    subject: Subject,
    taken: SystemTime,
    consumer: Arc<Consumer>,
    handed_out: HandedOut,
}

/// The position of a message in its stream. The sequence alone does not tell: a stream that was restored
/// gives it away again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) sequence: u64,
    /// When the stream got it, in nanoseconds since 1970.
    pub(super) time: i128,
}

impl Position {
    /// Whether a relay that has acknowledged this message has acknowledged `other` before, or it is the
    /// same.
    pub(super) fn covers(self, other: Self) -> bool {
        other.sequence <= self.sequence && other.time <= self.time
    }

    fn stored(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.nanoseconds())
    }

    /// Its time in nanoseconds since 1970, which the server counts in 64 bits.
    fn nanoseconds(self) -> u64 {
        u64::try_from(self.time).unwrap_or_default()
    }
}

/// How far the consumer has come with handing out, by the numbers of its deliveries; shared by all of them.
#[derive(Clone, Default)]
pub(super) struct HandedOut(Arc<Numbers>);

#[derive(Default)]
struct Numbers {
    /// The last one to us.
    to_us: AtomicU64,
    /// The last one to another relay that we know of.
    to_another: AtomicU64,
}

/// What has become of a message.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// It was relayed.
    Relayed,
    /// It was given up, with the reason.
    GivenUp(&'a str),
}

impl Ack {
    /// The ack of a message that the consumer handed out, and how many follow it.
    ///
    /// # Errors
    /// If it was not handed out by a consumer.
    pub(super) fn of(
        message: &Message,
        consumer: &Arc<Consumer>,
        handed_out: &HandedOut,
    ) -> anyhow::Result<(Self, u64)> {
        let subject = message
            .reply
            .clone()
            .context("a message came without an ack subject")?;
        // Only the reply tells; a copy of payload and headers would be made for nothing.
        let reply_only = jetstream::Message {
            message: Message {
                subject: message.subject.clone(),
                reply: message.reply.clone(),
                payload: Default::default(),
                headers: None,
                status: None,
                description: None,
                length: 0,
            },
            context: consumer.connection.jetstream().clone(),
        };
        let info = reply_only.info().map_err(|error| {
            anyhow::anyhow!("an ack subject of unknown form, {subject}: {error}")
        })?;
        let position = Position {
            sequence: info.stream_sequence,
            time: info.published.unix_timestamp_nanos(),
        };
        let ack = Self::new(
            subject,
            position,
            info.consumer_sequence,
            consumer,
            handed_out,
        );
        Ok((ack, info.pending))
    }

    /// The ack of the message that the consumer handed out last, as the stream tells of it.
    pub(super) fn of_last(
        position: Position,
        consumer_sequence: u64,
        consumer: &Arc<Consumer>,
        handed_out: &HandedOut,
    ) -> Self {
        let Consumer { stream, name, .. } = &**consumer;
        let sequence = position.sequence;
        let subject = format!("$JS.ACK.{stream}.{name}.1.{sequence}.{consumer_sequence}.0.0");
        Self::new(
            subject.into(),
            position,
            consumer_sequence,
            consumer,
            handed_out,
        )
    }

    fn new(
        subject: Subject,
        position: Position,
        consumer_sequence: u64,
        consumer: &Arc<Consumer>,
        handed_out: &HandedOut,
    ) -> Self {
        handed_out.0.to_us.fetch_max(consumer_sequence, Relaxed);
        Self {
            id: format!(
                "{}-{}-{}",
                consumer.stream,
                position.sequence,
                position.nanoseconds()
            ),
            position,
            consumer_sequence,
            subject,
            taken: SystemTime::now(),
            consumer: Arc::clone(consumer),
            handed_out: handed_out.clone(),
        }
    }

    /// When the stream got the message.
    pub fn stored(&self) -> SystemTime {
        self.position.stored()
    }

    /// Tells the server what has become of the message, until it has confirmed that; whether it has.
    ///
    /// Returns early when the connection was lost meanwhile, for what was sent before on it may be lost
    /// as well. A server that was killed may have forgotten that it had handed the message out, and never
    /// confirms; it then hands out the message again. So does one that a dead connection never reached.
    ///
    /// It is not async-nats's `double_ack`, which takes any answer for a confirmation, that of a server without
    /// the consumer (503) too.
    pub async fn confirm(&self, outcome: Outcome<'_>) -> bool {
        let connection = &self.consumer.connection;
        let word: Bytes = match outcome {
            Outcome::Relayed => "+ACK".into(),
            // Older servers do not know a `+TERM` with a reason.
            Outcome::GivenUp(reason) if connection.client().is_server_compatible(2, 10, 4) => {
                format!("+TERM {reason}").into()
            }
            Outcome::GivenUp(_) => "+TERM".into(),
        };
        let is_confirmation =
            |answer: &Message| Some(answer.status != Some(StatusCode::NO_RESPONDERS));
        let (epoch, start) = (connection.epoch(), Instant::now());
        loop {
            let (subject, word) = (self.subject.clone(), word.clone());
            let answer = connection.ask(subject, HeaderMap::new(), word, is_confirmation);
            let is_confirmed = matches!(answer.await, Ok(true));
            if is_confirmed || connection.epoch() != epoch {
                return is_confirmed;
            }
            if start.elapsed() >= CONFIRM_WITHIN {
                warn!("{} may come again: NATS does not confirm its ack", self.id);
                return false;
            }
            // Nobody confirms: the consumer has no leader just now.
            sleep(CONFIRM_AGAIN).await;
        }
    }

    /// Acknowledges a message that has been acknowledged before, and was handed out again all the same.
    pub(super) async fn again(&self) {
        self.tell("+ACK").await;
    }

    /// Tells the server that the message is worked on, so that it does not hand it out again.
    pub(super) async fn in_progress(&self) {
        self.tell("+WPI").await;
    }

    /// Hands the message back, so that another relay gets it at once.
    pub(super) async fn nak(&self) {
        self.tell("-NAK").await;
    }

    /// Tells the server what it need not confirm. A client that crashed does not send it, and then the
    /// server hands the message out again.
    async fn tell(&self, word: &'static str) {
        let client = self.consumer.connection.client();
        let _ = client.publish(self.subject.clone(), word.into()).await;
    }

    /// Whether the message is still ours: false once the server has handed out it, or what follows it, to
    /// another relay. It does so where this one was suspended, and where the message has left the stream,
    /// as by a limit, which makes room for the next one.
    ///
    /// It asks the server, but not about a message that has only just been handed out.
    pub async fn is_current(&self) -> bool {
        // By the wall clock, for no other goes on while a laptop sleeps.
        if self.taken.elapsed().is_ok_and(|age| age < MOMENT) {
            return true;
        }
        // Where nobody answers, nobody hands out anything either.
        let last = self.consumer.last_delivery().await.unwrap_or_default();
        let Numbers { to_us, to_another } = &*self.handed_out.0;
        let is_ours = || last <= to_us.load(Relaxed);
        if is_ours() {
            return true;
        }
        // The answer may have overtaken a delivery to us.
        sleep(UNDER_WAY).await;
        if is_ours() {
            return true;
        }
        to_another.fetch_max(last, Relaxed);
        false
    }

    /// Whether the message had been handed out to us before it, or what follows it, was handed out to
    /// another relay: it reached us late, and is that one's now.
    pub(super) fn is_late(&self) -> bool {
        self.consumer_sequence <= self.handed_out.0.to_another.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_position_counts_from_1970() {
        let position = |time| Position { sequence: 1, time };
        let (epoch, second) = (SystemTime::UNIX_EPOCH, Duration::from_secs(1));
        assert_eq!(position(1_000_000_000).stored(), epoch + second);
        assert_eq!(
            position(-1).stored(),
            epoch,
            "the server counts no such time"
        );
    }

    #[test]
    fn what_was_acknowledged_before_is_recognised_but_not_in_a_restored_stream() {
        let last = Position {
            sequence: 7,
            time: 1000,
        };
        for (sequence, time, covered) in [
            (7, 1000, true),
            (6, 900, true),
            (8, 1100, false),
            // A stream that was restored gives away the same sequences again, later.
            (7, 1100, false),
            (6, 1100, false),
        ] {
            let other = Position { sequence, time };
            assert_eq!(last.covers(other), covered, "{other:?}");
        }
    }
}
