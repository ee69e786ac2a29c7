//! What receivers expect: several of them, headers, signatures, a delay, TLS.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_nats::HeaderMap;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use crate::support::{Answer, Authority, NatsServer, Relay, Scene, Webhook, check, next, usual};

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
    let urls = [slow.url(), failing.url(), quick.url()].join(" and ");
    let line =
        format!("listening on cms.cache.>; POST to {urls}, then republish on relayed.cache.>");
    relay.logged(&line).await;
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
    assert!(line.contains("(200, 204 after 3 attempts, 200, "), "{line}");
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
    let refusing = Webhook::script([Answer::status(422)]).await;
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
        format!("{}: answered 422 Unprocessable Entity", refusing.url())
    );
    assert_eq!(next(&mut relayed).await.payload, "second");
    assert_eq!(
        failing.bodies(),
        ["first", "first", "second"],
        "the other came to its end first"
    );
}

#[tokio::test]
async fn a_slow_cache_handler_gets_its_delay() {
    let delay = [("REPUBLISH_DELAY", "300ms")];
    let mut scene = Scene::core(Webhook::ok().await, &delay).await;
    scene.publish("x").await;
    scene.next().await;
    let waited = scene.webhook.requests()[0].answered.unwrap().elapsed();
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
async fn more_headers_than_a_request_can_carry_cost_one_message() {
    let changes = [("WEBHOOK_PASS_HEADERS", "ce-*")];
    let mut scene = Scene::core(Webhook::ok().await, &changes).await;
    let mut headers = HeaderMap::new();
    for n in 0..26_000 {
        headers.insert(format!("ce-{n}"), "1");
    }
    let many = scene
        .client
        .publish_with_headers("cms.cache.many", headers, "".into());
    many.await.unwrap();
    scene.publish("next").await;
    assert_eq!(scene.next().await.payload, "next");
    let line = scene.relay.logged("cms.cache.many is not relayed").await;
    assert!(
        line.contains("more headers than a request can carry"),
        "{line}"
    );
}

#[tokio::test]
async fn https_is_trusted_by_the_system_s_store_or_a_ca_of_one_s_own() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let authority = Authority::new();
    let webhook = Webhook::https(authority.acceptor()).await;
    let url = webhook.url().replace("http:", "https:");

    let other = Authority::new();
    let variables = [
        ("SSL_CERT_FILE", &other.ca()[..]),
        ("WEBHOOK_MAX_ATTEMPTS", "2"),
    ];
    let relay = Relay::between(&nats, &url, &variables);
    relay.logged("listening on").await;
    nats.publish("cms.cache.x", "refused").await;
    relay.logged("is not relayed").await;
    assert_eq!(webhook.count(), 0);
    let lines = relay.lines(&format!("cannot connect to {}: ", webhook.address()));
    assert_eq!(lines.len(), 2, "one for each attempt: {:#?}", relay.log());
    for line in &lines {
        let hint = "signed by a CA that is not trusted; name the PEM file of that CA in WEBHOOK_CA";
        assert!(line.contains(hint), "{line}");
    }
    relay.logged("ERROR").await;
    assert_eq!(relay.lines("ERROR").len(), 1, "{:#?}", relay.log());
    drop(relay);

    let relay = Relay::between(&nats, &url, &[("SSL_CERT_FILE", &authority.ca())]);
    relay.logged("listening on").await;
    nats.publish("cms.cache.x", "trusted").await;
    assert_eq!(next(&mut relayed).await.payload, "trusted");
}

#[tokio::test]
async fn a_certificate_that_no_server_should_have_is_told_in_words() {
    let nats = NatsServer::start().await;
    let authority = Authority::new();
    let ca = authority.ca();
    for (acceptor, words) in [
        (
            authority.acceptor_with_the_ca(),
            "its certificate is that of a CA",
        ),
        (authority.acceptor_of_old(), "certificate expired"),
    ] {
        let webhook = Webhook::https(acceptor).await;
        let url = webhook.url().replace("http:", "https:");
        let relay = Relay::between(&nats, &url, &[("SSL_CERT_FILE", &ca)]);
        relay.logged("listening on").await;
        nats.publish("cms.cache.x", "x").await;
        let line = relay.logged("attempt 1: ").await;
        assert!(line.contains(words), "{line}");
        assert_eq!(relay.lines("ERROR"), [""; 0]);
    }
}

pub type Heads = Arc<Mutex<Vec<String>>>;

/// A proxy that leads to one webhook, whatever host is asked for, and is reached by TLS if there is an
/// acceptor; the heads of all requests to it.
pub async fn proxy_to(webhook: &Webhook, acceptor: Option<TlsAcceptor>) -> (String, Heads) {
    let inner = webhook.address();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let scheme = acceptor.as_ref().map_or("http", |_| "https");
    let address = listener.local_addr().unwrap();
    let heads = Heads::default();
    let noted = Arc::clone(&heads);
    tokio::spawn(async move {
        while let Ok((outer, _)) = listener.accept().await {
            let (acceptor, noted) = (acceptor.clone(), Arc::clone(&noted));
            tokio::spawn(async move {
                match acceptor {
                    Some(acceptor) => lead(acceptor.accept(outer).await.ok()?, inner, &noted).await,
                    None => lead(outer, inner, &noted).await,
                }
            });
        }
    });
    (format!("{scheme}://user:hunter2@{address}"), heads)
}

/// Serves one connection to a proxy.
async fn lead<S>(mut outer: S, inner: SocketAddr, noted: &Heads) -> Option<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(outer.read_u8().await.ok()?);
    }
    let text = String::from_utf8(head.clone()).unwrap();
    let mut inner = TcpStream::connect(inner).await.ok()?;
    if text.starts_with("CONNECT ") {
        outer.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.ok()?;
        outer.flush().await.ok()?;
    } else {
        inner.write_all(&head).await.ok()?;
    }
    noted.lock().unwrap().push(text);
    copy_bidirectional(&mut outer, &mut inner).await.ok()?;
    Some(())
}

#[tokio::test]
async fn proxies_are_used_said_and_never_asked_for_loopback_addresses() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let authority = Authority::new();
    let ca = authority.ca();
    let plain = Webhook::ok().await;
    let secure = Webhook::https(authority.acceptor()).await;
    let (http_proxy, http_heads) = proxy_to(&plain, None).await;
    let (https_proxy, https_heads) = proxy_to(&secure, None).await;
    let variables = [
        ("HTTP_PROXY", &http_proxy[..]),
        ("HTTPS_PROXY", &https_proxy),
        ("NO_PROXY", "exempt.invalid"),
        ("SSL_CERT_FILE", &ca),
    ];
    let shown = |proxy: &str| proxy.replace("user:hunter2@", "") + "/";

    // On its own machine: the webhook gets it, and no proxy hears of it.
    let relay = Relay::listening(&nats, &plain, &variables).await;
    nats.publish("cms.cache.x", "loopback").await;
    assert_eq!(next(&mut relayed).await.payload, "loopback");
    assert_eq!(plain.count(), 1);
    assert_eq!(relay.lines("proxy"), [""; 0]);
    assert_eq!(http_heads.lock().unwrap().len(), 0, "the proxy was asked");
    drop(relay);

    let destinations = "http://app.invalid/hook https://app.invalid/hook";
    let relay = Relay::between(&nats, destinations, &variables);
    relay.logged("listening on").await;
    let said = [("http", &http_proxy), ("https", &https_proxy)].map(|(scheme, proxy)| {
        format!(
            "{scheme}://app.invalid/hook is reached through the proxy {}",
            shown(proxy)
        )
    });
    for line in &said {
        relay.logged(line).await;
    }
    nats.publish("cms.cache.x", "far away").await;
    assert_eq!(next(&mut relayed).await.payload, "far away");
    assert_eq!((plain.count(), secure.count()), (2, 1));
    let login = "proxy-authorization: basic dxnlcjpodw50zxiy"; // user:hunter2
    for (heads, line) in [
        (&http_heads, "POST http://app.invalid/hook HTTP/1.1"),
        (&https_heads, "CONNECT app.invalid:443 HTTP/1.1"),
    ] {
        let heads = heads.lock().unwrap();
        assert!(heads[0].starts_with(line), "{heads:?}");
        assert!(heads[0].to_lowercase().contains(login), "{heads:?}");
    }
    assert_eq!(relay.lines("hunter2"), [""; 0]);
    drop(relay);

    let relay = Relay::between(&nats, "http://exempt.invalid/hook", &variables);
    relay.logged("listening on").await;
    nats.publish("cms.cache.x", "exempt").await;
    let line = relay.logged("attempt 1: ").await;
    assert!(
        line.contains("cannot connect to exempt.invalid:80: "),
        "{line}"
    );

    let usual = [
        ("WEBHOOK_DESTINATION", destinations),
        ("NATS_HOST", &nats.url()),
        ("NATS_SUBJECT_PREFIX", "cms.cache"),
        ("NATS_RELAYED_SUBJECT_PREFIX", "relayed.cache"),
    ];
    let (code, lines) = check(&[&usual[..], &variables].concat()).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    let through = format!(
        "ok      proxy {} of the destination https://app.invalid/hook: reachable",
        shown(&https_proxy)
    );
    assert!(lines.last().unwrap().contains(&through), "{lines:#?}");
    assert_eq!(
        (plain.count(), secure.count()),
        (2, 1),
        "no request is sent"
    );
}

#[tokio::test]
async fn a_proxy_that_is_reached_by_tls_leads_to_http_destinations_too() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let (authority, other) = (Authority::new(), Authority::new());
    let webhook = Webhook::ok().await;
    let (proxy, heads) = proxy_to(&webhook, Some(authority.acceptor())).await;
    let destination = "http://app.invalid/hook";
    for (ca, is_trusted) in [(authority.ca(), true), (other.ca(), false)] {
        let variables = [("HTTP_PROXY", &proxy[..]), ("SSL_CERT_FILE", &ca)];
        let relay = Relay::between(&nats, destination, &variables);
        relay.logged("listening on").await;
        nats.publish("cms.cache.x", "far away").await;
        if is_trusted {
            assert_eq!(next(&mut relayed).await.payload, "far away");
            assert_eq!(heads.lock().unwrap().len(), 1);
        } else {
            let line = relay.logged("attempt 1: ").await;
            assert!(
                line.contains("signed by a CA that is not trusted"),
                "{line}"
            );
        }
        let (code, lines) =
            check(&[&usual(&nats.url(), destination)[..], &variables].concat()).await;
        assert_eq!(code, Some(i32::from(!is_trusted)), "{lines:#?}");
    }
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
