use std::collections::HashMap;

use super::{Mode, NatsServer, Relay, Webhook};

/// What tells of lanes. The configurations in it are those that are tested.
const PAGE: &str = include_str!("../../../docs/growing.md");

/// A relay for each of several lanes, as the page has them.
pub struct Lanes(pub Vec<Relay>);

impl Lanes {
    /// What undoes the mappings: newer servers keep them where the block is just left out.
    pub const NONE: &str = r#"mappings { "cms.cache.>": "cms.cache.>" }"#;

    /// What spreads the messages over `count` lanes, for the server's configuration.
    pub fn mappings(count: usize) -> String {
        block("conf", "mappings {")
            .replace("lanes.4.", &format!("lanes.{count}."))
            .replace("partition(4,", &format!("partition({count},"))
    }

    /// The settings of the relay of one lane.
    pub fn settings(mode: Mode, lane: usize, count: usize) -> Vec<(&'static str, String)> {
        let lines = block("sh", "NATS_SUBJECT_PREFIX=").lines();
        lines
            .map(|line| line.split_once('=').expect("NAME=value"))
            .filter(|(name, _)| {
                mode == Mode::Durable || !["NATS_STREAM", "NATS_CONSUMER"].contains(name)
            })
            .map(|(name, value)| {
                let value = value
                    .replace("lanes.4.0.", &format!("lanes.{count}.{lane}."))
                    .replace("lane-4-0", &format!("lane-{count}-{lane}"));
                (name, value)
            })
            .collect()
    }

    /// A relay for each lane, once all are subscribed.
    pub async fn start(nats: &NatsServer, webhook: &Webhook, mode: Mode, count: usize) -> Self {
        let mut relays = Vec::new();
        for lane in 0..count {
            relays.push(Self::start_one(nats, webhook, mode, lane, count, &[]).await);
        }
        Self(relays)
    }

    /// The relay of one lane, with changes, once it is subscribed.
    pub async fn start_one(
        nats: &NatsServer,
        webhook: &Webhook,
        mode: Mode,
        lane: usize,
        count: usize,
        changes: &[(&str, &str)],
    ) -> Relay {
        let settings = Self::settings(mode, lane, count);
        let settings: Vec<_> = settings
            .iter()
            .map(|(name, value)| (*name, &value[..]))
            .collect();
        Relay::listening(nats, webhook, &[&settings, changes].concat()).await
    }

    /// Stops all of them, as their operator would.
    pub async fn stop(self) {
        for relay in &self.0 {
            relay.signal("TERM");
        }
        for relay in self.0 {
            assert_eq!(relay.ended().await.0, Some(0));
        }
    }
}

/// The only code block of this kind that begins with `start`, leaving comments aside.
fn block(kind: &str, start: &str) -> &'static str {
    let fence = format!("```{kind}\n");
    let blocks = PAGE
        .split(&*fence)
        .skip(1)
        .filter_map(|rest| rest.split("```").next());
    let mut fitting = blocks.filter(|block| block.starts_with(start));
    let block = fitting.next().expect("docs/growing.md has such a block");
    assert_eq!(fitting.next(), None, "docs/growing.md has two of them");
    block
}

/// Of messages that are `page number`, those that came after a later one of their page, or again.
pub fn out_of_order(messages: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut last = HashMap::new();
    let mut wrong = Vec::new();
    for message in messages {
        let (page, number) = message.split_once(' ').expect("a page and a number");
        let number: usize = number.parse().expect("a number");
        match last.insert(page.to_owned(), number) {
            Some(before) if before >= number => wrong.push(message),
            _ => {}
        }
    }
    wrong
}
