//! What the relay is doing, for whoever watches it: counters and states. Written where things
//! happen, read by the endpoints and by systemd.

pub mod endpoints;
mod heartbeat;
pub mod logging;

use std::{
    fmt::Write,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};

pub use self::heartbeat::Heartbeat;
use crate::{lock::lock, text};

/// What all names of metrics begin with.
const NAMESPACE: &str = "nats_webhook_relay";

/// Upper bounds of the histograms, in seconds.
const BUCKETS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 30.0,
];

/// The main loop turns at least this often; a multiple of its heartbeat.
const LONGEST_TURN: Duration = Duration::from_secs(10);

/// Counters and states.
pub struct Monitor {
    registry: Registry,
    received: IntCounter,
    relayed: IntCounter,
    given_up: IntCounterVec,
    dropped: IntCounter,
    publish_refused: IntCounter,
    log_lines_dropped: IntCounter,
    attempts: IntCounterVec,
    attempt_duration: HistogramVec,
    message_duration: Histogram,
    waiting_messages: IntGauge,
    waiting_bytes: IntGauge,
    /// Since when the current message has been waiting to be relayed, if there is one.
    current: Mutex<Option<SystemTime>>,
    current_message_age: Gauge,
    connected: IntGauge,
    reconnects: IntCounter,
    interruptions: IntCounter,
    server: Mutex<Option<String>>,
    was_connected: AtomicBool,
    subscribed: AtomicBool,
    last_turn: Mutex<Instant>,
    last_failure: Mutex<Option<String>>,
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

impl Cause {
    const ALL: [Self; 4] = [
        Self::Refused,
        Self::AttemptsUsed,
        Self::NotPublished,
        Self::Stopped,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::AttemptsUsed => "attempts_used",
            Self::NotPublished => "not_published",
            Self::Stopped => "stopped",
        }
    }
}

/// While it is there, a message is being worked on.
pub struct Working<'a>(&'a Monitor);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        *lock(&self.0.current) = None;
    }
}

/// The metrics of one destination.
pub struct DestinationMetrics {
    success: IntCounter,
    temporary: IntCounter,
    permanent: IntCounter,
    duration: Histogram,
}

impl DestinationMetrics {
    /// An attempt has succeeded.
    pub fn add_success(&self, took: Duration) {
        self.success.inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// An attempt has failed, and there may be another one or not.
    pub fn add_failure(&self, is_temporary: bool, took: Duration) {
        match is_temporary {
            true => self.temporary.inc(),
            false => self.permanent.inc(),
        }
        self.duration.observe(took.as_secs_f64());
    }
}

impl Monitor {
    /// All zero, not connected.
    ///
    /// # Errors
    /// If two metrics have the same name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new_custom(Some(NAMESPACE.to_owned()), None)?;
        let counter = |name, help| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            prometheus::Result::Ok(counter)
        };
        let gauge = |name, help| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        let counters = |name, help, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            prometheus::Result::Ok(counters)
        };
        let buckets = |name, help| HistogramOpts::new(name, help).buckets(BUCKETS.to_vec());
        let attempt_duration = HistogramVec::new(
            buckets(
                "webhook_duration_seconds",
                "How long an attempt to POST a message took.",
            ),
            &["destination"],
        )?;
        registry.register(Box::new(attempt_duration.clone()))?;
        let message_duration = Histogram::with_opts(buckets(
            "message_duration_seconds",
            "How long it took from taking a message to having republished it.",
        ))?;
        registry.register(Box::new(message_duration.clone()))?;
        let current_message_age = Gauge::new(
            "current_message_age_seconds",
            "How long ago the message being worked on was taken, or in durable mode: how long ago \
             the stream got it; 0 while there is none.",
        )?;
        registry.register(Box::new(current_message_age.clone()))?;
        let build = Opts::new("build_info", "The version that runs.")
            .const_label("version", env!("CARGO_PKG_VERSION"));
        let build = IntGauge::with_opts(build)?;
        build.set(1);
        registry.register(Box::new(build))?;
        let status = Self {
            received: counter("messages_received_total", "Messages taken from NATS.")?,
            relayed: counter("messages_relayed_total", "Messages republished.")?,
            given_up: counters(
                "messages_given_up_total",
                "Messages taken and not relayed.",
                &["reason"],
            )?,
            dropped: counter(
                "messages_dropped_total",
                "Messages that did not fit into the buffer of core mode.",
            )?,
            publish_refused: counter(
                "publish_refused_total",
                "Messages that NATS did not let be published.",
            )?,
            log_lines_dropped: counter(
                "log_lines_dropped_total",
                "Log lines that could not be written.",
            )?,
            attempts: counters(
                "webhook_attempts_total",
                "Attempts to POST a message, by the index of the destination in WEBHOOK_DESTINATION.",
                &["destination", "outcome"],
            )?,
            waiting_messages: gauge(
                "waiting_messages",
                "Messages that wait: in the buffer of core mode, or in the stream.",
            )?,
            waiting_bytes: gauge(
                "waiting_bytes",
                "What the buffer of core mode holds; 0 in durable mode.",
            )?,
            current: Mutex::default(),
            current_message_age,
            connected: gauge("connected", "Whether there is a connection to NATS.")?,
            reconnects: counter(
                "reconnects_total",
                "Connections to NATS after the first one.",
            )?,
            interruptions: counter(
                "interruptions_total",
                "Connections to NATS that were lost; in core mode messages may be lost with each.",
            )?,
            attempt_duration,
            message_duration,
            registry,
            server: Mutex::default(),
            was_connected: AtomicBool::default(),
            subscribed: AtomicBool::default(),
            last_turn: Mutex::new(Instant::now()),
            last_failure: Mutex::default(),
        };
        // A counter that is not there before its first event can't be alerted on.
        for cause in Cause::ALL {
            status.given_up.with_label_values(&[cause.label()]);
        }
        Ok(status)
    }

    /// Connected to a server.
    pub fn set_connected(&self, server: String) {
        if self.was_connected.swap(true, Relaxed) {
            self.reconnects.inc();
        }
        *lock(&self.server) = Some(server);
        self.connected.set(1);
    }

    /// The connection was lost.
    pub fn set_disconnected(&self) {
        self.interruptions.inc();
        *lock(&self.server) = None;
        self.connected.set(0);
    }

    /// Whether messages are taken.
    pub fn set_subscribed(&self, subscribed: bool) {
        self.subscribed.store(subscribed, Relaxed);
    }

    /// The main loop has come around.
    pub fn add_turn(&self) {
        *lock(&self.last_turn) = Instant::now();
    }

    /// A message was taken that has been waiting to be relayed `since` then, and is worked on for as long
    /// as what is returned is there.
    #[must_use]
    pub fn add_received(&self, since: SystemTime) -> Working<'_> {
        self.received.inc();
        *lock(&self.current) = Some(since);
        Working(self)
    }

    /// The metrics of the destination at this index in `WEBHOOK_DESTINATION`.
    #[must_use]
    pub fn destination(&self, index: usize) -> DestinationMetrics {
        let index = index.to_string();
        let counter = |outcome| self.attempts.with_label_values(&[&index[..], outcome]);
        DestinationMetrics {
            success: counter("success"),
            temporary: counter("temporary_failure"),
            permanent: counter("permanent_failure"),
            duration: self.attempt_duration.with_label_values(&[&index[..]]),
        }
    }

    /// An attempt failed, or a message.
    pub fn set_last_failure(&self, failure: String) {
        *lock(&self.last_failure) = Some(failure);
    }

    /// A message was relayed.
    pub fn add_relayed(&self, took: Duration) {
        self.relayed.inc();
        self.message_duration.observe(took.as_secs_f64());
    }

    /// A message was taken and is not relayed.
    pub fn add_given_up(&self, cause: Cause, failure: String) {
        self.given_up.with_label_values(&[cause.label()]).inc();
        self.set_last_failure(failure);
    }

    /// Counts messages that did not fit into the buffer, or that it was ended with.
    pub fn add_dropped(&self, messages: u64) {
        self.dropped.inc_by(messages);
    }

    /// NATS did not let a message be published.
    pub fn add_publish_refused(&self) {
        self.publish_refused.inc();
    }

    /// What waits.
    pub fn set_waiting(&self, messages: u64, bytes: usize) {
        self.waiting_messages
            .set(i64::try_from(messages).unwrap_or(i64::MAX));
        self.waiting_bytes
            .set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Why the main loop is thought to hang, if it is.
    ///
    /// # Errors
    /// With the reason.
    pub fn alive(&self) -> Result<(), String> {
        let since = lock(&self.last_turn).elapsed();
        if since >= LONGEST_TURN {
            return Err(format!("the main loop has been stuck for {since:.0?}"));
        }
        Ok(())
    }

    /// Why messages are not being taken, if they are not.
    ///
    /// # Errors
    /// With the reason.
    pub fn ready(&self) -> Result<(), String> {
        if lock(&self.server).is_none() {
            return Err("not connected to NATS".to_owned());
        }
        if !self.subscribed.load(Relaxed) {
            return Err("not subscribed".to_owned());
        }
        Ok(())
    }

    /// All metrics in the Prometheus text format, version 0.0.4.
    ///
    /// # Errors
    /// If they can't be put into it.
    pub fn metrics(&self) -> prometheus::Result<String> {
        let since = *lock(&self.current);
        // Clocks differ between machines: a message can seem to come from the future.
        let age = since.and_then(|since| since.elapsed().ok());
        self.current_message_age
            .set(age.unwrap_or_default().as_secs_f64());
        let counter = &self.log_lines_dropped;
        counter.inc_by(logging::dropped().saturating_sub(counter.get()));
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// The essence in one bounded line, without secrets.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = match &*lock(&self.server) {
            Some(server) => format!("connected to {server}"),
            None => "waiting for NATS".to_owned(),
        };
        let given_up: u64 = Cause::ALL
            .into_iter()
            .map(|cause| self.given_up.with_label_values(&[cause.label()]).get())
            .sum();
        let _ = write!(
            line,
            ", {} relayed, {given_up} given up, {} dropped, {} waiting",
            self.relayed.get(),
            self.dropped.get(),
            self.waiting_messages.get()
        );
        if let Some(failure) = &*lock(&self.last_failure) {
            let _ = write!(line, "; last failure: {failure}");
        }
        text::one_line(&line, text::LONGEST_NOTE).into_owned()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_main_loop_that_does_not_come_around_is_not_alive() {
        let monitor = Monitor::new().unwrap();
        assert_eq!(monitor.alive(), Ok(()));
        *lock(&monitor.last_turn) -= LONGEST_TURN + Duration::from_secs(2);
        let reason = monitor.alive().unwrap_err();
        assert_eq!(reason, "the main loop has been stuck for 12s");
        monitor.add_turn();
        assert_eq!(monitor.alive(), Ok(()));
    }
}
