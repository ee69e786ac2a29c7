//! The start of durable mode: subscribes to the inbox, and finds or creates the consumer.

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

/// Growing waits while JetStream does not answer, for example because it has no leader.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(5),
};

impl Durable {
    pub(in crate::source) async fn open(&mut self) -> anyhow::Result<()> {
        let inbox = format!("{}.*", self.requests.inbox());
        // It fails only if the client has crashed, which the events report.
        self.subscriber = self.connection.client().subscribe(inbox).await.ok();
        let mut failures = 0;
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
            failures += 1;
            let wait = BACKOFF.wait(failures);
            // Without a connection, the log says that already.
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
        // If there is no answer, the reason has already been logged.
        let _ = unreadable::try_to_look(&self.consumer).await;
        self.find_unreadable().await;
        Ok(())
    }
}

/// Finds or creates the consumer; returns the server's information about it, or why there is none at the moment. Warns
/// about settings that can cost messages or time.
///
/// # Errors
/// If it can never be used.
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
        // If it is missing, somebody deleted it as soon as it was created; try again.
        Err(error @ (ConsumerError::Missing | ConsumerError::Temporary(_))) => {
            Ok(Err(error.reason()))
        }
    }
}
