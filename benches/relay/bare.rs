//! The bare loop: what the relay's libraries cost at the least. The same job by async-nats and reqwest as
//! anyone would write it: no retries, no timeouts, no metrics, no headers. It takes the same variables,
//! expects everything to go well, and ends if it doesn't.

use std::{
    env,
    io::{Write, stderr},
    time::Instant,
};

use anyhow::{Context, anyhow};
use async_nats::{Message, jetstream};
use futures::StreamExt;

struct Bare {
    nats: async_nats::Client,
    jetstream: jetstream::Context,
    http: reqwest::Client,
    url: String,
    prefix: String,
    relayed_prefix: String,
    /// Whether a stream has to confirm what is relayed.
    is_confirmed: bool,
}

#[tokio::main(flavor = "current_thread")]
pub async fn run() -> anyhow::Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let nats = async_nats::connect(env::var("NATS_HOST")?).await?;
    let bare = Bare {
        jetstream: jetstream::new(nats.clone()),
        nats,
        http: reqwest::Client::builder().tls_certs_only([]).build()?,
        url: env::var("WEBHOOK_DESTINATION")?,
        prefix: env::var("NATS_SUBJECT_PREFIX")?,
        relayed_prefix: env::var("NATS_RELAYED_SUBJECT_PREFIX")?,
        is_confirmed: env::var("NATS_RELAYED_STREAM").is_ok(),
    };
    match (env::var("NATS_STREAM"), env::var("NATS_CONSUMER")) {
        (Ok(stream), Ok(consumer)) => bare.relay_durably(&stream, &consumer).await,
        _ => bare.relay_all().await,
    }
}

impl Bare {
    async fn relay_all(&self) -> anyhow::Result<()> {
        let mut messages = self.nats.subscribe(format!("{}.>", self.prefix)).await?;
        while let Some(message) = messages.next().await {
            let start = Instant::now();
            let subject = self.forward(&message).await?;
            self.nats.flush().await?;
            log(&message, &subject, start)?;
        }
        Ok(())
    }

    async fn relay_durably(&self, stream: &str, consumer: &str) -> anyhow::Result<()> {
        let consumer: jetstream::consumer::PullConsumer = self
            .jetstream
            .get_consumer_from_stream(consumer, stream)
            .await?;
        let mut messages = consumer.messages().await?;
        while let Some(message) = messages.next().await {
            let message = message?;
            let start = Instant::now();
            let subject = self.forward(&message).await?;
            message.double_ack().await.map_err(|error| anyhow!(error))?;
            log(&message, &subject, start)?;
        }
        Ok(())
    }

    /// POSTs a message, and publishes it; the subject on which it did.
    async fn forward(&self, message: &Message) -> anyhow::Result<String> {
        let request = self.http.post(&self.url).body(message.payload.clone());
        let response = request.send().await?.error_for_status()?;
        response.bytes().await?;
        let rest = message.subject.strip_prefix(&self.prefix);
        let subject = format!("{}{}", self.relayed_prefix, rest.context("other prefix")?);
        let (to, payload) = (subject.clone(), message.payload.clone());
        match self.is_confirmed {
            true => drop(self.jetstream.publish(to, payload).await?.await?),
            false => self.nats.publish(to, payload).await?,
        }
        Ok(subject)
    }
}

fn log(message: &Message, relayed_subject: &str, start: Instant) -> anyhow::Result<()> {
    let (subject, elapsed) = (&message.subject, start.elapsed());
    let line = format!("{subject} -> {relayed_subject} (200, {elapsed:.1?})\n");
    Ok(stderr().write_all(line.as_bytes())?)
}
