//! `--check`: what of a configuration holds, and what does not. Takes and publishes no message, sends
//! no request to a destination, creates nothing.

mod secure;

use std::{
    io::{ErrorKind, Write},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use reqwest::Url;
use rustls::ClientConfig;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, lookup_host},
    time::timeout,
};

use self::secure::{Connected, secure};
use crate::{
    commit::Commit,
    config::{self, Config, Destination, Login, Mode, Proxy},
    monitor::{Monitor, endpoints},
    nats::{
        Connection, ConnectionEvent, ConnectionEvents, Failure, cannot_look, connect_once, show,
    },
    source::{Consumer, ConsumerError, try_to_look},
    text::{self, count, reasons},
    tls,
};

/// How long anything may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The head of an answer is not longer.
const MAX_HEAD_BYTES: usize = 16 * 1024;

/// What is found, line by line, as it is found.
struct Report<'a> {
    out: &'a mut dyn Write,
    /// Whether all of it holds.
    good: bool,
}

impl Report<'_> {
    fn add(&mut self, what: &str, found: anyhow::Result<String>) {
        let (mark, words) = match found {
            Ok(words) => ("ok", words),
            Err(reason) => {
                self.good = false;
                ("FAILED", reasons(&reason))
            }
        };
        self.line(mark, &format!("{what}: {words}"));
    }

    fn line(&mut self, mark: &str, words: &str) {
        let line = format!("{mark:<7} {words}");
        // Whoever does not listen any more does not want to know.
        let _ = writeln!(self.out, "{}", text::one_line(&line, text::LONGEST_LINE));
        let _ = self.out.flush();
    }
}

/// Tries everything that a valid configuration names, and writes down what holds and what does not;
/// whether all of it holds.
///
/// # Errors
/// If there is nothing to try with.
pub async fn check(config: &Config, out: &mut dyn Write) -> anyhow::Result<bool> {
    tls::install_provider();
    let mut report = Report { out, good: true };
    report.add("configuration", Ok("valid".to_owned()));
    let monitor = Arc::new(Monitor::new()?);
    if let Some((connection, mut events)) = check_servers(config, &monitor, &mut report).await? {
        let commit = Commit::new(connection.clone(), config, &monitor);
        match &config.mode {
            Mode::Core { queue_group } => {
                let group = queue_group.as_deref();
                check_subscription(config, group, &connection, &mut events, &mut report).await;
            }
            Mode::Durable { stream, consumer } => {
                let consumer = Consumer {
                    connection,
                    stream: stream.clone(),
                    name: consumer.clone(),
                    filter: config.prefix.wildcard(),
                };
                check_consumer(&consumer, &mut events, &mut report).await;
            }
        }
        check_confirming_streams(&commit, &mut events, &mut report).await;
    }
    if let Some(address) = config.status_listen {
        let found = match endpoints::listen(address) {
            Ok(_) => Ok("can be listened on".to_owned()),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                Ok("is in use, which is right where the relay runs already".to_owned())
            }
            Err(error) => Err(error.into()),
        };
        report.add(&format!("status port {address}"), found);
    }
    let tls = tls::client_config(&config.webhook)?;
    for destination in &config.webhook.destinations {
        check_destination(destination, tls.as_ref(), &mut report).await;
    }
    Ok(report.good)
}

/// Looks at a destination, or at every address of its name where each has to be told.
async fn check_destination(
    destination: &Destination,
    tls: Option<&ClientConfig>,
    report: &mut Report<'_>,
) {
    let name = format!("destination {destination}");
    if !destination.every_address() {
        return report.add(&name, within_timeout(reach(destination, tls)).await);
    }
    let url = destination.expose_url();
    let addresses = match within_timeout(look_up(url)).await {
        Ok(addresses) => addresses,
        Err(reason) => return report.add(&name, Err(reason)),
    };
    for address in addresses {
        let found = within_timeout(connect(url, &[address], tls)).await;
        let found = found.map(|_| connected(destination));
        report.add(&format!("{name} at {}", address.ip()), found);
    }
}

async fn within_timeout<T>(what: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    timeout(TIMEOUT, what)
        .await
        .unwrap_or_else(|_| Err(anyhow!("no answer within {TIMEOUT:?}")))
}

/// Connects to each server; the first connection that there is.
async fn check_servers(
    config: &Config,
    monitor: &Arc<Monitor>,
    report: &mut Report<'_>,
) -> anyhow::Result<Option<(Connection, ConnectionEvents)>> {
    let welcome = match config.nats.login {
        Login::Anonymous => "connected, without a login",
        _ => "connected, the login is accepted",
    };
    let mut reached = None;
    for server in &config.nats.servers {
        let connecting = connect_once(config, server, monitor);
        let found = within_timeout(connecting).await.map(|connection| {
            reached.get_or_insert(connection);
            welcome.to_owned()
        });
        report.add(&format!("NATS {}", show(server)), found);
    }
    Ok(reached)
}

async fn check_subscription(
    config: &Config,
    queue_group: Option<&str>,
    connection: &Connection,
    events: &mut ConnectionEvents,
    report: &mut Report<'_>,
) {
    let subject = config.prefix.wildcard();
    let client = connection.client();
    let subscribed = match queue_group {
        // In the group, for the permission may be for that alone; but below a subject that nobody uses,
        // so that it takes no message away from the other members.
        Some(group) => {
            let unused = format!("{}.{:x}.>", config.prefix, fastrand::u64(..));
            client.queue_subscribe(unused, group.to_owned()).await
        }
        None => client.subscribe(subject.clone()).await,
    };
    let found = match subscribed {
        Ok(_subscriber) => within_timeout(events.confirm(client, false)).await,
        Err(error) => Err(error.into()),
    };
    report.add(
        &format!("subscription to {subject}"),
        found.map(|()| "permitted".to_owned()),
    );
}

async fn check_consumer(
    consumer: &Consumer,
    events: &mut ConnectionEvents,
    report: &mut Report<'_>,
) {
    let Consumer { stream, name, .. } = consumer;
    let found = tokio::select! {
        biased;
        reason = events.fatal() => Err(reason),
        found = consumer.verify() => match found {
            Ok(waiting) => Ok(format!(
                "is there and as it must be; waiting in the stream: {}", count(waiting, "message")
            )),
            Err(ConsumerError::Missing) => Ok("is missing, and created at the start".to_owned()),
            Err(ConsumerError::Fatal(reason) | ConsumerError::NobodyAnswers(reason)) => Err(reason),
            Err(ConsumerError::Temporary(reason)) => Err(anyhow!(reason)),
        },
    };
    let is_usable = found.is_ok();
    report.add(&format!("consumer {name} of the stream {stream}"), found);
    // Without a stream there is nothing to look at.
    if is_usable {
        let found = tokio::select! {
            biased;
            reason = look_refused(events, consumer) => Err(reason),
            found = try_to_look(consumer) => found.map_err(anyhow::Error::from),
        };
        report.add(
            &format!("messages of the stream {stream}"),
            found.map(|()| "can be looked at".to_owned()),
        );
        if let Some(warning) = consumer.stream_warning().await {
            report.line("warning", &warning);
        }
    }
}

/// Looks at the streams that are to keep what is published.
async fn check_confirming_streams(
    commit: &Commit,
    events: &mut ConnectionEvents,
    report: &mut Report<'_>,
) {
    for (prefix, stream) in commit.confirming_streams() {
        let found = tokio::select! {
            biased;
            reason = events.fatal() => Err(reason),
            found = stream.open(prefix) => match found {
                Ok(()) => Ok(format!("is there, and keeps {prefix}.>")),
                Err(Failure::Permanent(reason) | Failure::Temporary(reason)) => {
                    Err(anyhow!(reason))
                }
            },
        };
        report.add(&format!("stream {}", stream.name()), found);
    }
}

/// Resolves when our user turns out to have no permission to look at the messages of the stream.
async fn look_refused(events: &mut ConnectionEvents, consumer: &Consumer) -> anyhow::Error {
    loop {
        match events.next().await {
            ConnectionEvent::LookRefused => {
                let api = consumer.connection.api();
                let subject = api.subject(format_args!("STREAM.MSG.GET.{}", consumer.stream));
                return anyhow!("{}", cannot_look(&subject));
            }
            ConnectionEvent::Fatal(reason) | ConnectionEvent::InboxRefused(reason) => {
                return reason;
            }
            ConnectionEvent::Connected | ConnectionEvent::ProbeRefused => {}
        }
    }
}

/// Gets as far as a request would, and sends none.
async fn reach(destination: &Destination, tls: Option<&ClientConfig>) -> anyhow::Result<String> {
    let url = destination.expose_url();
    let Some(proxy) = destination.proxy() else {
        connect_by_name(url, tls).await?;
        return Ok(connected(destination));
    };
    let stream = connect_by_name(proxy.expose_url(), tls)
        .await
        .with_context(|| format!("the proxy {proxy}"))?;
    if !destination.is_https() {
        return Ok(format!(
            "goes through the proxy {proxy}, which can be connected to; only a request would tell more"
        ));
    }
    let stream = tunnel(stream, proxy, url).await?;
    secure(stream, url, tls).await?;
    Ok(format!(
        "can be connected to through the proxy {proxy}, its certificate is trusted"
    ))
}

/// What can be said of a destination once there was a connection.
fn connected(destination: &Destination) -> String {
    match destination.is_https() {
        true => "can be connected to, its certificate is trusted".to_owned(),
        false => "can be connected to".to_owned(),
    }
}

/// The addresses of the host of `url`, each once.
async fn look_up(url: &Url) -> anyhow::Result<Vec<SocketAddr>> {
    let found = lookup_host(config::authority(url)).await;
    let mut addresses = Vec::new();
    for address in found.context("its name does not resolve")? {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// A connection to the host of `url`.
async fn connect_by_name(
    url: &Url,
    tls: Option<&ClientConfig>,
) -> anyhow::Result<Box<dyn Connected>> {
    connect(url, &look_up(url).await?, tls).await
}

/// A connection to the host of `url` at one of its `addresses`.
async fn connect(
    url: &Url,
    addresses: &[SocketAddr],
    tls: Option<&ClientConfig>,
) -> anyhow::Result<Box<dyn Connected>> {
    let stream = TcpStream::connect(addresses)
        .await
        .context("cannot connect")?;
    secure(Box::new(stream), url, tls).await
}

/// Asks a proxy for a way to the host of `url` (RFC 9110, 9.3.6).
async fn tunnel(
    mut stream: Box<dyn Connected>,
    proxy: &Proxy,
    url: &Url,
) -> anyhow::Result<Box<dyn Connected>> {
    let authority = config::authority(url);
    let mut request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n").into_bytes();
    if let Some(authorization) = proxy.expose_authorization() {
        request.extend([b"Proxy-Authorization: ", authorization.as_bytes(), b"\r\n"].concat());
    }
    request.extend(b"\r\n");
    stream.write_all(&request).await?;
    // Byte by byte, for what follows the head belongs to the destination already.
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == MAX_HEAD_BYTES {
            bail!("the proxy {proxy} gives no valid answer");
        }
        head.push(
            stream
                .read_u8()
                .await
                .with_context(|| format!("the proxy {proxy} hangs up"))?,
        );
    }
    let status = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
    if !status.starts_with(b"2") {
        bail!(
            "the proxy {proxy} refuses, with status {}",
            String::from_utf8_lossy(status)
        );
    }
    Ok(stream)
}
