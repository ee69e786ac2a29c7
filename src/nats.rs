//! Connecting to NATS: servers, login, and what the connection says → log.
//!
//! The client reconnects and resubscribes by itself. Everything it or the server reports is logged
//! here; what makes going on pointless comes out of [`Faults`].

mod connection;

use std::{
    fmt::Display,
    sync::{Arc, Mutex, OnceLock, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::anyhow;
use async_nats::{
    Client, ClientError, ConnectErrorKind, ConnectOptions, Event, ReconnectToServer, Server,
    ServerAddr, ServerError, Statistics, connection::State,
};
use log::{debug, error, info, warn};
use secrecy::ExposeSecret;
use tokio::{
    sync::{mpsc, watch},
    time::sleep_until,
};

use self::connection::Current;
pub use self::connection::{ClientEnded, Connection, Epoch, Refusals};
use crate::{
    backoff::Backoff,
    config::{self, Config, Login, Mode},
    monitor::Monitor,
    tls,
};

/// The name under which the server lists the connection.
const CONNECTION_NAME: &str = "nats-webhook-relay";

/// Growing waits between attempts to connect, once every server was tried.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(100),
    longest: Duration::from_secs(5),
};

/// How many messages may wait between the connection and the subscription: as many as there are.
/// The client drops what exceeds this without a count, so the bound is ours (see
/// [`crate::source`]), and this one must not be reached.
const SUBSCRIPTION_CAPACITY: usize = usize::MAX >> 4;

/// A connection that lasts so long counts: after it, the first attempt to connect anew is made at once.
/// A server that closes each connection would be overrun otherwise.
const LASTING: Duration = Duration::from_secs(5);

/// How often the server is asked whether it is there. The third question without an answer ends a
/// connection that went dead without a word, as after a change of networks.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// How much the client reads at a time. It reads up to 128 times before anyone else has a turn, and
/// what it has read by then is beyond the bound of [`crate::source`].
const READ_BUFFER_BYTES: u16 = 16 * 1024;

/// Starts connecting in the background, and keeps on until a server is reached.
///
/// # Errors
/// If the settings can't be used at all.
pub async fn connect(
    config: &Arc<Config>,
    monitor: &Arc<Monitor>,
    refusals: Refusals,
) -> anyhow::Result<(Connection, Faults)> {
    let (client, notices) = start(config, monitor, &refusals).await?;
    let (current, connection) = Connection::new(client, refusals.clone());
    let successor = Successor {
        config: Arc::clone(config),
        monitor: Arc::clone(monitor),
        refusals,
        current,
        failures: 0,
        due: Instant::now(),
    };
    let faults = Faults {
        notices,
        successor: Some(successor),
    };
    Ok((connection, faults))
}

/// A client that keeps on connecting, and what it reports.
async fn start(
    config: &Config,
    monitor: &Arc<Monitor>,
    refusals: &Refusals,
) -> anyhow::Result<(Client, mpsc::UnboundedReceiver<Notice>)> {
    let (observer, notices) = Observer::new(config, monitor, refusals);
    let chooser = Arc::clone(&observer);
    let client = options(&config.nats, Arc::clone(&observer))?
        .retry_on_initial_connect()
        .reconnect_to_server_callback(move |servers, _| {
            let choice = chooser.choose(&servers);
            async move { choice }
        })
        .connect(config.nats.servers.as_slice())
        .await?;
    let _ = observer.statistics.set(client.statistics());
    Ok((client, notices))
}

/// Connects to one server, or fails.
///
/// # Errors
/// If it can't be reached or refuses the login.
pub async fn connect_once(
    config: &Config,
    server: &ServerAddr,
    monitor: &Arc<Monitor>,
) -> anyhow::Result<(Connection, Faults)> {
    let refusals = Refusals::default();
    let (observer, notices) = Observer::new(config, monitor, &refusals);
    let client = options(&config.nats, observer)?
        .ignore_discovered_servers()
        .connect(server)
        .await
        .map_err(|error| match error.kind() {
            kind if REFUSALS.contains(&kind) => {
                anyhow!("{}", refusal(kind, config.nats.login.remedy()))
            }
            _ => anyhow!("{}", explain(&error.to_string())),
        })?;
    let (_, connection) = Connection::new(client, refusals);
    let faults = Faults {
        notices,
        successor: None,
    };
    Ok((connection, faults))
}

/// A server was reached and does not let us in.
const REFUSALS: [ConnectErrorKind; 2] = [
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
fn refusal(kind: impl Display, remedy: &str) -> String {
    format!("refused the login ({kind}); {remedy}")
}

/// Login, TLS, and what every connection has in common.
fn options(config: &config::Nats, observer: Arc<Observer>) -> anyhow::Result<ConnectOptions> {
    let login = ConnectOptions::new();
    let login = match &config.login {
        Login::Anonymous => login,
        Login::Password { user, password } => {
            login.user_and_password(user.clone(), password.expose_secret().to_owned())
        }
        Login::Token(token) => login.token(token.expose_secret().to_owned()),
        Login::Nkey(seed) => login.nkey(seed.expose_secret().to_owned()),
        Login::Credentials(text) => login.credentials(text.expose_secret())?,
    };
    let options = with_tls(login, config);
    let options = match config.tls_first {
        true => options.tls_first(),
        false => options,
    };
    Ok(options
        .name(CONNECTION_NAME)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .read_buffer_capacity(READ_BUFFER_BYTES)
        .ping_interval(PING_INTERVAL)
        .event_callback(move |event| {
            observer.observe(event);
            async {}
        }))
}

fn with_tls(mut options: ConnectOptions, config: &config::Nats) -> ConnectOptions {
    if let Some(ca) = &config.ca {
        options = options.add_root_certificates(ca.clone());
    }
    if let Some((certificate, key)) = &config.certificate {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    options.require_tls(config.requires_tls)
}

/// Why there is no connection, in words where the client has none.
fn explain(error: &str) -> String {
    // It calls every failure of the network this.
    let error = error.strip_prefix("IO error: ").unwrap_or(error);
    if error.contains("expected INFO, got nothing") {
        return "the server closed the connection without a greeting; if it wants the TLS handshake \
                first (handshake_first), set NATS_TLS_FIRST=true, else check host and port"
            .to_owned();
    }
    tls::explain(error, "NATS_CA", "nats").unwrap_or_else(|| error.to_owned())
}

/// What the connection reports that its user must act on.
pub struct Faults {
    notices: mpsc::UnboundedReceiver<Notice>,
    /// By which a client that has broken down is replaced, if it is to be.
    successor: Option<Successor>,
}

/// Puts another client in the place of one that has broken down.
struct Successor {
    config: Arc<Config>,
    monitor: Arc<Monitor>,
    refusals: Refusals,
    current: watch::Sender<Current>,
    /// How many clients in a row have broken down at once.
    failures: u32,
    /// When the next one may start.
    due: Instant,
}

/// One such report.
#[derive(Debug)]
pub enum Notice {
    /// The relay cannot go on.
    Fatal(anyhow::Error),
    /// Our user may not subscribe to an inbox, so a request gets no answer.
    InboxRefused,
    /// Our user may not publish to an inbox, which only [`Faults::confirm`] does.
    ProbeRefused,
    /// There is a new connection.
    Connected,
    /// The client has broken down, and there is another one, which knows of no subscription.
    Replaced,
    /// Our user may not look at the messages of the stream.
    LookRefused,
}

impl Faults {
    /// The next report.
    pub async fn notice(&mut self) -> Notice {
        if let Some(notice) = self.notices.recv().await {
            return notice;
        }
        let Some(successor) = &mut self.successor else {
            return Notice::Fatal(ClientEnded.into());
        };
        match successor.replace().await {
            Ok(notices) => {
                self.notices = notices;
                Notice::Replaced
            }
            Err(error) => Notice::Fatal(error),
        }
    }

    /// Resolves when the relay cannot go on, with the reason.
    pub async fn fatal(&mut self, needs_inbox: bool) -> anyhow::Error {
        loop {
            match self.notice().await {
                Notice::Fatal(reason) => return reason,
                Notice::InboxRefused if needs_inbox => return inbox_refused(),
                Notice::InboxRefused
                | Notice::ProbeRefused
                | Notice::LookRefused
                | Notice::Connected
                | Notice::Replaced => {}
            }
        }
    }

    /// Resolves once the server has processed all that was sent before, subscriptions included.
    ///
    /// # Errors
    /// If it refused what the relay can't do without; [`ClientEnded`] if the client was replaced, so that
    /// all of it has to be sent again.
    pub async fn confirm(&mut self, client: &Client, needs_inbox: bool) -> anyhow::Result<()> {
        // The client has no round trip of its own to await, so this asks an inbox that nobody
        // listens to: "no responders" comes back at once, and after any refusal. A user without
        // permission to use inboxes gets a refusal, which is as good an answer.
        loop {
            tokio::select! {
                biased;
                notice = self.notice() => match notice {
                    Notice::Fatal(reason) => return Err(reason),
                    Notice::InboxRefused if needs_inbox => return Err(inbox_refused()),
                    Notice::InboxRefused | Notice::ProbeRefused => return Ok(()),
                    Notice::Connected | Notice::LookRefused => continue,
                    Notice::Replaced => return Err(ClientEnded.into()),
                },
                answer = client.request(client.new_inbox(), "".into()) => match answer {
                    Err(error) if error.kind() == async_nats::RequestErrorKind::TimedOut => {}
                    // Let a refusal that came along with the answer get here first.
                    _ => tokio::task::yield_now().await,
                },
            }
            while let Ok(notice) = self.notices.try_recv() {
                if let Notice::Fatal(reason) = notice {
                    return Err(reason);
                }
            }
            if client.connection_state() == State::Connected {
                return Ok(());
            }
        }
    }
}

impl Successor {
    /// Starts another client, with growing waits where one after the other breaks down; what it reports.
    async fn replace(&mut self) -> anyhow::Result<mpsc::UnboundedReceiver<Notice>> {
        let now = Instant::now();
        if now > self.due + LASTING {
            self.failures = 0;
        }
        sleep_until(self.due.into()).await;
        let (client, notices) = start(&self.config, &self.monitor, &self.refusals).await?;
        self.failures += 1;
        self.due = Instant::now() + BACKOFF.wait(self.failures);
        self.monitor.set_disconnected();
        let loss = match self.config.mode {
            Mode::Core { .. } => "; messages that were on their way are lost",
            Mode::Durable { .. } => "",
        };
        error!(
            "the NATS client has broken down and is replaced, as after a message that it cannot bear (a \
             carriage return in a header value, for one){loss}"
        );
        self.current
            .send_modify(|current| *current = current.followed_by(client));
        Ok(notices)
    }
}

/// Why a relay that needs an inbox cannot go on without.
#[must_use]
pub fn inbox_refused() -> anyhow::Error {
    anyhow!("no permission to use inboxes; allow _INBOX.> for this NATS user")
}

/// Chooses the server to connect to, logs what happens, and tells what is fatal.
struct Observer {
    /// What the relay subscribes to.
    subject: String,
    /// What to look at where the server refuses the login.
    remedy: &'static str,
    /// The stream that it takes messages from, if it does not publish into it as well.
    input: Option<String>,
    /// Whether messages are lost with a connection, as in core mode.
    is_lossy: bool,
    progress: Mutex<Progress>,
    /// The client's own, which know of a connection before its event comes.
    statistics: OnceLock<Arc<Statistics>>,
    monitor: Arc<Monitor>,
    refusals: Refusals,
    faults: mpsc::UnboundedSender<Notice>,
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
    fn new(
        config: &Config,
        monitor: &Arc<Monitor>,
        refusals: &Refusals,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Notice>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let observer = Self {
            subject: config.prefix.wildcard(),
            remedy: config.nats.login.remedy(),
            input: match &config.mode {
                Mode::Core { .. } => None,
                Mode::Durable { stream, .. } => Some(stream.clone()).filter(|stream| {
                    ![&config.relayed_stream, &config.failed_stream]
                        .iter()
                        .any(|own| own.as_ref() == Some(stream))
                }),
            },
            is_lossy: matches!(config.mode, Mode::Core { .. }),
            progress: Mutex::default(),
            statistics: OnceLock::new(),
            monitor: Arc::clone(monitor),
            refusals: refusals.clone(),
            faults: sender,
        };
        (Arc::new(observer), receiver)
    }

    /// One server after the other; at once in the first round, then with growing waits.
    fn choose(&self, servers: &[Server]) -> Option<ReconnectToServer> {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(since) = progress.connected.take()
            && since.elapsed() > LASTING
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
            // A refused login ends the relay, which says so.
            if !is_refusal(reason) {
                let wait = match delay.is_zero() {
                    true => "now".to_owned(),
                    false => format!("in {delay:.1?}"),
                };
                warn!(
                    "cannot connect to NATS at {}: {}; next attempt {wait}",
                    show(last),
                    explain(reason),
                );
            }
        }
        progress.attempts += 1;
        progress.server = Some(next.addr.clone());
        Some(ReconnectToServer {
            addr: next.addr.clone(),
            delay: Some(delay),
        })
    }

    fn observe(&self, event: Event) {
        match event {
            Event::Connected => {
                let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
                progress.connected = Some(Instant::now());
                let server = self.server(&progress);
                info!("connected to NATS at {server}");
                self.monitor.set_connected(server);
                self.tell(Notice::Connected);
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
            Event::ClientError(ClientError::Other(kind)) if is_refusal(&kind) => {
                let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
                let refusal = refusal(kind, self.remedy);
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
            if refused == self.subject {
                return self.fatal(anyhow!(
                    "no permission to subscribe to {refused}; allow it for this NATS user"
                ));
            }
            if refused.starts_with("_INBOX.") {
                return self.tell(Notice::InboxRefused);
            }
        }
        if let Some(refused) = refused_subject(text, "Publish to") {
            if refused.starts_with("_INBOX.") {
                return self.tell(Notice::ProbeRefused);
            }
            if refused.starts_with("$JS.API.STREAM.MSG.GET.") {
                warn!("{}", cannot_look(&refused));
                return self.tell(Notice::LookRefused);
            }
            if self.does_without(&refused) {
                // The source of messages says what follows from it.
                return debug!("no permission to publish on {refused}");
            }
            if refused.starts_with("$JS.") {
                return self.fatal(anyhow!(
                    "no permission to publish on {refused}, which the relay needs; allow it for \
                     this NATS user"
                ));
            }
            self.refusals.add();
            return error!(
                "no permission to publish on {refused}, so this message was not republished; \
                 allow it for this NATS user"
            );
        }
        if text.eq_ignore_ascii_case("maximum control line exceeded") {
            self.refusals.add();
            return error!(
                "the subject of a message is too long for the NATS server, so it was not \
                 republished; shorten NATS_RELAYED_SUBJECT_PREFIX, or raise max_control_line of \
                 the server"
            );
        }
        if text.eq_ignore_ascii_case("maximum payload violation") {
            self.refusals.add();
            return error!(
                "a message is larger than the NATS server takes, so it was not republished; raise \
                 max_payload of the server"
            );
        }
        if text.eq_ignore_ascii_case("maximum subscriptions exceeded") {
            if self.is_lossy {
                // Its own subscription came first; it can do without the one of an inbox.
                return self.tell(Notice::InboxRefused);
            }
            return self.fatal(anyhow!("NATS refused the subscription: {text}"));
        }
        error!("the NATS server reports: {text}");
    }

    /// Whether the relay can do without publishing on this subject: to look at the stream that it takes
    /// messages from, unless it publishes into it as well.
    fn does_without(&self, subject: &str) -> bool {
        subject
            .strip_prefix("$JS.API.STREAM.INFO.")
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

    fn fatal(&self, reason: anyhow::Error) {
        self.tell(Notice::Fatal(reason));
    }

    fn tell(&self, notice: Notice) {
        // Nobody is left to listen only while the relay ends.
        let _ = self.faults.send(notice);
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

/// The address of a server, without a login that a cluster may have advertised with it.
#[must_use]
pub fn show(server: &ServerAddr) -> String {
    format!("{}://{}:{}", server.scheme(), server.host(), server.port())
}

#[cfg(test)]
mod tests {
    use super::*;

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
