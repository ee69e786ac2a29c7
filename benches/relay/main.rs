//! The one benchmark, from end to end: a real nats-server, a webhook endpoint, and the relay as its
//! users run it, beside two yardsticks, the [`floor`] and the [`bare`] loop, round after round. Prints a
//! table of medians.
//!
//! ```sh
//! cargo bench
//! cargo bench -- --quick --only core           # or memory, durable, confirmed, lanes
//! cargo bench -- --vs 'other=/path/to/other'   # any relay that takes the same variables
//! ```

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod bare;
mod floor;
mod lanes;
mod load;
mod nats;
mod process;
#[path = "../../tests/it/support/mod.rs"]
mod support;
mod table;
mod webhook;

use std::{
    env,
    ffi::OsString,
    fs,
    process::ExitCode,
    sync::{Arc, atomic::Ordering::SeqCst},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use async_nats::jetstream::consumer::{AckPolicy, pull};
use load::{CONSUMER, Load, PREFIX, RELAYED_PREFIX, STREAM};
use process::Process;
use support::NatsServer;
use table::Figure;
use webhook::Webhook;

/// The stream behind the relayed prefix, in the stage that has one.
const RELAYED_STREAM: &str = "RELAYED";

/// A relay to measure: what the table calls it, and the command that starts it.
type Contestant = (String, Vec<OsString>);

/// What is measured with one process of a relay.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Core,
    Memory,
    Durable,
    /// Durable mode, with a stream that confirms what is relayed.
    Confirmed,
    /// Core mode, with one relay and with four.
    Lanes,
}

impl Stage {
    const ALL: [Self; 5] = [
        Self::Core,
        Self::Memory,
        Self::Durable,
        Self::Confirmed,
        Self::Lanes,
    ];

    fn is_durable(self) -> bool {
        matches!(self, Self::Durable | Self::Confirmed)
    }
}

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> anyhow::Result<()> {
    let program = env::current_exe()?;
    let yardstick = |argument: &str| vec![program.clone().into(), argument.into()];
    let relay = vec![support::Relay::program().into()];
    let mut contestants = vec![
        ("floor".to_owned(), yardstick("--floor")),
        ("bare loop".to_owned(), yardstick("--bare")),
        ("relay".to_owned(), relay),
    ];
    let mut stages = Stage::ALL.to_vec();
    let mut quick = false;
    let mut arguments = env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--floor" => return floor::run(),
            "--bare" => return bare::run(),
            "--quick" => quick = true,
            "--only" => {
                let only = arguments.next().unwrap_or_default();
                stages.retain(|stage| format!("{stage:?}").eq_ignore_ascii_case(&only));
                ensure!(!stages.is_empty(), "no such stage: {only}");
            }
            "--vs" => {
                let other = arguments.next().unwrap_or_default();
                let (label, command) = other.split_once('=').context("--vs takes LABEL=COMMAND")?;
                let command = format!("exec {command}");
                let shell = vec!["sh".into(), "-c".into(), command.into()];
                contestants.push((label.to_owned(), shell));
            }
            // Cargo passes this one.
            "--bench" => {}
            other => bail!(
                "unknown argument {other}; known are --quick, --only STAGE and --vs LABEL=COMMAND"
            ),
        }
    }
    compare(&contestants, &stages, quick)
}

fn compare(contestants: &[Contestant], stages: &[Stage], quick: bool) -> anyhow::Result<()> {
    let cpus = process::pin_all_else();
    let mut figures = Vec::new();
    let mut failures = Vec::new();
    for &stage in stages {
        let mode = match stage.is_durable() {
            true => "durable",
            false => "core",
        };
        let rounds = match (stage, quick) {
            (Stage::Memory, true) => 1,
            (Stage::Memory, false) | (_, true) => 3,
            (_, false) => 5,
        };
        for round in 1..=rounds {
            for (relay, (label, command)) in contestants.iter().enumerate() {
                // The floor waits for no stream.
                if stage == Stage::Confirmed && label == "floor" {
                    continue;
                }
                eprintln!("{stage:?}, round {round} of {rounds}: {label}");
                let measured = run(stage, command, quick).unwrap_or_else(|error| {
                    failures.push(format!("{label}, {stage:?}, round {round}: {error:#}"));
                    Vec::new()
                });
                for (what, value) in measured {
                    let name = format!("{mode}: {what}");
                    figures.push(Figure {
                        name,
                        relay,
                        round,
                        value,
                    });
                }
            }
        }
    }
    let circumstances = table::circumstances()?;
    let version = env!("CARGO_PKG_VERSION");
    let megabytes = fs::metadata(support::Relay::program())?.len() as f64 / 1e6;
    println!("{circumstances}, {cpus}, nats-webhook-relay {version} ({megabytes:.1} MB)\n");
    let labels: Vec<_> = contestants
        .iter()
        .map(|(label, _)| label.as_str())
        .collect();
    table::print(&labels, &figures);
    for failure in &failures {
        println!("Failed: {failure}");
    }
    ensure!(
        !failures.iter().any(|failure| failure.starts_with("relay,")),
        "the relay failed"
    );
    Ok(())
}

/// One round of one relay, with a server, a webhook and a process of its own.
fn run(
    stage: Stage,
    command: &[OsString],
    quick: bool,
) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nats = runtime.block_on(start_server(stage))?;
    let webhook = Webhook::start()?;
    let mut load = Load::new(&nats.url(), Arc::clone(&webhook), stage.is_durable())?;
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("relay.log");

    let url = nats.url();
    let mut variables = vec![
        ("WEBHOOK_DESTINATION", webhook.url.as_str()),
        ("NATS_HOST", &url),
        ("NATS_SUBJECT_PREFIX", PREFIX),
        ("NATS_RELAYED_SUBJECT_PREFIX", RELAYED_PREFIX),
    ];
    if stage.is_durable() {
        variables.extend([("NATS_STREAM", STREAM), ("NATS_CONSUMER", CONSUMER)]);
    }
    if stage == Stage::Confirmed {
        variables.push(("NATS_RELAYED_STREAM", RELAYED_STREAM));
    }
    let start = || Process::start(command, &variables, &log);
    measure(stage, quick, command, &mut load, start).with_context(|| {
        let log = fs::read_to_string(&log).unwrap_or_default();
        let last = log.lines().next_back().unwrap_or_default();
        format!("the last line of its log is {last:?}")
    })
}

async fn start_server(stage: Stage) -> anyhow::Result<NatsServer> {
    if !stage.is_durable() {
        return Ok(NatsServer::start().await);
    }
    let nats = NatsServer::with_stream().await;
    // The consumer exists already, as at any start but the first one.
    let consumer = pull::Config {
        durable_name: Some(CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: Duration::from_secs(5),
        filter_subject: format!("{PREFIX}.>"),
        max_ack_pending: 1,
        ..pull::Config::default()
    };
    let stream = nats.jetstream().await.get_stream(STREAM).await?;
    stream.create_consumer(consumer).await?;
    if stage == Stage::Confirmed {
        let subjects = format!("{RELAYED_PREFIX}.>");
        nats.create_stream(RELAYED_STREAM, &subjects, 1).await;
    }
    Ok(nats)
}

/// Measures a relay that `start` starts. A quick round has a quarter of the messages.
fn measure(
    stage: Stage,
    quick: bool,
    command: &[OsString],
    load: &mut Load,
    start: impl FnOnce() -> anyhow::Result<Process>,
) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let part = if quick { 4 } else { 1 };
    let (relay, subscribed) = load.first(start)?;
    let mut figures = Vec::new();
    match stage {
        Stage::Core | Stage::Durable => {
            figures.push((
                "from start to subscribed, ms",
                subscribed.as_secs_f64() * 1e3,
            ));
            thread::sleep(Duration::from_millis(300));
            figures.push(("memory idle, MB", relay.memory("VmRSS")?));

            let latencies = load.one_by_one(3000 / part)?;
            let micros = |index: usize| latencies[index].as_secs_f64() * 1e6;
            figures.push(("one at a time, p50, µs", micros(latencies.len() / 2)));
            figures.push(("one at a time, p99, µs", micros(latencies.len() * 99 / 100)));

            let count = 20_000 / part;
            let before = relay.cpu()?;
            figures.push(("burst, 256 B, messages/s", load.burst(count, 256)?));
            let after = relay.cpu()?;
            let user = (after.0 - before.0) / count as f64;
            let system = (after.1 - before.1) / count as f64;
            figures.push(("CPU per message, user, µs", user));
            figures.push(("CPU per message, system, µs", system));
            figures.push(("CPU per message, µs", user + system));

            // JetStream takes longer for these, and the rate is the same.
            let part = if stage.is_durable() { 2 * part } else { part };
            for (what, size, delay_millis, count) in [
                ("burst, 16 KiB, messages/s", 16 * 1024, 0, 20_000),
                ("burst, webhook takes 1 ms, messages/s", 256, 1, 1000),
                ("burst, webhook takes 10 ms, messages/s", 256, 10, 200),
            ] {
                load.webhook.delay_millis.store(delay_millis, SeqCst);
                figures.push((what, load.burst(count / part, size)?));
            }
        }
        Stage::Memory => {
            load.burst(100_000, 256)?;
            let peak = relay.memory("VmHWM")?;
            figures.push(("memory, peak of a burst of 100,000, MB", peak));
            thread::sleep(Duration::from_secs(2));
            figures.push(("memory 2 s after that, MB", relay.memory("VmRSS")?));
        }
        Stage::Confirmed => {
            let rate = load.burst(20_000 / part, 256)?;
            figures.push(("burst, 256 B, confirmed by a stream, messages/s", rate));
        }
        Stage::Lanes => {
            load.webhook.delay_millis.store(10, SeqCst);
            let one = load.burst(200 / part, 256)?;
            let four = lanes::rate(command, 800 / part)?;
            figures.push(("4 lanes, webhook takes 10 ms, messages/s", four));
            figures.push(("4 lanes, speedup over one", four / one));
        }
    }
    // The relay still runs, and may just be about to acknowledge the last message.
    load.check()?;
    Ok(figures)
}
