//! Core NATS: at most once. What arrives while a webhook is slow waits in a bounded buffer.

use std::{collections::VecDeque, future::pending, sync::Arc, time::Duration};

use anyhow::Context;
use async_nats::{Client, HeaderMap, Message, Subject, Subscriber};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use log::error;
use tokio::time::{Instant, sleep_until};

use super::{Delivery, Origin};
use crate::{nats::Faults, status::Status};

/// How much may wait: subjects, headers and payloads, and what it costs to keep them.
const BUFFER_BYTES: usize = 64 * 1024 * 1024;

/// What keeping a message costs beside its own bytes, in a buffer that doubles whenever it is full.
/// It bounds the number of empty ones.
const MESSAGE_OVERHEAD: usize = 2 * size_of::<Waiting>();

/// For how many messages the buffer stays prepared once it is empty.
const KEPT_CAPACITY: usize = 64;

/// What keeping a header costs beside its own bytes.
const HEADER_OVERHEAD: usize = 128;

/// Drops are reported at most this often.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// A core subscription with its buffer.
pub struct Core {
    client: Client,
    faults: Faults,
    subject: String,
    queue_group: Option<String>,
    subscriber: Option<Subscriber>,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    drops: Drops,
    status: Arc<Status>,
}

/// A message in the buffer. It is smaller than a [`Delivery`], for there may be many.
struct Waiting {
    subject: Subject,
    headers: Option<Box<HeaderMap>>,
    payload: Bytes,
}

/// Messages that did not fit into the buffer.
#[derive(Default)]
struct Drops {
    unreported: u64,
    next_report: Option<Instant>,
}

impl Core {
    pub(super) fn new(
        client: Client,
        faults: Faults,
        subject: String,
        queue_group: Option<String>,
        status: Arc<Status>,
    ) -> Self {
        Self {
            client,
            faults,
            subject,
            queue_group,
            subscriber: None,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            drops: Drops::default(),
            status,
        }
    }

    pub(super) async fn open(&mut self) -> anyhow::Result<()> {
        let subject = self.subject.clone();
        let subscriber = match self.queue_group.clone() {
            Some(group) => self.client.queue_subscribe(subject, group).await,
            None => self.client.subscribe(subject).await,
        };
        self.subscriber = Some(subscriber.context("cannot subscribe")?);
        self.faults.confirm(&self.client).await
    }

    pub(super) async fn next(&mut self) -> anyhow::Result<Delivery> {
        loop {
            if let Some(message) = self.waiting.pop_front() {
                self.waiting_bytes -= message.cost();
                if self.waiting.is_empty() {
                    self.waiting.shrink_to(KEPT_CAPACITY);
                }
                self.show_waiting();
                return Ok(message.into());
            }
            self.step().await?;
        }
    }

    pub(super) async fn attend(&mut self) -> anyhow::Error {
        loop {
            if let Err(reason) = self.step().await {
                return reason;
            }
        }
    }

    /// Takes a message into the buffer, or reports drops, whichever is due first.
    async fn step(&mut self) -> anyhow::Result<()> {
        let Some(subscriber) = &mut self.subscriber else {
            return pending().await;
        };
        tokio::select! {
            biased;
            reason = self.faults.fatal() => return Err(reason),
            message = subscriber.next() => {
                self.take(message.context("the subscription ended by itself")?);
            }
            () = self.drops.report_due() => self.drops.report(&self.status),
        }
        Ok(())
    }

    fn show_waiting(&self) {
        self.status
            .set_waiting(self.waiting.len() as u64, self.waiting_bytes);
    }

    fn take(&mut self, message: Message) {
        let message = Waiting {
            subject: message.subject,
            headers: message.headers.map(Box::new),
            // As it comes it is a part of a larger read buffer, which would be kept along with it.
            payload: Bytes::copy_from_slice(&message.payload),
        };
        let bytes = message.cost();
        if self.waiting_bytes + bytes > BUFFER_BYTES && !self.waiting.is_empty() {
            self.status.add_dropped();
            return self.drops.add();
        }
        self.waiting_bytes += bytes;
        self.waiting.push_back(message);
        self.show_waiting();
    }

    pub(super) fn close(mut self) {
        if let Some(mut subscriber) = self.subscriber.take() {
            while let Some(Some(message)) = subscriber.next().now_or_never() {
                self.take(message);
            }
        }
        self.drops.report(&self.status);
        if !self.waiting.is_empty() {
            error!(
                "{} messages were still waiting and are not relayed",
                self.waiting.len()
            );
        }
    }
}

impl Waiting {
    /// What it counts in the buffer, in bytes.
    fn cost(&self) -> usize {
        let headers = self.headers.iter().flat_map(|headers| headers.iter());
        let headers = headers.map(|(name, values)| {
            let values = values
                .iter()
                .map(|value| value.as_str().len() + HEADER_OVERHEAD);
            AsRef::<[u8]>::as_ref(name).len() + values.sum::<usize>()
        });
        self.subject.len() + self.payload.len() + headers.sum::<usize>() + MESSAGE_OVERHEAD
    }
}

impl From<Waiting> for Delivery {
    fn from(message: Waiting) -> Self {
        Self {
            subject: message.subject,
            headers: message.headers.map(|headers| *headers).unwrap_or_default(),
            payload: message.payload,
            origin: Origin::Core,
            fault: None,
        }
    }
}

impl Drops {
    fn add(&mut self) {
        self.unreported += 1;
        self.next_report.get_or_insert_with(Instant::now);
    }

    /// Resolves when there is something to report and the last report is long enough ago.
    async fn report_due(&self) {
        match self.next_report {
            Some(at) if self.unreported > 0 => sleep_until(at).await,
            _ => pending().await,
        }
    }

    fn report(&mut self, status: &Status) {
        if self.unreported > 0 {
            error!(
                "dropped {} messages, {} since the start: they come faster than the webhook takes \
                 them, and {} MiB are waiting already; use NATS_STREAM to keep such messages",
                self.unreported,
                status.dropped(),
                BUFFER_BYTES / (1024 * 1024)
            );
            self.unreported = 0;
            self.next_report = Some(Instant::now() + REPORT_EVERY);
        }
    }
}
