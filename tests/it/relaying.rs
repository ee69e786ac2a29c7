//! The main job: the same message, after its webhook, in order.

use std::time::Duration;

use async_nats::HeaderMap;

use crate::support::{Answer, NatsServer, Relay, Scene, Webhook, next};

#[tokio::test]
async fn a_message_goes_to_the_webhook_and_then_to_the_relayed_subject() {
    let webhook = Webhook::start(|_, _| Answer::ok_after(Duration::from_millis(30))).await;
    let mut scene = Scene::core(webhook, &[]).await;
    let url = scene.webhook.url();
    let way = format!("on cms.cache.>; POST to {url}, then republish on relayed.cache.>");
    scene.relay.logged(&way).await;

    let mut headers = HeaderMap::new();
    headers.append("Nats-Msg-Id", "edit-17");
    headers.append(
        "Traceparent",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    );
    headers.append("tracestate", "a=1");
    headers.append("Authorization", "Bearer stolen");
    headers.append("X-Twice", "one");
    headers.append("X-Twice", "two");
    scene
        .client
        .publish_with_reply_and_headers(
            "cms.cache.pages.home",
            "reply.here",
            headers.clone(),
            r#"{"tags":["home"]}"#.into(),
        )
        .await
        .unwrap();

    let message = scene.next().await;
    let relayed_at = std::time::Instant::now();
    assert_eq!(message.subject.as_str(), "relayed.cache.pages.home");
    assert_eq!(&message.payload[..], br#"{"tags":["home"]}"#);
    headers.insert("Nats-Msg-Id", "edit-17@relayed.cache");
    assert_eq!(message.headers, Some(headers));
    assert_eq!(message.reply, None);

    let requests = scene.webhook.received(1).await;
    let request = &requests[0];
    assert!(
        request.answered.unwrap() <= relayed_at,
        "it was relayed before its webhook succeeded"
    );
    assert_eq!(request.line, "POST /hook HTTP/1.1");
    assert_eq!(request.text(), r#"{"tags":["home"]}"#);
    let expected = [
        ("content-type", Some("application/json")),
        (
            "user-agent",
            Some(concat!("nats-webhook-relay/", env!("CARGO_PKG_VERSION"))),
        ),
        ("x-nats-subject", Some("cms.cache.pages.home")),
        ("webhook-id", Some("edit-17")),
        (
            "traceparent",
            Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ),
        ("tracestate", Some("a=1")),
        ("authorization", None),
        ("x-twice", None),
        ("accept-encoding", None),
    ];
    for (name, value) in expected {
        assert_eq!(request.header(name), value, "{name}");
    }
    let timestamp: u64 = request
        .header("webhook-timestamp")
        .unwrap()
        .parse()
        .unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(now - timestamp < 60, "{timestamp}");
    scene
        .relay
        .logged("cms.cache.pages.home -> relayed.cache.pages.home (200, ")
        .await;
}

#[tokio::test]
async fn any_payload_is_relayed_byte_for_byte() {
    let mut scene = Scene::core(Webhook::ok().await, &[]).await;
    let every_byte: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let largest = vec![b'x'; scene.client.max_payload()];
    for payload in [
        Vec::new(),
        b"\r\n\0\r\nPUB x 0\r\n".to_vec(),
        every_byte,
        largest,
    ] {
        scene.publish(payload.clone()).await;
        let message = scene.next().await;
        assert!(message.payload == payload, "{} bytes differ", payload.len());
        let headers = message.headers.unwrap_or_default();
        let names: Vec<_> = headers.iter().map(|(name, _)| name.to_string()).collect();
        // There is no room for it in the largest.
        let expected = match payload.len() < scene.client.max_payload() {
            true => &["Nats-Msg-Id"][..],
            false => &[],
        };
        assert_eq!(names, expected);
        let request = scene.webhook.requests().pop().unwrap();
        assert!(request.body == payload, "{} bytes differ", payload.len());
        assert_eq!(
            request.header("content-length").unwrap(),
            payload.len().to_string()
        );
    }
}

#[tokio::test]
async fn control_characters_in_a_subject_are_relayed_and_reach_no_log() {
    let mut scene = Scene::core(Webhook::ok().await, &[]).await;
    let subject = "cms.cache.a\u{7}b\u{1b}[31mc";
    scene.client.publish(subject, "x".into()).await.unwrap();
    let message = scene.next().await;
    assert_eq!(message.subject.as_str(), "relayed.cache.a\u{7}b\u{1b}[31mc");
    let line = scene.relay.logged("relayed.cache.a b [31mc (200").await;
    assert!(!line.contains(char::is_control), "{line:?}");
}

#[tokio::test]
async fn a_subject_that_becomes_too_long_for_the_server_costs_no_other_message() {
    let failed_prefix = [("NATS_FAILED_SUBJECT_PREFIX", "failed")];
    let mut scene = Scene::core(Webhook::ok().await, &failed_prefix).await;
    let mut failed = scene.client.subscribe("failed.>").await.unwrap();
    let long = "x".repeat(4062);
    for subject in [format!("cms.cache.{long}"), "cms.cache.next".to_owned()] {
        scene.client.publish(subject, "x".into()).await.unwrap();
    }
    assert_eq!(scene.next().await.subject.as_str(), "relayed.cache.next");
    let reason = "below relayed.cache its subject has ";
    scene.relay.logged(reason).await;
    assert_eq!(next(&mut failed).await.subject.len(), long.len() + 7);
    assert_eq!(scene.relay.lines("lost the connection"), [""; 0]);
}

#[tokio::test]
async fn the_content_type_is_the_message_s_own_if_it_has_one() {
    let mut scene = Scene::core(Webhook::ok().await, &[]).await;
    for (own, sent) in [
        ("text/plain", "text/plain"),
        ("a\u{1}b", "application/json"),
    ] {
        let mut headers = HeaderMap::new();
        headers.insert("Content-Type", own);
        scene
            .client
            .publish_with_headers("cms.cache.x", headers, "x".into())
            .await
            .unwrap();
        scene.next().await;
        let request = scene.webhook.requests().pop().unwrap();
        assert_eq!(request.header("content-type"), Some(sent));
    }
}

#[tokio::test]
async fn headers_that_are_listed_go_along_and_never_replace_one_of_the_relay_s() {
    let changes = [
        ("WEBHOOK_PASS_HEADERS", "ce-* Content-Encoding x-* webhook*"),
        ("WEBHOOK_HEADER_X_KEY", "ours"),
    ];
    let mut scene = Scene::core(Webhook::ok().await, &changes).await;
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("Ce-Type", "edit"),
        ("content-encoding", "gzip"),
        ("X-Twice", "one"),
        ("X-Twice", "two"),
        ("X-Key", "theirs"),
        ("X-Nats-Subject", "theirs"),
        ("Webhook-Id", "theirs"),
        ("Other", "kept back"),
        ("Authorization", "Bearer stolen"),
    ] {
        headers.append(name, value);
    }
    let published = scene
        .client
        .publish_with_headers("cms.cache.x", headers, "x".into());
    published.await.unwrap();
    scene.next().await;
    let requests = scene.webhook.requests();
    let request = &requests[0];
    for (name, expected) in [
        ("ce-type", Some("edit")),
        ("content-encoding", Some("gzip")),
        // The fake keeps the last one.
        ("x-twice", Some("two")),
        ("x-key", Some("ours")),
        ("x-nats-subject", Some("cms.cache.x")),
        ("other", None),
        ("authorization", None),
    ] {
        assert_eq!(request.header(name), expected, "{name}");
    }
    assert_ne!(request.header("webhook-id"), Some("theirs"));
}

#[tokio::test]
async fn a_message_without_a_usable_id_gets_one_of_its_own() {
    let scene = Scene::core(Webhook::ok().await, &[]).await;
    for id in [None, None, Some("has.dots")] {
        let headers = id.map(|id| [("Nats-Msg-Id", id)].into_iter().collect_headers());
        let headers = headers.unwrap_or_default();
        scene
            .client
            .publish_with_headers("cms.cache.x", headers, "x".into())
            .await
            .unwrap();
    }
    let requests = scene.webhook.received(3).await;
    let mut ids: Vec<_> = requests
        .iter()
        .map(|r| r.header("webhook-id").unwrap())
        .collect();
    assert!(
        ids.iter()
            .all(|id| id.len() == 36 && id.starts_with("msg_")),
        "{ids:?}"
    );
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 3);
}

trait CollectHeaders {
    fn collect_headers(self) -> HeaderMap;
}

impl<'a, I: Iterator<Item = (&'a str, &'a str)>> CollectHeaders for I {
    fn collect_headers(self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        self.for_each(|(name, value)| headers.append(name, value));
        headers
    }
}

#[tokio::test]
async fn five_hundred_messages_stay_in_order_under_random_latencies_and_failures() {
    const COUNT: usize = 500;
    let webhook = Webhook::start(|n, _| match n {
        100 | 250 => Answer::status(503),
        _ => Answer::ok_after(Duration::from_millis(fastrand::u64(0..5))),
    })
    .await;
    let mut scene = Scene::core(webhook, &[]).await;
    for n in 0..COUNT {
        scene
            .client
            .publish(format!("cms.cache.{}", n % 7), n.to_string().into())
            .await
            .unwrap();
    }
    for n in 0..COUNT {
        let message = scene.next().await;
        assert_eq!(message.payload, n.to_string());
        assert_eq!(message.subject.as_str(), format!("relayed.cache.{}", n % 7));
    }
    let requests = scene.webhook.requests();
    assert_eq!(requests.len(), COUNT + 2);
    for pair in requests.windows(2) {
        assert!(
            pair[0].answered.unwrap() <= pair[1].at,
            "two requests at a time"
        );
    }
    let mut bodies = scene.webhook.bodies();
    bodies.dedup();
    assert!(
        bodies
            .iter()
            .enumerate()
            .all(|(n, body)| *body == n.to_string()),
        "{bodies:?}"
    );
    assert!(
        requests.iter().all(|request| request.connection == 0),
        "the connection is kept"
    );
}

#[tokio::test]
async fn a_queue_group_shares_the_messages() {
    const COUNT: usize = 100;
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let webhook = Webhook::ok().await;
    let group = [("NATS_QUEUE_GROUP", "relays")];
    let relays = [
        Relay::listening(&nats, &webhook, &group).await,
        Relay::listening(&nats, &webhook, &group).await,
    ];
    for n in 0..COUNT {
        client
            .publish("cms.cache.x", n.to_string().into())
            .await
            .unwrap();
    }
    webhook.received(COUNT).await;
    let mut numbers: Vec<usize> = webhook
        .bodies()
        .iter()
        .map(|body| body.parse().unwrap())
        .collect();
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..COUNT), "each message once");
    for relay in relays {
        relay.logged(" -> ").await;
    }
}
