//! The metrics, in Prometheus's format.

use std::time::Duration;

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder, register_gauge_with_registry, register_histogram_vec_with_registry,
    register_int_counter_vec_with_registry, register_int_counter_with_registry,
};

use super::logging;

/// The prefix of the relay's own metrics.
const NAMESPACE: &str = "nats_webhook_relay";

/// Upper bounds of the histograms, in seconds.
const BUCKETS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 30.0,
];

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

/// How an attempt ended.
#[derive(Clone, Copy, Debug)]
pub enum Attempt {
    Succeeded,
    /// There may be another attempt.
    FailedForNow,
    FailedForGood,
}

/// The labels of these, in their order.
const OUTCOMES: [&str; 3] = ["success", "temporary_failure", "permanent_failure"];

/// All metrics.
pub struct Metrics {
    registry: Registry,
    pub(super) received: IntCounter,
    pub(super) relayed: IntCounter,
    pub(super) message_duration: Histogram,
    /// One per cause.
    pub(super) given_up: [IntCounter; CAUSES.len()],
    /// Messages that did not fit into core mode's buffer, or were left in it.
    pub dropped: IntCounter,
    /// Messages that the server refused.
    pub publish_refused: IntCounter,
    pub(super) unfinished: IntCounter,
    /// Attempts to publish that the stream did not confirm.
    pub unconfirmed: IntCounter,
    attempts: IntCounterVec,
    attempt_duration: HistogramVec,
    pub(super) waiting_messages: Gauge,
    pub(super) waiting_bytes: Gauge,
    current_message_age: Gauge,
    pub(super) connected: Gauge,
    pub(super) reconnects: IntCounter,
    pub(super) interruptions: IntCounter,
    log_lines_dropped: IntCounter,
}

impl Metrics {
    /// Returns metrics that are all zero.
    ///
    /// # Errors
    /// If two metrics have the same name.
    pub(super) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        #[cfg(target_os = "linux")]
        registry.register(Box::new(
            prometheus::process_collector::ProcessCollector::for_self(),
        ))?;
        let options = |name, help| Opts::new(name, help).namespace(NAMESPACE);
        let counter =
            |name, help| register_int_counter_with_registry!(options(name, help), registry);
        let gauge = |name, help| register_gauge_with_registry!(options(name, help), registry);
        let counters = |name, help, labels: &[&str]| {
            register_int_counter_vec_with_registry!(options(name, help), labels, registry)
        };
        let histograms = |name, help, labels: &[&str]| {
            let options = HistogramOpts::from(options(name, help)).buckets(BUCKETS.to_vec());
            register_histogram_vec_with_registry!(options, labels, registry)
        };
        let build = options("build_info", "The running version.");
        let build = build.const_label("version", env!("CARGO_PKG_VERSION"));
        register_gauge_with_registry!(build, registry)?.set(1.0);
        let given_up = counters(
            "messages_given_up_total",
            "Messages that the relay gave up on, by reason.",
            &["reason"],
        )?;
        Ok(Self {
            received: counter("messages_received_total", "Messages taken from NATS.")?,
            relayed: counter("messages_relayed_total", "Messages republished.")?,
            message_duration: histograms(
                "message_duration_seconds",
                "Time from taking a message to republishing it.",
                &[],
            )?
            .with_label_values::<&str>(&[]),
            // An alert misses an event that creates its counter.
            given_up: CAUSES.map(|cause| given_up.with_label_values(&[cause])),
            dropped: counter(
                "messages_dropped_total",
                "Messages that did not fit into core mode's buffer, or were left in it when the relay stopped.",
            )?,
            publish_refused: counter(
                "publish_refused_total",
                "Messages that NATS refused to accept.",
            )?,
            unfinished: counter(
                "messages_unfinished_total",
                "Messages that stayed in the stream: abandoned, unfinished when the relay stopped, or with an unconfirmed ack.",
            )?,
            unconfirmed: counter(
                "confirmations_missed_total",
                "Attempts to publish a message that were not confirmed by the stream that has to keep it.",
            )?,
            attempts: counters(
                "webhook_attempts_total",
                "Attempts to POST a message, by outcome and by the index of the destination in \
                 WEBHOOK_DESTINATION.",
                &["destination", "outcome"],
            )?,
            attempt_duration: histograms(
                "webhook_duration_seconds",
                "How long an attempt to POST a message took.",
                &["destination"],
            )?,
            waiting_messages: gauge(
                "waiting_messages",
                "Messages that wait: in the buffer of core mode, or in the stream.",
            )?,
            waiting_bytes: gauge(
                "waiting_bytes",
                "What the buffer of core mode holds; 0 in durable mode.",
            )?,
            current_message_age: gauge(
                "current_message_age_seconds",
                "How long ago the current message was taken (in durable mode: stored in the stream); 0 \
                 while there is none.",
            )?,
            connected: gauge("connected", "Whether there is a connection to NATS.")?,
            reconnects: counter(
                "reconnects_total",
                "Connections to NATS after the first one.",
            )?,
            interruptions: counter(
                "interruptions_total",
                "Connections to NATS that were lost; in core mode messages may be lost with each.",
            )?,
            log_lines_dropped: counter(
                "log_lines_dropped_total",
                "Log lines that could not be written.",
            )?,
            registry,
        })
    }

    /// Returns the metrics of the destination at this index in `WEBHOOK_DESTINATION`.
    #[must_use]
    pub fn destination(&self, index: usize) -> DestinationMetrics {
        let index = index.to_string();
        DestinationMetrics {
            attempts: OUTCOMES
                .map(|outcome| self.attempts.with_label_values(&[&index[..], outcome])),
            duration: self.attempt_duration.with_label_values(&[&index[..]]),
        }
    }

    /// Returns how many messages were relayed, given up on and dropped, and how many wait.
    pub(super) fn counts(&self) -> [u64; 4] {
        [
            self.relayed.get(),
            self.given_up.iter().map(IntCounter::get).sum(),
            self.dropped.get(),
            self.waiting_messages.get() as u64,
        ]
    }

    /// Returns all metrics in the Prometheus text format, version 0.0.4.
    pub(super) fn text(&self, current_message_age: Duration) -> prometheus::Result<String> {
        self.current_message_age
            .set(current_message_age.as_secs_f64());
        let counter = &self.log_lines_dropped;
        counter.inc_by(logging::dropped().saturating_sub(counter.get()));
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// The metrics of one destination.
pub struct DestinationMetrics {
    /// One of each outcome.
    attempts: [IntCounter; OUTCOMES.len()],
    duration: Histogram,
}

impl DestinationMetrics {
    /// Notes that an attempt has ended.
    pub fn add(&self, attempt: Attempt, took: Duration) {
        self.attempts[attempt as usize].inc();
        self.duration.observe(took.as_secs_f64());
    }
}
