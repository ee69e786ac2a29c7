//! The subject and headers of a published message, relayed or failed.

use async_nats::{HeaderMap, header::NATS_MESSAGE_ID};

use crate::{
    monitor::Cause,
    source::Delivery,
    subject::{LONGEST_SUBJECT, Prefix},
    text,
};

/// Why the relay gives up on a message.
#[derive(Debug)]
pub struct GivenUp {
    /// The last failure, without secrets.
    pub reason: String,
    /// The status of the last response, if there was one.
    pub status: Option<u16>,
    /// The number of attempts.
    pub attempts: u32,
    /// The kind of failure, for the metrics.
    pub cause: Cause,
}

/// Why a message is not relayed.
#[derive(Debug)]
pub enum Unrelayed {
    /// The relay gives up on it.
    GivenUp(GivenUp),
    /// Another relay has it.
    Abandoned,
}

impl From<GivenUp> for Unrelayed {
    fn from(given_up: GivenUp) -> Self {
        Self::GivenUp(given_up)
    }
}

impl GivenUp {
    /// Returns the failure of a message that can't be published, regardless of its webhook.
    #[must_use]
    pub fn unpublishable(reason: String) -> Self {
        Self {
            reason,
            status: None,
            attempts: 0,
            cause: Cause::NotPublished,
        }
    }

    /// Combines the failures of several destinations into one; `None` if there are none.
    #[must_use]
    pub fn all(failures: Vec<Self>) -> Option<Self> {
        failures.into_iter().reduce(|all, next| Self {
            reason: format!("{}; {}", all.reason, next.reason),
            status: all.status.or(next.status),
            attempts: all.attempts.max(next.attempts),
            cause: all.cause,
        })
    }
}

/// Returns the subject of a message below another prefix.
///
/// # Errors
/// With the reason, if it has none or NATS does not accept it.
pub fn relayed_subject(
    delivery: &Delivery,
    prefix: &Prefix,
    to: &Prefix,
) -> Result<String, String> {
    let subject = prefix
        .rewrite(&delivery.subject, to)
        .ok_or_else(|| format!("it is not below {prefix}"))?;
    if subject.len() > LONGEST_SUBJECT {
        return Err(format!(
            "below {to} its subject has {} bytes, and NATS accepts only {LONGEST_SUBJECT}",
            subject.len()
        ));
    }
    Ok(subject)
}

/// How many bytes of headers a stream stores with a message.
const LONGEST_HEADERS: usize = u16::MAX as usize;

/// Returns the headers of the relayed message: its own and, if it fits, `id`, by which a stream recognizes a
/// duplicate. The added header must never make a message too large to relay, or to store.
///
/// # Errors
/// With the reason, if not even its own headers fit because their publisher has written them more compactly than
/// the client does.
pub fn relayed_headers(
    delivery: &Delivery,
    id: String,
    max_payload: usize,
) -> Result<HeaderMap, String> {
    let mut headers = carried_over(delivery);
    let own_length = length(&headers, delivery);
    if own_length > max_payload {
        let what = match delivery.payload.len() > max_payload {
            true => "its payload has",
            false => "with its headers it has",
        };
        return Err(format!(
            "{what} more than the {max_payload} bytes that NATS accepts"
        ));
    }
    headers.insert(NATS_MESSAGE_ID, id);
    match fits(&headers, own_length, delivery, max_payload) {
        true => Ok(headers),
        false => Ok(carried_over(delivery)),
    }
}

/// Returns the headers of a failed message: its own, its id, and the reason. If the message would become
/// larger than the server accepts, the id is left out and the reason shortened, and then more is left out.
#[must_use]
pub fn failed_headers(
    delivery: &Delivery,
    given_up: &GivenUp,
    id: &str,
    max_payload: usize,
) -> HeaderMap {
    let own = carried_over(delivery);
    let with_reason = |length| {
        let mut headers = own.clone();
        headers.insert(RELAY_ERROR, &*text::one_line(&given_up.reason, length));
        headers.insert(RELAY_ATTEMPTS, given_up.attempts.to_string());
        if let Some(status) = given_up.status {
            headers.insert(RELAY_STATUS, status.to_string());
        }
        headers
    };
    let mut all = with_reason(text::LONGEST_NOTE);
    all.insert(NATS_MESSAGE_ID, id);
    // The publisher may have written its own more compactly than the client does.
    [all, with_reason(20), own.clone()]
        .into_iter()
        .find(|headers| fits(headers, length(&own, delivery), delivery, max_payload))
        .unwrap_or_default()
}

/// Returns whether a message with these headers, some of them added to its own, can be published, and stored if it can
/// be stored without the added ones. Without them it has `own_length` bytes.
fn fits(headers: &HeaderMap, own_length: usize, delivery: &Delivery, max_payload: usize) -> bool {
    let length = length(headers, delivery);
    let is_storable = |length| length - delivery.payload.len() <= LONGEST_HEADERS;
    length <= max_payload && (is_storable(length) || !is_storable(own_length))
}

/// Returns the headers of a message without those that instruct a stream or describe one: the stream behind another
/// prefix would refuse the message, drop all others, or treat it as a message from one of its own sources.
fn carried_over(delivery: &Delivery) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in delivery.headers.iter() {
        if !is_shed(name.as_ref()) {
            for value in values {
                headers.append(name.clone(), value.clone());
            }
        }
    }
    headers
}

/// Headers that say why a relay gave up on a message, which may have been published again since.
const RELAY_ERROR: &str = "Relay-Error";
const RELAY_STATUS: &str = "Relay-Status";
const RELAY_ATTEMPTS: &str = "Relay-Attempts";

/// Returns whether a header is not carried over, regardless of case: those of an earlier failure, and all that NATS
/// itself reads or writes (ADR-4, ADR-28, ADR-31, ADR-41, ADR-43, ADR-44, ADR-49, ADR-50, ADR-51).
fn is_shed(name: &str) -> bool {
    let start = name.get(.."Nats-".len());
    start.is_some_and(|start| start.eq_ignore_ascii_case("Nats-"))
        || [RELAY_ERROR, RELAY_STATUS, RELAY_ATTEMPTS]
            .iter()
            .any(|shed| name.eq_ignore_ascii_case(shed))
}

/// Returns the size of a message with these headers, as the server counts it. They are written as `NATS/1.0`, a line
/// for each, and an empty line (ADR-4), or not at all if there are none.
fn length(headers: &HeaderMap, delivery: &Delivery) -> usize {
    let mut length = delivery.payload.len();
    if !headers.is_empty() {
        length += "NATS/1.0\r\n\r\n".len();
    }
    for (name, values) in headers.iter() {
        let name: &str = name.as_ref();
        for value in values {
            length += name.len() + value.as_str().len() + ": \r\n".len();
        }
    }
    length
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_may_be_as_long_as_nats_accepts() {
        let (from, to): (Prefix, Prefix) = ("a".parse().unwrap(), "relayed".parse().unwrap());
        let relayed = |length| {
            let rest = "x".repeat(length - "relayed.".len());
            let message = Delivery {
                subject: format!("a.{rest}").into(),
                headers: HeaderMap::new(),
                payload: Default::default(),
                ack: None,
                unrelayable: None,
            };
            relayed_subject(&message, &from, &to)
        };
        assert_eq!(relayed(LONGEST_SUBJECT).unwrap().len(), LONGEST_SUBJECT);
        let reason = relayed(LONGEST_SUBJECT + 1).unwrap_err();
        assert!(
            reason.starts_with("below relayed its subject has "),
            "{reason}"
        );
    }

    #[test]
    fn headers_that_instruct_or_describe_a_stream_are_told_from_others() {
        for (name, expected) in [
            ("Nats-Expected-Last-Sequence", true),
            ("nats-ttl", true),
            ("RELAY-ERROR", true),
            ("X-Nats-TTL", false),
            ("Relay-Race", false),
            ("Nats", false),
            ("\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}", false),
        ] {
            assert_eq!(is_shed(name), expected, "{name}");
        }
    }
}
