//! What NATS refuses, and the round trip that tells: nothing is called relayed that was not.

use std::time::{Duration, Instant};

use async_nats::HeaderMap;

use crate::{
    operating::{STATUS, address, metrics, until_answer},
    support::{
        Answer, Authority, Mode, NatsServer, Relay, Scene, Webhook, next, publish_all, until, usual,
    },
};

/// A server on which the user `relay` may not publish on this subject.
async fn mute(denied: &str) -> NatsServer {
    let nats = NatsServer::with_config(&muted(denied)).await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    nats
}

fn muted(denied: &str) -> String {
    format!(
        "jetstream {{ store_dir: \"$DIR/jetstream\" }}
         authorization {{ users = [
            {{ user: admin, password: p }}
            {{ user: relay, password: p, permissions: {{ publish: {{ deny: {denied} }} }} }} ] }}
         no_auth_user: admin"
    )
}

const LOGIN: [(&str, &str); 2] = [("NATS_USER", "relay"), ("NATS_PASS", "p")];

#[tokio::test]
async fn a_refused_publish_is_known_before_its_message_is_acked() {
    let nats = mute("\"relayed.cache.bad\"").await;
    let client = nats.client().await;
    let mut acks = client.subscribe("$JS.ACK.CMS.relay.>").await.unwrap();
    let mut failed = client.subscribe("failed.>").await.unwrap();
    let webhook = Webhook::ok().await;
    let changes = [&LOGIN[..], &[("NATS_FAILED_SUBJECT_PREFIX", "failed")]].concat();
    let relays = [
        Relay::durable(&nats, &webhook, &changes).await,
        Relay::durable(&nats, &webhook, &changes).await,
    ];
    let count = 20;
    for n in 0..count {
        let subject = ["cms.cache.good", "cms.cache.bad"][n % 2];
        client.publish(subject, n.to_string().into()).await.unwrap();
    }
    for n in (1..count).step_by(2) {
        let message = next(&mut failed).await;
        assert_eq!(message.payload, n.to_string());
    }
    let mut said = Vec::new();
    while said.len() < count {
        let ack = next(&mut acks).await;
        if ack.payload != "+WPI" {
            said.push(String::from_utf8(ack.payload.to_vec()).unwrap());
        }
    }
    assert_eq!(said, ["+ACK", "+TERM"].repeat(count / 2));
    until("each good one is called relayed", async || {
        let relayed = relays.iter().map(|relay| relay.lines(" -> ").len());
        relayed.sum::<usize>() == count / 2
    })
    .await;
    for relay in &relays {
        assert_eq!(relay.lines("cms.cache.bad -> "), [""; 0]);
    }
}

#[tokio::test]
async fn a_permission_that_is_withdrawn_later_is_noticed_with_the_next_message() {
    let nats = mute("\"nothing\"").await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let mut failed = client.subscribe("failed.>").await.unwrap();
    let webhook = Webhook::ok().await;
    let changes = [&LOGIN[..], &[("NATS_FAILED_SUBJECT_PREFIX", "failed")]].concat();
    let relay = Relay::durable(&nats, &webhook, &changes).await;
    nats.publish("cms.cache.x", "before").await;
    assert_eq!(next(&mut relayed).await.payload, "before");
    nats.reload(&muted("\"relayed.>\""));
    until("the server has reloaded", async || {
        nats.log().contains("Reloaded")
    })
    .await;
    for message in ["after", "later"] {
        nats.publish("cms.cache.x", message).await;
        assert_eq!(
            next(&mut failed).await.payload,
            message,
            "{:#?}",
            relay.log()
        );
    }
    assert_eq!(relay.lines(" -> ").len(), 1);
}

#[tokio::test]
async fn every_refused_publish_of_core_mode_is_counted_and_none_is_called_relayed() {
    const COUNT: usize = 1000;
    let nats = mute("\"relayed.>\"").await;
    let changes = [&LOGIN[..], &[STATUS]].concat();
    let scene = Scene::on(nats, Mode::Core, Webhook::ok().await, &changes).await;
    for n in 0..COUNT {
        scene.publish(n.to_string()).await;
    }
    let address = address(&scene.relay).await;
    until("each is given up", async || {
        let metrics = metrics(&address).await;
        let refused = "messages_given_up_total reason=not_published";
        metrics[refused] == COUNT as f64
    })
    .await;
    let metrics = metrics(&address).await;
    assert_eq!(metrics["publish_refused_total"], COUNT as f64);
    assert_eq!(metrics["messages_relayed_total"], 0.0);
    assert_eq!(scene.relay.lines(" -> "), [""; 0]);
}

#[tokio::test]
async fn a_user_without_inboxes_knows_what_is_refused_all_the_same() {
    for denied in [
        "publish: { deny: [\"relayed.>\", \"_INBOX.>\"] }",
        "publish: { deny: \"relayed.>\" }, subscribe: { deny: \"_INBOX.>\" }",
    ] {
        let nats = NatsServer::with_config(&format!(
            "authorization {{ users = [
                {{ user: admin, password: p }}
                {{ user: relay, password: p, permissions: {{ {denied} }} }} ] }}
             no_auth_user: admin"
        ))
        .await;
        let scene = Scene::on(nats, Mode::Core, Webhook::ok().await, &LOGIN).await;
        for n in 0..10 {
            scene.publish(n.to_string()).await;
        }
        scene.relay.logged_times("NATS refuses it", 10).await;
        assert_eq!(scene.relay.lines(" -> "), [""; 0]);
    }
}

#[tokio::test]
async fn whoever_listens_to_everything_does_not_delay_the_start() {
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let _everything = client.subscribe(">").await.unwrap();
    client.flush().await.unwrap();
    let start = Instant::now();
    let _relay = Relay::listening(&nats, &Webhook::ok().await, &[]).await;
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_refused_subscription_is_recognized_however_its_subject_is_quoted() {
    let nats = NatsServer::with_config(
        "authorization { users = [
            { user: relay, password: p, permissions: { subscribe: { deny: \">\" } } } ] }",
    )
    .await;
    for prefix in ["cms\u{200b}cache", "cms\"\\cache"] {
        let changes = [&LOGIN[..], &[("NATS_SUBJECT_PREFIX", prefix)]].concat();
        let relay = Relay::between(&nats, "http://127.0.0.1:1/", &changes);
        let (code, log) = relay.ended().await;
        assert_eq!(code, Some(1), "{log:#?}");
        let last = log.last().unwrap();
        assert!(
            last.contains("no permission to subscribe to cms"),
            "{log:#?}"
        );
    }
}

#[tokio::test]
async fn a_trace_that_a_publisher_asks_for_is_not_asked_for_again() {
    for mode in [Mode::Core, Mode::Durable] {
        let nats = mute("\"trace.>\"").await;
        let mut scene = Scene::on(nats, mode, Webhook::ok().await, &LOGIN).await;
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Trace-Dest", "trace.here");
        headers.insert("Nats-Trace-Hop", "1");
        let sent = scene
            .client
            .publish_with_headers("cms.cache.x", headers, "x".into());
        sent.await.unwrap();
        let headers = scene.next().await.headers.unwrap();
        let names: Vec<_> = headers.iter().map(|(name, _)| name.to_string()).collect();
        assert_eq!(names, ["Nats-Msg-Id"], "{mode:?}");
    }
}

#[tokio::test]
async fn a_jetstream_that_goes_away_makes_the_relay_unready() {
    let with = "jetstream { store_dir: \"$DIR/jetstream\" }";
    let mut nats = NatsServer::with_config(with).await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &[STATUS]).await;
    let address = address(&relay).await;
    until_answer(&address, "/readyz", 200, "ok").await;
    nats.stop();
    nats.configure("");
    nats.restart();
    until_answer(&address, "/readyz", 503, "JetStream is not ready").await;
    nats.stop();
    nats.configure(with);
    nats.restart();
    until_answer(&address, "/readyz", 200, "ok").await;
    publish_all(&nats.jetstream().await, 0..1).await;
    relay.logged(" -> ").await;
}

#[tokio::test]
async fn acks_that_nobody_takes_are_put_down_to_the_missing_import() {
    let nats = NatsServer::with_config(
        r#"jetstream { store_dir: "$DIR/jetstream" }
           accounts {
               HUB { jetstream: enabled, users: [ { user: hub, password: p } ]
                     exports: [ { service: "$JS.API.>", response_type: "stream" } ] }
               APP { users: [ { user: relay, password: p } ]
                     imports: [ { service: { account: HUB, subject: "$JS.API.>" } } ] }
           }
           no_auth_user: hub"#,
    )
    .await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &LOGIN).await;
    nats.publish("cms.cache.x", "x").await;
    let line = relay.logged("does not confirm its ack").await;
    assert!(line.contains("import the service $JS.ACK.>"), "{line}");
    let durable = [("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay")];
    let (_, report) = Relay::check(&nats, &webhook, &[&LOGIN[..], &durable].concat()).await;
    let is_warned = |line: &String| line.starts_with("warning nobody listens to acks");
    assert!(report.iter().any(is_warned), "{report:#?}");
}

#[tokio::test]
async fn the_end_of_the_requests_to_stop_is_no_request() {
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::script([Answer::ok_after(Duration::from_millis(500))]).await;
    let variables =
        usual(&nats.url(), &webhook.url()).map(|(name, value)| (name.to_owned(), value.to_owned()));
    let environment = nats_webhook_relay::Environment::from_iter(variables);
    let config = nats_webhook_relay::Config::from_environment(&environment).unwrap();
    let received = async {
        // It may not have subscribed yet.
        until("a message is POSTed", async || {
            client.publish("cms.cache.x", "x".into()).await.unwrap();
            webhook.count() > 0
        })
        .await;
    };
    let stop = Box::pin(futures::stream::once(received));
    nats_webhook_relay::run(config, stop).await.unwrap();
    assert_eq!(next(&mut relayed).await.payload, "x");
}

#[tokio::test]
async fn a_password_is_sent_to_no_advertised_server_without_tls() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue("server");
    let routes = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let route = routes.local_addr().unwrap();
    drop(routes);
    let user = "authorization { user: relay, password: p }";
    let mut secure = NatsServer::with_config(&format!(
        "tls {{ cert_file: \"{certificate}\", key_file: \"{key}\" }}
         cluster {{ name: c, listen: \"{route}\" }}
         {user}"
    ))
    .await;
    let plain = NatsServer::with_config(&format!(
        "cluster {{ name: c, listen: \"127.0.0.1:-1\", routes: [ \"nats://{route}\" ] }}
         {user}"
    ))
    .await;
    let (url, ca) = (secure.url().replace("nats:", "tls:"), authority.ca());
    let changes = [&LOGIN[..], &[("NATS_HOST", &url), ("SSL_CERT_FILE", &ca)]].concat();
    until("the servers have found each other", async || {
        plain.log().contains("Route connection created")
    })
    .await;
    let relay = Relay::listening(&secure, &Webhook::ok().await, &changes).await;
    secure.kill();
    relay
        .logged(&format!("cannot connect to NATS at {}", plain.url()))
        .await;
    assert_eq!(relay.lines("connected to NATS at").len(), 1);
    // Without advertised servers it is not even tried.
    secure.restart();
    let alone = [&changes[..], &[("NATS_IGNORE_DISCOVERED_SERVERS", "true")]].concat();
    let relay = Relay::listening(&secure, &Webhook::ok().await, &alone).await;
    secure.kill();
    relay.logged_times("cannot connect to NATS at", 4).await;
    assert_eq!(relay.lines(&plain.url()), [""; 0]);
}
