//! What receivers expect: several of them, headers, signatures, a delay, TLS.

use std::time::Duration;

use crate::support::{Answer, Authority, NatsServer, Relay, Webhook, next};

const SECRETS: [&str; 2] = [
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
];

async fn relay_to(nats: &NatsServer, webhooks: &[&Webhook], changes: &[(&str, &str)]) -> Relay {
    let urls: Vec<_> = webhooks.iter().map(|webhook| webhook.url()).collect();
    let relay = Relay::between(nats, &urls.join(" \n"), changes);
    relay.logged("listening on").await;
    relay
}

#[tokio::test]
async fn several_destinations_are_told_at_the_same_time_and_all_must_succeed() {
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let slow = Webhook::start(|_, _| Answer::ok_after(Duration::from_millis(300))).await;
    let failing = Webhook::script([Answer::status(503), Answer::Close, Answer::status(204)]).await;
    let quick = Webhook::ok().await;
    let relay = relay_to(&nats, &[&slow, &failing, &quick], &[]).await;
    client.publish("cms.cache.x", "first".into()).await.unwrap();
    assert_eq!(next(&mut relayed).await.payload, "first");
    let requests = [slow.requests(), failing.requests(), quick.requests()].concat();
    assert_eq!(
        requests.len(),
        1 + 3 + 1,
        "only those that failed are told again"
    );
    assert!(
        requests[1].at < requests[0].answered.unwrap(),
        "one after the other"
    );
    let ids: Vec<_> = requests
        .iter()
        .map(|request| request.header("webhook-id"))
        .collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let line = relay.logged(" -> ").await;
    assert!(
        line.contains("(200, 204, 200, ") && line.contains("3 attempts"),
        "{line}"
    );
    let line = relay.logged("attempt 1: ").await;
    assert!(
        line.contains(&format!("{}: answered 503", failing.url())),
        "{line}"
    );
}

#[tokio::test]
async fn one_that_refuses_gives_the_message_up_after_the_others_came_to_an_end() {
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let mut failed = client.subscribe("failed.>").await.unwrap();
    let refusing = Webhook::script([Answer::status(404)]).await;
    let failing = Webhook::script([Answer::status(503)]).await;
    let changes = [("NATS_FAILED_SUBJECT_PREFIX", "failed")];
    let _relay = relay_to(&nats, &[&refusing, &failing], &changes).await;
    for payload in ["first", "second"] {
        client.publish("cms.cache.x", payload.into()).await.unwrap();
    }
    let headers = next(&mut failed).await.headers.unwrap();
    let reason = headers.get("Relay-Error").unwrap().as_str();
    assert_eq!(
        reason,
        format!("{}: answered 404 Not Found: (no body)", refusing.url())
    );
    assert_eq!(next(&mut relayed).await.payload, "second");
    let order: Vec<_> = failing
        .requests()
        .iter()
        .map(|request| request.text())
        .collect();
    assert_eq!(
        order,
        ["first", "first", "second"],
        "the other came to its end first"
    );
}

#[tokio::test]
async fn a_slow_cache_handler_gets_its_delay() {
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::ok().await;
    let _relay = relay_to(&nats, &[&webhook], &[("REPUBLISH_DELAY", "300ms")]).await;
    client.publish("cms.cache.x", "x".into()).await.unwrap();
    next(&mut relayed).await;
    let waited = webhook.requests()[0].answered.unwrap().elapsed();
    assert!(waited >= Duration::from_millis(300), "{waited:?}");
}

#[tokio::test]
async fn headers_and_signatures_are_sent_and_another_implementation_verifies_them() {
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let webhook = Webhook::script([Answer::status(503)]).await;
    let secrets = SECRETS.join("\n");
    let changes = [
        ("WEBHOOK_SECRET", &secrets[..]),
        ("WEBHOOK_HEADER_X_REVALIDATE_SECRET", "hunter2"),
        ("WEBHOOK_HEADER_AUTHORIZATION", "Bearer hunter2"),
    ];
    let _relay = relay_to(&nats, &[&webhook], &changes).await;
    client
        .publish("cms.cache.x", r#"{"tags":["ä"]}"#.into())
        .await
        .unwrap();
    client
        .publish("cms.cache.x", vec![0xff, 0, 0xfe].into())
        .await
        .unwrap();
    let requests = webhook.received(3).await;
    for request in &requests {
        assert_eq!(request.header("x-revalidate-secret"), Some("hunter2"));
        assert_eq!(request.header("authorization"), Some("Bearer hunter2"));
        assert_eq!(
            request
                .header("webhook-signature")
                .unwrap()
                .split(' ')
                .count(),
            2
        );
    }
    for request in &requests[..2] {
        let headers = ["webhook-id", "webhook-timestamp", "webhook-signature"]
            .map(|name| {
                (
                    name.parse().unwrap(),
                    request.header(name).unwrap().parse().unwrap(),
                )
            })
            .into_iter()
            .collect();
        for secret in SECRETS {
            standardwebhooks::Webhook::new(secret)
                .unwrap()
                .verify(&request.body, &headers)
                .unwrap();
        }
    }
}

#[tokio::test]
async fn https_is_trusted_by_the_system_s_store_or_a_ca_of_one_s_own() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let authority = Authority::new();
    let webhook = Webhook::https(authority.acceptor()).await;
    let url = webhook.url().replace("http:", "https:");

    let relay = Relay::between(&nats, &url, &[("WEBHOOK_MAX_ATTEMPTS", "2")]);
    relay.logged("listening on").await;
    nats.publish("cms.cache.x", "refused").await;
    let line = relay.logged("cannot connect: ").await;
    assert!(line.contains("certificate"), "{line}");
    relay.logged("is not relayed").await;
    assert_eq!(webhook.count(), 0);
    drop(relay);

    let relay = Relay::between(&nats, &url, &[("SSL_CERT_FILE", &authority.ca())]);
    relay.logged("listening on").await;
    nats.publish("cms.cache.x", "trusted").await;
    assert_eq!(next(&mut relayed).await.payload, "trusted");
}

#[tokio::test]
async fn no_secret_of_these_is_logged_at_any_level() {
    let nats = NatsServer::with_config("authorization { token: hunter2 }").await;
    let webhook = Webhook::script([Answer::status(503), Answer::Close]).await;
    let changes = [
        ("NATS_TOKEN", "hunter2"),
        ("WEBHOOK_SECRET", SECRETS[0]),
        ("WEBHOOK_HEADER_X_KEY", "hunter2"),
        ("RUST_LOG", "trace"),
    ];
    let relay = relay_to(&nats, &[&webhook], &changes).await;
    let options = async_nats::ConnectOptions::with_token("hunter2".into());
    let client = nats.client_with(options).await;
    client.publish("cms.cache.x", "x".into()).await.unwrap();
    relay.logged(" -> ").await;
    relay.signal("TERM");
    let (_, log) = relay.ended().await;
    for line in log {
        assert!(
            !line.contains("hunter2") && !line.contains("MfKQ9r8"),
            "{line}"
        );
    }
}
