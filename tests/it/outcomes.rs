//! Whatever a destination does: success, another attempt, or given up.

use std::{
    collections::HashSet,
    sync::Mutex,
    time::{Duration, Instant},
};

use async_nats::HeaderMap;
use tokio::net::TcpListener;

use crate::support::{Answer, Authority, NatsServer, Received, Relay, Scene, Webhook, next};

/// One message that meets the webhook.
impl Scene {
    async fn script(answers: impl Into<Vec<Answer>>, changes: &[(&str, &str)]) -> Self {
        let scene = Self::core(Webhook::script(answers).await, changes).await;
        scene.publish("first").await;
        scene
    }

    /// The first message is relayed; all requests that it took.
    async fn relayed(&mut self) -> Vec<Received> {
        assert_eq!(self.next().await.payload, "first");
        self.webhook.requests()
    }

    /// The first message is given up with a log line that has this reason, and the next one is
    /// relayed; all requests that the first one took.
    async fn given_up(&mut self, reason: &str) -> Vec<Received> {
        let line = self.relay.logged("cms.cache.x is not relayed: ").await;
        assert!(line.contains(reason) && line.contains("ERROR"), "{line}");
        self.publish("second").await;
        assert_eq!(self.next().await.payload, "second");
        let mut requests = self.webhook.requests();
        assert_eq!(requests.pop().unwrap().text(), "second");
        requests
    }
}

#[tokio::test]
async fn any_2xx_is_success() {
    for status in [200, 202, 204, 299] {
        let mut scene = Scene::script([Answer::status(status)], &[]).await;
        assert_eq!(scene.relayed().await.len(), 1, "{status}");
    }
}

#[tokio::test]
async fn temporary_answers_are_tried_again_with_the_same_message_and_id() {
    let statuses = [408, 425, 429, 500, 503, 599];
    for pair in statuses.chunks(2) {
        let answers: Vec<_> = pair.iter().copied().map(Answer::status).collect();
        let mut scene = Scene::script(answers, &[]).await;
        let requests = scene.relayed().await;
        assert_eq!(requests.len(), 3, "{pair:?}");
        for request in &requests {
            assert_eq!(request.text(), "first");
            assert_eq!(
                request.header("webhook-id"),
                requests[0].header("webhook-id")
            );
        }
        let waits: Vec<_> = requests
            .windows(2)
            .map(|pair| pair[1].at - pair[0].at)
            .collect();
        assert!(waits[0] >= Duration::from_millis(125), "{waits:?}");
        assert!(waits[1] >= Duration::from_millis(250), "{waits:?}");
        for (n, status) in pair.iter().enumerate() {
            let line = scene
                .relay
                .logged(&format!("attempt {}: answered {status}", n + 1))
                .await;
            assert!(
                line.contains("WARN") && line.contains("next attempt in "),
                "{line}"
            );
        }
        let line = scene.relay.logged(" -> ").await;
        assert!(line.contains("after 3 attempts"), "{line}");
    }
}

#[tokio::test]
async fn what_is_no_answer_is_tried_again() {
    for (answer, reason) in [
        (Answer::Close, "no valid answer: "),
        (Answer::Hang, "no answer within 1s"),
        (
            Answer::Raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec()),
            "no valid answer: ",
        ),
        (
            Answer::Raw(b"HTTP/1.1 200 OK\r\n".to_vec()),
            "no answer within 1s",
        ),
        (
            Answer::Endless(b"HTTP/1.1 200 OK\r\nx: ".to_vec()),
            "no valid answer: ",
        ),
        (
            Answer::Raw(b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n".to_vec()),
            "answered 999",
        ),
    ] {
        let mut scene = Scene::script([answer.clone()], &[("WEBHOOK_TIMEOUT", "1s")]).await;
        assert_eq!(scene.relayed().await.len(), 2, "{answer:?}");
        let line = scene.relay.logged("attempt 1: ").await;
        assert!(line.contains(reason), "{line}");
    }
}

#[tokio::test]
async fn what_is_no_answer_counts_on_a_connection_that_was_good_before_too() {
    let nonsense = Answer::Raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec());
    let mut scene = Scene::script([Answer::OK, nonsense], &[]).await;
    scene.relayed().await;
    scene.publish("second").await;
    assert_eq!(scene.next().await.payload, "second");
    scene.relay.logged("attempt 1: no valid answer: ").await;
    let requests = scene.webhook.requests();
    assert_eq!((requests.len(), requests[1].connection), (3, 0));
}

#[tokio::test]
async fn a_front_end_that_is_not_up_yet_is_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let relay = Relay::between(&nats, &format!("http://{address}/"), &[]);
    relay.logged("listening on").await;
    client.publish("cms.cache.x", "first".into()).await.unwrap();
    let line = relay.logged("attempt 1: ").await;
    assert!(
        line.contains(&format!("cannot connect to {address}: Connection refused")),
        "{line}"
    );
    let _webhook = Webhook::on(TcpListener::bind(address).await.unwrap(), |_, _| Answer::OK);
    assert_eq!(next(&mut relayed).await.payload, "first");
}

#[tokio::test]
async fn names_that_do_not_resolve_and_tls_where_there_is_none_are_tried_again() {
    let webhook = Webhook::ok().await;
    let authority = Authority::new();
    for (destination, reason) in [
        (
            "http://nowhere.invalid/".to_owned(),
            "cannot connect to nowhere.invalid:80: failed to lookup address",
        ),
        (
            webhook.url().replace("http", "https"),
            "it does not speak TLS there; check scheme, host and port",
        ),
    ] {
        let nats = NatsServer::start().await;
        let variables = [
            ("SSL_CERT_FILE", &authority.ca()[..]),
            ("WEBHOOK_MAX_ATTEMPTS", "2"),
        ];
        let relay = Relay::between(&nats, &destination, &variables);
        relay.logged("listening on").await;
        nats.publish("cms.cache.x", "first").await;
        let line = relay.logged("attempt 1: ").await;
        assert!(line.contains(reason), "{line}");
        relay
            .logged("is not relayed: gave up after 2 attempts")
            .await;
    }
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let head = "503 Busy\r\nretry-after: 1";
    let mut scene = Scene::script([Answer::full(head, "")], &[]).await;
    let requests = scene.relayed().await;
    let wait = requests[1].at - requests[0].at;
    assert!(wait >= Duration::from_secs(1), "{wait:?}");
}

#[tokio::test]
async fn what_is_not_the_message_s_fault_is_tried_again_with_a_hint() {
    for (head, body, reason) in [
        (
            "401 Unauthorized",
            "wrong\r\n \x1b[31msecret",
            "answered 401 Unauthorized: wrong    [31msecret; check the secret on both sides",
        ),
        ("403 Forbidden", "", "; check the secret on both sides"),
        (
            "404 Not Found",
            "404 page not found\n",
            "answered 404 Not Found: 404 page not found; check the path in WEBHOOK_DESTINATION",
        ),
        ("405 Method Not Allowed", "", "; check the path"),
        ("407 Proxy Authentication Required", "", "; check the login"),
        ("421 Misdirected Request", "", "; check the host"),
        (
            "503 Busy",
            "WEBHOOK_SECRET is not set",
            "answered 503 Service Unavailable: WEBHOOK_SECRET is not set",
        ),
        (
            "308 Moved\r\nlocation: /hook/?token=hunter2",
            "",
            "/hook/; redirects are not followed; set WEBHOOK_DESTINATION to it",
        ),
        (
            "307 Moved\r\nlocation: https://u:hunter2@id.example/login",
            "",
            "to https://id.example/login; it requires a login",
        ),
        (
            "304 Not Modified",
            "",
            "answered 304 Not Modified; redirects",
        ),
    ] {
        let mut scene = Scene::script([Answer::full(head, body)], &[]).await;
        assert_eq!(scene.relayed().await.len(), 2, "{head}");
        let line = scene.relay.logged("attempt 1: ").await;
        assert!(line.contains(reason) && line.contains("WARN"), "{line}");
        assert_eq!(scene.relay.lines("hunter2"), [""; 0]);
        assert_eq!(scene.relay.lines("\x1b"), [""; 0]);
    }
}

#[tokio::test]
async fn what_is_the_message_s_fault_is_final_and_logged_with_what_was_said() {
    for status in [400, 409, 413, 415, 422] {
        let mut scene = Scene::script([Answer::status(status)], &[]).await;
        let reason = format!("answered {status} ");
        assert_eq!(scene.given_up(&reason).await.len(), 1, "{status}");
    }
    let endless = [b"HTTP/1.1 400 Bad\r\n\r\n".to_vec(), vec![b'x'; 1 << 20]].concat();
    let mut scene = Scene::script([Answer::Endless(endless)], &[]).await;
    scene.given_up("answered 400 Bad Request: xxx").await;
    assert!(scene.relay.logged("answered 400").await.len() < 500);
}

#[tokio::test]
async fn who_knows_better_says_what_is_given_up_on() {
    for (statuses, status, gives_up) in [
        ("404 3xx", 404, true),
        ("404 3xx", 302, true),
        ("404 3xx", 422, false),
        ("5xx", 503, true),
        ("none", 400, false),
    ] {
        let changes = [("WEBHOOK_GIVE_UP_ON", statuses)];
        let mut scene = Scene::script([Answer::status(status)], &changes).await;
        match gives_up {
            true => assert_eq!(scene.given_up("answered").await.len(), 1),
            false => assert_eq!(scene.relayed().await.len(), 2),
        }
    }
}

#[tokio::test]
async fn a_page_for_people_is_a_success_and_warned_of_once() {
    let page = Answer::full("200 OK\r\ncontent-type: text/html; charset=utf-8", "<h1>");
    let mut scene = Scene::script([page.clone(), page], &[]).await;
    scene.relayed().await;
    scene.publish("second").await;
    assert_eq!(scene.next().await.payload, "second");
    scene.publish("third").await;
    assert_eq!(scene.next().await.payload, "third");
    scene.relay.logged("with an HTML page").await;
    let lines = scene.relay.lines("with an HTML page");
    assert_eq!(lines.len(), 1, "{lines:#?}");
    let destination = scene.webhook.url();
    assert!(
        lines[0].contains("WARN") && lines[0].contains(&destination),
        "{lines:#?}"
    );
}

#[tokio::test]
async fn what_was_said_is_logged_also_if_it_does_not_end() {
    let answer = "HTTP/1.1 422 No\r\ncontent-length: 1000\r\n\r\nno such tag";
    let answers = [Answer::Raw(answer.into())];
    let mut scene = Scene::script(answers, &[("WEBHOOK_TIMEOUT", "300ms")]).await;
    scene
        .given_up("answered 422 Unprocessable Entity: no such tag")
        .await;
}

#[tokio::test]
async fn attempts_are_used_up_and_then_the_next_message_has_its_turn() {
    let variables = [("WEBHOOK_MAX_ATTEMPTS", "3")];
    let answers = [500, 502, 503].map(Answer::status);
    let mut scene = Scene::script(answers, &variables).await;
    let reason = "gave up after 3 attempts: answered 503";
    assert_eq!(scene.given_up(reason).await.len(), 3);
}

#[tokio::test]
async fn core_mode_publishes_what_is_given_up_as_well() {
    let webhook = Webhook::script([Answer::Close, Answer::Close]).await;
    let changes = [
        ("NATS_FAILED_SUBJECT_PREFIX", "failed"),
        ("WEBHOOK_MAX_ATTEMPTS", "2"),
    ];
    let scene = Scene::core(webhook, &changes).await;
    let mut failed = scene.client.subscribe("failed.>").await.unwrap();
    let mut own = HeaderMap::new();
    own.insert("X-Own", "kept");
    scene
        .client
        .publish_with_headers("cms.cache.x", own, "x".into())
        .await
        .unwrap();
    let message = next(&mut failed).await;
    assert_eq!(message.subject.as_str(), "failed.x");
    let headers = message.headers.unwrap();
    assert_eq!(headers.get("X-Own").unwrap().as_str(), "kept");
    assert_eq!(headers.get("Relay-Attempts").unwrap().as_str(), "2");
    assert_eq!(headers.get("Relay-Status"), None);
}

#[tokio::test]
async fn an_answer_s_body_is_read_a_little_and_waited_for_no_longer_than_a_second() {
    // A short body leaves the connection usable, an endless or late one must not hold us up.
    let mut scene = Scene::script([Answer::full("200 OK", "revalidated")], &[]).await;
    scene.relayed().await;
    scene.publish("second").await;
    assert_eq!(scene.webhook.received(2).await[1].connection, 0);

    let endless = [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b'x'; 1 << 20]].concat();
    for answer in [
        Answer::Endless(endless),
        Answer::Raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nlate".to_vec()),
    ] {
        let start = Instant::now();
        let mut scene = Scene::script([answer.clone()], &[]).await;
        assert_eq!(scene.relayed().await.len(), 1, "{answer:?}");
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "not for the timeout of 15 s"
        );
        // On another connection, as the first one is still busy with that answer.
        scene.publish("second").await;
        assert_eq!(scene.webhook.received(2).await[1].connection, 1);
    }
}

#[tokio::test]
async fn a_connection_that_the_front_end_closed_meanwhile_costs_no_message() {
    let closing = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".to_vec();
    let mut scene = Scene::script([Answer::Raw(closing), Answer::OK], &[]).await;
    scene.relayed().await;
    scene.publish("second").await;
    assert_eq!(scene.next().await.payload, "second");
    assert_eq!(scene.webhook.requests()[1].connection, 1);
    assert_eq!(scene.relay.lines("WARN"), [""; 0]);
}

#[tokio::test]
async fn a_connection_that_died_while_it_was_idle_uses_up_no_attempt() {
    const COUNT: usize = 10;
    // Each connection is closed when the second request comes on it.
    let used = Mutex::new(HashSet::new());
    let webhook =
        Webhook::start(
            move |_, request| match used.lock().unwrap().insert(request.connection) {
                true => Answer::OK,
                false => Answer::Close,
            },
        )
        .await;
    let mut scene = Scene::core(webhook, &[("WEBHOOK_MAX_ATTEMPTS", "1")]).await;
    for n in 0..COUNT {
        scene.publish(n.to_string()).await;
    }
    for n in 0..COUNT {
        assert_eq!(scene.next().await.payload, n.to_string());
    }
    assert_eq!(scene.relay.lines("is not relayed"), [""; 0]);
    assert_eq!(scene.relay.lines("attempts"), [""; 0], "it counts as none");
}

#[tokio::test]
async fn what_a_webhook_quotes_of_the_relay_s_secrets_goes_nowhere() {
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut failed = client.subscribe("failed.>").await.unwrap();
    let webhook = Webhook::start(|n, request| {
        let quoted: Vec<_> = ["authorization", "x-key"]
            .iter()
            .filter_map(|name| request.header(name))
            .chain([&request.line[..]])
            .collect();
        let quoted = quoted.join(" ");
        match n {
            0 => Answer::full("403 No", &quoted),
            3 => Answer::full("400 No", &format!("{}hunter2-too", "x".repeat(194))),
            4 => {
                let head = "HTTP/1.1 400 No\r\ncontent-length: 9999\r\n\r\n";
                Answer::Raw(format!("{head}{}", "abcdefgh".repeat(70)).into())
            }
            1 => Answer::full("302 Found\r\nlocation: /hunter2/x?y=hunter2", ""),
            _ => Answer::full("302 Found\r\nlocation: mailto:hunter2@example.com", ""),
        }
    })
    .await;
    let destination = format!(
        "http://user:hunter2@{}/hook?token=hunter2",
        webhook.address()
    );
    let variables = [
        ("NATS_FAILED_SUBJECT_PREFIX", "failed"),
        ("WEBHOOK_HEADER_X_KEY", "hunter2-too"),
        ("WEBHOOK_HEADER_X_LONG", &"abcdefgh".repeat(50)),
        ("WEBHOOK_MAX_ATTEMPTS", "1"),
    ];
    let relay = Relay::between(&nats, &destination, &variables);
    relay.logged("listening on").await;
    for (payload, reason) in [
        (
            "quoted",
            "answered 403 Forbidden: Basic *** *** POST /hook?*** HTTP/1.1",
        ),
        ("in the path", "/***/x; redirects are not followed"),
        ("opaque", "answered 302 Found; redirects"),
        ("at the cut of the excerpt", "xxx***"),
        ("at the cut of the body", "answered 400 Bad Request"),
    ] {
        client.publish("cms.cache.x", payload.into()).await.unwrap();
        let headers = next(&mut failed).await.headers.unwrap();
        let error = headers.get("Relay-Error").unwrap().as_str();
        assert!(error.contains(reason), "{payload}: {error}");
    }
    assert_eq!(relay.lines("hunt"), [""; 0]);
    assert_eq!(relay.lines("abcd"), [""; 0]);
}
