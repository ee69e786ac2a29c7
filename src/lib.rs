//! Takes messages from NATS, POSTs each to a webhook, and republishes it only after its webhook
//! succeeded: one message at a time, in order.
//!
//! ```text
//!              config                                         monitor (metrics, status port, systemd, log)
//!                │                                                ▲
//!   NATS ──► source ──► relay ──► forward ──► webhook ──► destination(s)
//!   cms.cache.>  ▲       loop      │   ▲ retry    POST
//!                │       and       │   └──────────┘
//!                │       stopping  ├──► commit ──► NATS  relayed.cache.>
//!                └──── ack ◄───────┘   (durable mode: publish before ack, on one connection)
//! ```
//!
//! Dependencies point one way: `relay` knows `source` and `forward`; `forward` knows `webhook` and `commit`;
//! none of them knows `relay`. There is no channel or task of ours between taking a message and
//! publishing it, and no timer unless there is something to wait for: the job is sequential, and so is
//! the code. Read `relay`, then `forward`, and follow the calls from there.
//!
//! These are the promises that the code cites:
//!
//! 1. A message is republished only after its webhook succeeded; with several destinations, after every
//!    one succeeded.
//! 2. One message at a time, in the order in which NATS delivered them, through retries; in durable
//!    mode also through crashes, restarts, a lost NATS leader, and any number of replicas.
//! 3. The same message: payload byte for byte, headers kept, the subject rewritten in its leading
//!    prefix only. The reply subject is not carried over.
//! 4. No silent loss: a message that is not relayed is logged with its subject and the reason, counted,
//!    and published under the failed prefix if one is set. In durable mode every message that the relay
//!    does not give up on is relayed in the end.
//! 5. Only a signal stops it, or a NATS server that refuses it: no payload, header, subject, response
//!    or fault of NATS ends it, blocks it forever, or makes its memory grow without bound.
//! 6. No secret reaches a log, an error or `Debug`.

mod backoff;
mod check;
mod commit;
mod config;
mod forward;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
#[path = "../tests/properties/mod.rs"]
pub mod fuzzing;
mod monitor;
mod nats;
mod relay;
mod republish;
mod source;
mod subject;
mod text;
mod tls;
mod webhook;

use std::{sync::Arc, time::Instant};

use futures::{Stream, StreamExt, stream::pending};
use log::error;
use tokio::time::sleep;

pub use self::{
    check::check,
    config::{Config, Default as VariableDefault, Environment, Kind, VARIABLES, Variable, help},
    monitor::logging::finish as finish_logging,
    text::reasons,
};
use self::{
    config::Mode,
    forward::Forward,
    monitor::{Monitor, endpoints, logging},
    nats::ClientCrashed,
    source::Source,
    webhook::Webhook,
};

/// Starts logging to standard error, as the settings say.
pub fn start_logging(environment: &Environment) {
    let (filter, is_json) = config::log(environment);
    logging::start(&filter, is_json);
}

/// Runs the relay until it is stopped or cannot continue.
///
/// Each item of `stop` is one request to stop: the first lets the current message finish, and in core mode
/// those that wait, within `SHUTDOWN_TIMEOUT`; the second stops it immediately.
///
/// # Errors
/// If it cannot continue: login refused, permission, stream or consumer missing, status port taken.
pub async fn run(config: Config, stop: impl Stream<Item = ()> + Unpin) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let about = config.status_listen.map(|_| about(&config));
    let monitor = Arc::new(Monitor::new(about)?);
    if let Some(address) = config.status_listen {
        endpoints::start(address, Arc::clone(&monitor)).await?;
    }
    // The end of this stream is not a request to stop.
    let mut stop = stop.chain(pending());
    let ended = tokio::select! {
        biased;
        ended = start_over(&config, &monitor, &mut stop) => ended,
        never = monitor.beat() => match never {},
    };
    monitor.stopping();
    ended
}

/// Returns a line for the page that says where messages come from and where they go.
fn about(config: &Config) -> String {
    let mode = match &config.mode {
        Mode::Core { .. } => "core mode".to_owned(),
        Mode::Durable { stream, consumer } => {
            format!("durable mode, consumer {consumer} of the stream {stream}")
        }
    };
    format!(
        "{}.> → POST to {} → {}.> ({mode})",
        config.prefix,
        config.webhook.names(),
        config.relayed_prefix
    )
}

/// Relays messages, and starts over with a new NATS client when one has crashed. In core mode the messages
/// that were waiting are lost with it.
async fn start_over(
    config: &Arc<Config>,
    monitor: &Arc<Monitor>,
    stop: &mut (impl Stream<Item = ()> + Unpin),
) -> anyhow::Result<()> {
    let mut crashes = 0;
    let mut is_first = true;
    loop {
        let start = Instant::now();
        let (connection, events) = nats::connect(config, monitor, is_first).await?;
        let source = Source::new(connection.clone(), events, config, monitor);
        let webhook = Webhook::new(&config.webhook)?;
        let forward = Forward::new(connection, webhook, Arc::clone(config), Arc::clone(monitor));
        let reason = match relay::relay(source, forward, config, monitor, stop).await {
            Err(reason) if reason.is::<ClientCrashed>() => reason,
            ended => return ended,
        };
        is_first = false;
        monitor.set_disconnected();
        if start.elapsed() >= nats::LASTING {
            crashes = 0;
        }
        crashes += 1;
        let wait = nats::BACKOFF.wait(crashes);
        error!(
            "{reason}, which a carriage return in a message's header value can cause; starting over in \
             {wait:.1?}"
        );
        tokio::select! {
            biased;
            _ = stop.next() => return Ok(()),
            () = sleep(wait) => {}
        }
    }
}
