//! Checks a destination without sending a request.

use std::{collections::HashSet, net::SocketAddr, sync::Arc};

use anyhow::{Context, anyhow};
use reqwest::Url;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::{TcpStream, lookup_host};
use tokio_rustls::TlsConnector;

use super::{Report, within_timeout};
use crate::{
    config::{self, Destination},
    tls,
};

/// Checks a destination, or every address of its name if each is a destination of its own.
pub(super) async fn check(
    destination: &Destination,
    tls: Option<&ClientConfig>,
    report: &mut Report<'_>,
) {
    let name = format!("destination {destination}");
    if !destination.every_address {
        return report.add(&name, within_timeout(reach(destination, tls)).await);
    }
    let url = &destination.secret_url;
    let addresses = match within_timeout(look_up(url)).await {
        Ok(addresses) => addresses,
        Err(reason) => return report.add(&name, Err(reason)),
    };
    let words = format!(
        "addresses of its name: {}; each has to succeed",
        addresses.len()
    );
    report.add(&name, Ok(words));
    for address in addresses {
        let found = within_timeout(connect(url, &[address], tls)).await;
        let found = found.map(|_| connected(destination));
        report.add(&format!("{name} at {}", address.ip()), found);
    }
}

/// Connects as a request would, without sending one; only to the proxy if the destination is reached through one.
async fn reach(destination: &Destination, tls: Option<&ClientConfig>) -> anyhow::Result<String> {
    let url = &destination.secret_url;
    let Some(proxy) = &destination.secret_proxy else {
        connect(url, &look_up(url).await?, tls).await?;
        return Ok(connected(destination));
    };
    let shown = config::without_secrets(proxy);
    let reached = async { connect(proxy, &look_up(proxy).await?, tls).await }.await;
    reached.with_context(|| format!("the proxy {shown}"))?;
    Ok(format!(
        "is reached through the proxy {shown}, which can be connected to; only a request can test more"
    ))
}

/// Describes a destination to which there was a connection.
fn connected(destination: &Destination) -> String {
    match destination.is_https() {
        true => "can be connected to, its certificate is trusted".to_owned(),
        false => "can be connected to".to_owned(),
    }
}

/// Looks up the addresses of the host of `url`, each once.
async fn look_up(url: &Url) -> anyhow::Result<Vec<SocketAddr>> {
    let found = lookup_host(config::authority(url)).await;
    let mut seen = HashSet::new();
    let found = found.context("its name does not resolve")?;
    Ok(found.filter(|address| seen.insert(*address)).collect())
}

/// Connects to the host of `url` at one of its `addresses`, including the TLS handshake. A server that refuses the
/// client certificate may say so only later.
async fn connect(
    url: &Url,
    addresses: &[SocketAddr],
    tls: Option<&ClientConfig>,
) -> anyhow::Result<()> {
    let stream = TcpStream::connect(addresses)
        .await
        .context("cannot connect")?;
    if let Some(tls) = tls.filter(|_| url.scheme() == "https") {
        // Only in a URL are IPv6 addresses in brackets.
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let name = ServerName::try_from(host.to_owned())?;
        let connecting = TlsConnector::from(Arc::new(tls.clone())).connect(name, stream);
        connecting.await.map_err(|error| {
            let error = error.to_string();
            let reason = tls::explain(&error, "WEBHOOK").unwrap_or(error);
            anyhow!(reason).context("TLS failed")
        })?;
    }
    Ok(())
}
