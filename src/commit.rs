//! The point of no return: a message is published, and then its delivery is acknowledged.

mod stream;

use std::sync::Arc;

use async_nats::HeaderMap;

pub use self::stream::ConfirmingStream;
use crate::{
    config::{Config, FAILED_STREAM, RELAYED_STREAM},
    monitor::Monitor,
    nats::Connection,
    source::{Delivery, Outcome},
    subject::Prefix,
};

/// Publishes and acknowledges.
pub struct Commit {
    connection: Connection,
    monitor: Arc<Monitor>,
    /// Where relayed messages are published.
    pub relayed: Publisher,
    /// Where failed messages are published, if anywhere.
    pub failed: Option<Publisher>,
}

/// Where messages are published.
pub struct Publisher {
    /// The prefix of their subjects.
    pub prefix: Prefix,
    /// The stream that has to confirm them, if any.
    stream: Option<ConfirmingStream>,
}

/// A message to be published.
pub struct Publication<'a> {
    /// Where it is published.
    pub publisher: &'a Publisher,
    /// Its subject, below the publisher's prefix.
    pub subject: &'a str,
    /// Its headers; the payload is the delivery's.
    pub headers: HeaderMap,
}

impl Commit {
    /// Returns one that publishes and acknowledges on `connection`.
    #[must_use]
    pub fn new(connection: Connection, config: &Config, monitor: &Arc<Monitor>) -> Self {
        let publisher = |prefix: &Prefix, variable, stream: &Option<String>| Publisher {
            prefix: prefix.clone(),
            stream: stream.clone().map(|stream| {
                ConfirmingStream::new(connection.clone(), Arc::clone(monitor), variable, stream)
            }),
        };
        let failed_prefix = config.failed_prefix.as_ref();
        Self {
            relayed: publisher(
                &config.relayed_prefix,
                RELAYED_STREAM,
                &config.relayed_stream,
            ),
            failed: failed_prefix
                .map(|prefix| publisher(prefix, FAILED_STREAM, &config.failed_stream)),
            connection,
            monitor: Arc::clone(monitor),
        }
    }

    /// Verifies the streams that have to confirm published messages; waits while JetStream is not ready.
    ///
    /// # Errors
    /// If one of them cannot be used.
    pub async fn open(&self) -> anyhow::Result<()> {
        for (prefix, stream) in self.confirming_streams() {
            self.connection
                .until_ready(&self.monitor, || stream.open(prefix))
                .await?;
        }
        Ok(())
    }

    /// Publishes a message, if there is one to publish, and then acknowledges the delivery. Both go over one
    /// connection and in this order, so that a server that has seen the ack has seen the message too. If a
    /// stream has to confirm the message, the ack is sent only once it has. Returns whether the server
    /// confirmed the ack; if not, the message may be redelivered.
    ///
    /// # Errors
    /// If the message cannot be published.
    pub async fn commit(
        &self,
        delivery: &Delivery,
        mut publication: Option<Publication<'_>>,
        outcome: Outcome,
    ) -> anyhow::Result<bool> {
        if let Some(unconfirmed) = &publication
            && let Some(stream) = &unconfirmed.publisher.stream
        {
            let (subject, headers) = (unconfirmed.subject, &unconfirmed.headers);
            if !stream.publish(delivery, subject, headers).await? {
                return Ok(false);
            }
            publication = None;
        }
        loop {
            self.connection.up().await;
            if !delivery.may_be_published().await {
                return Ok(false);
            }
            let epoch = self.connection.epoch();
            if let Some(publication) = &publication {
                // Whether the server refuses the message must be known before the ack is sent.
                let is_sure = delivery.ack.is_some();
                let (subject, headers) = (publication.subject.into(), publication.headers.clone());
                self.connection
                    .publish_for_good(subject, headers, delivery.payload.clone(), is_sure)
                    .await?;
            }
            // Data in flight on a broken connection may be lost, so publish again.
            if publication.is_some() && self.connection.epoch() != epoch {
                continue;
            }
            let is_acknowledged = match &delivery.ack {
                Some(ack) => {
                    publication = None;
                    ack.confirm(outcome).await
                }
                None => {
                    self.connection.flush().await;
                    true
                }
            };
            if self.connection.epoch() == epoch {
                return Ok(is_acknowledged);
            }
        }
    }

    /// Returns the streams that have to confirm published messages, with the prefix of each.
    pub fn confirming_streams(&self) -> impl Iterator<Item = (&Prefix, &ConfirmingStream)> {
        let publishers = [Some(&self.relayed), self.failed.as_ref()];
        publishers
            .into_iter()
            .flatten()
            .filter_map(|publisher| Some((&publisher.prefix, publisher.stream.as_ref()?)))
    }
}
