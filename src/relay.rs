//! The loop: take a message, forward it, take the next one; and every way of stopping. This is where promise 2 is
//! kept, in durable mode together with the server (see the crate's documentation).

use std::{future::pending, ops::ControlFlow, pin::pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt};
use log::{error, info};
use tokio::time::{Instant, sleep_until};

use crate::{
    config::Config,
    forward::Forward,
    monitor::Monitor,
    nats::ClientCrashed,
    source::{Delivery, Source},
    text::count,
};

/// Relays messages from a source.
pub struct Relay {
    source: Source,
    forward: Forward,
    config: Arc<Config>,
    monitor: Arc<Monitor>,
    /// The deadline of a stop; `None` until a stop is requested.
    deadline: Option<Instant>,
}

impl Relay {
    /// Returns a relay that takes messages from `source` and hands them to `forward`.
    #[must_use]
    pub fn new(
        source: Source,
        forward: Forward,
        config: Arc<Config>,
        monitor: Arc<Monitor>,
    ) -> Self {
        Self {
            source,
            forward,
            config,
            monitor,
            deadline: None,
        }
    }

    /// Relays one message after the other. The first item of `stop` lets the current message finish, and
    /// those that wait and that no server keeps, within [`Config::shutdown_timeout`]; the second one stops
    /// it immediately.
    ///
    /// # Errors
    /// If it cannot continue; [`ClientCrashed`] if a new relay with a new client may be able to.
    pub async fn run(mut self, stop: &mut (impl Stream<Item = ()> + Unpin)) -> anyhow::Result<()> {
        let ended = self.relay_all(stop).await;
        self.monitor.set_obstacle(Some("not subscribed".to_owned()));
        self.source.close().await;
        match ended {
            // It was stopping anyway, so there is no reason to start over.
            Err(reason) if self.deadline.is_some() && reason.is::<ClientCrashed>() => {
                error!("{reason} while the relay was stopping");
                Ok(())
            }
            ended => ended,
        }
    }

    async fn relay_all(
        &mut self,
        stop: &mut (impl Stream<Item = ()> + Unpin),
    ) -> anyhow::Result<()> {
        tokio::select! {
            biased;
            _ = stop.next() => return Ok(()),
            opened = self.source.open() => opened?,
        }
        tokio::select! {
            biased;
            _ = stop.next() => return Ok(()),
            opened = self.forward.open() => opened?,
            reason = self.source.attend() => return Err(reason),
        }
        let Config {
            prefix,
            relayed_prefix,
            ..
        } = &*self.config;
        info!(
            "listening on {prefix}.>; POST to {}, then republish on {relayed_prefix}.>",
            self.config.webhook.names()
        );
        self.monitor.set_obstacle(None);
        self.monitor.started();
        loop {
            let delivery = tokio::select! {
                biased;
                _ = stop.next() => match self.deadline {
                    None => {
                        let Self { source, config, monitor, .. } = self;
                        let timeout = config.shutdown_timeout;
                        let until = begin_to_stop(source, monitor, timeout, None);
                        self.deadline = Some(until.await);
                        continue;
                    }
                    Some(_) => return Ok(()),
                },
                () = reached(self.deadline) => return Ok(()),
                delivery = self.source.next() => match delivery? {
                    Some(delivery) => delivery,
                    None => return Ok(()),
                },
            };
            if self.relay(&delivery, stop).await?.is_break() {
                return Ok(());
            }
        }
    }

    /// Relays one message. Returns whether to take the next one.
    async fn relay(
        &mut self,
        delivery: &Delivery,
        stop: &mut (impl Stream<Item = ()> + Unpin),
    ) -> anyhow::Result<ControlFlow<()>> {
        let Self {
            source,
            forward,
            config,
            monitor,
            deadline,
        } = self;
        let mut forwarding = pin!(forward.forward(delivery));
        loop {
            tokio::select! {
                biased;
                is_acknowledged = &mut forwarding => {
                    source.done(is_acknowledged);
                    return Ok(ControlFlow::Continue(()));
                }
                reason = source.attend() => {
                    forward.abandon(delivery, &reason.to_string());
                    return Err(reason);
                }
                _ = stop.next() => match deadline {
                    None => {
                        let timeout = config.shutdown_timeout;
                        let current = Some(delivery);
                        let until = begin_to_stop(source, monitor, timeout, current);
                        *deadline = Some(until.await);
                    }
                    Some(_) => {
                        forward.abandon(delivery, "stopped at once");
                        return Ok(ControlFlow::Break(()));
                    }
                },
                () = reached(*deadline) => {
                    let timeout = config.shutdown_timeout;
                    let reason = format!("not finished within SHUTDOWN_TIMEOUT, {timeout:?}");
                    forward.abandon(delivery, &reason);
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
    }
}

/// Stops taking messages, logs what is pending, and returns the deadline.
async fn begin_to_stop(
    source: &mut Source,
    monitor: &Monitor,
    timeout: Duration,
    current: Option<&Delivery>,
) -> Instant {
    monitor.stopping();
    source.stop().await;
    if let Some(delivery) = current {
        let waiting = match source.waiting() {
            0 => String::new(),
            waiting => format!(" and {} behind it", count(waiting, "message")),
        };
        info!(
            "stopping: waiting up to {timeout:?} for {}{waiting} (Ctrl-C again to stop now)",
            delivery.subject
        );
    }
    Instant::now() + timeout
}

/// Resolves at the deadline, if there is one.
async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
