//! What JetStream is told about a delivery, and what it confirms (NATS ADR-15, "Acknowledgements"): all
//! that knows how that is written. And whether the delivery is still ours.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use async_nats::{HeaderMap, Message, StatusCode, Subject, jetstream};
use log::warn;
use tokio::time::{Instant, sleep};

use super::Consumer;
use crate::lock::lock;

/// After this long the server is no longer asked to confirm.
const CONFIRM_WITHIN: Duration = Duration::from_secs(6);

/// When the server is asked once more.
const CONFIRM_AGAIN: Duration = Duration::from_millis(250);

/// For how long it goes without saying that a message is still ours.
const MOMENT: Duration = Duration::from_secs(1);

/// How long a delivery that the server tells of may be under way to us.
const UNDER_WAY: Duration = Duration::from_millis(250);

/// How a delivery of JetStream is acknowledged.
pub struct Ack {
    /// What the message is known by to a webhook and to the stream behind the relay:
    /// `<stream>-<sequence>-<time>`. The sequence alone would do until the stream is created anew, and
    /// then new messages would pass for old ones.
    pub id: String,
    /// Which message of the stream it is.
    pub(super) position: Position,
    /// Which of all deliveries of the consumer it is.
    number: u64,
    subject: Subject,
    consumer: Arc<Consumer>,
    deliveries: Deliveries,
    /// When the consumer was created that handed it out.
    created: Option<i128>,
    /// How many deliveries came to us before and with it.
    received: u64,
    /// The last moment at which it was certainly not another relay's, and the connection at that time. By the
    /// wall clock, because no other goes on while a laptop sleeps.
    ours_at: Mutex<(SystemTime, u64)>,
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
    fn stored(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.nanoseconds())
    }

    /// Returns its time in nanoseconds since 1970, which the server counts in 64 bits.
    fn nanoseconds(self) -> u64 {
        u64::try_from(self.time).unwrap_or_default()
    }
}

/// What is known of the deliveries to us; shared by all of them.
#[derive(Clone)]
pub(super) struct Deliveries(Arc<Mutex<Known>>);

struct Known {
    /// How many there were.
    received: u64,
    /// When the consumer was created, in nanoseconds since 1970.
    created: Option<i128>,
    /// Whether that may be another one by now.
    is_doubtful: bool,
    /// The last moment at which none of those to come had been handed out.
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

    /// Notes that nothing has been handed out to us, because we have not asked for anything yet.
    pub(super) fn begin(&self) {
        lock(&self.0).none_out_at = SystemTime::now();
    }

    /// Notes that the consumer may have been deleted, and created anew.
    pub(super) fn doubt_consumer(&self) {
        lock(&self.0).is_doubtful = true;
    }

    /// Notes which consumer hands out what comes from now on.
    pub(super) fn come_from(&self, consumer: &jetstream::consumer::Info) {
        let mut known = lock(&self.0);
        known.created = Some(consumer.created.unix_timestamp_nanos());
        known.is_doubtful = false;
    }
}

/// What has become of a message.
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
    /// If it was not handed out by a consumer.
    pub(super) fn of(
        message: &Message,
        consumer: &Arc<Consumer>,
        deliveries: &Deliveries,
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
        let number = info.consumer_sequence;
        let ack = Self::new(subject, position, number, consumer, deliveries);
        Ok((ack, info.pending))
    }

    /// Returns the ack of the message that the consumer handed out last, as the stream tells of it.
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
        let mut known = lock(&deliveries.0);
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

    /// Returns when the stream got the message.
    pub fn stored(&self) -> SystemTime {
        self.position.stored()
    }

    /// Returns whether the consumer has handed out the same message once more right after `earlier`, and not
    /// because an operator has had it begin anew.
    pub(super) fn repeats(&self, earlier: &Self) -> bool {
        self.position == earlier.position
            && self.created == earlier.created
            && self.number == earlier.number + 1
    }

    /// Tells the server what has become of the message, until it has confirmed that; returns whether it has.
    ///
    /// Returns early when the connection was lost meanwhile, because what was sent on it may be lost
    /// as well. A server that was killed may have forgotten that it had handed the message out, and never
    /// confirms; it then hands out the message again. So does one that a dead connection never reached.
    ///
    /// It is not async-nats's `double_ack`, which takes any answer for a confirmation, that of a server without
    /// the consumer (503) too.
    pub async fn confirm(&self, outcome: Outcome) -> bool {
        let connection = &self.consumer.connection;
        let text = match outcome {
            Outcome::Relayed => "+ACK",
            // Without a reason: whether one is understood depends on the server of the stream, which need
            // not be the one that we are connected to.
            Outcome::GivenUp => "+TERM",
        };
        let is_confirmation =
            |answer: &Message| Some(answer.status != Some(StatusCode::NO_RESPONDERS));
        let (epoch, start, started_at) = (connection.epoch(), Instant::now(), SystemTime::now());
        loop {
            let answer = connection.ask(
                self.subject.clone(),
                HeaderMap::new(),
                text.into(),
                is_confirmation,
            );
            let answer = answer.await;
            if matches!(answer, Ok(true)) {
                // The next message is handed out only after this ack.
                lock(&self.deliveries.0).none_out_at = started_at;
                return true;
            }
            if connection.epoch() != epoch {
                return false;
            }
            if start.elapsed() >= CONFIRM_WITHIN {
                let hint = match answer {
                    // Nobody listens to acks at all.
                    Ok(_) => {
                        "; where JetStream is imported from another account, export and import the service \
                         $JS.ACK.> as well"
                    }
                    Err(_) => "",
                };
                warn!(
                    "{} may come again: NATS does not confirm its ack{hint}",
                    self.id
                );
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

    /// Tells the server something that it need not confirm. A client that has crashed does not send it, and
    /// then the server hands the message out again.
    async fn tell(&self, text: &'static str) {
        let client = self.consumer.connection.client();
        let _ = client.publish(self.subject.clone(), text.into()).await;
    }

    /// Returns whether the message is still ours: not once the server has handed out it, or one that follows
    /// it, to another relay. It does so where this relay was suspended, where the message has left the
    /// stream, as by a limit, which makes room for the next one, and where an operator has reset the consumer
    /// or created it anew.
    ///
    /// The server hands out one message at a time, so a message is ours exactly as long as all that the
    /// consumer has handed out since came to us as well. It is asked for that, but not more than once a second.
    ///
    /// # Errors
    /// If nobody can tell just now, with the reason.
    pub(super) async fn is_ours(&self) -> Result<bool, String> {
        let is_doubtful = {
            let known = lock(&self.deliveries.0);
            // The server hands out another one only where this one is out no more.
            known.is_doubtful || known.received != self.received
        };
        let now = (SystemTime::now(), self.consumer.connection.epoch());
        let (ours_at, epoch) = *lock(&self.ours_at);
        let is_recent = ours_at.elapsed().is_ok_and(|age| age < MOMENT);
        // An ack may have got through on an earlier connection, and its confirmation may not.
        if !is_doubtful && is_recent && epoch == now.1 {
            return Ok(true);
        }
        let info = self.consumer.info().await.map_err(|error| error.reason())?;
        if Some(info.created.unix_timestamp_nanos()) != self.created {
            return Ok(false);
        }
        let handed_out = info.delivered.consumer_sequence.checked_sub(self.number);
        let have_all = || handed_out == Some(lock(&self.deliveries.0).received - self.received);
        if !have_all() {
            // The answer may have overtaken a delivery to us.
            sleep(UNDER_WAY).await;
            if !have_all() {
                return Ok(false);
            }
        }
        *lock(&self.ours_at) = now;
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
