//! The loop: take a message, have it forwarded, then the next one; and every way of stopping. Promise 2 is
//! kept here, and in durable mode by the server (see the crate's documentation).

use std::{future::pending, ops::ControlFlow, pin::pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt};
use log::info;
use tokio::time::{Instant, sleep_until};

use crate::{
    config::Config,
    forward::Forward,
    monitor::{Heartbeat, Monitor},
    source::{Delivery, Source},
    text::count,
};

/// Everything it takes to relay messages.
pub struct Relay {
    source: Source,
    forward: Forward,
    config: Arc<Config>,
    monitor: Arc<Monitor>,
    heartbeat: Arc<Heartbeat>,
}

impl Relay {
    /// A relay that takes from `source` and hands over to `forward`.
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
            heartbeat: Arc::new(Heartbeat::new(config.status_listen.is_some())),
            config,
            monitor,
        }
    }

    /// Relays one message after the other. The first item of `stop` lets the current message finish, and
    /// those that wait and that no server keeps, within [`Config::shutdown_timeout`]; the second one ends
    /// it at once.
    ///
    /// # Errors
    /// When it cannot go on.
    pub async fn run(mut self, mut stop: impl Stream<Item = ()> + Unpin) -> anyhow::Result<()> {
        let (heartbeat, monitor) = (Arc::clone(&self.heartbeat), Arc::clone(&self.monitor));
        let ended = tokio::select! {
            biased;
            ended = self.relay_all(&mut stop) => ended,
            never = heartbeat.beat(&monitor) => match never {},
        };
        self.monitor.set_subscribed(false);
        self.heartbeat.stopping(&self.monitor);
        self.source.close().await;
        ended
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
            self.forward.destinations()
        );
        self.monitor.set_subscribed(true);
        self.heartbeat.ready(&self.monitor);
        // When a stop has waited long enough; none while nobody wants it to stop.
        let mut deadline = None;
        loop {
            let delivery = tokio::select! {
                biased;
                _ = stop.next() => match deadline {
                    None => {
                        let Self { source, config, monitor, heartbeat, .. } = self;
                        let timeout = config.shutdown_timeout;
                        let until = begin_to_stop(source, monitor, heartbeat, timeout, None);
                        deadline = Some(until.await);
                        continue;
                    }
                    Some(_) => return Ok(()),
                },
                () = reached(deadline) => return Ok(()),
                delivery = self.source.next() => match delivery? {
                    Some(delivery) => delivery,
                    None => return Ok(()),
                },
            };
            if self.relay(&delivery, stop, &mut deadline).await?.is_break() {
                return Ok(());
            }
        }
    }

    /// Relays one message; whether there is a next one to take.
    async fn relay(
        &mut self,
        delivery: &Delivery,
        stop: &mut (impl Stream<Item = ()> + Unpin),
        deadline: &mut Option<Instant>,
    ) -> anyhow::Result<ControlFlow<()>> {
        let Self {
            source,
            forward,
            config,
            monitor,
            heartbeat,
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
                    forward.abandon(delivery, "the relay cannot go on");
                    return Err(reason);
                }
                _ = stop.next() => match deadline {
                    None => {
                        let timeout = config.shutdown_timeout;
                        let current = Some(delivery);
                        let until = begin_to_stop(source, monitor, heartbeat, timeout, current);
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

/// Takes no more messages, and says what is still to be done; until when that is to be done.
async fn begin_to_stop(
    source: &mut Source,
    monitor: &Monitor,
    heartbeat: &Heartbeat,
    timeout: Duration,
    current: Option<&Delivery>,
) -> Instant {
    monitor.set_subscribed(false);
    heartbeat.stopping(monitor);
    source.stop().await;
    if let Some(delivery) = current {
        let waiting = match source.waiting() {
            0 => String::new(),
            waiting => format!(" and {} still waiting", count(waiting, "message")),
        };
        info!(
            "stopping within {timeout:?}, for {} is being relayed{waiting}",
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
