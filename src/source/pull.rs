//! Interprets the messages that the server sends in answer to a pull request.
//!
//! NATS ADR-13 describes the answers, but not all of them; the table in the tests has every one that
//! nats-server 2.9 to 2.15 can send, as found in its source.

use async_nats::{Message, StatusCode};

/// The meaning of a message from the server.
#[derive(Debug, PartialEq)]
pub(crate) enum Meaning {
    /// It is a message of the stream.
    Delivery,
    /// A pull request is still with the server.
    Heartbeat,
    /// The current request has expired, as it regularly does; the next one may follow at once.
    Ended,
    /// The current request was refused, or has ended early, for this reason. The same may happen to the
    /// next one at once, so that one has to wait until the consumer has been verified.
    Failed(String),
    /// The consumer can never answer such requests, for this reason.
    Unusable(String),
    /// It is the end of an earlier request.
    Stale,
    /// It does not come from JetStream.
    Other,
}

impl Meaning {
    /// Returns the meaning of a message, given that request `n` is answered on `<inbox>.<n>`, and that the current
    /// request, if any, is with the server.
    pub(crate) fn of(message: &Message, inbox: &str, current: Option<u64>) -> Self {
        let request = message.subject.strip_prefix(inbox);
        let Some(request) = request.and_then(|rest| rest.strip_prefix('.')) else {
            // A publisher can put a status into headers, but not an ack subject into a reply. So the
            // status of a message that was stored is never taken for the server's.
            let is_delivery = |reply: &str| reply.starts_with("$JS.ACK.");
            return match &message.reply {
                Some(reply) if is_delivery(reply) => Self::Delivery,
                _ => Self::Other,
            };
        };
        let Some(status) = message.status else {
            return Self::Other;
        };
        let is_current = current.is_some_and(|n| request.parse() == Ok(n));
        let description = message.description.as_deref().unwrap_or_default();
        match (status, description) {
            (StatusCode::IDLE_HEARTBEAT, _) => Self::Heartbeat,
            // These are about the consumer, regardless of the request that they answer.
            (_, "Consumer is push based") => Self::Unusable(description.to_owned()),
            // MaxRequestBatch, MaxRequestExpires, MaxRequestMaxBytes; but MaxWaiting may have room later.
            _ if description.starts_with("Exceeded MaxRequest") => {
                Self::Unusable(description.to_owned())
            }
            _ if !is_current => Self::Stale,
            (StatusCode::TIMEOUT, "Request Timeout") => Self::Ended,
            // This one comes without a description.
            (StatusCode::NO_RESPONDERS, "") => Self::Failed(format!("{status} No Responders")),
            _ => Self::Failed(format!("{status} {description}").trim_end().to_owned()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const INBOX: &str = "_INBOX.x";

    /// Returns a message as the client hands it over.
    fn message(subject: &str, reply: Option<&str>, status: &str) -> Message {
        let (code, description) = status.split_once(' ').unwrap_or((status, ""));
        Message {
            subject: subject.into(),
            reply: reply.map(Into::into),
            payload: Default::default(),
            headers: None,
            status: (!code.is_empty()).then(|| code.parse().unwrap()),
            description: (!description.is_empty()).then(|| description.to_owned()),
            length: 0,
        }
    }

    fn answer(request: u64, status: &str) -> Message {
        message(&format!("{INBOX}.{request}"), None, status)
    }

    /// Returns the meaning of an answer to the current request.
    fn meaning(status: &str) -> Meaning {
        Meaning::of(&answer(7, status), INBOX, Some(7))
    }

    #[test]
    fn every_answer_of_the_server_has_a_meaning() {
        use Meaning::{Ended, Heartbeat};
        let failed = |reason: &str| Meaning::Failed(reason.to_owned());
        let as_is = |status: &str| (failed(status), Meaning::Stale);
        let unusable = |reason: &str| {
            let unusable = || Meaning::Unusable(reason.to_owned());
            (unusable(), unusable())
        };
        // What it means as the answer to the current request, and to an earlier one.
        for (status, (current, earlier)) in [
            ("100 Idle Heartbeat", (Heartbeat, Heartbeat)),
            ("408 Request Timeout", (Ended, Meaning::Stale)),
            // Not the end of the consumer: before 2.10.12 it is also said when the consumer has only moved
            // to another server of its cluster, https://github.com/nats-io/nats-server/pull/5111.
            ("409 Consumer Deleted", as_is("409 Consumer Deleted")),
            (
                "409 Consumer is push based",
                unusable("Consumer is push based"),
            ),
            (
                "409 Exceeded MaxRequestBatch of 1",
                unusable("Exceeded MaxRequestBatch of 1"),
            ),
            (
                "409 Exceeded MaxRequestExpires of 10s",
                unusable("Exceeded MaxRequestExpires of 10s"),
            ),
            (
                "409 Exceeded MaxRequestMaxBytes of 1",
                unusable("Exceeded MaxRequestMaxBytes of 1"),
            ),
            // Only with a heartbeat does 2.15 say nothing instead.
            ("409 Exceeded MaxWaiting", as_is("409 Exceeded MaxWaiting")),
            ("409 Leadership Change", as_is("409 Leadership Change")),
            ("409 Server Shutdown", as_is("409 Server Shutdown")),
            // From the client's own server, if the consumer has no leader or is gone.
            ("503", as_is("503 No Responders")),
            // To a client whose account imports JetStream, and that has unsubscribed.
            ("408 Interest Expired", as_is("408 Interest Expired")),
            // To requests that we do not make: with no_wait,
            ("404 No Messages", as_is("404 No Messages")),
            ("408 Requests Pending", as_is("408 Requests Pending")),
            // with max_bytes,
            ("409 Batch Completed", as_is("409 Batch Completed")),
            (
                "409 Message Size Exceeds MaxBytes",
                as_is("409 Message Size Exceeds MaxBytes"),
            ),
            // not JSON, or with a heartbeat above half of the time until they expire,
            (
                "400 Bad Request - heartbeat value too large",
                as_is("400 Bad Request - heartbeat value too large"),
            ),
            (
                "400 Bad Request - unexpected end of JSON input",
                as_is("400 Bad Request - unexpected end of JSON input"),
            ),
            // with a priority group, from 2.11 on,
            (
                "400 Bad Request - Not a Overflow Priority consumer",
                as_is("400 Bad Request - Not a Overflow Priority consumer"),
            ),
            (
                "400 Bad Request - Not a Pinned Client Priority consumer",
                as_is("400 Bad Request - Not a Pinned Client Priority consumer"),
            ),
            (
                "400 Bad Request - Priority must be between 0 and 9",
                as_is("400 Bad Request - Priority must be between 0 and 9"),
            ),
            (
                "400 Bad Request - Priority Group missing",
                as_is("400 Bad Request - Priority Group missing"),
            ),
            (
                "400 Bad Request - Invalid Priority Group",
                as_is("400 Bad Request - Invalid Priority Group"),
            ),
            (
                "423 Nats-Pin-Id mismatch",
                as_is("423 Nats-Pin-Id mismatch"),
            ),
            ("423 Nats-Wrong-Pin-Id", as_is("423 Nats-Wrong-Pin-Id")),
            // with a required API level, from 2.12 on.
            ("412 Required Api Level", as_is("412 Required Api Level")),
            // Something new.
            ("418", as_is("418")),
            ("409 Gone Fishing", as_is("409 Gone Fishing")),
        ] {
            assert_eq!(meaning(status), current, "{status}");
            for at in [Some(8), None] {
                assert_eq!(
                    Meaning::of(&answer(7, status), INBOX, at),
                    earlier,
                    "{status}"
                );
            }
        }
    }

    #[test]
    fn a_delivery_is_one_by_its_ack_subject_whatever_its_headers_say() {
        let ack = Some("$JS.ACK.CMS.relay.1.2.3.4.5");
        for status in [
            "",
            "100",
            "408 Request Timeout",
            "409 Consumer Deleted",
            "503",
        ] {
            for (subject, reply, expected) in [
                ("cms.cache.1", ack, Meaning::Delivery),
                ("cms.cache.1", None, Meaning::Other),
                ("cms.cache.1", Some("_INBOX.x.7"), Meaning::Other),
                // Another inbox, which only begins like ours.
                ("_INBOX.xy.7", None, Meaning::Other),
                ("_INBOX.x", None, Meaning::Other),
            ] {
                let message = message(subject, reply, status);
                assert_eq!(
                    Meaning::of(&message, INBOX, Some(7)),
                    expected,
                    "{subject} {reply:?} {status}"
                );
            }
        }
        // What has no status, in the inbox.
        assert_eq!(meaning(""), Meaning::Other);
        let forged = message("_INBOX.x.7", ack, "");
        assert_eq!(Meaning::of(&forged, INBOX, Some(7)), Meaning::Other);
    }
}
