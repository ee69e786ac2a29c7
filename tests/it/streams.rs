//! Streams behind the relay: what is republished, or given up, is kept there.

use std::time::Duration;

use async_nats::{
    ConnectOptions, HeaderMap,
    jetstream::{
        self, Context, consumer,
        message::StreamMessage,
        stream::{Config, DiscardPolicy, RawMessage, Source},
    },
};
use futures::StreamExt;
use tokio::time::sleep;

use crate::support::{
    Answer, Mode, NatsServer, Relay, Scene, Webhook, next, publish_all, until, until_ok,
};

/// The relayed stream, or both, named.
const RELAYED: (&str, &str) = ("NATS_RELAYED_STREAM", "RELAYED");
const FAILED: [(&str, &str); 2] = [
    ("NATS_FAILED_SUBJECT_PREFIX", "failed.cache"),
    ("NATS_FAILED_STREAM", "FAILED"),
];

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
    for mode in [Mode::Core, Mode::Durable] {
        let nats = NatsServer::with_config("jetstream { store_dir: \"$DIR/jetstream\" }").await;
        nats.create_stream("RELAYED", "relayed.>", 1).await;
        let webhook = Webhook::start(|_, request| match request.text().as_str() {
            "bad" => Answer::full("410 Gone", "gone"),
            _ => Answer::OK,
        })
        .await;
        let changes = [("NATS_FAILED_SUBJECT_PREFIX", "failed.cache")];
        let headers = if mode == Mode::Durable {
            // The stream gets its messages out of another one, and the server notes that on them. The
            // first few headers would be refused there.
            nats.create_stream("OTHER", "cms.cache.>", 1).await;
            let config = Config {
                name: "CMS".to_owned(),
                sources: Some(vec![Source {
                    name: "OTHER".to_owned(),
                    ..Default::default()
                }]),
                ..Default::default()
            };
            nats.jetstream().await.create_stream(config).await.unwrap();
            &SHED[5..]
        } else {
            &SHED[..]
        };
        let mut scene = Scene::on(nats, mode, webhook, &changes).await;
        let mut failed = scene.client.subscribe("failed.>").await.unwrap();
        for payload in ["good", "bad"] {
            let mut own = HeaderMap::new();
            for (name, value) in headers {
                own.insert(*name, *value);
            }
            own.insert("X-Other", "kept");
            let subject = format!("cms.cache.{payload}");
            scene
                .client
                .publish_with_headers(subject, own, payload.into())
                .await
                .unwrap();
        }
        let good = scene.next().await;
        assert_eq!(good.payload, "good");
        assert_eq!(names(&good.headers.unwrap()), ["X-Other"], "{mode:?}");
        let bad = next(&mut failed).await;
        assert_eq!(bad.payload, "bad");
        let headers = bad.headers.unwrap();
        assert_eq!(
            names(&headers),
            ["Relay-Attempts", "Relay-Error", "Relay-Status", "X-Other"],
            "{mode:?}"
        );
        assert_eq!(headers.get("Relay-Status").unwrap().as_str(), "410");
        // Newer servers refuse what claims to come out of another stream.
        kept(&scene.nats, "RELAYED", 1).await;
    }
}

/// Waits until a stream has so many messages.
async fn kept(nats: &NatsServer, stream: &str, count: u64) {
    let jetstream = nats.jetstream().await;
    let stream = jetstream.get_stream_no_info(stream).await.unwrap();
    until_ok(&format!("the stream has {count} messages"), async || {
        // In a cluster it may be without a leader.
        match stream.get_info().await.map(|info| info.state.messages) {
            Ok(messages) if messages == count => Ok(()),
            other => Err(other),
        }
    })
    .await;
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

/// A stream `RELAYED` that refuses what is more than `max_messages`, or longer than `max_message_size`.
fn small(max_messages: i64, max_message_size: i32) -> Config {
    Config {
        name: "RELAYED".to_owned(),
        subjects: vec!["relayed.>".to_owned()],
        discard: DiscardPolicy::New,
        max_messages,
        max_message_size,
        ..Default::default()
    }
}

/// The payloads of all that a stream has, once it has `count` messages.
async fn payloads(nats: &NatsServer, stream: &str, count: u64) -> Vec<String> {
    kept(nats, stream, count).await;
    let stream = nats.jetstream().await.get_stream(stream).await.unwrap();
    let config = consumer::pull::OrderedConfig::default();
    let consumer = stream.create_consumer(config).await.unwrap();
    let messages = consumer.messages().await.unwrap();
    messages
        .take(count.try_into().unwrap())
        .map(|message| String::from_utf8_lossy(&message.unwrap().payload).into_owned())
        .collect()
        .await
}

/// The message that the consumer `relay` counts as out is not acked.
async fn is_out(jetstream: &Context) -> bool {
    let stream = jetstream.get_stream("CMS").await.unwrap();
    stream.consumer_info("relay").await.unwrap().num_ack_pending == 1
}

#[tokio::test]
async fn a_full_stream_holds_messages_up_with_a_warning_until_it_has_room() {
    for mode in [Mode::Core, Mode::Durable] {
        let nats = NatsServer::with_stream().await;
        let jetstream = nats.jetstream().await;
        jetstream.create_stream(small(1, -1)).await.unwrap();
        let webhook = Webhook::ok().await;
        let scene = Scene::on(nats, mode, webhook, &[RELAYED]).await;
        publish_all(&jetstream, 0..3).await;
        // Longer than a message may be out without a sign of life.
        let warnings = scene
            .relay
            .logged_times("maximum messages exceeded", 6)
            .await;
        assert!(
            warnings[0].contains("WARN") && warnings[0].contains("the stream RELAYED has not"),
            "{warnings:?}"
        );
        assert!(warnings[5].contains(", attempt 6: "), "{warnings:?}");
        assert_eq!(
            scene.webhook.count(),
            2,
            "nothing is POSTed twice, nothing overtakes"
        );
        scene.relay.logged(" -> ").await;
        assert_eq!(scene.relay.lines(" -> ").len(), 1);
        if mode == Mode::Durable {
            assert!(is_out(&jetstream).await);
        }
        jetstream.update_stream(small(2, -1)).await.unwrap();
        scene.relay.logged_times(" -> ", 2).await;
        jetstream
            .get_stream("RELAYED")
            .await
            .unwrap()
            .purge()
            .await
            .unwrap();
        scene.relay.logged_times(" -> ", 3).await;
        assert_eq!(payloads(&scene.nats, "RELAYED", 1).await, ["2"]);
        assert_eq!(scene.webhook.count(), 3);
    }
}

#[tokio::test]
async fn what_a_stream_refuses_for_good_is_given_up_with_the_reason() {
    for mode in [Mode::Core, Mode::Durable] {
        let nats = NatsServer::with_stream().await;
        nats.create_stream("FAILED", "failed.>", 1).await;
        let jetstream = nats.jetstream().await;
        jetstream.create_stream(small(-1, 300)).await.unwrap();
        let webhook = Webhook::ok().await;
        let changes = [&[RELAYED][..], &FAILED].concat();
        let scene = Scene::on(nats, mode, webhook, &changes).await;
        for payload in ["large ".repeat(100), "small".to_owned()] {
            scene.publish(payload).await;
        }
        assert_eq!(payloads(&scene.nats, "RELAYED", 1).await, ["small"]);
        assert_eq!(
            payloads(&scene.nats, "FAILED", 1).await,
            ["large ".repeat(100)]
        );
        scene
            .relay
            .logged("the stream RELAYED refuses it: message size exceeds maximum allowed")
            .await;

        // Another stream has the subjects now, and the message waits for the one that is to have it.
        jetstream.delete_stream("RELAYED").await.unwrap();
        scene.nats.create_stream("OTHER", "relayed.>", 1).await;
        scene.publish("x").await;
        scene
            .relay
            .logged("not confirmed within 2s; only OTHER answered; next attempt")
            .await;
        kept(&scene.nats, "OTHER", 1).await;
        jetstream.delete_stream("OTHER").await.unwrap();
        jetstream.create_stream(small(-1, 300)).await.unwrap();
        kept(&scene.nats, "RELAYED", 1).await;
        kept(&scene.nats, "FAILED", 1).await;
    }
}

#[tokio::test]
async fn a_stream_that_goes_away_is_waited_for_and_a_stop_leaves_the_message_to_the_next_start() {
    let nats = NatsServer::with_stream().await;
    nats.create_stream("RELAYED", "relayed.>", 1).await;
    let jetstream = nats.jetstream().await;
    let webhook = Webhook::ok().await;
    let changes = [RELAYED, ("SHUTDOWN_TIMEOUT", "100ms")];
    let relay = Relay::durable(&nats, &webhook, &changes).await;
    jetstream.delete_stream("RELAYED").await.unwrap();
    publish_all(&jetstream, 0..2).await;
    relay.logged("no stream accepts it at the moment").await;
    // Whoever listens is no stream, but then nobody says that there is none.
    let client = nats.client().await;
    let _listener = client.subscribe("relayed.>").await.unwrap();
    relay
        .logged(": not confirmed within 2s; next attempt")
        .await;
    assert_eq!(relay.lines("is not relayed"), [""; 0]);
    relay.signal("TERM");
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
    nats.create_stream("RELAYED", "relayed.>", 1).await;
    let _relay = Relay::durable(&nats, &webhook, &changes).await;
    assert_eq!(payloads(&nats, "RELAYED", 2).await, ["0", "1"]);
}

#[tokio::test]
#[ignore = "starts a cluster; scripts/test --all runs it"]
async fn nothing_is_missing_in_the_streams_of_a_cluster_that_loses_their_leaders() {
    const COUNT: usize = 600;
    let mut servers = NatsServer::cluster().await;
    for (stream, subject) in [
        ("CMS", "cms.cache.>"),
        ("RELAYED", "relayed.>"),
        ("FAILED", "failed.>"),
    ] {
        servers[0].create_stream(stream, subject, 3).await;
    }
    // Every third is refused.
    let webhook = Webhook::start(|_, request| {
        let number: usize = request.text().parse().unwrap();
        Answer::Status(
            if number.is_multiple_of(3) { 422 } else { 200 },
            Duration::from_millis(3),
        )
    })
    .await;
    let urls: Vec<_> = servers.iter().map(NatsServer::url).collect();
    let urls = urls.join(",");
    let changes = [&[RELAYED, ("NATS_HOST", &urls)][..], &FAILED].concat();
    let relay = Relay::durable(&servers[0], &webhook, &changes).await;
    let jetstream = servers[0].jetstream().await;
    let leader = async |name: &str| -> Option<usize> {
        let stream = jetstream.get_stream_no_info(name).await.unwrap();
        let cluster = stream.get_info().await.ok()?.cluster?;
        cluster.leader?.trim_start_matches('n').parse().ok()
    };
    publish_all(&jetstream, 0..COUNT).await;
    for (enough, stream) in [
        (40, "RELAYED"),
        (80, "FAILED"),
        (120, "RELAYED"),
        (160, "FAILED"),
    ] {
        until("some more were POSTed", async || webhook.count() >= enough).await;
        let client = servers[0].client().await;
        let subject = format!("$JS.API.STREAM.LEADER.STEPDOWN.{stream}");
        client.request(subject, "".into()).await.unwrap();
    }
    // The relay keeps its own server.
    for (enough, stream) in [(250, "RELAYED"), (400, "FAILED")] {
        until("some more were POSTed", async || webhook.count() >= enough).await;
        let leader = until_ok("the stream has a leader", async || {
            leader(stream).await.ok_or(stream)
        })
        .await;
        servers[leader].kill();
        sleep(Duration::from_secs(1)).await;
        servers[leader].restart();
        servers[leader].client().await;
    }
    let is_failed = |n: &usize| n.is_multiple_of(3);
    let (failed, relayed): (Vec<_>, Vec<_>) = (0..COUNT).partition(is_failed);
    for (stream, expected) in [("RELAYED", relayed), ("FAILED", failed)] {
        let expected: Vec<_> = expected.iter().map(usize::to_string).collect();
        let count = expected.len().try_into().unwrap();
        let found = payloads(&servers[0], stream, count).await;
        assert_eq!(found, expected, "{stream}: {:#?}", relay.lines("WARN"));
    }
}

#[tokio::test]
async fn someone_else_s_answer_is_no_confirmation() {
    let nats = NatsServer::with_stream().await;
    let jetstream = nats.jetstream().await;
    jetstream.create_stream(small(1, -1)).await.unwrap();
    let client = nats.client().await;
    let mut service = client.subscribe("relayed.>").await.unwrap();
    let mut heard = client.subscribe("relayed.>").await.unwrap();
    let answering = client.clone();
    tokio::spawn(async move {
        while let Some(message) = service.next().await {
            let reply = message.reply.unwrap();
            answering.publish(reply, "understood".into()).await.unwrap();
        }
    });
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &[RELAYED]).await;
    publish_all(&jetstream, 0..2).await;
    relay.logged_times("maximum messages exceeded", 2).await;
    assert!(is_out(&jetstream).await);
    relay.logged(" -> ").await;
    assert_eq!(relay.lines(" -> ").len(), 1);
    // Nor is one that comes late, to what was published before.
    let replies = [next(&mut heard).await.reply, next(&mut heard).await.reply];
    assert!(
        replies[0].is_some() && replies[0] != replies[1],
        "{replies:?}"
    );
}

#[tokio::test]
async fn a_stream_that_cannot_keep_what_is_published_ends_it_and_check_says_so() {
    let webhook = Webhook::ok().await;
    let no_ack = Config {
        name: "MUTE".to_owned(),
        subjects: vec!["relayed.>".to_owned()],
        no_ack: true,
        ..Default::default()
    };
    let nats = NatsServer::with_stream().await;
    nats.create_stream("PART", "relayed.cache.pages.>", 1).await;
    nats.create_stream("FAILED", "failed.>", 1).await;
    let mute = NatsServer::with_stream().await;
    let jetstream = mute.jetstream().await;
    jetstream.create_stream(no_ack).await.unwrap();
    let full = NatsServer::with_stream().await;
    full.create_stream("SEALED", "relayed.>", 1).await;
    let jetstream = full.jetstream().await;
    let stream = jetstream.get_stream("SEALED").await.unwrap();
    let mut sealed = stream.cached_info().config.clone();
    sealed.sealed = true;
    jetstream.update_stream(sealed).await.unwrap();
    let plain = NatsServer::start().await;
    let durable = [("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay")];
    let relayed = |stream| vec![("NATS_RELAYED_STREAM", stream)];
    let failed = |stream| vec![FAILED[0], ("NATS_FAILED_STREAM", stream)];
    for (nats, changes, reason) in [
        (
            &nats,
            relayed("NONE"),
            "there is no stream NONE; create it, or set NATS_RELAYED_STREAM",
        ),
        (
            &nats,
            failed("NONE"),
            "there is no stream NONE; create it, or set NATS_FAILED_STREAM",
        ),
        (
            &nats,
            relayed("PART"),
            "none of the subjects of the stream PART, [\"relayed.cache.pages.>\"], covers relayed.cache.>",
        ),
        (
            &nats,
            failed("PART"),
            "none of the subjects of the stream PART, [\"relayed.cache.pages.>\"], covers failed.cache.>",
        ),
        (&mute, relayed("MUTE"), "the stream MUTE confirms nothing"),
        (
            &full,
            relayed("SEALED"),
            "the stream SEALED accepts no more messages",
        ),
        (&plain, relayed("RELAYED"), "JetStream is not enabled"),
    ] {
        for mode in [&[][..], &durable] {
            let changes = [&changes, mode].concat();
            let relay = Relay::between(nats, &webhook.url(), &changes);
            let (code, log) = relay.ended().await;
            assert_eq!(code, Some(1), "{log:#?}");
            assert!(log.last().unwrap().contains(reason), "{log:#?}");
            assert!(!log.concat().contains("listening on"), "{log:#?}");
            let (_, report) = Relay::check(nats, &webhook, &changes).await;
            let report = report.join("\n");
            let stream = changes[changes.len() - mode.len() - 1].1;
            let line = format!("FAILED  stream {stream}: {reason}");
            if !mode.is_empty() && std::ptr::eq(nats, &plain) {
                continue;
            }
            assert!(report.contains(&line), "{report}");
        }
    }
    let (_, report) = Relay::check(&nats, &webhook, &failed("FAILED")).await;
    let report = report.join("\n");
    assert!(
        report.contains("ok      stream FAILED: exists, and stores failed.cache.>"),
        "{report}"
    );
}

#[tokio::test]
async fn missing_permissions_for_a_stream_that_keeps_end_it_with_their_names() {
    let webhook = Webhook::ok().await;
    for (permissions, missing) in [
        (
            "publish: [\"relayed.>\"], subscribe: \">\"",
            "$JS.API.STREAM.INFO.RELAYED",
        ),
        (
            "publish: [\"relayed.>\", \"$JS.API.>\"], subscribe: \"cms.cache.>\"",
            "_INBOX",
        ),
        // All that it needs in core mode.
        (
            "publish: [\"relayed.>\", \"$JS.API.STREAM.INFO.RELAYED\"],
             subscribe: [\"cms.cache.>\", \"_INBOX.>\"]",
            "",
        ),
    ] {
        let nats = NatsServer::with_config(&format!(
            "jetstream {{ store_dir: \"$DIR/jetstream\" }}
             authorization {{ users = [
                {{ user: admin, password: good }},
                {{ user: relay, password: good, permissions: {{ {permissions} }} }}
             ] }}
             no_auth_user: admin"
        ))
        .await;
        nats.create_stream("RELAYED", "relayed.>", 1).await;
        let variables = [RELAYED, ("NATS_USER", "relay"), ("NATS_PASS", "good")];
        let relay = Relay::between(&nats, &webhook.url(), &variables);
        if missing.is_empty() {
            relay.logged("listening on").await;
            nats.publish("cms.cache.x", "x").await;
            assert_eq!(payloads(&nats, "RELAYED", 1).await, ["x"]);
            assert_eq!(relay.lines("ERROR"), [""; 0]);
            continue;
        }
        let (code, log) = relay.ended().await;
        assert_eq!(code, Some(1), "{log:#?}");
        assert!(log.last().unwrap().contains(missing), "{log:#?}");
    }
}

#[tokio::test]
async fn a_message_that_nats_does_not_let_be_kept_is_given_up() {
    let nats = NatsServer::with_config(
        r#"jetstream { store_dir: "$DIR/jetstream" }
           authorization { users = [
               { user: admin, password: good }
               { user: mute, password: good, permissions: { publish: { deny: "relayed.>" } } }
           ] }
           no_auth_user: admin"#,
    )
    .await;
    nats.create_stream("RELAYED", "relayed.>", 1).await;
    nats.create_stream("FAILED", "failed.>", 1).await;
    let webhook = Webhook::ok().await;
    let user = [RELAYED, ("NATS_USER", "mute"), ("NATS_PASS", "good")];
    let relay = Relay::listening(&nats, &webhook, &[&user[..], &FAILED].concat()).await;
    nats.publish("cms.cache.x", "x").await;
    relay.logged("cms.cache.x is not relayed: ").await;
    kept(&nats, "FAILED", 1).await;
}

#[tokio::test]
async fn one_stream_may_keep_all_prefixes() {
    const ALL: [&str; 3] = ["cms.cache.>", "relayed.cache.>", "failed.cache.>"];
    let config = Config {
        name: "CMS".to_owned(),
        subjects: ALL.map(str::to_owned).into(),
        ..Default::default()
    };
    let named = [
        ("NATS_RELAYED_STREAM", "CMS"),
        FAILED[0],
        ("NATS_FAILED_STREAM", "CMS"),
    ];
    for (mode, changes) in [
        (Mode::Core, &named[..]),
        (Mode::Durable, &named),
        (Mode::Durable, &[FAILED[0]]),
    ] {
        let nats = NatsServer::with_config("jetstream { store_dir: \"$DIR/jetstream\" }").await;
        let jetstream = nats.jetstream().await;
        jetstream.create_stream(config.clone()).await.unwrap();
        let webhook = Webhook::start(|_, request| match request.text().as_str() {
            "1" => Answer::status(422),
            _ => Answer::OK,
        })
        .await;
        let scene = Scene::on(nats, mode, webhook, changes).await;
        publish_all(&jetstream, 0..2).await;
        let mut found = payloads(&scene.nats, "CMS", 4).await;
        found.sort();
        assert_eq!(found, ["0", "0", "1", "1"]);
        let ids: Vec<_> = scene
            .webhook
            .requests()
            .iter()
            .map(|request| request.headers["webhook-id"].clone())
            .collect();
        assert_eq!(ids, ["0", "1"], "a webhook knows them by their own ids");
    }
}

#[tokio::test]
async fn core_mode_gives_a_message_the_id_that_the_webhook_was_told() {
    let nats = NatsServer::with_config("jetstream { store_dir: \"$DIR/jetstream\" }").await;
    nats.create_stream("RELAYED", "relayed.>", 1).await;
    let mut scene = Scene::on(nats, Mode::Core, Webhook::ok().await, &[RELAYED]).await;
    scene.nats.publish("cms.cache.x", "x").await;
    let headers = scene.next().await.headers.unwrap();
    let id = headers.get("Nats-Msg-Id").unwrap().as_str();
    let requests = scene.webhook.requests();
    let told = requests[0].header("webhook-id").unwrap();
    assert_eq!(id, format!("{told}@relayed.cache"));
    assert_eq!(headers.get("Nats-Expected-Stream"), None);
}

#[tokio::test]
async fn a_message_that_cannot_be_read_is_kept_with_its_place_as_its_id() {
    let nats = NatsServer::with_stream().await;
    nats.create_stream("FAILED", "failed.>", 1).await;
    let webhook = Webhook::ok().await;
    nats.publish_raw(b"cms.cache.raw", b"NATS/1.0\r\nno colon\r\n\r\n", b"raw")
        .await;
    let _relay = Relay::durable(&nats, &webhook, &FAILED).await;
    assert_eq!(payloads(&nats, "FAILED", 1).await, ["raw"]);
    let jetstream = nats.jetstream().await;
    let stored = async |stream: &str| {
        let request = format!("STREAM.MSG.GET.{stream}");
        let question = serde_json::json!({ "seq": 1 });
        let answer: serde_json::Value = jetstream.request(request, &question).await.unwrap();
        serde_json::from_value::<RawMessage>(answer["message"].clone()).unwrap()
    };
    let failed = StreamMessage::try_from(stored("FAILED").await).unwrap();
    let place = format!("CMS-1-{}", stored("CMS").await.time.unix_timestamp_nanos());
    let id = failed.headers.get("Nats-Msg-Id").unwrap();
    let expected = format!("{place}@failed.cache@");
    assert!(id.as_str().starts_with(&expected), "{id}");
}

#[tokio::test]
async fn two_environments_may_share_the_streams_before_and_behind_the_relay() {
    const COUNT: usize = 6;
    let nats = NatsServer::with_stream().await;
    nats.create_stream("RELAYED", "relayed.>", 1).await;
    nats.create_stream("FAILED", "failed.>", 1).await;
    let webhook = Webhook::start(|_, request| match request.text().as_str() {
        "0" => Answer::status(422),
        _ => Answer::OK,
    })
    .await;
    let mut relays = Vec::new();
    for (environment, relayed, failed, stream) in [
        ("production", "relayed.production", "failed.production", ""),
        ("preview", "relayed.preview", "failed.preview", "RELAYED"),
    ] {
        let changes = [
            ("NATS_CONSUMER", environment),
            ("NATS_RELAYED_SUBJECT_PREFIX", relayed),
            ("NATS_FAILED_SUBJECT_PREFIX", failed),
            ("NATS_RELAYED_STREAM", stream),
        ];
        relays.push(Relay::durable(&nats, &webhook, &changes).await);
    }
    publish_all(&nats.jetstream().await, 0..COUNT).await;
    for relay in &relays {
        relay.logged_times(" -> ", COUNT - 1).await;
    }
    kept(&nats, "RELAYED", 10).await;
    kept(&nats, "FAILED", 2).await;
}

#[tokio::test]
async fn a_stream_of_another_account_takes_what_is_relayed() {
    let nats = NatsServer::with_config(
        r#"jetstream { store_dir: "$DIR/jetstream" }
           accounts {
               CMS { jetstream: enabled, users: [ { user: cms, password: p } ]
                     exports: [ { stream: "relayed.>" } ] }
               WEB { jetstream: enabled, users: [ { user: web, password: p } ]
                     imports: [ { stream: { account: CMS, subject: "relayed.>" } } ] }
           }
           no_auth_user: cms"#,
    )
    .await;
    nats.create_stream("RELAYED", "relayed.>", 1).await;
    let web = ConnectOptions::with_user_and_password("web".to_owned(), "p".to_owned());
    let web = jetstream::new(nats.client_with(web).await);
    let config = Config {
        name: "COPY".to_owned(),
        subjects: vec!["relayed.>".to_owned()],
        ..Default::default()
    };
    let mut copy = web.create_stream(config).await.unwrap();
    let scene = Scene::on(nats, Mode::Core, Webhook::ok().await, &[RELAYED]).await;
    for n in 0..20 {
        scene.publish(n.to_string()).await;
    }
    kept(&scene.nats, "RELAYED", 20).await;
    until("the other account has all", async || {
        copy.info().await.unwrap().state.messages == 20
    })
    .await;
}

#[tokio::test]
async fn what_fails_again_after_a_replay_is_kept_again() {
    let nats = NatsServer::with_stream().await;
    nats.create_stream("FAILED", "failed.>", 1).await;
    let webhook = Webhook::start(|_, _| Answer::status(422)).await;
    let jetstream = nats.jetstream().await;
    publish_all(&jetstream, 0..2).await;
    for round in 1..=2 {
        let relay = Relay::durable(&nats, &webhook, &FAILED).await;
        kept(&nats, "FAILED", round * 2).await;
        relay.signal("TERM");
        relay.ended().await;
        let stream = jetstream.get_stream("CMS").await.unwrap();
        stream.delete_consumer("relay").await.unwrap();
    }
}

#[tokio::test]
async fn the_relay_s_own_headers_make_no_message_too_large_for_a_stream() {
    for (answer, stream) in [(Answer::OK, "RELAYED"), (Answer::status(422), "FAILED")] {
        let nats = NatsServer::with_stream().await;
        nats.create_stream("RELAYED", "relayed.>", 1).await;
        nats.create_stream("FAILED", "failed.>", 1).await;
        let webhook = Webhook::script([answer]).await;
        let changes = [
            ("NATS_RELAYED_STREAM", "RELAYED"),
            ("NATS_FAILED_SUBJECT_PREFIX", "failed.cache"),
            ("NATS_FAILED_STREAM", "FAILED"),
        ];
        let _relay = Relay::durable(&nats, &webhook, &changes).await;
        let mut headers = HeaderMap::new();
        headers.insert("a", "x".repeat(65_500));
        let client = nats.client().await;
        let payload = vec![b'x'; 1000].into();
        let sent = client.publish_with_headers("cms.cache.x", headers, payload);
        sent.await.unwrap();
        kept(&nats, stream, 1).await;
    }
}

#[tokio::test]
async fn an_id_in_lower_case_is_one_as_well() {
    for mode in [Mode::Core, Mode::Durable] {
        let nats = NatsServer::with_stream().await;
        let mut scene = Scene::on(nats, mode, Webhook::ok().await, &[]).await;
        let mut headers = HeaderMap::new();
        headers.insert("nats-msg-id", "edit-1");
        let sent = scene
            .client
            .publish_with_headers("cms.cache.x", headers, "x".into());
        sent.await.unwrap();
        let headers = scene.next().await.headers.unwrap();
        let ids: Vec<_> = headers
            .iter()
            .map(|(name, ids)| (name.to_string(), ids[0].to_string()))
            .collect();
        let expected = ("Nats-Msg-Id".to_owned(), "edit-1@relayed.cache".to_owned());
        assert_eq!(ids, [expected], "{mode:?}");
        let requests = scene.webhook.requests();
        assert_eq!(requests[0].header("webhook-id"), Some("edit-1"));
    }
}

#[tokio::test]
async fn a_message_of_a_stream_with_any_name_keeps_its_webhook_id() {
    let nats = NatsServer::with_config("jetstream { store_dir: \"$DIR/jetstream\" }").await;
    nats.create_stream("stück", "cms.cache.>", 1).await;
    let webhook = Webhook::script([Answer::ok_after(Duration::from_secs(60))]).await;
    let changes = [("NATS_STREAM", "stück")];
    let mut relay = Relay::durable(&nats, &webhook, &changes).await;
    nats.publish("cms.cache.x", "x").await;
    webhook.received(1).await;
    relay.kill().await;
    let _relay = Relay::durable(&nats, &webhook, &changes).await;
    let requests = webhook.received(2).await;
    let ids = [0, 1].map(|n: usize| requests[n].header("webhook-id").unwrap());
    assert_eq!(ids[0], ids[1]);
    assert!(ids[0].starts_with("st_ck-1-"), "{ids:?}");
}
