//! The one table of all environment variables. `--help`, docs/settings.md, `.env.example` and the
//! NixOS module are tested against it.

use std::fmt;

use super::environment::FILE_SUFFIX;

/// One environment variable that the program knows.
#[derive(Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What it means, in one sentence fragment.
    pub meaning: &'static str,
    /// What holds if it is not set.
    pub default: Default,
    /// Where another default holds, and which.
    pub note: Option<&'static str>,
    /// What kind of value it takes.
    pub kind: Kind,
}

/// What holds if a [`Variable`] is not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Default {
    /// It must be set.
    Required,
    /// Nothing: the feature is off.
    Off,
    /// This value.
    Value(&'static str),
}

/// What kind of value a [`Variable`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A value that may be shown.
    Plain,
    /// A value that must not be shown.
    Secret,
    /// The path of a file, which is why there is no `X_FILE`.
    File,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Secret => "secret",
            Self::File => "file",
        })
    }
}

impl Variable {
    const fn required(name: &'static str, meaning: &'static str) -> Self {
        Self {
            default: Default::Required,
            ..Self::optional(name, meaning)
        }
    }

    const fn optional(name: &'static str, meaning: &'static str) -> Self {
        Self {
            name,
            meaning,
            default: Default::Off,
            note: None,
            kind: Kind::Plain,
        }
    }

    const fn default(self, value: &'static str) -> Self {
        Self {
            default: Default::Value(value),
            ..self
        }
    }

    const fn note(self, note: &'static str) -> Self {
        Self {
            note: Some(note),
            ..self
        }
    }

    const fn secret(self) -> Self {
        Self {
            kind: Kind::Secret,
            ..self
        }
    }

    const fn file(self) -> Self {
        Self {
            kind: Kind::File,
            ..self
        }
    }

    /// The variable of this name, if it stands in the table.
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        VARIABLES.iter().find(|variable| variable.name == name)
    }
}

pub(super) const DESTINATION: &str = "WEBHOOK_DESTINATION";
pub(super) const HOST: &str = "NATS_HOST";
pub(super) const ADDRESS: &str = "NATS_ADDRESS";
pub(super) const PREFIX: &str = "NATS_SUBJECT_PREFIX";
pub(super) const RELAYED_PREFIX: &str = "NATS_RELAYED_SUBJECT_PREFIX";
pub(super) const USER: &str = "NATS_USER";
pub(super) const PASS: &str = "NATS_PASS";
pub(super) const TOKEN: &str = "NATS_TOKEN";
pub(super) const NKEY: &str = "NATS_NKEY";
pub(super) const CREDS: &str = "NATS_CREDS";
pub(super) const CA: &str = "NATS_CA";
pub(super) const CERT: &str = "NATS_CERT";
pub(super) const KEY: &str = "NATS_KEY";
pub(super) const TLS_FIRST: &str = "NATS_TLS_FIRST";
pub(super) const INBOX_PREFIX: &str = "NATS_INBOX_PREFIX";
pub(super) const DOMAIN: &str = "NATS_JS_DOMAIN";
pub(super) const QUEUE_GROUP: &str = "NATS_QUEUE_GROUP";
pub(super) const STREAM: &str = "NATS_STREAM";
pub(super) const CONSUMER: &str = "NATS_CONSUMER";
pub(super) const FAILED_PREFIX: &str = "NATS_FAILED_SUBJECT_PREFIX";
pub(crate) const RELAYED_STREAM: &str = "NATS_RELAYED_STREAM";
pub(crate) const FAILED_STREAM: &str = "NATS_FAILED_STREAM";
pub(super) const TIMEOUT: &str = "WEBHOOK_TIMEOUT";
pub(super) const MAX_ATTEMPTS: &str = "WEBHOOK_MAX_ATTEMPTS";
pub(super) const EVERY_ADDRESS: &str = "WEBHOOK_EVERY_ADDRESS";
pub(super) const SECRET: &str = "WEBHOOK_SECRET";
pub(super) const WEBHOOK_CA: &str = "WEBHOOK_CA";
pub(super) const WEBHOOK_CERT: &str = "WEBHOOK_CERT";
pub(super) const WEBHOOK_KEY: &str = "WEBHOOK_KEY";
pub(super) const HEADER: &str = "WEBHOOK_HEADER_<NAME>";
pub(super) const TRUST: &str = "SSL_CERT_FILE";
pub(super) const HTTP_PROXY: &str = "HTTP_PROXY";
pub(super) const HTTPS_PROXY: &str = "HTTPS_PROXY";
pub(super) const NO_PROXY: &str = "NO_PROXY";
pub(super) const REPUBLISH_DELAY: &str = "REPUBLISH_DELAY";
pub(super) const SHUTDOWN_TIMEOUT: &str = "SHUTDOWN_TIMEOUT";
pub(super) const STATUS_LISTEN: &str = "STATUS_LISTEN";
pub(super) const LOG: &str = "RUST_LOG";
pub(super) const LOG_FORMAT: &str = "LOG_FORMAT";

/// What all variables of the family [`HEADER`] begin with.
pub(super) const HEADER_PREFIX: &str = "WEBHOOK_HEADER_";

/// Every variable.
pub const VARIABLES: &[Variable] = &[
    Variable::required(
        DESTINATION,
        "http(s) URL that each message is POSTed to; several, separated by white space: all must succeed",
    ),
    Variable::required(
        HOST,
        "nats://, tls://, ws:// or wss:// URL of a NATS server; several, separated by commas",
    ),
    Variable::optional(ADDRESS, "another name for NATS_HOST"),
    Variable::required(PREFIX, "listens on <prefix>.>"),
    Variable::required(
        RELAYED_PREFIX,
        "republishes under this prefix; each environment needs its own",
    ),
    Variable::optional(USER, "NATS user, together with NATS_PASS"),
    Variable::optional(PASS, "password of the NATS user").secret(),
    Variable::optional(TOKEN, "NATS token").secret(),
    Variable::optional(NKEY, "file with the seed of an nkey").file(),
    Variable::optional(CREDS, "file with the JWT and the seed of a NATS user").file(),
    Variable::optional(
        CA,
        "PEM file with the CAs to trust for TLS to NATS, instead of the system's",
    )
    .file(),
    Variable::optional(
        CERT,
        "PEM file with a client certificate for NATS, together with NATS_KEY",
    )
    .file(),
    Variable::optional(KEY, "PEM file with the key of the client certificate").file(),
    Variable::optional(
        TLS_FIRST,
        "true: the TLS handshake comes first, as a server with handshake_first wants it",
    )
    .default("false"),
    Variable::optional(
        INBOX_PREFIX,
        "answers of NATS come under this prefix, for a user that may not subscribe to _INBOX.>",
    )
    .default("_INBOX"),
    Variable::optional(
        QUEUE_GROUP,
        "core mode: replicas in a group share the messages, without order across them",
    ),
    Variable::optional(
        STREAM,
        "durable mode: the JetStream stream, together with NATS_CONSUMER",
    ),
    Variable::optional(
        CONSUMER,
        "durable mode: the name of the durable consumer, created if it is missing",
    ),
    Variable::optional(
        DOMAIN,
        "the JetStream domain of all streams that are named, as behind a leaf node",
    ),
    Variable::optional(
        FAILED_PREFIX,
        "publishes a message that is given up under this prefix, with the reason",
    ),
    Variable::optional(
        RELAYED_STREAM,
        "the stream that keeps what is republished, and must confirm each message",
    ),
    Variable::optional(
        FAILED_STREAM,
        "the stream that keeps what is given up, and must confirm each message",
    ),
    Variable::optional(TIMEOUT, "longest time for one attempt, connecting included").default("15s"),
    Variable::optional(
        MAX_ATTEMPTS,
        "attempts per message before it is given up; 0 means no limit",
    )
    .default("5")
    .note("in durable mode 0"),
    Variable::optional(
        EVERY_ADDRESS,
        "true: every address of a destination's name is a replica, and has to be told",
    )
    .default("false"),
    Variable::optional(
        SECRET,
        "Standard Webhooks secrets whsec_..., separated by white space; signs every request",
    )
    .secret(),
    Variable::optional(
        WEBHOOK_CA,
        "PEM file with the CAs to trust for https destinations, instead of the system's",
    )
    .file(),
    Variable::optional(
        WEBHOOK_CERT,
        "PEM file with a client certificate for https destinations, together with WEBHOOK_KEY",
    )
    .file(),
    Variable::optional(WEBHOOK_KEY, "PEM file with the key of that certificate").file(),
    Variable::optional(
        HEADER,
        "adds a request header: WEBHOOK_HEADER_X_KEY=... sends x-key",
    )
    .secret(),
    Variable::optional(
        TRUST,
        "PEM file with the CAs to trust for https and TLS, instead of the system's",
    )
    .file(),
    Variable::optional(
        HTTP_PROXY,
        "proxy for http destinations; never used for localhost and loopback addresses",
    ),
    Variable::optional(HTTPS_PROXY, "the same for https destinations"),
    Variable::optional(
        NO_PROXY,
        "hosts, domains and networks to reach without a proxy, separated by commas; * is all",
    ),
    Variable::optional(
        REPUBLISH_DELAY,
        "wait between the webhook's success and the republishing",
    )
    .default("0s"),
    Variable::optional(
        SHUTDOWN_TIMEOUT,
        "how long a stop waits for the current message",
    )
    .default("20s"),
    Variable::optional(
        STATUS_LISTEN,
        "address:port for /livez, /readyz and /metrics, such as 127.0.0.1:9642",
    ),
    Variable::optional(
        LOG,
        "what is logged: error, warn, info, debug, trace, or an env_logger filter",
    )
    .default("info"),
    Variable::optional(
        LOG_FORMAT,
        "how it is logged: text, or json for one object a line",
    )
    .default("text"),
];

/// Returns whether a name means something to the relay.
pub(super) fn is_known(name: &str) -> bool {
    let stem = name.strip_suffix(FILE_SUFFIX);
    name.starts_with(HEADER_PREFIX)
        || VARIABLES.iter().any(|variable| {
            variable.name == name || (variable.kind != Kind::File && stem == Some(variable.name))
        })
}

/// No line of the help is longer, in characters.
const HELP_WIDTH: usize = 100;

/// The table of variables as `--help` shows it.
#[must_use]
pub fn help() -> String {
    let width = VARIABLES
        .iter()
        .map(|variable| variable.name.len())
        .max()
        .unwrap_or_default();
    let mut help = String::new();
    for variable in VARIABLES {
        let default = match (variable.default, variable.note) {
            (Default::Required, _) => " (required)".to_owned(),
            (Default::Off, _) => String::new(),
            (Default::Value(value), None) => format!(" (default: {value})"),
            (Default::Value(value), Some(note)) => format!(" (default: {value}, {note})"),
        };
        let mut name = variable.name;
        let mut line = String::new();
        for word in format!("{}{default}", variable.meaning).split(' ') {
            if "   ".len() + width + line.len() + 1 + word.len() > HELP_WIDTH {
                help += &format!("  {name:width$} {line}\n");
                (name, line) = ("", String::new());
            }
            line += " ";
            line += word;
        }
        help += &format!("  {name:width$} {line}\n");
    }
    help
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_has_the_defaults_in_lines_that_are_as_long_as_they_may_be() {
        let help = help();
        let lines: Vec<_> = help.lines().collect();
        assert!(lines.iter().all(|line| line.len() <= HELP_WIDTH), "{help}");
        for default in [
            " (required)",
            " (default: 15s)",
            " (default: 5, in durable mode 0)",
        ] {
            assert!(help.contains(default), "{default}: {help}");
        }
        for pair in lines.windows(2) {
            // The second of these goes on with the text of the first.
            if pair[1].starts_with("   ") {
                let word = pair[1].split_whitespace().next().unwrap_or_default();
                assert!(pair[0].len() + 1 + word.len() > HELP_WIDTH, "{help}");
            }
        }
    }
}
