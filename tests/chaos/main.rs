//! Nothing lost, never out of order, whatever goes wrong: relays, servers, the network between them and the
//! webhook fail by a seed, while messages are published without a pause. `scripts/chaos [minutes] [seed]`
//! runs it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod check;
mod nemesis;
mod stage;
#[path = "../it/support/mod.rs"]
mod support;
mod traffic;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use async_nats::jetstream;

use check::{Evidence, Findings, published, read};
use nemesis::{Episode, Nemesis, PATIENCE};
use stage::{Cast, Stage};
use traffic::{Listener, Messages, Publisher};

/// The casts, each of which has its share of the time.
const CASTS: [Cast; 6] = [
    Cast {
        servers: 1,
        relays: 1,
        environments: &["production"],
        limit: None,
    },
    Cast {
        servers: 1,
        relays: 3,
        environments: &["production"],
        limit: None,
    },
    Cast {
        servers: 3,
        relays: 3,
        environments: &["production"],
        limit: None,
    },
    Cast {
        servers: 1,
        relays: 2,
        environments: &["production", "preview"],
        limit: None,
    },
    Cast {
        servers: 3,
        relays: 1,
        environments: &["production", "preview"],
        limit: None,
    },
    Cast {
        servers: 1,
        relays: 3,
        environments: &["production"],
        limit: Some(5),
    },
];

/// More memory than a relay ever needs for what is published here, in kB.
const MEMORY: u64 = 64 * 1024;

/// What a run has come to.
#[derive(Default)]
struct Figures {
    messages: usize,
    requests: usize,
    repeated: usize,
    overlapping: usize,
    lost_by_the_server: usize,
    memory: u64,
    faults: usize,
    /// By kind of fault.
    standstill: BTreeMap<String, Duration>,
}

#[tokio::test]
#[ignore = "takes minutes; scripts/chaos runs it"]
async fn whatever_goes_wrong_nothing_is_lost_and_the_order_is_kept() {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let minutes: f64 = variable("CHAOS_MINUTES").map_or(4.0, |value| value.parse().unwrap());
    let seed = variable("CHAOS_SEED").map_or_else(
        || fastrand::u64(0..1_000_000),
        |value| value.parse().unwrap(),
    );
    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-{seed}"));
    println!(
        "chaos: seed {seed}, {minutes} minutes, logs in {}",
        results.display()
    );
    let mut figures = Figures::default();
    let mut violations = Vec::new();
    for (n, cast) in CASTS.into_iter().enumerate() {
        let time = Duration::from_secs_f64(minutes * 60.0 / CASTS.len() as f64);
        let seed = seed.wrapping_mul(1000).wrapping_add(n as u64);
        let found = run(cast, time, seed, &results, &mut figures).await;
        let found = found.into_iter();
        violations.extend(found.map(|violation| format!("{cast}: {violation}")));
    }
    for violation in &violations {
        println!("{violation}");
    }
    println!("{}", figures.line(seed, minutes, violations.len()));
    assert!(violations.is_empty(), "what must hold did not");
}

/// One cast, for a while; what it has violated.
async fn run(
    cast: Cast,
    time: Duration,
    seed: u64,
    results: &Path,
    figures: &mut Figures,
) -> Vec<String> {
    let start = Instant::now();
    let mut stage = Stage::set(cast, seed).await;
    let listener = Listener::start(&stage.client).await;
    let messages = Messages {
        seed,
        have_ids: cast.limit.is_some(),
    };
    let publisher = Publisher::start(&stage.addresses(), messages).await;
    let confirmed = publisher.confirmed();
    assert!(
        stage.reached(0, PATIENCE).await,
        "the first message comes through"
    );
    let mut nemesis = Nemesis::new(seed);
    let (mut episodes, mut story) = (Vec::<Episode>::new(), String::new());
    while start.elapsed() < time {
        tokio::time::sleep(nemesis.pause()).await;
        let episode = nemesis.strike(&mut stage, &confirmed).await;
        let _ = writeln!(
            story,
            "{:.1?} {:?} for {:.1?}, struck {:?}, recovered after {:.1?}, standstill {:.1?}",
            episode.began - start,
            episode.faults,
            episode.ended - episode.began,
            episode.struck,
            episode.recovered.map(|at| at - episode.ended),
            episode.standstill,
        );
        let is_over = episode.recovered.is_none();
        episodes.push(episode);
        if is_over {
            break;
        }
    }
    let confirmed = publisher.end().await;
    stage.reached(confirmed - 1, PATIENCE).await;
    let jetstream = jetstream::new(stage.client.clone());
    settle(&jetstream, cast.environments).await;
    for relay in 0..cast.replicas() {
        stage.look_after_relays().await;
        stage.stop_relay(relay).await;
    }
    let kept = read(&jetstream, "CMS").await.unwrap();
    let evidence = Evidence {
        cast,
        messages,
        confirmed,
        input: match cast.limit {
            Some(_) => published(messages, confirmed, &kept),
            None => kept,
        },
        relayed: read(&jetstream, "RELAYED").await.unwrap(),
        heard: listener.end(),
        requests: stage.endpoint.webhook.requests(),
        answers: stage.endpoint.answers.lock().unwrap().clone(),
        episodes,
        replayed: std::mem::take(&mut stage.replayed),
        logs: stage.logs.clone(),
        deaths: stage.deaths.clone(),
    };
    let mut findings = evidence.judge();
    if stage.memory > MEMORY {
        let memory = format!("a relay had {} kB of memory", stage.memory);
        findings.violations.push(memory);
    }
    figures.add(&evidence, &findings, stage.memory);
    let directory = results.join(cast.to_string().replace(", ", "-").replace(' ', "-"));
    keep(&directory, start, &stage, &evidence, &story, &findings);
    findings.violations
}

/// Waits until all was relayed and acknowledged. It need not be: what is missing shows afterwards.
async fn settle(jetstream: &jetstream::Context, environments: &[&str]) {
    let deadline = Instant::now() + PATIENCE;
    let is_settled = async || -> anyhow::Result<bool> {
        let stream = jetstream.get_stream_no_info("CMS").await?;
        for environment in environments {
            let info = stream.consumer_info(environment).await?;
            if info.num_pending + info.num_ack_pending as u64 > 0 {
                return Ok(false);
            }
        }
        Ok(true)
    };
    while Instant::now() < deadline && !is_settled().await.unwrap_or(false) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Writes down what happened, for whoever looks into it.
fn keep(
    directory: &Path,
    start: Instant,
    stage: &Stage,
    evidence: &Evidence,
    story: &str,
    findings: &Findings,
) {
    let _ = fs::remove_dir_all(directory);
    fs::create_dir_all(directory).unwrap();
    let write = |name: &str, text: &str| fs::write(directory.join(name), text).unwrap();
    write("episodes", story);
    write("violations", &findings.violations.join("\n"));
    for (name, lines) in &evidence.logs {
        write(&format!("relay-{name}.log"), &lines.join("\n"));
    }
    for (n, server) in stage.servers.iter().enumerate() {
        write(&format!("nats-server-{n}.log"), &server.log());
    }
    let list = |stored: &[check::Stored]| {
        let ids = stored.iter().map(|message| message.id.as_str());
        ids.collect::<Vec<_>>().join("\n")
    };
    write("input", &list(&evidence.input));
    write("relayed", &list(&evidence.relayed));
    let heard = evidence.heard.iter();
    let heard: Vec<_> = heard
        .map(|heard| format!("{:.3?} {} {}", heard.at - start, heard.subject, heard.id))
        .collect();
    write("heard", &heard.join("\n"));
}

impl Figures {
    fn add(&mut self, evidence: &Evidence, findings: &Findings, memory: u64) {
        self.messages += evidence.confirmed;
        self.requests += evidence.requests.len();
        self.repeated += findings.repeated;
        self.overlapping += findings.overlapping;
        self.lost_by_the_server += findings.lost_by_the_server;
        self.memory = self.memory.max(memory);
        for episode in &evidence.episodes {
            self.faults += episode.faults.len();
            let longest = self.standstill.entry(episode.kind()).or_default();
            *longest = episode.standstill.max(*longest);
        }
    }

    fn line(&self, seed: u64, minutes: f64, violations: usize) -> String {
        let standstill: Vec<_> = self
            .standstill
            .iter()
            .map(|(kind, longest)| format!("{kind} {:.1} s", longest.as_secs_f64()))
            .collect();
        format!(
            "chaos: seed {seed}, {minutes} minutes, {}: {} faults, {} messages, {} requests ({} after a \
             success, {} overlapping), {} lost by the server; longest standstill: {}; memory {:.1} MB; \
             violations: {violations}",
            server_version(),
            self.faults,
            self.messages,
            self.requests,
            self.repeated,
            self.overlapping,
            self.lost_by_the_server,
            standstill.join(", "),
            self.memory as f64 / 1000.0,
        )
    }
}

fn server_version() -> String {
    let output = std::process::Command::new("nats-server")
        .arg("--version")
        .output();
    String::from_utf8_lossy(&output.unwrap().stdout)
        .trim()
        .to_owned()
}
