//! What must hold afterwards.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
    time::{Duration, Instant, SystemTime},
};

use async_nats::{HeaderMap, jetstream, jetstream::consumer::pull::OrderedConfig};
use futures::StreamExt;
use tokio::time::timeout;

use crate::{
    nemesis::Episode,
    stage::{Cast, Replayed},
    support::Received,
    traffic::{Answers, Heard, Messages, id_of},
};

/// A message as a stream has it.
pub struct Stored {
    pub sequence: u64,
    pub subject: String,
    /// The id by which a webhook and the relayed stream know it.
    pub id: String,
    pub headers: HeaderMap,
    pub payload: Vec<u8>,
    pub at: SystemTime,
    /// Whether the stream still has it.
    pub is_kept: bool,
}

/// All that a run leaves behind.
pub struct Evidence {
    pub cast: Cast,
    pub messages: Messages,
    /// How many messages the input stream has confirmed.
    pub confirmed: usize,
    pub input: Vec<Stored>,
    pub relayed: Vec<Stored>,
    pub heard: Vec<Heard>,
    pub requests: Vec<Received>,
    /// By environment.
    pub answers: HashMap<String, Answers>,
    pub episodes: Vec<Episode>,
    pub replayed: Vec<Replayed>,
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
        let id = Some(id_of(&headers)).filter(|id| !id.is_empty());
        stored.push(Stored {
            sequence: info.stream_sequence,
            subject: message.subject.to_string(),
            id: id.unwrap_or(place),
            headers,
            payload: message.payload.to_vec(),
            at: SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos.try_into()?),
            is_kept: true,
        });
    }
    Ok(stored)
}

/// All that was published, each message with an id of its own, to a stream that has kept only some of it.
pub fn published(messages: Messages, count: usize, kept: &[Stored]) -> Vec<Stored> {
    let kept: HashSet<_> = kept.iter().map(|message| message.id.as_str()).collect();
    let stored = (0..count).map(|n| {
        let (subject, headers, payload) = messages.get(n);
        let id = id_of(&headers);
        Stored {
            sequence: n as u64 + 1,
            subject,
            is_kept: kept.contains(id.as_str()),
            id,
            headers,
            payload,
            at: SystemTime::UNIX_EPOCH,
        }
    });
    stored.collect()
}

/// What one environment has come to, by the positions of messages in the input stream.
struct Account<'a> {
    name: &'static str,
    evidence: &'a Evidence,
    positions: HashMap<&'a str, usize>,
}

impl Evidence {
    pub fn judge(&self) -> Findings {
        let mut findings = Findings::default();
        if self.cast.limit.is_none() {
            self.check_input(&mut findings);
        }
        let input = self.input.iter().enumerate();
        let positions: HashMap<_, _> = input.map(|(n, message)| (&message.id[..], n)).collect();
        for name in self.cast.environments {
            let account = Account {
                name,
                evidence: self,
                positions: positions.clone(),
            };
            account.check_requests(&mut findings);
            account.check_relayed(&mut findings);
            account.check_heard(&mut findings);
            account.check_replays(&mut findings);
            // Where a limit drops what is being relayed, the next message is POSTed at the same time.
            if !self.may_drop() {
                account.check_overlaps(&mut findings);
            }
        }
        self.check_logs(&mut findings);
        for episode in &self.episodes {
            if episode.recovered.is_none() {
                let faults = &episode.faults;
                findings.add(format!("nothing came through after {faults:?}"));
            }
        }
        // A relay that finds no consumer ends; for a moment there is none when it is created anew.
        let is_regular = |death: &&String| {
            !self.replayed.is_empty()
                && death.contains("was deleted; the next start creates it anew")
        };
        let deaths = self.deaths.iter().filter(|death| !is_regular(death));
        findings.violations.extend(deaths.cloned());
        findings
    }

    /// Returns whether a message may leave the stream while a relay works on it, so that another relay gets the
    /// next one.
    fn may_drop(&self) -> bool {
        self.cast.limit.is_some() && self.cast.relays > 1
    }

    /// The server has what it confirmed.
    fn check_input(&self, findings: &mut Findings) {
        let ids: HashSet<_> = self.input.iter().map(|m| m.id.as_str()).collect();
        let payloads: HashSet<_> = self.input.iter().map(|m| m.payload.as_slice()).collect();
        for n in 0..self.confirmed {
            let (_, headers, payload) = self.messages.get(n);
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

    /// No relay has logged an error: nothing was given up, and nothing else may be one here.
    fn check_logs(&self, findings: &mut Findings) {
        for (name, lines) in &self.logs {
            for line in lines.iter().filter(|line| line.contains(" ERROR")) {
                findings.add(format!("relay {name}: {line}"));
            }
        }
    }
}

impl Account<'_> {
    fn requests(&self) -> impl Iterator<Item = &Received> {
        let requests = self.evidence.requests.iter();
        requests.filter(|request| request.header("x-environment") == Some(self.name))
    }

    fn replayed(&self) -> impl Iterator<Item = (usize, &Replayed)> {
        let replayed = self.evidence.replayed.iter().enumerate();
        replayed.filter(|(_, replayed)| replayed.environment == self.name)
    }

    /// Each message was POSTed until that succeeded, as it is, and first successes are in order.
    fn check_requests(&self, findings: &mut Findings) {
        let (name, input) = (self.name, &self.evidence.input);
        let mut succeeded = vec![false; input.len()];
        let mut order = Vec::new();
        for request in self.requests() {
            let id = id_in(request);
            let Some(n) = self.positions.get(id).copied() else {
                findings.add(format!("{name}: POSTed, but not in the stream: {id}"));
                continue;
            };
            let message = &input[n];
            findings.repeated += usize::from(succeeded[n]);
            let content_type = message.headers.get("Content-Type");
            let content_type = content_type.map_or("application/json", |value| value.as_str());
            if request.body != message.payload
                || request.header("x-nats-subject") != Some(&message.subject)
                || request.header("content-type") != Some(content_type)
            {
                let line = format!("{name}: POSTed otherwise than it is in the stream: {id}");
                findings.add(line);
            }
            if is_success(request) {
                succeeded[n] = true;
                order.push((request.answered, n));
            }
        }
        for (message, _) in input.iter().zip(&succeeded).filter(|(_, done)| !**done) {
            if message.is_kept {
                findings.add(format!("{name}: never POSTed with success: {}", message.id));
            }
        }
        if self.evidence.may_drop() {
            return;
        }
        order.sort();
        let mut seen = HashSet::new();
        let first: Vec<_> = order
            .into_iter()
            .map(|(_, n)| n)
            .filter(|n| seen.insert(*n))
            .collect();
        for pair in first.windows(2).filter(|pair| pair[0] > pair[1]) {
            let [before, after] = [pair[0], pair[1]].map(|n| &input[n].id);
            findings.add(format!(
                "{name}: POSTed in the wrong order: {before} before {after}"
            ));
        }
    }

    /// Each message stands once in the relayed stream, in order, as it is, and after its success.
    fn check_relayed(&self, findings: &mut Findings) {
        let Self { name, evidence, .. } = self;
        let prefix = format!("relayed.{name}.");
        let successes = &evidence.answers[*name].successes;
        let mut times = vec![0; evidence.input.len()];
        let mut highest = None;
        let relayed = evidence.relayed.iter();
        for message in relayed.filter(|message| message.subject.starts_with(&prefix)) {
            let id = &message.id;
            let Some(n) = self.positions.get(&id[..]).copied() else {
                findings.add(format!("{name}: relayed, but not in the stream CMS: {id}"));
                continue;
            };
            times[n] += 1;
            let is_late = times[n] == 1 && highest.is_some_and(|highest| n < highest);
            // What a limit has dropped may be late, which those show that hear it.
            if is_late && !evidence.may_drop() {
                findings.add(format!("{name}: kept in the wrong order: {id}"));
            }
            highest = highest.max(Some(n));
            if successes.get(id).is_none_or(|at| message.at < *at) {
                findings.add(format!(
                    "{name}: relayed before its webhook succeeded: {id}"
                ));
            }
            let original = &evidence.input[n];
            let subject = original.subject.replacen("cms.cache.", &prefix, 1);
            let mut headers = original.headers.clone();
            headers.insert("Nats-Msg-Id", format!("{id}@relayed.{name}"));
            if message.subject != subject
                || message.payload != original.payload
                || message.headers != headers
            {
                findings.add(format!("{name}: relayed otherwise than it came: {id}"));
            }
        }
        for (message, times) in evidence.input.iter().zip(times) {
            // A stream forgets which ids it has had.
            let was_replayed = || self.replayed().any(|(_, it)| it.from <= message.sequence);
            let is_right = match times {
                0 => !message.is_kept,
                1 => true,
                _ => was_replayed(),
            };
            if !is_right {
                let id = &message.id;
                findings.add(format!("{name}: {times} times in the relayed stream: {id}"));
            }
        }
    }

    /// A subscriber of the relayed prefix, which hears each copy, hears nothing after what follows it, but where
    /// the server has handed it out again.
    fn check_heard(&self, findings: &mut Findings) {
        let (name, prefix) = (self.name, format!("relayed.{}.", self.name));
        let heard = self.evidence.heard.iter();
        let mut highest = 0;
        let mut used = HashSet::new();
        for Heard { at, id, .. } in heard.filter(|heard| heard.subject.starts_with(&prefix)) {
            let Some(n) = self.positions.get(&id[..]).copied() else {
                findings.add(format!("{name}: heard, but not in the stream CMS: {id}"));
                continue;
            };
            if n >= highest || self.may_go_back(*at, n, &mut used) {
                highest = n;
            } else {
                let before = &self.evidence.input[highest].id;
                findings.add(format!("{name}: heard late: {id} after {before}"));
            }
        }
    }

    /// Returns whether message `n` may have been relayed at this time, though a later one has been.
    fn may_go_back(&self, at: Instant, n: usize, used: &mut HashSet<usize>) -> bool {
        /// How long the message that a relay was working on at a replay may take.
        const MOMENT: Duration = Duration::from_secs(3);
        /// How long after its webhook has succeeded a message may be heard.
        const UNDER_WAY: Duration = Duration::from_secs(1);
        /// So young a message is taken for ours without a question.
        const YOUNG: Duration = Duration::from_millis(1500);
        let is_of_server = self.evidence.episodes.iter().any(|episode| {
            let over = episode.recovered.unwrap_or(episode.ended) + UNDER_WAY;
            episode.is_of_server() && (episode.began..over).contains(&at)
        });
        let Stored { sequence, id, .. } = &self.evidence.input[n];
        // What a relay has published as its network was cut arrives when the network is back.
        let was_held_up = self.evidence.episodes.iter().any(|episode| {
            let back = episode.ended..episode.recovered.unwrap_or(episode.ended) + UNDER_WAY;
            let as_cut = episode.began - YOUNG..episode.began + YOUNG;
            episode.holds_network() && back.contains(&at) && self.was_posted(id, as_cut)
        });
        // Messages of two relays at different servers of a cluster reach a subscriber by different routes.
        let has_routes = self.evidence.cast.servers > 1 && self.evidence.cast.relays > 1;
        let was_just_posted = || self.was_posted(id, at - YOUNG..at);
        // Once for each replay.
        let mut replayed = self.replayed();
        is_of_server
            || was_held_up
            || (has_routes || self.evidence.may_drop()) && was_just_posted()
            || replayed.any(|(index, replayed)| {
                let is_then = replayed.at <= at && replayed.from <= *sequence;
                is_then && (at - replayed.at < MOMENT || used.insert(index))
            })
    }

    /// Returns whether a request for this message began at such a time and succeeded.
    fn was_posted(&self, id: &str, times: Range<Instant>) -> bool {
        let mut requests = self.requests().filter(|request| id_in(request) == id);
        requests.any(|request| is_success(request) && times.contains(&request.at))
    }

    /// What was handed out again was POSTed again.
    fn check_replays(&self, findings: &mut Findings) {
        let mut latest = HashMap::new();
        for request in self.requests().filter(|request| is_success(request)) {
            latest.insert(id_in(request), request.at);
        }
        for (_, replayed) in self.replayed().filter(|(_, it)| it.is_confirmed) {
            let input = self.evidence.input.iter();
            let again = input.filter(|m| (replayed.from..=replayed.to).contains(&m.sequence));
            let is_missing = |message: &&Stored| {
                latest
                    .get(&message.id[..])
                    .is_none_or(|at| *at < replayed.at)
            };
            let missing = again.filter(is_missing).count();
            if missing > 0 {
                let (name, Replayed { from, to, .. }) = (self.name, replayed);
                findings.add(format!(
                    "{name}: handed out again from {from} to {to}, and {missing} not POSTed again"
                ));
            }
        }
    }

    /// Requests overlap only where one of their relays was struck, or where the webhook was, and the relay of
    /// the earlier one has stopped waiting for it and tried again.
    fn check_overlaps(&self, findings: &mut Findings) {
        /// How long the effects of a fault last: the ack wait, and what it takes to notice a dead connection.
        const AFTERMATH: Duration = Duration::from_secs(20);
        let mut open: Vec<&Received> = Vec::new();
        for request in self.requests() {
            open.retain(|earlier| earlier.ended.is_none_or(|ended| ended > request.at));
            for earlier in &open {
                findings.overlapping += 1;
                let relays = [relay_of(earlier), relay_of(request)];
                let was_tried_again = self.requests().any(|again| {
                    earlier.at < again.at
                        && again.at <= request.at
                        && id_in(again) == id_in(earlier)
                        && relay_of(again) == relays[0]
                });
                let is_explained = self.evidence.episodes.iter().any(|episode| {
                    let over = episode.recovered.unwrap_or(episode.ended) + AFTERMATH;
                    let is_then = episode.began <= request.at && over >= earlier.at;
                    let is_struck = |name: &&str| episode.struck.iter().any(|s| s == name);
                    let is_of_webhook = was_tried_again && episode.is_of_webhook();
                    is_then && (is_of_webhook || relays.iter().any(is_struck))
                });
                if !is_explained {
                    let ids = [earlier, request].map(id_in);
                    findings.add(format!(
                        "{}: two requests at a time by {relays:?}, and no fault to explain it: {ids:?}",
                        self.name
                    ));
                }
            }
            open.push(request);
        }
    }
}

fn is_success(request: &Received) -> bool {
    request.status == 200 && request.answered.is_some()
}

/// The id of the message that a request is about.
fn id_in(request: &Received) -> &str {
    request.header("webhook-id").unwrap_or_default()
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
