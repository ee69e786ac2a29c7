//! The ids of a message, the same on every attempt.

use std::borrow::Cow;

use async_nats::{HeaderMap, header::NATS_MESSAGE_ID};
use reqwest::header::HeaderValue;

use crate::source::Delivery;

/// The longest `webhook-id`.
const LONGEST_ID: usize = 256;

/// The ids of a message.
pub struct Ids<'a> {
    /// Its `Nats-Msg-Id`, else its position in its stream, else a random one.
    pub message: Cow<'a, str>,
    /// The same if it is a valid Standard Webhooks id, else its position, else a random one.
    pub webhook: HeaderValue,
}

impl<'a> Ids<'a> {
    /// Returns the ids of this message.
    #[must_use]
    pub fn of(delivery: &'a Delivery) -> Self {
        let own = header(&delivery.headers, NATS_MESSAGE_ID.as_ref()).filter(|id| !id.is_empty());
        let other = match &delivery.ack {
            Some(ack) => Cow::from(&ack.id),
            None => Cow::from(format!("msg_{:032x}", fastrand::u128(..))),
        };
        let webhook = match [own, Some(&*other)]
            .into_iter()
            .flatten()
            .find(|id| is_webhook_id(id))
        {
            Some(id) => HeaderValue::try_from(id),
            None => HeaderValue::try_from(into_webhook_id(&other)),
        };
        Self {
            message: own.map_or(other, Cow::from),
            // This never fails, because all of these are visible ASCII.
            webhook: webhook.unwrap_or(HeaderValue::from_static("msg")),
        }
    }
}

/// Returns whether `id` can be signed: the signed text is `id.timestamp.payload`, so that a dot in the id
/// would make it ambiguous (Standard Webhooks, "Signature scheme").
fn is_webhook_id(id: &str) -> bool {
    (1..=LONGEST_ID).contains(&id.len()) && id.chars().all(can_be_signed)
}

fn can_be_signed(character: char) -> bool {
    character.is_ascii_graphic() && character != '.'
}

/// Turns a position into an id that can be signed: a stream's name may have any characters, and be long.
fn into_webhook_id(place: &str) -> String {
    let sign = |character| {
        if can_be_signed(character) {
            character
        } else {
            '_'
        }
    };
    let id: String = place.chars().map(sign).collect();
    id[id.len().saturating_sub(LONGEST_ID)..].to_owned()
}

/// Returns the value of a message header, regardless of the case of its name.
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

    #[test]
    fn any_place_becomes_an_id_that_can_be_signed() {
        let long = format!("{}-1-2", "\u{e9}".repeat(300));
        for (place, expected) in [
            ("CMS-1-2", "CMS-1-2"),
            ("st\u{fc}ck-1-2", "st_ck-1-2"),
            (&long, &format!("{}-1-2", "_".repeat(LONGEST_ID - 4))),
        ] {
            let id = into_webhook_id(place);
            assert_eq!(id, expected);
            assert!(is_webhook_id(&id), "{id}");
        }
    }
}
