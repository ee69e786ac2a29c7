//! The end of a delivery: what there is to publish is published, and then the delivery is acknowledged.

use anyhow::bail;
use log::warn;

use super::{Publication, Publishers};
use crate::source::{Delivery, Outcome};

impl Publishers {
    /// Publishes a message, if there is one to publish, and tells the server what has become of the
    /// delivery; whether it has acknowledged that. Both on one connection and in this order, so that a
    /// server that has seen the ack has seen the message too; where a stream has to confirm the message,
    /// only once it has.
    ///
    /// # Errors
    /// If it cannot be published.
    pub async fn publish_and_ack(
        &self,
        delivery: &Delivery,
        mut publication: Option<Publication<'_>>,
        outcome: Outcome<'_>,
    ) -> anyhow::Result<bool> {
        if let Some(unconfirmed) = &publication
            && let Some(stream) = &unconfirmed.publisher.stream
        {
            if !is_current(delivery).await {
                return Ok(false);
            }
            let (subject, headers) = (unconfirmed.subject, &unconfirmed.headers);
            stream.publish(delivery, subject, headers).await?;
            publication = None;
        }
        loop {
            self.connection.up().await;
            if !is_current(delivery).await {
                return Ok(false);
            }
            let epoch = self.connection.epoch();
            let acknowledged = self.try_to_publish_and_ack(delivery, publication.as_ref(), outcome);
            let is_acknowledged = acknowledged.await?;
            // What was under way on a connection that broke may be lost: once more, then.
            if self.connection.epoch() == epoch {
                return Ok(is_acknowledged);
            }
        }
    }

    async fn try_to_publish_and_ack(
        &self,
        delivery: &Delivery,
        publication: Option<&Publication<'_>>,
        outcome: Outcome<'_>,
    ) -> anyhow::Result<bool> {
        let refusals = self.connection.refusals();
        if let Some(publication) = publication {
            publication.send(&self.connection, delivery).await?;
        }
        let Some(ack) = &delivery.ack else {
            self.connection.flush().await;
            return Ok(true);
        };
        let is_acknowledged = ack.confirm(outcome).await;
        // A refusal comes before the confirmation of the ack.
        if publication.is_some() && self.connection.refusals() > refusals {
            bail!("NATS refuses it");
        }
        Ok(is_acknowledged)
    }
}

/// Whether a message is still ours to publish; says so if it is not.
async fn is_current(delivery: &Delivery) -> bool {
    let Some(ack) = &delivery.ack else {
        return true;
    };
    let is_current = ack.is_current().await;
    if !is_current {
        warn!(
            subject:% = delivery.subject;
            "{} is abandoned: NATS has handed it, or what follows it, to another relay meanwhile",
            delivery.subject
        );
    }
    is_current
}
