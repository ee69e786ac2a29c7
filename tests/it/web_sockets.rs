//! NATS over web sockets, with and without TLS.

use std::time::{Duration, Instant};

use async_nats::ConnectOptions;

use crate::support::{
    Authority, Mode, NatsServer, Relay, Scene, Webhook, free_address, next, until,
};

const JETSTREAM: &str = "jetstream { store_dir: \"$DIR/jetstream\" }";

/// A server that also listens for web sockets, with further settings for these and for itself; and the
/// address of the web sockets.
async fn server(web_socket: &str, more: &str) -> (NatsServer, String) {
    let address = free_address();
    let config = format!("{more}\nwebsocket {{ listen: \"{address}\", {web_socket} }}");
    (NatsServer::with_config(&config).await, address.to_string())
}

async fn accepted(nats: &NatsServer, variables: &[(&str, &str)]) {
    let webhook = Webhook::ok().await;
    Relay::listening(nats, &webhook, variables).await;
    let (code, report) = Relay::check(nats, &webhook, variables).await;
    assert_eq!(code, Some(0), "{report:#?}");
}

/// It never connects, and says why, in the log and in the report.
async fn failed(nats: &NatsServer, variables: &[(&str, &str)], reason: &str) {
    let webhook = Webhook::ok().await;
    let relay = Relay::between(nats, &webhook.url(), variables);
    let line = relay.logged("cannot connect to NATS").await;
    assert!(line.contains(reason), "{line}");
    let (code, report) = Relay::check(nats, &webhook, variables).await;
    assert_eq!(code, Some(1), "{report:#?}");
    assert!(
        report.iter().any(|line| line.contains(reason)),
        "{report:#?}"
    );
    assert_eq!(relay.lines("connected to NATS at"), [""; 0]);
}

#[tokio::test]
async fn a_relay_on_a_web_socket_relays_as_on_any_other_connection() {
    for mode in [Mode::Core, Mode::Durable] {
        let (nats, address) = server("no_tls: true", JETSTREAM).await;
        nats.create_stream("CMS", "cms.cache.>", 1).await;
        nats.create_stream("RELAYED", "relayed.>", 1).await;
        let url = format!("ws://{address}");
        let variables = [("NATS_HOST", &url[..]), ("NATS_RELAYED_STREAM", "RELAYED")];
        let mut scene = Scene::on(nats, mode, Webhook::ok().await, &variables).await;
        let connected = scene.relay.lines("connected to NATS at");
        assert!(connected[0].ends_with(&url), "{connected:?}");
        // As much as the server takes, and nothing at all.
        let payloads = ["x".repeat(1_000_000), String::new(), "small".to_owned()];
        for payload in &payloads {
            scene.publish(payload.clone()).await;
        }
        for payload in &payloads {
            assert_eq!(scene.next().await.payload, payload);
        }
        // It comes back after the server has been away.
        scene.nats.kill();
        scene.relay.logged("lost the connection to NATS").await;
        scene.nats.restart();
        scene.relay.logged_times("connected to NATS at", 2).await;
        let client = scene.nats.client().await;
        let mut relayed = client.subscribe("relayed.>").await.unwrap();
        client.flush().await.unwrap();
        until("it relays again", async || {
            scene.nats.publish("cms.cache.x", "again").await;
            scene.relay.lines(" -> ").len() > payloads.len()
        })
        .await;
        // What the server had no time to note as acked may come first.
        while next(&mut relayed).await.payload != "again" {}
        let variables = [&variables[..], &durable(mode)].concat();
        let (code, report) = Relay::check(&scene.nats, &scene.webhook, &variables).await;
        assert_eq!(code, Some(0), "{report:#?}");
        let connected = format!("ok      NATS {url}: connected");
        assert!(
            report.iter().any(|line| line.starts_with(&connected)),
            "{report:#?}"
        );
    }
}

fn durable(mode: Mode) -> Vec<(&'static str, &'static str)> {
    match mode {
        Mode::Core => Vec::new(),
        Mode::Durable => vec![("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay")],
    }
}

#[tokio::test]
async fn no_message_waits_for_the_delayed_acknowledgement_of_the_one_before() {
    const COUNT: usize = 100;
    let (nats, address) = server("no_tls: true", JETSTREAM).await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    let url = format!("ws://{address}");
    let host = [("NATS_HOST", &url[..])];
    let mut scene = Scene::on(nats, Mode::Durable, Webhook::ok().await, &host).await;
    let start = Instant::now();
    for _ in 0..COUNT {
        scene.publish("x").await;
        scene.next().await;
    }
    let took = start.elapsed();
    assert!(took < Duration::from_secs(2), "40 ms for each: {took:?}");
}

#[tokio::test]
async fn tls_with_a_private_ca() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue("server");
    let tls = format!("tls {{ cert_file: \"{certificate}\", key_file: \"{key}\" }}");
    let (nats, address) = server(&tls, "").await;
    let (url, ca) = (format!("wss://{address}"), authority.ca());
    let host = ("NATS_HOST", &url[..]);
    for variables in [
        &[("NATS_CA", &ca[..])][..],
        &[("SSL_CERT_FILE", &ca)],
        &[("NATS_CA", &ca), ("NATS_TLS_FIRST", "true")],
    ] {
        accepted(&nats, &[&[host], variables].concat()).await;
    }
    let other = Authority::new();
    let untrusted = "signed by a CA that is not trusted; name the PEM file of that CA in NATS_CA";
    failed(&nats, &[host], untrusted).await;
    failed(&nats, &[host, ("NATS_CA", &other.ca())], untrusted).await;
    let plain = url.replace("wss:", "ws:");
    failed(&nats, &[("NATS_HOST", &plain)], "got status code 400").await;
}

#[tokio::test]
async fn tls_with_a_client_certificate() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (certificate, key) = authority.issue("server");
    let ca = authority.ca();
    let tls = format!(
        "tls {{ cert_file: \"{certificate}\", key_file: \"{key}\", ca_file: \"{ca}\", verify: true }}"
    );
    let (nats, address) = server(&tls, "").await;
    let url = format!("wss://{address}");
    let variables = [("NATS_HOST", &url[..]), ("NATS_CA", &ca)];
    let with = |certificate: &(String, String)| {
        let (certificate, key) = certificate.clone();
        [("NATS_CERT", certificate), ("NATS_KEY", key)]
    };
    let own = with(&authority.issue("relay"));
    let own: Vec<_> = own.iter().map(|(name, path)| (*name, &path[..])).collect();
    accepted(&nats, &[&variables[..], &own].concat()).await;
    // Servers differ in what they call it.
    failed(&nats, &variables, "").await;
    let wrong = with(&other.issue("relay"));
    let wrong: Vec<_> = wrong
        .iter()
        .map(|(name, path)| (*name, &path[..]))
        .collect();
    failed(&nats, &[&variables[..], &wrong].concat(), "").await;
}

#[tokio::test]
async fn whoever_confuses_ports_is_told() {
    let (nats, address) = server("no_tls: true", "").await;
    for (url, reason) in [
        (
            nats.url().replace("nats:", "ws:"),
            "it does not speak HTTP there, and so has no web socket; check host and port, or write nats://",
        ),
        (
            format!("wss://{address}"),
            "it does not speak TLS there; check scheme, host and port",
        ),
        (format!("ws://{}", free_address()), "Connection refused"),
    ] {
        failed(&nats, &[("NATS_HOST", &url)], reason).await;
    }
}

#[tokio::test]
async fn a_list_may_hold_servers_of_all_kinds() {
    let (nats, address) = server("no_tls: true", "").await;
    for list in [
        format!("ws://{}, {}", free_address(), nats.url()),
        format!("nats://{}, ws://{address}", free_address()),
    ] {
        let webhook = Webhook::ok().await;
        let relay = Relay::listening(&nats, &webhook, &[("NATS_HOST", &list)]).await;
        let (first, second) = list.split_once(", ").unwrap();
        let line = relay.logged("cannot connect to NATS").await;
        assert!(
            line.contains(&format!("at {first}: Connection refused")),
            "{line}"
        );
        relay
            .logged(&format!("connected to NATS at {second}"))
            .await;
    }
}

#[tokio::test]
async fn a_cluster_sends_nobody_to_where_no_web_socket_is() {
    let routes = [free_address(), free_address()];
    let cluster = |own: usize| {
        format!(
            "server_name: n{own}
             cluster {{ name: c, listen: \"{}\", routes: [ \"nats://{}\", \"nats://{}\" ] }}",
            routes[own], routes[0], routes[1]
        )
    };
    let (mut first, address) = server("no_tls: true", &cluster(0)).await;
    let (second, other) = server("no_tls: true", &cluster(1)).await;
    // A server tells whoever connects of those that it knows.
    until("the servers know each other", async || {
        let client = first.client().await;
        client.server_info().connect_urls.len() > 1
    })
    .await;
    let (url, list) = (
        format!("ws://{address}"),
        format!("ws://{address},ws://{other}"),
    );
    let webhook = Webhook::ok().await;
    let alone = Relay::listening(&first, &webhook, &[("NATS_HOST", &url)]).await;
    let both = Relay::listening(&first, &webhook, &[("NATS_HOST", &list)]).await;
    first.kill();
    both.logged(&format!("connected to NATS at ws://{other}"))
        .await;
    second.publish("cms.cache.x", "x").await;
    both.logged(" -> ").await;
    let lines = alone.logged_times("cannot connect to NATS", 4).await;
    assert!(lines.iter().all(|line| line.contains(&url)), "{lines:#?}");
}

#[tokio::test]
async fn a_login_works_and_no_secret_is_logged() {
    let users = "authorization { user: relay, password: hunter2 }";
    let (nats, address) = server("no_tls: true", users).await;
    let url = format!("ws://{address}/?key=hunter2");
    let login = [("NATS_USER", "relay"), ("NATS_PASS", "hunter2")];
    let trace = [("NATS_HOST", &url[..]), ("RUST_LOG", "trace")];
    let variables = [&trace[..], &login].concat();
    let webhook = Webhook::ok().await;
    let relay = Relay::listening(&nats, &webhook, &variables).await;
    let options = ConnectOptions::with_user_and_password("relay".into(), "hunter2".into());
    let client = nats.client_with(options).await;
    client.publish("cms.cache.x", "x".into()).await.unwrap();
    relay.logged(" -> ").await;
    relay.signal("TERM");
    let (_, mut log) = relay.ended().await;
    let (_, report) = Relay::check(&nats, &webhook, &variables).await;
    log.extend(report);
    let wrong = [("NATS_PASS", "hunter23")];
    let (code, refused) = Relay::between(&nats, &webhook.url(), &[&variables[..], &wrong].concat())
        .ended()
        .await;
    assert_eq!(code, Some(1), "{refused:#?}");
    let last = refused.last().unwrap();
    assert!(
        last.contains(&format!("NATS at ws://{address} refused the login")),
        "{last}"
    );
    for line in log.iter().chain(&refused) {
        assert!(!line.contains("hunter2"), "{line}");
    }
}
