//! The publisher on one side of a relay and the listener on the other. Every message carries its
//! number, by which the order and the count are checked.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};

use crate::{nats::Connection, webhook::Webhook};

pub const PREFIX: &str = "cms.cache";
pub const RELAYED_PREFIX: &str = "relayed.cache";
const SUBJECT: &str = "cms.cache.pages.home";
const INBOX: &str = "_INBOX.load";

/// A relay that relays nothing for so long has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// How much of a burst is under way at the most: less than a relay or the server refuses to keep.
const BYTES_UNDER_WAY: u64 = 32 * 1024 * 1024;

/// How many messages may wait for the word that the stream has them.
const UNCONFIRMED: u64 = 500;

pub struct Load {
    publisher: Connection,
    listener: Connection,
    next: u64,
    durable: bool,
}

impl Load {
    pub fn new(url: &str, durable: bool) -> anyhow::Result<Self> {
        let mut publisher = Connection::open(url)?;
        publisher.set_patience(PATIENCE)?;
        publisher.subscribe(INBOX)?;
        let mut listener = Connection::open(url)?;
        listener.set_patience(PATIENCE)?;
        listener.subscribe(&format!("{RELAYED_PREFIX}.>"))?;
        Ok(Self {
            publisher,
            listener,
            next: 0,
            durable,
        })
    }

    /// Starts a relay by `start` and relays the first message, so that it is warm. Returns what
    /// `start` does, and how long it took until the relay was subscribed.
    pub fn first<T>(
        &mut self,
        webhook: &Webhook,
        start: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<(T, Duration)> {
        let payload = payload(self.next, 256);
        if self.durable {
            // A stream takes messages whether a relay listens or not. So the first one waits for the
            // relay, and is relayed when that has subscribed.
            self.publisher.publish(SUBJECT, INBOX, b"", &payload)?;
            self.publisher.flush()?;
            self.publisher.next()?;
            let begin = Instant::now();
            let started = start()?;
            self.relayed(webhook)?;
            return Ok((started, begin.elapsed()));
        }
        let begin = Instant::now();
        let started = start()?;
        loop {
            // "503, no responders" comes back before the end of the round trip if nobody listens.
            let asked = begin.elapsed();
            self.publisher.publish(SUBJECT, INBOX, b"", &payload)?;
            if self.publisher.round_trip()?.is_empty() {
                self.relayed(webhook)?;
                return Ok((started, asked));
            }
            ensure!(asked < PATIENCE, "it has not subscribed");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// The latencies of `count` messages, each published when the one before was relayed.
    pub fn one_by_one(&mut self, webhook: &Webhook, count: u64) -> anyhow::Result<Vec<Duration>> {
        let mut latencies = Vec::new();
        for _ in 0..count {
            let payload = payload(self.next, 256);
            let reply = if self.durable { INBOX } else { "" };
            let begin = Instant::now();
            self.publisher.publish(SUBJECT, reply, b"", &payload)?;
            self.publisher.flush()?;
            self.relayed(webhook)?;
            latencies.push(begin.elapsed());
            if self.durable {
                self.publisher.next()?;
            }
        }
        latencies.sort();
        Ok(latencies)
    }

    /// The time from the first message published to the last one relayed.
    pub fn burst(
        &mut self,
        webhook: &Webhook,
        count: u64,
        size: usize,
    ) -> anyhow::Result<Duration> {
        let first = self.next;
        let relayed = AtomicU64::new(0);
        let failed = AtomicBool::new(false);
        let begin = Instant::now();
        thread::scope(|scope| {
            let Self {
                publisher, durable, ..
            } = self;
            let (relayed, failed) = (&relayed, &failed);
            let durable = *durable;
            let published = scope.spawn(move || -> anyhow::Result<()> {
                let window = BYTES_UNDER_WAY / size as u64;
                let mut unconfirmed = 0;
                for n in 0..count {
                    while n - relayed.load(SeqCst) > window {
                        if failed.load(SeqCst) {
                            return Ok(());
                        }
                        publisher.flush()?;
                        thread::sleep(Duration::from_micros(200));
                    }
                    let payload = payload(first + n, size);
                    let reply = if durable { INBOX } else { "" };
                    publisher.publish(SUBJECT, reply, b"", &payload)?;
                    unconfirmed += u64::from(durable);
                    if unconfirmed > UNCONFIRMED {
                        publisher.flush()?;
                        publisher.next()?;
                        unconfirmed -= 1;
                    }
                }
                publisher.flush()?;
                for _ in 0..unconfirmed {
                    publisher.next()?;
                }
                Ok(())
            });
            let listened = (0..count).try_for_each(|n| {
                let outcome = next_relayed(&mut self.listener, webhook, first + n)
                    .with_context(|| format!("message {n} of {count}"));
                relayed.store(n + 1, SeqCst);
                failed.store(outcome.is_err(), SeqCst);
                outcome
            });
            let took = begin.elapsed();
            self.next += count;
            listened?;
            match published.join() {
                Ok(published) => published?,
                Err(_) => bail!("the publisher panicked"),
            }
            Ok(took)
        })
    }

    /// How many messages there have been.
    pub fn next(&self) -> u64 {
        self.next
    }

    fn relayed(&mut self, webhook: &Webhook) -> anyhow::Result<()> {
        next_relayed(&mut self.listener, webhook, self.next)?;
        self.next += 1;
        Ok(())
    }
}

/// Takes the next relayed message, which has to be number `expected` and answered by the webhook.
fn next_relayed(listener: &mut Connection, webhook: &Webhook, expected: u64) -> anyhow::Result<()> {
    let message = listener.next().context("nothing is relayed any more")?;
    let found = number(&message.payload)?;
    ensure!(found == expected, "{expected} is due, but {found} came");
    ensure!(
        webhook.next() > found,
        "{found} came before the webhook's answer"
    );
    Ok(())
}

fn payload(number: u64, size: usize) -> Vec<u8> {
    let mut payload = format!("{number:016x}").into_bytes();
    payload.resize(size, b'.');
    payload
}

/// The number of a message, from its payload.
pub fn number(payload: &[u8]) -> anyhow::Result<u64> {
    let digits = payload.get(..16).context("a payload without a number")?;
    Ok(u64::from_str_radix(std::str::from_utf8(digits)?, 16)?)
}
