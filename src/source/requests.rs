//! The pull requests of durable mode: one at a time, each for a batch of messages, and what the server's answers to
//! them mean. Sending them and receiving the answers is up to `durable`.
//!
//! NATS ADR-13 describes the answers, but not all of them; the table in the tests has every one that
//! nats-server 2.9 to 2.15 can send, as found in its source.

use std::time::Duration;

use async_nats::{Message, StatusCode};
use log::{debug, warn};
use tokio::time::Instant;

/// How many messages a pull request asks for. The server still hands them out one at a time, each after the ack of the
/// previous one; a request for each of them would cost two more messages on the wire.
const BATCH: u32 = 64;

/// How long a pull request stays with the server. Shorter than the ack wait, so that a relay that is suspended with a
/// message gets no other one in the meantime, and holds up only that one.
const EXPIRES: Duration = Duration::from_secs(4);

/// How often the server confirms that it still has a pull request.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// If the server has said nothing about a pull request for this long, the request is considered lost.
const SILENCE: Duration = Duration::from_millis(3500);

/// All pull requests of a relay.
pub(super) struct Requests {
    /// How many messages each asks for.
    batch: u32,
    /// Request `n` is answered on `<inbox>.<n>`.
    pub(super) inbox: String,
    /// The number of the last one.
    last: u64,
    current: Request,
    /// When the server last said something about it.
    last_answer: Instant,
    /// How many requests in a row have failed.
    failures: u32,
}

/// The state of the last request.
#[derive(Clone, Copy, PartialEq)]
enum Request {
    /// It is with the server, which may hand out this many more messages for it.
    UnderWay(u32),
    /// It has ended; the next one may follow at once.
    Ended,
    /// It has failed; the consumer is verified at the next tick, before the next request.
    Failed,
}

/// The meaning of a message from the server.
#[derive(Debug, PartialEq)]
pub(crate) enum Meaning {
    /// It is a message of the stream.
    Delivery,
    /// A pull request is still with the server.
    Heartbeat,
    /// The current request has expired, as it regularly does; the next one may follow at once.
    Ended,
    /// The current request was refused, or has ended early, for this reason. The next one may fail in the same way, so
    /// it waits until the consumer has been verified.
    Failed(String),
    /// It is the end of an earlier request, or does not come from JetStream.
    Other,
}

impl Requests {
    pub(super) fn new(inbox: String) -> Self {
        Self {
            batch: BATCH,
            inbox,
            last: 0,
            current: Request::Ended,
            last_answer: Instant::now(),
            failures: 0,
        }
    }

    /// Asks for no more messages at a time than the consumer allows (its `max_batch`, if it has one).
    pub(super) fn limit_batch(&mut self, max_batch: i64) {
        self.batch = match u32::try_from(max_batch) {
            Ok(limit) if limit > 0 => limit.min(BATCH),
            _ => BATCH,
        };
    }

    /// Returns the reply subject and the text of the next request (NATS ADR-13), if the last one has ended.
    pub(super) fn next(&mut self) -> Option<(String, String)> {
        if self.current != Request::Ended {
            return None;
        }
        self.last += 1;
        self.current = Request::UnderWay(self.batch);
        self.last_answer = Instant::now();
        let reply = format!("{}.{}", self.inbox, self.last);
        let text = format!(
            r#"{{"batch":{},"expires":{},"idle_heartbeat":{}}}"#,
            self.batch,
            EXPIRES.as_nanos(),
            HEARTBEAT.as_nanos()
        );
        Some((reply, text))
    }

    /// Returns the meaning of a message, and notes what it says about the current request.
    pub(super) fn take_answer(&mut self, message: &Message) -> Meaning {
        let is_under_way = matches!(self.current, Request::UnderWay(_));
        let meaning = Meaning::of(message, &self.inbox, is_under_way.then_some(self.last));
        match &meaning {
            // It comes on its own subject, which does not tell which request it answers: presumably the current one.
            Meaning::Delivery => {
                self.last_answer = Instant::now();
                self.failures = 0;
                self.current = match self.current {
                    Request::UnderWay(left) if left > 1 => Request::UnderWay(left - 1),
                    _ => Request::Ended,
                };
            }
            Meaning::Heartbeat => self.last_answer = Instant::now(),
            Meaning::Ended => {
                self.failures = 0;
                self.end();
            }
            Meaning::Failed(reason) => {
                self.current = Request::Failed;
                self.report(&format!(
                    "the NATS server refuses to hand out the next one: {reason}"
                ));
            }
            Meaning::Other => {}
        }
        meaning
    }

    /// Notes that there is no request any more, for whatever reason.
    pub(super) fn end(&mut self) {
        self.current = Request::Ended;
    }

    /// Returns whether the consumer should be verified before another request.
    pub(super) fn is_suspicious(&self) -> bool {
        match self.current {
            Request::UnderWay(_) => self.last_answer.elapsed() >= SILENCE,
            Request::Ended => false,
            Request::Failed => true,
        }
    }

    /// Notes that the consumer is configured correctly, so that another request may follow the suspicious one.
    /// `silence` says why the server may have said nothing.
    pub(super) fn start_over(&mut self, silence: &str) {
        if self.current != Request::Failed {
            // Newer servers do not even report this.
            self.report(&format!(
                "the NATS server does not answer requests for the next one; {silence}"
            ));
        }
        self.end();
    }

    /// Reports a failure, ever more rarely, if it is not the first in a row. A single failure now and then is normal;
    /// after several, no messages arrive.
    fn report(&mut self, reason: &str) {
        self.failures += 1;
        if self.failures > 1 && self.failures.is_power_of_two() {
            warn!("no messages can arrive: {reason}");
        } else {
            debug!("a pull request failed: {reason}");
        }
    }
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
            _ if !is_current => Self::Other,
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
        let failures = [
            // Not the end of the consumer: before 2.10.12 it is also said when the consumer has only moved
            // to another server of its cluster, https://github.com/nats-io/nats-server/pull/5111.
            "409 Consumer Deleted",
            "409 Consumer is push based",
            "409 Exceeded MaxRequestBatch of 1",
            "409 Exceeded MaxRequestExpires of 10s",
            "409 Exceeded MaxRequestMaxBytes of 1",
            // With a heartbeat, 2.15 says nothing instead.
            "409 Exceeded MaxWaiting",
            "409 Leadership Change",
            "409 Server Shutdown",
            // To a client whose account imports JetStream, and that has unsubscribed.
            "408 Interest Expired",
            // To requests that we do not make: with no_wait,
            "404 No Messages",
            "408 Requests Pending",
            // with max_bytes,
            "409 Batch Completed",
            "409 Message Size Exceeds MaxBytes",
            // not JSON, or with a heartbeat above half of the time until they expire,
            "400 Bad Request - heartbeat value too large",
            "400 Bad Request - unexpected end of JSON input",
            // with a priority group, from 2.11 on,
            "400 Bad Request - Not a Overflow Priority consumer",
            "400 Bad Request - Not a Pinned Client Priority consumer",
            "400 Bad Request - Priority must be between 0 and 9",
            "400 Bad Request - Priority Group missing",
            "400 Bad Request - Invalid Priority Group",
            "423 Nats-Pin-Id mismatch",
            "423 Nats-Wrong-Pin-Id",
            // with a required API level, from 2.12 on.
            "412 Required Api Level",
            // Something new.
            "418",
            "409 Gone Fishing",
        ];
        let failures = failures.map(|status| (status, Meaning::Failed(status.to_owned())));
        for (status, current) in failures.into_iter().chain([
            ("408 Request Timeout", Meaning::Ended),
            // From the client's own server, if the consumer has no leader or is gone.
            ("503", Meaning::Failed("503 No Responders".to_owned())),
        ]) {
            assert_eq!(meaning(status), current, "{status}");
            for at in [Some(8), None] {
                let earlier = Meaning::of(&answer(7, status), INBOX, at);
                assert_eq!(earlier, Meaning::Other, "{status}");
            }
        }
        let heartbeat = answer(7, "100 Idle Heartbeat");
        for at in [Some(7), Some(8), None] {
            assert_eq!(Meaning::of(&heartbeat, INBOX, at), Meaning::Heartbeat);
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
        // No status, in the inbox.
        assert_eq!(meaning(""), Meaning::Other);
        let forged = message("_INBOX.x.7", ack, "");
        assert_eq!(Meaning::of(&forged, INBOX, Some(7)), Meaning::Other);
    }

    /// A message of the stream.
    fn delivery() -> Message {
        message("cms.cache.1", Some("$JS.ACK.CMS.relay.1.2.3.4.5"), "")
    }

    fn send(requests: &mut Requests) -> Option<String> {
        requests.next().map(|(reply, _)| reply)
    }

    #[test]
    fn one_request_at_a_time_is_under_way_until_its_batch_is_handed_out() {
        let mut requests = Requests::new(INBOX.to_owned());
        requests.limit_batch(3);
        for n in 1..4 {
            assert_eq!(send(&mut requests), Some(format!("{INBOX}.{n}")));
            for _ in 0..3 {
                assert_eq!(send(&mut requests), None);
                assert_eq!(requests.take_answer(&delivery()), Meaning::Delivery);
            }
        }
        // A late delivery is for an earlier request.
        requests.take_answer(&delivery());
        assert_eq!(send(&mut requests), Some(format!("{INBOX}.4")));
        requests.take_answer(&answer(3, "408 Request Timeout"));
        assert_eq!(send(&mut requests), None, "that was an earlier one");
        requests.take_answer(&answer(4, "408 Request Timeout"));
        assert_eq!(send(&mut requests), Some(format!("{INBOX}.5")));
    }

    #[test]
    fn a_request_asks_for_no_more_than_the_consumer_allows() {
        let mut requests = Requests::new(INBOX.to_owned());
        for (max_batch, batch) in [(0, 64), (-1, 64), (1, 1), (64, 64), (65, 64)] {
            requests.limit_batch(max_batch);
            requests.end();
            let text = requests.next().map(|(_, text)| text);
            let expected =
                format!(r#"{{"batch":{batch},"expires":4000000000,"idle_heartbeat":1000000000}}"#);
            assert_eq!(text, Some(expected), "{max_batch}");
        }
    }

    #[test]
    fn the_consumer_is_verified_after_a_refusal_and_after_silence() {
        let mut requests = Requests::new(INBOX.to_owned());
        assert!(!requests.is_suspicious());
        send(&mut requests);
        assert!(!requests.is_suspicious());
        requests.last_answer -= SILENCE;
        assert!(requests.is_suspicious());
        requests.take_answer(&answer(1, "100 Idle Heartbeat"));
        assert!(!requests.is_suspicious());

        requests.take_answer(&answer(1, "409 Leadership Change"));
        assert!(requests.is_suspicious());
        assert_eq!(send(&mut requests), None);
        requests.start_over("why");
        assert!(!requests.is_suspicious());
        assert_eq!(send(&mut requests), Some(format!("{INBOX}.2")));

        requests.last_answer -= SILENCE;
        requests.start_over("why");
        assert_eq!(send(&mut requests), Some(format!("{INBOX}.3")));
        assert!(!requests.is_suspicious());
        assert_eq!(requests.failures, 2);
        requests.take_answer(&answer(3, "408 Request Timeout"));
        assert_eq!(requests.failures, 0, "it ended as usual");
    }
}
