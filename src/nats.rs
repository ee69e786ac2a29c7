//! Connecting to NATS: servers, login, TLS. The client reconnects and resubscribes by itself; the observer logs
//! its events, and passes on those that need action as [`ConnectionEvents`].

mod api;
mod connection;
mod events;
mod servers;

use std::{sync::Arc, time::Duration};

use anyhow::anyhow;
use async_nats::{AuthError, ConnectOptions, ServerAddr};

pub use self::{
    api::{ApiError, Failure, JETSTREAM_BACKOFF},
    connection::{ANSWER_TIMEOUT, ClientCrashed, Connection, NoAnswer},
    events::ConnectionEvents,
    servers::show,
};
use self::{events::Observer, servers::explain};
use crate::{backoff::Backoff, config::Config, monitor::Monitor};

/// The name under which the server lists the connection.
const CONNECTION_NAME: &str = "nats-webhook-relay";

/// How many messages may wait between the connection and the subscription: no limit. The client would drop messages
/// beyond it without counting them, so the limit is in [`crate::source`], and this one must not be reached.
const SUBSCRIPTION_CAPACITY: usize = usize::MAX >> 4;

/// How often the server is pinged. A connection that has died silently, as after a change of networks, ends with the
/// third ping without an answer.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// How much the client reads at a time. It reads up to 128 times before any other task runs, and these
/// messages are not yet subject to the limit in [`crate::source`].
const READ_BUFFER_BYTES: u16 = 16 * 1024;

/// Growing waits between attempts to connect, once every server was tried, and after a client crashed.
pub const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(100),
    longest: Duration::from_secs(5),
};

/// A connection must last this long to reset the backoff, so that a server that closes each connection is not
/// overrun.
pub const LASTING: Duration = Duration::from_secs(5);

/// Starts connecting in the background, and keeps trying until a server is reached. Only a refusal of the very first
/// login is final: `is_first` is false after a client has crashed.
///
/// # Errors
/// If the settings can't be used at all.
pub async fn connect(
    config: &Arc<Config>,
    monitor: &Arc<Monitor>,
    is_first: bool,
) -> anyhow::Result<(Connection, ConnectionEvents)> {
    let (observer, events) = Observer::new(config, monitor, false);
    observer.progress.lock().was_accepted = !is_first;
    let chooser = Arc::clone(&observer);
    let mut options = options(&observer)
        .retry_on_initial_connect()
        .reconnect_to_server_callback(move |servers, _| {
            let choice = chooser.choose(&servers);
            async move { choice }
        });
    if config.nats.ignore_discovered {
        options = options.ignore_discovered_servers();
    }
    let client = options.connect(config.nats.servers.as_slice()).await?;
    let _ = observer.statistics.set(client.statistics());
    Ok((Connection::new(client, &observer), events))
}

/// Tries once to connect to one server, for a check.
///
/// # Errors
/// If it can't be reached or refuses the login.
pub async fn connect_once(
    config: &Arc<Config>,
    server: &ServerAddr,
    monitor: &Arc<Monitor>,
) -> anyhow::Result<(Connection, ConnectionEvents)> {
    let (observer, events) = Observer::new(config, monitor, true);
    let client = options(&observer)
        .ignore_discovered_servers()
        .connect(server)
        .await
        .map_err(|error| anyhow!(explain(&error.to_string(), server, &config.nats)))?;
    Ok((Connection::new(client, &observer), events))
}

/// Returns the options of every connection: login, TLS and the rest.
fn options(observer: &Arc<Observer>) -> ConnectOptions {
    let (observer, config) = (Arc::clone(observer), &observer.config);
    let login = config.nats.login.clone();
    let mut options = ConnectOptions::with_auth_callback(move |nonce| {
        let answer = login.answer(&nonce).map_err(AuthError::new);
        async move { answer }
    });
    let tls = &config.nats.tls;
    if let Some(ca) = &tls.ca {
        options = options.add_root_certificates(ca.clone());
    }
    if let Some((certificate, key)) = &tls.certificate {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    if config.nats.tls_first {
        options = options.tls_first();
    }
    options
        .require_tls(config.nats.requires_tls)
        .name(CONNECTION_NAME)
        .custom_inbox_prefix(&config.inbox_prefix)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .read_buffer_capacity(READ_BUFFER_BYTES)
        .ping_interval(PING_INTERVAL)
        .event_callback(move |event| {
            observer.observe(event);
            async {}
        })
}
