//! What its operators see: the endpoints against real states, and `--check`.

use std::{
    collections::HashMap,
    process::Stdio,
    time::{Duration, Instant},
};

use prometheus_parse::{Scrape, Value};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    Answer, Authority, Mode, NatsServer, PATIENCE, Relay, Scene, Webhook, check, next, publish_all,
    until, until_ok,
};

pub const STATUS: (&str, &str) = ("STATUS_LISTEN", "127.0.0.1:0");

/// The address that the relay says it listens on.
pub async fn address(relay: &Relay) -> String {
    let line = relay.logged("status on http://").await;
    let (_, rest) = line.split_once("http://").unwrap();
    rest.split('/').next().unwrap().to_owned()
}

/// Status and body of an answer.
pub async fn get(address: &str, path: &str) -> (u16, String) {
    let stream = TcpStream::connect(address).await.unwrap();
    ask(stream, "GET", path).await
}

async fn ask(mut stream: TcpStream, method: &str, path: &str) -> (u16, String) {
    let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = timeout(PATIENCE, stream.read_to_string(&mut answer));
    read.await.expect("an answer in time").unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

/// All metrics, by name and labels; of a histogram its count.
pub async fn metrics(address: &str) -> HashMap<String, f64> {
    let (status, body) = get(address, "/metrics").await;
    assert_eq!(status, 200);
    let scrape = Scrape::parse(body.lines().map(|line| Ok(line.to_owned()))).unwrap();
    let mut found = HashMap::new();
    for sample in scrape.samples {
        let mut labels: Vec<_> = sample
            .labels
            .iter()
            .map(|(k, v)| format!("{k}={v}"))
            .collect();
        labels.sort();
        let name = sample.metric.trim_start_matches("nats_webhook_relay_");
        let value = match sample.value {
            Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => value,
            Value::Histogram(buckets) => buckets.last().unwrap().count,
            Value::Summary(_) => unreachable!("there are no summaries"),
        };
        found.insert([vec![name.to_owned()], labels].concat().join(" "), value);
    }
    found
}

/// Waits until an endpoint answers with this status and text.
pub async fn until_answer(address: &str, path: &str, status: u16, text: &str) {
    until_ok(&format!("{path} answers {status} {text}"), async || {
        let answer = get(address, path).await;
        if answer.0 == status && answer.1.contains(text) {
            Ok(())
        } else {
            Err(answer)
        }
    })
    .await;
}

#[tokio::test]
async fn readiness_follows_the_connection() {
    let mut nats = NatsServer::start().await;
    nats.kill();
    let webhook = Webhook::ok().await;
    let relay = Relay::between(&nats, &webhook.url(), &[STATUS]);
    let address = address(&relay).await;
    assert_eq!(
        get(&address, "/readyz").await,
        (503, "not connected to NATS\n".to_owned())
    );
    assert_eq!(get(&address, "/livez").await, (200, "ok\n".to_owned()));
    nats.restart();
    until_answer(&address, "/readyz", 200, "ok").await;
    let before = metrics(&address).await;
    assert_eq!(
        (before["connected"], before["reconnects_total"]),
        (1.0, 0.0)
    );
    nats.kill();
    until_answer(&address, "/readyz", 503, "not connected to NATS").await;
    assert_eq!(metrics(&address).await["connected"], 0.0);
    nats.restart();
    until_answer(&address, "/readyz", 200, "ok").await;
    let after = metrics(&address).await;
    assert_eq!((after["connected"], after["reconnects_total"]), (1.0, 1.0));
    assert_eq!(get(&address, "/other").await.0, 404);
}

#[tokio::test]
async fn the_port_answers_who_takes_a_while() {
    let nats = NatsServer::start().await;
    let relay = Relay::between(&nats, "http://localhost:1", &[STATUS]);
    let address = address(&relay).await;
    let mut clients = Vec::new();
    for _ in 0..2 {
        clients.push(TcpStream::connect(&address).await.unwrap());
    }
    // By now all that connected before it have been accepted.
    assert_eq!(get(&address, "/livez").await.0, 200);
    for (stream, (method, text)) in clients.into_iter().zip([("GET", "ok\n"), ("HEAD", "")]) {
        let answer = ask(stream, method, "/livez").await;
        assert_eq!(answer, (200, text.to_owned()), "{method}");
    }
}

#[tokio::test]
async fn metrics_count_exactly_what_happened() {
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::start(|n, request| match (n, request.text().as_str()) {
        (1, _) | (_, "used up") => Answer::status(503),
        (_, "refused") => Answer::status(422),
        (_, "hangs") => Answer::Hang,
        _ => Answer::OK,
    })
    .await;
    let other = Webhook::ok().await;
    let urls = format!("{} {}", webhook.url(), other.url());
    let relay = Relay::between(&nats, &urls, &[STATUS, ("WEBHOOK_MAX_ATTEMPTS", "2")]);
    relay.logged("listening on").await;
    let address = address(&relay).await;
    for payload in [
        "one",
        "two",
        "refused",
        "used up",
        "three",
        "hangs",
        "waits",
        "waits too",
    ] {
        client.publish("cms.cache.x", payload.into()).await.unwrap();
    }
    for _ in 0..3 {
        next(&mut relayed).await;
    }
    // one, two twice, refused, used up twice, three, hangs
    webhook.received(8).await;
    until(
        "two messages wait behind the sixth, which one destination has",
        async || {
            let found = metrics(&address).await;
            let has_it = found["webhook_attempts_total destination=1 outcome=success"] == 6.0;
            has_it && (found["waiting_messages"], found["messages_received_total"]) == (2.0, 6.0)
        },
    )
    .await;
    let found = metrics(&address).await;
    for (name, expected) in [
        ("messages_received_total", 6.0),
        ("messages_relayed_total", 3.0),
        ("messages_given_up_total reason=refused", 1.0),
        ("messages_given_up_total reason=attempts_used", 1.0),
        ("messages_given_up_total reason=not_published", 0.0),
        ("messages_given_up_total reason=stopped", 0.0),
        ("messages_dropped_total", 0.0),
        ("publish_refused_total", 0.0),
        ("webhook_attempts_total destination=0 outcome=success", 3.0),
        (
            "webhook_attempts_total destination=0 outcome=temporary_failure",
            3.0,
        ),
        (
            "webhook_attempts_total destination=0 outcome=permanent_failure",
            1.0,
        ),
        ("webhook_attempts_total destination=1 outcome=success", 6.0),
        ("webhook_duration_seconds destination=0", 7.0),
        ("message_duration_seconds", 3.0),
        ("waiting_messages", 2.0),
        ("connected", 1.0),
        (
            concat!("build_info version=", env!("CARGO_PKG_VERSION")),
            1.0,
        ),
    ] {
        assert_eq!(found.get(name), Some(&expected), "{name}: {found:#?}");
    }
    let bytes = found["waiting_bytes"];
    assert!((30.0..2000.0).contains(&bytes), "{bytes}");
}

#[tokio::test]
async fn durable_mode_shows_what_waits_in_the_stream() {
    let scene = Scene::durable(Webhook::script([Answer::Hang]).await, &[STATUS]).await;
    let address = address(&scene.relay).await;
    scene.nats.publish("cms.cache.x", "in hand").await;
    scene.webhook.received(1).await;
    assert_eq!(metrics(&address).await["waiting_messages"], 0.0);
    for _ in 0..3 {
        scene.nats.publish("cms.cache.x", "waits").await;
    }
    until("three messages wait", async || {
        metrics(&address).await["waiting_messages"] == 3.0
    })
    .await;
}

#[tokio::test]
async fn the_age_of_the_current_message_counts_from_when_it_could_have_been_relayed() {
    const LONG: Duration = Duration::from_millis(500);
    for mode in [Mode::Core, Mode::Durable] {
        let nats = NatsServer::with_stream().await;
        if mode == Mode::Durable {
            publish_all(&nats.jetstream().await, 0..1).await;
        }
        let before = Instant::now();
        until("a message in the stream has waited for long", async || {
            before.elapsed() > LONG
        })
        .await;
        let webhook = Webhook::script([Answer::Hang]).await;
        let mut scene = Scene::on(
            nats,
            mode,
            webhook,
            &[STATUS, ("WEBHOOK_TIMEOUT", "1500ms")],
        )
        .await;
        let address = address(&scene.relay).await;
        let age = async || metrics(&address).await["current_message_age_seconds"];
        if mode == Mode::Core {
            assert_eq!(age().await, 0.0, "there is no message yet");
            scene.publish("x").await;
        }
        scene.webhook.received(1).await;
        let first = age().await;
        match mode {
            Mode::Core => assert!(first < (before.elapsed() - LONG).as_secs_f64(), "{first}"),
            Mode::Durable => assert!(
                (LONG.as_secs_f64()..PATIENCE.as_secs_f64()).contains(&first),
                "{first}"
            ),
        }
        until("the age grows", async || age().await > first + 0.1).await;
        scene.next().await;
        until("no message is worked on", async || age().await == 0.0).await;
    }
}

#[tokio::test]
async fn hostile_clients_of_the_port_hold_nothing_up() {
    let mut nats = NatsServer::start().await;
    nats.kill();
    let webhook = Webhook::script([Answer::OK, Answer::Hang]).await;
    let changes = [STATUS, ("SHUTDOWN_TIMEOUT", "10m")];
    let relay = Relay::between(&nats, &webhook.url(), &changes);
    let address = address(&relay).await;
    let mut endless = TcpStream::connect(&address).await.unwrap();
    let writing =
        tokio::spawn(async move { while endless.write_all(&[b'x'; 1 << 16]).await.is_ok() {} });
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum.map(|most| most.min(1 << 14));
    setrlimit(Resource::Nofile, limit).unwrap();
    let mut silent = Vec::new();
    let mut asked = Vec::new();
    for state in [
        "not connected",
        "subscribed",
        "a message is in hand",
        "stopping",
    ] {
        match state {
            "subscribed" => {
                nats.restart();
                relay.logged("listening on").await;
                nats.publish("cms.cache.x", "x").await;
                relay.logged(" -> ").await;
            }
            "a message is in hand" => {
                nats.publish("cms.cache.x", "x").await;
                webhook.received(2).await;
            }
            "stopping" => {
                relay.signal("TERM");
                relay.logged("stopping").await;
            }
            _ => {}
        }
        silent.clear();
        for n in 0..1000 {
            let connected = timeout(PATIENCE, TcpStream::connect(&address)).await;
            let mut stream = connected.expect("a connection in time").unwrap();
            if n % 2 == 0 {
                let beginning = b"GET /metrics HTTP/1.1\r\nx: ";
                stream.write_all(beginning).await.unwrap();
            }
            silent.push(stream);
        }
        let ready = if state == "not connected" { 503 } else { 200 };
        for (path, status) in [("/livez", 200), ("/metrics", 200), ("/readyz", ready)] {
            if (state, path) == ("stopping", "/readyz") {
                continue;
            }
            let start = Instant::now();
            assert_eq!(get(&address, path).await.0, status, "{path}, {state}");
            asked.push(start.elapsed());
        }
        #[cfg(target_os = "linux")]
        {
            let open = std::fs::read_dir(format!("/proc/{}/fd", relay.id())).unwrap();
            assert!(open.count() < 150, "few files are open");
        }
    }
    // Waiting for a silent client to be given up took seconds.
    assert!(
        asked.iter().all(|took| *took < Duration::from_secs(2)),
        "{asked:?}"
    );
    writing.abort();
}

#[tokio::test]
async fn an_address_that_cannot_be_listened_on_may_get_better() {
    let nats = NatsServer::start().await;
    let webhook = Webhook::ok().await;
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let in_use = taken.local_addr().unwrap().to_string();
    // One that no host has (RFC 5737), as that of a VPN before it is up.
    let missing = "192.0.2.1:9642".to_owned();
    for (address, mark) in [(in_use, "ok    "), (missing, "FAILED")] {
        let relay = Relay::between(&nats, &webhook.url(), &[("STATUS_LISTEN", &address)]);
        let (code, log) = relay.ended().await;
        assert_eq!(code, Some(1), "{log:#?}");
        let expected = format!("exiting: cannot listen on STATUS_LISTEN {address}: ");
        assert!(log.last().unwrap().contains(&expected), "{log:#?}");

        let (url, destination) = (nats.url(), webhook.url());
        let variables = [
            ("WEBHOOK_DESTINATION", &destination[..]),
            ("NATS_HOST", &url),
            ("NATS_SUBJECT_PREFIX", "cms.cache"),
            ("NATS_RELAYED_SUBJECT_PREFIX", "relayed.cache"),
            ("STATUS_LISTEN", &address),
        ];
        let (_, lines) = check(&variables).await;
        let expected = format!("{mark}  status port {address}: ");
        let found = lines.iter().any(|line| line.starts_with(&expected));
        assert!(found, "{expected}: {lines:#?}");
    }
}

#[tokio::test]
async fn check_says_what_holds_and_what_does_not() {
    const USERS: &str = "jetstream { store_dir: \"$DIR/jetstream\" }
        authorization { users = [
            { user: relay, password: good },
            { user: deaf, password: good, permissions: { subscribe: \"_INBOX.>\" } },
            { user: inboxless, password: good, permissions: { subscribe: \"cms.cache.>\" } },
            { user: blind, password: good, permissions: {
                publish: { deny: \"$JS.API.STREAM.MSG.GET.CMS\" } } }
        ] }
        no_auth_user: relay";
    let nats = NatsServer::with_config(USERS).await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    let webhook = Webhook::ok().await;
    let (url, destination) = (nats.url(), webhook.url());
    let good = [
        ("WEBHOOK_DESTINATION", &destination[..]),
        ("NATS_HOST", &url),
        ("NATS_SUBJECT_PREFIX", "cms.cache"),
        ("NATS_RELAYED_SUBJECT_PREFIX", "relayed.cache"),
        ("NATS_USER", "relay"),
        ("NATS_PASS", "good"),
    ];
    let with = |changes: &[(&'static str, &'static str)]| [&good[..], changes].concat();

    let (code, lines) = check(&good).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    assert_eq!(
        lines,
        [
            "ok      configuration: valid".to_owned(),
            format!("ok      NATS {url}: connected, the login is accepted"),
            "ok      subscription to cms.cache.>: permitted".to_owned(),
            format!("ok      destination {destination}: reachable"),
        ]
    );
    assert_eq!(webhook.count(), 0, "no request is sent");

    let durable = [("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay")];
    let (code, lines) = check(&with(&durable)).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    assert!(
        lines[2].contains(
            "consumer relay of the stream CMS: does not exist yet; will be created on start"
        ),
        "{lines:#?}"
    );
    let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
    assert!(
        stream.consumer_info("relay").await.is_err(),
        "nothing is created"
    );
    Relay::durable(&nats, &webhook, &[]).await;
    let (code, lines) = check(&with(&durable)).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    assert!(
        lines[2].contains("exists and is configured correctly; no message waits"),
        "{lines:#?}"
    );
    assert_eq!(lines[3], "ok      messages of the stream CMS: readable");
    nats.publish("cms.cache.x", "x").await;
    let blind = [&durable[..], &[("NATS_USER", "blind")]].concat();
    let (code, lines) = check(&with(&blind)).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    assert!(
        lines[2].ends_with("waiting: 1 message, handed out 0 times"),
        "without its age, which this user may not look up: {lines:#?}"
    );
    let unreadable = "FAILED  messages of the stream CMS: no permission to publish on";
    assert!(lines[3].starts_with(unreadable), "{lines:#?}");

    for (changes, failures) in [
        (
            &[("NATS_PASS", "bad")][..],
            &["refused the login (authorization violation); check NATS_USER and NATS_PASS"][..],
        ),
        (
            &[("NATS_USER", "deaf")],
            &["no permission to subscribe to cms.cache.>"],
        ),
        (
            &[
                ("NATS_USER", "inboxless"),
                ("NATS_STREAM", "CMS"),
                ("NATS_CONSUMER", "x"),
            ],
            &["no permission to subscribe to _INBOX.>, where NATS answers"],
        ),
        (
            &[
                ("NATS_USER", "blind"),
                ("NATS_STREAM", "CMS"),
                ("NATS_CONSUMER", "x"),
            ],
            &["no permission to publish on $JS.API.STREAM.MSG.GET.CMS, by which"],
        ),
        (
            &[("NATS_STREAM", "OTHER"), ("NATS_CONSUMER", "x")],
            &["there is no stream OTHER"],
        ),
        (
            &[("NATS_HOST", "nats://127.0.0.1:1,nats://x.invalid")],
            &[
                "nats://127.0.0.1:1: Connection refused (os error 111)",
                "DNS error",
            ],
        ),
        (
            &[(
                "WEBHOOK_DESTINATION",
                "http://127.0.0.1:1/?hunter2 http://x.invalid/",
            )],
            &[
                "127.0.0.1:1/: cannot connect: Connection refused",
                "x.invalid/: its name does not resolve",
            ],
        ),
    ] {
        let (code, lines) = check(&with(changes)).await;
        assert_eq!(code, Some(1), "{lines:#?}");
        let failed: Vec<_> = lines
            .iter()
            .filter(|line| line.starts_with("FAILED"))
            .collect();
        assert_eq!(failed.len(), failures.len(), "{lines:#?}");
        for (line, failure) in failed.iter().zip(failures) {
            assert!(
                line.contains(failure) && !line.contains("hunter2"),
                "{lines:#?}"
            );
            let reasons: Vec<_> = line.split(": ").collect();
            assert!(
                reasons.windows(2).all(|pair| pair[0] != pair[1]),
                "a reason twice: {line}"
            );
        }
    }

    let (code, lines) = check(&with(&[("WEBHOOK_TIMEOUTS", "15s")])).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    assert_eq!(
        lines[0],
        "warning WEBHOOK_TIMEOUTS is set but not known; did you mean WEBHOOK_TIMEOUT?"
    );

    let (code, lines) = check(&with(&[("WEBHOOK_TIMEOUT", "15"), ("LOG_FORMAT", "yaml")])).await;
    assert_eq!(code, Some(78), "{lines:#?}");
    assert_eq!(lines.len(), 3, "{lines:#?}");

    let (code, lines) = check(&with(&[
        ("SSL_CERT_FILE", "/nowhere.pem"),
        ("WEBHOOK_DESTINATION", "https://127.0.0.1:1/"),
    ]))
    .await;
    assert_eq!(code, Some(78), "{lines:#?}");
    assert!(
        lines[1].starts_with("FAILED  configuration: SSL_CERT_FILE names"),
        "{lines:#?}"
    );
}

#[tokio::test]
async fn check_prints_each_line_when_it_knows_it() {
    let nats = NatsServer::start().await;
    // A server that says nothing keeps the check waiting.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hosts = format!("{},nats://{}", nats.url(), silent.local_addr().unwrap());
    let mut process = tokio::process::Command::new(Relay::program())
        .arg("--check")
        .env_clear()
        .envs([
            ("WEBHOOK_DESTINATION", "http://127.0.0.1:1/"),
            ("NATS_HOST", &hosts),
            ("NATS_SUBJECT_PREFIX", "cms.cache"),
            ("NATS_RELAYED_SUBJECT_PREFIX", "relayed.cache"),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let expected = format!("NATS {}: connected", nats.url());
    while !lines
        .next_line()
        .await
        .unwrap()
        .unwrap()
        .contains(&expected)
    {}
    let next_line = tokio::time::timeout(Duration::from_millis(200), lines.next_line()).await;
    assert!(
        next_line.is_err(),
        "it was printed together with {next_line:?}"
    );
}

#[tokio::test]
async fn check_looks_at_certificates() {
    let nats = NatsServer::start().await;
    let (authority, another) = (Authority::new(), Authority::new());
    let webhook = Webhook::https(authority.acceptor()).await;
    let (url, destination) = (nats.url(), webhook.url().replace("http:", "https:"));
    let (ca, other) = (authority.ca(), another.ca());
    let mut variables = [
        ("WEBHOOK_DESTINATION", &destination[..]),
        ("NATS_HOST", &url),
        ("NATS_SUBJECT_PREFIX", "cms.cache"),
        ("NATS_RELAYED_SUBJECT_PREFIX", "relayed.cache"),
        ("SSL_CERT_FILE", &ca),
    ];
    let (code, lines) = check(&variables).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    variables[4].1 = &other;
    let (code, lines) = check(&variables).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    assert!(
        lines
            .last()
            .unwrap()
            .contains("TLS failed: its certificate is signed by a CA that is not trusted"),
        "{lines:#?}"
    );
}
