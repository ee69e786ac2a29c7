//! The buffer of core mode: messages that wait, in the order in which they came; bounded in bytes.

use std::collections::VecDeque;

use async_nats::{HeaderMap, Message};
use bytes::Buf;

use super::{Delivery, Origin};

/// How much may wait: subjects, headers and payloads, and what it costs to keep them.
pub(super) const BUFFER_BYTES: usize = 64 * 1024 * 1024;

/// What keeping a message costs beside its own bytes, in a queue that doubles whenever it is full.
/// It bounds the number of empty ones.
const MESSAGE_OVERHEAD: usize = 2 * size_of::<Waiting>();

/// What keeping a header costs beside its own bytes.
const HEADER_OVERHEAD: usize = 128;

/// Empty contents are given back once more than this was written into them; to do so after every few
/// messages would cost more than they do.
const KEPT_BYTES: usize = 64 * 1024;

/// Messages that wait.
#[derive(Default)]
pub(super) struct Buffer {
    waiting: VecDeque<Waiting>,
    /// Their subjects and payloads, one after the other.
    contents: VecDeque<u8>,
    /// What the messages cost.
    bytes: usize,
    /// How much was written into `contents` since it was empty last: at the most so much of it is in
    /// memory.
    written_bytes: usize,
}

/// What is kept of a message beside its subject and its payload.
struct Waiting {
    subject_bytes: usize,
    payload_bytes: usize,
    headers: Option<Box<HeaderMap>>,
}

impl Buffer {
    /// How many messages wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// What they cost, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Keeps a message; whether it fits. A single one always does.
    pub(super) fn push(&mut self, message: Message) -> bool {
        let waiting = Waiting {
            subject_bytes: message.subject.len(),
            payload_bytes: message.payload.len(),
            headers: message.headers.map(Box::new),
        };
        let bytes = self.bytes + waiting.cost();
        if bytes > BUFFER_BYTES && !self.waiting.is_empty() {
            return false;
        }
        if self.contents.capacity() == 0 {
            // One allocation, of which the system provides only what is written to, and gets back all
            // after a burst. One for each message would cost more, and leave the heap as large as it
            // was during the burst.
            self.contents = VecDeque::with_capacity(BUFFER_BYTES);
        }
        self.contents.extend(message.subject.as_bytes());
        self.contents.extend(&message.payload[..]);
        self.written_bytes += waiting.subject_bytes + waiting.payload_bytes;
        self.waiting.push_back(waiting);
        self.bytes = bytes;
        true
    }

    /// The message that has waited longest.
    pub(super) fn pop(&mut self) -> Option<Delivery> {
        let waiting = self.waiting.pop_front()?;
        self.bytes -= waiting.cost();
        let subject = self.contents.copy_to_bytes(waiting.subject_bytes);
        let payload = self.contents.copy_to_bytes(waiting.payload_bytes);
        if self.waiting.is_empty() {
            if self.written_bytes > KEPT_BYTES {
                *self = Self::default();
            }
            self.written_bytes = 0;
        }
        Some(Delivery {
            // It was a subject before, so nothing is lost.
            subject: String::from_utf8_lossy(&subject).as_ref().into(),
            headers: waiting.headers.map(|headers| *headers).unwrap_or_default(),
            payload,
            origin: Origin::Core,
            fault: None,
        })
    }
}

impl Waiting {
    /// What it counts in the buffer, in bytes.
    fn cost(&self) -> usize {
        let headers = self.headers.iter().flat_map(|headers| headers.iter());
        let headers = headers.map(|(name, values)| {
            let values = values
                .iter()
                .map(|value| value.as_str().len() + HEADER_OVERHEAD);
            AsRef::<[u8]>::as_ref(name).len() + values.sum::<usize>()
        });
        self.subject_bytes + self.payload_bytes + headers.sum::<usize>() + MESSAGE_OVERHEAD
    }
}
