//! `--check`: what of a configuration holds, and what does not. Takes and publishes no message, sends
//! no request to a destination, creates nothing.

use std::{fmt::Write, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use reqwest::Url;
use rustls::{ClientConfig, pki_types::ServerName};
use rustls_platform_verifier::BuilderVerifierExt;
use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{
    config::{Config, Destination, Mode},
    nats::{connect_once, show},
    source::{Consumer, Trouble, fatal},
    status::Status,
};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was found, line by line.
#[derive(Debug, Default)]
pub struct Report {
    /// The lines, ready to be printed.
    pub text: String,
    /// Whether all of it holds.
    pub good: bool,
}

impl Report {
    fn add(&mut self, what: &str, found: anyhow::Result<String>) {
        let (mark, words) = match found {
            Ok(words) => ("ok    ", words),
            Err(reason) => {
                self.good = false;
                ("FAILED", format!("{reason:#}"))
            }
        };
        let _ = writeln!(self.text, "{mark}  {what}: {words}");
    }
}

/// Tries everything that a valid configuration names.
///
/// # Errors
/// If there is nothing to try with.
pub async fn check(config: &Config) -> anyhow::Result<Report> {
    // The one provider for all TLS.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut report = Report {
        good: true,
        ..Report::default()
    };
    report.add("configuration", Ok("valid".to_owned()));
    let status = Arc::new(Status::new()?);
    let mut reached = None;
    for server in &config.nats.servers {
        let connected = timeout(
            PATIENCE,
            connect_once(&config.nats, server, &config.prefix, &status),
        );
        let found = match connected.await {
            Ok(Ok(connection)) => {
                reached.get_or_insert(connection);
                Ok("connected, the login is accepted".to_owned())
            }
            Ok(Err(reason)) => Err(reason),
            Err(_) => Err(anyhow!("no answer within {PATIENCE:?}")),
        };
        report.add(&format!("NATS {}", show(server)), found);
    }
    if let Some((client, mut faults)) = reached {
        match &config.mode {
            Mode::Core { .. } => {
                let subject = config.prefix.wildcard();
                // Outside of the queue group, so that it takes no message away from it.
                let found = match client.subscribe(subject.clone()).await {
                    Ok(_subscriber) => timeout(PATIENCE, faults.confirm(&client))
                        .await
                        .unwrap_or_else(|_| Err(anyhow!("no answer within {PATIENCE:?}"))),
                    Err(error) => Err(error.into()),
                };
                report.add(
                    &format!("subscription to {subject}"),
                    found.map(|()| "permitted".to_owned()),
                );
            }
            Mode::Durable { stream, consumer } => {
                let wanted = Consumer {
                    client,
                    stream: stream.clone(),
                    name: consumer.clone(),
                    filter: config.prefix.wildcard(),
                };
                let found = tokio::select! {
                    biased;
                    reason = fatal(&mut faults) => Err(reason),
                    found = wanted.verify() => match found {
                        Ok(waiting) => Ok(format!("is there and as it must be; {waiting} messages wait")),
                        Err(Trouble::Missing) => Ok("is missing, and created at the start".to_owned()),
                        Err(Trouble::Fatal(reason) | Trouble::NobodyAnswers(reason)) => Err(reason),
                        Err(Trouble::Temporary(reason)) => Err(anyhow!(reason)),
                    },
                };
                report.add(
                    &format!("consumer {consumer} of the stream {stream}"),
                    found,
                );
            }
        }
    }
    for destination in &config.webhook.destinations {
        let found = timeout(PATIENCE, reach(destination)).await;
        let found = found.unwrap_or_else(|_| Err(anyhow!("no answer within {PATIENCE:?}")));
        report.add(&format!("destination {destination}"), found);
    }
    Ok(report)
}

/// Gets as far as a request would, and sends none.
async fn reach(destination: &Destination) -> anyhow::Result<String> {
    let url: &Url = destination.expose_url();
    // IPv6 addresses are in brackets in a URL, and nowhere else.
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let port = url.port_or_known_default().unwrap_or_default();
    let addresses: Vec<_> = lookup_host((host, port))
        .await
        .context("its name does not resolve")?
        .collect();
    let stream = TcpStream::connect(&addresses[..])
        .await
        .context("cannot connect")?;
    if url.scheme() == "http" {
        return Ok("can be connected to".to_owned());
    }
    let config = ClientConfig::builder()
        .with_platform_verifier()?
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_owned())?;
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .context("TLS failed")?;
    Ok("can be connected to, its certificate is trusted".to_owned())
}
