//! What must hold afterwards.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, SystemTime},
};

use async_nats::{HeaderMap, jetstream, jetstream::consumer::pull::OrderedConfig};
use futures::StreamExt;
use tokio::time::timeout;

use crate::{nemesis::Episode, support::Received, traffic::message};

/// A message as a stream has it.
pub struct Stored {
    pub subject: String,
    /// The id by which a webhook and the relayed stream know it.
    pub id: String,
    pub headers: HeaderMap,
    pub payload: Vec<u8>,
    pub at: SystemTime,
}

/// All that a run leaves behind.
pub struct Evidence {
    pub seed: u64,
    /// How many messages the input stream has confirmed.
    pub confirmed: usize,
    pub input: Vec<Stored>,
    pub relayed: Vec<Stored>,
    pub requests: Vec<Received>,
    /// When each message was first answered with 200.
    pub successes: HashMap<String, SystemTime>,
    pub episodes: Vec<Episode>,
    pub logs: BTreeMap<String, Vec<String>>,
    pub deaths: Vec<String>,
}

/// What was found.
#[derive(Default)]
pub struct Findings {
    pub violations: Vec<String>,
    /// Requests for a message that had been answered with 200 before.
    pub repeated: usize,
    /// Requests that began before another one ended.
    pub overlapping: usize,
    /// Messages that the input stream had confirmed, and has not.
    pub lost_by_the_server: usize,
}

/// What the relay appends to the id of a message.
const RELAYED: &str = "@relayed.cache";

/// All that a stream has.
pub async fn read(jetstream: &jetstream::Context, stream: &str) -> anyhow::Result<Vec<Stored>> {
    let mut handle = jetstream.get_stream(stream).await?;
    let count = handle.info().await?.state.messages;
    let consumer = handle.create_consumer(OrderedConfig::default()).await?;
    let mut messages = consumer.messages().await?;
    let mut stored = Vec::new();
    for _ in 0..count {
        let message = timeout(Duration::from_secs(20), messages.next()).await?;
        let message = message.expect("the subscription goes on")?;
        let info = message.info().map_err(|error| anyhow::anyhow!("{error}"))?;
        let nanos = info.published.unix_timestamp_nanos();
        let headers = message.headers.clone().unwrap_or_default();
        let place = format!("{stream}-{}-{nanos}", info.stream_sequence);
        stored.push(Stored {
            subject: message.subject.to_string(),
            id: headers.get("Nats-Msg-Id").map_or(place, |id| {
                let id = id.as_str();
                id.strip_suffix(RELAYED).unwrap_or(id).to_owned()
            }),
            headers,
            payload: message.payload.to_vec(),
            at: SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos.try_into()?),
        });
    }
    Ok(stored)
}

impl Evidence {
    pub fn judge(&self) -> Findings {
        let mut findings = Findings::default();
        self.check_input(&mut findings);
        self.check_requests(&mut findings);
        self.check_relayed(&mut findings);
        self.check_overlaps(&mut findings);
        self.check_logs(&mut findings);
        for episode in &self.episodes {
            if episode.recovered.is_none() {
                let faults = &episode.faults;
                findings.add(format!("nothing came through after {faults:?}"));
            }
        }
        findings.violations.extend(self.deaths.iter().cloned());
        findings
    }

    /// The server has what it confirmed.
    fn check_input(&self, findings: &mut Findings) {
        let ids: HashSet<_> = self.input.iter().map(|m| m.id.as_str()).collect();
        let payloads: HashSet<_> = self.input.iter().map(|m| m.payload.as_slice()).collect();
        for n in 0..self.confirmed {
            let (_, headers, payload) = message(self.seed, n);
            let is_stored = match headers.get("Nats-Msg-Id") {
                Some(id) => ids.contains(id.as_str()),
                None => payloads.contains(payload.as_slice()),
            };
            if !is_stored {
                findings.lost_by_the_server += 1;
                findings.add(format!("the stream CMS has lost message {n}"));
            }
        }
    }

    /// Each message was POSTed until that succeeded, as it is, and first successes are in order.
    fn check_requests(&self, findings: &mut Findings) {
        let input: HashMap<_, _> = self
            .input
            .iter()
            .enumerate()
            .map(|(n, message)| (message.id.as_str(), (n, message)))
            .collect();
        let mut succeeded = vec![false; self.input.len()];
        let mut order = Vec::new();
        for request in &self.requests {
            let id = request.header("webhook-id").unwrap_or_default();
            let Some((n, message)) = input.get(id) else {
                findings.add(format!("POSTed, but not in the stream: {id}"));
                continue;
            };
            findings.repeated += usize::from(succeeded[*n]);
            let content_type = message.headers.get("Content-Type");
            let content_type = content_type.map_or("application/json", |value| value.as_str());
            if request.body != message.payload
                || request.header("x-nats-subject") != Some(&message.subject)
                || request.header("content-type") != Some(content_type)
            {
                findings.add(format!("POSTed otherwise than it is in the stream: {id}"));
            }
            if request.status == 200 && request.answered.is_some() {
                succeeded[*n] = true;
                order.push((request.answered, *n));
            }
        }
        for (n, _) in succeeded.iter().enumerate().filter(|(_, done)| !**done) {
            let id = &self.input[n].id;
            findings.add(format!("never POSTed with success: {id}"));
        }
        order.sort();
        let mut seen = HashSet::new();
        let first: Vec<_> = order
            .into_iter()
            .map(|(_, n)| n)
            .filter(|n| seen.insert(*n))
            .collect();
        for pair in first.windows(2).filter(|pair| pair[0] > pair[1]) {
            let [before, after] = [pair[0], pair[1]].map(|n| &self.input[n].id);
            findings.add(format!(
                "POSTed in the wrong order: {before} before {after}"
            ));
        }
    }

    /// Each message stands once in the relayed stream, in order, as it is, and after its success.
    fn check_relayed(&self, findings: &mut Findings) {
        let ids = |stored: &[Stored]| stored.iter().map(|m| m.id.clone()).collect::<Vec<_>>();
        let (input, relayed) = (ids(&self.input), ids(&self.relayed));
        let position: HashMap<_, _> = input.iter().enumerate().map(|(n, id)| (id, n)).collect();
        let mut times = vec![0; input.len()];
        let mut highest = None;
        for message in &self.relayed {
            let id = &message.id;
            let Some(n) = position.get(id).copied() else {
                findings.add(format!("relayed, but not in the stream CMS: {id}"));
                continue;
            };
            times[n] += 1;
            if times[n] == 1 && highest.is_some_and(|highest| n < highest) {
                findings.add(format!("relayed in the wrong order: {id}"));
            }
            highest = highest.max(Some(n));
            if self.successes.get(id).is_none_or(|at| message.at < *at) {
                findings.add(format!("relayed before its webhook succeeded: {id}"));
            }
            let original = &self.input[n];
            let subject = original.subject.replacen("cms.", "relayed.", 1);
            let mut headers = original.headers.clone();
            headers.insert("Nats-Msg-Id", format!("{id}{RELAYED}"));
            if message.subject != subject
                || message.payload != original.payload
                || message.headers != headers
            {
                findings.add(format!("relayed otherwise than it came: {id}"));
            }
        }
        for (id, times) in input.iter().zip(times).filter(|(_, times)| *times != 1) {
            findings.add(format!("{times} times in the relayed stream: {id}"));
        }
        if relayed.len() == input.len() && relayed != input && findings.violations.is_empty() {
            findings.add("the relayed stream is not what the input stream is".to_owned());
        }
    }

    /// Requests overlap only where one of their relays was struck, or where the webhook was, and the relay of
    /// the earlier one has stopped waiting for it and tried again.
    fn check_overlaps(&self, findings: &mut Findings) {
        /// How long the effects of a fault last: the ack wait, and what it takes to notice a dead connection.
        const AFTERMATH: Duration = Duration::from_secs(20);
        let mut open: Vec<&Received> = Vec::new();
        for request in &self.requests {
            open.retain(|earlier| earlier.ended.is_none_or(|ended| ended > request.at));
            for earlier in &open {
                findings.overlapping += 1;
                let relays = [relay_of(earlier), relay_of(request)];
                let was_tried_again = self.requests.iter().any(|again| {
                    earlier.at < again.at
                        && again.at <= request.at
                        && again.header("webhook-id") == earlier.header("webhook-id")
                        && relay_of(again) == relays[0]
                });
                let is_explained = self.episodes.iter().any(|episode| {
                    let over = episode.recovered.unwrap_or(episode.ended) + AFTERMATH;
                    let is_then = episode.began <= request.at && over >= earlier.at;
                    let is_struck = |name: &&str| episode.struck.iter().any(|s| s == name);
                    let is_of_webhook = was_tried_again && episode.is_of_webhook();
                    is_then && (is_of_webhook || relays.iter().any(is_struck))
                });
                if !is_explained {
                    let ids = [earlier, request].map(|r| r.header("webhook-id"));
                    findings.add(format!(
                        "two requests at a time by {relays:?}, and no fault to explain it: {ids:?}"
                    ));
                }
            }
            open.push(request);
        }
    }

    /// No relay has logged an error: nothing was given up, and nothing else may be one here.
    fn check_logs(&self, findings: &mut Findings) {
        for (name, lines) in &self.logs {
            for line in lines.iter().filter(|line| line.contains(" ERROR ")) {
                findings.add(format!("relay {name}: {line}"));
            }
        }
    }
}

/// The relay that made a request.
fn relay_of(request: &Received) -> &str {
    request.header("x-relay").unwrap_or_default()
}

impl Findings {
    fn add(&mut self, violation: String) {
        self.violations.push(violation);
    }
}
