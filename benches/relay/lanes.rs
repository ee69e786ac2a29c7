//! Four relays, between which NATS divides the messages, with a webhook that takes 10 ms.

use std::{
    collections::HashMap,
    ffi::OsString,
    sync::atomic::Ordering::SeqCst,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use crate::{
    load::{PREFIX, RELAYED_PREFIX, number, payload},
    nats::{Connection, TIMEOUT},
    process::Process,
    support::{Lanes, Mode, NatsServer},
    webhook::Webhook,
};

const LANES: usize = 4;
const PAGES: u64 = 100;
const INBOX: &str = "_INBOX.lanes";

/// Messages per second through all lanes together; those of each page must come in order.
pub fn rate(command: &[OsString], count: u64) -> anyhow::Result<f64> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nats = runtime.block_on(NatsServer::with_config(&Lanes::mappings(LANES)));
    let webhook = Webhook::start()?;
    webhook.delay_millis.store(10, SeqCst);
    let (url, directory) = (nats.url(), tempfile::tempdir()?);
    let mut publisher = Connection::open(&url)?;
    publisher.subscribe(INBOX)?;
    let mut listener = Connection::open(&url)?;
    listener.subscribe(&format!("{RELAYED_PREFIX}.>"))?;
    let mut relays = Vec::new();
    for lane in 0..LANES {
        let settings = Lanes::settings(Mode::Core, lane, LANES);
        let prefix = settings
            .iter()
            .find(|(name, _)| *name == "NATS_SUBJECT_PREFIX");
        let (_, prefix) = prefix.context("a lane has a prefix")?;
        let variables = [
            ("WEBHOOK_DESTINATION", webhook.url.as_str()),
            ("NATS_HOST", &url),
            ("NATS_SUBJECT_PREFIX", prefix),
            ("NATS_RELAYED_SUBJECT_PREFIX", RELAYED_PREFIX),
        ];
        let log = directory.path().join(format!("{prefix}.log"));
        relays.push(Process::start(command, &variables, &log)?);
        let begin = Instant::now();
        // "503, no responders" comes back as long as it does not listen.
        loop {
            publisher.publish(&format!("{prefix}.warm"), INBOX, b"", &payload(0, 256))?;
            if publisher.round_trip()? == 0 {
                break;
            }
            ensure!(begin.elapsed() < TIMEOUT, "it has not subscribed");
            thread::sleep(Duration::from_millis(1));
        }
        listener.next()?;
    }
    let begin = Instant::now();
    for n in 0..count {
        let subject = format!("{PREFIX}.pages.{}", n % PAGES);
        publisher.publish(&subject, "", b"", &payload(n, 256))?;
    }
    publisher.flush()?;
    let mut last = HashMap::new();
    for _ in 0..count {
        let message = listener.next()?;
        let number = number(&message.payload)?;
        let before = last.insert(message.subject, number);
        ensure!(before.is_none_or(|before| before < number), "out of order");
    }
    Ok(count as f64 / begin.elapsed().as_secs_f64())
}
