//! The environment → a validated [`Config`], with every problem in one report.

use std::{collections::BTreeSet, fmt, net::SocketAddr, path::PathBuf, time::Duration};

use async_nats::ServerAddr;
use percent_encoding::percent_decode_str;
use reqwest::{
    Url,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use secrecy::SecretString;

pub mod environment;
mod files;
mod log_filter;
mod misnamed;
mod proxies;
mod secrets;

use self::{
    environment::{Environment, FILE_SUFFIX},
    files::{check_certificates, check_key, read_credentials, read_nkey},
    proxies::Proxies,
};
pub use self::{
    misnamed::{Misnamed, misnamed, nearest},
    proxies::Proxy,
    secrets::Secrets,
};
use crate::{subject::Prefix, webhook::signing::SigningSecret};

/// One environment variable that the program knows.
#[derive(Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What it means, in one sentence fragment.
    pub meaning: &'static str,
    /// What holds if it is not set.
    pub default: Default,
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

const DESTINATION: &str = "WEBHOOK_DESTINATION";
const HOST: &str = "NATS_HOST";
const ADDRESS: &str = "NATS_ADDRESS";
const PREFIX: &str = "NATS_SUBJECT_PREFIX";
const RELAYED_PREFIX: &str = "NATS_RELAYED_SUBJECT_PREFIX";
const USER: &str = "NATS_USER";
const PASS: &str = "NATS_PASS";
const TOKEN: &str = "NATS_TOKEN";
const NKEY: &str = "NATS_NKEY";
const CREDS: &str = "NATS_CREDS";
const CA: &str = "NATS_CA";
const CERT: &str = "NATS_CERT";
const KEY: &str = "NATS_KEY";
const QUEUE_GROUP: &str = "NATS_QUEUE_GROUP";
const STREAM: &str = "NATS_STREAM";
const CONSUMER: &str = "NATS_CONSUMER";
const FAILED_PREFIX: &str = "NATS_FAILED_SUBJECT_PREFIX";
pub(crate) const RELAYED_STREAM: &str = "NATS_RELAYED_STREAM";
pub(crate) const FAILED_STREAM: &str = "NATS_FAILED_STREAM";
const TIMEOUT: &str = "WEBHOOK_TIMEOUT";
const MAX_ATTEMPTS: &str = "WEBHOOK_MAX_ATTEMPTS";
const SECRET: &str = "WEBHOOK_SECRET";
const HEADER: &str = "WEBHOOK_HEADER_<NAME>";
const REPUBLISH_DELAY: &str = "REPUBLISH_DELAY";
const SHUTDOWN_TIMEOUT: &str = "SHUTDOWN_TIMEOUT";
const STATUS_LISTEN: &str = "STATUS_LISTEN";
const LOG: &str = "RUST_LOG";
const TRUST: &str = "SSL_CERT_FILE";
const HTTP_PROXY: &str = "HTTP_PROXY";
const HTTPS_PROXY: &str = "HTTPS_PROXY";
const NO_PROXY: &str = "NO_PROXY";
const TLS_FIRST: &str = "NATS_TLS_FIRST";

/// What all variables of the family [`HEADER`] begin with.
const HEADER_PREFIX: &str = "WEBHOOK_HEADER_";

/// Every variable. `--help`, the README and `.env.example` are tested against this table.
pub const VARIABLES: &[Variable] = &[
    Variable {
        name: DESTINATION,
        meaning: "http(s) URL that each message is POSTed to; several, separated by white space: all must succeed",
        default: Default::Required,
        kind: Kind::Plain,
    },
    Variable {
        name: HOST,
        meaning: "nats:// or tls:// URL of a NATS server; several, separated by commas",
        default: Default::Required,
        kind: Kind::Plain,
    },
    Variable {
        name: ADDRESS,
        meaning: "another name for NATS_HOST",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: PREFIX,
        meaning: "listens on <prefix>.>",
        default: Default::Required,
        kind: Kind::Plain,
    },
    Variable {
        name: RELAYED_PREFIX,
        meaning: "republishes under this prefix; each environment needs its own",
        default: Default::Required,
        kind: Kind::Plain,
    },
    Variable {
        name: USER,
        meaning: "NATS user, together with NATS_PASS",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: PASS,
        meaning: "password of the NATS user",
        default: Default::Off,
        kind: Kind::Secret,
    },
    Variable {
        name: TOKEN,
        meaning: "NATS token",
        default: Default::Off,
        kind: Kind::Secret,
    },
    Variable {
        name: NKEY,
        meaning: "file with the seed of an nkey",
        default: Default::Off,
        kind: Kind::File,
    },
    Variable {
        name: CREDS,
        meaning: "file with the JWT and the seed of a NATS user",
        default: Default::Off,
        kind: Kind::File,
    },
    Variable {
        name: CA,
        meaning: "PEM file with the CAs to trust for TLS to NATS, instead of the system's",
        default: Default::Off,
        kind: Kind::File,
    },
    Variable {
        name: CERT,
        meaning: "PEM file with a client certificate for NATS, together with NATS_KEY",
        default: Default::Off,
        kind: Kind::File,
    },
    Variable {
        name: KEY,
        meaning: "PEM file with the key of the client certificate",
        default: Default::Off,
        kind: Kind::File,
    },
    Variable {
        name: TLS_FIRST,
        meaning: "true: the TLS handshake comes first, as a server with handshake_first wants it",
        default: Default::Value("false"),
        kind: Kind::Plain,
    },
    Variable {
        name: QUEUE_GROUP,
        meaning: "core mode: replicas in a group share the messages, without order across them",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: STREAM,
        meaning: "durable mode: the JetStream stream, together with NATS_CONSUMER",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: CONSUMER,
        meaning: "durable mode: the name of the durable consumer, created if it is missing",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: FAILED_PREFIX,
        meaning: "publishes a message that is given up under this prefix, with the reason",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: RELAYED_STREAM,
        meaning: "the stream that keeps what is republished, and must confirm each message",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: FAILED_STREAM,
        meaning: "the stream that keeps what is given up, and must confirm each message",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: TIMEOUT,
        meaning: "longest time for one attempt, connecting included",
        default: Default::Value("15s"),
        kind: Kind::Plain,
    },
    Variable {
        name: MAX_ATTEMPTS,
        meaning: "attempts per message before it is given up; 0 is without end",
        default: Default::Value("5, in durable mode 0"),
        kind: Kind::Plain,
    },
    Variable {
        name: SECRET,
        meaning: "Standard Webhooks secrets whsec_..., separated by white space; signs every request",
        default: Default::Off,
        kind: Kind::Secret,
    },
    Variable {
        name: HEADER,
        meaning: "adds a request header: WEBHOOK_HEADER_X_KEY=... sends x-key",
        default: Default::Off,
        kind: Kind::Secret,
    },
    Variable {
        name: TRUST,
        meaning: "PEM file with the CAs to trust for https and TLS, instead of the system's",
        default: Default::Off,
        kind: Kind::File,
    },
    Variable {
        name: HTTP_PROXY,
        meaning: "proxy for http destinations; never used for localhost and loopback addresses",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: HTTPS_PROXY,
        meaning: "the same for https destinations",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: NO_PROXY,
        meaning: "hosts, domains and networks to reach without a proxy, separated by commas; * is all",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: REPUBLISH_DELAY,
        meaning: "wait between the webhook's success and the republishing",
        default: Default::Value("0s"),
        kind: Kind::Plain,
    },
    Variable {
        name: SHUTDOWN_TIMEOUT,
        meaning: "how long a stop waits for the message in hand",
        default: Default::Value("20s"),
        kind: Kind::Plain,
    },
    Variable {
        name: STATUS_LISTEN,
        meaning: "address:port for /livez, /readyz and /metrics, such as 127.0.0.1:9642",
        default: Default::Off,
        kind: Kind::Plain,
    },
    Variable {
        name: LOG,
        meaning: "what is logged: error, warn, info, debug, trace, or an env_logger filter",
        default: Default::Value("info"),
        kind: Kind::Plain,
    },
];

/// Everything that can be set.
#[derive(Debug)]
pub struct Config {
    /// The NATS servers and how to log in.
    pub nats: Nats,
    /// Listens on `<prefix>.>`.
    pub prefix: Prefix,
    /// Republishes under this one.
    pub relayed_prefix: Prefix,
    /// Publishes under this one what is given up.
    pub failed_prefix: Option<Prefix>,
    /// The stream that must confirm what is republished.
    pub relayed_stream: Option<String>,
    /// The stream that must confirm what is given up.
    pub failed_stream: Option<String>,
    /// Where messages come from.
    pub mode: Mode,
    /// Where and how to POST.
    pub webhook: Webhook,
    /// Wait between the webhook's success and the republishing.
    pub republish_delay: Duration,
    /// How long a stop waits for the message in hand.
    pub shutdown_timeout: Duration,
    /// Where the status endpoints listen.
    pub status_listen: Option<SocketAddr>,
    /// What is logged, in the form that env_logger knows.
    pub log_filter: String,
}

/// Where messages come from, and so what is lost when.
#[derive(Clone, Debug)]
pub enum Mode {
    /// A core NATS subscription: at most once.
    Core {
        /// Replicas in the same group share the messages.
        queue_group: Option<String>,
    },
    /// A durable consumer of JetStream: at least once.
    Durable {
        /// The stream.
        stream: String,
        /// The name of the durable consumer.
        consumer: String,
    },
}

/// The NATS servers and how to log in.
#[derive(Debug)]
pub struct Nats {
    /// Servers of one cluster; at least one.
    pub servers: Vec<ServerAddr>,
    /// How to log in.
    pub login: Login,
    /// PEM file with the CAs to trust, instead of the system's. It is read at each connection, and so
    /// is the certificate.
    pub ca: Option<PathBuf>,
    /// PEM files with a client certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// Whether a connection without TLS is out of the question.
    pub requires_tls: bool,
    /// Whether the TLS handshake comes before the server's greeting.
    pub tls_first: bool,
}

/// How to log in to NATS.
#[derive(Debug)]
pub enum Login {
    /// Not at all.
    Anonymous,
    /// With `NATS_USER` and `NATS_PASS`.
    Password {
        /// The user.
        user: String,
        /// Its password.
        password: SecretString,
    },
    /// With `NATS_TOKEN`.
    Token(SecretString),
    /// With the seed that `NATS_NKEY` holds.
    Nkey(SecretString),
    /// With the JWT and the seed that `NATS_CREDS` holds.
    Credentials(SecretString),
}

impl Login {
    /// What to look at where the server refuses it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Anonymous => "set NATS_USER and NATS_PASS, NATS_TOKEN, NATS_NKEY or NATS_CREDS",
            Self::Password { .. } => "check NATS_USER and NATS_PASS",
            Self::Token(_) => "check NATS_TOKEN",
            Self::Nkey(_) => "check NATS_NKEY",
            Self::Credentials(_) => "check NATS_CREDS",
        }
    }
}

/// Where and how to POST.
#[derive(Debug)]
pub struct Webhook {
    /// The URLs; at least one. All must succeed.
    pub destinations: Vec<Destination>,
    /// Added to every request.
    pub headers: HeaderMap,
    /// Every request is signed with each of them.
    pub secrets: Vec<SigningSecret>,
    /// Longest time for one attempt, connecting included.
    pub timeout: Duration,
    /// Attempts per message; without end if none.
    pub max_attempts: Option<u32>,
    /// PEM file with the CAs to trust for https, instead of the system's.
    pub trust: Option<PathBuf>,
}

/// A URL to POST to. `Display` and `Debug` show neither its userinfo nor its query.
#[derive(Clone)]
pub struct Destination {
    url: Url,
    proxy: Option<Proxy>,
}

impl Destination {
    /// The URL with all its secrets.
    #[must_use]
    pub fn expose_url(&self) -> &Url {
        &self.url
    }

    /// The proxy through which it is reached, if it is.
    #[must_use]
    pub fn proxy(&self) -> Option<&Proxy> {
        self.proxy.as_ref()
    }

    /// Whether it is reached by TLS.
    #[must_use]
    pub fn is_https(&self) -> bool {
        self.url.scheme() == "https"
    }

    /// Its host and port, as `host:port`.
    #[must_use]
    pub fn authority(&self) -> String {
        authority(&self.url)
    }
}

/// The host and port of a URL, as `host:port`.
pub(crate) fn authority(url: &Url) -> String {
    let port = url.port_or_known_default().unwrap_or_default();
    format!("{}:{port}", url.host_str().unwrap_or_default())
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&without_secrets(&self.url))
    }
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `url` without its userinfo, query and fragment.
#[must_use]
pub fn without_secrets(url: &Url) -> String {
    let port = url
        .port()
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    format!(
        "{}://{}{port}{}",
        url.scheme(),
        url.host_str().unwrap_or_default(),
        url.path()
    )
}

impl Webhook {
    /// The secrets that are sent to the destinations.
    #[must_use]
    pub fn sent_secrets(&self) -> Secrets {
        Secrets::of(&self.destinations, &self.headers)
    }
}

impl Config {
    /// Reads and validates all settings.
    ///
    /// # Errors
    /// Every problem found, each a sentence that names the variable, the fault and the remedy.
    pub fn from_environment(environment: &Environment) -> Result<Self, Vec<String>> {
        let mut reader = Reader::new(environment);
        let destinations = reader.parsed(DESTINATION, parse_destinations);
        let proxies = Proxies::read(&mut reader);
        let trust = reader.optional(TRUST, check_certificates);
        let servers = servers(&mut reader);
        let prefix = reader.parsed(PREFIX, parse_prefix);
        let relayed_prefix = reader.parsed(RELAYED_PREFIX, parse_own_prefix);
        let login = login(&mut reader);
        let (ca, certificate) = tls_files(&mut reader);
        let tls_first = reader.parsed(TLS_FIRST, parse_bool);
        let timeout = reader.parsed(TIMEOUT, parse_timeout);
        let mode = mode(&mut reader);
        let max_attempts = match reader.set(MAX_ATTEMPTS) {
            Some(_) => reader.parsed(MAX_ATTEMPTS, parse_max_attempts),
            None => Some(mode.as_ref().and_then(Mode::default_max_attempts)),
        };
        let headers = headers(&mut reader);
        let secrets = reader
            .optional(SECRET, parse_secrets)
            .map(Option::unwrap_or_default);
        let republish_delay = reader.parsed(REPUBLISH_DELAY, parse_duration);
        let shutdown_timeout = reader.parsed(SHUTDOWN_TIMEOUT, parse_duration);
        let failed_prefix = reader.optional(FAILED_PREFIX, parse_own_prefix);
        let relayed_stream = reader.optional(RELAYED_STREAM, parse_name);
        let failed_stream = reader.optional(FAILED_STREAM, parse_name);
        if let (Some(None), Some(Some(_))) = (&failed_prefix, &failed_stream) {
            reader.problem(
                FAILED_PREFIX,
                &format!(
                    "is not set, but {FAILED_STREAM} is; set it too, or unset {FAILED_STREAM}"
                ),
            );
        }
        let prefixes = [
            (PREFIX, prefix.as_ref()),
            (RELAYED_PREFIX, relayed_prefix.as_ref()),
            (
                FAILED_PREFIX,
                failed_prefix.as_ref().and_then(Option::as_ref),
            ),
        ];
        refuse_overlaps(&mut reader, &prefixes);
        let status_listen = reader.optional(STATUS_LISTEN, parse_address);
        let log_filter = reader.parsed(LOG, log_filter::parse);
        let config = (|| {
            let (trust, ca, certificate, tls_first) = (trust?, ca?, certificate?, tls_first?);
            Some(Self {
                nats: Nats {
                    servers: servers?,
                    login: login?,
                    // Whoever names a CA or a certificate for NATS wants no connection without TLS.
                    requires_tls: ca.is_some() || certificate.is_some() || tls_first,
                    ca: ca.or_else(|| trust.clone()),
                    certificate,
                    tls_first,
                },
                prefix: prefix?,
                relayed_prefix: relayed_prefix?,
                failed_prefix: failed_prefix?,
                relayed_stream: relayed_stream?,
                failed_stream: failed_stream?,
                mode: mode?,
                webhook: Webhook {
                    destinations: through(destinations?, &proxies?),
                    trust,
                    headers: headers?,
                    secrets: secrets?,
                    timeout: timeout?,
                    max_attempts: max_attempts?,
                },
                republish_delay: republish_delay?,
                shutdown_timeout: shutdown_timeout?,
                status_listen: status_listen?,
                log_filter: log_filter?,
            })
        })();
        reader.finish(config)
    }
}

/// Takes variables from the environment and collects the problems. What it hands out is empty only
/// where a problem was noted or the variable is [`Default::Off`].
struct Reader<'a> {
    environment: &'a Environment,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    fn new(environment: &'a Environment) -> Self {
        Self {
            environment,
            problems: Vec::new(),
        }
    }

    fn problem(&mut self, name: &str, problem: &str) {
        self.problems.push(format!("{name} {problem}"));
    }

    /// What the environment has for a variable.
    fn look_up(&self, name: &str) -> Result<Option<String>, String> {
        let names_a_file =
            |variable: &Variable| variable.name == name && variable.kind == Kind::File;
        if VARIABLES.iter().any(names_a_file) {
            self.environment.text(name)
        } else {
            self.environment.text_or_file(name)
        }
    }

    /// The value of a variable, if it is set.
    fn set(&mut self, name: &str) -> Option<String> {
        self.look_up(name).unwrap_or_else(|problem| {
            self.problem(name, &problem);
            None
        })
    }

    /// The value of a variable, or its default.
    fn text(&mut self, name: &str) -> Option<String> {
        let problems = self.problems.len();
        let value = self.set(name);
        if value.is_some() || self.problems.len() > problems {
            return value;
        }
        let variable = VARIABLES.iter().find(|variable| variable.name == name)?;
        match variable.default {
            Default::Value(text) => Some(text.to_owned()),
            Default::Off => None,
            Default::Required => {
                self.problem(
                    name,
                    &format!("is required, but not set: {}", variable.meaning),
                );
                None
            }
        }
    }

    /// The value of a variable, or its default, parsed.
    fn parsed<T>(
        &mut self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.text(name)?;
        parse(&text)
            .map_err(|problem| self.problem(name, &problem))
            .ok()
    }

    /// The value of a variable that may be unset, parsed; empty only where a problem was noted.
    fn optional<T>(
        &mut self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        match self.look_up(name) {
            Ok(None) => Some(None),
            _ => self.parsed(name, parse).map(Some),
        }
    }

    /// The whole, or all problems on the way to it.
    fn finish<T>(self, whole: Option<T>) -> Result<T, Vec<String>> {
        match whole {
            Some(whole) if self.problems.is_empty() => Ok(whole),
            _ => Err(self.problems),
        }
    }
}

/// `NATS_HOST`, or its other name.
fn servers(reader: &mut Reader<'_>) -> Option<Vec<ServerAddr>> {
    let name = match (reader.look_up(HOST), reader.look_up(ADDRESS)) {
        (Ok(Some(host)), Ok(Some(address))) if host != address => {
            reader.problem(
                HOST,
                &format!("and {ADDRESS} have different values; keep one of them"),
            );
            return None;
        }
        (Ok(None), Ok(Some(_))) | (Ok(_), Err(_)) => ADDRESS,
        _ => HOST,
    };
    reader.parsed(name, parse_servers)
}

/// Durable mode if a stream is set, else core mode.
fn mode(reader: &mut Reader<'_>) -> Option<Mode> {
    let stream = reader.optional(STREAM, parse_name);
    let consumer = reader.optional(CONSUMER, parse_name);
    let queue_group = reader.optional(QUEUE_GROUP, parse_group);
    let durable = both_or_neither(reader, (STREAM, stream), (CONSUMER, consumer));
    match (durable?, queue_group?) {
        (None, queue_group) => Some(Mode::Core { queue_group }),
        (Some((stream, consumer)), None) => Some(Mode::Durable { stream, consumer }),
        (Some(_), Some(_)) => {
            reader.problem(
                QUEUE_GROUP,
                &format!(
                    "is for core mode, but {STREAM} is set; unset it: replicas share {CONSUMER}"
                ),
            );
            None
        }
    }
}

/// Two variables of which none makes sense without the other.
fn both_or_neither<A, B>(
    reader: &mut Reader<'_>,
    (a_name, a): (&str, Option<Option<A>>),
    (b_name, b): (&str, Option<Option<B>>),
) -> Option<Option<(A, B)>> {
    let (missing, set) = match (a?, b?) {
        (Some(a), Some(b)) => return Some(Some((a, b))),
        (None, None) => return Some(None),
        (Some(_), None) => (b_name, a_name),
        (None, Some(_)) => (a_name, b_name),
    };
    let problem = format!("is not set, but {set} is; set both or neither");
    reader.problem(missing, &problem);
    None
}

impl Mode {
    /// Attempts per message where `WEBHOOK_MAX_ATTEMPTS` is not set; without end if none.
    fn default_max_attempts(&self) -> Option<u32> {
        match self {
            Self::Core { .. } => Some(5),
            Self::Durable { .. } => None,
        }
    }
}

/// What is published below one prefix must not be taken again, or be taken for something else.
fn refuse_overlaps(reader: &mut Reader<'_>, prefixes: &[(&str, Option<&Prefix>)]) {
    for (index, (name, prefix)) in prefixes.iter().enumerate() {
        for (earlier_name, earlier) in &prefixes[..index] {
            if let (Some(prefix), Some(earlier)) = (prefix, earlier)
                && prefix.overlaps(earlier)
            {
                reader.problem(
                    name,
                    &format!(
                        "{prefix} overlaps with {earlier_name} {earlier}, which makes a loop; \
                         choose prefixes of which none begins another"
                    ),
                );
            }
        }
    }
}

/// The one way to log in that is set.
fn login(reader: &mut Reader<'_>) -> Option<Login> {
    let set: Vec<_> = [USER, TOKEN, NKEY, CREDS]
        .into_iter()
        .filter(|name| !matches!(reader.look_up(name), Ok(None)))
        .collect();
    if let [first, others @ ..] = &set[..]
        && !others.is_empty()
    {
        let others = others.join(", ");
        reader.problem(
            first,
            &format!("and {others} are both set; keep one way to log in"),
        );
        return None;
    }
    let token = reader.optional(TOKEN, |text| Ok(Login::Token(text.into())));
    let nkey = reader.optional(NKEY, |path| read_nkey(path).map(Login::Nkey));
    let credentials = reader.optional(CREDS, |path| read_credentials(path).map(Login::Credentials));
    let user = reader.optional(USER, |text| Ok(text.to_owned()));
    let password = reader.optional(PASS, |text| Ok(text.into()));
    let password = both_or_neither(reader, (USER, user), (PASS, password))?
        .map(|(user, password)| Login::Password { user, password });
    let login = password.or(token?).or(nkey?).or(credentials?);
    Some(login.unwrap_or(Login::Anonymous))
}

/// A client certificate and its key.
type Certificate = (PathBuf, PathBuf);

/// The CA file, and the files of the client certificate.
fn tls_files(reader: &mut Reader<'_>) -> (Option<Option<PathBuf>>, Option<Option<Certificate>>) {
    let ca = reader.optional(CA, check_certificates);
    let certificate = reader.optional(CERT, check_certificates);
    let key = reader.optional(KEY, check_key);
    (ca, both_or_neither(reader, (CERT, certificate), (KEY, key)))
}

/// The destinations, each with the proxy through which it is reached.
fn through(urls: Vec<Url>, proxies: &Proxies) -> Vec<Destination> {
    urls.into_iter()
        .map(|url| Destination {
            proxy: proxies.choose(&url),
            url,
        })
        .collect()
}

/// The headers of all `WEBHOOK_HEADER_<NAME>`.
fn headers(reader: &mut Reader<'_>) -> Option<HeaderMap> {
    let names: BTreeSet<String> = reader
        .environment
        .names()
        .filter(|name| name.starts_with(HEADER_PREFIX))
        .map(|name| {
            // WEBHOOK_HEADER_FILE is the header `file`.
            let stem = name.strip_suffix(FILE_SUFFIX);
            let stem = stem.filter(|stem| stem.starts_with(HEADER_PREFIX));
            stem.unwrap_or(name).to_owned()
        })
        .collect();
    let mut headers = HeaderMap::new();
    let mut good = true;
    for variable in names {
        match reader.parsed(&variable, |value| parse_header(&variable, value)) {
            Some((name, value)) => drop(headers.insert(name, value)),
            None => good = false,
        }
    }
    good.then_some(headers)
}

/// Headers that the relay sets itself, or that would break the request (RFC 9110, 7.6.1).
const RESERVED_HEADERS: [&str; 18] = [
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "te",
    "traceparent",
    "tracestate",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "webhook-id",
    "webhook-signature",
    "webhook-timestamp",
    "x-nats-subject",
];

/// `WEBHOOK_HEADER_X_KEY` is the header `x-key`.
fn parse_header(variable: &str, value: &str) -> Result<(HeaderName, HeaderValue), String> {
    let name = variable
        .strip_prefix(HEADER_PREFIX)
        .unwrap_or(variable)
        .to_lowercase()
        .replace('_', "-");
    if RESERVED_HEADERS.contains(&name.as_str()) {
        return Err(format!(
            "would set {name}, which is the relay's own matter; unset it"
        ));
    }
    let name: HeaderName = name
        .parse()
        .map_err(|_| "does not end in the name of a header; write it like WEBHOOK_HEADER_X_KEY")?;
    let mut value = HeaderValue::from_str(value)
        .map_err(|_| "has a line break or another control character, which no header may have")?;
    value.set_sensitive(true);
    Ok((name, value))
}

fn parse_secrets(text: &str) -> Result<Vec<SigningSecret>, String> {
    parse_list(text, SigningSecret::parse)
}

/// Entries separated by white space; at least one.
fn parse_list<T>(text: &str, parse: fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    let entries: Vec<_> = text
        .split_whitespace()
        .map(parse)
        .collect::<Result<_, _>>()?;
    if entries.is_empty() {
        return Err("holds nothing but white space; set it to a value, or unset it".into());
    }
    Ok(entries)
}

fn parse_destinations(text: &str) -> Result<Vec<Url>, String> {
    parse_list(text, parse_destination)
}

fn parse_destination(text: &str) -> Result<Url, String> {
    let example = "write it like http://localhost:3000/api/cache/webhook";
    let url: Url = text
        .parse()
        .map_err(|error| format!("is no URL ({error}); {example}"))?;
    match url.scheme() {
        "http" | "https" => {}
        other => {
            return Err(format!(
                "starts with {other}:, not with http:// or https://; {example}"
            ));
        }
    }
    let login = [url.username(), url.password().unwrap_or_default()];
    if login
        .iter()
        .any(|part| percent_decode_str(part).decode_utf8().is_err())
    {
        return Err("has a login that is not UTF-8 once decoded; write it in UTF-8".to_owned());
    }
    // The HTTP client would find that at each message only.
    if let Err(error) = url.as_str().parse::<hyper::Uri>() {
        return Err(format!(
            "has a URL that no HTTP client can use ({error}); shorten it"
        ));
    }
    Ok(url)
}

fn parse_servers(text: &str) -> Result<Vec<ServerAddr>, String> {
    text.split(',')
        .map(|part| parse_server(part.trim()))
        .collect()
}

fn parse_server(text: &str) -> Result<ServerAddr, String> {
    let example = "write each server like nats://localhost:4222";
    if text.is_empty() {
        return Err(format!(
            "has an empty entry; {example}, separated by single commas"
        ));
    }
    if !text.starts_with("nats://") && !text.starts_with("tls://") {
        return Err(format!(
            "has an entry that does not start with nats:// or tls://; {example}"
        ));
    }
    let address: ServerAddr = text
        .parse()
        .map_err(|_| format!("has an entry that is no URL; {example}"))?;
    if address.host().is_empty() {
        return Err(format!("has an entry without a host; {example}"));
    }
    if address.username().is_some() || address.password().is_some() {
        return Err(format!(
            "contains a login; set {USER} and {PASS}, or {TOKEN} instead"
        ));
    }
    Ok(address)
}

fn parse_prefix(text: &str) -> Result<Prefix, String> {
    // More of a long one would not help.
    let shown: String = text.chars().take(100).collect();
    text.parse()
        .map_err(|problem| format!("{shown:?} {problem}"))
}

/// A prefix to publish under.
fn parse_own_prefix(text: &str) -> Result<Prefix, String> {
    let prefix = parse_prefix(text)?;
    if prefix.is_reserved() {
        return Err(format!(
            "{text:?} is reserved for NATS itself; choose another, such as relayed.cache"
        ));
    }
    Ok(prefix)
}

/// A name of a stream or a consumer (NATS ADR-6).
fn parse_name(text: &str) -> Result<String, String> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || ".*>/\\".contains(c);
    if text.contains(bad) {
        return Err(format!(
            "{text:?} is no name; write it without white space and . * > / \\"
        ));
    }
    Ok(text.to_owned())
}

fn parse_group(text: &str) -> Result<String, String> {
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(format!(
            "{text:?} is no queue group; write it without white space"
        ));
    }
    Ok(text.to_owned())
}

/// No setting makes sense beyond a day.
const LONGEST_DURATION: Duration = Duration::from_secs(24 * 60 * 60);

fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .ok()
        .filter(|duration| *duration <= LONGEST_DURATION)
        .ok_or_else(|| {
            format!("{text:?} is no duration of at most a day; write it like 500ms, 15s or 2m")
        })
}

fn parse_bool(text: &str) -> Result<bool, String> {
    text.parse()
        .map_err(|_| format!("is {text:?}; write true or false"))
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is no address and port; write it like 127.0.0.1:9642"))
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => {
            Err("is zero, so that no attempt could succeed; write it like 15s".into())
        }
        timeout => Ok(timeout),
    }
}

fn parse_max_attempts(text: &str) -> Result<Option<u32>, String> {
    match text.parse() {
        Ok(0) => Ok(None),
        Ok(attempts) => Ok(Some(attempts)),
        Err(_) => Err(format!(
            "{text:?} is no count; write a whole number such as 5, or 0 for attempts without end"
        )),
    }
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
        let default = match variable.default {
            Default::Required => " (required)".to_owned(),
            Default::Off => String::new(),
            Default::Value(value) => format!(" (default: {value})"),
        };
        let mut name = variable.name;
        let mut line = String::new();
        for word in format!("{}{default}", variable.meaning).split(' ') {
            if "    ".len() + width + line.len() + 1 + word.len() > HELP_WIDTH {
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
#[allow(clippy::unwrap_used)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    const GOOD: [(&str, &str); 4] = [
        (DESTINATION, "http://localhost:3000/hook"),
        (HOST, "nats://localhost"),
        (PREFIX, "cms.cache"),
        (RELAYED_PREFIX, "relayed.cache"),
    ];

    /// A good configuration with changes; an empty value removes the variable.
    fn with(changes: &[(&str, &str)]) -> Result<Config, Vec<String>> {
        let variables = GOOD
            .iter()
            .filter(|(name, _)| !changes.iter().any(|(changed, _)| changed == name))
            .chain(changes);
        Config::from_environment(&variables.copied().collect())
    }

    fn problems(changes: &[(&str, &str)]) -> Vec<String> {
        with(changes).err().unwrap_or_default()
    }

    #[test]
    fn defaults_are_those_of_the_table() {
        let config = with(&[]).unwrap();
        assert_eq!(config.webhook.timeout, Duration::from_secs(15));
        assert_eq!(config.webhook.max_attempts, Some(5));
        assert_eq!(config.shutdown_timeout, Duration::from_secs(20));
        assert!(matches!(config.nats.login, Login::Anonymous));
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
        assert!(
            matches!(&config.nats.login, Login::Password { user, password }
            if user == "u" && password.expose_secret() == "p")
        );
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
    fn there_is_one_way_to_log_in() {
        assert!(matches!(
            with(&[(TOKEN, "t")]).unwrap().nats.login,
            Login::Token(_)
        ));
        let problems = problems(&[(TOKEN, "t"), (USER, "u"), (PASS, "p")]);
        assert_eq!(
            problems,
            ["NATS_USER and NATS_TOKEN are both set; keep one way to log in"]
        );
    }

    #[test]
    fn headers_and_several_destinations_are_taken() {
        let config = with(&[
            (DESTINATION, " http://a/\n\thttps://b/ "),
            ("WEBHOOK_HEADER_X_REVALIDATE_SECRET", "hunter2"),
            ("WEBHOOK_HEADER_AUTHORIZATION", "Bearer hunter2"),
            ("WEBHOOK_HEADER_WEBHOOK_HEADER_X", "x"),
            ("WEBHOOK_HEADER_FILE", "f"),
            (
                SECRET,
                "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            ),
            (REPUBLISH_DELAY, "100ms"),
        ])
        .unwrap();
        assert_eq!(config.webhook.destinations.len(), 2);
        assert_eq!(config.webhook.headers["x-revalidate-secret"], "hunter2");
        assert_eq!(config.webhook.headers["authorization"], "Bearer hunter2");
        assert_eq!(config.webhook.headers["webhook-header-x"], "x");
        assert_eq!(config.webhook.headers["file"], "f");
        assert_eq!(config.webhook.secrets.len(), 2);
        assert_eq!(config.republish_delay, Duration::from_millis(100));
        let shown = format!("{config:?}");
        assert!(
            !shown.contains("hunter2") && !shown.contains("MfKQ9"),
            "{shown}"
        );
    }

    #[test]
    fn the_host_has_another_name() {
        assert_eq!(problems(&[(HOST, ""), (ADDRESS, "nats://a")]), [""; 0]);
        assert_eq!(
            problems(&[(HOST, "nats://a"), (ADDRESS, "nats://a")]),
            [""; 0]
        );
        assert!(problems(&[(ADDRESS, "nats://b")])[0].contains("different values"));
        assert!(problems(&[(HOST, ""), (ADDRESS, "b")])[0].starts_with("NATS_ADDRESS has"));
    }

    #[test]
    fn every_refusal_names_the_variable_and_the_fault() {
        for (name, value, fault) in [
            (DESTINATION, "", "not set"),
            (DESTINATION, "localhost:3000", "starts with localhost:"),
            (DESTINATION, "/hook", "is no URL"),
            (DESTINATION, "ftp://host/", "starts with ftp:"),
            (DESTINATION, "http://", "is no URL"),
            (DESTINATION, " ", "nothing but white space"),
            (HOST, "", "not set"),
            (HOST, "localhost:4222", "does not start with nats://"),
            (HOST, "http://localhost", "does not start with nats://"),
            (HOST, "nats://a,,nats://b", "has an empty entry"),
            (HOST, "nats://", "has an entry"),
            (HOST, "nats://host:99999", "is no URL"),
            (HOST, "nats://u:p@host", "contains a login"),
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
            (RELAYED_PREFIX, "$JS.API", "is reserved for NATS"),
            (RELAYED_PREFIX, "_INBOX.x", "is reserved for NATS"),
            (FAILED_PREFIX, "$SYS", "is reserved for NATS"),
            (PREFIX, &"x".repeat(5000), "is longer than NATS takes"),
            (HOST, "nats://:p@host", "contains a login"),
            (DESTINATION, "http://%ff:p@host", "is not UTF-8"),
            (DESTINATION, "http://u:%ff@host", "is not UTF-8"),
            (
                DESTINATION,
                &format!("http://host/{}", "x".repeat(66_000)),
                "no HTTP client can use (uri too long)",
            ),
            (USER, "u", "NATS_PASS is not set"),
            (PASS, "p", "NATS_USER is not set"),
            (DESTINATION, "http://a b", "is no URL"),
            ("WEBHOOK_HEADER_HOST", "x", "would set host"),
            (
                "WEBHOOK_HEADER_WEBHOOK_SIGNATURE",
                "x",
                "would set webhook-signature",
            ),
            ("WEBHOOK_HEADER_", "x", "does not end in the name"),
            ("WEBHOOK_HEADER_X-Ä", "x", "does not end in the name"),
            ("WEBHOOK_HEADER_X_KEY", "a\r\nb: c", "line break"),
            (SECRET, "secret", "whsec_"),
            (SECRET, "whsec_ä", "base64"),
            (SECRET, "whsec_c2hvcnQ=", "24 to 64 bytes"),
            (SECRET, " \n", "nothing but white space"),
            (NKEY, "/nowhere", "cannot be read"),
            (NKEY, "Cargo.toml", "no seed"),
            (CREDS, "/nowhere", "cannot be read"),
            (CREDS, "Cargo.toml", "no credentials"),
            (CA, "/nowhere", "cannot be read"),
            (CA, "Cargo.toml", "no certificate"),
            (CERT, "Cargo.toml", "no certificate"),
            (KEY, "Cargo.toml", "no private key"),
            (FAILED_PREFIX, "cms.cache.failed", "overlaps"),
            (FAILED_PREFIX, "relayed.cache", "overlaps"),
            (FAILED_PREFIX, "failed.", "empty token"),
            (STREAM, "CMS", "NATS_CONSUMER is not set"),
            (CONSUMER, "relay", "NATS_STREAM is not set"),
            (STREAM, "C.M.S", "is no name"),
            (RELAYED_STREAM, "RELAYED.>", "is no name"),
            (
                FAILED_STREAM,
                "FAILED",
                "NATS_FAILED_SUBJECT_PREFIX is not set",
            ),
            (QUEUE_GROUP, "a b", "is no queue group"),
            (TIMEOUT, "15", "is no duration"),
            (TIMEOUT, "-1s", "is no duration"),
            (TIMEOUT, "0s", "is zero"),
            (TIMEOUT, "500000000000y", "at most a day"),
            (MAX_ATTEMPTS, "many", "is no count"),
            (MAX_ATTEMPTS, "-1", "is no count"),
            (SHUTDOWN_TIMEOUT, "soon", "is no duration"),
            (LOG, "nats_webhook_relay=loud", "is no filter"),
            (STATUS_LISTEN, "9642", "is no address and port"),
            (STATUS_LISTEN, "localhost:9642", "is no address and port"),
        ] {
            let problems = problems(&[(name, value)]);
            assert_eq!(problems.len(), 1, "{name}={value}: {problems:?}");
            assert!(problems[0].contains(fault), "{name}={value}: {problems:?}");
            assert!(problems[0].contains(name), "{name}={value}: {problems:?}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_one_problem() {
        for changes in [
            &[(HOST, ""), ("NATS_HOST_FILE", "/nowhere")][..],
            &[(HOST, ""), ("NATS_ADDRESS_FILE", "/nowhere")],
            &[("NATS_ADDRESS_FILE", "/nowhere")],
            &[(USER, "u"), ("NATS_PASS_FILE", "/nowhere")],
            &[("NATS_USER_FILE", "/nowhere"), (PASS, "p")],
        ] {
            let problems = problems(changes);
            assert_eq!(problems.len(), 1, "{changes:?}: {problems:?}");
            assert!(problems[0].contains("/nowhere"), "{problems:?}");
        }
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
        ])
        .unwrap();
        assert!(!format!("{config:?}").contains("hunter2"), "{config:?}");
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
