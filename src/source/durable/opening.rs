//! How durable mode begins: the consumer is found or created, and the inbox subscribed to.

use std::time::Duration;

use async_nats::jetstream::consumer::Info;
use log::{info, warn};
use tokio::time::sleep;

use super::Durable;
use crate::{
    backoff::Backoff,
    source::{Consumer, ConsumerError, unreadable},
    text::count,
};

/// Growing waits for a JetStream that does not answer, as without a leader.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(5),
};

impl Durable {
    pub(in crate::source) async fn open(&mut self) -> anyhow::Result<()> {
        let inbox = format!("{}.*", self.requests.inbox());
        // It only fails where the client crashed, which the events tell.
        self.subscriber = self.connection.client().subscribe(inbox).await.ok();
        let mut waits = BACKOFF.waits();
        loop {
            let reason = tokio::select! {
                biased;
                reason = self.events.fatal() => return Err(reason),
                found = find(&self.consumer) => match found? {
                    Ok(info) => {
                        self.learn(&info);
                        break;
                    }
                    Err(reason) => reason,
                },
            };
            let wait = waits.next();
            // Without a connection that is what the log says already.
            if self.connection.is_up() {
                warn!("JetStream is not ready: {reason}; next attempt in {wait:.1?}");
                self.monitor
                    .set_obstacle(Some(format!("JetStream is not ready: {reason}")));
            }
            tokio::select! {
                biased;
                reason = self.events.fatal() => return Err(reason),
                () = sleep(wait) => {}
            }
        }
        self.deliveries.begin();
        // What it means that there is no answer was said where it became known.
        let _ = unreadable::try_to_look(&self.consumer).await;
        self.find_unreadable().await;
        Ok(())
    }
}

/// Finds the consumer, or creates it; returns what the server tells of it, or why it does not just now. Warns of
/// what can cost messages or time.
///
/// # Errors
/// If it never can be used.
async fn find(consumer: &Consumer) -> anyhow::Result<Result<Info, String>> {
    let stream = consumer.verify_stream().await?;
    match consumer.ensure().await {
        Ok(info) => {
            let warnings = consumer.warnings(&info.config);
            let waiting = count(info.num_pending + info.num_ack_pending as u64, "message");
            info!("waiting for the consumer {}: {waiting}", consumer.name);
            for warning in stream.into_iter().chain(warnings) {
                warn!("{warning}");
            }
            Ok(Ok(info))
        }
        Err(ConsumerError::Fatal(reason) | ConsumerError::NobodyAnswers(reason)) => Err(reason),
        // If it is missing, it was deleted as soon as it was created; once more, then.
        Err(error @ (ConsumerError::Missing | ConsumerError::Temporary(_))) => {
            Ok(Err(error.reason()))
        }
    }
}
