//! TLS as `--check` tries it: what a server has against the client certificate belongs to it.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{anyhow, bail};
use reqwest::Url;
use rustls::{
    ClientConfig, SignatureScheme, client::ResolvesClientCert, pki_types::ServerName,
    sign::CertifiedKey,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{config::WEBHOOK_TLS, tls};

/// How long a server that has asked for a client certificate may take to refuse it. From TLS 1.3 on it
/// does so only after the handshake, and says nothing if it does not.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection, by TLS or not.
pub(super) trait Connected: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Connected for S {}

/// The same connection, by TLS if `url` says so.
pub(super) async fn secure(
    stream: Box<dyn Connected>,
    url: &Url,
    tls: Option<&ClientConfig>,
) -> anyhow::Result<Box<dyn Connected>> {
    let Some(tls) = tls.filter(|_| url.scheme() == "https") else {
        return Ok(stream);
    };
    // IPv6 addresses are in brackets in a URL, and nowhere else.
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned())?;
    let observed = Arc::new(Observed {
        resolver: Arc::clone(&tls.client_auth_cert_resolver),
        is_asked: AtomicBool::new(false),
    });
    let mut tls = tls.clone();
    tls.client_auth_cert_resolver = Arc::clone(&observed) as _;
    let connecting = TlsConnector::from(Arc::new(tls)).connect(name, stream);
    let mut stream = connecting.await.map_err(|error| failed(&error))?;
    if observed.is_asked.load(Relaxed) {
        // Who accepts it waits for a request.
        match timeout(REFUSAL_TIMEOUT, stream.read_u8()).await {
            Err(_) => {}
            // Which is how the TLS library hands on an alert.
            Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(failed(&error));
            }
            Ok(_) => bail!(
                "it hung up after the TLS handshake, as some servers do that refuse the client \
                 certificate; check {} and {}",
                WEBHOOK_TLS.certificate,
                WEBHOOK_TLS.key
            ),
        }
    }
    Ok(Box::new(stream))
}

fn failed(error: &io::Error) -> anyhow::Error {
    let error = error.to_string();
    let reason = tls::explain(&error, &WEBHOOK_TLS).unwrap_or(error);
    anyhow!(reason).context("TLS failed")
}

/// Notes whether the server asks for a client certificate.
#[derive(Debug)]
struct Observed {
    resolver: Arc<dyn ResolvesClientCert>,
    is_asked: AtomicBool,
}

impl ResolvesClientCert for Observed {
    fn resolve(&self, issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.is_asked.store(true, Relaxed);
        self.resolver.resolve(issuers, schemes)
    }

    fn has_certs(&self) -> bool {
        self.resolver.has_certs()
    }
}
