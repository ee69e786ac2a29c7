//! Relays NATS messages to a webhook, and republishes each one only after its webhook succeeded:
//! one message at a time, in order.
//!
//! ```text
//!            config                                  status, endpoints, log
//!              │                                                ▲
//! NATS ──► source ──► relay ──► webhook ──► destination         │
//! cms.cache.>  │        │  ▲ retry           POST, in order ────┤
//!              │        └──┴──► outlet ──► NATS relayed.cache.…
//!              └── ack (durable mode only) ◄──┘
//! ```
//!
//! Everything goes one way: [`relay`] knows [`source`], [`webhook`] and [`outlet`], which publishes what
//! [`republish`] makes; none of them knows [`relay`]. There is no channel or task of ours between taking a message and republishing it,
//! and no timer unless there is something to wait for: the job is sequential, and so is the code.
//!
//! What it promises:
//!
//! 1. A message is republished only after its webhook succeeded.
//! 2. One message at a time, in the order in which NATS delivered them, through retries; in durable
//!    mode also through crashes, restarts, a lost NATS leader, and any number of replicas.
//! 3. The same message: payload byte for byte, headers kept, the subject rewritten in its leading
//!    prefix only. The reply subject is not carried over.
//! 4. No silent loss: a message given up is logged with its subject and the reason, counted, and
//!    published on the failed prefix where one is set; what does not fit into the buffer of core mode
//!    is counted. In durable mode whatever is not given up is relayed in the end, and where a stream is to
//!    keep it, it is relayed only once that stream has confirmed it.
//! 5. Only its operator stops it, or a NATS server that refuses it.
//! 6. No secret reaches a log, an error or `Debug`.

pub mod backoff;
pub mod check;
pub mod config;
pub mod endpoints;
pub mod environment;
pub mod heartbeat;
pub mod keeper;
pub mod logging;
pub mod nats;
pub mod outlet;
pub mod relay;
pub mod republish;
pub mod signing;
pub mod source;
pub mod status;
pub mod subject;
pub mod text;
pub mod tls;
pub mod webhook;

use std::sync::Arc;

use config::Config;
use futures::Stream;
use relay::Relay;
use source::Source;
use status::Status;
use webhook::Webhook;

/// Runs the relay until its operator stops it or it cannot go on.
///
/// Each item of `stop` is one request to stop: the first lets the message in hand finish, within
/// [`Config::shutdown_timeout`]; the second ends at once.
///
/// # Errors
/// When it cannot go on: login refused, permission, stream or consumer missing, subscription ended, or
/// the status port cannot be listened on.
pub async fn run(config: Config, stop: impl Stream<Item = ()> + Unpin) -> anyhow::Result<()> {
    let status = Arc::new(Status::new()?);
    if let Some(address) = config.status_listen {
        endpoints::start(address, Arc::clone(&status))?;
    }
    let webhook = Webhook::new(&config.webhook)?;
    let config = Arc::new(config);
    let (connection, faults) = nats::connect(&config, &status).await?;
    let source = Source::new(connection.clone(), faults, &config, &status);
    Relay::new(connection, source, webhook, config, status)
        .run(stop)
        .await
}
