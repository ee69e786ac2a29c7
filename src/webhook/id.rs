//! By what a webhook knows a message, whatever the attempt.

use async_nats::{HeaderMap, header::NATS_MESSAGE_ID};
use reqwest::header::HeaderValue;

use crate::source::Delivery;

/// The `webhook-id` of a message, the same over retries: its `Nats-Msg-Id`, else its position in its
/// stream, else a random one.
#[must_use]
pub fn message_id(delivery: &Delivery) -> HeaderValue {
    let own = header(&delivery.headers, NATS_MESSAGE_ID.as_ref());
    let position = delivery.ack.as_ref().map(|ack| ack.id.as_str());
    let usable = own.into_iter().chain(position).find(|id| is_webhook_id(id));
    let random = || format!("msg_{:032x}", fastrand::u128(..));
    let id = usable.map_or_else(random, str::to_owned);
    // Never an error: all of these are visible ASCII.
    HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("msg"))
}

/// Whether `id` can be signed: the signed text is `id.timestamp.payload`, so that a dot in the id
/// would make it ambiguous (Standard Webhooks, "Signature scheme").
fn is_webhook_id(id: &str) -> bool {
    (1..=256).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic() && b != b'.')
}

/// The value of a message header, whatever the case of its name.
pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let name = name.as_bytes();
    headers
        .iter()
        .find(|(candidate, _)| AsRef::<[u8]>::as_ref(*candidate).eq_ignore_ascii_case(name))
        .and_then(|(_, values)| values.first())
        .map(async_nats::HeaderValue::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_cannot_be_signed_is_not_used() {
        for (id, good) in [
            ("msg_1-a", true),
            ("", false),
            ("a.b", false),
            ("a b", false),
            ("ä", false),
            (&"x".repeat(257), false),
        ] {
            assert_eq!(is_webhook_id(id), good, "{id:?}");
        }
    }
}
