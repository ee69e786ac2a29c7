//! What happens to messages that come while a webhook is slow.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures::StreamExt;

use crate::support::{Answer, NatsServer, Relay, Webhook, until};

const PAYLOAD: usize = 256 * 1024;

/// Resident memory of a process, in bytes.
fn memory(process: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap_or("0 kB");
    line.trim()
        .trim_end_matches(" kB")
        .parse::<usize>()
        .unwrap()
        * 1024
}

/// The sum of the numbers in lines like `dropped 17 messages`.
fn dropped(relay: &Relay) -> usize {
    let number = |line: &String| -> usize {
        let (_, rest) = line.split_once("dropped ").unwrap();
        rest.split(' ').next().unwrap().parse().unwrap()
    };
    relay.lines("dropped ").iter().map(number).sum()
}

#[tokio::test]
async fn a_hung_webhook_bounds_memory_and_every_drop_is_counted() {
    // 300 MB, which is more than four times what may wait.
    const COUNT: usize = 1200;
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let open = Arc::new(AtomicBool::new(false));
    let gate = Arc::clone(&open);
    let webhook = Webhook::start(move |_, _| match gate.load(Ordering::Relaxed) {
        true => Answer::OK,
        false => Answer::status(503),
    })
    .await;
    let relay = Relay::listening(&nats, &webhook, &[("WEBHOOK_MAX_ATTEMPTS", "0")]).await;
    for n in 0..COUNT {
        let mut payload = n.to_string().into_bytes();
        payload.resize(PAYLOAD, b' ');
        client.publish("cms.cache.x", payload.into()).await.unwrap();
    }
    client.flush().await.unwrap();
    // One is in hand, 64 MiB are waiting, the rest is dropped: the newest.
    let fit = 1 + 64 * 1024 * 1024 / (PAYLOAD + 1024);
    until("all drops are reported", || {
        dropped(&relay) >= COUNT - fit - 1
    })
    .await;
    let lines = relay.lines("dropped ");
    assert!(lines.len() <= 60, "reported too often: {lines:#?}");
    assert!(lines[0].contains("NATS_STREAM"), "{lines:#?}");
    if cfg!(target_os = "linux") {
        let peak = memory(relay.id()) / (1024 * 1024);
        assert!((64..120).contains(&peak), "{peak} MiB");
    }
    open.store(true, Ordering::Relaxed);
    let kept = COUNT - dropped(&relay);
    for n in 0..kept {
        let message = relayed.next().await.unwrap();
        let number = String::from_utf8_lossy(&message.payload[..8])
            .trim()
            .to_owned();
        assert_eq!(number, n.to_string(), "the oldest are kept, in order");
    }
    relay.signal("TERM");
    let (_, log) = relay.ended().await;
    let relayed = log.iter().filter(|line| line.contains(" -> ")).count();
    assert_eq!(relayed, kept, "relayed and dropped make up all");
}
