//! The alerts and the dashboard in examples/prometheus, and the table of metrics. promtool tests what the alerts
//! say; here is whether the relay has what they ask for.

use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use crate::{
    operating::{STATUS, address, get, metrics},
    support::{Answer, Scene, Webhook, free_address, until_ok},
};

const RULES: &str = include_str!("../../examples/prometheus/rules.yml");

#[tokio::test]
async fn the_relay_has_every_metric_that_the_alerts_ask_for() {
    let scene = Scene::core(Webhook::ok().await, &[STATUS]).await;
    let found = metrics(&address(&scene.relay).await).await;
    let found: BTreeSet<_> = found
        .keys()
        .map(|name| name.split(' ').next().unwrap())
        .collect();
    let asked: BTreeSet<_> = RULES
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter_map(|word| word.strip_prefix("nats_webhook_relay_"))
        .collect();
    assert!(asked.len() > 5, "{asked:?}");
    let missing: Vec<_> = asked.difference(&found).collect();
    assert!(missing.is_empty(), "{missing:?} of {found:?}");
}

#[tokio::test]
async fn the_documentation_has_every_metric() {
    let scene = Scene::core(Webhook::ok().await, &[STATUS]).await;
    let (_, text) = get(&address(&scene.relay).await, "/metrics").await;
    let metrics: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# HELP nats_webhook_relay_"))
        .map(|line| {
            let (name, help) = line.split_once(' ').unwrap();
            format!("| `{name}` | {help} |")
        })
        .collect();
    let page = include_str!("../../docs/operations.md");
    let (_, table) = page.split_once("## Metrics").unwrap();
    let table: Vec<_> = table
        .lines()
        .filter(|line| line.starts_with("| `"))
        .take(metrics.len())
        .collect();
    assert_eq!(table, metrics);
    #[cfg(target_os = "linux")]
    assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
}

/// Every query of the dashboard, as Grafana sends it.
fn queries() -> Vec<String> {
    let dashboard = include_str!("../../examples/prometheus/dashboard.json");
    let dashboard: Value = serde_json::from_str(dashboard).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.filter_map(|panel| panel["targets"].as_array());
    let queries = targets.flatten().map(|target| {
        let query = target["expr"].as_str().unwrap();
        let query = query.replace("$__rate_interval", "10s");
        query.replace("$job", ".*").replace("$instance", ".*")
    });
    queries.collect()
}

#[tokio::test]
#[ignore = "needs Prometheus"]
async fn every_panel_of_the_dashboard_shows_data() {
    let is_there = Command::new("prometheus").arg("--version").output();
    if is_there.is_err() {
        return eprintln!("The dashboard is not tested, because there is no prometheus.");
    }
    // It relays, then gives up on a message, fails, and has another one waiting.
    let webhook = Webhook::start(|n, _| match n {
        0..40 => Answer::OK,
        40 => Answer::status(422),
        _ => Answer::status(503),
    })
    .await;
    let scene = Scene::durable(webhook, &[STATUS]).await;
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("prometheus.yml");
    let scrape = format!(
        "scrape_configs: [{{ job_name: relay, scrape_interval: 1s, static_configs: [{{ targets: ['{}'] }}] }}]",
        address(&scene.relay).await
    );
    std::fs::write(&config, scrape).unwrap();
    let prometheus = free_address().to_string();
    let mut process = tokio::process::Command::new("prometheus")
        .arg(format!("--config.file={}", config.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            directory.path().display()
        ))
        .arg(format!("--web.listen-address={prometheus}"))
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let value = async |query: &str| {
        let query = utf8_percent_encode(query, NON_ALPHANUMERIC);
        let path = format!("/api/v1/query?query={query}");
        let (_, body) = get(&prometheus, &path).await;
        let answer: Value = serde_json::from_str(&body).unwrap_or_default();
        let number = answer["data"]["result"][0]["value"][1].as_str();
        match number.map(str::parse::<f64>) {
            Some(Ok(number)) if number.is_finite() => Ok(number),
            _ => Err(body),
        }
    };
    until_ok("Prometheus scrapes", async || match process.try_wait() {
        Ok(None) => {
            tokio::net::TcpStream::connect(&prometheus)
                .await
                .map_err(|error| error.to_string())?;
            value("nats_webhook_relay_connected").await
        }
        ended => panic!("{ended:?}"),
    })
    .await;
    let queries = queries();
    assert!(queries.len() > 20, "{queries:?}");
    // Spread over some scrapes: a rate is what lies between two of them.
    for n in 0..50 {
        scene.publish(format!("{n}")).await;
        let wait = std::time::Duration::from_millis(100);
        tokio::time::sleep(wait).await;
    }
    for query in &queries {
        until_ok(query, async || value(query).await).await;
    }
    for (query, least) in [
        ("nats_webhook_relay_waiting_messages", 1.0),
        (
            "nats_webhook_relay_messages_given_up_total{reason='refused'}",
            1.0,
        ),
        ("process_resident_memory_bytes", 1e6),
    ] {
        until_ok(query, async || match value(query).await? {
            enough if enough >= least => Ok(()),
            less => Err(less.to_string()),
        })
        .await;
    }
}
