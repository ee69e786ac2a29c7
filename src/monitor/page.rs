//! The page at `/`: what is happening now, and the last messages. Never a payload. Subjects, reasons and names come
//! from elsewhere, so every text is escaped here.

use std::{
    fmt::Write,
    time::{Duration, Instant, SystemTime},
};

use humantime::{FormattedDuration, format_duration, format_rfc3339_seconds};

use super::{Current, Ended, Failing, GIVEN_UP, Monitor, State, age, metrics::Metrics};
use crate::text::count;

/// A response that takes longer than this is mentioned.
const LONG: Duration = Duration::from_secs(1);

impl Monitor {
    /// Returns the page.
    pub(super) fn page(&self) -> String {
        let state = self.state.lock();
        let (mood, now) = state.now(&self.metrics);
        let [relayed, given_up, dropped, waiting] = self.metrics.counts();
        let server = state.server.as_deref().unwrap_or("none");
        format!(
            include_str!("page.html"),
            mood = mood,
            now = escape(&now),
            current = current(state.current.as_ref()),
            about = escape(self.about.as_deref().unwrap_or_default()),
            server = escape(server),
            relayed = relayed,
            given_up = given_up,
            dropped = dropped,
            waiting = waiting,
            pictures = state.minutes.pictures(),
            messages = state.messages.iter().map(row).collect::<String>(),
            version = env!("CARGO_PKG_VERSION")
        )
    }
}

impl State {
    /// Returns the mood of the state, and a sentence about it.
    pub(super) fn now(&self, metrics: &Metrics) -> (&'static str, String) {
        let current = self.current.as_ref();
        let [.., waiting] = metrics.counts();
        let waiting = match waiting {
            0 => String::new(),
            1 => "; 1 message waits".to_owned(),
            waiting => format!("; {waiting} messages wait"),
        };
        if self.is_stopping {
            let current = current.map(|current| format!(": finishing {}", current.subject));
            return ("wait", format!("Stopping{}", current.unwrap_or_default()));
        }
        if let Err(reason) = &self.server {
            let text = format!("Waiting for NATS for {}: {reason}", span(self.since));
            return ("bad", text);
        }
        if let Some(obstacle) = &self.obstacle {
            return ("bad", format!("Not taking messages: {obstacle}"));
        }
        if let Some(Current { failing, asked, .. }) = current {
            if !failing.is_empty() {
                let failing: Vec<_> = failing.iter().map(Failing::sentence).collect();
                return ("bad", failing.join(". ") + &waiting);
            }
            if let Some(asked) = *asked
                && age(asked) >= LONG
            {
                let text = format!(
                    "Waiting for the webhook's answer for {}{waiting}",
                    span(asked)
                );
                return ("wait", text);
            }
        }
        match self.messages.front() {
            Some(last) if last.outcome == GIVEN_UP => {
                let (
                    ago,
                    Ended {
                        subject, reason, ..
                    },
                ) = (span(last.at), last);
                ("bad", format!("Gave up on {subject} {ago} ago: {reason}"))
            }
            _ if metrics.received.get() == 0 => ("good", "Listening; no messages yet".to_owned()),
            _ => ("good", format!("Relaying{waiting}")),
        }
    }
}

impl Failing {
    fn sentence(&self) -> String {
        let Self { what, reason, .. } = self;
        let next = match self.next.saturating_duration_since(Instant::now()) {
            Duration::ZERO => "trying again now".to_owned(),
            wait => format!("next attempt in {}s", wait.as_secs()),
        };
        let since = span(self.since);
        format!("{what} has been failing for {since}: {reason}; {next}")
    }
}

fn current(current: Option<&Current>) -> String {
    let Some(current) = current else {
        return "No current message.".to_owned();
    };
    let attempts = count(current.attempts.into(), "attempt");
    let (subject, age) = (escape(&current.subject), span(current.since));
    format!("Current message: <bdi>{subject}</bdi>, {age} old, {attempts}")
}

fn row(message: &Ended) -> String {
    let at = format_rfc3339_seconds(message.at).to_string();
    let clock = at.get(11..19).unwrap_or(&at);
    let (subject, outcome) = (escape(&message.subject), message.outcome);
    let class = outcome.split(' ').next().unwrap_or_default();
    let mut row = format!(
        "<tr><td><time datetime=\"{at}\">{clock}</time><td><bdi>{subject}</bdi>\
         <td><span class=\"{class}\">{outcome}</span>"
    );
    // Writing to a string never fails.
    if !message.reason.is_empty() {
        let _ = write!(row, ": <bdi>{}</bdi>", escape(&message.reason));
    }
    if message.attempts > 1 {
        let _ = write!(row, ", {} attempts", message.attempts);
    }
    let _ = write!(row, "<td>{:.1?}", message.took);
    row
}

/// Returns how long something has lasted, in whole seconds.
fn span(since: SystemTime) -> FormattedDuration {
    format_duration(Duration::from_secs(age(since).as_secs()))
}

fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('>', "&gt;").replace('"', "&quot;")
}
