//! The one benchmark, from end to end: a real nats-server, a webhook endpoint, and the relay as its
//! users run it, beside the [`floor`], round after round. Prints a table of medians.
//!
//! ```sh
//! cargo bench
//! cargo bench -- --quick --only core           # or memory, or durable
//! cargo bench -- --vs 'other=/path/to/other'   # any relay that takes the same variables
//! ```

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod cpus;
mod floor;
mod load;
mod nats;
mod process;
#[path = "../../tests/it/support/mod.rs"]
mod support;
mod table;
mod webhook;

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use async_nats::jetstream::consumer::{AckPolicy, pull};
use cpus::Cpus;
use load::Load;
use process::Process;
use support::NatsServer;
use table::{Figures, Table};
use webhook::Webhook;

/// The argument that makes this program the floor.
const FLOOR: &str = "--floor";
const STREAM: &str = "CMS";
const CONSUMER: &str = "relay";

/// Bursts wait in the server where a relay does not buffer them.
const SERVER: &str = "max_pending: 512MB, write_deadline: \"60s\"\n";

/// A relay to measure.
struct Contestant {
    label: String,
    command: Box<dyn Fn() -> Command>,
}

/// How much is measured.
struct Plan {
    stages: Vec<Stage>,
    rounds: usize,
    memory_rounds: usize,
    /// How many messages of a full burst.
    share: f64,
}

#[derive(Clone, Copy)]
enum Stage {
    Core,
    Memory,
    Durable,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let outcome = match &arguments[..] {
        [argument] if argument == FLOOR => floor::run(),
        _ => parse(&arguments).and_then(|(contestants, plan)| measure(&contestants, &plan)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: &[String]) -> anyhow::Result<(Vec<Contestant>, Plan)> {
    let mut contestants = vec![
        Contestant {
            label: "floor".to_owned(),
            command: Box::new(|| {
                let mut command = Command::new(std::env::current_exe().unwrap());
                command.arg(FLOOR);
                command
            }),
        },
        Contestant {
            label: "relay".to_owned(),
            command: Box::new(|| Command::new(program())),
        },
    ];
    let mut plan = Plan {
        stages: vec![Stage::Core, Stage::Memory, Stage::Durable],
        rounds: 5,
        memory_rounds: 3,
        share: 1.0,
    };
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => {
                plan.rounds = 3;
                plan.memory_rounds = 1;
                plan.share = 0.25;
            }
            "--only" => {
                let only = arguments.next().context("--only takes a stage")?;
                plan.stages.retain(|stage| stage.to_string() == *only);
            }
            "--vs" => {
                let other = arguments.next().and_then(|other| other.split_once('='));
                let (label, command) = other.context("--vs takes LABEL=COMMAND")?;
                let command = format!("exec {command}");
                contestants.push(Contestant {
                    label: label.to_owned(),
                    command: Box::new(move || {
                        let mut shell = Command::new("sh");
                        shell.args(["-c", &command]);
                        shell
                    }),
                });
            }
            // What cargo passes.
            "--bench" => {}
            other => bail!(
                "not understood: {other}; known are --quick, --only STAGE and --vs LABEL=COMMAND"
            ),
        }
    }
    Ok((contestants, plan))
}

fn program() -> PathBuf {
    support::Relay::program()
}

fn measure(contestants: &[Contestant], plan: &Plan) -> anyhow::Result<()> {
    let cpus = Cpus::split();
    let labels = contestants
        .iter()
        .map(|contestant| contestant.label.clone());
    let mut table = Table::new(labels.collect(), 0);
    let mut failures = Vec::new();
    for stage in plan.stages.iter().copied() {
        let rounds = match stage {
            Stage::Memory => plan.memory_rounds,
            Stage::Core | Stage::Durable => plan.rounds,
        };
        for round in 1..=rounds {
            let mut figures = Vec::new();
            for contestant in contestants {
                let label = &contestant.label;
                eprintln!("{stage}, round {round} of {rounds}: {label}");
                figures.push(match run(stage, contestant, plan, &cpus) {
                    Ok(figures) => Some(figures),
                    Err(error) => {
                        failures.push(format!("{label}, {stage}, round {round}: {error:#}"));
                        None
                    }
                });
            }
            table.add(&figures);
        }
    }
    let bytes = std::fs::metadata(program())?.len();
    println!("{}\n\n{table}", table::circumstances(bytes, &cpus));
    for failure in &failures {
        println!("Failed: {failure}");
    }
    let ours = failures.iter().any(|failure| failure.starts_with("relay,"));
    ensure!(!ours, "the relay failed");
    Ok(())
}

/// One round of one relay, with a server, a webhook and a process of its own.
fn run(stage: Stage, contestant: &Contestant, plan: &Plan, cpus: &Cpus) -> anyhow::Result<Figures> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let durable = matches!(stage, Stage::Durable);
    let nats = runtime.block_on(start_server(durable))?;
    let webhook = Webhook::start()?;
    let mut load = Load::new(&nats.url(), durable)?;
    let directory = tempfile::tempdir()?;
    let start = || {
        let (url, hook) = (nats.url(), webhook.url());
        let mut variables = vec![
            ("WEBHOOK_DESTINATION", hook.as_str()),
            ("NATS_HOST", url.as_str()),
            ("NATS_SUBJECT_PREFIX", load::PREFIX),
            ("NATS_RELAYED_SUBJECT_PREFIX", load::RELAYED_PREFIX),
        ];
        if durable {
            variables.extend([("NATS_STREAM", STREAM), ("NATS_CONSUMER", CONSUMER)]);
        }
        let mut command = (contestant.command)();
        cpus.start(|| Process::start(&mut command, &variables, directory.path()))
    };
    let measured = load
        .first(&webhook, start)
        .and_then(|(relay, subscribed)| match stage {
            Stage::Memory => measure_memory(&relay, &webhook, &mut load),
            Stage::Core | Stage::Durable => {
                let mut figures = vec![(
                    format!("{stage}: from start to subscribed, ms"),
                    subscribed.as_secs_f64() * 1e3,
                )];
                figures.extend(measure_speed(stage, plan, &relay, &webhook, &mut load)?);
                Ok(figures)
            }
        });
    let log = || {
        let log = std::fs::read_to_string(directory.path().join("relay.log")).unwrap_or_default();
        let last = log.lines().next_back().unwrap_or_default().to_owned();
        format!("its last words: {last:?}")
    };
    let figures = measured.with_context(log)?;
    ensure!(
        webhook.out_of_order() == 0 && webhook.next() == load.next(),
        "the webhook got {} messages out of order, and {} of {}",
        webhook.out_of_order(),
        webhook.next(),
        load.next()
    );
    if durable {
        runtime.block_on(all_acknowledged(&nats))?;
    }
    Ok(figures)
}

async fn start_server(durable: bool) -> anyhow::Result<NatsServer> {
    if !durable {
        return Ok(NatsServer::with_config(SERVER).await);
    }
    let jetstream = format!("{SERVER}jetstream {{ store_dir: \"$DIR/jetstream\" }}");
    let nats = NatsServer::with_config(&jetstream).await;
    nats.create_stream(STREAM, &format!("{}.>", load::PREFIX), 1)
        .await;
    // As after any start but the first one.
    let stream = nats.jetstream().await.get_stream(STREAM).await?;
    stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: Duration::from_secs(5),
            filter_subject: format!("{}.>", load::PREFIX),
            max_ack_pending: 1,
            ..pull::Config::default()
        })
        .await?;
    Ok(nats)
}

/// The last ack may be just under way.
async fn all_acknowledged(nats: &NatsServer) -> anyhow::Result<()> {
    let stream = nats.jetstream().await.get_stream(STREAM).await?;
    for _ in 0..100 {
        let info = stream.consumer_info(CONSUMER).await?;
        if info.num_pending == 0 && info.num_ack_pending == 0 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bail!("messages of the stream are not acknowledged")
}

fn measure_speed(
    stage: Stage,
    plan: &Plan,
    relay: &Process,
    webhook: &Webhook,
    load: &mut Load,
) -> anyhow::Result<Figures> {
    let mut figures = Figures::new();
    let mut note = |what: &str, value: f64| figures.push((format!("{stage}: {what}"), value));
    let count = |full: f64| (full * plan.share) as u64;
    let micros = |time: Duration| time.as_secs_f64() * 1e6;

    thread::sleep(Duration::from_millis(300));
    note("memory idle, MB", relay.memory("VmRSS")?);

    let latencies = load.one_by_one(webhook, count(3000.0))?;
    let at = |part: f64| micros(latencies[(latencies.len() as f64 * part) as usize]);
    note("one at a time, p50, µs", at(0.5));
    note("one at a time, p99, µs", at(0.99));

    let messages = count(20_000.0);
    let before = relay.cpu()?;
    let took = load.burst(webhook, messages, 256)?;
    let after = relay.cpu()?;
    note(
        "burst, 256 B, messages/s",
        messages as f64 / took.as_secs_f64(),
    );
    let user = (after.user - before.user) * 1e6 / messages as f64;
    let system = (after.system - before.system) * 1e6 / messages as f64;
    note("its CPU per message, user, µs", user);
    note("its CPU per message, system, µs", system);
    note("its CPU per message, µs", user + system);

    for (what, size, delay, full) in [
        ("burst, 16 KiB, messages/s", 16 * 1024, 0, 20_000.0),
        ("burst, webhook takes 1 ms, messages/s", 256, 1, 1000.0),
        ("burst, webhook takes 10 ms, messages/s", 256, 10, 200.0),
    ] {
        // JetStream takes longer for them, and the rate is the same.
        let full = if matches!(stage, Stage::Durable) {
            full / 2.0
        } else {
            full
        };
        webhook.set_delay(Duration::from_millis(delay));
        let took = load.burst(webhook, count(full), size)?;
        note(what, count(full) as f64 / took.as_secs_f64());
    }
    Ok(figures)
}

fn measure_memory(relay: &Process, webhook: &Webhook, load: &mut Load) -> anyhow::Result<Figures> {
    load.burst(webhook, 100_000, 256)?;
    let peak = relay.memory("VmHWM")?;
    thread::sleep(Duration::from_secs(2));
    Ok(vec![
        (
            "core: memory, peak of a burst of 100,000, MB".to_owned(),
            peak,
        ),
        (
            "core: memory 2 s after that, MB".to_owned(),
            relay.memory("VmRSS")?,
        ),
    ])
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Core => "core",
            Self::Memory => "memory",
            Self::Durable => "durable",
        })
    }
}
