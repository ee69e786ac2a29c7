//! The one table of all environment variables. `--help`, docs/settings.md, `.env.example` and the
//! NixOS module are tested against it.

use self::Default::{Off, Required, Value};

/// One environment variable that the program knows.
#[derive(Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// The kind of its value.
    pub kind: Kind,
    /// Its default.
    pub default: Default,
    /// Its meaning, as a sentence fragment.
    pub meaning: &'static str,
}

/// The default of a [`Variable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Default {
    /// It must be set, to something like this.
    Required(&'static str),
    /// None: the feature is off.
    Off,
    /// This value.
    Value(&'static str),
}

/// The kind of value of a [`Variable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A value that may be shown.
    Plain,
    /// A value that must not be shown.
    Secret,
    /// The path of a file, so there is no `X_FILE`.
    File,
}

/// Defines a constant for each name, and one table of them all.
macro_rules! variables {
    ($($constant:ident = $name:literal, $kind:ident, $default:expr, $meaning:literal;)*) => {
        $(pub(crate) const $constant: &str = $name;)*

        /// Every variable.
        pub const VARIABLES: &[Variable] = &[$(Variable {
            name: $constant,
            kind: Kind::$kind,
            default: $default,
            meaning: $meaning,
        }),*];
    };
}

variables! {
    DESTINATION = "WEBHOOK_DESTINATION", Plain, Required("http://localhost:3000/api/cache/webhook"), "http(s) URL to POST to, or several separated by white space: all must succeed";
    HOST = "NATS_HOST", Plain, Required("nats://localhost:4222"), "nats://, tls://, ws:// or wss:// URL of a NATS server, or several separated by commas";
    ADDRESS = "NATS_ADDRESS", Plain, Off, "another name for NATS_HOST";
    PREFIX = "NATS_SUBJECT_PREFIX", Plain, Required("cms.cache"), "listens on <prefix>.>";
    RELAYED_PREFIX = "NATS_RELAYED_SUBJECT_PREFIX", Plain, Required("relayed.cache"), "republishes under this prefix; each environment needs its own";
    USER = "NATS_USER", Plain, Off, "NATS user, together with NATS_PASS";
    PASS = "NATS_PASS", Secret, Off, "password of the NATS user";
    TOKEN = "NATS_TOKEN", Secret, Off, "NATS token";
    NKEY = "NATS_NKEY", File, Off, "file with the seed of an nkey";
    CREDS = "NATS_CREDS", File, Off, "file with the JWT and the seed of a NATS user";
    CA = "NATS_CA", File, Off, "PEM file with the CAs to trust for TLS to NATS, instead of the system's";
    CERT = "NATS_CERT", File, Off, "PEM file with a client certificate for NATS, together with NATS_KEY";
    KEY = "NATS_KEY", File, Off, "PEM file with the key of the client certificate";
    TLS_FIRST = "NATS_TLS_FIRST", Plain, Value("false"), "true: the TLS handshake comes first, as with handshake_first of nats-server";
    IGNORE_DISCOVERED = "NATS_IGNORE_DISCOVERED_SERVERS", Plain, Value("false"), "true: only the servers of NATS_HOST, not those that a cluster advertises";
    INBOX_PREFIX = "NATS_INBOX_PREFIX", Plain, Value("_INBOX"), "prefix of reply inboxes, for a user that may not use _INBOX.>";
    QUEUE_GROUP = "NATS_QUEUE_GROUP", Plain, Off, "core mode: replicas in a group share the messages, whose order is then not kept";
    STREAM = "NATS_STREAM", Plain, Off, "durable mode: the JetStream stream, together with NATS_CONSUMER";
    CONSUMER = "NATS_CONSUMER", Plain, Off, "durable mode: its durable consumer, created if missing";
    DELIVER_POLICY = "NATS_DELIVER_POLICY", Plain, Value("all"), "where a consumer that the relay creates begins: all, new, last_per_subject";
    DOMAIN = "NATS_JS_DOMAIN", Plain, Off, "the JetStream domain of all streams in these settings, for example behind a leaf node";
    FAILED_PREFIX = "NATS_FAILED_SUBJECT_PREFIX", Plain, Off, "publishes failed messages under this prefix, with the reason";
    RELAYED_STREAM = "NATS_RELAYED_STREAM", Plain, Off, "the stream that must confirm each republished message";
    FAILED_STREAM = "NATS_FAILED_STREAM", Plain, Off, "the stream that must confirm each failed message";
    TIMEOUT = "WEBHOOK_TIMEOUT", Plain, Value("15s"), "longest time for one attempt, including the connection";
    MAX_ATTEMPTS = "WEBHOOK_MAX_ATTEMPTS", Plain, Value("5"), "attempts per message; 0 means no limit, and is the default in durable mode";
    GIVE_UP_ON = "WEBHOOK_GIVE_UP_ON", Plain, Off, "statuses on which the relay gives up at once, such as 400 404 422, 4xx, or none";
    PASS_HEADERS = "WEBHOOK_PASS_HEADERS", Plain, Off, "message headers to copy to the request, such as ce-* content-encoding";
    EVERY_ADDRESS = "WEBHOOK_EVERY_ADDRESS", Plain, Value("false"), "true: every address of a destination's name has to succeed";
    SECRET = "WEBHOOK_SECRET", Secret, Off, "Standard Webhooks secrets whsec_..., separated by white space; signs every request";
    WEBHOOK_CA = "WEBHOOK_CA", File, Off, "PEM file with the CAs to trust for https destinations, instead of the system's";
    WEBHOOK_CERT = "WEBHOOK_CERT", File, Off, "PEM file with a client certificate for https destinations, with WEBHOOK_KEY";
    WEBHOOK_KEY = "WEBHOOK_KEY", File, Off, "PEM file with the key of that certificate";
    HEADER = "WEBHOOK_HEADER_<NAME>", Secret, Off, "adds a request header: WEBHOOK_HEADER_X_KEY=... sends x-key";
    TRUST = "SSL_CERT_FILE", File, Off, "PEM file with the CAs to trust for https and TLS, instead of the system's";
    HTTP_PROXY = "HTTP_PROXY", Plain, Off, "proxy for http destinations; never used for localhost and loopback addresses";
    HTTPS_PROXY = "HTTPS_PROXY", Plain, Off, "the same for https destinations";
    NO_PROXY = "NO_PROXY", Plain, Off, "hosts, domains and networks to reach without a proxy, separated by commas; * means all";
    REPUBLISH_DELAY = "REPUBLISH_DELAY", Plain, Value("0s"), "wait between the webhook's success and the republishing";
    SHUTDOWN_TIMEOUT = "SHUTDOWN_TIMEOUT", Plain, Value("20s"), "how long a stopping relay may take to finish messages";
    STATUS_LISTEN = "STATUS_LISTEN", Plain, Off, "address:port of the status page, /livez, /readyz and /metrics, such as 127.0.0.1:9642";
    LOG = "RUST_LOG", Plain, Value("info"), "error, warn, info, debug, trace, off, or an env_logger filter";
    LOG_FORMAT = "LOG_FORMAT", Plain, Value("text"), "text, or json for one object per line";
}

/// The prefix of all variables of the family [`HEADER`].
pub(super) const HEADER_PREFIX: &str = "WEBHOOK_HEADER_";

/// Finds the variable of this name, if it is in the table.
pub(super) fn find(name: &str) -> Option<&'static Variable> {
    VARIABLES.iter().find(|variable| variable.name == name)
}

/// The suffix of the variable that names a file with the value of another one.
pub(super) const FILE_SUFFIX: &str = "_FILE";

/// Returns whether there is an `X_FILE` for this variable.
pub(super) fn has_file_form(name: &str) -> bool {
    find(name).is_none_or(|variable| variable.kind != Kind::File)
}

/// Returns whether a name means something to the relay.
pub(super) fn is_known(name: &str) -> bool {
    let is_file_of = |stem: &str| find(stem).is_some() && has_file_form(stem);
    find(name).is_some()
        || name.starts_with(HEADER_PREFIX)
        || name.strip_suffix(FILE_SUFFIX).is_some_and(is_file_of)
        || name.ends_with("_proxy") && find(&name.to_uppercase()).is_some()
}

/// Writes the table as `--help` shows it.
#[must_use]
pub fn help() -> String {
    let entry = |variable: &Variable| {
        let default = match variable.default {
            Required(_) => " (required)".to_owned(),
            Off => String::new(),
            Value(value) => format!(" (default: {value})"),
        };
        format!("  {}{default}\n      {}\n", variable.name, variable.meaning)
    };
    VARIABLES.iter().map(entry).collect()
}
