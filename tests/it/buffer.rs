//! What happens to messages that come while a webhook is slow.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    operating::{STATUS, address, metrics},
    support::{Answer, NatsServer, Relay, Scene, Webhook, until, until_ok},
};

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
    let open = Arc::new(AtomicBool::new(false));
    let gate = Arc::clone(&open);
    let webhook = Webhook::start(move |_, _| match gate.load(Ordering::Relaxed) {
        true => Answer::OK,
        false => Answer::status(503),
    })
    .await;
    let mut scene = Scene::core(webhook, &[("WEBHOOK_MAX_ATTEMPTS", "0")]).await;
    for n in 0..COUNT {
        let mut payload = n.to_string().into_bytes();
        payload.resize(PAYLOAD, b' ');
        scene.publish(payload).await;
    }
    scene.client.flush().await.unwrap();
    // One is being relayed, 64 MiB are waiting, the rest is dropped: the newest.
    let fit = 1 + 64 * 1024 * 1024 / (PAYLOAD + 1024);
    until("all drops are reported", async || {
        dropped(&scene.relay) >= COUNT - fit - 1
    })
    .await;
    let lines = scene.relay.lines("dropped ");
    assert!(lines.len() <= 60, "reported too often: {lines:#?}");
    assert!(lines[0].contains("NATS_STREAM"), "{lines:#?}");
    if cfg!(target_os = "linux") {
        let peak = memory(scene.relay.id()) / (1024 * 1024);
        assert!((64..120).contains(&peak), "{peak} MiB");
    }
    open.store(true, Ordering::Relaxed);
    let kept = COUNT - dropped(&scene.relay);
    for n in 0..kept {
        let message = scene.next().await;
        let number = String::from_utf8_lossy(&message.payload[..8])
            .trim()
            .to_owned();
        assert_eq!(number, n.to_string(), "the oldest are kept, in order");
    }
    scene.relay.signal("TERM");
    let (_, log) = scene.relay.ended().await;
    let relayed = log.iter().filter(|line| line.contains(" -> ")).count();
    assert_eq!(relayed, kept, "relayed and dropped make up all");
    let last = log.iter().rfind(|line| line.contains("dropped ")).unwrap();
    let total = format!(", {} since the start: ", COUNT - kept);
    assert!(last.contains(&total), "{last}");
}

#[tokio::test]
async fn a_flood_of_small_messages_bounds_memory_too_and_all_are_counted() {
    // Twice as many as may wait.
    const COUNT: usize = 400_000;
    // The server would cut off whoever takes them slowly.
    let nats = NatsServer::with_config("max_pending: 512MB\n").await;
    let client = nats.client().await;
    let webhook = Webhook::script([Answer::Hang]).await;
    let changes = [
        STATUS,
        ("SHUTDOWN_TIMEOUT", "0s"),
        ("WEBHOOK_TIMEOUT", "5m"),
    ];
    let relay = Relay::listening(&nats, &webhook, &changes).await;
    for _ in 0..COUNT {
        let payload = vec![b' '; 256].into();
        client.publish("cms.cache.x", payload).await.unwrap();
    }
    client.flush().await.unwrap();
    let address = address(&relay).await;
    let waiting = until_ok("all but the current one wait or are dropped", async || {
        let metrics = metrics(&address).await;
        let waiting = metrics["waiting_messages"];
        if waiting + metrics["messages_dropped_total"] == (COUNT - 1) as f64 {
            Ok(waiting as usize)
        } else {
            Err(metrics)
        }
    })
    .await;
    if cfg!(target_os = "linux") {
        let peak = memory(relay.id()) / (1024 * 1024);
        assert!((50..90).contains(&peak), "{peak} MiB");
    }
    relay.signal("TERM");
    let (_, log) = relay.ended().await;
    let left = format!("lost {waiting} messages not yet relayed");
    assert!(log.iter().any(|line| line.contains(&left)), "{log:#?}");
}
