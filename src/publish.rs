//! Where messages are published: under a prefix, and maybe into the stream that keeps it.

mod ending;
mod stream;

use std::sync::Arc;

use anyhow::bail;
use async_nats::{HeaderMap, PublishError, header::NATS_MESSAGE_ID, jetstream::response::Response};
use log::warn;
use reqwest::header::HeaderValue;
use tokio::{time::sleep, try_join};

use self::stream::BACKOFF;
pub use self::stream::ConfirmingStream;
use crate::{
    config::{Config, FAILED_STREAM, Mode, RELAYED_STREAM},
    monitor::Monitor,
    nats::{Connection, Failure},
    republish::StreamHeaders,
    source::Delivery,
    subject::Prefix,
};

/// Where a relay publishes.
pub struct Publishers {
    connection: Connection,
    /// The prefix of what it takes.
    prefix: Prefix,
    /// The stream that it takes it from, if it does.
    input: Option<String>,
    /// Where it publishes what is relayed.
    pub relayed: Publisher,
    /// Where it publishes what is given up, if it does.
    pub failed: Option<Publisher>,
}

/// Where messages are published.
pub struct Publisher {
    /// Under which prefix.
    pub prefix: Prefix,
    /// The stream that has to confirm them, if one has to.
    pub stream: Option<ConfirmingStream>,
    /// Whether a message that has no id of its own gets one.
    adds_id: bool,
    /// Appended to each id where one stream keeps several of the relay's prefixes: it would take the
    /// message for a duplicate of itself under another one.
    suffix: &'static str,
}

/// A message to be published.
pub struct Publication<'a> {
    /// Where.
    pub publisher: &'a Publisher,
    /// The subject, below the publisher's prefix.
    pub subject: &'a str,
    /// With these headers; the payload is the delivery's.
    pub headers: HeaderMap,
}

impl Publication<'_> {
    /// Publishes it once, fire and forget.
    ///
    /// # Errors
    /// If the client refuses it.
    pub async fn send(
        &self,
        connection: &Connection,
        delivery: &Delivery,
    ) -> Result<(), PublishError> {
        let (subject, headers) = (self.subject.into(), self.headers.clone());
        connection
            .publish(subject, None, headers, delivery.payload.clone())
            .await
    }
}

impl Publishers {
    /// As the configuration says.
    #[must_use]
    pub fn new(connection: Connection, config: &Config, monitor: &Arc<Monitor>) -> Self {
        let confirmed_by = |variable, stream: &Option<String>| {
            let connection = connection.clone();
            let monitor = Arc::clone(monitor);
            Some(ConfirmingStream::new(
                connection,
                monitor,
                variable,
                stream.clone()?,
            ))
        };
        let input = match &config.mode {
            Mode::Core { .. } => None,
            Mode::Durable { stream, .. } => Some(stream.clone()),
        };
        let relayed = confirmed_by(RELAYED_STREAM, &config.relayed_stream);
        let relayed = Publisher::new(config.relayed_prefix.clone(), relayed, input.is_some());
        let failed = config.failed_prefix.clone().map(|prefix| {
            let failed = confirmed_by(FAILED_STREAM, &config.failed_stream);
            Publisher::new(prefix, failed, false)
        });
        Self {
            connection,
            prefix: config.prefix.clone(),
            input,
            relayed,
            failed,
        }
    }

    /// Verifies the streams that are to keep what is published; waits for a JetStream that is not ready.
    ///
    /// # Errors
    /// If one of them cannot be used.
    pub async fn open(&mut self) -> anyhow::Result<()> {
        let mut waits = BACKOFF.waits();
        loop {
            let reason = match self.try_open().await {
                Ok(()) => return Ok(()),
                Err(Failure::Permanent(reason)) => bail!(reason),
                Err(Failure::Temporary(reason)) => reason,
            };
            let wait = waits.next();
            // Without a connection that is what the log says already.
            if self.connection.is_up() {
                warn!("JetStream is not ready: {reason}; next attempt in {wait:.1?}");
            }
            sleep(wait).await;
        }
    }

    async fn try_open(&mut self) -> Result<(), Failure> {
        let Self {
            connection,
            prefix,
            relayed,
            failed,
            ..
        } = self;
        let input = self.input.as_deref();
        let failed_prefix = failed.iter().map(|failed| &failed.prefix);
        let others: Vec<_> = failed_prefix.chain([&*prefix]).collect();
        let relayed_open = relayed.open(connection, input, &others);
        let others = [&*prefix, &relayed.prefix];
        let failed_open = async {
            match &failed {
                Some(failed) => failed.open(connection, input, &others).await,
                None => Ok(false),
            }
        };
        let (relayed_shares, failed_shares) = try_join!(relayed_open, failed_open)?;
        relayed.suffix = if relayed_shares { ".relayed" } else { "" };
        if let Some(failed) = failed {
            failed.suffix = if failed_shares { ".failed" } else { "" };
        }
        Ok(())
    }

    /// The streams that are to keep what is published, with the prefix of each.
    pub fn confirming_streams(&self) -> impl Iterator<Item = (&Prefix, &ConfirmingStream)> {
        let publishers = [Some(&self.relayed), self.failed.as_ref()];
        publishers
            .into_iter()
            .flatten()
            .filter_map(|publisher| Some((&publisher.prefix, publisher.stream.as_ref()?)))
    }
}

impl Publisher {
    fn new(prefix: Prefix, stream: Option<ConfirmingStream>, adds_id: bool) -> Self {
        Self {
            prefix,
            adds_id: adds_id || stream.is_some(),
            stream,
            suffix: "",
        }
    }

    /// Verifies the stream, if there is one. Whether that one, or else the stream `input`, keeps one of the
    /// `others` as well as this prefix.
    async fn open(
        &self,
        connection: &Connection,
        input: Option<&str>,
        others: &[&Prefix],
    ) -> Result<bool, Failure> {
        match (&self.stream, input) {
            (Some(stream), _) => {
                let subjects = stream.open(&self.prefix).await?;
                Ok(others.iter().any(|other| other.meets_any(&subjects)))
            }
            (None, Some(input)) => Ok(keeps(connection, input, &self.prefix).await),
            (None, None) => Ok(false),
        }
    }

    /// What streams are to know a message by: its own id, else its position in the stream that it comes
    /// from, else the id that the webhook was told.
    #[must_use]
    pub fn stream_headers(
        &self,
        delivery: &Delivery,
        webhook_id: &HeaderValue,
    ) -> StreamHeaders<'_> {
        let own = delivery.headers.get(NATS_MESSAGE_ID);
        let own = own.map(|id| id.as_str()).filter(|id| !id.is_empty());
        let other = match &delivery.ack {
            Some(ack) => Some(&ack.id[..]),
            None => webhook_id.to_str().ok(),
        };
        let id = own.or(other.filter(|_| self.adds_id));
        StreamHeaders {
            id: id.map(|id| [id, self.suffix].concat()),
            stream: self.stream.as_ref().map(ConfirmingStream::name),
        }
    }
}

/// Whether a stream keeps what is published under a prefix, as far as our user may know.
async fn keeps(connection: &Connection, stream: &str, prefix: &Prefix) -> bool {
    match connection.stream_info(stream).await {
        Ok(Response::Ok(info)) => prefix.meets_any(&info.config.subjects),
        // The source of these messages says so.
        Ok(Response::Err { .. }) | Err(_) => false,
    }
}
