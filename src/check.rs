//! `--check`: tests which parts of a configuration work. It takes and publishes no messages, sends no requests to
//! destinations, and creates nothing.

mod destination;

use std::{
    io::{ErrorKind, Write},
    sync::Arc,
    time::Duration,
};

use anyhow::anyhow;
use async_nats::{HeaderMap, Message, jetstream::consumer::Info};
use tokio::{net::TcpListener, time::timeout};

use crate::{
    commit::Commit,
    config::{Config, Mode},
    monitor::Monitor,
    nats::{Connection, ConnectionEvents, Failure, NoAnswer, connect_once, show},
    source::{Consumer, ConsumerError, oldest_age, try_to_look},
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
    let monitor = Arc::new(Monitor::new(String::new())?);
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
                    prefix: config.prefix.clone(),
                    relayed_prefix: config.relayed_prefix.clone(),
                    deliver_policy: config.deliver_policy,
                };
                check_consumer(&consumer, &mut events, &mut report).await;
            }
        }
        check_confirming_streams(&commit, &mut events, &mut report).await;
    }
    if let Some(address) = config.status_listen {
        let found = match TcpListener::bind(address).await {
            Ok(_) => Ok("available".to_owned()),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                Ok("is in use (expected if the relay is already running)".to_owned())
            }
            Err(error) => Err(error.into()),
        };
        report.add(&format!("status port {address}"), found);
    }
    let tls = tls::client_config(&config.webhook)?;
    for destination in &config.webhook.destinations {
        destination::check(destination, tls.as_ref(), &mut report).await;
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
) -> anyhow::Result<Option<(Connection, ConnectionEvents)>> {
    let welcome = match config.nats.login.is_anonymous() {
        true => "connected, without a login",
        false => "connected, the login is accepted",
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
        // In the group, because the permission may be only for the group; but below a subject that nobody uses,
        // so that it takes no message away from the other members.
        Some(group) => {
            let unused = format!("{}.{:x}.>", config.prefix, fastrand::u64(..));
            client.queue_subscribe(unused, group.to_owned()).await
        }
        None => client.subscribe(subject.clone()).await,
    };
    let found = match subscribed {
        Ok(_subscriber) => within_timeout(events.confirm(connection)).await,
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
        found = async { anyhow::Ok((consumer.verify_stream().await?, consumer.verify().await)) } => found,
    };
    let what = format!("consumer {name} of the stream {stream}");
    let (warnings, words): (Vec<_>, _) = match found {
        Ok((warning, Ok(info))) => {
            let words = format!(
                "exists and is configured correctly; {}",
                waiting(consumer, &info).await
            );
            let warnings = warning.into_iter().chain(consumer.warnings(&info.config));
            (warnings.chain(lost_acks(consumer).await).collect(), words)
        }
        Ok((warning, Err(ConsumerError::Missing))) => {
            let words = "does not exist yet; will be created on start".to_owned();
            (Vec::from_iter(warning), words)
        }
        // Without a stream there is nothing else to check.
        Ok((_, Err(error))) => return report.add(&what, Err(anyhow!(error.reason()))),
        Err(reason) => return report.add(&what, Err(reason)),
    };
    report.add(&what, Ok(words));
    let found = tokio::select! {
        biased;
        reason = events.fatal() => Err(reason),
        found = try_to_look(consumer) => found.map_err(|error| anyhow!("{error}")),
    };
    report.add(
        &format!("messages of the stream {stream}"),
        found.map(|()| "readable".to_owned()),
    );
    for warning in warnings {
        report.line("warning", &warning);
    }
}

/// Returns a warning if nobody listens to acks. It sends an in-progress ack for no message, which changes
/// nothing and gets no answer.
async fn lost_acks(consumer: &Consumer) -> Option<String> {
    let Consumer { stream, name, .. } = consumer;
    let subject = format!("$JS.ACK.{stream}.{name}.1.0.0.0.0").into();
    let no_answer = |_: &Message| None::<()>;
    let answer = consumer
        .connection
        .ask(subject, HeaderMap::new(), "+WPI".into(), no_answer);
    let answer = timeout(ACK_TIMEOUT, answer).await;
    let is_lost = matches!(answer, Ok(Err(NoAnswer::Nobody)));
    is_lost.then(|| {
        format!(
            "nobody listens to acks of the consumer {name}, so each message comes again and again; where \
             JetStream is imported from another account, export and import the service $JS.ACK.> as well"
        )
    })
}

/// Describes how many messages wait for a consumer, how long the oldest one has been waiting, and how often it was
/// handed out.
async fn waiting(consumer: &Consumer, info: &Info) -> String {
    let waiting = info.num_pending + info.num_ack_pending as u64;
    if waiting == 0 {
        return "no message waits".to_owned();
    }
    let age = within_timeout(async { Ok(oldest_age(consumer, info).await) }).await;
    let since = age.ok().flatten().map_or_else(String::new, |age| {
        let age = Duration::from_secs(age.as_secs());
        format!(", the oldest one for {}", humantime::format_duration(age))
    });
    // Only one message at a time is handed out, so all deliveries since the last ack were of the oldest one.
    let deliveries = info.delivered.consumer_sequence - info.ack_floor.consumer_sequence;
    let delivered = match info.num_ack_pending {
        0 => "not handed out to a relay yet".to_owned(),
        _ => format!("handed out {}", count(deliveries, "time")),
    };
    format!("waiting: {}{since}, {delivered}", count(waiting, "message"))
}

/// Checks the streams that have to confirm published messages.
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
                Ok(()) => Ok(format!("exists, and stores {prefix}.>")),
                Err(Failure::Permanent(reason) | Failure::Temporary(reason)) => {
                    Err(anyhow!(reason))
                }
            },
        };
        report.add(&format!("stream {}", stream.name()), found);
    }
}
