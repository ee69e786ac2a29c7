//! Durable mode through everything that takes its time. `cargo test --test it slow -- --include-ignored`
//! runs these alone.

use std::time::{Duration, Instant};

use async_nats::{ConnectOptions, Subscriber, jetstream, jetstream::stream::ClusterInfo};
use futures::StreamExt;

use crate::support::{
    Answer, NatsServer, PATIENCE, Received, Relay, Webhook, next, publish_all, until, until_ok,
};

/// A listener on the relayed messages that outlives servers.
async fn listen(url: &str) -> Subscriber {
    let options = ConnectOptions::new().retry_on_initial_connect();
    let client = options.connect(url).await.unwrap();
    let subscriber = client.subscribe("relayed.>").await.unwrap();
    client.flush().await.unwrap();
    subscriber
}

/// Reads relayed messages until `count` different ones came; their numbers in order of their first
/// delivery, and how many came again.
async fn read(relayed: &mut Subscriber, count: usize) -> (Vec<usize>, usize) {
    let (mut first, mut again) = (Vec::new(), 0);
    while first.len() < count {
        let number = String::from_utf8_lossy(&next(relayed).await.payload)
            .parse()
            .unwrap();
        if first.contains(&number) {
            again += 1;
        } else {
            first.push(number);
        }
    }
    (first, again)
}

fn numbers(webhook: &Webhook) -> Vec<usize> {
    webhook
        .bodies()
        .iter()
        .map(|body| body.parse().unwrap())
        .collect()
}

fn in_order(numbers: &[usize]) -> bool {
    numbers.iter().copied().eq(0..numbers.len())
}

#[tokio::test]
async fn kills_at_random_moments_lose_nothing_and_keep_the_order() {
    const COUNT: usize = 500;
    const KILLS: usize = 4;
    let nats = NatsServer::with_stream().await;
    let mut relayed = listen(&nats.url()).await;
    let webhook =
        Webhook::start(|_, _| Answer::ok_after(Duration::from_millis(fastrand::u64(0..4)))).await;
    publish_all(&nats.jetstream().await, 0..COUNT).await;
    let killing = async {
        for kill in 1..=KILLS {
            let mut relay = Relay::durable(&nats, &webhook, &[]).await;
            let enough = kill * COUNT / (KILLS + 1);
            until("some more were POSTed", async || webhook.count() >= enough).await;
            tokio::time::sleep(Duration::from_micros(fastrand::u64(0..5000))).await;
            relay.kill().await;
        }
        Relay::durable(&nats, &webhook, &[]).await
    };
    let (_relay, (first, again)) = tokio::join!(killing, read(&mut relayed, COUNT));
    assert!(in_order(&first), "{first:?}");
    assert!(again <= KILLS, "{again} duplicates of {KILLS} kills");
    let posted = numbers(&webhook);
    assert!(posted.is_sorted(), "{posted:?}");
    assert!(posted.len() <= COUNT + KILLS, "{} requests", posted.len());
    assert!(
        webhook
            .requests()
            .iter()
            .filter(|request| request.answered.is_some())
            .count()
            >= COUNT
    );
}

#[tokio::test]
async fn a_killed_replica_is_replaced_within_ten_seconds() {
    let nats = NatsServer::with_stream().await;
    let mut relayed = listen(&nats.url()).await;
    let webhook = Webhook::script([Answer::Hang]).await;
    let mut first = Relay::durable(&nats, &webhook, &[]).await;
    publish_all(&nats.jetstream().await, 0..10).await;
    webhook.received(1).await;
    let _second = Relay::durable(&nats, &webhook, &[]).await;
    first.kill().await;
    let killed = Instant::now();
    assert!(in_order(&read(&mut relayed, 1).await.0));
    assert!(
        killed.elapsed() < Duration::from_secs(10),
        "{:?}",
        killed.elapsed()
    );
    assert_eq!(read(&mut relayed, 9).await, ((1..10).collect(), 0));
}

#[tokio::test]
async fn a_server_that_is_killed_and_restarted_loses_nothing() {
    const COUNT: usize = 300;
    let mut nats = NatsServer::with_stream().await;
    let mut relayed = listen(&nats.url()).await;
    let webhook = Webhook::start(|_, _| Answer::ok_after(Duration::from_millis(2))).await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    publish_all(&nats.jetstream().await, 0..COUNT).await;
    for enough in [50, 150] {
        until("some more were POSTed", async || webhook.count() >= enough).await;
        nats.kill();
        relay.logged("lost the connection").await;
        nats.restart();
    }
    // What is published while the listener reconnects is lost to it, but not to the webhook. A
    // killed server may have forgotten the latest acks, and then hands out those messages again.
    until("all were POSTed", async || {
        numbers(&webhook).last() == Some(&(COUNT - 1))
    })
    .await;
    let mut first = Vec::new();
    for number in numbers(&webhook) {
        if !first.contains(&number) {
            first.push(number);
        }
    }
    assert!(in_order(&first) && first.len() == COUNT, "{first:?}");
    while next(&mut relayed).await.payload != (COUNT - 1).to_string() {}
}

#[tokio::test]
#[ignore = "starts a cluster; scripts/test --all runs it"]
async fn a_cluster_that_loses_the_consumer_s_leader_goes_on_within_fifteen_seconds() {
    const COUNT: usize = 200;
    let mut servers = NatsServer::cluster().await;
    servers[0].create_stream("CMS", "cms.cache.>", 3).await;
    let webhook = Webhook::start(|_, _| Answer::ok_after(Duration::from_millis(5))).await;
    let urls = servers
        .iter()
        .map(NatsServer::url)
        .collect::<Vec<_>>()
        .join(",");
    let relay = Relay::durable(&servers[0], &webhook, &[("NATS_HOST", &urls)]).await;
    let jetstream = servers[0].jetstream().await;
    let info = jetstream
        .get_stream("CMS")
        .await
        .unwrap()
        .consumer_info("relay")
        .await
        .unwrap();
    let leader = info.cluster.unwrap().leader.unwrap();
    let leader: usize = leader.trim_start_matches('n').parse().unwrap();
    let survivor = (leader + 1) % 3;
    let mut relayed = listen(&servers[survivor].url()).await;
    publish_all(&servers[survivor].jetstream().await, 0..COUNT).await;
    until("some were POSTed", async || webhook.count() >= 20).await;
    let before = webhook.count();
    servers[leader].kill();
    let killed = Instant::now();
    until("it goes on", async || webhook.count() > before + 5).await;
    assert!(
        killed.elapsed() < Duration::from_secs(15),
        "{:?}: {:#?}",
        killed.elapsed(),
        relay.log()
    );
    let (first, _) = read(&mut relayed, COUNT).await;
    assert!(in_order(&first), "{first:?}");
    let posted = numbers(&webhook);
    assert!(posted.is_sorted(), "{posted:?}");
}

#[tokio::test]
async fn a_webhook_that_takes_longer_than_the_ack_wait_gets_one_request() {
    let nats = NatsServer::with_stream().await;
    let mut relayed = listen(&nats.url()).await;
    let webhook = Webhook::script([Answer::ok_after(Duration::from_secs(8))]).await;
    let _relay = Relay::durable(&nats, &webhook, &[]).await;
    let _idle = Relay::durable(&nats, &webhook, &[]).await;
    publish_all(&nats.jetstream().await, 0..2).await;
    assert_eq!(read(&mut relayed, 2).await, (vec![0, 1], 0));
    assert_eq!(numbers(&webhook), [0, 1]);
}

#[tokio::test]
async fn a_message_republished_on_a_dead_connection_is_republished_again() {
    let mut nats = NatsServer::with_stream().await;
    nats.create_stream("RELAYED", "relayed.>", 1).await;
    let slow = Answer::ok_after(Duration::from_millis(500));
    let webhook = Webhook::script([Answer::OK, slow]).await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    let jetstream = nats.jetstream().await;
    // Whether NATS refuses a subject is known from then on, and not asked again.
    publish_all(&jetstream, 0..1).await;
    relay.logged(" -> relayed.cache.x").await;
    publish_all(&jetstream, 1..3).await;
    webhook.received(2).await;
    nats.freeze();
    // By then the message has been published, and its ack sent.
    relay.logged("JetStream is not ready").await;
    nats.kill();
    nats.restart();
    // The stream has a message of the same id only once.
    let jetstream = nats.jetstream().await;
    let consumer = until_ok("the stream is back", async || {
        let config = jetstream::consumer::pull::OrderedConfig::default();
        let stream = jetstream
            .get_stream("RELAYED")
            .await
            .map_err(|e| e.to_string())?;
        stream
            .create_consumer(config)
            .await
            .map_err(|e| e.to_string())
    })
    .await;
    let mut messages = consumer.messages().await.unwrap();
    for n in 0..3 {
        let message = messages.next().await.unwrap().unwrap();
        assert_eq!(message.payload, n.to_string());
    }
    relay.logged_times(" -> relayed.cache.x", 3).await;
}

#[tokio::test]
async fn a_new_message_with_the_sequence_of_a_lost_one_is_relayed() {
    let mut nats = NatsServer::with_stream().await;
    let mut relayed = listen(&nats.url()).await;
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    publish_all(&nats.jetstream().await, 0..1).await;
    assert_eq!(read(&mut relayed, 1).await, (vec![0], 0));
    relay.logged_times(" -> ", 1).await;
    nats.stop();
    // A backup, without what comes now.
    let store = nats.directory().join("jetstream");
    let backup = nats.directory().join("backup");
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        let copied = std::process::Command::new("cp")
            .arg("-r")
            .args([from, to])
            .status();
        assert!(copied.unwrap().success());
    };
    copy(&store, &backup);
    nats.restart();
    publish_all(&nats.jetstream().await, 1..2).await;
    relay.logged_times(" -> ", 2).await;
    nats.stop();
    std::fs::remove_dir_all(&store).unwrap();
    copy(&backup, &store);
    nats.restart();
    publish_all(&nats.jetstream().await, 2..3).await;
    until("the new message is POSTed", async || {
        numbers(&webhook).contains(&2)
    })
    .await;
}

#[tokio::test]
#[ignore = "takes a minute; scripts/test --all runs it"]
async fn an_outage_of_a_minute_holds_the_messages_and_their_order() {
    const OUTAGE: Duration = Duration::from_secs(60);
    let nats = NatsServer::with_stream().await;
    let mut relayed = listen(&nats.url()).await;
    let start = Instant::now();
    let webhook = Webhook::start(move |_, _| match start.elapsed() < OUTAGE {
        true => Answer::status(503),
        false => Answer::OK,
    })
    .await;
    // Two replicas, so that a message under way with one must not come to the other as well.
    let _first = Relay::durable(&nats, &webhook, &[]).await;
    let _second = Relay::durable(&nats, &webhook, &[]).await;
    publish_all(&nats.jetstream().await, 0..20).await;
    until("the outage is being retried", async || webhook.count() >= 5).await;
    tokio::time::sleep(OUTAGE.saturating_sub(start.elapsed())).await;
    assert_eq!(read(&mut relayed, 20).await, ((0..20).collect(), 0));
    let requests = webhook.requests();
    let good: Vec<_> = requests
        .iter()
        .filter(|r| r.status == 200)
        .map(Received::text)
        .collect();
    assert_eq!(good, (0..20).map(|n| n.to_string()).collect::<Vec<_>>());
    let bad: Vec<_> = requests.iter().filter(|r| r.status == 503).collect();
    assert!(
        bad.iter().all(|request| request.text() == "0"),
        "only the first one is tried"
    );
    // 250 ms doubling to 30 s, with jitter, by one replica: about 8 to 10 attempts in a minute.
    assert!((6..=12).contains(&bad.len()), "{} attempts", bad.len());
}

#[tokio::test]
async fn a_replica_that_was_suspended_abandons_what_another_has_relayed_meanwhile() {
    let nats = NatsServer::with_stream().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::script([Answer::ok_after(Duration::from_millis(500))]).await;
    let suspended = Relay::durable(&nats, &webhook, &[]).await;
    client.publish("cms.cache.x", "v1".into()).await.unwrap();
    webhook.received(1).await;
    suspended.signal("STOP");
    let _other = Relay::durable(&nats, &webhook, &[]).await;
    let more = ["v2", "v3", "v4", "v5", "v6"];
    for payload in more {
        client.publish("cms.cache.x", payload.into()).await.unwrap();
    }
    for payload in ["v1"].iter().chain(&more) {
        assert_eq!(next(&mut relayed).await.payload, *payload);
    }
    let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
    let info = stream.consumer_info("relay").await.unwrap();
    assert_eq!(
        info.delivered.consumer_sequence, 7,
        "only v1 was handed out to the suspended one"
    );
    suspended.signal("CONT");
    suspended.logged("cms.cache.x is abandoned").await;
    client.publish("cms.cache.x", "v7".into()).await.unwrap();
    assert_eq!(next(&mut relayed).await.payload, "v7", "v1 came once more");
}

#[tokio::test]
#[ignore = "starts a cluster; scripts/test --all runs it"]
async fn a_consumer_that_moves_to_another_server_is_not_taken_for_deleted() {
    let servers = NatsServer::cluster().await;
    servers[0].create_stream("CMS", "cms.cache.>", 3).await;
    let webhook = Webhook::ok().await;
    let urls: Vec<_> = servers.iter().map(NatsServer::url).collect();
    let relay = Relay::durable(&servers[0], &webhook, &[("NATS_HOST", &urls.join(","))]).await;
    let client = servers[0].client().await;
    let jetstream = servers[0].jetstream().await;
    let mut stream = jetstream.get_stream("CMS").await.unwrap();
    let leader_of = |cluster: Option<ClusterInfo>| cluster.and_then(|cluster| cluster.leader);
    let deadline = Instant::now() + PATIENCE;
    // The leader of a stream keeps it when it is scaled down, so the consumer must have another one,
    // and that one our request.
    let first = loop {
        assert!(Instant::now() < deadline, "{:#?}", relay.log());
        let keeper = leader_of(stream.info().await.unwrap().cluster.clone());
        let info = stream.consumer_info("relay").await.ok();
        let (leader, waiting) = info.map_or((None, 0), |info| {
            (leader_of(info.cluster), info.num_waiting)
        });
        match leader {
            Some(leader)
                if waiting > 0 && keeper.as_ref().is_some_and(|keeper| *keeper != leader) =>
            {
                break leader;
            }
            leader if leader.is_some() && leader == keeper => {
                let subject = "$JS.API.CONSUMER.LEADER.STEPDOWN.CMS.relay";
                client.request(subject, "".into()).await.unwrap();
            }
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let mut config = stream.info().await.unwrap().config.clone();
    config.num_replicas = 1;
    jetstream.update_stream(config).await.unwrap();
    loop {
        assert!(Instant::now() < deadline, "{:#?}", relay.log());
        let info = stream.consumer_info("relay").await.ok();
        if info
            .and_then(|info| leader_of(info.cluster))
            .is_some_and(|now| now != first)
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    servers[0].publish("cms.cache.1", "1").await;
    relay.logged(" -> relayed.cache.1").await;
    assert_eq!(relay.lines("was deleted").len(), 0);
}
