//! Monitoring: counters, states and the last messages. All parts of the relay write to it, in its own terms; the status
//! page, the endpoints and systemd read it.

pub mod endpoints;
mod heartbeat;
pub mod logging;
mod metrics;
mod page;
mod state;

use std::{
    fmt::Write,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use prometheus::IntCounter;

pub use self::{heartbeat::Heartbeat, metrics::DestinationMetrics};
use self::{
    metrics::Metrics,
    page::History,
    state::{Current, Failing, State, age},
};
use crate::text;

/// The main loop beats at least this often; a multiple of its heartbeat.
const LONGEST_TURN: Duration = Duration::from_secs(10);

/// The most bytes of a subject on the page.
const LONGEST_SUBJECT: usize = 200;

/// Counters and states.
pub struct Monitor {
    metrics: Metrics,
    state: Mutex<State>,
    /// Kept only with a page.
    history: Option<Mutex<History>>,
}

/// Why a message was not relayed.
#[derive(Clone, Copy, Debug)]
pub enum Cause {
    /// A destination rejected it.
    Refused,
    /// All attempts were used.
    AttemptsUsed,
    /// It could not be published.
    NotPublished,
    /// The relay stopped first.
    Stopped,
}

/// The labels of the causes, in their order.
const CAUSES: [&str; 4] = ["refused", "attempts_used", "not_published", "stopped"];

/// While this exists, a message is being processed.
pub struct Working<'a>(&'a Monitor);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.show(|history| history.current = None);
    }
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    Succeeded,
    /// There may be another attempt.
    FailedForNow,
    FailedForGood,
}

impl Monitor {
    /// Returns one with all counters at zero, not connected. `about` describes the relay on the page, if there is one.
    ///
    /// # Errors
    /// If two metrics have the same name.
    pub fn new(about: Option<String>) -> prometheus::Result<Self> {
        Ok(Self {
            metrics: Metrics::new()?,
            state: Mutex::new(State::new()),
            history: about.map(|about| Mutex::new(History::new(about))),
        })
    }

    /// Notes that the relay is connected to a server.
    pub fn set_connected(&self, server: String) {
        let mut state = self.state.lock();
        if state.was_connected {
            self.metrics.reconnects.inc();
        }
        state.was_connected = true;
        state.server = Some(server);
        state.since = SystemTime::now();
        state.obstacle = None;
        self.metrics.connected.set(1.0);
    }

    /// Notes that the connection was lost.
    pub fn set_disconnected(&self) {
        let mut state = self.state.lock();
        self.metrics.interruptions.inc();
        self.metrics.connected.set(0.0);
        state.server = None;
        state.since = SystemTime::now();
    }

    /// Notes whether messages are being taken.
    pub fn set_subscribed(&self, subscribed: bool) {
        let mut state = self.state.lock();
        state.is_subscribed = subscribed;
        if subscribed {
            state.obstacle = None;
        }
    }

    /// Notes that the relay was asked to stop.
    fn set_stopping(&self) {
        let mut state = self.state.lock();
        (state.is_stopping, state.is_subscribed) = (true, false);
    }

    /// Notes what keeps messages from being taken, if anything.
    pub fn set_obstacle(&self, reason: Option<String>) {
        let obstacle = &mut self.state.lock().obstacle;
        let since = obstacle.as_ref().map(|(since, _)| *since);
        *obstacle = reason.map(|reason| (since.unwrap_or_else(SystemTime::now), reason));
    }

    /// Changes what the page shows. Without a page, nothing is done.
    fn show(&self, change: impl FnOnce(&mut History)) {
        if let Some(history) = &self.history {
            change(&mut history.lock());
        }
    }

    /// Notes a beat of the main loop.
    pub fn add_turn(&self) {
        self.state.lock().last_turn = Instant::now();
    }

    /// Notes that a message was taken, which has been waiting to be relayed `since` then, or since now. It is being
    /// processed for as long as the return value lives.
    #[must_use]
    pub fn add_received(&self, subject: &str, since: Option<SystemTime>) -> Working<'_> {
        self.metrics.received.inc();
        self.show(|history| {
            let now = Instant::now();
            history.current = Some(Current {
                since: since.unwrap_or_else(SystemTime::now),
                taken: now,
                subject: text::one_line(subject, LONGEST_SUBJECT).into_owned(),
                attempts: 0,
                unanswered: 0,
                asked: now,
            });
        });
        Working(self)
    }

    /// Returns the metrics of the destination at this index in `WEBHOOK_DESTINATION`.
    #[must_use]
    pub fn destination(&self, index: usize) -> DestinationMetrics {
        self.metrics.destination(index)
    }

    /// Notes that an attempt begins.
    pub fn begin_attempt(&self, attempts: u32) {
        self.show(|history| history.begin_attempt(attempts));
    }

    /// Notes that an attempt has ended.
    pub fn end_attempt(&self, destination: &DestinationMetrics, attempt: Attempt, took: Duration) {
        match attempt {
            Attempt::Succeeded => destination.success.inc(),
            Attempt::FailedForNow => destination.temporary.inc(),
            Attempt::FailedForGood => destination.permanent.inc(),
        }
        destination.duration.observe(took.as_secs_f64());
        self.show(|history| history.end_attempt(took));
    }

    /// Notes a failure that is tried again after `wait`.
    pub fn set_failing(&self, what: String, reason: String, wait: Duration) {
        let failing = &mut self.state.lock().failing;
        let known = failing.iter().position(|known| known.what == what);
        let since = known.map(|index| failing.swap_remove(index).since);
        failing.push(Failing {
            since: since.unwrap_or_else(SystemTime::now),
            what,
            reason,
            next: Instant::now() + wait,
        });
    }

    /// Notes that every destination has the current message.
    pub fn set_posted(&self) {
        self.state.lock().failing.clear();
    }

    /// Notes that a stream did not confirm a message.
    pub fn add_unconfirmed(&self) {
        self.metrics.unconfirmed.inc();
    }

    /// Notes that the current message was relayed.
    pub fn add_relayed(&self, status: Option<u16>, took: Duration) {
        self.metrics.relayed.inc();
        self.metrics.message_duration.observe(took.as_secs_f64());
        let mut state = self.state.lock();
        state.failing.clear();
        state.given_up = None;
        drop(state);
        self.show(|history| {
            let status = status.map(|status| status.to_string());
            history.end("relayed", status.unwrap_or_default());
        });
    }

    /// Notes that the relay gave up on the current message.
    pub fn add_given_up(&self, cause: Cause, subject: &str, reason: &str) {
        self.metrics.given_up[cause as usize].inc();
        self.show(|history| history.end("given up on", line(reason)));
        let mut state = self.state.lock();
        state.given_up = Some((SystemTime::now(), format!("{subject}: {reason}")));
        if let Cause::Refused = cause {
            // It works, and doesn't want this message.
            state.failing.clear();
        }
    }

    /// Notes that the current message stays in its stream, for this relay or another one.
    pub fn add_unfinished(&self, reason: &str) {
        self.metrics.unfinished.inc();
        self.show(|history| history.end("left in the stream", line(reason)));
    }

    /// Notes that messages in the buffer were lost, or did not fit into it.
    pub fn add_dropped(&self, messages: u64) {
        self.metrics.dropped.inc_by(messages);
    }

    /// Notes that NATS refused to publish a message.
    pub fn add_publish_refused(&self) {
        self.metrics.publish_refused.inc();
    }

    /// Notes what waits.
    pub fn set_waiting(&self, messages: u64, bytes: usize) {
        self.metrics.waiting_messages.set(messages as f64);
        self.metrics.waiting_bytes.set(bytes as f64);
    }

    /// Checks whether the main loop is running.
    ///
    /// # Errors
    /// With the reason, if it seems to be stuck.
    pub fn alive(&self) -> Result<(), String> {
        let since = self.state.lock().last_turn.elapsed();
        if since >= LONGEST_TURN {
            return Err(format!("the main loop has been stuck for {since:.0?}"));
        }
        Ok(())
    }

    /// Checks whether messages are being taken.
    ///
    /// # Errors
    /// With the reason, if they are not.
    pub fn ready(&self) -> Result<(), String> {
        let state = self.state.lock();
        match &state.obstacle {
            _ if state.server.is_none() => Err("not connected to NATS".to_owned()),
            Some((_, obstacle)) => Err(obstacle.clone()),
            None if !state.is_subscribed => Err("not subscribed".to_owned()),
            None => Ok(()),
        }
    }

    /// Returns all metrics in the Prometheus text format, version 0.0.4.
    ///
    /// # Errors
    /// If they can't be put into it.
    pub fn metrics(&self) -> prometheus::Result<String> {
        let mut oldest = Duration::ZERO;
        self.show(|history| {
            let current = history.current.iter();
            oldest = current.map(|current| age(current.since)).sum();
        });
        self.metrics.text(oldest)
    }

    /// Returns the essence in one bounded line, without secrets.
    #[must_use]
    pub fn line(&self) -> String {
        let state = self.state.lock();
        let reason = state.obstacle.as_ref().map(|(_, reason)| reason.clone());
        let (mut line, reason) = match (&state.server, state.now(&self.metrics, None)) {
            (None, _) => ("waiting for NATS".to_owned(), reason),
            (Some(server), (mood, _, now)) => (
                format!("connected to {server}"),
                (mood == "bad").then_some(now),
            ),
        };
        let (relayed, dropped) = (self.metrics.relayed.get(), self.metrics.dropped.get());
        let _ = write!(
            line,
            ", {relayed} relayed, {} given up, {dropped} dropped, {} waiting",
            self.given_up(),
            self.metrics.waiting_messages.get()
        );
        if let Some(reason) = reason {
            let _ = write!(line, "; {reason}");
        }
        text::one_line(&line, text::LONGEST_NOTE).into_owned()
    }

    fn given_up(&self) -> u64 {
        self.metrics.given_up.iter().map(IntCounter::get).sum()
    }
}

/// Returns a reason as the page shows it.
fn line(reason: &str) -> String {
    text::one_line(reason, text::LONGEST_PIECE).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_main_loop_that_does_not_come_around_is_not_alive() {
        let monitor = Monitor::new(None).unwrap();
        assert_eq!(monitor.alive(), Ok(()));
        monitor.state.lock().last_turn -= LONGEST_TURN + Duration::from_secs(2);
        let reason = monitor.alive().unwrap_err();
        assert_eq!(reason, "the main loop has been stuck for 12s");
        monitor.add_turn();
        assert_eq!(monitor.alive(), Ok(()));
    }

    #[test]
    fn the_status_line_says_once_what_is_waited_for() {
        let monitor = Monitor::new(None).unwrap();
        monitor.set_obstacle(Some("cannot connect".to_owned()));
        let counts = "0 relayed, 0 given up, 0 dropped, 0 waiting";
        let line = format!("waiting for NATS, {counts}; cannot connect");
        assert_eq!(monitor.line(), line);
    }
}
