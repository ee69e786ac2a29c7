//! The buffer of core mode: waiting messages in the order in which they arrived, bounded in bytes.

use std::collections::VecDeque;

use async_nats::{HeaderMap, HeaderName, Message};
use bytes::Buf;

use super::Delivery;

/// The capacity in bytes, for subjects, headers and payloads, and the overhead of keeping them.
pub(super) const BUFFER_BYTES: usize = 64 * 1024 * 1024;

/// The overhead of a message in addition to its own bytes, in a queue that doubles whenever it is full.
/// It bounds the number of empty messages.
const MESSAGE_OVERHEAD: usize = 2 * size_of::<Waiting>();

/// The memory of an empty buffer is released once more than this was written into it; to release it after every few
/// messages would cost more than they do.
const KEPT_BYTES: usize = 64 * 1024;

/// Waiting messages.
#[derive(Default)]
pub(crate) struct Buffer {
    waiting: VecDeque<Waiting>,
    /// Their subjects, headers and payloads, one after the other.
    contents: VecDeque<u8>,
    /// The size of the messages with their overhead.
    bytes: usize,
    /// How much was written into `contents` since it was last empty: at most this much of it is in memory.
    written_bytes: usize,
}

/// The layout of a message in the contents.
struct Waiting {
    subject_bytes: usize,
    header_bytes: usize,
    payload_bytes: usize,
}

impl Buffer {
    /// Returns how many messages wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Returns the size of the messages with their overhead, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Keeps a message. Returns whether it fits; a single one always does.
    pub(crate) fn push(&mut self, message: Message) -> bool {
        let headers = encode(message.headers.unwrap_or_default());
        let waiting = Waiting {
            subject_bytes: message.subject.len(),
            header_bytes: headers.len(),
            payload_bytes: message.payload.len(),
        };
        let bytes = self.bytes + waiting.cost();
        if bytes > BUFFER_BYTES && !self.waiting.is_empty() {
            return false;
        }
        if self.contents.capacity() == 0 {
            // A single allocation: the system provides only the pages that are written to, and gets all of them
            // back after a burst. One allocation per message would cost more, and leave the heap as large as it
            // was during the burst.
            self.contents = VecDeque::with_capacity(BUFFER_BYTES);
        }
        self.contents.extend(message.subject.as_bytes());
        self.contents.extend(headers.as_bytes());
        self.contents.extend(&message.payload[..]);
        self.written_bytes += waiting.content_bytes();
        self.waiting.push_back(waiting);
        self.bytes = bytes;
        true
    }

    /// Returns the message that has waited longest.
    pub(crate) fn pop(&mut self) -> Option<Delivery> {
        let waiting = self.waiting.pop_front()?;
        self.bytes -= waiting.cost();
        let subject = self.contents.copy_to_bytes(waiting.subject_bytes);
        let headers = self.contents.copy_to_bytes(waiting.header_bytes);
        let payload = self.contents.copy_to_bytes(waiting.payload_bytes);
        if self.waiting.is_empty() {
            if self.written_bytes > KEPT_BYTES {
                *self = Self::default();
            }
            self.written_bytes = 0;
        }
        Some(Delivery {
            // Both were valid UTF-8 before, so nothing is lost.
            subject: String::from_utf8_lossy(&subject).as_ref().into(),
            headers: decode(&String::from_utf8_lossy(&headers)),
            payload,
            ack: None,
            unrelayable: None,
        })
    }
}

impl Waiting {
    fn content_bytes(&self) -> usize {
        self.subject_bytes + self.header_bytes + self.payload_bytes
    }

    /// Returns its size with its overhead, in bytes.
    fn cost(&self) -> usize {
        self.content_bytes() + MESSAGE_OVERHEAD
    }
}

/// Writes a line for each header, as on the wire (ADR-4), because a map would take several times the memory.
fn encode(headers: HeaderMap) -> String {
    let mut text = String::new();
    for (name, values) in headers.iter() {
        for value in values {
            text.extend([name.as_ref(), ":", value.as_str(), "\n"]);
        }
    }
    text
}

/// Parses what `encode` has written. No name contains a colon, and nothing contains a line break.
fn decode(text: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in text.lines().filter_map(|line| line.split_once(':')) {
        if let Ok(name) = name.parse::<HeaderName>() {
            headers.append(name, value);
        }
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn message(payload_bytes: usize) -> Message {
        let mut headers = HeaderMap::new();
        headers.append("a", "1");
        Message {
            subject: "s.t".into(),
            reply: None,
            payload: Bytes::from(vec![b'x'; payload_bytes]),
            headers: Some(headers),
            status: None,
            description: None,
            length: 0,
        }
    }

    /// The size of a message of [`message`] without its payload: subject, header, line break.
    const OTHER_BYTES: usize = "s.t".len() + "a:1\n".len();

    #[test]
    fn it_takes_what_fits_to_the_last_byte() {
        let mut buffer = Buffer::default();
        assert!(buffer.push(message(1000)));
        assert_eq!(buffer.bytes(), OTHER_BYTES + 1000 + MESSAGE_OVERHEAD);
        let room = BUFFER_BYTES - buffer.bytes() - OTHER_BYTES - MESSAGE_OVERHEAD;
        assert!(!buffer.push(message(room + 1)));
        assert!(buffer.push(message(room)));
        assert_eq!((buffer.len(), buffer.bytes()), (2, BUFFER_BYTES));
        assert!(!buffer.push(message(0)));
        assert!(
            buffer
                .pop()
                .is_some_and(|first| first.payload.len() == 1000)
        );
        assert!(buffer.push(message(1000)));
        assert!(
            buffer
                .pop()
                .is_some_and(|second| second.payload.len() == room)
        );
        assert!(buffer.pop().is_some());
        assert!(buffer.pop().is_none());
        assert_eq!((buffer.len(), buffer.bytes()), (0, 0));
        // A single one always does.
        assert!(buffer.push(message(BUFFER_BYTES)));
    }

    #[test]
    fn keeping_small_messages_takes_no_more_memory_than_they_count_for() {
        let mut buffer = Buffer::default();
        while buffer.push(message(1)) {
            assert!(buffer.waiting.capacity() * size_of::<Waiting>() < BUFFER_BYTES);
        }
    }

    #[test]
    fn its_memory_is_given_back_once_much_was_written_to_it() {
        let mut buffer = Buffer::default();
        for (payload_bytes, is_kept) in [
            (10, true),
            (KEPT_BYTES - OTHER_BYTES, true),
            (KEPT_BYTES - OTHER_BYTES + 1, false),
            (KEPT_BYTES - OTHER_BYTES, true),
        ] {
            assert!(buffer.push(message(payload_bytes)));
            assert!(buffer.pop().is_some());
            assert_eq!(buffer.contents.capacity() > 0, is_kept, "{payload_bytes}");
        }
    }

    #[test]
    fn headers_come_out_as_they_went_in() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("Nats-Msg-Id", "1"),
            ("X-Twice", "b"),
            ("X-Twice", "a: b"),
            ("X-Empty", ""),
            ("x-twice", "ä\t\u{85}\u{2028}"),
        ] {
            headers.append(name, value);
        }
        assert_eq!(decode(&encode(headers.clone())), headers);
        assert_eq!(decode(&encode(HeaderMap::new())), HeaderMap::new());
    }
}
