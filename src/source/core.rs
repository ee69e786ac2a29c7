//! Core NATS: at most once. Messages that arrive while a webhook is slow wait in a bounded buffer.

use std::{future::pending, sync::Arc, time::Duration};

use async_nats::{Message, Subscriber};
use futures::FutureExt;
use log::error;
use tokio::time::{Instant, sleep_until};

use super::{
    Delivery, arrived,
    buffer::{BUFFER_BYTES, Buffer},
    next_of,
};
use crate::{
    monitor::Monitor,
    nats::{Connection, ConnectionEvents},
    text::count,
};

/// Drops are reported at most this often.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// A core subscription with its buffer.
pub struct Core {
    connection: Connection,
    events: ConnectionEvents,
    subject: String,
    queue_group: Option<String>,
    subscriber: Option<Subscriber>,
    /// Whether we have ended the subscription.
    is_stopped: bool,
    waiting: Buffer,
    drops: Drops,
    monitor: Arc<Monitor>,
}

/// Messages that did not fit into the buffer.
#[derive(Default)]
struct Drops {
    total: u64,
    unreported: u64,
    next_report: Option<Instant>,
}

impl Core {
    pub(super) fn new(
        connection: Connection,
        events: ConnectionEvents,
        subject: String,
        queue_group: Option<String>,
        monitor: Arc<Monitor>,
    ) -> Self {
        Self {
            connection,
            events,
            subject,
            queue_group,
            subscriber: None,
            is_stopped: false,
            waiting: Buffer::default(),
            drops: Drops::default(),
            monitor,
        }
    }

    pub(super) async fn open(&mut self) -> anyhow::Result<()> {
        let (client, subject) = (self.connection.client(), self.subject.clone());
        let subscriber = match self.queue_group.clone() {
            Some(group) => client.queue_subscribe(subject, group).await,
            None => client.subscribe(subject).await,
        };
        // It fails only if the client has crashed, which the events report.
        self.subscriber = subscriber.ok();
        self.events.confirm(&self.connection).await
    }

    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Delivery>> {
        loop {
            if let Some(delivery) = self.waiting.pop() {
                self.show_waiting();
                return Ok(Some(delivery));
            }
            if self.is_stopped && self.subscriber.is_none() {
                return Ok(None);
            }
            // If nothing waits, a message bypasses the buffer.
            if let Some(message) = self.step().await? {
                return Ok(Some(message.into()));
            }
        }
    }

    pub(super) fn waiting(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// Unsubscribes, so that the other members of the queue group get further messages.
    pub(super) async fn stop(&mut self) {
        self.is_stopped = true;
        let is_connected = self.connection.is_up();
        if let Some(subscriber) = &mut self.subscriber {
            // Messages in flight still arrive; without a connection there are none.
            if !is_connected || subscriber.drain().await.is_err() {
                self.end_subscription();
            }
        }
    }

    /// Takes the messages that have already arrived, and no more.
    fn end_subscription(&mut self) {
        if let Some(mut subscriber) = self.subscriber.take() {
            while let Some(Some(message)) = arrived(&mut subscriber).now_or_never() {
                self.take(message);
            }
        }
    }

    pub(super) async fn attend(&mut self) -> anyhow::Error {
        loop {
            match self.step().await {
                Ok(Some(message)) => self.take(message),
                Ok(None) => {}
                Err(reason) => return reason,
            }
        }
    }

    /// Receives a message, or handles another event if one comes first.
    async fn step(&mut self) -> anyhow::Result<Option<Message>> {
        tokio::select! {
            biased;
            connected = self.events.next() => connected?,
            message = next_of(&mut self.subscriber) => match message {
                Some(message) => return Ok(Some(message)),
                // We have ended it, or the client has crashed, which will be noticed in a moment.
                None => self.subscriber = None,
            },
            () = self.drops.report_due() => self.drops.report(),
        }
        Ok(None)
    }

    fn show_waiting(&self) {
        self.monitor
            .set_waiting(self.waiting.len() as u64, self.waiting.bytes());
    }

    /// Takes a message into the buffer, if it fits.
    fn take(&mut self, message: Message) {
        if self.waiting.push(message) {
            self.show_waiting();
        } else {
            self.monitor.add_dropped(1);
            self.drops.add();
        }
    }

    pub(super) fn close(mut self) {
        self.end_subscription();
        self.drops.report();
        if self.waiting.len() > 0 {
            let waiting = self.waiting.len() as u64;
            self.monitor.add_dropped(waiting);
            error!(
                "lost {} not yet relayed, because core mode does not keep them; NATS_STREAM would",
                count(waiting, "message")
            );
        }
    }
}

impl Drops {
    fn add(&mut self) {
        self.total += 1;
        self.unreported += 1;
        self.next_report.get_or_insert_with(Instant::now);
    }

    /// Resolves once there is something to report and the last report was long enough ago.
    async fn report_due(&self) {
        match self.next_report {
            Some(at) if self.unreported > 0 => sleep_until(at).await,
            _ => pending().await,
        }
    }

    fn report(&mut self) {
        if self.unreported > 0 {
            error!(
                "dropped {}, {} since the start: they arrive faster than the webhook accepts \
                 them, and {} MiB are already waiting; use NATS_STREAM to keep such messages",
                count(self.unreported, "message"),
                self.total,
                BUFFER_BYTES / (1024 * 1024)
            );
            self.unreported = 0;
            self.next_report = Some(Instant::now() + REPORT_EVERY);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    #[tokio::test]
    async fn drops_are_reported_at_once_and_then_once_a_second() {
        let mut drops = Drops {
            next_report: Some(Instant::now()),
            ..Drops::default()
        };
        let due = timeout(Duration::from_millis(20), drops.report_due()).await;
        assert!(due.is_err(), "there are none");
        drops.add();
        drops.add();
        timeout(REPORT_EVERY, drops.report_due()).await.unwrap();
        assert_eq!((drops.total, drops.unreported), (2, 2));
        drops.report();
        let reported = drops.next_report.unwrap();
        drops.add();
        assert_eq!((drops.total, drops.unreported), (3, 1));
        drops.report_due().await;
        assert!(Instant::now() >= reported);
    }
}
