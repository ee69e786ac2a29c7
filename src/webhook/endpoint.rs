//! The kept-alive connection to a destination, or to one of its addresses.

use std::{
    error::Error,
    io,
    net::{IpAddr, SocketAddr},
    sync::atomic::AtomicBool,
    time::Duration,
};

use anyhow::Context;
use parking_lot::Mutex;
use reqwest::{Client, Proxy, redirect, retry};
use rustls::ClientConfig;
use tokio::time::Instant;

use crate::config;

/// An idle connection is closed before a typical server does so (Node.js after 5 s), so that no
/// request meets a connection that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// The maximum number of headers in a response; the HTTP client's default is 100.
const MAX_HEADERS: usize = 256;

/// How long a connection is used, so that the relay follows a name that has moved.
const LONGEST_USE: Duration = Duration::from_secs(30);

/// Reaches a destination, or one of its addresses.
pub struct Endpoint {
    /// The HTTP client, which keeps the one connection.
    pub(super) client: Client,
    /// Whether that connection waits for the next request, as far as we know.
    pub(super) is_idle: AtomicBool,
    /// When it was opened.
    opened: Mutex<Instant>,
}

impl Endpoint {
    /// Returns an endpoint for `url`, or for only one of its addresses.
    ///
    /// # Errors
    /// If the HTTP client cannot be set up.
    pub(super) fn new(
        url: &config::Destination,
        tls: Option<&ClientConfig>,
        address: Option<IpAddr>,
    ) -> anyhow::Result<Self> {
        let mut builder = Client::builder()
            .redirect(redirect::Policy::none())
            // Only the relay itself retries.
            .retry(retry::never().max_retries_per_request(0))
            .http1_max_headers(MAX_HEADERS)
            .pool_max_idle_per_host(1)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .tcp_nodelay(true)
            // The library would use proxies for localhost as well.
            .no_proxy();
        builder = match tls {
            Some(tls) => builder.tls_backend_preconfigured(tls.clone()),
            None => builder.tls_certs_only([]),
        };
        if let (Some(name), Some(address)) = (&url.secret_url.host_str(), address) {
            // The URL's port is used, regardless of this one.
            builder = builder.resolve(name, SocketAddr::new(address, 0));
        }
        if let Some(proxy) = &url.secret_proxy {
            let through = Proxy::all(proxy.clone()).map_err(reqwest::Error::without_url);
            builder = builder.proxy(through.context("cannot use the proxy")?);
        }
        Ok(Self {
            client: builder.build().context("cannot set up the HTTP client")?,
            is_idle: AtomicBool::new(false),
            opened: Mutex::new(Instant::now()),
        })
    }

    /// Returns whether a request at this time should be the last one on its connection, which is a new one unless
    /// one `was_idle`.
    pub(super) fn is_last_use(&self, was_idle: bool, now: Instant) -> bool {
        let mut opened = self.opened.lock();
        if !was_idle {
            *opened = now;
        }
        now.duration_since(*opened) >= LONGEST_USE
    }
}

/// Returns whether a request failed because its connection had already been closed.
pub(super) fn met_dead_connection(error: &reqwest::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};

    let is_dead = |error: &hyper::Error| error.is_incomplete_message() || error.is_canceled();
    cause::<hyper::Error>(error).is_some_and(is_dead)
        || cause::<io::Error>(error).is_some_and(|error| {
            matches!(
                error.kind(),
                BrokenPipe | ConnectionAborted | ConnectionReset
            )
        })
}

/// Returns whether there was no connection, because it was refused or there is no route.
pub(super) fn was_refused(error: &reqwest::Error) -> bool {
    use io::ErrorKind::{AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable};

    cause::<io::Error>(error).is_some_and(|error| {
        matches!(
            error.kind(),
            AddrNotAvailable | ConnectionRefused | HostUnreachable | NetworkUnreachable
        )
    })
}

/// Returns the first cause of this type.
fn cause<E: Error + 'static>(error: &reqwest::Error) -> Option<&E> {
    let mut cause: Option<&dyn Error> = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        cause = error.source();
    }
    None
}
