//! The state of the relay, and the sentence for it on the page and in systemd's status line.

use std::{
    fmt,
    time::{Duration, Instant, SystemTime},
};

use super::metrics::Metrics;

/// A response that takes longer than this is mentioned.
const LONG: Duration = Duration::from_secs(1);

pub(super) struct State {
    /// The server, while there is a connection to one.
    pub(super) server: Option<String>,
    /// Since when there has been this connection, or none.
    pub(super) since: SystemTime,
    pub(super) was_connected: bool,
    pub(super) is_subscribed: bool,
    pub(super) is_stopping: bool,
    /// The last beat of the main loop.
    pub(super) last_turn: Instant,
    /// The obstacle that keeps messages from being taken, and since when.
    pub(super) obstacle: Option<(SystemTime, String)>,
    /// The failures that keep the current message from being relayed.
    pub(super) failing: Vec<Failing>,
    /// The message that was given up on last, if nothing was relayed since.
    pub(super) given_up: Option<(SystemTime, String)>,
}

/// Something that is tried over and over.
pub(super) struct Failing {
    pub(super) since: SystemTime,
    /// The failing part, such as a destination.
    pub(super) what: String,
    pub(super) reason: String,
    /// When it is tried again.
    pub(super) next: Instant,
}

/// The message being processed.
pub(super) struct Current {
    /// Since when it has been waiting to be relayed.
    pub(super) since: SystemTime,
    pub(super) taken: Instant,
    pub(super) subject: String,
    pub(super) attempts: u32,
    /// How many destinations have not responded yet, and since when.
    pub(super) unanswered: u32,
    pub(super) asked: Instant,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            server: None,
            since: SystemTime::now(),
            was_connected: false,
            is_subscribed: false,
            is_stopping: false,
            last_turn: Instant::now(),
            obstacle: None,
            failing: Vec::new(),
            given_up: None,
        }
    }

    /// Returns what is happening: how good that is, in a few words, and in a sentence.
    pub(super) fn now(
        &self,
        metrics: &Metrics,
        current: Option<&Current>,
    ) -> (&'static str, &'static str, String) {
        let waiting = match metrics.waiting_messages.get() as u64 {
            0 => String::new(),
            1 => "; 1 message waits".to_owned(),
            number => format!("; {number} messages wait"),
        };
        let obstacle = self.obstacle.as_ref();
        let reason = obstacle.map_or_else(String::new, |(_, reason)| format!(": {reason}"));
        if self.is_stopping {
            let current = current.map(|current| format!(": finishing {}", current.subject));
            let text = format!("Stopping{}", current.unwrap_or_default());
            return ("wait", "Stopping", text);
        }
        if self.server.is_none() {
            let text = format!("Waiting for NATS for {}{reason}", span(age(self.since)));
            return ("bad", "Waiting for NATS", text);
        }
        if let Some((since, _)) = obstacle {
            let text = format!("Takes no messages for {}{reason}", span(age(*since)));
            return ("bad", "Takes no messages", text);
        }
        if !self.is_subscribed {
            return ("wait", "Starting", "Starting".to_owned());
        }
        if !self.failing.is_empty() {
            let failing: Vec<_> = self.failing.iter().map(ToString::to_string).collect();
            return ("bad", "Failing", failing.join(". ") + &waiting);
        }
        if let Some(Current { asked, .. }) = current.filter(|current| current.unanswered > 0)
            && asked.elapsed() >= LONG
        {
            let ago = span(asked.elapsed());
            let text = format!("Waiting for the webhook's answer for {ago}{waiting}");
            return ("wait", "Waiting for an answer", text);
        }
        if let Some((at, text)) = &self.given_up {
            let text = format!("Gave up, {} ago, on {text}", span(age(*at)));
            return ("bad", "Gave up on a message", text);
        }
        match metrics.received.get() {
            0 => {
                let text = "Listening; there was no message yet".to_owned();
                ("good", "Listening", text)
            }
            _ => ("good", "Relaying", format!("Relaying{waiting}")),
        }
    }
}

impl fmt::Display for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, since) = (&self.what, span(age(self.since)));
        write!(f, "{what} has been failing for {since}: {}; ", self.reason)?;
        match self.next.saturating_duration_since(Instant::now()) {
            Duration::ZERO => write!(f, "trying again now"),
            wait => write!(f, "next attempt in {}", span(wait)),
        }
    }
}

/// Returns how long something has lasted. Clocks differ between machines: a message can seem to come from the
/// future.
pub(super) fn age(since: SystemTime) -> Duration {
    since.elapsed().unwrap_or_default()
}

/// Returns a duration in words.
pub(super) fn span(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}
