//! Messages that the NATS client cannot read. NATS lets a publisher send any bytes as headers, and
//! nearly any as the subject. On headers that it cannot parse, the client drops the connection; on a lone
//! carriage return in a header value it panics (<https://github.com/nats-io/nats.rs/pull/1612>), as it did on a
//! subject that is not UTF-8 (<https://github.com/nats-io/nats.rs/pull/1573>). The server would then hand the
//! message out again and again, and hold up all others. So after each connect, before it asks for the next message,
//! the relay examines the message that is handed out but not acked, in its stored form.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_nats::jetstream::{consumer::Info, message::StreamMessage, stream::RawMessage};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{Ack, Consumer, Delivery};
use crate::nats::ApiError;

/// Asks for a message that does not exist, so that a missing permission to ask shows at once.
///
/// # Errors
/// If there is no answer.
pub(crate) async fn try_to_look(consumer: &Consumer) -> Result<(), ApiError> {
    match stored(consumer, json!({ "seq": u64::MAX })).await {
        Ok(_) | Err(ApiError::Refused(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Returns a message of the stream.
async fn stored(consumer: &Consumer, question: Value) -> Result<RawMessage, ApiError> {
    let request = format!("STREAM.MSG.GET.{}", consumer.stream);
    let mut answer = consumer.connection.request(&request, &question).await?;
    Ok(serde_json::from_value(answer["message"].take())?)
}

/// Returns how long the oldest unacked message has been in the stream, if there is one.
pub(crate) async fn oldest_age(consumer: &Consumer, info: &Info) -> Option<Duration> {
    let next = info.ack_floor.stream_sequence + 1;
    let question = json!({ "seq": next, "next_by_subj": consumer.config.prefix.wildcard() });
    let message = stored(consumer, question).await.ok()?;
    SystemTime::from(message.time).elapsed().ok()
}

/// Returns the message that is handed out but not acked, if it cannot be read.
pub(super) async fn find(consumer: &Arc<Consumer>) -> Option<Delivery> {
    let info = consumer.info().await.ok()?;
    if info.num_ack_pending == 0 {
        return None;
    }
    let sequence = info.delivered.stream_sequence;
    // It may not exist any more.
    let message = stored(consumer, json!({ "seq": sequence })).await.ok()?;
    let headers = message.headers.as_ref();
    let headers = headers.and_then(|headers| STANDARD.decode(headers).ok());
    let (subject, time) = (message.subject.clone(), message.time);
    let payload = STANDARD.decode(&message.payload).ok()?;
    let unrelayable = match StreamMessage::try_from(message) {
        // JSON replaces invalid UTF-8.
        _ if subject.contains(char::REPLACEMENT_CHARACTER) => "its subject is not UTF-8",
        Err(_) => "its headers cannot be read",
        Ok(_) if headers.as_deref().is_some_and(has_carriage_return) => {
            "its headers cannot be read"
        }
        // With headers, the client splits at more kinds of white space than the server.
        Ok(_) if headers.is_some() && subject.contains(char::is_whitespace) => {
            "its subject has white space"
        }
        Ok(_) => return None,
    };
    // The ack that the server would have sent.
    let (number, Consumer { stream, name, .. }) = (info.delivered.consumer_sequence, &**consumer);
    let time = time.unix_timestamp_nanos();
    let ack = format!("$JS.ACK.{stream}.{name}.1.{sequence}.{number}.{time}.0");
    let (ack, _) = Ack::of(ack.into(), consumer).ok()?;
    Some(Delivery {
        subject: subject.into(),
        headers: Default::default(),
        payload: payload.into(),
        ack: Some(Arc::new(ack)),
        unrelayable: Some(unrelayable),
    })
}

/// Returns whether a value has a carriage return in the middle once its lines are joined. The client joins them as they
/// are; `StreamMessage` trims each.
fn has_carriage_return(headers: &[u8]) -> bool {
    let mut value = String::new();
    String::from_utf8_lossy(headers).lines().any(|line| {
        match line.split_once(':') {
            Some((_, start)) if !line.starts_with(char::is_whitespace) => value = start.to_owned(),
            _ => value += line,
        }
        value.trim().contains('\r')
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_the_client_cannot_read_is_recognised() {
        for (headers, readable) in [
            (&b"NATS/1.0\r\n\r\n"[..], true),
            (b"NATS/1.0\r\nA: b\r\nC:d\r\n\r\n", true),
            (b"NATS/1.0\r\nA: b\r\n  c\r\n\r\n", true),
            (b"NATS/1.0 503\r\n\r\n", true),
            (b"NATS/1.0 404 No Messages\r\nA: b\r\n\r\n", true),
            (b"NATS/1.0\r\n\r\nA: b\r\n\r\n", true),
            (b"NATS/1.0 what\r\n\r\n", false),
            (b"NATS/1.0 099\r\n\r\n", false),
            (b"NATS/1.0 404\tNo\r\n\r\n", false),
            (b"NATS/1.0\r\n  c\r\n\r\n", false),
            (b"NATS/1.0\r\nA: b\r\n\r\n  c\r\n\r\n", false),
            (b"HTTP/1.1\r\n\r\n", false),
            (b"", false),
            (b"NATS/1.0\r\nno colon\r\n\r\n", false),
            (b"NATS/1.0\r\na name: x\r\n\r\n", false),
            (b"NATS/1.0\r\nA: \xff\r\n\r\n", false),
            (b"NATS/1.0\r\nA: b\rc\r\n\r\n", false),
            (b"NATS/1.0\r\nA: b\r\r\nB: \rc\r\n\r\n", true),
            (b"NATS/1.0\r\nA: b\r\r\n c\r\n\r\n", false),
            (b"NATS/1.0\r\nA: b\r\n \rc\r\n\r\n", false),
            (b"NATS/1.0\r\nA: b\r\n c\r\r\n d:\r\n\r\n", false),
        ] {
            let stored = json!({
                "subject": "x", "seq": 1, "time": "2026-01-01T00:00:00Z", "data": "",
                "hdrs": STANDARD.encode(headers),
            });
            let message: RawMessage = serde_json::from_value(stored).unwrap();
            assert_eq!(
                StreamMessage::try_from(message).is_ok() && !has_carriage_return(headers),
                readable,
                "{}",
                String::from_utf8_lossy(headers)
            );
        }
    }
}
