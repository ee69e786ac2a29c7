//! Connecting to NATS: servers, login, TLS. The client reconnects and resubscribes by itself; the observer logs
//! its events, and passes on those that need action as [`ConnectionEvents`].

mod api;
mod connection;
mod events;
mod inbox;
mod servers;

use std::{sync::Arc, time::Duration};

use anyhow::anyhow;
use async_nats::{AuthError, ConnectOptions, ServerAddr};

pub use self::{
    api::{Api, ApiError, Failure, refused},
    connection::{ClientCrashed, Connection},
    events::{ConnectionEvent, ConnectionEvents, cannot_look},
    inbox::{ANSWER_TIMEOUT, NoAnswer},
    servers::show,
};
use self::{
    events::Observer,
    servers::{REFUSALS, explain, refusal},
};
use crate::{
    backoff::Backoff,
    config::{self, Config},
    monitor::Monitor,
};

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
    config: &Config,
    monitor: &Arc<Monitor>,
    is_first: bool,
) -> anyhow::Result<(Connection, ConnectionEvents)> {
    let (observer, refusals, events) = Observer::new(config, monitor, is_first);
    let chooser = Arc::clone(&observer);
    let mut options = options(config, Arc::clone(&observer))?
        .retry_on_initial_connect()
        .reconnect_to_server_callback(move |servers, _| {
            let choice = chooser.choose(&servers);
            async move { choice }
        });
    if config.nats.ignore_discovered || config.nats.has_web_socket() {
        // A cluster advertises its web sockets without a scheme, and the client treats them as nats://.
        options = options.ignore_discovered_servers();
    }
    let client = options.connect(config.nats.servers.as_slice()).await?;
    let _ = observer.statistics.set(client.statistics());
    let connection = Connection::new(client, Api::of(config), refusals);
    Ok((connection, events))
}

/// Tries once to connect to one server.
///
/// # Errors
/// If it can't be reached or refuses the login.
pub async fn connect_once(
    config: &Config,
    server: &ServerAddr,
    monitor: &Arc<Monitor>,
) -> anyhow::Result<(Connection, ConnectionEvents)> {
    let (observer, refusals, events) = Observer::new(config, monitor, true);
    let client = options(config, observer)?
        .ignore_discovered_servers()
        .connect(server)
        .await
        .map_err(|error| match error.kind() {
            kind if REFUSALS.contains(&kind) => {
                anyhow!("{}", refusal(&kind.to_string(), &config.nats.login.hint()))
            }
            _ => anyhow!(
                "{}",
                explain(&error.to_string(), server, config.nats.tls_first)
            ),
        })?;
    let connection = Connection::new(client, Api::of(config), refusals);
    Ok((connection, events))
}

/// Returns the options of every connection: login, TLS and the rest.
fn options(config: &Config, observer: Arc<Observer>) -> anyhow::Result<ConnectOptions> {
    let nats = &config.nats;
    let login = config.nats.login.clone();
    let login = ConnectOptions::with_auth_callback(move |nonce| {
        let answer = login.answer(&nonce).map_err(AuthError::new);
        async move { answer }
    });
    let options = with_tls(login, nats);
    let options = match nats.tls_first {
        true => options.tls_first(),
        false => options,
    };
    Ok(options
        .name(CONNECTION_NAME)
        .custom_inbox_prefix(&config.inbox_prefix)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .read_buffer_capacity(READ_BUFFER_BYTES)
        .ping_interval(PING_INTERVAL)
        .event_callback(move |event| {
            observer.observe(event);
            async {}
        }))
}

fn with_tls(mut options: ConnectOptions, config: &config::Nats) -> ConnectOptions {
    if let Some(ca) = &config.tls.ca {
        options = options.add_root_certificates(ca.clone());
    }
    if let Some((certificate, key)) = &config.tls.certificate {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    options.require_tls(config.requires_tls)
}
