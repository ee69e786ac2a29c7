//! A destination, and the kept-alive connections to it: one, or one to each address of its name
//! (`WEBHOOK_EVERY_ADDRESS`), such as the replicas of a front end behind a headless service.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use anyhow::{Chain, Context};
use log::info;
use parking_lot::Mutex;
use reqwest::{
    Client, Proxy, Request,
    header::{ACCEPT, HeaderValue, USER_AGENT},
    redirect, retry,
};
use rustls::ClientConfig;
use tokio::{
    net::lookup_host,
    time::{Instant, timeout},
};

use super::Failure;
use crate::{config, text, tls};

const AGENT: &str = concat!("nats-webhook-relay/", env!("CARGO_PKG_VERSION"));

/// An idle connection is closed before a typical server does so (Node.js after 5 s), so that no
/// request meets a connection that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// One destination.
pub struct Destination {
    /// Its URL without secrets.
    pub url: config::Destination,
    /// Reaches it by its name, at any of its addresses.
    pub endpoint: Endpoint,
    /// Reach it at each address that the last lookup of its name returned.
    endpoints: Mutex<BTreeMap<IpAddr, Arc<Endpoint>>>,
    tls: Option<ClientConfig>,
    /// The part that all requests to it have in common.
    pub(super) template: Request,
    /// Whether a warning about an HTML page was logged.
    pub(super) warned_of_html: AtomicBool,
}

impl Destination {
    pub(super) fn new(
        url: &config::Destination,
        config: &config::Webhook,
        tls: Option<&ClientConfig>,
    ) -> anyhow::Result<Self> {
        let endpoint = Endpoint::new(url, tls, None)?;
        // This turns the login in the URL into a header.
        let template = endpoint.client.post(url.secret_url.clone()).build();
        let mut template = template
            .map_err(reqwest::Error::without_url)
            .with_context(|| format!("cannot POST to {url}"))?;
        let headers = template.headers_mut();
        for (name, value) in &config.headers {
            headers.entry(name).or_insert_with(|| value.clone());
        }
        for (name, value) in [(ACCEPT, "*/*"), (USER_AGENT, AGENT)] {
            headers
                .entry(name)
                .or_insert(HeaderValue::from_static(value));
        }
        // So that a copy has room for the headers of a message.
        headers.reserve(8);
        Ok(Self {
            url: url.clone(),
            endpoint,
            endpoints: Mutex::default(),
            tls: tls.cloned(),
            template,
            warned_of_html: AtomicBool::new(false),
        })
    }

    /// Looks up the addresses that its name has now, at least one, and closes the connections to all others.
    ///
    /// # Errors
    /// If there is none, or not within `longest`.
    pub async fn addresses(
        &self,
        longest: Duration,
    ) -> Result<BTreeMap<IpAddr, Arc<Endpoint>>, Failure> {
        let found = timeout(longest, lookup_host(self.authority())).await;
        let found = found
            .map_err(|_| {
                Failure::temporary(format!("its name was not resolved within {longest:?}"))
            })?
            .map_err(|error| Failure::temporary(format!("its name does not resolve: {error}")))?;
        self.found(found.map(|address| address.ip()))
            .map_err(|error| Failure::temporary(format!("{error:#}")))
    }

    fn found(
        &self,
        addresses: impl Iterator<Item = IpAddr>,
    ) -> anyhow::Result<BTreeMap<IpAddr, Arc<Endpoint>>> {
        let mut known = self.endpoints.lock();
        let mut current = BTreeMap::new();
        for address in addresses {
            let endpoint = match known.get(&address) {
                Some(endpoint) => Arc::clone(endpoint),
                None => Arc::new(Endpoint::new(&self.url, self.tls.as_ref(), Some(address))?),
            };
            current.insert(address, endpoint);
        }
        anyhow::ensure!(!current.is_empty(), "its name resolves to no address");
        if current.keys().ne(known.keys()) {
            let list: Vec<_> = current.keys().map(ToString::to_string).collect();
            info!(
                "{} has {}, and each has to succeed: {}",
                self.authority(),
                text::count(list.len() as u64, "IP"),
                list.join(", ")
            );
        }
        known.clone_from(&current);
        Ok(current)
    }

    fn authority(&self) -> String {
        config::authority(&self.url.secret_url)
    }

    /// Describes a failed request by its root cause, which is the most specific, and never contains the URL.
    pub(super) fn failure(&self, error: reqwest::Error) -> Failure {
        let error = error.without_url();
        let cause = Chain::new(&error).last().map(ToString::to_string);
        let cause = cause.unwrap_or_default();
        let cause = tls::explain(&cause, "WEBHOOK").unwrap_or(cause);
        if !error.is_connect() {
            return Failure::temporary(format!("no valid answer: {cause}"));
        }
        let server = self.authority();
        let through = match self.url.proxy() {
            Some(proxy) => format!(" through the proxy {proxy}"),
            None => String::new(),
        };
        Failure {
            is_unreachable: true,
            ..Failure::temporary(format!("cannot connect to {server}{through}: {cause}"))
        }
    }
}

/// Reaches a destination, or one of its addresses.
pub struct Endpoint {
    /// The HTTP client, which keeps the one connection.
    pub(super) client: Client,
    /// When the idle connection was opened; `None` if there is none, as far as we know.
    pub(super) waiting: Mutex<Option<Instant>>,
}

impl Endpoint {
    fn new(
        url: &config::Destination,
        tls: Option<&ClientConfig>,
        address: Option<IpAddr>,
    ) -> anyhow::Result<Self> {
        let mut builder = Client::builder()
            .redirect(redirect::Policy::none())
            // Only the relay itself retries, so that no request has to be cloned.
            .retry(retry::never().max_retries_per_request(0))
            .pool_max_idle_per_host(1)
            .pool_idle_timeout(IDLE_TIMEOUT)
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
            waiting: Mutex::default(),
        })
    }
}

/// Returns whether a request failed because its connection had already been closed.
pub(super) fn met_dead_connection(error: &reqwest::Error) -> bool {
    Chain::new(error)
        .find_map(|cause| cause.downcast_ref::<hyper::Error>())
        .is_some_and(|error| !error.is_parse())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Config;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);

    #[test]
    fn connections_last_as_long_as_their_addresses() {
        tls::install_provider();
        let variables = [
            ("WEBHOOK_DESTINATION", "http://name/"),
            ("NATS_HOST", "nats://localhost"),
            ("NATS_SUBJECT_PREFIX", "a"),
            ("NATS_RELAYED_SUBJECT_PREFIX", "b"),
        ];
        let config = Config::from_environment(&variables.into_iter().collect()).unwrap();
        let webhook = &config.webhook;
        let destination = Destination::new(&webhook.destinations[0], webhook, None).unwrap();
        let found = |addresses: &[IpAddr]| destination.found(addresses.iter().copied());

        let first = found(&[A, B, A]).unwrap();
        assert!(first.keys().eq([&A, &B]));
        assert_eq!(found(&[B]).unwrap().len(), 1);
        let again = found(&[A, B]).unwrap();
        assert!(Arc::ptr_eq(&first[&B], &again[&B]), "it was kept");
        assert!(
            !Arc::ptr_eq(&first[&A], &again[&A]),
            "it was closed meanwhile"
        );
        let reason = found(&[]).err().unwrap().to_string();
        assert_eq!(reason, "its name resolves to no address");
    }
}
