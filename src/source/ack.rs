//! Acks of JetStream (NATS ADR-15, "Acknowledgements") and how they are written, and whether a delivery is still ours.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use async_nats::{HeaderMap, Message, Subject, jetstream};
use log::warn;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::Consumer;
use crate::nats::NoAnswer;

/// How long the server is asked again and again to confirm an ack.
const CONFIRM_WITHIN: Duration = Duration::from_secs(6);

/// How long to wait before asking it again.
const CONFIRM_AGAIN: Duration = Duration::from_millis(250);

/// How long a message can be assumed to be still ours.
const MOMENT: Duration = Duration::from_secs(1);

/// How long a delivery that the server has counted may take to reach us.
const UNDER_WAY: Duration = Duration::from_millis(250);

/// Acknowledges a JetStream delivery.
pub struct Ack {
    /// The id of the message for a webhook and for the stream behind the relay: `<stream>-<sequence>-<time>`.
    /// With the sequence alone, new messages would look like old ones after the stream was created anew.
    pub id: String,
    /// The position of the message in the stream.
    pub(super) position: Position,
    /// The number of the delivery among all of the consumer.
    number: u64,
    subject: Subject,
    consumer: Arc<Consumer>,
    deliveries: Deliveries,
    /// When the consumer that handed it out was created.
    created: Option<i128>,
    /// How many deliveries we had received by then, including this one.
    received: u64,
    /// The last moment at which it was certainly not another relay's, and the connection at that time. By the
    /// wall clock, because no other clock advances while a laptop sleeps.
    ours_at: Mutex<(SystemTime, u64)>,
}

/// The position of a message in its stream. The sequence alone is not unique, because a restored stream
/// assigns it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) sequence: u64,
    /// When the stream stored it, in nanoseconds since 1970.
    pub(super) time: i128,
}

impl Position {
    fn stored(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.nanoseconds())
    }

    /// Returns its time in nanoseconds since 1970, which the server counts in 64 bits.
    fn nanoseconds(self) -> u64 {
        u64::try_from(self.time).unwrap_or_default()
    }
}

/// What we know about the deliveries to us; shared by all of them.
#[derive(Clone)]
pub(super) struct Deliveries(Arc<Mutex<Known>>);

struct Known {
    /// How many there were.
    received: u64,
    /// When the consumer was created, in nanoseconds since 1970.
    created: Option<i128>,
    /// Whether it may have been replaced by another one.
    is_doubtful: bool,
    /// The last moment at which no further delivery had been handed out.
    none_out_at: SystemTime,
}

impl Deliveries {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Known {
            received: 0,
            created: None,
            is_doubtful: false,
            none_out_at: SystemTime::UNIX_EPOCH,
        })))
    }

    /// Notes that nothing has been handed out to us, because we have not yet asked for anything.
    pub(super) fn begin(&self) {
        self.0.lock().none_out_at = SystemTime::now();
    }

    /// Notes that the consumer may have been deleted, and created anew.
    pub(super) fn doubt_consumer(&self) {
        self.0.lock().is_doubtful = true;
    }

    /// Notes which consumer the deliveries come from, from now on.
    pub(super) fn come_from(&self, consumer: &jetstream::consumer::Info) {
        let mut known = self.0.lock();
        known.created = Some(consumer.created.unix_timestamp_nanos());
        known.is_doubtful = false;
    }
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
    /// If no consumer has handed it out.
    pub(super) fn of(
        message: &Message,
        consumer: &Arc<Consumer>,
        deliveries: &Deliveries,
    ) -> anyhow::Result<(Self, u64)> {
        let subject = message
            .reply
            .clone()
            .context("a message came without an ack subject")?;
        // Only the reply matters, so payload and headers need not be copied.
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
            anyhow::anyhow!("an ack subject has an unknown format, {subject}: {error}")
        })?;
        let position = Position {
            sequence: info.stream_sequence,
            time: info.published.unix_timestamp_nanos(),
        };
        let number = info.consumer_sequence;
        let ack = Self::new(subject, position, number, consumer, deliveries);
        Ok((ack, info.pending))
    }

    /// Returns the ack of the last message that the consumer handed out, from the server's information about it.
    pub(super) fn of_last(
        position: Position,
        number: u64,
        consumer: &Arc<Consumer>,
        deliveries: &Deliveries,
    ) -> Self {
        let Consumer { stream, name, .. } = &**consumer;
        let sequence = position.sequence;
        let subject = format!("$JS.ACK.{stream}.{name}.1.{sequence}.{number}.0.0");
        Self::new(subject.into(), position, number, consumer, deliveries)
    }

    fn new(
        subject: Subject,
        position: Position,
        number: u64,
        consumer: &Arc<Consumer>,
        deliveries: &Deliveries,
    ) -> Self {
        let mut known = deliveries.0.lock();
        known.received += 1;
        Self {
            id: format!(
                "{}-{}-{}",
                consumer.stream,
                position.sequence,
                position.nanoseconds()
            ),
            position,
            number,
            subject,
            consumer: Arc::clone(consumer),
            deliveries: deliveries.clone(),
            created: known.created,
            received: known.received,
            ours_at: Mutex::new((known.none_out_at, consumer.connection.epoch())),
        }
    }

    /// Returns when the stream stored the message.
    pub fn stored(&self) -> SystemTime {
        self.position.stored()
    }

    /// Returns whether the consumer handed out the same message again right after `earlier`, without having been
    /// reset or created anew.
    pub(super) fn repeats(&self, earlier: &Self) -> bool {
        self.position == earlier.position
            && self.created == earlier.created
            && self.number == earlier.number + 1
    }

    /// Sends the ack until the server has confirmed it; returns whether it has.
    ///
    /// Returns early if the connection was lost, because the ack may have been lost with it. A server that was killed
    /// may have forgotten that it had handed the message out, and then never confirms; it hands the message out
    /// again. The same happens if the ack never reached the server.
    ///
    /// This is not async-nats's `double_ack`, because that one takes any answer for a confirmation, even the 503 of a
    /// server without the consumer.
    pub async fn confirm(&self, outcome: Outcome) -> bool {
        let connection = &self.consumer.connection;
        let text = match outcome {
            Outcome::Relayed => "+ACK",
            // Without a reason: whether one is understood depends on the stream's server, which need not be the
            // one that we are connected to.
            Outcome::GivenUp => "+TERM",
        };
        let (epoch, start, started_at) = (connection.epoch(), Instant::now(), SystemTime::now());
        loop {
            let answer =
                connection.ask(self.subject.clone(), HeaderMap::new(), text.into(), |_| {
                    Some(())
                });
            let answer = answer.await;
            if answer.is_ok() {
                // The next message is handed out only after this ack.
                self.deliveries.0.lock().none_out_at = started_at;
                return true;
            }
            if connection.epoch() != epoch {
                return false;
            }
            if start.elapsed() >= CONFIRM_WITHIN {
                let hint = match answer {
                    Err(NoAnswer::Nobody) => {
                        "; where JetStream is imported from another account, export and import the service \
                         $JS.ACK.> as well"
                    }
                    _ => "",
                };
                warn!(
                    "{} may be redelivered: NATS does not confirm its ack{hint}",
                    self.id
                );
                return false;
            }
            // Nobody confirms: the consumer has no leader at the moment.
            sleep(CONFIRM_AGAIN).await;
        }
    }

    /// Acknowledges a message that was handed out again although it had already been acknowledged.
    pub(super) async fn again(&self) {
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
        let is_doubtful = {
            let known = self.deliveries.0.lock();
            // The server hands out another one only if this one is no longer outstanding.
            known.is_doubtful || known.received != self.received
        };
        let now = (SystemTime::now(), self.consumer.connection.epoch());
        let (ours_at, epoch) = *self.ours_at.lock();
        let is_recent = ours_at.elapsed().is_ok_and(|age| age < MOMENT);
        // On an earlier connection an ack may have got through without its confirmation.
        if !is_doubtful && is_recent && epoch == now.1 {
            return Ok(true);
        }
        let info = self.consumer.info().await.map_err(|error| error.reason())?;
        if Some(info.created.unix_timestamp_nanos()) != self.created {
            return Ok(false);
        }
        let handed_out = info.delivered.consumer_sequence.checked_sub(self.number);
        let have_all = || handed_out == Some(self.deliveries.0.lock().received - self.received);
        if !have_all() {
            // The answer may have overtaken a delivery.
            sleep(UNDER_WAY).await;
            if !have_all() {
                return Ok(false);
            }
        }
        *self.ours_at.lock() = now;
        Ok(true)
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
}
