//! The publisher on one side of a relay and the listener on the other. Every message carries its
//! number, by which the order and the count are checked.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst, mpsc::sync_channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::{
    nats::{Connection, TIMEOUT},
    process::Process,
    webhook::Webhook,
};

pub const PREFIX: &str = "cms.cache";
pub const RELAYED_PREFIX: &str = "relayed.cache";
pub const STREAM: &str = "CMS";
pub const CONSUMER: &str = "relay";
const SUBJECT: &str = "cms.cache.pages.home";
const INBOX: &str = "_INBOX.load";

/// How much of a burst is under way at the most: less than a relay or the server refuses to keep,
/// and more than the publisher's connection keeps until it is flushed.
const BYTES_UNDER_WAY: usize = 32 * 1024 * 1024;

/// How many messages the publisher is ahead of what the stream has confirmed, at the most.
const UNCONFIRMED: u64 = 500;

pub struct Load {
    pub webhook: Arc<Webhook>,
    publisher: Connection,
    listener: Connection,
    /// The number of the next message.
    next: u64,
    durable: bool,
}

impl Load {
    pub fn new(url: &str, webhook: Arc<Webhook>, durable: bool) -> anyhow::Result<Self> {
        let mut publisher = Connection::open(url)?;
        publisher.subscribe(INBOX)?;
        let mut listener = Connection::open(url)?;
        listener.subscribe(&format!("{RELAYED_PREFIX}.>"))?;
        Ok(Self {
            webhook,
            publisher,
            listener,
            next: 0,
            durable,
        })
    }

    /// Starts a relay, and has it relay the first message, so that it is warm. Returns the relay,
    /// and how long it took until it was subscribed.
    pub fn first(
        &mut self,
        start: impl FnOnce() -> anyhow::Result<Process>,
    ) -> anyhow::Result<(Process, Duration)> {
        let payload = payload(self.next, 256);
        if self.durable {
            // A stream takes messages whether a relay listens or not. So the first one waits for
            // the relay, and is relayed when that has subscribed.
            self.publisher.publish(SUBJECT, INBOX, b"", &payload)?;
            self.publisher.flush()?;
            self.publisher.next()?;
            let begin = Instant::now();
            let started = start()?;
            self.relayed()?;
            return Ok((started, begin.elapsed()));
        }
        let begin = Instant::now();
        let started = start()?;
        loop {
            // "503, no responders" comes before the end of the round trip if nobody listens.
            let elapsed = begin.elapsed();
            self.publisher.publish(SUBJECT, INBOX, b"", &payload)?;
            if self.publisher.round_trip()? == 0 {
                self.relayed()?;
                return Ok((started, elapsed));
            }
            ensure!(elapsed < TIMEOUT, "it has not subscribed");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// The sorted latencies of `count` messages, each published when the one before was relayed.
    pub fn one_by_one(&mut self, count: u64) -> anyhow::Result<Vec<Duration>> {
        let mut latencies = Vec::new();
        for _ in 0..count {
            let payload = payload(self.next, 256);
            let begin = Instant::now();
            self.publisher
                .publish(SUBJECT, self.reply(), b"", &payload)?;
            self.publisher.flush()?;
            self.relayed()?;
            latencies.push(begin.elapsed());
            if self.durable {
                self.publisher.next()?;
            }
        }
        latencies.sort();
        Ok(latencies)
    }

    /// Messages per second, from the first one published to the last one relayed.
    pub fn burst(&mut self, count: u64, size: usize) -> anyhow::Result<f64> {
        let (first, durable, reply) = (self.next, self.durable, self.reply());
        let elapsed = thread::scope(|scope| {
            // This channel holds an item for each message under way. While it is full, the publisher
            // waits; when the listener fails, the publisher ends.
            let (under_way, relayed) = sync_channel(BYTES_UNDER_WAY / size);
            let begin = Instant::now();
            let publisher = &mut self.publisher;
            let published = scope.spawn(move || {
                for n in 0..count {
                    under_way.send(())?;
                    publisher.publish(SUBJECT, reply, b"", &payload(first + n, size))?;
                    if durable && n >= UNCONFIRMED {
                        publisher.flush()?;
                        publisher.next()?;
                    }
                }
                publisher.flush()?;
                for _ in 0..count.min(UNCONFIRMED) {
                    if durable {
                        publisher.next()?;
                    }
                }
                anyhow::Ok(())
            });
            for n in 0..count {
                next_relayed(&mut self.listener, &self.webhook, first + n)
                    .with_context(|| format!("message {n} of {count}"))?;
                relayed.recv().context("the publisher has failed")?;
            }
            let elapsed = begin.elapsed();
            published.join().expect("the publisher does not panic")?;
            anyhow::Ok(elapsed)
        })?;
        self.next += count;
        Ok(count as f64 / elapsed.as_secs_f64())
    }

    /// Checks that the webhook got each message once and in order, and in durable mode also that
    /// the relay acknowledges all of them.
    pub fn check(&mut self) -> anyhow::Result<()> {
        let out_of_order = self.webhook.out_of_order.load(SeqCst);
        let (answered, sent) = (self.webhook.next.load(SeqCst), self.next);
        ensure!(
            out_of_order == 0 && answered == sent,
            "the webhook got {out_of_order} messages out of order, and {answered} of {sent}"
        );
        if !self.durable {
            return Ok(());
        }
        let subject = format!("$JS.API.CONSUMER.INFO.{STREAM}.{CONSUMER}");
        let deadline = Instant::now() + TIMEOUT;
        loop {
            self.publisher.publish(&subject, INBOX, b"", b"")?;
            self.publisher.flush()?;
            let info: Value = serde_json::from_slice(&self.publisher.next()?.payload)?;
            let (pending, unacknowledged) = (&info["num_pending"], &info["num_ack_pending"]);
            if pending == 0 && unacknowledged == 0 {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{unacknowledged} messages are not acknowledged, and {pending} not taken"
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Where the stream confirms a message; core NATS confirms none.
    fn reply(&self) -> &'static str {
        if self.durable { INBOX } else { "" }
    }

    fn relayed(&mut self) -> anyhow::Result<()> {
        next_relayed(&mut self.listener, &self.webhook, self.next)?;
        self.next += 1;
        Ok(())
    }
}

/// Takes the next relayed message, which must have the number `due` and be answered by the webhook.
fn next_relayed(listener: &mut Connection, webhook: &Webhook, due: u64) -> anyhow::Result<()> {
    let message = listener.next().context("nothing is relayed any more")?;
    let found = number(&message.payload)?;
    ensure!(found == due, "{due} is due, but {found} came");
    ensure!(
        webhook.next.load(SeqCst) > found,
        "{found} came before the webhook's answer"
    );
    Ok(())
}

/// A payload of this size that tells its number.
pub fn payload(number: u64, size: usize) -> Vec<u8> {
    let mut payload = format!("{number:016x}").into_bytes();
    payload.resize(size, b'.');
    payload
}

/// The number of a message, from its payload.
pub fn number(payload: &[u8]) -> anyhow::Result<u64> {
    let digits = payload.get(..16).context("a payload without a number")?;
    Ok(u64::from_str_radix(std::str::from_utf8(digits)?, 16)?)
}
