//! Core NATS: at most once. Messages that arrive while a webhook is slow wait in a bounded buffer.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use async_nats::Subscriber;
use bytes::Bytes;
use futures::FutureExt;
use log::error;
use tokio::time::{Instant, sleep_until};

use super::{Delivery, next_of};
use crate::{
    monitor::Monitor,
    nats::{Connection, ConnectionEvents},
    text::count,
};

/// The capacity of the buffer in bytes, for subjects, headers and payloads, and the overhead of keeping them.
const BUFFER_BYTES: usize = 64 * 1024 * 1024;

/// The overhead of a message in addition to its own bytes, in a queue that doubles whenever it is full. It bounds the
/// number of empty messages.
const MESSAGE_OVERHEAD: usize = 2 * size_of::<Delivery>() + 64;

/// The overhead of a header value in addition to its own bytes: most of it is for the map.
const HEADER_OVERHEAD: usize = 256;

/// Drops are reported at most this often.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// A core subscription with its buffer.
pub struct Core {
    connection: Connection,
    events: ConnectionEvents,
    subject: String,
    queue_group: Option<String>,
    subscriber: Option<Subscriber>,
    /// Whether we have ended the subscription.
    is_stopped: bool,
    waiting: Buffer,
    /// How many messages did not fit into the buffer.
    dropped: u64,
    /// How many of these the log has reported.
    reported: u64,
    next_report: Instant,
    monitor: Arc<Monitor>,
}

impl Core {
    pub(super) fn new(
        connection: Connection,
        events: ConnectionEvents,
        subject: String,
        queue_group: Option<String>,
        monitor: Arc<Monitor>,
    ) -> Self {
        Self {
            connection,
            events,
            subject,
            queue_group,
            subscriber: None,
            is_stopped: false,
            waiting: Buffer::default(),
            dropped: 0,
            reported: 0,
            next_report: Instant::now(),
            monitor,
        }
    }

    pub(super) async fn open(&mut self) -> anyhow::Result<()> {
        let (client, subject) = (self.connection.client(), self.subject.clone());
        let subscriber = match self.queue_group.clone() {
            Some(group) => client.queue_subscribe(subject, group).await,
            None => client.subscribe(subject).await,
        };
        // It fails only if the client has crashed, which the events report.
        self.subscriber = subscriber.ok();
        self.events.confirm(&self.connection).await
    }

    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Delivery>> {
        loop {
            if let Some(delivery) = self.waiting.pop() {
                self.show_waiting();
                return Ok(Some(delivery));
            }
            if self.is_stopped && self.subscriber.is_none() {
                return Ok(None);
            }
            // If nothing waits, a message bypasses the buffer.
            if let Some(delivery) = self.step().await? {
                return Ok(Some(delivery));
            }
        }
    }

    /// Unsubscribes, so that the other members of the queue group get further messages. Returns how many messages wait.
    pub(super) async fn stop(&mut self) -> u64 {
        self.is_stopped = true;
        let is_connected = self.connection.is_up();
        if let Some(subscriber) = &mut self.subscriber {
            // Messages in flight still arrive; without a connection there are none.
            if !is_connected || subscriber.drain().await.is_err() {
                self.end_subscription();
            }
        }
        self.waiting.queue.len() as u64
    }

    /// Takes the messages that have already arrived, and no more.
    fn end_subscription(&mut self) {
        while let Some(Some(message)) = next_of(&mut self.subscriber).now_or_never() {
            self.take(message.into());
        }
        self.subscriber = None;
    }

    pub(super) async fn attend(&mut self) -> anyhow::Error {
        loop {
            match self.step().await {
                Ok(Some(delivery)) => self.take(delivery),
                Ok(None) => {}
                Err(reason) => return reason,
            }
        }
    }

    /// Receives a message, or handles another event if one comes first.
    async fn step(&mut self) -> anyhow::Result<Option<Delivery>> {
        tokio::select! {
            biased;
            connected = self.events.next() => connected?,
            message = next_of(&mut self.subscriber) => match message {
                Some(message) => return Ok(Some(message.into())),
                // We have ended it, or the client has crashed, which will be noticed in a moment.
                None => self.subscriber = None,
            },
            () = sleep_until(self.next_report), if self.dropped > self.reported => self.report(),
        }
        Ok(None)
    }

    fn show_waiting(&self) {
        let Buffer { queue, bytes } = &self.waiting;
        self.monitor.set_waiting(queue.len() as u64, *bytes);
    }

    /// Takes a message into the buffer, if it fits.
    fn take(&mut self, delivery: Delivery) {
        if self.waiting.push(delivery) {
            self.show_waiting();
        } else {
            self.monitor.metrics.dropped.inc();
            self.dropped += 1;
        }
    }

    /// Reports the messages that were dropped since the last report.
    fn report(&mut self) {
        error!(
            "dropped {}, {} since the start: they arrive faster than the webhook accepts them, and {} MiB are \
             already waiting; use NATS_STREAM to keep such messages",
            count(self.dropped - self.reported, "message"),
            self.dropped,
            BUFFER_BYTES / (1024 * 1024)
        );
        self.reported = self.dropped;
        self.next_report = Instant::now() + REPORT_EVERY;
    }

    pub(super) fn close(mut self) {
        self.end_subscription();
        if self.dropped > self.reported {
            self.report();
        }
        let waiting = self.waiting.queue.len() as u64;
        if waiting > 0 {
            self.monitor.metrics.dropped.inc_by(waiting);
            error!(
                "lost {} not yet relayed, because core mode does not keep them; NATS_STREAM would",
                count(waiting, "message")
            );
        }
    }
}

/// Waiting messages in the order in which they arrived, bounded in bytes.
#[derive(Default)]
struct Buffer {
    queue: VecDeque<Delivery>,
    /// The size of the messages with their overhead.
    bytes: usize,
}

impl Buffer {
    /// Keeps a message. Returns whether it fits; a single one always does.
    fn push(&mut self, mut delivery: Delivery) -> bool {
        let bytes = self.bytes + cost(&delivery);
        if bytes > BUFFER_BYTES && !self.queue.is_empty() {
            return false;
        }
        // Its payload shares a larger piece of memory with messages that may be dropped.
        delivery.payload = Bytes::copy_from_slice(&delivery.payload);
        self.queue.push_back(delivery);
        self.bytes = bytes;
        true
    }

    /// Returns the message that has waited longest.
    fn pop(&mut self) -> Option<Delivery> {
        let delivery = self.queue.pop_front()?;
        self.bytes -= cost(&delivery);
        if self.queue.is_empty() {
            // The memory of a burst is not needed any more.
            self.queue.shrink_to(1024);
        }
        Some(delivery)
    }
}

/// Estimates the memory that a waiting message takes.
fn cost(delivery: &Delivery) -> usize {
    let mut bytes = MESSAGE_OVERHEAD + delivery.subject.len() + delivery.payload.len();
    for (name, values) in delivery.headers.iter() {
        let name: &str = name.as_ref();
        for value in values {
            bytes += HEADER_OVERHEAD + name.len() + value.as_str().len();
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_nats::HeaderMap;

    fn message(payload_bytes: usize) -> Delivery {
        let mut headers = HeaderMap::new();
        headers.append("a", "1");
        Delivery {
            subject: "s.t".into(),
            headers,
            payload: Bytes::from(vec![b'x'; payload_bytes]),
            ack: None,
            unrelayable: None,
        }
    }

    #[test]
    fn the_buffer_takes_what_fits_to_the_last_byte() {
        let mut buffer = Buffer::default();
        let others = cost(&message(0));
        assert!(buffer.push(message(1000)));
        assert_eq!(buffer.bytes, others + 1000);
        let room = BUFFER_BYTES - buffer.bytes - others;
        assert!(!buffer.push(message(room + 1)));
        assert!(buffer.push(message(room)));
        assert_eq!((buffer.queue.len(), buffer.bytes), (2, BUFFER_BYTES));
        assert!(!buffer.push(message(0)));
        let payload_bytes = |delivery: Option<Delivery>| delivery.map(|it| it.payload.len());
        assert_eq!(payload_bytes(buffer.pop()), Some(1000));
        assert!(buffer.push(message(1000)));
        assert_eq!(payload_bytes(buffer.pop()), Some(room));
        assert_eq!(payload_bytes(buffer.pop()), Some(1000));
        assert_eq!(payload_bytes(buffer.pop()), None);
        assert_eq!(buffer.bytes, 0);
        // A single one always does.
        assert!(buffer.push(message(BUFFER_BYTES)));
    }
}
