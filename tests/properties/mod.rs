//! The properties that the fuzzers check, whatever comes in: each function panics if one doesn't hold. This is a
//! module of the crate (`src/lib.rs`), because it calls what is private there; the tests compile it too, so that
//! it can't fall behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, UNIX_EPOCH};

use async_nats::{HeaderMap, HeaderName, HeaderValue, Message, StatusCode};

use crate::{
    config::{Config, Environment, VARIABLES, read_value},
    republish::{GivenUp, failed_headers, relayed_headers},
    source::{Delivery, Meaning},
    subject::Prefix,
    text,
    webhook::{Ids, parse_retry_after},
};

/// A line of a dotenv file is read, or refused without its text.
pub fn dotenv(file: &str) {
    // Whatever is long and unlike all our words is only said where it is quoted.
    if let Err(problem) = read_value(file) {
        assert!(!problem.contains("hunter2hunter2"), "{problem}");
    }
}

/// Any variables make a configuration, or one-line problems that show no secret.
pub fn configuration(settings: &[(u8, String)]) {
    let variables: Vec<_> = settings
        .iter()
        .map(|(index, value)| {
            let variable = &VARIABLES[usize::from(*index) % VARIABLES.len()];
            (variable.name, value.as_str())
        })
        // The system takes no other value, and a file may be anything.
        .filter(|(_, value)| !value.contains('\0') && !value.starts_with('/'))
        .collect();
    let environment: Environment = variables.iter().copied().collect();
    let shown = match Config::from_environment(&environment) {
        Ok(config) => format!("{config:?}"),
        Err(problems) => {
            assert!(!problems.is_empty());
            problems.join("\n")
        }
    };
    for variable in ["NATS_PASS", "NATS_TOKEN", "WEBHOOK_SECRET"] {
        let value = environment
            .text(variable)
            .ok()
            .flatten()
            .unwrap_or_default();
        // A shorter one may stand there by chance.
        let is_telling = value.len() > 20 && value.bytes().all(|b| b.is_ascii_alphanumeric());
        // The names of headers are shown in lower case.
        let is_elsewhere = variables.iter().any(|(name, other)| {
            *name != variable && other.to_lowercase().contains(&value.to_lowercase())
        });
        assert!(
            !is_telling || is_elsewhere || !shown.contains(&value),
            "{variable}: {shown}"
        );
    }
    let _ = environment.misnamed();
}

/// A subject below a prefix is rewritten and nothing else is; the relations of prefixes are symmetric.
pub fn subjects(prefix: &str, other: &str, subject: &str, stream: &str) {
    let (Ok(prefix), Ok(other)) = (prefix.parse::<Prefix>(), other.parse::<Prefix>()) else {
        return;
    };
    assert_eq!(prefix.overlaps(&other), other.overlaps(&prefix));
    assert!(prefix.overlaps(&prefix));
    if let Some(rewritten) = prefix.rewrite(subject, &other) {
        assert_eq!(other.rewrite(&rewritten, &prefix).as_deref(), Some(subject));
    }
    let below = format!("{prefix}.{subject}");
    let there = prefix
        .rewrite(&below, &other)
        .expect("it is below the prefix");
    assert_eq!(there, format!("{other}.{subject}"));
    // NATS allows `>` only at the end.
    let start = stream.trim_end_matches('>');
    if !start.contains(['*', '>']) && prefix.is_covered_by(stream) {
        assert!(prefix.wildcard().starts_with(start));
    }
    assert!(prefix.is_covered_by(&prefix.wildcard()));
    assert!(prefix.is_covered_by(">"));
}

/// Headers never make a message larger than the server takes it.
pub fn headers(lines: &[(String, String)], payload: &[u8], reason: &str, room: u16) {
    let mut headers = HeaderMap::new();
    for (name, value) in lines {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.parse::<HeaderValue>()) {
            headers.append(name, value);
        }
    }
    let delivery = Delivery::from(Message {
        headers: Some(headers),
        ..message("cms.cache.x", payload)
    });
    let ids = Ids::of(&delivery);
    assert!(ids.webhook.to_str().is_ok(), "it is visible ASCII");
    let id = &ids.message[..];
    let max_payload = payload.len() + usize::from(room);
    if let Ok(relayed) = relayed_headers(&delivery, id.to_owned(), max_payload) {
        assert!(wire_length(&relayed, &delivery) <= max_payload);
    }
    let given_up = GivenUp::unpublishable(reason.to_owned());
    let failed = failed_headers(&delivery, &given_up, id, max_payload);
    assert!(wire_length(&failed, &delivery) <= max_payload);
    for headers in [
        relayed_headers(&delivery, id.to_owned(), usize::MAX).unwrap(),
        failed,
    ] {
        for (name, values) in headers.iter() {
            let name: &str = name.as_ref();
            assert!(!name.to_lowercase().starts_with("nats-rollup"));
            assert!(
                values
                    .iter()
                    .all(|value| !value.as_str().contains(['\r', '\n']))
            );
        }
    }
    let line = text::one_line(reason, 40);
    assert!(line.len() <= 40 && line.lines().count() <= 1);
}

/// How long a message is on the wire, counted by writing it (NATS ADR-4).
fn wire_length(headers: &HeaderMap, delivery: &Delivery) -> usize {
    let mut wire = String::new();
    for (name, values) in headers.iter() {
        for value in values {
            wire += &format!("{name}: {value}\r\n");
        }
    }
    let frame = match wire.is_empty() {
        true => 0,
        false => "NATS/1.0\r\n\r\n".len(),
    };
    frame + wire.len() + delivery.payload.len()
}

/// No status that a publisher has put on a message makes it pass for the server's answer.
pub fn pull(subject: &str, reply: Option<String>, status: u16, description: &str) {
    let inbox = "_INBOX.x";
    let message = |subject: &str, reply: Option<String>| Message {
        reply: reply.map(Into::into),
        status: StatusCode::from_u16(status).ok(),
        description: Some(description.to_owned()),
        ..message(subject, b"")
    };
    let _ = Meaning::of(
        &message(&format!("{inbox}.{subject}"), reply.clone()),
        inbox,
        Some(7),
    );
    let _ = Meaning::of(&message(subject, reply), inbox, Some(7));
    let ack_subject = Some("$JS.ACK.CMS.relay.1.2.3.4.5".to_owned());
    let stored = message(&format!("cms.cache.{subject}"), ack_subject);
    assert_eq!(Meaning::of(&stored, inbox, Some(7)), Meaning::Delivery);
}

fn message(subject: &str, payload: &[u8]) -> Message {
    Message {
        subject: subject.into(),
        reply: None,
        payload: payload.to_vec().into(),
        headers: None,
        status: None,
        description: None,
        length: 0,
    }
}

/// Nobody makes the relay wait for longer than a minute.
pub fn retry_after(value: &str, now: u32) {
    let now = UNIX_EPOCH + Duration::from_secs(now.into());
    if let Some(wait) = parse_retry_after(value, now) {
        assert!(wait <= Duration::from_secs(60));
    }
}
