//! The state of the pull requests of durable mode: one at a time, each for a batch of messages. Sending them and
//! receiving the answers is up to `durable`.

use std::time::Duration;

use async_nats::Subject;
use bytes::Bytes;
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

/// If the server has said nothing about a pull request for this long, the request is considered lost, and so is the
/// server that had it.
const SILENCE: Duration = Duration::from_millis(3500);

/// Requests that fail in a row are reported at most this often.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// All pull requests of a relay.
pub(super) struct Requests {
    /// The subject on which the server accepts them.
    subject: Subject,
    /// How many messages each asks for.
    batch: u32,
    /// Request `n` is answered on `<inbox>.<n>`.
    inbox: String,
    /// The number of the last one.
    last: u64,
    current: Request,
    /// When the server last said something about it.
    last_answer: Instant,
    /// How many requests in a row have failed.
    failures: u32,
    /// When that was last reported.
    reported: Option<Instant>,
}

/// A request to be sent.
pub(super) struct PullRequest {
    pub(super) subject: Subject,
    pub(super) reply: Subject,
    pub(super) text: Bytes,
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

impl Requests {
    pub(super) fn new(subject: Subject, inbox: String) -> Self {
        Self {
            subject,
            batch: BATCH,
            inbox,
            last: 0,
            current: Request::Ended,
            last_answer: Instant::now(),
            failures: 0,
            reported: None,
        }
    }

    /// Returns the prefix of the subjects of all answers.
    pub(super) fn inbox(&self) -> &str {
        &self.inbox
    }

    /// Asks for no more messages at a time than the consumer allows (its `max_batch`, if it has one).
    pub(super) fn limit_batch(&mut self, max_batch: i64) {
        self.batch = match u32::try_from(max_batch) {
            Ok(limit) if limit > 0 => limit.min(BATCH),
            _ => BATCH,
        };
    }

    /// Returns the number of the request that is with the server, if one is.
    pub(super) fn under_way(&self) -> Option<u64> {
        matches!(self.current, Request::UnderWay(_)).then_some(self.last)
    }

    /// Returns the next request, if the last one has ended.
    pub(super) fn next(&mut self) -> Option<PullRequest> {
        if self.current != Request::Ended {
            return None;
        }
        self.last += 1;
        self.current = Request::UnderWay(self.batch);
        self.last_answer = Instant::now();
        // NATS ADR-13.
        let text = format!(
            r#"{{"batch":{},"expires":{},"idle_heartbeat":{}}}"#,
            self.batch,
            EXPIRES.as_nanos(),
            HEARTBEAT.as_nanos()
        );
        Some(PullRequest {
            subject: self.subject.clone(),
            reply: format!("{}.{}", self.inbox, self.last).into(),
            text: text.into(),
        })
    }

    /// Notes that the server still has the current request.
    pub(super) fn answered(&mut self) {
        self.last_answer = Instant::now();
    }

    /// Notes that the server has handed out a message, presumably for the current request.
    pub(super) fn delivered(&mut self) {
        self.answered();
        self.failures = 0;
        self.current = match self.current {
            Request::UnderWay(left) if left > 1 => Request::UnderWay(left - 1),
            _ => Request::Ended,
        };
    }

    /// Notes that the current request has expired, as requests do.
    pub(super) fn expired(&mut self) {
        self.failures = 0;
        self.end();
    }

    /// Notes that there is no request any more, for whatever reason.
    pub(super) fn end(&mut self) {
        self.current = Request::Ended;
    }

    /// Notes that the current request was refused.
    pub(super) fn failed(&mut self, reason: &str) {
        self.current = Request::Failed;
        self.report(&format!(
            "the NATS server refuses to hand out the next one: {reason}"
        ));
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
        if self.under_way().is_some() {
            // Newer servers do not even report this.
            self.report(&format!(
                "the NATS server does not answer requests for the next one; {silence}"
            ));
        }
        self.answered();
        self.end();
    }

    /// Reports a failure if it is not the first in a row. A single failure now and then is normal; after several,
    /// no messages arrive.
    fn report(&mut self, reason: &str) {
        self.failures += 1;
        let is_due = self
            .reported
            .is_none_or(|reported| reported.elapsed() >= REPORT_EVERY);
        if self.failures > 1 && is_due {
            warn!("no messages can arrive: {reason}");
            self.reported = Some(Instant::now());
        } else {
            debug!("a pull request failed: {reason}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests() -> Requests {
        Requests::new("next".into(), "inbox".to_owned())
    }

    fn send(requests: &mut Requests) -> Option<String> {
        requests.next().map(|request| request.reply.to_string())
    }

    #[test]
    fn one_request_at_a_time_is_under_way_until_its_batch_is_handed_out() {
        let mut requests = requests();
        requests.limit_batch(3);
        assert_eq!(requests.under_way(), None);
        for n in 1..4 {
            assert_eq!(send(&mut requests), Some(format!("inbox.{n}")));
            for _ in 0..3 {
                assert_eq!(send(&mut requests), None);
                assert_eq!(requests.under_way(), Some(n));
                requests.delivered();
            }
            assert_eq!(requests.under_way(), None);
        }
        // A late delivery is for an earlier request.
        requests.delivered();
        assert_eq!(send(&mut requests), Some("inbox.4".to_owned()));
        requests.expired();
        assert_eq!(send(&mut requests), Some("inbox.5".to_owned()));
    }

    #[test]
    fn a_request_asks_for_no_more_than_the_consumer_allows() {
        let mut requests = requests();
        for (max_batch, batch) in [(0, 64), (-1, 64), (1, 1), (64, 64), (65, 64)] {
            requests.limit_batch(max_batch);
            requests.end();
            let text = requests.next().map(|request| request.text);
            let expected =
                format!(r#"{{"batch":{batch},"expires":4000000000,"idle_heartbeat":1000000000}}"#);
            assert_eq!(text, Some(expected.into()), "{max_batch}");
        }
    }

    #[test]
    fn the_consumer_is_verified_after_a_refusal_and_after_silence() {
        let mut requests = requests();
        assert!(!requests.is_suspicious());
        send(&mut requests);
        assert!(!requests.is_suspicious());
        requests.last_answer -= SILENCE;
        assert!(requests.is_suspicious());
        requests.answered();
        assert!(!requests.is_suspicious());

        requests.failed("no");
        assert!(requests.is_suspicious());
        assert_eq!(send(&mut requests), None);
        requests.start_over("why");
        assert!(!requests.is_suspicious());
        assert_eq!(send(&mut requests), Some("inbox.2".to_owned()));

        requests.last_answer -= SILENCE;
        requests.start_over("why");
        assert_eq!(send(&mut requests), Some("inbox.3".to_owned()));
        assert!(!requests.is_suspicious());
    }

    #[test]
    fn failures_in_a_row_are_reported_once_a_minute() {
        let mut requests = requests();
        let is_reported = |requests: &mut Requests| {
            let before = requests.reported;
            requests.failed("no");
            requests.reported != before
        };
        assert!(!is_reported(&mut requests), "one is regular");
        requests.expired();
        assert!(!is_reported(&mut requests), "so is another one later");
        assert!(is_reported(&mut requests));
        assert!(!is_reported(&mut requests));
        requests.reported = requests.reported.map(|reported| reported - REPORT_EVERY);
        assert!(is_reported(&mut requests));
    }
}
