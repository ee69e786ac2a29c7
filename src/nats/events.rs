//! The events of the connection: logged, counted, and passed on where the relay must act on them.

use std::{
    sync::{Arc, OnceLock, atomic::Ordering::Relaxed},
    time::Instant,
};

use anyhow::anyhow;
use async_nats::{ClientError, Event, ServerError, Statistics};
use log::{error, info, warn};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{
    api::api_prefix,
    connection::{ClientCrashed, Connection, Refusals},
    servers::{Progress, explain, is_refusal, show},
};
use crate::{
    config::{Config, Mode},
    monitor::Monitor,
};

/// The events of the connection: a new connection, or why the relay cannot continue.
pub struct ConnectionEvents(mpsc::UnboundedReceiver<anyhow::Result<()>>);

impl ConnectionEvents {
    /// Resolves when there is a new connection.
    ///
    /// # Errors
    /// If the relay cannot continue; [`ClientCrashed`] if the client has crashed.
    pub async fn next(&mut self) -> anyhow::Result<()> {
        // The client sends the events, so they end with it.
        let event = self.0.recv().await;
        event.unwrap_or_else(|| Err(anyhow::Error::msg(ClientCrashed)))
    }

    /// Resolves if the relay cannot continue, with the reason.
    pub async fn fatal(&mut self) -> anyhow::Error {
        loop {
            if let Err(reason) = self.next().await {
                return reason;
            }
        }
    }

    /// Resolves once the server has processed everything sent before, including subscriptions.
    ///
    /// # Errors
    /// If it refused something that the relay can't do without.
    pub async fn confirm(&mut self, connection: &Connection) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                biased;
                event = self.next() => event?,
                () = connection.round_trip() => match self.0.try_recv() {
                    // It came along with the answer.
                    Ok(event) => event?,
                    Err(_) => return Ok(()),
                },
            }
        }
    }
}

/// Logs and counts the client's events, and passes on those that others must act on.
pub(super) struct Observer {
    pub(super) config: Arc<Config>,
    pub(super) monitor: Arc<Monitor>,
    /// Whether this is only a check, which fails where the relay would warn.
    is_check: bool,
    pub(super) progress: Mutex<Progress>,
    /// The client's own statistics, which show a connection before its event comes.
    pub(super) statistics: OnceLock<Arc<Statistics>>,
    pub(super) refusals: Arc<Refusals>,
    events: mpsc::UnboundedSender<anyhow::Result<()>>,
}

impl Observer {
    pub(super) fn new(
        config: &Arc<Config>,
        monitor: &Arc<Monitor>,
        is_check: bool,
    ) -> (Arc<Self>, ConnectionEvents) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let observer = Self {
            config: Arc::clone(config),
            monitor: Arc::clone(monitor),
            is_check,
            progress: Mutex::default(),
            statistics: OnceLock::new(),
            refusals: Arc::default(),
            events: sender,
        };
        (Arc::new(observer), ConnectionEvents(receiver))
    }

    /// Returns whether a lost connection loses messages.
    fn is_lossy(&self) -> bool {
        matches!(self.config.mode, Mode::Core { .. })
    }

    pub(super) fn observe(&self, event: Event) {
        match event {
            Event::Connected => {
                self.refusals.forget_permitted();
                let mut progress = self.progress.lock();
                progress.was_accepted = true;
                progress.connected = Some(Instant::now());
                let server = progress.server.as_ref().map(show).unwrap_or_default();
                info!("connected to NATS at {server}");
                self.monitor.set_connected(server);
                self.tell(Ok(()));
            }
            Event::Disconnected => {
                self.monitor.set_disconnected();
                if self.is_lossy() {
                    error!(
                        "lost the connection to NATS; messages that were on their way or are published \
                         before it is back are lost (NATS_STREAM would keep them); a message that no \
                         client can read, such as one with malformed headers, also causes this"
                    );
                } else {
                    warn!("lost the connection to NATS; reconnecting");
                }
            }
            Event::ServerError(ServerError::Other(text)) => self.observe_server_error(&text),
            event @ (Event::LameDuckMode | Event::SlowConsumer(_) | Event::ServerError(_)) => {
                warn!("the NATS client reports: {event}");
            }
            Event::ClientError(ClientError::Other(kind)) if is_refusal(&kind) => {
                let progress = self.progress.lock();
                if let (false, Some(server)) = (progress.was_accepted, &progress.server) {
                    let reason = explain(&kind, server, &self.config.nats);
                    self.tell(Err(anyhow!("NATS at {} {reason}", show(server))));
                }
            }
            // A failed attempt to connect is logged with its reason when the next server is chosen.
            Event::ClientError(_) => {}
            // We have caused these ourselves.
            Event::Draining | Event::Closed => {}
        }
    }

    /// Handles an error of the server about us (`-ERR` of the NATS client protocol).
    fn observe_server_error(&self, text: &str) {
        let inbox = &self.config.inbox_prefix;
        match refused_subject(text) {
            Some((what, subject)) if what.starts_with("Subscription") => {
                if inbox.contains(subject) {
                    return self.inbox_refused(anyhow!(
                        "no permission to subscribe to {}, where NATS answers; allow it for this NATS \
                         user, or set NATS_INBOX_PREFIX to a prefix that this user may subscribe to",
                        inbox.wildcard()
                    ));
                }
                // It subscribes to nothing else, whatever the server quotes.
                self.tell(Err(anyhow!(
                    "no permission to subscribe to {}; allow it for this NATS user",
                    self.config.prefix.wildcard()
                )));
            }
            Some((_, subject)) => self.observe_refused_publish(subject),
            None => match &text.to_ascii_lowercase()[..] {
                "maximum control line exceeded" | "maximum payload violation" => {
                    self.refused(&format!(
                        "a message is too large for the NATS server ({text}); raise max_control_line or \
                         max_payload of the server"
                    ));
                }
                // The first subscription is that of an inbox, or core mode's own.
                "maximum subscriptions exceeded" => {
                    self.inbox_refused(anyhow!("NATS refused the subscription: {text}"));
                }
                _ => error!("the NATS server reports: {text}"),
            },
        }
    }

    fn observe_refused_publish(&self, refused: &str) {
        let inbox = &self.config.inbox_prefix;
        if inbox.contains(refused) {
            // Core mode can do without it, because it hardly ever makes requests.
            if !self.is_lossy() && !self.refusals.is_inbox_known.swap(true, Relaxed) {
                warn!(
                    "no permission to publish on {}, by which the relay learns whether NATS refuses a \
                     message; each attempt leaves an error in the server's log; allow it for this NATS user",
                    inbox.wildcard()
                );
            }
            return self.refusals.inbox.notify_one();
        }
        let request = refused.strip_prefix(&api_prefix(&self.config));
        if request.is_some_and(|request| request.starts_with("STREAM.MSG.GET.")) {
            let reason = format!(
                "no permission to publish on {refused}, by which the relay finds a message that no client \
                 can read; such a message would block all others, and show only as a connection that is \
                 lost again and again; allow it for this NATS user"
            );
            return match self.is_check {
                true => self.tell(Err(anyhow!(reason))),
                false => warn!("{reason}"),
            };
        }
        let stream = request.and_then(|request| request.strip_prefix("STREAM.INFO."));
        if let Some(stream) = stream.filter(|stream| self.is_only_input(stream)) {
            return warn!(
                "cannot tell whether the limits of the stream {stream} can drop a message that is being relayed; \
                 allow {refused} for this NATS user"
            );
        }
        let allow = format!("no permission to publish on {refused}; allow it for this NATS user");
        match refused.starts_with("$JS.") {
            true => self.tell(Err(anyhow!(allow))),
            false => self.refused(&allow),
        }
    }

    /// Returns whether the relay consumes this stream, and does not publish into it as well.
    fn is_only_input(&self, stream: &str) -> bool {
        let config = &self.config;
        let mut outputs = [&config.relayed_stream, &config.failed_stream].into_iter();
        matches!(&config.mode, Mode::Durable { stream: input, .. } if input == stream)
            && !outputs.any(|output| output.as_deref() == Some(stream))
    }

    fn refused(&self, line: &str) {
        self.refusals.add();
        self.monitor.metrics.publish_refused.inc();
        error!("{line}");
    }

    /// Reports a refused inbox, which core mode can do without unless streams have to confirm what it publishes.
    fn inbox_refused(&self, reason: anyhow::Error) {
        self.refusals.inbox.notify_one();
        let config = &self.config;
        if !self.is_lossy() || config.relayed_stream.is_some() || config.failed_stream.is_some() {
            self.tell(Err(reason));
        }
    }

    fn tell(&self, event: anyhow::Result<()>) {
        // It fails only while the relay exits.
        let _ = self.events.send(event);
    }
}

/// Returns the operation that the server does not permit, and the subject up to its first quotation mark: `Permissions
/// Violation for <what> "<subject>"`.
fn refused_subject(text: &str) -> Option<(&str, &str)> {
    let (what, rest) = text
        .strip_prefix("Permissions Violation for ")?
        .split_once('"')?;
    Some((what, rest.split('"').next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_their_subject() {
        for (text, what, subject) in [
            (r#"Publish to "a.b""#, "Publish to ", "a.b"),
            (r#"Subscription to "a.>""#, "Subscription to ", "a.>"),
            (
                r#"Subscription to "a.>" using queue "q""#,
                "Subscription to ",
                "a.>",
            ),
            (
                r#"Subscription to "a.>" (sid "1")"#,
                "Subscription to ",
                "a.>",
            ),
        ] {
            let text = format!("Permissions Violation for {text}");
            assert_eq!(refused_subject(&text), Some((what, subject)), "{text}");
        }
        assert_eq!(refused_subject("Stale Connection"), None);
    }
}
