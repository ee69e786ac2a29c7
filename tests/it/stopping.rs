//! Every way of stopping.

use std::time::{Duration, Instant};

use crate::support::{Answer, NatsServer, Relay, Webhook, next};

#[tokio::test]
async fn each_signal_stops_an_idle_relay_at_once() {
    let nats = NatsServer::start().await;
    // HUP is what a terminal sends that is closed.
    for signal in ["TERM", "INT", "HUP"] {
        let webhook = Webhook::ok().await;
        let relay = Relay::listening(&nats, &webhook, &[]).await;
        relay.signal(signal);
        let (code, log) = relay.ended().await;
        assert_eq!(code, Some(0), "{log:#?}");
        assert!(log.last().unwrap().contains("stopped"), "{log:#?}");
    }
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
async fn the_message_in_hand_is_finished_retries_included_and_no_other_is_taken() {
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::script([
        Answer::Status(503, Duration::from_millis(300)),
        Answer::ok_after(Duration::from_millis(100)),
    ])
    .await;
    let relay = Relay::listening(&nats, &webhook, &[]).await;
    for payload in ["first", "second", "third"] {
        client.publish("cms.cache.x", payload.into()).await.unwrap();
    }
    // All three are with the relay, which has the first one in hand.
    client.flush().await.unwrap();
    webhook.received(1).await;
    relay.signal("TERM");
    assert_eq!(next(&mut relayed).await.payload, "first");
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
    assert_eq!(webhook.count(), 2);
    let left = "stopped with 2 messages still waiting";
    assert!(log.iter().any(|line| line.contains(left)), "{log:#?}");
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
    relay.logged("stopping; cms.cache.x is in hand").await;
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
