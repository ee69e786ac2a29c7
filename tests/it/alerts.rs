//! The alerts in examples/prometheus. promtool tests what they say; here is whether the relay has what
//! they ask for.

use std::collections::BTreeSet;

use crate::{
    operating::{STATUS, address, metrics},
    support::{Scene, Webhook},
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
