//! The environment → a validated [`Config`], with every problem in one report.

use std::{net::SocketAddr, time::Duration};

use async_nats::jetstream::consumer::DeliverPolicy;

mod environment;
mod files;
mod nats;
mod reader;
mod variables;
mod webhook;

#[cfg(any(fuzzing, test))]
pub(crate) use self::environment::read_value;
pub use self::{
    environment::Environment,
    nats::Nats,
    variables::{Default, Kind, VARIABLES, Variable, help},
    webhook::{Destination, PassHeaders, Webhook, without_secrets},
};
use self::{
    reader::{Reader, any_text, parse_choice, parse_duration},
    variables::*,
};
pub(crate) use self::{
    variables::{FAILED_STREAM, RELAYED_STREAM},
    webhook::authority,
};
use crate::subject::Prefix;

/// All settings.
#[derive(Debug)]
pub struct Config {
    /// The NATS servers and how to log in.
    pub nats: Nats,
    /// Listens on `<prefix>.>`.
    pub prefix: Prefix,
    /// Republishes under this prefix.
    pub relayed_prefix: Prefix,
    /// Publishes failed messages under this prefix.
    pub failed_prefix: Option<Prefix>,
    /// The prefix of the reply inboxes.
    pub inbox_prefix: Prefix,
    /// The stream that must confirm republished messages.
    pub relayed_stream: Option<String>,
    /// The stream that must confirm failed messages.
    pub failed_stream: Option<String>,
    /// The JetStream domain that all streams are in, if it is not the server's own.
    pub domain: Option<String>,
    /// Where messages come from.
    pub mode: Mode,
    /// The message at which a consumer that the relay creates begins.
    pub deliver_policy: DeliverPolicy,
    /// Where and how to POST.
    pub webhook: Webhook,
    /// Wait between the webhook's success and the republishing.
    pub republish_delay: Duration,
    /// How long a stop waits for the current message.
    pub shutdown_timeout: Duration,
    /// Where the status endpoints listen.
    pub status_listen: Option<SocketAddr>,
}

/// Where messages come from, which decides when they can be lost.
#[derive(Clone, Debug)]
pub enum Mode {
    /// A core NATS subscription: at most once.
    Core {
        /// Replicas in the same group share the messages.
        queue_group: Option<String>,
    },
    /// A durable JetStream consumer: at least once.
    Durable {
        /// The stream.
        stream: String,
        /// The name of the durable consumer.
        consumer: String,
    },
}

/// Returns the log filter, in env_logger's syntax, and whether to log JSON, even if other settings are invalid.
#[must_use]
pub fn log(environment: &Environment) -> (String, bool) {
    read_log(&mut Reader::new(environment))
}

fn read_log(reader: &mut Reader<'_>) -> (String, bool) {
    let is_json = |text: &str| parse_choice(text, &[("text", false), ("json", true)]);
    (
        reader.value(LOG, any_text),
        reader.value(LOG_FORMAT, is_json),
    )
}

impl Config {
    /// Reads and validates all settings.
    ///
    /// # Errors
    /// Every problem found, each a sentence that names the variable, the fault and the fix.
    pub fn from_environment(environment: &Environment) -> Result<Self, Vec<String>> {
        let reader = &mut Reader::new(environment);
        let mode = Mode::read(reader);
        let config = Self {
            webhook: Webhook::read(reader, &mode),
            nats: Nats::read(reader),
            prefix: reader.value(PREFIX, parse_prefix),
            relayed_prefix: reader.value(RELAYED_PREFIX, parse_prefix),
            failed_prefix: reader.optional(FAILED_PREFIX, parse_prefix),
            inbox_prefix: reader.value(INBOX_PREFIX, parse_prefix),
            relayed_stream: reader.optional(RELAYED_STREAM, parse_name),
            failed_stream: reader.optional(FAILED_STREAM, parse_name),
            domain: reader.optional(DOMAIN, parse_name),
            mode,
            deliver_policy: reader.value(DELIVER_POLICY, parse_deliver_policy),
            republish_delay: reader.value(REPUBLISH_DELAY, parse_duration),
            shutdown_timeout: reader.value(SHUTDOWN_TIMEOUT, parse_duration),
            status_listen: reader.optional(STATUS_LISTEN, parse_address),
        };
        refuse_overlaps(reader, &config);
        if reader.is_set(FAILED_STREAM) && !reader.is_set(FAILED_PREFIX) {
            let problem = format!("is not set, but {FAILED_STREAM} is; set both or neither");
            reader.note(FAILED_PREFIX, &problem);
        }
        // Only for its problems; the logger reads its settings itself.
        read_log(reader);
        match reader.problems.is_empty() {
            true => Ok(config),
            false => Err(reader.problems.clone()),
        }
    }
}

impl Mode {
    /// Reads the mode: durable if a stream is set, else core.
    fn read(reader: &mut Reader<'_>) -> Self {
        let durable = reader.both_or_neither((STREAM, parse_name), (CONSUMER, parse_name));
        let queue_group = reader.optional(QUEUE_GROUP, |text| parse_word(text, ""));
        if durable.is_some() && queue_group.is_some() {
            let problem = format!(
                "is for core mode, but {STREAM} is set; unset one of them: replicas share {CONSUMER}"
            );
            reader.note(QUEUE_GROUP, &problem);
        }
        match durable {
            Some((stream, consumer)) => Self::Durable { stream, consumer },
            None => Self::Core { queue_group },
        }
    }
}

/// Verifies that no prefixes overlap, so that a published message is never taken again, or mistaken for another kind.
fn refuse_overlaps(reader: &mut Reader<'_>, config: &Config) {
    let mut prefixes = vec![
        (PREFIX, &config.prefix),
        (RELAYED_PREFIX, &config.relayed_prefix),
        (INBOX_PREFIX, &config.inbox_prefix),
    ];
    prefixes.extend(config.failed_prefix.iter().map(|it| (FAILED_PREFIX, it)));
    // The placeholder of a bad one means nothing.
    prefixes.retain(|(name, _)| !reader.has_problem(name));
    for (index, (name, prefix)) in prefixes.iter().enumerate() {
        for (earlier_name, earlier) in &prefixes[..index] {
            if prefix.overlaps(earlier) {
                let problem = format!(
                    "{prefix} overlaps with {earlier_name} {earlier}, so that one message would be \
                     taken for another; choose prefixes none of which begins with another"
                );
                reader.note(name, &problem);
            }
        }
    }
}

fn parse_prefix(text: &str) -> Result<Prefix, String> {
    text.parse()
        .map_err(|problem| format!("{text:?} {problem}"))
}

/// Parses the name of a stream or a consumer (NATS ADR-6).
fn parse_name(text: &str) -> Result<String, String> {
    parse_word(text, ".*>/\\")
}

/// Parses a name without white space or `bad` characters.
fn parse_word(text: &str, bad: &str) -> Result<String, String> {
    let is_bad = |c: char| c.is_whitespace() || c.is_control() || bad.contains(c);
    match text.contains(is_bad) {
        true => Err(format!(
            "{text:?} is not a valid name; write it without white space {bad}"
        )),
        false => Ok(text.to_owned()),
    }
}

fn parse_deliver_policy(text: &str) -> Result<DeliverPolicy, String> {
    use DeliverPolicy::{All, LastPerSubject as Last, New};

    parse_choice(
        text,
        &[("all", All), ("new", New), ("last_per_subject", Last)],
    )
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("{text:?} is not a valid address and port; write it like 127.0.0.1:9642")
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use async_nats::ServerAddr;

    use super::{variables::*, *};

    const GOOD: [(&str, &str); 4] = [
        (DESTINATION, "http://localhost:3000/hook"),
        (HOST, "nats://localhost"),
        (PREFIX, "cms.cache"),
        (RELAYED_PREFIX, "relayed.cache"),
    ];

    /// Returns a valid configuration with changes; an empty value removes the variable.
    pub(super) fn with(changes: &[(&str, &str)]) -> Result<Config, Vec<String>> {
        let variables = GOOD
            .iter()
            .filter(|(name, _)| !changes.iter().any(|(changed, _)| changed == name))
            .chain(changes);
        Config::from_environment(&variables.copied().collect())
    }

    pub(super) fn problems(changes: &[(&str, &str)]) -> Vec<String> {
        with(changes).err().unwrap_or_default()
    }

    /// Asserts that each value makes one problem, which names the variable and the fault.
    pub(super) fn assert_refused(cases: &[(&str, &str, &str)]) {
        for (name, value, fault) in cases {
            let problems = problems(&[(name, value)]);
            assert_eq!(problems.len(), 1, "{name}={value}: {problems:?}");
            assert!(problems[0].contains(fault), "{name}={value}: {problems:?}");
            assert!(problems[0].contains(name), "{name}={value}: {problems:?}");
        }
    }

    #[test]
    fn defaults_are_those_of_the_table() {
        let config = with(&[]).unwrap();
        assert_eq!(config.webhook.timeout, Duration::from_secs(15));
        assert_eq!(config.webhook.max_attempts, Some(5));
        assert_eq!(config.shutdown_timeout, Duration::from_secs(20));
        assert!(config.nats.login.is_anonymous());
    }

    #[test]
    fn every_setting_is_taken() {
        let config = with(&[
            (HOST, "nats://a:1, tls://b"),
            (USER, "u"),
            (PASS, "p"),
            (TIMEOUT, "500ms"),
            (MAX_ATTEMPTS, "0"),
            (SHUTDOWN_TIMEOUT, "2m"),
        ])
        .unwrap();
        let hosts: Vec<_> = config.nats.servers.iter().map(ServerAddr::host).collect();
        assert_eq!(hosts, ["a", "b"]);
        let auth = config.nats.login.answer(b"nonce").unwrap();
        assert_eq!(auth.username.as_deref(), Some("u"));
        assert_eq!(auth.password.as_deref(), Some("p"));
        assert_eq!(config.webhook.timeout, Duration::from_millis(500));
        assert_eq!(config.webhook.max_attempts, None);
        assert_eq!(config.shutdown_timeout, Duration::from_secs(120));
    }

    #[test]
    fn durable_mode_tries_without_end_unless_told_otherwise() {
        let durable = [(STREAM, "CMS"), (CONSUMER, "relay")];
        let config = with(&durable).unwrap();
        assert!(matches!(&config.mode, Mode::Durable { stream, consumer }
            if stream == "CMS" && consumer == "relay"));
        assert_eq!(config.webhook.max_attempts, None);
        let config = with(&[durable[0], durable[1], (MAX_ATTEMPTS, "3")]).unwrap();
        assert_eq!(config.webhook.max_attempts, Some(3));
        let problems = problems(&[durable[0], durable[1], (QUEUE_GROUP, "g")]);
        assert!(
            problems.len() == 1 && problems[0].starts_with(QUEUE_GROUP),
            "{problems:?}"
        );
    }

    #[test]
    fn every_refusal_names_the_variable_and_the_fault() {
        assert_refused(&[
            (LOG_FORMAT, "yaml", "write text or json"),
            (PREFIX, "", "not set"),
            (PREFIX, "cms.cache.", "empty token"),
            (PREFIX, "cms.>", "wildcard"),
            (PREFIX, "cms.*.x", "wildcard"),
            (PREFIX, "cms cache", "white space"),
            (RELAYED_PREFIX, "", "not set"),
            (RELAYED_PREFIX, "a..b", "empty token"),
            (RELAYED_PREFIX, "cms.cache", "overlaps"),
            (RELAYED_PREFIX, "cms.cache.relayed", "overlaps"),
            (RELAYED_PREFIX, "cms", "overlaps"),
            (RELAYED_PREFIX, "_INBOX.x", "overlaps"),
            (
                PREFIX,
                &"x".repeat(5000),
                "is longer than a NATS subject can be",
            ),
            (FAILED_PREFIX, "cms.cache.failed", "overlaps"),
            (FAILED_PREFIX, "relayed.cache", "overlaps"),
            (FAILED_PREFIX, "failed.", "empty token"),
            (INBOX_PREFIX, "_INBOX.>", "wildcard"),
            (INBOX_PREFIX, "cms.cache.inbox", "overlaps"),
            (INBOX_PREFIX, "relayed", "overlaps"),
            (STREAM, "CMS", "NATS_CONSUMER is not set"),
            (CONSUMER, "relay", "NATS_STREAM is not set"),
            (STREAM, "C.M.S", "is not a valid name"),
            (STREAM, "C M", "is not a valid name"),
            (STREAM, "C\u{1}M", "is not a valid name"),
            (RELAYED_STREAM, "RELAYED.>", "is not a valid name"),
            (DOMAIN, "h.ub", "is not a valid name"),
            (
                FAILED_STREAM,
                "FAILED",
                "NATS_FAILED_SUBJECT_PREFIX is not set",
            ),
            (
                DELIVER_POLICY,
                "last",
                "write all or new or last_per_subject",
            ),
            (QUEUE_GROUP, "a b", "is not a valid name"),
            (SHUTDOWN_TIMEOUT, "soon", "is not a valid duration"),
            (STATUS_LISTEN, "9642", "is not a valid address and port"),
            (
                STATUS_LISTEN,
                "localhost:9642",
                "is not a valid address and port",
            ),
        ]);
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let nothing = Config::from_environment(&Environment::default()).unwrap_err();
        assert_eq!(nothing.len(), 4, "{nothing:?}");
        let changes = [
            (TIMEOUT, "x"),
            (MAX_ATTEMPTS, "x"),
            (SHUTDOWN_TIMEOUT, "x"),
            (USER, "u"),
        ];
        assert_eq!(problems(&changes).len(), 4);
    }

    #[test]
    fn no_secret_is_shown() {
        let config = with(&[
            (
                DESTINATION,
                "http://user:hunter2@host/path?token=hunter2#hunter2",
            ),
            (USER, "u"),
            (PASS, "hunter2"),
            (SECRET, "whsec_aHVudGVyMmh1bnRlcjJodW50ZXIyaHVudGVyMg=="),
        ])
        .unwrap();
        let shown = format!("{config:?}");
        for secret in ["hunter2", "aHVudGVyMm"] {
            assert!(!shown.contains(secret), "{shown}");
        }
        for harmless in ["http://host/path", "REDACTED"] {
            assert!(shown.contains(harmless), "{shown}");
        }
        assert_eq!(
            config.webhook.destinations[0].to_string(),
            "http://host/path"
        );
        for (name, value) in [
            (DESTINATION, "htp://user:hunter2@host"),
            (DESTINATION, "http://user:hunter2@host:x"),
            (HOST, "nats://user:hunter2@host"),
            (HOST, "nats://user:hunter2@host:x"),
            (HOST, "user:hunter2@host"),
            (PASS, "hunter2"),
            // Secrets in the place of the files that hold them.
            (NKEY, "hunter2"),
            (CREDS, "hunter2"),
            (KEY, "hunter2"),
            ("NATS_TOKEN_FILE", "hunter2"),
            ("WEBHOOK_HEADER_X_FILE", "hunter2"),
        ] {
            let problems = problems(&[(name, value)]).concat();
            assert!(
                !problems.is_empty() && !problems.contains("hunter2"),
                "{problems}"
            );
        }
    }
}
