//! What the connection reports that its user must act on.

use async_nats::{Client, RequestErrorKind, connection::State};
use tokio::sync::mpsc;

use super::connection::ClientCrashed;

/// What the connection reports that its user must act on.
pub struct ConnectionEvents {
    reports: mpsc::UnboundedReceiver<ConnectionEvent>,
}

/// One such report.
#[derive(Debug)]
pub enum ConnectionEvent {
    /// The relay cannot go on.
    Fatal(anyhow::Error),
    /// Our user may not subscribe to an inbox, so a request gets no answer; with what to do about it.
    InboxRefused(anyhow::Error),
    /// Our user may not publish to an inbox, which only [`ConnectionEvents::confirm`] does.
    ProbeRefused,
    /// There is a new connection.
    Connected,
    /// Our user may not look at the messages of the stream.
    LookRefused,
}

impl ConnectionEvents {
    pub(super) fn new(reports: mpsc::UnboundedReceiver<ConnectionEvent>) -> Self {
        Self { reports }
    }

    /// Waits for the next report. A client that crashed is a fatal one: [`ClientCrashed`].
    pub async fn next(&mut self) -> ConnectionEvent {
        // The client is what reports, so the reports end with it.
        let event = self.reports.recv().await;
        event.unwrap_or_else(|| ConnectionEvent::Fatal(ClientCrashed.into()))
    }

    /// Resolves when the relay cannot go on, with the reason.
    pub async fn fatal(&mut self) -> anyhow::Error {
        loop {
            match self.next().await {
                ConnectionEvent::Fatal(reason) | ConnectionEvent::InboxRefused(reason) => {
                    return reason;
                }
                ConnectionEvent::ProbeRefused
                | ConnectionEvent::LookRefused
                | ConnectionEvent::Connected => {}
            }
        }
    }

    /// Resolves once the server has processed all that was sent before, subscriptions included.
    ///
    /// # Errors
    /// If it refused what the relay can't do without.
    pub async fn confirm(&mut self, client: &Client, needs_inbox: bool) -> anyhow::Result<()> {
        // The client has no round trip of its own to await, so this asks an inbox that nobody
        // listens to: "no responders" comes back at once, and after any refusal. A user without
        // permission to use inboxes gets a refusal, which is as good an answer.
        loop {
            tokio::select! {
                biased;
                event = self.next() => match event {
                    ConnectionEvent::Fatal(reason) => return Err(reason),
                    ConnectionEvent::InboxRefused(reason) if needs_inbox => return Err(reason),
                    ConnectionEvent::InboxRefused(_) | ConnectionEvent::ProbeRefused => return Ok(()),
                    ConnectionEvent::Connected | ConnectionEvent::LookRefused => continue,
                },
                answer = client.request(client.new_inbox(), "".into()) => match answer {
                    Err(error) if error.kind() == RequestErrorKind::TimedOut => {}
                    // Let a refusal that came along with the answer get here first.
                    _ => tokio::task::yield_now().await,
                },
            }
            while let Ok(event) = self.reports.try_recv() {
                if let ConnectionEvent::Fatal(reason) = event {
                    return Err(reason);
                }
            }
            if client.connection_state() == State::Connected {
                return Ok(());
            }
        }
    }
}
