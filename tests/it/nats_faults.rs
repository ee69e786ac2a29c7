//! Whatever NATS does.

use std::time::{Duration, Instant};

use async_nats::ConnectOptions;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{broadcast, mpsc},
    time::{error::Elapsed, timeout},
};

use crate::operating::{STATUS, address, metrics};
use crate::support::{Answer, Mode, NatsServer, Relay, Scene, Webhook, next, until, until_ok};

const USERS: &str = r#"authorization { users = [
    { user: relay, password: good }
    { user: deaf, password: good, permissions: { subscribe: "other.>", publish: ">" } }
    { user: mute, password: good, permissions: { subscribe: ">", publish: "_INBOX.>" } }
    { user: strict, password: good, permissions: { subscribe: "cms.cache.>", publish: "relayed.cache.>" } }
] }"#;

async fn relay_as(nats: &NatsServer, webhook: &Webhook, user: &str, password: &str) -> Relay {
    Relay::between(
        nats,
        &webhook.url(),
        &[("NATS_USER", user), ("NATS_PASS", password)],
    )
}

#[tokio::test]
async fn a_server_that_is_not_up_yet_is_waited_for() {
    let mut nats = NatsServer::start().await;
    nats.kill();
    let webhook = Webhook::ok().await;
    let relay = Relay::between(&nats, &webhook.url(), &[]);
    let warnings = relay
        .logged_times("cannot connect to NATS at nats://127.0.0.1:", 3)
        .await;
    assert!(warnings[0].contains("Connection refused"), "{warnings:?}");
    nats.restart();
    relay.logged("listening on").await;
    assert_eq!(
        relay
            .logged_times("connected to NATS at nats://127.0.0.1:", 1)
            .await
            .len(),
        1
    );
}

#[tokio::test]
async fn any_server_of_several_will_do() {
    let nats = NatsServer::start().await;
    let webhook = Webhook::ok().await;
    let hosts = format!("nats://nowhere.invalid, nats://127.0.0.1:1,{}", nats.url());
    let relay = Relay::between(&nats, &webhook.url(), &[("NATS_HOST", &hosts)]);
    relay.logged("listening on").await;
    for reason in [
        "nats://nowhere.invalid:4222: its name does not resolve",
        "nats://127.0.0.1:1: Connection refused",
    ] {
        let lines = relay.lines(reason);
        assert_eq!(lines.len(), 1, "{reason}");
        // The others are to be tried before anything is waited for.
        assert!(lines[0].ends_with("; next attempt now"), "{lines:?}");
    }
}

#[tokio::test]
async fn a_server_that_goes_away_and_comes_back_costs_the_message_in_hand_nothing() {
    let mut nats = NatsServer::start().await;
    let webhook = Webhook::start(|n, _| {
        Answer::ok_after(Duration::from_millis(if n == 0 { 500 } else { 0 }))
    })
    .await;
    let relay = Relay::listening(&nats, &webhook, &[]).await;
    nats.publish("cms.cache.x", "in hand").await;
    webhook.received(1).await;
    nats.kill();
    relay.logged("lost the connection to NATS").await;
    until("the webhook has answered", async || {
        webhook.requests()[0].answered.is_some()
    })
    .await;
    relay.logged("cannot connect to NATS").await;
    assert_eq!(
        relay.lines(" -> "),
        [""; 0],
        "nothing is relayed without a connection"
    );

    // The listener has to be there before the relay is back.
    let options = ConnectOptions::new().retry_on_initial_connect();
    let client = options.connect(nats.url()).await.unwrap();
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    relay.signal("STOP");
    nats.restart();
    client.flush().await.unwrap();
    nats.client().await.flush().await.unwrap();
    relay.signal("CONT");
    assert_eq!(next(&mut relayed).await.payload, "in hand");
    relay.logged_times("connected to NATS", 2).await;
    relay.logged(" -> ").await;
    client.publish("cms.cache.x", "after".into()).await.unwrap();
    assert_eq!(next(&mut relayed).await.payload, "after");
    assert_eq!(webhook.count(), 2);
}

#[tokio::test]
async fn good_credentials_are_used_and_wrong_ones_end_it() {
    let nats = NatsServer::with_config(USERS).await;
    let webhook = Webhook::ok().await;
    let relay = relay_as(&nats, &webhook, "relay", "good").await;
    relay.logged("listening on").await;
    for (user, password) in [("relay", "bad"), ("nobody", "good")] {
        let (code, log) = relay_as(&nats, &webhook, user, password)
            .await
            .ended()
            .await;
        assert_eq!(code, Some(1), "{log:#?}");
        assert!(
            log.last().unwrap().contains("refused the login"),
            "{log:#?}"
        );
        assert!(!log.concat().contains("listening on"), "{log:#?}");
    }
    let (code, _) = Relay::between(&nats, &webhook.url(), &[]).ended().await;
    assert_eq!(code, Some(1), "no credentials at all");
}

#[tokio::test]
async fn a_user_without_permission_to_subscribe_ends_it() {
    let nats = NatsServer::with_config(USERS).await;
    let webhook = Webhook::ok().await;
    let (code, log) = relay_as(&nats, &webhook, "deaf", "good")
        .await
        .ended()
        .await;
    assert_eq!(code, Some(1), "{log:#?}");
    assert!(
        log.last()
            .unwrap()
            .contains("no permission to subscribe to cms.cache.>"),
        "{log:#?}"
    );
    assert!(!log.concat().contains("listening on"), "{log:#?}");
}

#[tokio::test]
async fn a_user_with_no_permission_but_the_two_it_needs_is_enough() {
    let nats = NatsServer::with_config(USERS).await;
    let webhook = Webhook::ok().await;
    let relay = Relay::listening(
        &nats,
        &webhook,
        &[("NATS_USER", "strict"), ("NATS_PASS", "good")],
    )
    .await;
    let options = ConnectOptions::with_user_and_password("relay".into(), "good".into());
    let client = nats.client_with(options).await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    client.publish("cms.cache.x", "x".into()).await.unwrap();
    assert_eq!(next(&mut relayed).await.payload, "x");
    assert_eq!(relay.lines("ERROR"), [""; 0]);
}

#[tokio::test]
async fn no_permission_to_publish_is_an_error_line_for_each_message() {
    let nats = NatsServer::with_config(USERS).await;
    let webhook = Webhook::ok().await;
    let relay = relay_as(&nats, &webhook, "mute", "good").await;
    relay.logged("listening on").await;
    let options = ConnectOptions::with_user_and_password("relay".into(), "good".into());
    let client = nats.client_with(options).await;
    for n in 0..2 {
        client
            .publish(format!("cms.cache.{n}"), "x".into())
            .await
            .unwrap();
    }
    let lines = relay
        .logged_times("no permission to publish on relayed.cache.", 2)
        .await;
    assert!(
        lines[0].contains("relayed.cache.0") && lines[1].contains("relayed.cache.1"),
        "{lines:?}"
    );
}

#[tokio::test]
async fn the_connection_has_a_name() {
    let nats = NatsServer::with_config("http: \"127.0.0.1:-1\"").await;
    let webhook = Webhook::ok().await;
    let _relay = Relay::listening(&nats, &webhook, &[]).await;
    let log = nats.log();
    let (_, rest) = log
        .split_once("Starting http monitor on 127.0.0.1:")
        .unwrap();
    let port = rest.split_whitespace().next().unwrap();
    let connections = http_get(&format!("127.0.0.1:{port}"), "/connz").await;
    assert!(
        connections.contains("\"name\": \"nats-webhook-relay\""),
        "{connections}"
    );
}

async fn http_get(address: &str, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream
        .write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn a_server_that_closes_every_connection_is_not_overrun() {
    let nats = NatsServer::start().await;
    let port = nats.port();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    let (connections, mut accepted) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut outer, _)) = listener.accept().await {
            connections.send(Instant::now()).unwrap();
            let mut inner = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            // Until the server's PONG, which ends the login.
            let (mut from_client, mut to_client) = outer.split();
            let (mut from_server, mut to_server) = inner.split();
            let mut seen = Vec::new();
            let login = async {
                while !seen.windows(4).any(|bytes| bytes == b"PONG") {
                    let mut buffer = [0; 4096];
                    let length = from_server.read(&mut buffer).await.unwrap();
                    seen.extend_from_slice(&buffer[..length]);
                    to_client.write_all(&buffer[..length]).await.unwrap();
                }
            };
            tokio::select! {
                () = login => {}
                _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
            }
        }
    });
    let relay = Relay::between(&nats, "http://127.0.0.1:1/", &[("NATS_HOST", &url)]);
    let first = accepted.recv().await.unwrap();
    let mut last = first;
    for _ in 0..7 {
        last = accepted.recv().await.unwrap();
    }
    // With waits that double from 100 ms, half of each random, it takes 1.5 s at the least.
    assert!(last - first > Duration::from_secs(1), "{:?}", last - first);
    assert_eq!(relay.lines("cannot connect"), [""; 0], "it could each time");
}

#[tokio::test]
async fn a_message_that_became_too_large_for_the_server_counts_as_refused() {
    let webhook = Webhook::script([Answer::ok_after(Duration::from_secs(1))]).await;
    let scene = Scene::core(webhook, &[STATUS]).await;
    let address = address(&scene.relay).await;
    scene.publish(vec![b'x'; 5000]).await;
    scene.webhook.received(1).await;
    scene.nats.reload("max_payload: 1024");
    scene
        .relay
        .logged("a message is too large for the NATS server")
        .await;
    let metrics = metrics(&address).await;
    assert_eq!(metrics["publish_refused_total"], 1.0);
}

#[tokio::test]
async fn a_prefix_with_quotation_marks_is_recognised_in_the_server_s_refusal() {
    let nats = NatsServer::with_config(USERS).await;
    let webhook = Webhook::ok().await;
    let variables = [
        ("NATS_USER", "deaf"),
        ("NATS_PASS", "good"),
        ("NATS_SUBJECT_PREFIX", r#"cms."a\b""#),
    ];
    let (code, log) = Relay::between(&nats, &webhook.url(), &variables)
        .ended()
        .await;
    assert_eq!(code, Some(1), "{log:#?}");
    let refusal = r#"no permission to subscribe to cms."a\b".>"#;
    assert!(log.last().unwrap().contains(refusal), "{log:#?}");
}

/// Once it is subscribed again, all is as before.
async fn relays_again(scene: &mut Scene) {
    until_ok("a message is relayed again", async || {
        scene.publish("after").await;
        let message = timeout(Duration::from_millis(200), scene.next()).await?;
        assert_eq!(message.payload, "after");
        Ok::<_, Elapsed>(())
    })
    .await;
}

#[tokio::test]
async fn a_message_that_no_client_can_read_costs_nothing_that_came_before_and_is_said() {
    const COUNT: usize = 50;
    for headers in [
        &b"NATS/1.0\r\nno colon\r\n\r\n"[..],
        b"NATS/1.0\r\nA: \xff\r\n\r\n",
    ] {
        let webhook = Webhook::script([Answer::ok_after(Duration::from_millis(1500))]).await;
        let mut scene = Scene::core(webhook, &[STATUS]).await;
        let address = address(&scene.relay).await;
        for n in 0..COUNT {
            scene.publish(n.to_string()).await;
        }
        scene.client.flush().await.unwrap();
        scene.webhook.received(1).await;
        scene
            .nats
            .publish_raw(b"cms.cache.raw", headers, b"raw")
            .await;
        let line = scene
            .relay
            .logged("lost the connection to NATS; messages that were on their way")
            .await;
        assert!(
            line.contains("ERROR") && line.contains("malformed headers"),
            "{line}"
        );
        scene.relay.logged_times("connected to NATS", 2).await;
        for n in 0..COUNT {
            assert_eq!(scene.next().await.payload, n.to_string());
        }
        assert_eq!(metrics(&address).await["interruptions_total"], 1.0);
        relays_again(&mut scene).await;
    }
}

/// The client does not survive this.
const KILLER: &[u8] = b"-ERR\r\n";

/// A way to a server on which something can be said to the client in the server's name.
struct Way {
    url: String,
    say: broadcast::Sender<&'static [u8]>,
    /// When each connection came.
    accepted: mpsc::UnboundedReceiver<Instant>,
}

/// A way to a server. Connections of these numbers, counted from 0, break the client down as soon as it has
/// logged in.
async fn through(nats: &NatsServer, breaking: &'static [usize]) -> Way {
    let port = nats.port();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    let (say, _) = broadcast::channel(1);
    let (note, accepted) = mpsc::unbounded_channel();
    let saying = say.clone();
    tokio::spawn(async move {
        for number in 0.. {
            let Ok((outer, _)) = listener.accept().await else {
                return;
            };
            let _ = note.send(Instant::now());
            let mut is_breaking = breaking.contains(&number);
            let mut said = saying.subscribe();
            let inner = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = outer.into_split();
                let (mut from_server, mut to_server) = inner.into_split();
                let answers = async {
                    let mut buffer = [0; 4096];
                    loop {
                        let bytes = tokio::select! {
                            length = from_server.read(&mut buffer) => &buffer[..length.ok()?],
                            said = said.recv() => said.ok()?,
                        };
                        to_client
                            .write_all(bytes)
                            .await
                            .ok()
                            .filter(|()| !bytes.is_empty())?;
                        // That ends the login.
                        if is_breaking && bytes.windows(4).any(|bytes| bytes == b"PONG") {
                            is_breaking = false;
                            to_client.write_all(KILLER).await.ok()?;
                        }
                    }
                };
                tokio::select! {
                    end = answers => end,
                    _ = tokio::io::copy(&mut from_client, &mut to_server) => None::<()>,
                }
            });
        }
    });
    Way { url, say, accepted }
}

#[tokio::test]
async fn after_a_crash_of_the_client_core_mode_starts_over_and_says_what_that_cost() {
    const COUNT: usize = 50;
    for killer in ["a carriage return", "an error without a text"] {
        let webhook = Webhook::script([Answer::ok_after(Duration::from_secs(60))]).await;
        let nats = NatsServer::start().await;
        let Way { url, say, .. } = through(&nats, &[]).await;
        let mut scene = Scene::on(nats, Mode::Core, webhook, &[("NATS_HOST", &url)]).await;
        for n in 0..COUNT {
            scene.publish(n.to_string()).await;
        }
        scene.client.flush().await.unwrap();
        scene.webhook.received(1).await;
        if killer.starts_with("a carriage") {
            scene
                .nats
                .publish_raw(b"cms.cache.raw", b"NATS/1.0\r\nA: b\rc\r\n\r\n", b"raw")
                .await;
        } else {
            say.send(KILLER).unwrap();
        }
        for line in [
            "cms.cache.x is not relayed: the NATS client crashed",
            "lost 49 messages not yet relayed",
            "the NATS client crashed, which a carriage return",
        ] {
            scene.relay.logged(line).await;
        }
        relays_again(&mut scene).await;
        // The new client knows what the server takes.
        assert_eq!(scene.relay.lines("more than the"), [""; 0]);
        scene.relay.signal("TERM");
        assert_eq!(scene.relay.ended().await.0, Some(0));
    }
}

#[tokio::test]
async fn after_a_crash_of_the_client_durable_mode_goes_on_where_it_was() {
    const COUNT: usize = 20;
    let webhook = Webhook::script([Answer::OK, Answer::ok_after(Duration::from_secs(60))]).await;
    let nats = NatsServer::with_stream().await;
    let Way { url, say, .. } = through(&nats, &[]).await;
    let mut scene = Scene::on(nats, Mode::Durable, webhook, &[("NATS_HOST", &url)]).await;
    for n in 0..COUNT {
        scene.publish(n.to_string()).await;
    }
    scene.webhook.received(2).await;
    say.send(KILLER).unwrap();
    scene.relay.logged("the NATS client crashed").await;
    for n in 0..COUNT {
        assert_eq!(scene.next().await.payload, n.to_string());
    }
    assert_eq!(scene.webhook.count(), COUNT + 1, "one was POSTed twice");
    assert_eq!(scene.relay.lines(" lost "), [""; 0]);
}

#[tokio::test]
async fn after_crashes_one_upon_another_the_relay_waits_longer_each_time() {
    let nats = NatsServer::start().await;
    // The first one crashes before the relay has begun to listen.
    let mut way = through(&nats, &[0, 1, 2, 3]).await;
    let changes = [("NATS_HOST", &way.url[..])];
    let mut scene = Scene::on(nats, Mode::Core, Webhook::ok().await, &changes).await;
    let mut accepted = Vec::new();
    while accepted.len() < 5 {
        accepted.push(way.accepted.recv().await.unwrap());
    }
    scene.relay.logged_times("the NATS client crashed", 4).await;
    assert_eq!(scene.relay.lines("the NATS client crashed").len(), 4);
    // Waits of 400 and 800 ms, half of each random.
    let waited = accepted[4] - accepted[2];
    assert!(waited > Duration::from_millis(600), "{waited:?}");
    relays_again(&mut scene).await;
}

#[tokio::test]
async fn a_client_that_crashes_while_the_relay_stops_is_not_followed_by_another() {
    let webhook = Webhook::script([Answer::ok_after(Duration::from_secs(60))]).await;
    let nats = NatsServer::start().await;
    let Way { url, say, .. } = through(&nats, &[]).await;
    let scene = Scene::on(nats, Mode::Core, webhook, &[("NATS_HOST", &url)]).await;
    scene.publish("x").await;
    scene.webhook.received(1).await;
    scene.relay.signal("TERM");
    scene.relay.logged("stopping: waiting").await;
    say.send(KILLER).unwrap();
    let (code, lines) = scene.relay.ended().await;
    assert_eq!(code, Some(0), "{lines:#?}");
    let connected = lines
        .iter()
        .filter(|line| line.contains("connected to NATS at"));
    assert_eq!(connected.count(), 1, "{lines:#?}");
}

#[tokio::test]
async fn core_mode_needs_no_more_than_one_subscription() {
    let nats = NatsServer::with_config("max_subscriptions: 1").await;
    let webhook = Webhook::ok().await;
    let relay = Relay::listening(&nats, &webhook, &[]).await;
    nats.publish("cms.cache.x", "x").await;
    relay.logged(" -> ").await;
}
