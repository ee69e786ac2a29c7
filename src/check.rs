//! `--check`: tests which parts of a configuration work. It takes and publishes no messages, sends no requests to
//! destinations, and creates nothing.

use std::{
    fmt::Display,
    io::{ErrorKind, Write},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow};
use async_nats::{HeaderMap, Message, jetstream::consumer::Info};
use reqwest::Url;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    net::{TcpListener, TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{
    commit::Commit,
    config::{self, Config, Destination, Mode},
    monitor::Monitor,
    nats::{Connection, ConnectionEvents, NoAnswer, connect_once, show},
    source::{Consumer, oldest_age, try_to_look},
    text::{self, count, reasons},
    tls,
};

/// How long it may take to find out that nobody listens to acks.
const ACK_TIMEOUT: Duration = Duration::from_millis(500);

/// How long each step may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Writes the findings, each line as soon as it is known.
struct Report<'a> {
    out: &'a mut dyn Write,
    /// Whether everything works.
    good: bool,
}

impl Report<'_> {
    fn add(&mut self, what: &str, found: anyhow::Result<impl Display>) {
        self.good &= found.is_ok();
        match found {
            Ok(words) => self.line("ok", &format!("{what}: {words}")),
            Err(reason) => self.line("FAILED", &format!("{what}: {}", reasons(&reason))),
        }
    }

    fn line(&mut self, mark: &str, words: &str) {
        let line = format!("{mark:<7} {words}");
        // The reader is gone; ignore.
        let _ = writeln!(self.out, "{}", text::one_line(&line, text::LONGEST_LINE));
        let _ = self.out.flush();
    }
}

/// Tests everything that a valid configuration names, and writes a report. Returns whether everything works.
///
/// # Errors
/// If the test cannot begin.
pub async fn check(config: Config, out: &mut dyn Write) -> anyhow::Result<bool> {
    tls::install_provider();
    let config = &Arc::new(config);
    let mut report = Report { out, good: true };
    let monitor = Arc::new(Monitor::new(None)?);
    if let Some((connection, mut events)) = check_servers(config, &monitor, &mut report).await {
        let commit = Commit::new(connection.clone(), config, &monitor);
        match &config.mode {
            Mode::Core { queue_group } => {
                let group = queue_group.as_deref();
                check_subscription(config, group, &connection, &mut events, &mut report).await;
            }
            Mode::Durable { stream, consumer } => {
                let consumer = Consumer::new(connection, stream, consumer, config);
                check_consumer(&consumer, &mut events, &mut report).await;
            }
        }
        for publisher in commit.publishers() {
            let Some(stream) = &publisher.stream else {
                continue;
            };
            let found = tokio::select! {
                biased;
                reason = events.fatal() => Err(reason),
                found = commit.verify(publisher) => found.map_err(Into::into),
            };
            let found = found.map(|()| format!("exists, and stores {}.>", publisher.prefix));
            report.add(&format!("stream {stream}"), found);
        }
    }
    if let Some(address) = config.status_listen {
        let found = match TcpListener::bind(address).await {
            Ok(_) => Ok("available"),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                Ok("in use (expected if the relay is already running)")
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

async fn within_timeout<T>(what: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    timeout(TIMEOUT, what)
        .await
        .unwrap_or_else(|_| Err(anyhow!("no answer within {TIMEOUT:?}")))
}

/// Connects to each server. Returns the first connection.
async fn check_servers(
    config: &Arc<Config>,
    monitor: &Arc<Monitor>,
    report: &mut Report<'_>,
) -> Option<(Connection, ConnectionEvents)> {
    let welcome = match config.nats.login.is_anonymous() {
        true => "connected, without a login",
        false => "connected, the login is accepted",
    };
    let mut reached = None;
    for server in &config.nats.servers {
        let connecting = connect_once(config, server, monitor);
        let found = within_timeout(connecting).await.map(|connection| {
            reached.get_or_insert(connection);
            welcome
        });
        report.add(&format!("NATS {}", show(server)), found);
    }
    reached
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
        // In the group, because the permission may be only for the group; but below a subject that nobody uses,
        // so that it takes no message away from the other members.
        Some(group) => {
            let unused = format!("{}.{:x}.>", config.prefix, fastrand::u64(..));
            client.queue_subscribe(unused, group.to_owned()).await
        }
        None => client.subscribe(subject.clone()).await,
    };
    let confirmed = async {
        let _subscriber = subscribed?;
        events.confirm(connection).await?;
        Ok("permitted")
    };
    let found = within_timeout(confirmed).await;
    report.add(&format!("subscription to {subject}"), found);
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
        found = async { Ok((consumer.verify_stream().await?, consumer.verify().await?)) } => found,
    };
    let mut warnings = Vec::new();
    let found = match found {
        Ok((warning, Some(info))) => {
            warnings.extend(warning.into_iter().chain(consumer.warnings(&info.config)));
            let waiting = waiting(consumer, &info).await;
            Ok(format!("exists and is configured correctly; {waiting}"))
        }
        Ok((warning, None)) => {
            warnings.extend(warning);
            Ok("does not exist yet; will be created on start".to_owned())
        }
        Err(reason) => Err(reason),
    };
    // Without a stream or a consumer there is nothing else to check.
    let goes_on = found.is_ok();
    report.add(&format!("consumer {name} of the stream {stream}"), found);
    if goes_on {
        let found = tokio::select! {
            biased;
            reason = events.fatal() => Err(reason),
            found = try_to_look(consumer) => found.map_err(anyhow::Error::msg),
        };
        let what = format!("messages of the stream {stream}");
        report.add(&what, found.map(|()| "readable"));
        warnings.extend(lost_acks(consumer).await);
    }
    for warning in warnings {
        report.line("warning", &warning);
    }
}

/// Describes how many messages wait for a consumer, how long the oldest one has been waiting if that can be looked up,
/// and how often it was handed out.
async fn waiting(consumer: &Consumer, info: &Info) -> String {
    let waiting = info.num_pending + info.num_ack_pending as u64;
    if waiting == 0 {
        return "no message waits".to_owned();
    }
    let age = oldest_age(consumer, info)
        .await
        .map_or_else(String::new, |age| {
            let age = humantime::format_duration(Duration::from_secs(age.as_secs()));
            format!("the oldest one for {age}, ")
        });
    // Only one message at a time is handed out, so all deliveries since the last ack were of the oldest one.
    let deliveries = info.delivered.consumer_sequence - info.ack_floor.consumer_sequence;
    format!(
        "waiting: {}, {age}handed out {}",
        count(waiting, "message"),
        count(deliveries, "time")
    )
}

/// Returns a warning if nobody listens to acks. It sends an in-progress ack for no message, which changes nothing and
/// gets no answer.
async fn lost_acks(consumer: &Consumer) -> Option<String> {
    let Consumer { stream, name, .. } = consumer;
    let subject = format!("$JS.ACK.{stream}.{name}.1.0.0.0.0").into();
    let no_answer = |_: &Message| None::<()>;
    let answer = consumer
        .connection
        .ask(subject, HeaderMap::new(), "+WPI".into(), no_answer);
    match timeout(ACK_TIMEOUT, answer).await {
        Ok(Err(NoAnswer::Nobody)) => Some(format!(
            "nobody listens to acks of the consumer {name}, so each message comes again and again; where \
             JetStream is imported from another account, export and import the service $JS.ACK.> as well"
        )),
        _ => None,
    }
}

/// Connects to a destination, or to its proxy if it has one, as a request would, without sending one. If every
/// address of its name is a destination of its own, each is tried.
async fn check_destination(
    destination: &Destination,
    tls: Option<&ClientConfig>,
    report: &mut Report<'_>,
) {
    let (url, name) = match &destination.secret_proxy {
        Some(proxy) => {
            let shown = config::without_secrets(proxy);
            (
                proxy,
                format!("proxy {shown} of the destination {destination}"),
            )
        }
        None => (
            &destination.secret_url,
            format!("destination {destination}"),
        ),
    };
    let addresses = within_timeout(async {
        let found = lookup_host(config::authority(url)).await;
        Ok(Vec::from_iter(found.context("its name does not resolve")?))
    });
    match addresses.await {
        Ok(addresses) if destination.every_address => {
            for (n, address) in addresses.iter().enumerate() {
                let found = within_timeout(connect(url, &[*address], tls)).await;
                let name = format!(
                    "{name} at {}, {} of {}",
                    address.ip(),
                    n + 1,
                    addresses.len()
                );
                report.add(&name, found);
            }
        }
        addresses => {
            let found = within_timeout(async { connect(url, &addresses?, tls).await }).await;
            report.add(&name, found);
        }
    }
}

/// Connects to the host of `url` at one of its `addresses`, including the TLS handshake, and describes the success. A
/// server that refuses the client certificate may say so only later.
async fn connect(
    url: &Url,
    addresses: &[SocketAddr],
    tls: Option<&ClientConfig>,
) -> anyhow::Result<&'static str> {
    let stream = TcpStream::connect(addresses)
        .await
        .context("cannot connect")?;
    let Some(tls) = tls.filter(|_| url.scheme() == "https") else {
        return Ok("reachable");
    };
    // IPv6 addresses have brackets only in URLs.
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned())?;
    let connecting = TlsConnector::from(Arc::new(tls.clone())).connect(name, stream);
    connecting.await.map_err(|error| {
        let error = error.to_string();
        let reason = tls::explain(&error, "WEBHOOK").unwrap_or(error);
        anyhow!(reason).context("TLS failed")
    })?;
    Ok("reachable, its certificate is trusted")
}
