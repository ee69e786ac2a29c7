//! Every way of stopping.

use std::time::{Duration, Instant};

use crate::support::{Answer, NatsServer, Relay, Scene, Webhook, next, usual};

#[tokio::test]
async fn each_signal_stops_an_idle_relay_at_once() {
    let nats = NatsServer::start().await;
    // HUP is what a terminal sends that is closed. The relay ignores it if these tests do, as under nohup.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|it| it.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let ignores_hangup = mask.is_some_and(|mask| mask & 1 == 1);
    let signals = ["TERM", "INT", "HUP"];
    for signal in &signals[..if ignores_hangup { 2 } else { 3 }] {
        let webhook = Webhook::ok().await;
        let relay = Relay::listening(&nats, &webhook, &[]).await;
        relay.signal(signal);
        let (code, log) = relay.ended().await;
        assert_eq!(code, Some(0), "{log:#?}");
        assert!(log.last().unwrap().contains("stopped"), "{log:#?}");
    }
}

#[tokio::test]
async fn a_signal_counts_from_the_very_start() {
    // What is said about each of these takes a moment.
    let unknown: Vec<_> = (0..1000).map(|n| format!("WEBHOOK_TIMEOUT_{n}")).collect();
    let usual = usual("nats://127.0.0.1:1", "http://127.0.0.1:1/");
    let unknown = unknown.iter().map(|name| (&name[..], "1s"));
    let relay = Relay::start(usual.into_iter().chain(unknown));
    relay.logged("nats-webhook-relay").await;
    relay.signal("TERM");
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(0), "{:?}", log.last());
    assert!(log.last().unwrap().contains("stopped"));
}

#[tokio::test]
async fn it_stops_also_while_it_waits_for_a_server() {
    let mut nats = NatsServer::start().await;
    nats.kill();
    let relay = Relay::between(&nats, "http://127.0.0.1:1/", &[]);
    relay.logged("cannot connect to NATS").await;
    relay.signal("TERM");
    assert_eq!(relay.ended().await.0, Some(0));
}

#[tokio::test]
async fn it_stops_at_once_also_after_it_has_lost_its_server() {
    let webhook = Webhook::ok().await;
    let changes = [("SHUTDOWN_TIMEOUT", "10m")];
    let mut scene = Scene::core(webhook, &changes).await;
    scene.nats.kill();
    scene.relay.logged("lost the connection to NATS").await;
    scene.relay.signal("TERM");
    assert_eq!(scene.relay.ended().await.0, Some(0));
}

#[tokio::test]
async fn what_has_arrived_is_relayed_retries_included_and_nothing_more_is_taken() {
    let webhook = Webhook::script([
        Answer::Status(503, Duration::from_millis(300)),
        Answer::ok_after(Duration::from_millis(100)),
    ])
    .await;
    let mut scene = Scene::core(webhook, &[]).await;
    for payload in ["first", "second", "third"] {
        scene.publish(payload).await;
    }
    // All three are with the relay, which works on the first one.
    scene.client.flush().await.unwrap();
    scene.webhook.received(1).await;
    scene.relay.signal("TERM");
    let line = scene
        .relay
        .logged("stopping: waiting up to 20s for cms.cache.x")
        .await;
    assert!(line.contains(" and 2 messages behind it ("), "{line}");
    scene.nats.publish("cms.cache.x", "too late").await;
    for payload in ["first", "second", "third"] {
        assert_eq!(scene.next().await.payload, payload);
    }
    let (code, log) = scene.relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
    assert_eq!(scene.webhook.count(), 4);
    assert!(log.last().unwrap().ends_with("] stopped"), "{log:#?}");
}

#[tokio::test]
async fn what_is_on_its_way_to_it_at_a_stop_is_relayed_as_well() {
    let mut scene = Scene::core(Webhook::ok().await, &[]).await;
    scene.relay.signal("STOP");
    for payload in ["first", "second", "third"] {
        scene.publish(payload).await;
    }
    // The server has sent all of them, and the relay has read none.
    scene.client.flush().await.unwrap();
    scene.relay.signal("TERM");
    scene.relay.signal("CONT");
    for payload in ["first", "second", "third"] {
        assert_eq!(scene.next().await.payload, payload);
    }
    assert_eq!(scene.relay.ended().await.0, Some(0));
}

#[tokio::test]
async fn what_still_waits_after_the_shutdown_timeout_is_counted() {
    let webhook = Webhook::script([Answer::Hang]).await;
    let scene = Scene::core(webhook, &[("SHUTDOWN_TIMEOUT", "300ms")]).await;
    for payload in ["first", "second", "third"] {
        scene.publish(payload).await;
    }
    scene.client.flush().await.unwrap();
    scene.webhook.received(1).await;
    scene.relay.signal("TERM");
    let (code, log) = scene.relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
    let left = "lost 2 messages not yet relayed";
    assert!(log.iter().any(|line| line.contains(left)), "{log:#?}");
}

#[tokio::test]
async fn a_replica_that_stops_leaves_what_follows_to_its_queue_group() {
    const COUNT: usize = 100;
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::start(|_, _| Answer::ok_after(Duration::from_millis(10))).await;
    let group = [("NATS_QUEUE_GROUP", "relays")];
    let stopping = Relay::listening(&nats, &webhook, &group).await;
    let staying = Relay::listening(&nats, &webhook, &group).await;
    let publish = async |numbers: std::ops::Range<usize>| {
        for n in numbers {
            client
                .publish("cms.cache.x", n.to_string().into())
                .await
                .unwrap();
        }
        client.flush().await.unwrap();
    };
    publish(0..COUNT).await;
    stopping.logged(" -> ").await;
    stopping.signal("TERM");
    // It is told to the server before this is logged, so what follows is not for it.
    stopping.logged("stopping: waiting").await;
    publish(COUNT..2 * COUNT).await;
    let mut numbers: Vec<usize> = Vec::new();
    for _ in 0..2 * COUNT {
        let payload = next(&mut relayed).await.payload;
        numbers.push(String::from_utf8_lossy(&payload).parse().unwrap());
    }
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..2 * COUNT), "each message once");
    let (code, log) = stopping.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
    assert!(
        staying.lines(" -> ").len() >= COUNT,
        "it got all that followed"
    );
}

#[tokio::test]
async fn a_hung_webhook_delays_a_stop_no_longer_than_the_shutdown_timeout() {
    let nats = NatsServer::start().await;
    let webhook = Webhook::script([Answer::Hang]).await;
    let relay = Relay::listening(&nats, &webhook, &[("SHUTDOWN_TIMEOUT", "300ms")]).await;
    nats.publish("cms.cache.x", "x").await;
    webhook.received(1).await;
    let start = Instant::now();
    relay.signal("TERM");
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
    assert!(start.elapsed() >= Duration::from_millis(300));
    let lost = "cms.cache.x is not relayed: not finished within SHUTDOWN_TIMEOUT";
    assert!(log.iter().any(|line| line.contains(lost)), "{log:#?}");
}

#[tokio::test]
async fn a_second_signal_stops_at_once() {
    let nats = NatsServer::start().await;
    let webhook = Webhook::script([Answer::Hang]).await;
    let relay = Relay::listening(&nats, &webhook, &[("SHUTDOWN_TIMEOUT", "10m")]).await;
    nats.publish("cms.cache.x", "x").await;
    webhook.received(1).await;
    relay.signal("INT");
    relay
        .logged("stopping: waiting up to 600s for cms.cache.x")
        .await;
    relay.signal("INT");
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
    let lost = "cms.cache.x is not relayed: stopped at once";
    assert!(log.iter().any(|line| line.contains(lost)), "{log:#?}");
}

#[tokio::test]
async fn it_outlives_its_terminal_where_it_was_told_to() {
    let nats = NatsServer::start().await;
    let webhook = Webhook::ok().await;
    let relay = Relay::under(&["nohup"], &nats, &webhook).await;
    relay.signal("HUP");
    // Had it not been ignored, it would stop before it has relayed this.
    nats.publish("cms.cache.x", "x").await;
    relay.logged(" -> ").await;
    relay.signal("TERM");
    assert_eq!(relay.ended().await.0, Some(0));
}

/// glibc's resolver reads the file that `RESOLV_HOST_CONF` names first; from a pipe that somebody has
/// open for writing and never writes to, it reads for ever.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[tokio::test]
async fn a_resolver_that_does_not_answer_delays_no_end() {
    use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt, path::Path, process::Command};

    use crate::support::until_ok;
    use rustix::fs::OFlags;

    let nats = NatsServer::start().await;
    let directory = tempfile::tempdir().unwrap();
    let pipe = |name: &str| {
        let path = directory.path().join(name);
        assert!(
            Command::new("mkfifo")
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        path
    };
    let asked = async |pipe: &Path| {
        let mut options = OpenOptions::new();
        // Without blocking, a pipe opens for writing only once somebody reads it.
        options
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32);
        until_ok("the resolver reads its pipe", async || options.open(pipe)).await
    };

    let resolver = pipe("a");
    let changes = [
        ("RESOLV_HOST_CONF", resolver.to_str().unwrap()),
        ("NATS_HOST", "nats://name.invalid"),
    ];
    let relay = Relay::between(&nats, "http://127.0.0.1:1/", &changes);
    let _writer = asked(&resolver).await;
    relay.signal("TERM");
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");

    let resolver = pipe("b");
    let changes = [
        ("RESOLV_HOST_CONF", resolver.to_str().unwrap()),
        ("SHUTDOWN_TIMEOUT", "10m"),
    ];
    let relay = Relay::between(&nats, "http://name.invalid/", &changes);
    relay.logged("listening on").await;
    nats.publish("cms.cache.x", "x").await;
    let _writer = asked(&resolver).await;
    relay.signal("TERM");
    relay
        .logged("stopping: waiting up to 600s for cms.cache.x")
        .await;
    relay.signal("TERM");
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
}
