//! Monitoring: metrics, the state, and the last messages. All parts of the relay write to it, in its own terms; the
//! status page, the endpoints and systemd read it.

pub mod endpoints;
pub mod logging;
mod metrics;
mod page;
mod pictures;
mod systemd;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;

pub use self::metrics::{Attempt, Cause, DestinationMetrics};
use self::{metrics::Metrics, pictures::Minutes};
use crate::text;

/// After this long without a heartbeat, the main loop counts as stuck.
const LONGEST_TURN: Duration = Duration::from_secs(10);

/// How many messages the page shows.
const MAX_MESSAGES: usize = 50;

const RELAYED: &str = "relayed";
const GIVEN_UP: &str = "given up on";

/// Metrics and the state.
pub struct Monitor {
    /// A line for the page that says where messages come from and where they go; without it there is no page.
    about: Option<String>,
    /// Events that are only counted are counted here directly.
    pub metrics: Metrics,
    state: Mutex<State>,
}

struct State {
    /// The server, or why there is no connection to one.
    server: Result<String, String>,
    /// Since when that has been so.
    since: SystemTime,
    /// The reason why no messages are taken.
    obstacle: Option<String>,
    /// Whether systemd knows that the start is complete.
    is_started: bool,
    is_stopping: bool,
    /// The last beat of the main loop.
    last_turn: Instant,
    current: Option<Current>,
    /// The last messages, the latest one first.
    messages: VecDeque<Ended>,
    minutes: Minutes,
}

/// The message being processed.
struct Current {
    subject: Arc<str>,
    /// Since when it has been waiting to be relayed.
    since: SystemTime,
    taken: Instant,
    attempts: u32,
    /// When it was last POSTed, unless every destination has it.
    asked: Option<SystemTime>,
    /// The failures that keep it from being relayed.
    failing: Vec<Failing>,
}

/// Something that is tried over and over.
struct Failing {
    /// The failing part, such as a destination.
    what: String,
    since: SystemTime,
    reason: String,
    /// When it is tried again.
    next: Instant,
}

/// A message that was processed.
struct Ended {
    subject: Arc<str>,
    at: SystemTime,
    outcome: &'static str,
    reason: String,
    attempts: u32,
    took: Duration,
}

/// While this exists, a message is being processed.
pub struct Working<'a>(&'a Monitor);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.state.lock().current = None;
    }
}

impl Monitor {
    /// Returns one with all counters at zero, not connected. `about` describes the relay on the
    /// page, if it has one.
    ///
    /// # Errors
    /// If two metrics have the same name.
    pub fn new(about: Option<String>) -> prometheus::Result<Self> {
        Ok(Self {
            about,
            metrics: Metrics::new()?,
            state: Mutex::new(State {
                server: Err("not connected yet".to_owned()),
                since: SystemTime::now(),
                obstacle: Some("not subscribed".to_owned()),
                is_started: false,
                is_stopping: false,
                last_turn: Instant::now(),
                current: None,
                messages: VecDeque::new(),
                minutes: Minutes::default(),
            }),
        })
    }

    /// Notes that the relay is connected to a server.
    pub fn set_connected(&self, server: String) {
        if self.metrics.interruptions.get() > 0 {
            self.metrics.reconnects.inc();
        }
        self.metrics.connected.set(1.0);
        let mut state = self.state.lock();
        state.server = Ok(server);
        state.since = SystemTime::now();
    }

    /// Notes that the connection was lost.
    pub fn set_disconnected(&self) {
        self.metrics.interruptions.inc();
        self.metrics.connected.set(0.0);
        let mut state = self.state.lock();
        state.server = Err("lost the connection".to_owned());
        state.since = SystemTime::now();
    }

    /// Notes why there is no connection to a server.
    pub fn set_unreachable(&self, reason: String) {
        self.state.lock().server = Err(reason);
    }

    /// Notes what keeps messages from being taken, if anything does.
    pub fn set_obstacle(&self, reason: Option<String>) {
        self.state.lock().obstacle = reason;
    }

    /// Notes that a message was taken, which has been waiting to be relayed `since` then, or since now. It is being
    /// processed for as long as the return value lives.
    #[must_use]
    pub fn add_received(&self, subject: &str, since: Option<SystemTime>) -> Working<'_> {
        self.metrics.received.inc();
        self.state.lock().current = Some(Current {
            subject: text::one_line(subject, text::LONGEST_PIECE).into(),
            since: since.unwrap_or_else(SystemTime::now),
            taken: Instant::now(),
            attempts: 0,
            asked: None,
            failing: Vec::new(),
        });
        Working(self)
    }

    fn change_current(&self, change: impl FnOnce(&mut Current)) {
        if let Some(current) = &mut self.state.lock().current {
            change(current);
        }
    }

    /// Notes that an attempt begins.
    pub fn begin_attempt(&self, attempts: u32) {
        self.change_current(|current| {
            current.attempts = current.attempts.max(attempts);
            current.asked = Some(SystemTime::now());
        });
    }

    /// Notes that an attempt to POST to a destination has ended.
    pub fn end_attempt(&self, destination: &DestinationMetrics, attempt: Attempt, took: Duration) {
        destination.add(attempt, took);
        if self.about.is_some() {
            self.state.lock().minutes.add_attempt(took);
        }
    }

    /// Notes that `what` failed, and is tried again after `wait`.
    pub fn set_failing(&self, what: String, reason: String, wait: Duration) {
        self.change_current(|Current { failing, .. }| {
            let known = failing.iter().position(|known| known.what == what);
            let since = known.map(|index| failing.swap_remove(index).since);
            failing.push(Failing {
                what,
                since: since.unwrap_or_else(SystemTime::now),
                reason,
                next: Instant::now() + wait,
            });
        });
    }

    /// Notes that every destination has the current message.
    pub fn set_posted(&self) {
        self.change_current(|current| {
            current.asked = None;
            current.failing.clear();
        });
    }

    /// Notes that the current message was relayed.
    pub fn add_relayed(&self, status: Option<u16>, took: Duration) {
        self.metrics.relayed.inc();
        self.metrics.message_duration.observe(took.as_secs_f64());
        let status = status.map(|status| status.to_string());
        self.end(RELAYED, status.unwrap_or_default());
    }

    /// Notes that the relay gave up on the current message.
    pub fn add_given_up(&self, cause: Cause, reason: &str) {
        self.metrics.given_up[cause as usize].inc();
        self.end(GIVEN_UP, text::one_line(reason, text::LONGEST_PIECE).into());
    }

    /// Notes that the current message stays in its stream, for this relay or another one.
    pub fn add_unfinished(&self, reason: &str) {
        self.metrics.unfinished.inc();
        self.end(
            "left in the stream",
            text::one_line(reason, text::LONGEST_PIECE).into(),
        );
    }

    /// Records what became of the current message.
    fn end(&self, outcome: &'static str, reason: String) {
        let mut state = self.state.lock();
        let Some(current) = &mut state.current else {
            return;
        };
        (current.asked, current.failing) = (None, Vec::new());
        let ended = Ended {
            subject: Arc::clone(&current.subject),
            at: SystemTime::now(),
            outcome,
            reason,
            attempts: current.attempts,
            took: current.taken.elapsed(),
        };
        if outcome == RELAYED && self.about.is_some() {
            state.minutes.add_relayed();
        }
        state.messages.truncate(MAX_MESSAGES - 1);
        state.messages.push_front(ended);
    }

    /// Notes the backlog.
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
        match since >= LONGEST_TURN {
            true => Err(format!("the main loop has been stuck for {since:.0?}")),
            false => Ok(()),
        }
    }

    /// Checks whether messages are being taken.
    ///
    /// # Errors
    /// With the reason, if they are not.
    pub fn ready(&self) -> Result<(), String> {
        let state = self.state.lock();
        match (&state.server, &state.obstacle) {
            (Err(_), _) => Err("not connected to NATS".to_owned()),
            _ if state.is_stopping => Err("stopping".to_owned()),
            (Ok(_), Some(obstacle)) => Err(obstacle.clone()),
            (Ok(_), None) => Ok(()),
        }
    }

    /// Returns all metrics in the Prometheus text format, version 0.0.4.
    ///
    /// # Errors
    /// If they can't be put into it.
    pub fn metrics(&self) -> prometheus::Result<String> {
        let current = self.state.lock().current.as_ref().map(|it| it.since);
        self.metrics.text(current.map(age).unwrap_or_default())
    }
}

/// Returns how long something has lasted. Clocks differ between machines: a message can seem to come from the
/// future.
fn age(since: SystemTime) -> Duration {
    since.elapsed().unwrap_or_default()
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
    }

    #[test]
    fn readiness_names_what_is_missing() {
        let monitor = Monitor::new(None).unwrap();
        let ready = |expected: Result<(), &str>| {
            assert_eq!(monitor.ready(), expected.map_err(ToOwned::to_owned));
        };
        ready(Err("not connected to NATS"));
        monitor.set_connected("nats://a".to_owned());
        ready(Err("not subscribed"));
        monitor.set_obstacle(None);
        ready(Ok(()));
        monitor.stopping();
        ready(Err("stopping"));
    }
}
