//! The pull requests of durable mode: one at a time, and what has become of it. Sending them and the
//! messages that answer them is the consumer's affair.

use std::time::Duration;

use async_nats::Subject;
use bytes::Bytes;
use log::{debug, warn};
use tokio::time::Instant;

/// How long a pull request stays with the server. Shorter than the ack wait: a relay that is suspended with a
/// message gets no other one in the meantime, and so holds up only that one.
const EXPIRES: Duration = Duration::from_secs(4);

/// How often the server says that a pull request is still with it.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// When the server has said nothing about a pull request for this long, the request is taken for lost,
/// along with the server that had it.
const SILENCE: Duration = Duration::from_millis(3500);

/// Requests that fail one upon another are reported at most this often.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// All pull requests of a relay.
pub(super) struct Requests {
    /// Where the server takes them.
    subject: Subject,
    /// What they all say (NATS ADR-13).
    text: Bytes,
    /// Request `n` is answered on `<inbox>.<n>`.
    inbox: String,
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

/// What has become of the current request.
#[derive(Clone, Copy, PartialEq)]
enum Request {
    /// Request `n` is with the server.
    UnderWay(u64),
    /// Request `n` has ended; the next one may follow at once.
    Ended(u64),
    /// Request `n` has failed; before the next one, at the next tick, the consumer is verified.
    Failed(u64),
}

impl Requests {
    pub(super) fn new(subject: Subject, inbox: String) -> Self {
        let text = format!(
            r#"{{"batch":1,"expires":{},"idle_heartbeat":{}}}"#,
            EXPIRES.as_nanos(),
            HEARTBEAT.as_nanos()
        );
        Self {
            subject,
            text: text.into(),
            inbox,
            current: Request::Ended(0),
            last_answer: Instant::now(),
            failures: 0,
            reported: None,
        }
    }

    /// What all answers begin with.
    pub(super) fn inbox(&self) -> &str {
        &self.inbox
    }

    /// The number of the request that is with the server, if one is.
    pub(super) fn under_way(&self) -> Option<u64> {
        match self.current {
            Request::UnderWay(n) => Some(n),
            Request::Ended(_) | Request::Failed(_) => None,
        }
    }

    /// The next request, if the last one has ended.
    pub(super) fn next(&mut self) -> Option<PullRequest> {
        let Request::Ended(last) = self.current else {
            return None;
        };
        let n = last + 1;
        self.current = Request::UnderWay(n);
        self.last_answer = Instant::now();
        Some(PullRequest {
            subject: self.subject.clone(),
            reply: format!("{}.{n}", self.inbox).into(),
            text: self.text.clone(),
        })
    }

    /// The server has said that it still has the current request.
    pub(super) fn answered(&mut self) {
        self.last_answer = Instant::now();
    }

    /// The current request has ended as requests do.
    pub(super) fn succeeded(&mut self) {
        self.failures = 0;
        self.end();
    }

    /// There is no request any more, whatever has become of it.
    pub(super) fn end(&mut self) {
        self.current = Request::Ended(self.number());
    }

    /// The current request was refused.
    pub(super) fn failed(&mut self, reason: &str) {
        self.current = Request::Failed(self.number());
        self.report(&format!(
            "the NATS server refuses to hand out the next one: {reason}"
        ));
    }

    /// Whether the consumer should be verified before another request.
    pub(super) fn is_suspicious(&self) -> bool {
        match self.current {
            Request::UnderWay(_) => self.last_answer.elapsed() >= SILENCE,
            Request::Ended(_) => false,
            Request::Failed(_) => true,
        }
    }

    /// The consumer is as it must be, so the suspicious request can be followed by another.
    pub(super) fn start_over(&mut self) {
        if self.under_way().is_some() {
            // Newer servers do not even say that.
            self.report(
                "the NATS server does not answer requests for the next one; max_waiting of the consumer \
                 may be used up",
            );
        }
        self.answered();
        self.end();
    }

    /// A failure now and then is regular, one upon another is not: then no message comes.
    fn report(&mut self, reason: &str) {
        self.failures += 1;
        let is_due = self
            .reported
            .is_none_or(|reported| reported.elapsed() >= REPORT_EVERY);
        if self.failures > 1 && is_due {
            warn!("no message can come: {reason}");
            self.reported = Some(Instant::now());
        } else {
            debug!("a pull request failed: {reason}");
        }
    }

    fn number(&self) -> u64 {
        let (Request::UnderWay(n) | Request::Ended(n) | Request::Failed(n)) = self.current;
        n
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
    fn one_request_at_a_time_is_under_way_and_each_has_its_number() {
        let mut requests = requests();
        assert_eq!(requests.under_way(), None);
        for n in 1..4 {
            assert_eq!(send(&mut requests), Some(format!("inbox.{n}")));
            assert_eq!(send(&mut requests), None);
            assert_eq!(requests.under_way(), Some(n));
            requests.succeeded();
            assert_eq!(requests.under_way(), None);
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
        requests.start_over();
        assert!(!requests.is_suspicious());
        assert_eq!(send(&mut requests), Some("inbox.2".to_owned()));

        requests.last_answer -= SILENCE;
        requests.start_over();
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
        requests.succeeded();
        assert!(!is_reported(&mut requests), "so is another one later");
        assert!(is_reported(&mut requests));
        assert!(!is_reported(&mut requests));
        requests.reported = requests.reported.map(|reported| reported - REPORT_EVERY);
        assert!(is_reported(&mut requests));
    }
}
