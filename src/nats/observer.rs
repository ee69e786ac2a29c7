//! What the client reports about the connection → log, monitor, and [`ConnectionEvent`]s; and which server
//! it tries next.

use std::{
    fmt::Display,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::anyhow;
use async_nats::{
    ClientError, ConnectErrorKind, Event, ReconnectToServer, Server, ServerAddr, ServerError,
    Statistics,
};
use log::{debug, error, info, warn};
use tokio::sync::mpsc;

use super::{Api, BACKOFF, LASTING, Refusals, events::ConnectionEvent, show};
use crate::{
    config::{Config, Mode},
    lock::lock,
    monitor::Monitor,
    subject::Prefix,
    tls,
};

/// A server was reached and does not let us in.
pub(super) const REFUSALS: [ConnectErrorKind; 2] = [
    ConnectErrorKind::AuthorizationViolation,
    ConnectErrorKind::Authentication,
];

/// Whether the text of an error tells of that.
fn is_refusal(error: &str) -> bool {
    REFUSALS
        .iter()
        .any(|refusal| error.starts_with(&refusal.to_string()))
}

/// What to say then.
pub(super) fn refusal(kind: impl Display, hint: &str) -> String {
    format!("refused the login ({kind}); {hint}")
}

/// Why there is no connection to a server, in words where the client has none. `tls_first` tells whether the
/// TLS handshake came first.
pub(super) fn explain(error: &str, server: &ServerAddr, tls_first: bool) -> String {
    // It calls every failure of the network this.
    let error = error.strip_prefix("IO error: ").unwrap_or(error);
    if tls_first && error.contains("InvalidContentType") {
        return "it does not begin with the TLS handshake; unset NATS_TLS_FIRST unless the server has \
                handshake_first, else check host and port"
            .to_owned();
    }
    if !tls_first && !server.is_websocket() && error == "timed out" {
        return "no answer in time; if it wants the TLS handshake first (handshake_first), set \
                NATS_TLS_FIRST=true, else check host and port"
            .to_owned();
    }
    if error.contains("expected INFO, got nothing") {
        return "the server closed the connection without a greeting; if it wants the TLS handshake \
                first (handshake_first), set NATS_TLS_FIRST=true, else check host and port"
            .to_owned();
    }
    tls::explain(error, "NATS")
        .or_else(|| explain_web_socket(error))
        .unwrap_or_else(|| error.to_owned())
}

/// The same, where no web socket came about.
fn explain_web_socket(error: &str) -> Option<String> {
    // What a server of NATS says first is no HTTP.
    if error == "invalid HTTP version" {
        return Some(
            "it does not speak HTTP there, and so has no web socket; check host and port, or write \
             nats://"
            .to_owned(),
        );
    }
    let status = error.strip_prefix("expected HTTP 101 Switching Protocols, got status code ")?;
    Some(format!(
        "it answers with HTTP status {status} instead of a web socket; check host, port and path, and \
         whether it is to be ws:// or wss://"
    ))
}

/// Chooses the server to connect to, logs what happens, and tells what is fatal.
pub(super) struct Observer {
    /// It subscribes to all that is below this one.
    prefix: Prefix,
    /// Below this one come the answers to its requests.
    inbox_prefix: Prefix,
    api: Api,
    /// What to look at where the server refuses the login.
    hint: String,
    /// Whether the TLS handshake comes before the server's greeting.
    tls_first: bool,
    /// The stream that it takes messages from, if it does not publish into it as well.
    input: Option<String>,
    /// Whether messages are lost with a connection, as in core mode.
    is_lossy: bool,
    /// Whether a server has accepted the login before. If not, a refusal is final.
    was_accepted: AtomicBool,
    progress: Mutex<Progress>,
    /// The client's own, which know of a connection before its event comes.
    pub(super) statistics: OnceLock<Arc<Statistics>>,
    monitor: Arc<Monitor>,
    refusals: Refusals,
    events: mpsc::UnboundedSender<ConnectionEvent>,
}

/// How far connecting has come.
#[derive(Default)]
struct Progress {
    /// Attempts since the last connection that lasted.
    attempts: usize,
    /// The server of the last attempt.
    server: Option<ServerAddr>,
    /// Since when there has been a connection to it.
    connected: Option<Instant>,
    /// How many connections there had been before that attempt.
    connections: u64,
}

impl Observer {
    pub(super) fn new(
        config: &Config,
        monitor: &Arc<Monitor>,
        refusals: &Refusals,
        is_first: bool,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<ConnectionEvent>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let observer = Self {
            prefix: config.prefix.clone(),
            inbox_prefix: config.inbox_prefix.clone(),
            api: Api::of(config),
            hint: config.nats.login.hint(),
            tls_first: config.nats.tls_first,
            input: match &config.mode {
                Mode::Core { .. } => None,
                Mode::Durable { stream, .. } => Some(stream.clone()).filter(|stream| {
                    ![&config.relayed_stream, &config.failed_stream]
                        .iter()
                        .any(|own| own.as_ref() == Some(stream))
                }),
            },
            is_lossy: matches!(config.mode, Mode::Core { .. }),
            was_accepted: AtomicBool::new(!is_first),
            progress: Mutex::default(),
            statistics: OnceLock::new(),
            monitor: Arc::clone(monitor),
            refusals: refusals.clone(),
            events: sender,
        };
        (Arc::new(observer), receiver)
    }

    /// One server after the other; at once in the first round, then with growing waits.
    pub(super) fn choose(&self, servers: &[Server]) -> Option<ReconnectToServer> {
        let mut progress = lock(&self.progress);
        if let Some(since) = progress.connected.take()
            && since.elapsed() >= LASTING
        {
            progress.attempts = 0;
        }
        let next = servers.get(progress.attempts % servers.len().max(1))?;
        let rounds = progress.attempts / servers.len();
        let delay = match u32::try_from(rounds) {
            Ok(0) => Duration::ZERO,
            rounds => BACKOFF.wait(rounds.unwrap_or(u32::MAX)),
        };
        let connections = self.connections();
        let has_failed = connections == progress.connections;
        progress.connections = connections;
        if let Some(last) = progress.server.as_ref().filter(|_| has_failed) {
            // The client keeps no error for a name that does not resolve.
            let reason = servers
                .iter()
                .find(|server| server.addr == *last)
                .and_then(|server| server.last_error.as_deref())
                .unwrap_or("its name does not resolve");
            // A refused first login ends the relay, which says so.
            if !is_refusal(reason) || self.was_accepted.load(Relaxed) {
                let wait = match delay.is_zero() {
                    true => "now".to_owned(),
                    false => format!("in {delay:.1?}"),
                };
                let reason = match is_refusal(reason) {
                    true => refusal(reason, &self.hint),
                    false => explain(reason, last, self.tls_first),
                };
                let failure = format!("cannot connect to NATS at {}: {reason}", show(last));
                warn!("{failure}; next attempt {wait}");
                self.monitor.set_obstacle(Some(failure));
            }
        }
        progress.attempts += 1;
        progress.server = Some(next.addr.clone());
        Some(ReconnectToServer {
            addr: next.addr.clone(),
            delay: Some(delay),
        })
    }

    pub(super) fn observe(&self, event: Event) {
        match event {
            Event::Connected => {
                self.was_accepted.store(true, Relaxed);
                let mut progress = lock(&self.progress);
                progress.connected = Some(Instant::now());
                let server = self.server(&progress);
                info!("connected to NATS at {server}");
                self.monitor.set_connected(server);
                self.tell(ConnectionEvent::Connected);
            }
            Event::Disconnected => {
                self.monitor.set_disconnected();
                if self.is_lossy {
                    error!(
                        "lost the connection to NATS; messages that were on their way or are published \
                         before it is back are lost (NATS_STREAM would keep them); a message that no \
                         client can read, such as one with malformed headers, has this effect as well"
                    );
                } else {
                    warn!("lost the connection to NATS; reconnecting");
                }
            }
            Event::LameDuckMode => warn!("the NATS server is about to shut down (lame duck mode)"),
            Event::SlowConsumer(_) => error!("the NATS client dropped a message (slow consumer)"),
            Event::ServerError(error) => self.observe_server_error(&error),
            Event::ClientError(ClientError::Other(kind))
                if is_refusal(&kind) && !self.was_accepted.load(Relaxed) =>
            {
                let progress = lock(&self.progress);
                let refusal = refusal(kind, &self.hint);
                self.fatal(anyhow!("NATS at {} {refusal}", self.server(&progress)));
            }
            // A failed attempt to connect: the next choice of a server logs it, with the reason.
            Event::ClientError(_) => {}
            // Only ever caused by ourselves.
            Event::Draining | Event::Closed => {}
        }
    }

    /// What the server tells about us (`-ERR` of the NATS client protocol).
    fn observe_server_error(&self, error: &ServerError) {
        let text = match error {
            ServerError::AuthorizationViolation => "authorization violation",
            ServerError::SlowConsumer(_) => "slow consumer",
            ServerError::Other(text) => text,
        };
        if let Some(refused) = refused_subject(text, "Subscription to") {
            if self.prefix.contains(&refused) {
                return self.fatal(anyhow!(
                    "no permission to subscribe to {}; allow it for this NATS user",
                    self.prefix.wildcard()
                ));
            }
            if self.inbox_prefix.contains(&refused) {
                return self.tell(ConnectionEvent::InboxRefused(anyhow!(
                    "no permission to subscribe to {}, where NATS answers; allow it for this NATS \
                     user, or set NATS_INBOX_PREFIX to a prefix that this user may subscribe to",
                    self.inbox_prefix.wildcard()
                )));
            }
        }
        if let Some(refused) = refused_subject(text, "Publish to") {
            if self.inbox_prefix.contains(&refused) {
                return self.tell(ConnectionEvent::ProbeRefused);
            }
            let request = self.api.request(&refused).unwrap_or_default();
            if request.starts_with("STREAM.MSG.GET.") {
                warn!("{}", cannot_look(&refused));
                return self.tell(ConnectionEvent::LookRefused);
            }
            if self.does_without(request) {
                // The source of messages says what follows from it.
                return debug!("no permission to publish on {refused}");
            }
            if refused.starts_with("$JS.") {
                return self.fatal(anyhow!(
                    "no permission to publish on {refused}, which the relay needs; allow it for \
                     this NATS user"
                ));
            }
            self.count_refusal();
            return error!(
                "no permission to publish on {refused}, so this message was not republished; \
                 allow it for this NATS user"
            );
        }
        if text.eq_ignore_ascii_case("maximum control line exceeded") {
            self.count_refusal();
            return error!(
                "the subject of a message is too long for the NATS server, so it was not \
                 republished; shorten NATS_RELAYED_SUBJECT_PREFIX, or raise max_control_line of \
                 the server"
            );
        }
        if text.eq_ignore_ascii_case("maximum payload violation") {
            self.count_refusal();
            return error!(
                "a message is larger than the NATS server takes, so it was not republished; raise \
                 max_payload of the server"
            );
        }
        if text.eq_ignore_ascii_case("maximum subscriptions exceeded") {
            let reason = anyhow!("NATS refused the subscription: {text}");
            if self.is_lossy {
                // Its own subscription came first; it can do without the one of an inbox.
                return self.tell(ConnectionEvent::InboxRefused(reason));
            }
            return self.fatal(reason);
        }
        error!("the NATS server reports: {text}");
    }

    /// Whether the relay can do without this request to JetStream: to look at the stream that it takes
    /// messages from, unless it publishes into it as well.
    fn does_without(&self, request: &str) -> bool {
        request
            .strip_prefix("STREAM.INFO.")
            .is_some_and(|stream| self.input.as_deref() == Some(stream))
    }

    fn connections(&self) -> u64 {
        self.statistics
            .get()
            .map_or(0, |statistics| statistics.connects.load(Relaxed))
    }

    fn server(&self, progress: &Progress) -> String {
        progress.server.as_ref().map(show).unwrap_or_default()
    }

    fn count_refusal(&self) {
        self.refusals.add();
        self.monitor.add_publish_refused();
    }

    fn fatal(&self, reason: anyhow::Error) {
        self.tell(ConnectionEvent::Fatal(reason));
    }

    fn tell(&self, event: ConnectionEvent) {
        // Nobody is left to listen only while the relay ends.
        let _ = self.events.send(event);
    }
}

/// What follows from a missing permission to look at the messages of a stream.
#[must_use]
pub fn cannot_look(subject: &str) -> String {
    format!(
        "no permission to publish on {subject}, by which the relay finds a message that no client can \
         read; such a message would block all others, and show only as a connection that is lost \
         again and again; allow it for this NATS user"
    )
}

/// The subject in the server's `Permissions Violation for <what> "<subject>"`, which it quotes as Go
/// does: with a backslash before a quotation mark and before another backslash.
fn refused_subject(text: &str, what: &str) -> Option<String> {
    let (_, rest) = text
        .strip_prefix("Permissions Violation for ")?
        .split_once(what)?;
    let mut quoted = rest.trim_start().strip_prefix('"')?.chars();
    let mut subject = String::new();
    loop {
        match quoted.next()? {
            '"' => return Some(subject),
            '\\' => subject.push(quoted.next()?),
            character => subject.push(character),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_server_is_tried_at_once_in_the_first_round_and_after_waits_in_later_ones() {
        let config = Config::from_environment(&crate::Environment::from_iter([
            ("WEBHOOK_DESTINATION", "http://localhost"),
            ("NATS_HOST", "nats://a,nats://b"),
            ("NATS_SUBJECT_PREFIX", "cms"),
            ("NATS_RELAYED_SUBJECT_PREFIX", "relayed"),
        ]));
        let config = config.unwrap();
        let refusals = Refusals::default();
        let monitor = Arc::new(Monitor::new(None).unwrap());
        let (observer, _events) = Observer::new(&config, &monitor, &refusals, true);
        let servers = config.nats.servers.iter().map(|address| Server {
            addr: address.clone(),
            failed_attempts: 0,
            did_connect: false,
            is_discovered: false,
            last_error: None,
        });
        let servers: Vec<_> = servers.collect();
        let choose = || {
            let chosen = observer.choose(&servers).unwrap();
            (chosen.addr.host().to_owned(), chosen.delay.unwrap())
        };
        for longest_wait in [Duration::ZERO, BACKOFF.first, 2 * BACKOFF.first] {
            for host in ["a", "b"] {
                let (chosen, wait) = choose();
                assert_eq!(chosen, host);
                assert!(
                    (longest_wait / 2..=longest_wait).contains(&wait),
                    "{wait:?}"
                );
            }
        }
        // A connection that did not last changes nothing; one that did is followed by a first round.
        let connected = |before| {
            lock(&observer.progress).connected = Instant::now().checked_sub(before);
        };
        connected(Duration::ZERO);
        assert_ne!(choose().1, Duration::ZERO);
        connected(LASTING);
        assert_eq!(choose(), ("a".to_owned(), Duration::ZERO));
    }

    #[test]
    fn refusals_name_their_subject() {
        for (text, what, subject) in [
            (
                r#"Permissions Violation for Subscription to "a.>""#,
                "Subscription to",
                Some("a.>"),
            ),
            (
                r#"Permissions Violation for Subscription to "a.>" using queue "q""#,
                "Subscription to",
                Some("a.>"),
            ),
            (
                r#"Permissions Violation for Publish to "a.b""#,
                "Publish to",
                Some("a.b"),
            ),
            (
                r#"Permissions Violation for Subscription to "a\"b\\.>" using queue "q""#,
                "Subscription to",
                Some(r#"a"b\.>"#),
            ),
            (
                r#"Permissions Violation for Publish to "a.b""#,
                "Subscription to",
                None,
            ),
            ("Stale Connection", "Publish to", None),
        ] {
            assert_eq!(refused_subject(text, what).as_deref(), subject, "{text}");
        }
    }
}
