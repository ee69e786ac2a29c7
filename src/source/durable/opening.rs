//! How durable mode begins: the consumer is found or created, and the inbox subscribed to.

use std::time::Duration;

use log::warn;
use tokio::time::sleep;

use super::Durable;
use crate::{
    backoff::Backoff,
    source::{ConsumerError, unreadable},
};

/// Growing waits for a JetStream that does not answer, as without a leader.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(5),
};

impl Durable {
    pub(in crate::source) async fn open(&mut self) -> anyhow::Result<()> {
        let mut waits = BACKOFF.waits();
        self.subscribe().await;
        loop {
            let stream = tokio::select! {
                biased;
                reason = self.events.fatal() => return Err(reason),
                stream = self.consumer.verify_stream() => stream?,
            };
            let reason = tokio::select! {
                biased;
                reason = self.events.fatal() => return Err(reason),
                ready = self.consumer.ensure() => match ready {
                    Ok(info) => {
                        self.learn(&info);
                        self.deliveries.begin();
                        // What it means that there is no answer was said where it became known.
                        let _ = unreadable::try_to_look(&self.consumer).await;
                        let consumer = self.consumer.warnings(&info.config);
                        for warning in stream.into_iter().chain(consumer) {
                            warn!("{warning}");
                        }
                        self.find_unreadable().await;
                        return Ok(());
                    }
                    Err(ConsumerError::Fatal(reason) | ConsumerError::NobodyAnswers(reason)) => {
                        return Err(reason);
                    }
                    // If it is missing, it was deleted as soon as it was created; once more, then.
                    Err(error @ (ConsumerError::Missing | ConsumerError::Temporary(_))) => {
                        error.reason()
                    }
                },
            };
            let wait = waits.next();
            // Without a connection that is what the log says already.
            if self.connection.is_up() {
                warn!("JetStream is not ready: {reason}; next attempt in {wait:.1?}");
            }
            tokio::select! {
                biased;
                reason = self.events.fatal() => return Err(reason),
                () = sleep(wait) => {}
            }
        }
    }

    async fn subscribe(&mut self) {
        let client = self.connection.client();
        // It only fails where the client crashed, which the events tell.
        self.subscriber = client
            .subscribe(format!("{}.*", self.requests.inbox()))
            .await
            .ok();
    }
}
