//! Durable mode: nothing is lost.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::{
    HeaderMap,
    jetstream::{
        consumer,
        stream::{self, Stream},
    },
};
use futures::{FutureExt, StreamExt};
use tokio::sync::Notify;

use crate::support::{Answer, Mode, NatsServer, PATIENCE, Relay, Scene, Webhook, next, until};

/// What puts a relay into durable mode.
const DURABLE: [(&str, &str); 2] = [("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay")];

/// Publishes numbered messages, each once the stream has it.
async fn publish(nats: &NatsServer, numbers: std::ops::Range<usize>) {
    let jetstream = nats.jetstream().await;
    for n in numbers {
        let ack = jetstream.publish(format!("cms.cache.{}", n % 7), n.to_string().into());
        ack.await.unwrap().await.unwrap();
    }
}

/// The next messages carry these numbers.
async fn expect(relayed: &mut async_nats::Subscriber, numbers: std::ops::Range<usize>) {
    for n in numbers {
        assert_eq!(next(relayed).await.payload, n.to_string());
    }
}

#[tokio::test]
async fn a_consumer_begins_where_it_is_told_and_the_log_and_check_say_what_waits() {
    for (policy, waiting, relayed_first) in [
        ("all", "20 messages", "0"),
        ("last_per_subject", "7 messages", "13"),
        ("new", "0 messages", "20"),
    ] {
        let nats = NatsServer::with_stream().await;
        let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
        publish(&nats, 0..20).await;
        let webhook = Webhook::ok().await;
        let relay = Relay::durable(&nats, &webhook, &[("NATS_DELIVER_POLICY", policy)]).await;
        let line = relay.logged("waiting for the consumer relay: ").await;
        assert!(line.ends_with(waiting), "{policy}: {line}");
        publish(&nats, 20..21).await;
        assert_eq!(next(&mut relayed).await.payload, relayed_first, "{policy}");
    }
}

#[tokio::test]
async fn check_says_what_is_stuck() {
    let nats = NatsServer::with_stream().await;
    let webhook = Webhook::start(|_, _| Answer::Hang).await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    publish(&nats, 0..3).await;
    webhook.received(1).await;
    let line = async || {
        let (code, lines) = Relay::check(&nats, &webhook, &DURABLE).await;
        assert_eq!(code, Some(0), "{lines:#?}");
        lines[2].clone()
    };
    let stuck = line().await;
    assert!(
        stuck.contains("; waiting: 3 messages, the oldest one for "),
        "{stuck}"
    );
    assert!(stuck.ends_with(", handed out 1 time"), "{stuck}");
    // Killed, so that nobody hands it back, and it is handed out again.
    relay.signal("KILL");
    relay.ended().await;
    let _relay = Relay::durable(&nats, &webhook, &[]).await;
    webhook.received(2).await;
    let stuck = line().await;
    assert!(stuck.ends_with(", handed out 2 times"), "{stuck}");
}

#[tokio::test]
async fn what_was_published_before_the_start_and_during_a_downtime_is_relayed_in_order() {
    let nats = NatsServer::with_stream().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::ok().await;
    publish(&nats, 0..20).await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    relay
        .logged("created the consumer relay on the stream CMS")
        .await;
    let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
    let created = stream.consumer_info("relay").await.unwrap().config;
    // By which its operator, and any other relay, knows whose it is.
    assert_eq!(
        created.description.as_deref(),
        Some("nats-webhook-relay republishes under relayed.cache")
    );
    expect(&mut relayed, 0..20).await;
    publish(&nats, 20..30).await;
    expect(&mut relayed, 20..30).await;
    relay.signal("TERM");
    assert_eq!(relay.ended().await.0, Some(0));
    publish(&nats, 30..50).await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    expect(&mut relayed, 30..50).await;
    assert_eq!(relay.lines("created the consumer"), [""; 0]);
    assert_eq!(webhook.count(), 50, "each was POSTed once");
}

#[tokio::test]
async fn two_replicas_keep_the_global_order_one_message_at_a_time() {
    const COUNT: usize = 200;
    let webhook =
        Webhook::start(|_, _| Answer::ok_after(Duration::from_millis(fastrand::u64(0..5)))).await;
    let mut scene = Scene::durable(webhook, &[]).await;
    let second = Relay::durable(&scene.nats, &scene.webhook, &[]).await;
    publish(&scene.nats, 0..COUNT).await;
    expect(&mut scene.relayed, 0..COUNT).await;
    let requests = scene.webhook.requests();
    assert_eq!(requests.len(), COUNT);
    for pair in requests.windows(2) {
        assert!(
            pair[0].answered.unwrap() <= pair[1].at,
            "two requests at a time"
        );
    }
    for relay in [scene.relay, second] {
        assert!(!relay.lines(" -> ").is_empty(), "both have their share");
    }
}

#[tokio::test]
async fn messages_are_known_by_their_place_in_the_stream() {
    let nats = NatsServer::with_stream().await;
    let client = nats.client().await;
    let jetstream = nats.jetstream().await;
    let mut stream = jetstream
        .get_stream("CMS")
        .await
        .unwrap()
        .info()
        .await
        .unwrap()
        .config
        .clone();
    stream.allow_rollup = true;
    jetstream.update_stream(stream).await.unwrap();
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::ok().await;
    let _relay = Relay::durable(&nats, &webhook, &[]).await;
    let mut own = HeaderMap::new();
    own.insert("Nats-Msg-Id", "edit-1");
    own.insert("Nats-Expected-Stream", "CMS");
    own.insert("Nats-Rollup", "sub");
    own.insert("X-Other", "kept");
    let publish = |headers| client.publish_with_headers("cms.cache.x", headers, "x".into());
    publish(HeaderMap::new()).await.unwrap();
    let first = next(&mut relayed).await.headers.unwrap();
    let stream = jetstream.get_stream("CMS").await.unwrap();
    let time = stream.get_raw_message(1).await.unwrap().time;
    // The time as well: a stream that is created anew gives away the same sequences again.
    let place = format!("CMS-1-{}", time.unix_timestamp_nanos());
    let id = first.get("Nats-Msg-Id").unwrap().as_str();
    assert_eq!(id, format!("{place}@relayed.cache"));
    publish(own).await.unwrap();
    let second = next(&mut relayed).await.headers.unwrap();
    let mut expected = HeaderMap::new();
    expected.insert("Nats-Msg-Id", "edit-1@relayed.cache");
    expected.insert("X-Other", "kept");
    assert_eq!(second, expected);
    let ids: Vec<_> = webhook
        .requests()
        .iter()
        .map(|r| r.headers["webhook-id"].clone())
        .collect();
    assert_eq!(ids, [&place[..], "edit-1"]);
}

#[tokio::test]
async fn a_message_of_the_largest_size_is_relayed_without_the_header_that_does_not_fit() {
    let mut scene = Scene::durable(Webhook::ok().await, &[]).await;
    let largest = vec![b'x'; scene.client.max_payload()];
    scene.publish(largest.clone()).await;
    let message = scene.next().await;
    assert!(message.payload == largest);
    assert_eq!(message.headers, None);
    scene.publish(largest[..largest.len() - 100].to_vec()).await;
    assert!(scene.next().await.headers.is_some());
}

#[tokio::test]
async fn a_poison_message_goes_to_the_failed_prefix_and_the_rest_goes_on() {
    let nats = NatsServer::with_stream().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let mut failed = client.subscribe("failed.>").await.unwrap();
    let mut acks = client.subscribe("$JS.ACK.CMS.relay.>").await.unwrap();
    let webhook = Webhook::start(|_, request| match request.text().as_str() {
        "1" => Answer::full("422 No", "no\r\nsuch tag"),
        _ => Answer::OK,
    })
    .await;
    let relay = Relay::durable(
        &nats,
        &webhook,
        &[("NATS_FAILED_SUBJECT_PREFIX", "failed.cache")],
    )
    .await;
    publish(&nats, 0..3).await;
    expect(&mut relayed, 0..1).await;
    expect(&mut relayed, 2..3).await;
    let message = next(&mut failed).await;
    assert_eq!(message.subject.as_str(), "failed.cache.1");
    assert_eq!(message.payload, "1");
    let headers = message.headers.unwrap();
    let header = |name: &str| headers.get(name).unwrap().as_str().to_owned();
    assert_eq!(
        header("Relay-Error"),
        "answered 422 Unprocessable Entity: no  such tag"
    );
    assert_eq!(header("Relay-Status"), "422");
    assert_eq!(header("Relay-Attempts"), "1");
    assert_eq!(next(&mut acks).await.payload, "+ACK");
    // Without the reason: not every server understands one.
    assert_eq!(next(&mut acks).await.payload, "+TERM");

    relay.signal("TERM");
    relay.ended().await;
    let _relay = Relay::durable(&nats, &webhook, &[]).await;
    publish(&nats, 3..4).await;
    expect(&mut relayed, 3..4).await;
    assert_eq!(
        webhook.bodies(),
        ["0", "1", "2", "3"],
        "a message given up does not come again"
    );
}

#[tokio::test]
async fn a_subject_that_becomes_too_long_for_the_server_holds_up_nothing() {
    let config = "max_control_line: 1024\njetstream { store_dir: \"$DIR/jetstream\" }";
    let nats = NatsServer::with_config(config).await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    let mut scene = Scene::on(nats, Mode::Durable, Webhook::ok().await, &[]).await;
    // Four bytes more, as the relayed prefix has them, are too many.
    let subject = format!("cms.cache.{}", "x".repeat(1010));
    scene.client.publish(subject, "long".into()).await.unwrap();
    scene.client.flush().await.unwrap();
    publish(&scene.nats, 0..1).await;
    expect(&mut scene.relayed, 0..1).await;
    scene.relay.logged("is not relayed: ").await;
    assert_eq!(scene.relay.lines("is not relayed: ").len(), 1);
    scene.relay.logged("raise max_control_line").await;
}

#[tokio::test]
async fn a_failed_message_is_never_larger_than_the_server_accepts() {
    let webhook = Webhook::start(|_, _| Answer::full("400 Bad", &"long ".repeat(100))).await;
    let changes = [("NATS_FAILED_SUBJECT_PREFIX", "failed.cache")];
    let scene = Scene::durable(webhook, &changes).await;
    let mut failed = scene.client.subscribe("failed.>").await.unwrap();
    for (room, error) in [(1000, Some(200..300)), (90, Some(20..21)), (0, None)] {
        let payload = vec![b'x'; scene.client.max_payload() - room];
        scene.publish(payload.clone()).await;
        let message = next(&mut failed).await;
        assert!(message.payload == payload);
        let length = message
            .headers
            .and_then(|headers| Some(headers.get("Relay-Error")?.as_str().len()));
        match error {
            Some(range) => assert!(range.contains(&length.unwrap()), "{room}: {length:?}"),
            None => assert_eq!(length, None),
        }
    }
}

#[tokio::test]
async fn a_stop_hands_the_unfinished_message_back_at_once() {
    let webhook = Webhook::script([Answer::Hang]).await;
    let mut scene = Scene::durable(webhook, &[("SHUTDOWN_TIMEOUT", "100ms")]).await;
    publish(&scene.nats, 0..3).await;
    scene.webhook.received(1).await;
    let _other = Relay::durable(&scene.nats, &scene.webhook, &[]).await;
    scene.relay.signal("TERM");
    let start = Instant::now();
    let (code, log) = scene.relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
    assert!(
        log.iter()
            .any(|line| line.contains("CMS-1-") && line.contains(" stays in the stream")),
        "{log:#?}"
    );
    expect(&mut scene.relayed, 0..3).await;
    // Without being handed back it would take the ack wait of 5 s.
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(scene.webhook.bodies(), ["0", "0", "1", "2"]);
}

#[tokio::test]
async fn a_stop_finishes_the_message_in_hand_and_leaves_the_rest_to_the_next_start() {
    let webhook = Webhook::script([Answer::ok_after(Duration::from_millis(300))]).await;
    let mut scene = Scene::durable(webhook, &[]).await;
    publish(&scene.nats, 0..3).await;
    scene.webhook.received(1).await;
    scene.relay.signal("TERM");
    let (code, log) = scene.relay.ended().await;
    assert_eq!((code, scene.webhook.count()), (Some(0), 1), "{log:#?}");
    let _relay = Relay::durable(&scene.nats, &scene.webhook, &[]).await;
    expect(&mut scene.relayed, 0..3).await;
    assert_eq!(scene.webhook.bodies(), ["0", "1", "2"]);
}

#[tokio::test]
async fn a_missing_stream_or_jetstream_ends_it() {
    let webhook = Webhook::ok().await;
    let durable = [("NATS_STREAM", "OTHER"), ("NATS_CONSUMER", "relay")];
    for (nats, reason) in [
        (NatsServer::with_stream().await, "there is no stream OTHER"),
        (NatsServer::start().await, "JetStream is not enabled"),
    ] {
        let (code, log) = Relay::between(&nats, &webhook.url(), &durable)
            .ended()
            .await;
        assert_eq!(code, Some(1), "{log:#?}");
        assert!(log.last().unwrap().contains(reason), "{log:#?}");
    }
}

#[tokio::test]
async fn a_stream_that_does_not_keep_the_prefix_is_refused_with_its_subjects() {
    let nats = NatsServer::with_config("jetstream { store_dir: \"$DIR/jetstream\" }").await;
    let config = stream::Config {
        name: "CMS".to_owned(),
        subjects: vec!["cms.pages.>".to_owned(), "news".to_owned()],
        ..Default::default()
    };
    nats.jetstream().await.create_stream(config).await.unwrap();
    let webhook = Webhook::ok().await;
    let is_refusal = |line: &str| {
        let words = ["does not keep", "cms.cache.>", "cms.pages.>", "news"];
        words.iter().all(|word| line.contains(word))
    };
    let (code, report) = Relay::check(&nats, &webhook, &DURABLE).await;
    assert_eq!(code, Some(1), "{report:#?}");
    let failed = |line: &&String| line.starts_with("FAILED") && is_refusal(line);
    assert_eq!(report.iter().filter(failed).count(), 1, "{report:#?}");
    let relay = Relay::between(&nats, &webhook.url(), &DURABLE);
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(1), "{log:#?}");
    assert!(is_refusal(log.last().unwrap()), "{log:#?}");
}

#[tokio::test]
async fn a_stream_that_gets_the_prefix_from_elsewhere_is_accepted() {
    let nats = NatsServer::with_config("jetstream { store_dir: \"$DIR/jetstream\" }").await;
    let client = nats.client().await;
    if !NatsServer::is_at_least((2, 10)) {
        eprintln!("not tested: it takes nats-server 2.10");
        return;
    }
    nats.create_stream("ORIGIN", "origin.>", 1).await;
    let config = |name: &str| stream::Config {
        name: name.to_owned(),
        ..Default::default()
    };
    let transform = stream::SubjectTransform {
        source: "origin.>".to_owned(),
        destination: "cms.cache.>".to_owned(),
    };
    let source = stream::Source {
        name: "ORIGIN".to_owned(),
        subject_transforms: vec![transform.clone()],
        ..Default::default()
    };
    let jetstream = nats.jetstream().await;
    for config in [
        stream::Config {
            sources: Some(vec![source.clone()]),
            ..config("SOURCED")
        },
        stream::Config {
            mirror: Some(source),
            ..config("MIRROR")
        },
        stream::Config {
            subjects: vec!["cms.in.>".to_owned()],
            subject_transform: Some(stream::SubjectTransform {
                source: "cms.in.>".to_owned(),
                ..transform
            }),
            ..config("MAPPED")
        },
    ] {
        let name = config.name.clone();
        jetstream.create_stream(config).await.unwrap();
        let webhook = Webhook::ok().await;
        let changes = [("NATS_STREAM", &name[..]), ("NATS_CONSUMER", "relay")];
        let _relay = Relay::listening(&nats, &webhook, &changes).await;
        for subject in ["origin.x", "cms.in.x"] {
            client.publish(subject, "x".into()).await.unwrap();
        }
        let request = webhook.received(1).await.remove(0);
        assert_eq!(request.header("x-nats-subject"), Some("cms.cache.x"));
    }
}

/// A consumer that a relay takes as it is.
fn good_consumer() -> consumer::pull::Config {
    consumer::pull::Config {
        durable_name: Some("relay".to_owned()),
        filter_subject: "cms.cache.>".to_owned(),
        max_ack_pending: 1,
        ack_wait: Duration::from_secs(7),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_consumer_that_costs_messages_or_time_is_warned_of() {
    let hour = Duration::from_secs(3600);
    let webhook = Webhook::ok().await;
    let good = good_consumer;
    let bad = [
        consumer::pull::Config {
            inactive_threshold: hour,
            ..good()
        },
        consumer::pull::Config {
            memory_storage: true,
            ..good()
        },
        consumer::pull::Config {
            ack_wait: Duration::from_secs(60),
            ..good()
        },
        consumer::pull::Config {
            replay_policy: consumer::ReplayPolicy::Original,
            ..good()
        },
    ];
    let words = [
        ["inactive_threshold", "nats consumer edit CMS relay"],
        ["mem_storage", "nats consumer rm CMS relay"],
        ["ack_wait", "nats consumer edit CMS relay"],
        ["replay_policy", "no faster than they were published"],
    ];
    for (config, words) in bad.into_iter().zip(words) {
        let nats = NatsServer::with_stream().await;
        let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
        stream.create_consumer(config).await.unwrap();
        warned_of(&nats, &webhook, words).await;
    }
    if !NatsServer::is_at_least((2, 10)) {
        eprintln!("the limits of a stream are not tested: it takes nats-server 2.10");
        return;
    }
    let nats = NatsServer::with_stream().await;
    let jetstream = nats.jetstream().await;
    let mut stream = jetstream.get_stream("CMS").await.unwrap();
    let mut config = stream.info().await.unwrap().config.clone();
    config.consumer_limits = Some(stream::ConsumerLimits {
        inactive_threshold: hour,
        max_ack_pending: 0,
    });
    jetstream.update_stream(config).await.unwrap();
    // The consumer that it creates inherits that.
    warned_of(&nats, &webhook, words[0]).await;
}

/// A relay in durable mode warns in these words, and so does `--check`.
async fn warned_of(nats: &NatsServer, webhook: &Webhook, words: [&str; 2]) {
    let is_warning = |line: &&String| words.iter().all(|word| line.contains(word));
    let relay = Relay::durable(nats, webhook, &[]).await;
    let warnings = relay.lines("WARN");
    assert_eq!(
        warnings.iter().filter(is_warning).count(),
        1,
        "{words:?}: {:#?}",
        relay.log()
    );
    let (_, report) = Relay::check(nats, webhook, &DURABLE).await;
    let warning = |line: &&String| line.starts_with("warning") && is_warning(line);
    assert_eq!(
        report.iter().filter(warning).count(),
        1,
        "{words:?}: {report:#?}"
    );
}

#[tokio::test]
async fn a_consumer_that_would_break_the_order_is_refused_and_tuning_is_left_alone() {
    let good = consumer::pull::Config {
        max_batch: 1,
        ..good_consumer()
    };
    let webhook = Webhook::ok().await;
    for (config, field) in [
        (
            consumer::pull::Config {
                max_ack_pending: 100,
                ..good.clone()
            },
            "max_ack_pending 100, but needs 1;",
        ),
        (
            consumer::pull::Config {
                filter_subject: "cms.cache.a".into(),
                ..good.clone()
            },
            "filter_subject \"cms.cache.a\"",
        ),
        (
            consumer::pull::Config {
                ack_policy: consumer::AckPolicy::All,
                ..good.clone()
            },
            "ack_policy \"all\"",
        ),
        (
            consumer::pull::Config {
                max_deliver: 3,
                ..good.clone()
            },
            "max_deliver 3,",
        ),
        (
            consumer::pull::Config {
                headers_only: true,
                ..good.clone()
            },
            "headers_only true, but needs none;",
        ),
        (
            consumer::pull::Config {
                ack_wait: Duration::from_secs(1),
                ..good.clone()
            },
            "ack_wait 1s, but needs 5s;",
        ),
        (good, ""),
    ] {
        let nats = NatsServer::with_stream().await;
        let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
        stream.create_consumer(config).await.unwrap();
        if field.is_empty() {
            let _relay = Relay::durable(&nats, &webhook, &[]).await;
            let info = stream.consumer_info("relay").await.unwrap();
            assert_eq!(info.config.ack_wait, Duration::from_secs(7));
            publish(&nats, 0..3).await;
            webhook.received(3).await;
            continue;
        }
        let (code, log) = Relay::between(&nats, &webhook.url(), &DURABLE)
            .ended()
            .await;
        assert_eq!(code, Some(1), "{log:#?}");
        assert!(log.last().unwrap().contains(field), "{log:#?}");
    }
}

#[tokio::test]
async fn a_consumer_that_the_stream_does_not_take_ends_it() {
    let nats = NatsServer::with_stream().await;
    let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
    let mut config = stream.cached_info().config.clone();
    config.name = "FULL".to_owned();
    config.subjects = vec!["full.>".to_owned()];
    config.max_consumers = 1;
    let stream = nats.jetstream().await.create_stream(config).await.unwrap();
    let only = consumer::pull::Config {
        durable_name: Some("other".to_owned()),
        ..Default::default()
    };
    stream.create_consumer(only).await.unwrap();
    let variables = [
        ("NATS_STREAM", "FULL"),
        ("NATS_CONSUMER", "relay"),
        ("NATS_SUBJECT_PREFIX", "full"),
    ];
    let relay = Relay::between(&nats, "http://127.0.0.1:1/", &variables);
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(1), "{log:#?}");
    let reason = "the stream FULL cannot be used: maximum consumers";
    assert!(log.last().unwrap().contains(reason), "{log:#?}");
}

#[tokio::test]
async fn a_message_costs_no_look_at_the_consumer_unless_it_was_out_for_long() {
    const COUNT: usize = 5;
    let release = Arc::new(Notify::new());
    let held = Arc::clone(&release);
    let webhook = Webhook::start(move |n, _| match n {
        COUNT => Answer::OkAfter(Arc::clone(&held)),
        _ => Answer::OK,
    })
    .await;
    let mut scene = Scene::durable(webhook, &[]).await;
    let mut looks = scene
        .client
        .subscribe("$JS.API.CONSUMER.INFO.CMS.relay")
        .await
        .unwrap();
    let mut acks = scene.client.subscribe("$JS.ACK.CMS.relay.>").await.unwrap();
    scene.client.flush().await.unwrap();
    publish(&scene.nats, 0..COUNT + 1).await;
    expect(&mut scene.relayed, 0..COUNT).await;
    while next(&mut acks).await.payload != "+WPI" {}
    assert!(looks.next().now_or_never().is_none());
    // As long as the server is told that a message is worked on, it is not verified either.
    while next(&mut acks).await.payload != "+WPI" {}
    assert!(looks.next().now_or_never().is_none());
    release.notify_one();
    // Another relay may have it by now.
    expect(&mut scene.relayed, COUNT..COUNT + 1).await;
    assert!(looks.next().now_or_never().is_some());
}

#[tokio::test]
async fn it_does_not_idle_in_silence_when_its_consumer_stream_or_jetstream_is_gone() {
    const ACCOUNTS: &str = "jetstream { store_dir: \"$DIR/jetstream\" }
        accounts { CMS { jetstream: enabled, users: [{ user: relay, password: good }] } }
        no_auth_user: relay";
    let webhook = Webhook::ok().await;
    for (what, reason) in [
        ("consumer", "the consumer relay was deleted"),
        ("stream", ""),
        ("jetstream", "JetStream"),
    ] {
        let nats = NatsServer::with_config(ACCOUNTS).await;
        nats.create_stream("CMS", "cms.cache.>", 1).await;
        let relay = Relay::durable(&nats, &webhook, &[]).await;
        let jetstream = nats.jetstream().await;
        match what {
            "consumer" => {
                jetstream
                    .delete_consumer_from_stream("relay", "CMS")
                    .await
                    .unwrap();
            }
            "stream" => {
                jetstream.delete_stream("CMS").await.unwrap();
            }
            _ => nats.reload(&ACCOUNTS.replace("jetstream: enabled, ", "")),
        }
        let (code, log) = relay.ended().await;
        assert_eq!(code, Some(1), "{what}: {log:#?}");
        assert!(log.last().unwrap().contains(reason), "{what}: {log:#?}");
    }
}

#[tokio::test]
async fn a_message_that_nats_does_not_let_be_published_is_given_up() {
    let nats = NatsServer::with_config(
        r#"jetstream { store_dir: "$DIR/jetstream" }
           authorization { users = [
               { user: admin, password: good }
               { user: mute, password: good, permissions: { publish: { deny: "relayed.cache.1" } } }
           ] }
           no_auth_user: admin"#,
    )
    .await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let mut failed = client.subscribe("failed.>").await.unwrap();
    let webhook = Webhook::ok().await;
    let variables = [
        ("NATS_USER", "mute"),
        ("NATS_PASS", "good"),
        ("NATS_FAILED_SUBJECT_PREFIX", "failed.cache"),
    ];
    let relay = Relay::durable(&nats, &webhook, &variables).await;
    publish(&nats, 0..3).await;
    expect(&mut relayed, 0..1).await;
    expect(&mut relayed, 2..3).await;
    assert_eq!(next(&mut failed).await.payload, "1");
    assert_eq!(relay.lines("cms.cache.1 -> "), [""; 0]);
    relay.logged("cms.cache.1 is not relayed: ").await;
}

#[tokio::test]
async fn missing_permissions_for_jetstream_end_it_with_their_names() {
    let webhook = Webhook::ok().await;
    for (permissions, missing) in [
        ("publish: [\"relayed.>\"], subscribe: \">\"", "$JS.API."),
        (
            "publish: [\"$JS.API.>\"], subscribe: \"cms.cache.>\"",
            "_INBOX",
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
        nats.create_stream("CMS", "cms.cache.>", 1).await;
        let variables = [
            ("NATS_STREAM", "CMS"),
            ("NATS_CONSUMER", "relay"),
            ("NATS_USER", "relay"),
            ("NATS_PASS", "good"),
        ];
        let (code, log) = Relay::between(&nats, &webhook.url(), &variables)
            .ended()
            .await;
        assert_eq!(code, Some(1), "{log:#?}");
        assert!(log.last().unwrap().contains(missing), "{log:#?}");
    }
}

#[tokio::test]
async fn subjects_that_cannot_be_read_hold_nothing_up() {
    for (subject, headers, fault) in [
        (
            "cms.cache.a\u{a0}b".as_bytes(),
            &b"NATS/1.0\r\nA: b\r\n\r\n"[..],
            "its subject has white space",
        ),
        (b"cms.cache.\xff", b"", "its subject is not UTF-8"),
    ] {
        let mut scene = Scene::durable(Webhook::ok().await, &[]).await;
        publish(&scene.nats, 0..1).await;
        scene.nats.publish_raw(subject, headers, b"raw").await;
        publish(&scene.nats, 1..3).await;
        expect(&mut scene.relayed, 0..3).await;
        let reason = format!("is not relayed: {fault}");
        scene.relay.logged(&reason).await;
    }
}

/// How many deliveries there have been; each time that a message is handed out again counts as well.
async fn delivered(stream: &Stream) -> u64 {
    let info = stream.consumer_info("relay").await.unwrap();
    info.delivered.consumer_sequence
}

#[tokio::test]
async fn a_message_that_comes_early_is_kept_once_until_it_is_its_turn() {
    // More than twice the ack wait.
    let webhook = Webhook::script([Answer::ok_after(Duration::from_secs(12))]).await;
    let mut scene = Scene::durable(webhook, &[]).await;
    publish(&scene.nats, 0..1).await;
    scene.webhook.received(1).await;
    publish(&scene.nats, 1..2).await;
    // What leaves the stream while it is worked on makes room for the next one.
    let jetstream = scene.nats.jetstream().await;
    let stream = jetstream.get_stream("CMS").await.unwrap();
    stream.delete_message(1).await.unwrap();
    until("the next one is handed out", async || {
        delivered(&stream).await >= 2
    })
    .await;
    expect(&mut scene.relayed, 0..1).await;
    assert_eq!(delivered(&stream).await, 2);
    expect(&mut scene.relayed, 1..2).await;
    assert_eq!(scene.webhook.bodies(), ["0", "1"]);
}

#[tokio::test]
async fn messages_that_come_early_are_kept_and_relayed_in_order() {
    let release = Arc::new(Notify::new());
    let webhook = Webhook::script([Answer::OkAfter(Arc::clone(&release))]).await;
    let mut scene = Scene::durable(webhook, &[]).await;
    let jetstream = scene.nats.jetstream().await;
    let stream = jetstream.get_stream("CMS").await.unwrap();
    for n in 0..2 {
        publish(&scene.nats, n..n + 1).await;
        until("it is handed out", async || {
            delivered(&stream).await > n as u64
        })
        .await;
        // What leaves the stream makes room for the next one.
        stream.delete_message(n as u64 + 1).await.unwrap();
    }
    publish(&scene.nats, 2..3).await;
    let mut acks = scene.client.subscribe("$JS.ACK.>").await.unwrap();
    // At each tick for all, the current one and those that wait.
    for _ in 0..6 {
        assert_eq!(next(&mut acks).await.payload, "+WPI");
    }
    assert_eq!(delivered(&stream).await, 3);
    release.notify_one();
    expect(&mut scene.relayed, 0..3).await;
}

#[tokio::test]
async fn a_consumer_that_is_edited_while_nothing_happens_ends_it() {
    let nats = NatsServer::with_stream().await;
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    edit_consumer(&nats, |config| config.max_ack_pending = 10).await;
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(1), "{log:#?}");
    assert!(log.last().unwrap().contains("max_ack_pending"), "{log:#?}");
}

#[tokio::test]
async fn messages_that_an_edited_consumer_hands_out_are_not_terminated() {
    let nats = NatsServer::with_config("jetstream { store_dir: \"$DIR/jetstream\" }").await;
    nats.create_stream("CMS", "cms.>", 1).await;
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    edit_consumer(&nats, |config| config.filter_subject = "cms.>".to_owned()).await;
    nats.publish("cms.other.x", "not ours").await;
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(1), "{log:#?}");
    assert!(log.last().unwrap().contains("filter_subject"), "{log:#?}");
    assert!(!log.concat().contains("is not relayed"), "{log:#?}");
    // It is there for whom it is meant.
    let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
    let consumer: consumer::PullConsumer = stream.get_consumer("relay").await.unwrap();
    let message = next_message(&consumer).await;
    assert_eq!(message.payload, "not ours");
}

/// Edits the consumer `relay` of the stream `CMS`, as its operator may.
async fn edit_consumer(nats: &NatsServer, edit: impl FnOnce(&mut consumer::pull::Config)) {
    let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
    let consumer: consumer::PullConsumer = stream.get_consumer("relay").await.unwrap();
    let mut config = consumer::pull::Config {
        durable_name: Some("relay".to_owned()),
        filter_subject: "cms.cache.>".to_owned(),
        max_ack_pending: 1,
        ack_wait: Duration::from_secs(5),
        description: consumer.cached_info().config.description.clone(),
        ..Default::default()
    };
    edit(&mut config);
    stream.create_consumer(config).await.unwrap();
}

/// The next message of a consumer, which has to come.
async fn next_message(consumer: &consumer::PullConsumer) -> async_nats::jetstream::Message {
    let mut messages = consumer.messages().await.unwrap();
    let message = tokio::time::timeout(PATIENCE, messages.next()).await;
    message.expect("a message comes in time").unwrap().unwrap()
}

#[tokio::test]
async fn headers_that_cannot_be_read_hold_nothing_up() {
    for headers in [
        &b"NATS/1.0\r\nno colon\r\n\r\n"[..],
        b"NATS/1.0\r\nA: \xff\r\n\r\n",
        // The client does not survive this one; the relay does.
        b"NATS/1.0\r\nA: b\rc\r\n\r\n",
        b"NATS/1.0\r\nA: b\r\r\n c\r\n\r\n",
        // This one is readable, and must not be taken for a word of the server.
        b"NATS/1.0 408 Request Timeout\r\n\r\n",
    ] {
        let nats = NatsServer::with_stream().await;
        let client = nats.client().await;
        let mut relayed = client.subscribe("relayed.>").await.unwrap();
        let mut failed = client.subscribe("failed.>").await.unwrap();
        let webhook = Webhook::ok().await;
        publish(&nats, 0..1).await;
        nats.publish_raw(b"cms.cache.raw", headers, b"raw").await;
        publish(&nats, 1..3).await;
        let changes = [("NATS_FAILED_SUBJECT_PREFIX", "failed")];
        let relay = Relay::durable(&nats, &webhook, &changes).await;
        expect(&mut relayed, 0..1).await;
        if headers.starts_with(b"NATS/1.0 408") {
            assert_eq!(next(&mut relayed).await.payload, "raw");
        } else {
            let message = next(&mut failed).await;
            assert_eq!(
                (&message.subject[..], &message.payload[..]),
                ("failed.raw", &b"raw"[..])
            );
            let headers = message.headers.unwrap();
            assert_eq!(
                headers.get("Relay-Error").unwrap().as_str(),
                "its headers cannot be read"
            );
        }
        expect(&mut relayed, 1..3).await;
        // That is logged once NATS has confirmed the ack.
        relay.logged("cms.cache.2 -> ").await;
    }
}

#[tokio::test]
async fn a_message_that_cannot_be_read_costs_one_connection_while_another_one_is_worked_on() {
    let release = Arc::new(Notify::new());
    let webhook = Webhook::script([Answer::OkAfter(Arc::clone(&release))]).await;
    let mut scene = Scene::durable(webhook, &[]).await;
    let mut acks = scene.client.subscribe("$JS.ACK.CMS.relay.>").await.unwrap();
    scene.client.flush().await.unwrap();
    publish(&scene.nats, 0..1).await;
    scene.webhook.received(1).await;
    let headers = b"NATS/1.0\r\nno colon\r\n\r\n";
    scene
        .nats
        .publish_raw(b"cms.cache.raw", headers, b"raw")
        .await;
    // What leaves the stream makes room for the next one.
    let stream = scene
        .nats
        .jetstream()
        .await
        .get_stream("CMS")
        .await
        .unwrap();
    stream.delete_message(1).await.unwrap();
    scene.relay.logged_times("connected to NATS", 2).await;
    // For longer than the ack wait.
    for _ in 0..14 {
        assert_eq!(next(&mut acks).await.payload, "+WPI");
    }
    let connections = scene.relay.lines("connected to NATS").len();
    assert_eq!(connections, 2, "{:#?}", scene.relay.log());
    publish(&scene.nats, 1..2).await;
    release.notify_one();
    scene.relay.logged("cms.cache.raw is not relayed").await;
    while scene.next().await.payload != "1" {}
    let connections = scene.relay.lines("connected to NATS").len();
    assert_eq!(connections, 2, "{:#?}", scene.relay.log());
}

#[tokio::test]
async fn a_missing_permission_to_look_at_messages_is_said_at_the_start_and_whenever_it_matters() {
    let nats = NatsServer::with_config(
        r#"jetstream { store_dir: "$DIR/jetstream" }
           authorization { users = [
               { user: admin, password: good }
               { user: blind, password: good, permissions: {
                   publish: { deny: "$JS.API.STREAM.MSG.GET.CMS" } } }
           ] }
           no_auth_user: admin"#,
    )
    .await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    let webhook = Webhook::ok().await;
    let variables = [("NATS_USER", "blind"), ("NATS_PASS", "good")];
    let relay = Relay::durable(&nats, &webhook, &variables).await;
    let missing = "no permission to publish on $JS.API.STREAM.MSG.GET.CMS, by which the relay finds a \
                   message that no client can read";
    relay.logged(missing).await;
    assert_eq!(relay.lines(missing).len(), 1, "{:#?}", relay.log());
    nats.publish_raw(b"cms.cache.raw", b"NATS/1.0\r\nno colon\r\n\r\n", b"raw")
        .await;
    relay.logged_times(missing, 3).await;
}

#[tokio::test]
async fn pull_requests_that_are_refused_again_and_again_are_reported() {
    let nats = NatsServer::with_stream().await;
    let jetstream = nats.jetstream().await;
    let stream = jetstream.get_stream("CMS").await.unwrap();
    let config = consumer::pull::Config {
        durable_name: Some("relay".to_owned()),
        filter_subject: "cms.cache.>".to_owned(),
        max_ack_pending: 1,
        max_waiting: 1,
        ..Default::default()
    };
    let consumer = stream.create_consumer(config).await.unwrap();
    // Another client takes the one place that there is for a request.
    let mut other = consumer
        .batch()
        .max_messages(1)
        .expires(Duration::from_secs(60))
        .messages()
        .await
        .unwrap();
    let waiting = tokio::spawn(async move { futures::StreamExt::next(&mut other).await.is_some() });
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    let line = relay
        .logged("no messages can arrive: the NATS server ")
        .await;
    assert!(
        // Newer servers say nothing.
        line.contains("WARN")
            && (line.contains("Exceeded MaxWaiting") || line.contains("max_waiting")),
        "{line}"
    );
    assert_eq!(
        relay.lines("no messages can arrive").len(),
        1,
        "seldom: {:#?}",
        relay.log()
    );
    waiting.abort();
}

#[tokio::test]
async fn messages_at_the_pace_at_which_they_came_are_told_from_requests_that_nobody_answers() {
    let nats = NatsServer::with_stream().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    publish(&nats, 0..1).await;
    // Longer than two requests go without an answer.
    tokio::time::sleep(Duration::from_secs(12)).await;
    publish(&nats, 1..2).await;
    let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
    let original = consumer::pull::Config {
        replay_policy: consumer::ReplayPolicy::Original,
        ..good_consumer()
    };
    stream.create_consumer(original).await.unwrap();
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    relay.logged("replay_policy").await;
    expect(&mut relayed, 0..2).await;
    assert_eq!(relay.lines("max_waiting"), [""; 0], "{:#?}", relay.log());
}

#[tokio::test]
async fn a_paused_consumer_is_said() {
    if !NatsServer::is_at_least((2, 11)) {
        eprintln!("a pause is not tested: it takes nats-server 2.11");
        return;
    }
    let nats = NatsServer::with_stream().await;
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    let jetstream = nats.jetstream().await;
    let stream = jetstream.get_stream("CMS").await.unwrap();
    let end = stream.cached_info().created + Duration::from_secs(3600);
    let paused = stream.pause_consumer("relay", end);
    assert!(paused.await.unwrap().paused);
    relay.logged("the consumer relay is paused").await;
    stream.resume_consumer("relay").await.unwrap();
    relay.logged("the consumer relay is no longer paused").await;
}

#[tokio::test]
async fn a_stop_without_nats_does_not_claim_to_hand_anything_back() {
    let webhook = Webhook::script([Answer::Hang]).await;
    let mut scene = Scene::durable(webhook, &[("SHUTDOWN_TIMEOUT", "100ms")]).await;
    publish(&scene.nats, 0..1).await;
    scene.webhook.received(1).await;
    scene.nats.kill();
    scene.relay.logged("lost the connection to NATS").await;
    scene.relay.signal("TERM");
    let (code, log) = scene.relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
    assert!(!log.concat().contains("handed back"), "{log:#?}");
    assert!(log.concat().contains(" stays in the stream"), "{log:#?}");
}

#[tokio::test]
async fn a_payload_that_has_become_too_large_is_not_blamed_on_its_headers() {
    let config = |limit: usize| {
        format!("max_payload: {limit}\njetstream {{ store_dir: \"$DIR/jetstream\" }}")
    };
    let mut nats = NatsServer::with_config(&config(2000)).await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    nats.publish_raw(b"cms.cache.large", b"", &[b'x'; 1500])
        .await;
    nats.stop();
    nats.configure(&config(1000));
    nats.restart();
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    let line = relay.logged("cms.cache.large is not relayed: ").await;
    assert!(
        line.contains("payload") && !line.contains("header"),
        "{line}"
    );
    publish(&nats, 0..1).await;
    webhook.received(1).await;
    assert_eq!(webhook.bodies(), ["0"]);
}

#[tokio::test]
async fn a_message_that_left_the_stream_is_not_republished_after_the_next_one() {
    let nats = NatsServer::with_stream().await;
    let client = nats.client().await;
    let jetstream = nats.jetstream().await;
    let mut stream = jetstream.get_stream("CMS").await.unwrap();
    let mut config = stream.info().await.unwrap().config.clone();
    config.max_messages_per_subject = 1;
    jetstream.update_stream(config).await.unwrap();
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    // The webhook holds the first version up until the second one is through.
    let webhook = Webhook::start(|_, request| match request.text().as_str() {
        "v1" => Answer::ok_after(Duration::from_secs(3)),
        _ => Answer::OK,
    })
    .await;
    let relays = [
        Relay::durable(&nats, &webhook, &[]).await,
        Relay::durable(&nats, &webhook, &[]).await,
    ];
    for relay in &relays {
        relay
            .logged("can drop a message while it is being relayed (max_msgs_per_subject 1)")
            .await;
    }
    client.publish("cms.cache.x", "v1".into()).await.unwrap();
    webhook.received(1).await;
    client.publish("cms.cache.x", "v2".into()).await.unwrap();
    assert_eq!(next(&mut relayed).await.payload, "v2");
    until("the first version is abandoned", async || {
        relays
            .iter()
            .any(|relay| !relay.lines("cms.cache.x is abandoned").is_empty())
    })
    .await;
    client.publish("cms.cache.y", "v3".into()).await.unwrap();
    assert_eq!(next(&mut relayed).await.payload, "v3", "v1 came late");
}

#[tokio::test]
async fn settings_by_which_a_publisher_can_drop_what_is_being_relayed_are_warned_of() {
    let webhook = Webhook::ok().await;
    let nats = NatsServer::with_stream().await;
    let jetstream = nats.jetstream().await;
    let mut stream = jetstream.get_stream("CMS").await.unwrap();
    let mut config = stream.info().await.unwrap().config.clone();
    config.allow_rollup = true;
    let mut words = ["can drop a message", "allow_rollup_hdrs"];
    jetstream.update_stream(config.clone()).await.unwrap();
    warned_of(&nats, &webhook, words).await;
    if !NatsServer::is_at_least((2, 11)) {
        eprintln!("allow_msg_ttl is not tested: it takes nats-server 2.11");
        return;
    }
    config.allow_message_ttl = true;
    words[1] = "allow_msg_ttl";
    jetstream.update_stream(config).await.unwrap();
    warned_of(&nats, &webhook, words).await;
}

#[tokio::test]
async fn what_nobody_may_know_about_the_stream_is_said() {
    let nats = NatsServer::with_config(
        r#"jetstream { store_dir: "$DIR/jetstream" }
           authorization { users = [
               { user: admin, password: good }
               { user: relay, password: good, permissions: {
                   publish: { deny: "$JS.API.STREAM.INFO.CMS" } } }
           ] }
           no_auth_user: admin"#,
    )
    .await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    let webhook = Webhook::ok().await;
    let variables = [("NATS_USER", "relay"), ("NATS_PASS", "good")];
    let relay = Relay::durable(&nats, &webhook, &variables).await;
    let line = relay
        .logged("cannot tell whether the limits of the stream CMS")
        .await;
    assert!(
        line.ends_with("allow $JS.API.STREAM.INFO.CMS for this NATS user"),
        "{line}"
    );
    nats.publish("cms.cache.x", "x").await;
    relay.logged(" -> ").await;
}

#[tokio::test]
async fn headers_that_become_too_large_are_given_up_before_they_are_posted() {
    let mut scene = Scene::durable(Webhook::ok().await, &[]).await;
    // Without a space after the colon, as a client would write it.
    let headers = b"NATS/1.0\r\nA:b\r\n\r\n";
    let payload = vec![b'x'; scene.client.max_payload() - headers.len()];
    scene
        .nats
        .publish_raw(b"cms.cache.raw", headers, &payload)
        .await;
    publish(&scene.nats, 0..1).await;
    expect(&mut scene.relayed, 0..1).await;
    scene
        .relay
        .logged("cms.cache.raw is not relayed: with its headers it has more than")
        .await;
    assert_eq!(scene.webhook.bodies(), ["0"]);
}

#[tokio::test]
async fn a_consumer_belongs_to_the_relays_of_one_environment() {
    let nats = NatsServer::with_stream().await;
    let webhook = Webhook::ok().await;
    let production = Relay::durable(&nats, &webhook, &[]).await;
    let laptop = [
        ("NATS_STREAM", "CMS"),
        ("NATS_CONSUMER", "relay"),
        ("NATS_RELAYED_SUBJECT_PREFIX", "relayed-ana.cache"),
    ];
    let words = [
        "under relayed.cache,",
        "under relayed-ana.cache:",
        "NATS_CONSUMER to another name",
        "nats consumer edit CMS relay --force --description \
         'nats-webhook-relay republishes under relayed-ana.cache'",
    ];
    let (code, log) = Relay::between(&nats, &webhook.url(), &laptop).ended().await;
    let refusal = log.last().unwrap();
    assert_eq!(code, Some(1), "{log:#?}");
    assert!(words.iter().all(|word| refusal.contains(word)), "{log:#?}");
    let (code, lines) = Relay::check(&nats, &webhook, &laptop).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("FAILED") && words.iter().all(|word| line.contains(word))),
        "{lines:#?}"
    );
    // Taken over, as the refusal says.
    let description = "nats-webhook-relay republishes under relayed-ana.cache";
    edit_consumer(&nats, |config| {
        config.description = Some(description.to_owned());
    })
    .await;
    let (code, log) = production.ended().await;
    assert_eq!(code, Some(1), "{log:#?}");
    let _laptop = Relay::listening(&nats, &webhook, &laptop).await;
    // What an operator describes in words of their own is anybody's.
    edit_consumer(&nats, |config| config.description = Some("ours".to_owned())).await;
    let _production = Relay::durable(&nats, &webhook, &[]).await;
}
