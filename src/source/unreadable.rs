//! Messages that the NATS client cannot read. NATS lets a publisher send any bytes as headers, and
//! nearly any as the subject; the client drops the connection on such a message, or ends. The server would then hand it
//! out again, for ever, and hold up all that follow. So, with a new connection, the message that is out
//! and not acked is looked at before the next one is asked for, in the form in which it is stored.

use async_nats::jetstream::{context::RequestError, stream::RawMessage};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{Consumer, Delivery, Origin, Receipt};

/// Asks for a message that is not there, so that a missing permission to ask shows at once.
///
/// # Errors
/// If there is no answer.
pub(crate) async fn try_to_look(consumer: &Consumer) -> Result<(), RequestError> {
    ask(consumer, u64::MAX).await.map(drop)
}

/// The server's answer to the question for the message of this sequence: the message, or an error.
async fn ask(consumer: &Consumer, sequence: u64) -> Result<Value, RequestError> {
    let subject = format!("STREAM.MSG.GET.{}", consumer.stream);
    let question = json!({ "seq": sequence });
    consumer
        .connection
        .jetstream()
        .request(subject, &question)
        .await
}

/// The message that is out and not acked, if it cannot be read.
pub(super) async fn find(consumer: &Consumer) -> Option<(Delivery, Receipt)> {
    let context = consumer.connection.jetstream();
    let stream = context.get_stream_no_info(&consumer.stream).await.ok()?;
    let info = stream.consumer_info(&consumer.name).await.ok()?;
    if info.num_ack_pending == 0 {
        return None;
    }
    let sequence = info.delivered.stream_sequence;
    let mut answer = ask(consumer, sequence).await.ok()?;
    // An error instead, where it is not there any more.
    let message: RawMessage = serde_json::from_value(answer.get_mut("message")?.take()).ok()?;
    let headers = message.headers.map(|headers| STANDARD.decode(headers));
    let fault = match headers.transpose().ok()? {
        // What JSON makes of it.
        _ if message.subject.contains(char::REPLACEMENT_CHARACTER) => "its subject is not UTF-8",
        Some(headers) if !is_readable(&headers) => "its headers cannot be read",
        // In front of headers the client takes more for white space than the server does.
        Some(_) if message.subject.contains(char::is_whitespace) => "its subject has white space",
        _ => return None,
    };
    let receipt = Receipt {
        ack: format!(
            "$JS.ACK.{}.{}.1.{sequence}.{}.0.0",
            consumer.stream, consumer.name, info.delivered.consumer_sequence
        )
        .into(),
        sequence,
        time: message.time.unix_timestamp_nanos().try_into().ok()?,
    };
    let delivery = Delivery {
        subject: message.subject.into(),
        headers: Default::default(),
        payload: STANDARD.decode(message.payload).ok()?.into(),
        origin: Origin::Stream {
            id: receipt.id(&consumer.stream),
            receipt: receipt.clone(),
        },
        fault: Some(fault),
    };
    Some((delivery, receipt))
}

/// Whether the NATS client can read headers: `NATS/1.0`, maybe a status, then a `Name: value` on each
/// line (ADR-4), all of it UTF-8, and no carriage return on its own.
fn is_readable(headers: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(headers) else {
        return false;
    };
    let mut lines = text.lines();
    let Some(status) = lines.next().and_then(|line| line.strip_prefix("NATS/1.0")) else {
        return false;
    };
    let code = status.trim().split(' ').next().unwrap_or_default();
    let is_code = code.len() == 3 && code.bytes().all(|b| b.is_ascii_digit());
    if !code.is_empty() && (!is_code || code.starts_with('0')) {
        return false;
    }
    let mut follows_header = false;
    lines.all(|line| {
        let continues = follows_header && line.starts_with(char::is_whitespace);
        follows_header = !line.is_empty();
        let name_is_good = line
            .split_once(':')
            .is_some_and(|(name, _)| name.bytes().all(|b| b.is_ascii_graphic()));
        (line.is_empty() || continues || name_is_good) && !line.contains('\r')
    })
}

#[cfg(test)]
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
        ] {
            assert_eq!(
                is_readable(headers),
                readable,
                "{}",
                String::from_utf8_lossy(headers)
            );
        }
    }
}
