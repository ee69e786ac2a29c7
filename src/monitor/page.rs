//! The page at `/`: what is happening now, and the last messages. Never a payload. Subjects, reasons and names come
//! from elsewhere, so that every text is escaped here and the policy lets no script run but the template's own.

use std::{
    collections::VecDeque,
    fmt::Write,
    sync::LazyLock,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use humantime::format_rfc3339_seconds;
use ring::digest::{SHA256, digest};

use super::{
    Monitor,
    state::{Current, age, span},
};
use crate::text::count;

const TEMPLATE: &str = include_str!("page.html");

const MAX_MESSAGES: usize = 50;

const MINUTES: u64 = 15;

/// How many attempts of each minute are remembered, picked at random.
const MAX_ATTEMPTS: usize = 500;

/// The headers that keep the page to itself.
pub(super) static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |tag: &str| {
        let (_, rest) = TEMPLATE.split_once(&format!("<{tag}>")).unwrap_or_default();
        let (content, _) = rest.split_once(&format!("</{tag}>")).unwrap_or_default();
        BASE64_STANDARD.encode(digest(&SHA256, content.as_bytes()))
    };
    format!(
        "default-src 'none'; base-uri 'none'; connect-src 'self'; form-action 'none'; frame-ancestors \
         'none'; script-src 'sha256-{}'; style-src 'sha256-{}'",
        hash("script"),
        hash("style")
    )
});

/// The data of the page that is not in the metrics.
#[derive(Default)]
pub(super) struct History {
    /// A line that says where messages come from and where they go.
    about: String,
    pub(super) current: Option<Current>,
    messages: VecDeque<Ended>,
    /// One of each minute in which something happened.
    minutes: VecDeque<Minute>,
}

/// A message that was processed.
struct Ended {
    at: SystemTime,
    subject: String,
    outcome: &'static str,
    reason: String,
    attempts: u32,
    took: Duration,
}

#[derive(Default)]
struct Minute {
    number: u64,
    relayed: u32,
    attempts: usize,
    took: Vec<Duration>,
}

impl Minute {
    /// Returns the duration that this part of the attempts did not exceed.
    fn quantile(&self, part: f64) -> Duration {
        let mut took = self.took.clone();
        took.sort_unstable();
        let last = took.len().saturating_sub(1) as f64;
        let index = (last * part).round() as usize;
        took.get(index).copied().unwrap_or_default()
    }
}

impl History {
    pub(super) fn new(about: String) -> Self {
        Self {
            about,
            ..Self::default()
        }
    }

    /// Keeps what has become of the current message.
    pub(super) fn end(&mut self, outcome: &'static str, reason: String) {
        self.minute().relayed += u32::from(outcome == "relayed");
        self.messages.truncate(MAX_MESSAGES - 1);
        if let Some(current) = &self.current {
            self.messages.push_front(Ended {
                at: SystemTime::now(),
                subject: current.subject.clone(),
                outcome,
                reason,
                attempts: current.attempts,
                took: current.taken.elapsed(),
            });
        }
    }

    pub(super) fn begin_attempt(&mut self, attempts: u32) {
        if let Some(current) = &mut self.current {
            current.attempts = current.attempts.max(attempts);
            current.unanswered += 1;
            current.asked = Instant::now();
        }
    }

    pub(super) fn end_attempt(&mut self, took: Duration) {
        if let Some(current) = &mut self.current {
            current.unanswered = current.unanswered.saturating_sub(1);
        }
        let minute = self.minute();
        minute.attempts += 1;
        if minute.took.len() < MAX_ATTEMPTS {
            minute.took.push(took);
        } else if let Some(other) = minute.took.get_mut(fastrand::usize(..minute.attempts)) {
            *other = took;
        }
    }

    /// Returns the minute that it is.
    fn minute(&mut self) -> &mut Minute {
        let number = this_minute();
        if self.minutes.back().is_none_or(|last| last.number != number) {
            self.minutes.push_back(Minute {
                number,
                ..Minute::default()
            });
            let old = self.minutes.len().saturating_sub(MINUTES as usize);
            self.minutes.drain(..old);
        }
        let last = self.minutes.len() - 1;
        &mut self.minutes[last]
    }

    fn rows(&self) -> String {
        let mut rows = String::new();
        for message in &self.messages {
            let at = format_rfc3339_seconds(message.at).to_string();
            let clock = at.get(11..19).unwrap_or(&at);
            let class = message.outcome.split(' ').next().unwrap_or_default();
            let reason = match &message.reason[..] {
                "" => String::new(),
                reason => format!(": <bdi>{}</bdi>", escape(reason)),
            };
            let attempts = match message.attempts {
                0 | 1 => String::new(),
                attempts => format!(", {attempts} attempts"),
            };
            let _ = write!(
                rows,
                "<tr><td><time datetime=\"{at}\">{clock}</time><td><bdi>{}</bdi>\
                 <td><span class=\"{class}\">{}</span>{reason}{attempts}<td>{:.1?}",
                escape(&message.subject),
                message.outcome,
                message.took
            );
        }
        rows
    }

    /// Draws the messages of each minute, and how long the attempts took.
    fn pictures(&self) -> String {
        let oldest = this_minute() + 1 - MINUTES;
        let recent = self.minutes.iter().filter(|minute| minute.number >= oldest);
        let most = recent.clone().map(|minute| minute.relayed).max();
        let most = most.unwrap_or_default();
        let slowest = recent.clone().map(|minute| minute.quantile(0.95)).max();
        let slowest = slowest.unwrap_or_default();
        let (mut bars, mut p50, mut p95) = (String::new(), String::new(), String::new());
        let mut last = (Duration::ZERO, Duration::ZERO);
        for minute in recent {
            let x = (minute.number - oldest) * 40;
            let height = 96.0 * f64::from(minute.relayed) / f64::from(most.max(1));
            let y = 100.0 - height;
            let _ = write!(
                bars,
                "<rect x=\"{x}\" y=\"{y:.1}\" width=\"36\" height=\"{height:.1}\"/>"
            );
            last = (minute.quantile(0.5), minute.quantile(0.95));
            for (points, took) in [(&mut p50, last.0), (&mut p95, last.1)] {
                let part = took.as_secs_f64() / slowest.as_secs_f64().max(1e-6);
                let y = 100.0 - 96.0 * part;
                let _ = write!(points, "{x},{y:.1} {},{y:.1} ", x + 36);
            }
        }
        let figure = |label: String, content: String| {
            format!(
                "<figure><svg role=\"img\" aria-label=\"{label}\" viewBox=\"0 0 600 100\" \
                 preserveAspectRatio=\"none\">{content}</svg><figcaption>{label}</figcaption></figure>"
            )
        };
        let lines =
            format!("<polyline points=\"{p50}\"/><polyline class=\"p95\" points=\"{p95}\"/>");
        let durations = format!(
            "The webhook's answers: p50 {:.1?}, p95 (dashed) {:.1?}, up to {slowest:.1?}",
            last.0, last.1
        );
        figure(format!("Relayed a minute: up to {most}"), bars) + &figure(durations, lines)
    }
}

impl Monitor {
    /// Returns the page, if there is one.
    pub(super) fn page(&self) -> Option<String> {
        let state = self.state.lock();
        let history = self.history.as_ref()?.lock();
        let (mood, title, now) = state.now(&self.metrics, history.current.as_ref());
        let mut page = String::new();
        for part in TEMPLATE.split("{{") {
            let Some((name, rest)) = part.split_once("}}") else {
                page += part;
                continue;
            };
            page += &match name {
                "mood" => mood.to_owned(),
                "title" => title.to_owned(),
                "now" => escape(&now),
                "current" => current(history.current.as_ref()),
                "about" => escape(&history.about),
                "server" => escape(state.server.as_deref().unwrap_or("none")),
                "relayed" => self.metrics.relayed.get().to_string(),
                "given_up" => self.given_up().to_string(),
                "dropped" => self.metrics.dropped.get().to_string(),
                "waiting" => self.metrics.waiting_messages.get().to_string(),
                "pictures" => history.pictures(),
                "messages" => history.rows(),
                "version" => env!("CARGO_PKG_VERSION").to_owned(),
                _ => String::new(),
            };
            page += rest;
        }
        Some(page)
    }
}

fn current(current: Option<&Current>) -> String {
    let Some(current) = current else {
        return "No message is being worked on.".to_owned();
    };
    let attempts = count(current.attempts.into(), "attempt");
    let (subject, age) = (escape(&current.subject), span(age(current.since)));
    format!("Current message: <bdi>{subject}</bdi>, {age} old, {attempts}")
}

fn this_minute() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs() / 60
}

fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('>', "&gt;").replace('"', "&quot;")
}
