use async_nats::{Client, Message, Subscriber};
use bytes::Bytes;

use super::{NatsServer, Relay, Webhook, next};

/// What most tests begin with: a relay that listens, between a server and a webhook; a client of the
/// server, and its subscription to all that is relayed.
pub struct Scene {
    pub nats: NatsServer,
    pub client: Client,
    pub relayed: Subscriber,
    pub webhook: Webhook,
    pub relay: Relay,
}

/// How the relay gets its messages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    Core,
    /// Out of the stream `CMS`.
    Durable,
}

impl Scene {
    pub async fn core(webhook: Webhook, changes: &[(&str, &str)]) -> Self {
        Self::on(NatsServer::start().await, Mode::Core, webhook, changes).await
    }

    pub async fn durable(webhook: Webhook, changes: &[(&str, &str)]) -> Self {
        let nats = NatsServer::with_stream().await;
        Self::on(nats, Mode::Durable, webhook, changes).await
    }

    /// On a server that has been prepared for it.
    pub async fn on(
        nats: NatsServer,
        mode: Mode,
        webhook: Webhook,
        changes: &[(&str, &str)],
    ) -> Self {
        let client = nats.client().await;
        let relayed = client.subscribe("relayed.>").await.unwrap();
        let relay = match mode {
            Mode::Core => Relay::listening(&nats, &webhook, changes).await,
            Mode::Durable => Relay::durable(&nats, &webhook, changes).await,
        };
        Self {
            nats,
            client,
            relayed,
            webhook,
            relay,
        }
    }

    /// Publishes a message on `cms.cache.x`.
    pub async fn publish(&self, payload: impl Into<Bytes>) {
        let sent = self.client.publish("cms.cache.x", payload.into());
        sent.await.unwrap();
    }

    /// The next message that is relayed, which has to come.
    pub async fn next(&mut self) -> Message {
        next(&mut self.relayed).await
    }
}
