//! A relay at a leaf node, with a JetStream of its own, of streams in the domain of the hub.

use async_nats::jetstream::{self, Context};
use futures::StreamExt;

use crate::{
    permissions,
    support::{
        Answer, Mode, NatsServer, Relay, Webhook, free_address, next, publish_all, until, until_ok,
    },
};

const DOMAIN: (&str, &str) = ("NATS_JS_DOMAIN", "hub");
const STREAMS: [(&str, &str); 3] = [
    ("NATS_RELAYED_STREAM", "RELAYED"),
    ("NATS_FAILED_SUBJECT_PREFIX", "failed.cache"),
    ("NATS_FAILED_STREAM", "FAILED"),
];

/// The hub with the streams; and the leaf node, whose user `relay` has these permissions, if any are given.
async fn hub_and_leaf(permissions: &str) -> (NatsServer, NatsServer) {
    let address = free_address();
    let hub = NatsServer::with_config(&format!(
        "server_name: hub
         jetstream {{ store_dir: \"$DIR/jetstream\", domain: hub }}
         leafnodes {{ listen: \"{address}\" }}"
    ))
    .await;
    for (stream, subject) in [
        ("CMS", "cms.cache.>"),
        ("RELAYED", "relayed.>"),
        ("FAILED", "failed.>"),
    ] {
        hub.create_stream(stream, subject, 1).await;
    }
    let leaf = NatsServer::with_config(&format!(
        "server_name: leaf
         jetstream {{ store_dir: \"$DIR/jetstream\", domain: leaf }}
         leafnodes {{ remotes: [ {{ url: \"nats-leaf://{address}\" }} ] }}
         authorization {{ users = [
            {{ user: admin, password: good }},
            {{ user: relay, password: good
               {permissions}
            }}
         ] }}
         no_auth_user: admin"
    ))
    .await;
    // The names and the subjects are the hub's: whoever asks the leaf itself finds the wrong ones.
    leaf.create_stream("CMS", "edge.>", 1).await;
    leaf.create_stream("EDGE", "relayed.>", 1).await;
    let in_hub = jetstream::with_domain(leaf.client().await, "hub");
    until_ok("the leaf has found its hub", async || {
        in_hub.get_stream("CMS").await
    })
    .await;
    (hub, leaf)
}

/// How many messages a stream has.
async fn count(jetstream: &Context, stream: &str) -> u64 {
    let stream = jetstream.get_stream(stream).await.unwrap();
    stream.cached_info().state.messages
}

/// Waits until a stream has so many messages.
async fn kept(server: &NatsServer, stream: &str, expected: u64) {
    let jetstream = server.jetstream().await;
    until(&format!("{stream} has {expected}"), async || {
        count(&jetstream, stream).await == expected
    })
    .await;
}

#[tokio::test]
async fn the_streams_are_those_of_the_hub() {
    let user = [("NATS_USER", "relay"), ("NATS_PASS", "good")];
    let inbox = [("NATS_INBOX_PREFIX", "_INBOX_relay")];
    for (mode, settings) in [
        (Mode::Durable, &[][..]),
        (Mode::Durable, &STREAMS[..]),
        (Mode::Core, &STREAMS[..]),
    ] {
        let permissions = permissions::block(mode, settings).join("\n");
        let (hub, leaf) = hub_and_leaf(&permissions.replace("$JS.API", "$JS.hub.API")).await;
        let mut heard = leaf.client().await.subscribe("relayed.>").await.unwrap();
        let webhook = Webhook::start(|_, request| match request.text().as_str() {
            "1" => Answer::status(422),
            _ => Answer::OK,
        })
        .await;
        let durable = match mode {
            Mode::Core => &[][..],
            Mode::Durable => &[("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay")],
        };
        let variables = [durable, &[DOMAIN], settings, &user, &inbox].concat();
        let (code, report) = Relay::check(&leaf, &webhook, &variables).await;
        assert_eq!(code, Some(0), "{report:#?}");
        let relay = Relay::listening(&leaf, &webhook, &variables).await;
        publish_all(&hub.jetstream().await, 0..4).await;
        for expected in ["0", "2", "3"] {
            assert_eq!(next(&mut heard).await.payload, expected);
        }
        relay.logged_times(" -> ", 3).await;
        kept(&hub, "RELAYED", 3).await;
        kept(&leaf, "EDGE", 3).await;
        kept(&hub, "FAILED", if settings.is_empty() { 0 } else { 1 }).await;
        let (code, report) = Relay::check(&leaf, &webhook, &variables).await;
        assert_eq!(code, Some(0), "{report:#?}");
        assert_eq!(webhook.count(), 4, "each once: {:#?}", relay.log());
        let complaints = relay.lines("WARN").len() + relay.lines("ERROR").len();
        assert_eq!(complaints, 1, "what is given up: {:#?}", relay.log());
        if mode == Mode::Durable {
            let stream = hub.jetstream().await.get_stream("CMS").await.unwrap();
            until("the hub has all acks", async || {
                let info = stream.consumer_info("relay").await.unwrap();
                info.ack_floor.stream_sequence == 4 && info.num_redelivered == 0
            })
            .await;
        }
        assert!(
            !leaf.log().contains("Violation") || mode == Mode::Core,
            "{}",
            leaf.log()
        );
    }
}

#[tokio::test]
async fn a_hub_that_goes_away_is_waited_for_and_nothing_is_lost() {
    let (mut hub, leaf) = hub_and_leaf("").await;
    let webhook = Webhook::ok().await;
    let durable = [("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay")];
    let variables = [&durable[..], &[DOMAIN], &STREAMS].concat();
    let relay = Relay::listening(&leaf, &webhook, &variables).await;
    publish_all(&hub.jetstream().await, 0..2).await;
    kept(&hub, "RELAYED", 2).await;
    hub.stop();
    relay
        .logged("JetStream is not ready: nobody answers for the domain hub")
        .await;
    hub.restart();
    publish_all(&hub.jetstream().await, 2..4).await;
    kept(&hub, "RELAYED", 4).await;
    assert_eq!(relay.lines("is not relayed"), [""; 0]);

    // It also waits for it at the start.
    hub.stop();
    let second = Relay::between(&leaf, &webhook.url(), &variables);
    second
        .logged("nobody answers for the domain hub; check NATS_JS_DOMAIN")
        .await;
    let (code, report) = Relay::check(&leaf, &webhook, &variables).await;
    assert_eq!(code, Some(1), "{report:#?}");
    let failed = report.iter().filter(|line| line.starts_with("FAILED"));
    assert!(
        failed.clone().count() == 3 && failed.clone().all(|line| line.contains("NATS_JS_DOMAIN")),
        "{report:#?}"
    );
    hub.restart();
    second.logged("listening on").await;
    let stream = hub.jetstream().await.get_stream("RELAYED").await.unwrap();
    let config = jetstream::consumer::pull::OrderedConfig::default();
    let consumer = stream.create_consumer(config).await.unwrap();
    let messages = consumer.messages().await.unwrap().take(4);
    let payloads: Vec<_> = messages
        .map(|message| message.unwrap().payload.clone())
        .collect()
        .await;
    assert_eq!(payloads, ["0", "1", "2", "3"]);
}

#[tokio::test]
async fn a_leaf_node_without_a_jetstream_of_its_own_points_to_the_domain() {
    let nats = NatsServer::start().await;
    for variables in [
        &[("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay")][..],
        &STREAMS[..1],
    ] {
        let relay = Relay::between(&nats, "http://127.0.0.1:1/", variables);
        let (code, log) = relay.ended().await;
        assert_eq!(code, Some(1), "{log:#?}");
        assert!(
            log.last().unwrap().contains("set NATS_JS_DOMAIN"),
            "{log:#?}"
        );
    }
}

#[tokio::test]
async fn a_hub_that_is_not_there_yet_is_asked_with_growing_waits() {
    let nats = NatsServer::start().await;
    for variables in [
        &[("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay"), DOMAIN][..],
        &[STREAMS[0], DOMAIN],
    ] {
        let relay = Relay::between(&nats, "http://127.0.0.1:1/", variables);
        let lines = relay
            .logged_times("nobody answers for the domain hub", 3)
            .await;
        let waits = lines.iter().map(|line| {
            let (_, wait) = line.split_once("; next attempt in ").unwrap();
            let milliseconds = wait
                .strip_suffix("ms")
                .map(|number| number.parse().unwrap());
            milliseconds.unwrap_or(f64::INFINITY)
        });
        // They double from 250 ms, and half of each is random.
        let waits: Vec<_> = waits.collect();
        assert!(waits[0] <= 250.0 && waits[2] >= 500.0, "{waits:?}");
    }
}
