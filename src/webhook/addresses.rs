//! Every address of a destination's name, each with its own connection (`WEBHOOK_EVERY_ADDRESS`): the
//! replicas of a front end behind one name, such as a headless service.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures::future::BoxFuture;
use log::info;
use parking_lot::Mutex;
use tokio::{net::lookup_host, time::timeout};

use super::{Endpoint, Failure, temporary};
use crate::text;

/// Looks up a host and port.
type Resolve = Box<dyn Fn() -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> + Send + Sync>;

/// Makes the endpoint of an address.
type Open = Box<dyn Fn(IpAddr) -> anyhow::Result<Endpoint> + Send + Sync>;

/// The addresses of a name, as they come and go.
pub struct Addresses {
    authority: String,
    resolve: Resolve,
    open: Open,
    timeout: Duration,
    /// The endpoints of the addresses that the last lookup returned.
    endpoints: Mutex<HashMap<IpAddr, Arc<Endpoint>>>,
}

impl Addresses {
    /// Returns the addresses of `authority`, which is `host:port`. A lookup may take up to `timeout`.
    pub(super) fn new(authority: String, timeout: Duration, open: Open) -> Self {
        let name = authority.clone();
        let resolve = move || -> BoxFuture<'static, _> {
            let authority = name.clone();
            Box::pin(async move { Ok(lookup_host(authority).await?.collect()) })
        };
        Self {
            authority,
            resolve: Box::new(resolve),
            open,
            timeout,
            endpoints: Mutex::default(),
        }
    }

    /// Looks up the addresses that the name has now, at least one, and closes the connections to all others.
    ///
    /// # Errors
    /// If there is none.
    pub async fn current(&self) -> Result<Vec<(IpAddr, Arc<Endpoint>)>, Failure> {
        self.try_current().await.map_err(temporary)
    }

    async fn try_current(&self) -> Result<Vec<(IpAddr, Arc<Endpoint>)>, String> {
        let found = timeout(self.timeout, (self.resolve)()).await;
        let found = found
            .map_err(|_| format!("its name was not resolved within {:?}", self.timeout))?
            .map_err(|error| format!("its name does not resolve: {error}"))?;
        let mut endpoints = self.endpoints.lock();
        let mut current: Vec<(IpAddr, Arc<Endpoint>)> = Vec::new();
        let mut is_changed = false;
        for address in found.iter().map(SocketAddr::ip) {
            if current.iter().any(|(known, _)| *known == address) {
                continue;
            }
            let endpoint = match endpoints.remove(&address) {
                Some(endpoint) => endpoint,
                None => {
                    is_changed = true;
                    Arc::new((self.open)(address).map_err(|error| format!("{error:#}"))?)
                }
            };
            current.push((address, endpoint));
        }
        is_changed |= !endpoints.is_empty();
        *endpoints = current.iter().cloned().collect();
        if current.is_empty() {
            return Err("its name resolves to no address".to_owned());
        }
        if is_changed {
            let list: Vec<_> = current
                .iter()
                .map(|(address, _)| address.to_string())
                .collect();
            info!(
                "{} has {}, and each has to succeed: {}",
                self.authority,
                text::count(list.len() as u64, "IP"),
                list.join(", ")
            );
        }
        Ok(current)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::config::Config;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);

    /// Returns the addresses of a name that resolves to the addresses in the list.
    fn addresses(name: &Arc<Mutex<Vec<IpAddr>>>) -> Addresses {
        let name = Arc::clone(name);
        Addresses {
            authority: "name:80".to_owned(),
            resolve: Box::new(move || {
                let found = name.lock().clone();
                let found = found
                    .into_iter()
                    .map(|address| SocketAddr::new(address, 80));
                Box::pin(std::future::ready(Ok(found.collect())))
            }),
            open: Box::new(|address| {
                let variables = [
                    ("WEBHOOK_DESTINATION", "http://name/"),
                    ("NATS_HOST", "nats://localhost"),
                    ("NATS_SUBJECT_PREFIX", "a"),
                    ("NATS_RELAYED_SUBJECT_PREFIX", "b"),
                ];
                let config = Config::from_environment(&variables.into_iter().collect()).unwrap();
                Endpoint::new(&config.webhook.destinations[0], None, Some(address))
            }),
            timeout: Duration::from_secs(1),
            endpoints: Mutex::default(),
        }
    }

    #[tokio::test]
    async fn connections_last_as_long_as_their_addresses() {
        crate::tls::install_provider();
        let name = Arc::new(Mutex::new(vec![A, B, A]));
        let addresses = addresses(&name);
        let first = addresses.current().await.unwrap();
        assert_eq!(
            first
                .iter()
                .map(|(address, _)| *address)
                .collect::<Vec<_>>(),
            [A, B]
        );

        *name.lock() = vec![B];
        assert_eq!(addresses.current().await.unwrap().len(), 1);
        *name.lock() = vec![A, B];
        let again = addresses.current().await.unwrap();
        assert!(Arc::ptr_eq(&first[1].1, &again[1].1), "it was kept");
        assert!(
            !Arc::ptr_eq(&first[0].1, &again[0].1),
            "it was closed meanwhile"
        );
    }

    #[tokio::test]
    async fn a_name_without_addresses_is_told_as_such() {
        let addresses = addresses(&Arc::default());
        let Err(Failure::Temporary { reason, .. }) = addresses.current().await else {
            panic!("it is no temporary failure");
        };
        assert_eq!(reason, "its name resolves to no address");
    }
}
