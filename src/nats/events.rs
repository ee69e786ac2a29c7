//! What the connection reports that its user must act on; and another client in the place of one that has
//! broken down.

use std::{sync::Arc, time::Instant};

use async_nats::{Client, RequestErrorKind, connection::State};
use log::error;
use tokio::{
    sync::{mpsc, watch},
    time::sleep_until,
};

use super::{
    Api, BACKOFF, LASTING, Refusals,
    connection::{ClientEnded, Current},
    start,
};
use crate::{
    backoff::Waits,
    config::{Config, Mode},
    monitor::Monitor,
};

/// What the connection reports that its user must act on.
pub struct ConnectionEvents {
    reports: mpsc::UnboundedReceiver<ConnectionEvent>,
    /// By which a client that has broken down is replaced, if it is to be.
    successor: Option<Successor>,
}

/// Puts another client in the place of one that has broken down.
pub(super) struct Successor {
    config: Arc<Config>,
    monitor: Arc<Monitor>,
    refusals: Refusals,
    current: watch::Sender<Current>,
    /// How long each of those that break down one after the other has to wait.
    waits: Waits,
    /// When the next one may start.
    due: Instant,
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
    /// The client has broken down, and there is another one, which knows of no subscription.
    Replaced,
    /// Our user may not look at the messages of the stream.
    LookRefused,
}

impl ConnectionEvents {
    pub(super) fn new(
        reports: mpsc::UnboundedReceiver<ConnectionEvent>,
        successor: Option<Successor>,
    ) -> Self {
        Self { reports, successor }
    }

    /// The next report.
    pub async fn next(&mut self) -> ConnectionEvent {
        if let Some(event) = self.reports.recv().await {
            return event;
        }
        let Some(successor) = &mut self.successor else {
            return ConnectionEvent::Fatal(ClientEnded.into());
        };
        match successor.replace().await {
            Ok(reports) => {
                self.reports = reports;
                ConnectionEvent::Replaced
            }
            Err(error) => ConnectionEvent::Fatal(error),
        }
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
                | ConnectionEvent::Connected
                | ConnectionEvent::Replaced => {}
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
                event = self.next() => match event {
                    ConnectionEvent::Fatal(reason) => return Err(reason),
                    ConnectionEvent::InboxRefused(reason) if needs_inbox => return Err(reason),
                    ConnectionEvent::InboxRefused(_) | ConnectionEvent::ProbeRefused => return Ok(()),
                    ConnectionEvent::Connected | ConnectionEvent::LookRefused => continue,
                    ConnectionEvent::Replaced => return Err(ClientEnded.into()),
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

impl Successor {
    pub(super) fn new(
        config: Arc<Config>,
        monitor: Arc<Monitor>,
        refusals: Refusals,
        current: watch::Sender<Current>,
    ) -> Self {
        Self {
            config,
            monitor,
            refusals,
            current,
            waits: BACKOFF.waits(),
            due: Instant::now(),
        }
    }

    /// Starts another client, with growing waits where one after the other breaks down; what it reports.
    async fn replace(&mut self) -> anyhow::Result<mpsc::UnboundedReceiver<ConnectionEvent>> {
        if self.due.elapsed() >= LASTING {
            self.waits = BACKOFF.waits();
        }
        sleep_until(self.due.into()).await;
        let (client, reports) = start(&self.config, &self.monitor, &self.refusals).await?;
        self.due = Instant::now() + self.waits.next();
        self.monitor.set_disconnected();
        let loss = match self.config.mode {
            Mode::Core { .. } => "; messages that were on their way are lost",
            Mode::Durable { .. } => "",
        };
        error!(
            "the NATS client has broken down and is replaced, as after a message that it cannot bear (a \
             carriage return in a header value, for one){loss}"
        );
        let api = Api::of(&self.config);
        self.current
            .send_modify(|current| *current = current.followed_by(client, &api));
        Ok(reports)
    }
}
