//! The loop: take a message, forward it, take the next one; and every way of stopping. This is where promise 2 is
//! kept, in durable mode together with the server (see the crate's documentation).

use std::{pin::pin, time::Duration};

use futures::{Stream, StreamExt};
use log::{error, info};
use tokio::time::{Instant, timeout_at};

use crate::{
    config::Config, forward::Forward, monitor::Monitor, nats::ClientCrashed, source::Source,
    text::count,
};

/// The requests to stop.
struct Stopping<'a, S> {
    requests: &'a mut S,
    /// How long the current message may take after the first one.
    timeout: Duration,
    /// The end of that time; `None` before the first one.
    deadline: Option<Instant>,
}

impl<S: Stream<Item = ()> + Unpin> Stopping<'_, S> {
    /// Resolves with `None` when no more messages should be taken, and then with the reason for which the current one
    /// should be abandoned.
    async fn next(&mut self) -> Option<String> {
        let Some(deadline) = self.deadline else {
            self.requests.next().await;
            self.deadline = Some(Instant::now() + self.timeout);
            return None;
        };
        Some(match timeout_at(deadline, self.requests.next()).await {
            Ok(_) => "stopped at once".to_owned(),
            Err(_) => format!("not finished within SHUTDOWN_TIMEOUT, {:?}", self.timeout),
        })
    }
}

/// Takes messages from `source` and hands them to `forward`, one after the other. The first item of `stop` lets the
/// current message finish, and those that wait and that no server keeps, within [`Config::shutdown_timeout`]; the
/// second one stops it immediately.
///
/// # Errors
/// If it cannot continue; [`ClientCrashed`] if a new client may be able to.
pub async fn relay(
    mut source: Source,
    forward: Forward,
    config: &Config,
    monitor: &Monitor,
    stop: &mut (impl Stream<Item = ()> + Unpin),
) -> anyhow::Result<()> {
    let mut stopping = Stopping {
        requests: stop,
        timeout: config.shutdown_timeout,
        deadline: None,
    };
    let ended = relay_all(&mut source, &forward, config, monitor, &mut stopping).await;
    monitor.set_obstacle(Some("not subscribed".to_owned()));
    source.close().await;
    match ended {
        // It was stopping anyway, so there is no reason to start over.
        Err(reason) if stopping.deadline.is_some() && reason.is::<ClientCrashed>() => {
            error!("{reason} while the relay was stopping");
            Ok(())
        }
        ended => ended,
    }
}

async fn relay_all<S: Stream<Item = ()> + Unpin>(
    source: &mut Source,
    forward: &Forward,
    config: &Config,
    monitor: &Monitor,
    stopping: &mut Stopping<'_, S>,
) -> anyhow::Result<()> {
    tokio::select! {
        biased;
        _ = stopping.next() => return Ok(()),
        opened = source.open() => opened?,
    }
    tokio::select! {
        biased;
        _ = stopping.next() => return Ok(()),
        opened = forward.open() => opened?,
        reason = source.attend() => return Err(reason),
    }
    let Config {
        prefix,
        relayed_prefix,
        webhook,
        ..
    } = config;
    info!(
        "listening on {prefix}.>; POST to {}, then republish on {relayed_prefix}.>",
        webhook.names()
    );
    monitor.set_obstacle(None);
    monitor.started();
    loop {
        let delivery = tokio::select! {
            biased;
            reason = stopping.next() => match reason {
                None => {
                    monitor.stopping();
                    source.stop().await;
                    continue;
                }
                Some(_) => return Ok(()),
            },
            delivery = source.next() => match delivery? {
                Some(delivery) => delivery,
                None => return Ok(()),
            },
        };
        let mut forwarding = pin!(forward.forward(&delivery));
        loop {
            tokio::select! {
                biased;
                () = &mut forwarding => break,
                reason = source.attend() => {
                    forward.abandon(&delivery, &reason.to_string());
                    return Err(reason);
                }
                reason = stopping.next() => match reason {
                    None => {
                        monitor.stopping();
                        let waiting = match source.stop().await {
                            0 => String::new(),
                            waiting => format!(" and {} behind it", count(waiting, "message")),
                        };
                        info!(
                            "stopping: waiting up to {:?} for {}{waiting} (Ctrl-C again to stop now)",
                            stopping.timeout, delivery.subject
                        );
                    }
                    Some(reason) => {
                        forward.abandon(&delivery, &reason);
                        return Ok(());
                    }
                },
            }
        }
    }
}
