//! Streams behind the relay: what is republished, or given up, is kept there.

use std::time::{Duration, Instant};

use async_nats::{HeaderMap, jetstream::stream};
use tokio::time::sleep;

use crate::support::{Answer, NatsServer, PATIENCE, Relay, Webhook, next};

/// What a message may have been through before it comes: it told a stream what to do, came out of
/// another one, and was given up before.
const SHED: [(&str, &str); 18] = [
    ("Nats-Rollup", "sub"),
    ("Nats-TTL", "1h"),
    ("Nats-Stream-Source", "OTHER 1 > > cms.cache.x"),
    ("Nats-Expected-Stream", "OTHER"),
    ("Nats-Expected-Last-Subject-Sequence", "0"),
    ("Nats-Marker-Reason", "MaxAge"),
    ("Nats-Required-Api-Level", "0"),
    ("Nats-Stream", "OTHER"),
    ("Nats-Sequence", "1"),
    ("Nats-Subject", "cms.cache.x"),
    ("Nats-Time-Stamp", "2026-11-24T00:00:00Z"),
    ("Nats-Last-Sequence", "0"),
    ("Nats-Num-Pending", "0"),
    ("Nats-UpTo-Sequence", "1"),
    ("Relay-Error", "answered 422"),
    ("Relay-Status", "422"),
    ("Relay-Attempts", "1"),
    ("relay-error", "answered 422"),
];

/// The names of headers, but for the one by which a stream knows a duplicate.
fn names(headers: &HeaderMap) -> Vec<String> {
    let mut names: Vec<_> = headers
        .iter()
        .map(|(name, _)| name.to_string())
        .filter(|name| name != "Nats-Msg-Id")
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn what_a_stream_or_an_earlier_failure_left_in_the_headers_is_not_carried_over() {
    for durable in [false, true] {
        let nats = NatsServer::with_config("jetstream { store_dir: \"$DIR/jetstream\" }").await;
        nats.create_stream("RELAYED", "relayed.>", 1).await;
        let client = nats.client().await;
        let mut relayed = client.subscribe("relayed.>").await.unwrap();
        let mut failed = client.subscribe("failed.>").await.unwrap();
        let webhook = Webhook::start(|_, request| match request.text().as_str() {
            "bad" => Answer::full("410 Gone", "gone"),
            _ => Answer::OK,
        })
        .await;
        let changes = [("NATS_FAILED_SUBJECT_PREFIX", "failed.cache")];
        let (relay, headers) = if durable {
            // The stream gets its messages out of another one, and the server notes that on them. The
            // first few headers would be refused there.
            nats.create_stream("OTHER", "cms.cache.>", 1).await;
            let config = stream::Config {
                name: "CMS".to_owned(),
                sources: Some(vec![stream::Source {
                    name: "OTHER".to_owned(),
                    ..Default::default()
                }]),
                ..Default::default()
            };
            nats.jetstream().await.create_stream(config).await.unwrap();
            let relay = Relay::durable(&nats, &webhook, &changes).await;
            (relay, &SHED[5..])
        } else {
            let relay = Relay::listening(&nats, &webhook, &changes).await;
            (relay, &SHED[..])
        };
        for payload in ["good", "bad"] {
            let mut own = HeaderMap::new();
            for (name, value) in headers {
                own.insert(*name, *value);
            }
            own.insert("X-Other", "kept");
            let subject = format!("cms.cache.{payload}");
            client
                .publish_with_headers(subject, own, payload.into())
                .await
                .unwrap();
        }
        let good = next(&mut relayed).await;
        assert_eq!(good.payload, "good");
        assert_eq!(names(&good.headers.unwrap()), ["X-Other"], "{durable}");
        let bad = next(&mut failed).await;
        assert_eq!(bad.payload, "bad");
        let headers = bad.headers.unwrap();
        assert_eq!(
            names(&headers),
            ["Relay-Attempts", "Relay-Error", "Relay-Status", "X-Other"],
            "{durable}"
        );
        assert_eq!(headers.get("Relay-Status").unwrap().as_str(), "410");
        // Newer servers refuse what claims to come out of another stream.
        kept(&nats, "RELAYED", 1).await;
        drop(relay);
    }
}

/// Waits until a stream has so many messages.
async fn kept(nats: &NatsServer, stream: &str, count: u64) {
    let stream = nats.jetstream().await.get_stream(stream).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let messages = stream.get_info().await.unwrap().state.messages;
        if messages == count {
            return;
        }
        assert!(Instant::now() < deadline, "{messages}, not {count}");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn messages_of_a_stream_that_was_created_anew_are_no_duplicates() {
    let nats = NatsServer::with_stream().await;
    nats.create_stream("RELAYED", "relayed.>", 1).await;
    let jetstream = nats.jetstream().await;
    let webhook = Webhook::ok().await;
    for round in 1..=2 {
        let relay = Relay::durable(&nats, &webhook, &[]).await;
        jetstream
            .publish("cms.cache.x", "x".into())
            .await
            .unwrap()
            .await
            .unwrap();
        relay.logged(" -> ").await;
        kept(&nats, "RELAYED", round).await;
        relay.signal("TERM");
        relay.ended().await;
        jetstream.delete_stream("CMS").await.unwrap();
        nats.create_stream("CMS", "cms.cache.>", 1).await;
    }
    let requests = webhook.requests();
    assert_ne!(
        requests[0].header("webhook-id"),
        requests[1].header("webhook-id")
    );
}
