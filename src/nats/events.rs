//! The events of the connection: logged, counted, and passed on to the parts that must act on them.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use anyhow::anyhow;
use async_nats::{ClientError, Event, ServerError, Statistics};
use log::{debug, error, info, warn};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{
    Api,
    connection::{ClientCrashed, Connection, Refusals},
    servers::{Progress, is_refusal, refusal},
};
use crate::{
    config::{Config, Mode},
    monitor::Monitor,
    subject::Prefix,
};

/// An event on which a part of the relay must act.
#[derive(Debug)]
pub enum ConnectionEvent {
    /// The relay cannot continue.
    Fatal(anyhow::Error),
    /// Our user may not subscribe to an inbox, so requests get no answers; with a hint.
    InboxRefused(anyhow::Error),
    /// There is a new connection.
    Connected,
    /// Our user may not read the messages of the stream.
    LookRefused,
}

/// The events of the connection.
pub struct ConnectionEvents(pub(super) mpsc::UnboundedReceiver<ConnectionEvent>);

impl ConnectionEvents {
    /// Waits for the next event. A crash of the client is a fatal one: [`ClientCrashed`].
    pub async fn next(&mut self) -> ConnectionEvent {
        // The client sends the events, so they end with it.
        let event = self.0.recv().await;
        event.unwrap_or_else(|| ConnectionEvent::Fatal(anyhow::Error::msg(ClientCrashed)))
    }

    /// Resolves if the relay cannot continue, with the reason.
    pub async fn fatal(&mut self) -> anyhow::Error {
        loop {
            if let ConnectionEvent::Fatal(reason) | ConnectionEvent::InboxRefused(reason) =
                self.next().await
            {
                return reason;
            }
        }
    }

    /// Resolves once the server has processed everything sent before, including subscriptions.
    ///
    /// # Errors
    /// If it refused something that the relay can't do without.
    pub async fn confirm(
        &mut self,
        connection: &Connection,
        needs_inbox: bool,
    ) -> anyhow::Result<()> {
        loop {
            let event = tokio::select! {
                biased;
                event = self.next() => event,
                () = connection.round_trip() => match self.0.try_recv() {
                    // It came along with the answer.
                    Ok(event) => event,
                    Err(_) => return Ok(()),
                },
            };
            match event {
                ConnectionEvent::Fatal(reason) => return Err(reason),
                ConnectionEvent::InboxRefused(reason) if needs_inbox => return Err(reason),
                ConnectionEvent::InboxRefused(_) => return Ok(()),
                ConnectionEvent::Connected | ConnectionEvent::LookRefused => {}
            }
        }
    }
}

/// Logs and counts the client's events, and passes on those that others must act on.
pub(super) struct Observer {
    /// It subscribes to everything below this prefix.
    prefix: Prefix,
    /// The prefix of its reply inboxes.
    inbox_prefix: Prefix,
    api: Api,
    /// The hint for a refused login.
    pub(super) hint: String,
    /// Whether the TLS handshake comes before the server's greeting.
    pub(super) tls_first: bool,
    /// The stream that it consumes, if it does not publish into it as well.
    input: Option<String>,
    /// Whether a lost connection loses messages, as in core mode.
    is_lossy: bool,
    /// Whether a server has accepted the login before. If not, a refusal is final.
    pub(super) was_accepted: AtomicBool,
    /// Whether the log already says that our inbox is refused.
    was_inbox_refused: AtomicBool,
    pub(super) progress: Mutex<Progress>,
    /// The client's own statistics, which show a connection before its event comes.
    pub(super) statistics: OnceLock<Arc<Statistics>>,
    pub(super) monitor: Arc<Monitor>,
    refusals: Arc<Refusals>,
    events: mpsc::UnboundedSender<ConnectionEvent>,
}

impl Observer {
    pub(super) fn new(
        config: &Config,
        monitor: &Arc<Monitor>,
        is_first: bool,
    ) -> (Arc<Self>, Arc<Refusals>, ConnectionEvents) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let refusals = Arc::default();
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
            was_inbox_refused: AtomicBool::default(),
            progress: Mutex::default(),
            statistics: OnceLock::new(),
            monitor: Arc::clone(monitor),
            refusals: Arc::clone(&refusals),
            events: sender,
        };
        (Arc::new(observer), refusals, ConnectionEvents(receiver))
    }

    pub(super) fn observe(&self, event: Event) {
        match event {
            Event::Connected => {
                self.was_accepted.store(true, Relaxed);
                self.refusals.add(0);
                let mut progress = self.progress.lock();
                progress.connected = Some(Instant::now());
                let server = progress.server();
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
            Event::ServerError(ServerError::Other(text)) => self.observe_server_error(&text),
            Event::ServerError(error) => error!("the NATS server reports: {error}"),
            Event::ClientError(ClientError::Other(kind))
                if is_refusal(&kind) && !self.was_accepted.load(Relaxed) =>
            {
                let server = self.progress.lock().server();
                let refusal = refusal(&kind, &self.hint);
                self.fatal(anyhow!("NATS at {server} {refusal}"));
            }
            // A failed attempt to connect is logged with its reason when the next server is chosen.
            Event::ClientError(_) => {}
            // We have caused these ourselves.
            Event::Draining | Event::Closed => {}
        }
    }

    /// Handles an error of the server about us (`-ERR` of the NATS client protocol).
    fn observe_server_error(&self, text: &str) {
        if let Some(refused) = refused_subject(text, "Subscription to") {
            if self.inbox_prefix.contains(refused) {
                return self.inbox_refused(anyhow!(
                    "no permission to subscribe to {}, where NATS answers; allow it for this NATS \
                     user, or set NATS_INBOX_PREFIX to a prefix that this user may subscribe to",
                    self.inbox_prefix.wildcard()
                ));
            }
            // It subscribes to nothing else, however the server quotes that.
            return self.fatal(anyhow!(
                "no permission to subscribe to {}; allow it for this NATS user",
                self.prefix.wildcard()
            ));
        }
        if let Some(refused) = refused_subject(text, "Publish to") {
            return self.observe_refused_publish(refused);
        }
        match &text.to_ascii_lowercase()[..] {
            "maximum control line exceeded" => {
                self.refused(
                    "the subject of a message is too long for the NATS server, so it was not \
                     republished; shorten NATS_RELAYED_SUBJECT_PREFIX, or raise max_control_line of \
                     the server",
                );
            }
            "maximum payload violation" => {
                self.refused(
                    "a message is larger than the NATS server takes, so it was not republished; raise \
                     max_payload of the server",
                );
            }
            "maximum subscriptions exceeded" => {
                let reason = anyhow!("NATS refused the subscription: {text}");
                match self.is_lossy {
                    // Its own subscription came first, and it can do without that of an inbox.
                    true => self.inbox_refused(reason),
                    false => self.fatal(reason),
                }
            }
            _ => error!("the NATS server reports: {text}"),
        }
    }

    fn observe_refused_publish(&self, refused: &str) {
        if self.refusals.is_own_inbox(refused) {
            // Core mode can do without it, because it hardly ever makes requests.
            if !self.is_lossy && !self.was_inbox_refused.swap(true, Relaxed) {
                warn!(
                    "no permission to publish on {}, by which the relay learns whether NATS refuses a \
                     message; each time leaves an error in the server's log; allow it for this NATS user",
                    self.inbox_prefix.wildcard()
                );
            }
            return self.refusals.inbox.notify_one();
        }
        let request = self.api.request(refused).unwrap_or_default();
        if request.starts_with("STREAM.MSG.GET.") {
            warn!("{}", cannot_look(refused));
            return self.tell(ConnectionEvent::LookRefused);
        }
        if request
            .strip_prefix("STREAM.INFO.")
            .is_some_and(|stream| self.input.as_deref() == Some(stream))
        {
            // It can do without reading the configuration of its stream, and logs the consequence.
            return debug!("no permission to publish on {refused}");
        }
        if refused.starts_with("$JS.") {
            return self.fatal(anyhow!(
                "no permission to publish on {refused}, which the relay needs; allow it for this NATS \
                 user"
            ));
        }
        self.refused(&format!(
            "no permission to publish on {refused}, so this message was not republished; allow it for \
             this NATS user"
        ));
    }

    fn refused(&self, line: &str) {
        self.refusals.add(1);
        self.monitor.add_publish_refused();
        error!("{line}");
    }

    fn inbox_refused(&self, reason: anyhow::Error) {
        self.refusals.inbox.notify_one();
        self.tell(ConnectionEvent::InboxRefused(reason));
    }

    fn fatal(&self, reason: anyhow::Error) {
        self.tell(ConnectionEvent::Fatal(reason));
    }

    fn tell(&self, event: ConnectionEvent) {
        // It fails only while the relay exits.
        let _ = self.events.send(event);
    }
}

/// Describes the consequence of a missing permission to read the messages of a stream.
#[must_use]
pub fn cannot_look(subject: &str) -> String {
    format!(
        "no permission to publish on {subject}, by which the relay finds a message that no client can \
         read; such a message would block all others, and show only as a connection that is lost \
         again and again; allow it for this NATS user"
    )
}

/// Returns the subject in the server's `Permissions Violation for <what> "<subject>"`, quoted and escaped as in Go.
fn refused_subject<'a>(text: &'a str, what: &str) -> Option<&'a str> {
    let (_, rest) = text
        .strip_prefix("Permissions Violation for ")?
        .split_once(what)?;
    let rest = rest.trim_start().strip_prefix('"')?;
    let mut is_escaped = false;
    let end = rest.find(|character| {
        let is_end = character == '"' && !is_escaped;
        is_escaped = character == '\\' && !is_escaped;
        is_end
    })?;
    Some(&rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_their_subject() {
        let (subscription, publish) = ("Subscription to", "Publish to");
        for (text, what, subject) in [
            (r#"Subscription to "a.>""#, subscription, Some("a.>")),
            (
                r#"Subscription to "a.>" using queue "q""#,
                subscription,
                Some("a.>"),
            ),
            (
                r#"Subscription to "a.>" (sid "1")"#,
                subscription,
                Some("a.>"),
            ),
            (r#"Publish to "a.b""#, publish, Some("a.b")),
            (
                r#"Subscription to "a\"b\\\u200b.>" using queue "q""#,
                subscription,
                Some(r#"a\"b\\\u200b.>"#),
            ),
            (r#"Publish to "a.b""#, subscription, None),
        ] {
            let text = format!("Permissions Violation for {text}");
            assert_eq!(refused_subject(&text, what), subject, "{text}");
        }
        assert_eq!(refused_subject("Stale Connection", publish), None);
    }
}
