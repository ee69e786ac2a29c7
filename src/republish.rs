//! What is published: the relayed message, or the one given up.

use async_nats::{HeaderMap, header::NATS_MESSAGE_ID};

use crate::{
    source::{Delivery, Origin},
    status::Cause,
    subject::{LONGEST_SUBJECT, Prefix},
    text,
};

/// Why a message is given up.
#[derive(Debug)]
pub struct GivenUp {
    /// What happened last, without secrets.
    pub reason: String,
    /// The status of the last answer, if there was one.
    pub status: Option<u16>,
    /// How often it was tried.
    pub attempts: u32,
    /// For the metrics.
    pub cause: Cause,
}

impl GivenUp {
    /// For a message that can't be published, whatever a webhook says.
    #[must_use]
    pub fn unpublishable(reason: String) -> Self {
        Self {
            reason,
            status: None,
            attempts: 0,
            cause: Cause::NotPublished,
        }
    }

    /// One for all destinations that did not succeed; none if there is none.
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

/// The subject of a message below another prefix.
///
/// # Errors
/// With the reason, if there is none or NATS does not take it.
pub fn target_subject(delivery: &Delivery, prefix: &Prefix, to: &Prefix) -> Result<String, String> {
    let target = prefix
        .rewrite(&delivery.subject, to)
        .ok_or_else(|| format!("it is not below {prefix}"))?;
    if target.len() > LONGEST_SUBJECT {
        return Err(format!(
            "below {to} its subject has {} bytes, and NATS takes {LONGEST_SUBJECT}",
            target.len()
        ));
    }
    Ok(target)
}

/// The headers of the relayed message: its own. In durable mode without those that tell a stream
/// what to do, and with an id by which a stream behind the relayed prefix recognises a duplicate.
#[must_use]
pub fn relayed_headers(delivery: &Delivery, max_payload: usize) -> HeaderMap {
    let Origin::Stream { id, .. } = &delivery.origin else {
        return delivery.headers.clone();
    };
    let headers = carried_over(delivery);
    if headers.get(NATS_MESSAGE_ID).is_some() {
        return headers;
    }
    let mut with_id = headers.clone();
    with_id.insert(NATS_MESSAGE_ID, id.as_str());
    // It must never become a message that can't be relayed at all.
    if fits(&with_id, delivery, max_payload) {
        with_id
    } else {
        headers
    }
}

/// The headers of a message given up: its own, and why. The reason is cut short, and then all of
/// this left out, where the message would become larger than the server accepts.
#[must_use]
pub fn failed_headers(delivery: &Delivery, given_up: &GivenUp, max_payload: usize) -> HeaderMap {
    let GivenUp {
        reason,
        status,
        attempts,
        ..
    } = given_up;
    let own = carried_over(delivery);
    for length in [text::LONGEST_NOTE, 100, 20] {
        let mut headers = own.clone();
        headers.insert("Relay-Error", &*text::one_line(reason, length));
        headers.insert("Relay-Attempts", attempts.to_string());
        if let Some(status) = status {
            headers.insert("Relay-Status", status.to_string());
        }
        if fits(&headers, delivery, max_payload) {
            return headers;
        }
    }
    // Their publisher may have written them more tightly than the client does.
    if fits(&own, delivery, max_payload) {
        own
    } else {
        HeaderMap::new()
    }
}

/// The headers of a message, without those by which its publisher told its stream what to do: the
/// stream behind another prefix would refuse the message, or drop all others (ADR-4, ADR-22, ADR-43,
/// ADR-49, ADR-50, ADR-51).
fn carried_over(delivery: &Delivery) -> HeaderMap {
    if matches!(delivery.origin, Origin::Core)
        || !delivery
            .headers
            .iter()
            .any(|(name, _)| instructs(name.as_ref()))
    {
        return delivery.headers.clone();
    }
    let mut headers = HeaderMap::new();
    for (name, values) in delivery
        .headers
        .iter()
        .filter(|(name, _)| !instructs(name.as_ref()))
    {
        for value in values {
            headers.append(name.clone(), value.clone());
        }
    }
    headers
}

/// Whether a header tells a stream what to do.
fn instructs(name: &str) -> bool {
    ["Nats-Expected-", "Nats-Batch-", "Nats-Schedule"]
        .iter()
        .any(|start| name.starts_with(start))
        || ["Nats-Rollup", "Nats-TTL", "Nats-Incr"].contains(&name)
}

/// Whether the server accepts the payload with these headers: `NATS/1.0`, a line for each, and an
/// empty line (ADR-4).
fn fits(headers: &HeaderMap, delivery: &Delivery, max_payload: usize) -> bool {
    let mut length = delivery.payload.len() + "NATS/1.0\r\n\r\n".len();
    for (name, values) in headers.iter() {
        let name: &str = name.as_ref();
        for value in values {
            length += name.len() + value.as_str().len() + ": \r\n".len();
        }
    }
    length <= max_payload
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_to_a_stream_are_told_from_other_headers() {
        for (name, expected) in [
            ("Nats-Expected-Last-Sequence", true),
            ("Nats-Rollup", true),
            ("Nats-TTL", true),
            ("Nats-Incr", true),
            ("Nats-Batch-Id", true),
            ("Nats-Schedule-TTL", true),
            ("Nats-Msg-Id", false),
            ("Nats-Expected", false),
            ("X-Nats-TTL", false),
        ] {
            assert_eq!(instructs(name), expected, "{name}");
        }
    }
}
