//! Certificates for https destinations: of a CA of one's own, and of clients.

use tokio::net::TcpListener;

use crate::{
    receivers::proxy_to,
    support::{Authority, NatsServer, Relay, Webhook, check, next, usual},
};

/// A webhook that demands a client certificate, with its https URL.
async fn demanding(authority: &Authority) -> (Webhook, String) {
    let webhook = Webhook::https(authority.demanding_acceptor()).await;
    let url = webhook.url().replace("http:", "https:");
    (webhook, url)
}

/// What `--check` says about the one destination.
async fn checked(
    nats: &NatsServer,
    destination: &str,
    variables: &[(&str, &str)],
) -> (Option<i32>, String) {
    let url = nats.url();
    let (code, lines) = check(&[&usual(&url, destination)[..], variables].concat()).await;
    (code, lines.last().unwrap().clone())
}

#[tokio::test]
async fn a_ca_for_webhooks_is_trusted_instead_of_any_other() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let (authority, other) = (Authority::new(), Authority::new());
    let (ca, other_ca) = (authority.ca(), other.ca());
    let webhook = Webhook::https(authority.acceptor()).await;
    let url = webhook.url().replace("http:", "https:");

    let good = [("WEBHOOK_CA", &ca[..]), ("SSL_CERT_FILE", &other_ca)];
    let relay = Relay::between(&nats, &url, &good);
    relay.logged("listening on").await;
    nats.publish("cms.cache.x", "trusted").await;
    assert_eq!(next(&mut relayed).await.payload, "trusted");
    let (code, line) = checked(&nats, &url, &good).await;
    assert_eq!(code, Some(0), "{line}");
    drop(relay);

    let bad = [("WEBHOOK_CA", &other_ca[..]), ("SSL_CERT_FILE", &ca)];
    let relay = Relay::between(&nats, &url, &bad);
    relay.logged("listening on").await;
    nats.publish("cms.cache.x", "refused").await;
    let line = relay.logged("attempt 1: ").await;
    let hint = "signed by a CA that is not trusted; name the PEM file of that CA in WEBHOOK_CA";
    assert!(line.contains(hint), "{line}");
    let (code, line) = checked(&nats, &url, &bad).await;
    assert!(code == Some(1) && line.contains(hint), "{line}");
    assert_eq!(webhook.bodies(), ["trusted"]);
}

#[tokio::test]
async fn a_client_certificate_is_shown_and_what_the_server_has_against_it_is_told() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let (authority, other) = (Authority::new(), Authority::new());
    let (webhook, url) = demanding(&authority).await;
    let ca = authority.ca();
    let with = |(certificate, key): (String, String)| {
        let files = [("WEBHOOK_CERT", certificate), ("WEBHOOK_KEY", key)];
        Vec::from(files)
    };
    for (certificate, words) in [
        (with(authority.issue("relay")), None),
        (
            vec![],
            Some("demands one (CertificateRequired); check WEBHOOK_CERT and WEBHOOK_KEY"),
        ),
        (
            with(other.issue("relay")),
            Some("it refuses the client certificate, or demands one ("),
        ),
        (
            with(authority.issue_expired("expired")),
            Some("demands one (CertificateExpired); check WEBHOOK_CERT and WEBHOOK_KEY"),
        ),
    ] {
        let mut variables = vec![("WEBHOOK_CA", &ca[..])];
        variables.extend(certificate.iter().map(|(name, path)| (*name, &path[..])));
        let relay = Relay::between(&nats, &url, &variables);
        relay.logged("listening on").await;
        nats.publish("cms.cache.x", "x").await;
        match words {
            None => assert_eq!(next(&mut relayed).await.payload, "x"),
            Some(words) => {
                let line = relay.logged("attempt 1: ").await;
                assert!(line.contains(words), "{line}");
            }
        }
        assert_eq!(webhook.count(), 1, "no other request arrives");
    }
}

#[tokio::test]
async fn a_server_that_hangs_up_instead_of_refusing_the_certificate_is_no_valid_answer() {
    let nats = NatsServer::start().await;
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/", listener.local_addr().unwrap());
    let acceptor = authority.demanding_acceptor();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            drop(acceptor.accept(stream).await);
        }
    });
    let (ca, (certificate, key)) = (authority.ca(), authority.issue("relay"));
    let variables = [
        ("WEBHOOK_CA", &ca[..]),
        ("WEBHOOK_CERT", &certificate),
        ("WEBHOOK_KEY", &key),
    ];
    let relay = Relay::between(&nats, &url, &variables);
    relay.logged("listening on").await;
    nats.publish("cms.cache.x", "x").await;
    let line = relay.logged("attempt 1: ").await;
    assert!(!line.contains("docs.rs"), "{line}");
}

#[tokio::test]
async fn certificates_count_through_a_proxy() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let authority = Authority::new();
    let (webhook, _) = demanding(&authority).await;
    let (ca, (certificate, key)) = (authority.ca(), authority.issue("relay"));
    // The proxy demands one as well.
    let acceptor = authority.demanding_acceptor();
    for acceptor in [None, Some(acceptor)] {
        let (proxy, heads) = proxy_to(&webhook, acceptor).await;
        let variables = [
            ("HTTPS_PROXY", &proxy[..]),
            ("WEBHOOK_CA", &ca),
            ("WEBHOOK_CERT", &certificate),
            ("WEBHOOK_KEY", &key),
        ];
        let url = "https://app.invalid/hook";
        let relay = Relay::between(&nats, url, &variables);
        relay.logged("listening on").await;
        nats.publish("cms.cache.x", "far away").await;
        assert_eq!(next(&mut relayed).await.payload, "far away");
        let (code, line) = checked(&nats, url, &variables).await;
        assert_eq!(code, Some(0), "{line}");
        assert!(heads.lock().unwrap()[0].starts_with("CONNECT app.invalid:443"));
    }
}

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = directory.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(&path, content).unwrap();
        path
    };
    let authority = Authority::new();
    let (certificate, key) = authority.issue("relay");
    let (_, other_key) = authority.issue("other");
    let (missing, empty) = ("/nowhere.pem".to_owned(), file("empty", ""));
    let text = file("text", "no PEM at all");
    let pem = |label: &str| format!("-----BEGIN {label}-----\nAAAA\n-----END {label}-----\n");
    let broken_certificate = file("broken.pem", &pem("CERTIFICATE"));
    let broken_key = file("broken.key", &pem("PRIVATE KEY"));
    let locked_key = file("locked.key", &pem("ENCRYPTED PRIVATE KEY"));
    let cases = [
        ("CA", &missing, "cannot be read"),
        ("CA", &empty, "holds no certificate in PEM form"),
        ("CA", &text, "holds no certificate in PEM form"),
        ("CA", &key, "holds no certificate in PEM form"),
        (
            "CA",
            &broken_certificate,
            "holds no certificate in PEM form that can be used",
        ),
        ("CERT", &missing, "cannot be read"),
        ("CERT", &empty, "holds no certificate in PEM form"),
        ("CERT", &text, "holds no certificate in PEM form"),
        (
            "CERT",
            &broken_certificate,
            "first certificate can't be used",
        ),
        ("KEY", &missing, "cannot be read"),
        ("KEY", &empty, "holds no private key in PEM form"),
        ("KEY", &text, "holds no private key in PEM form"),
        ("KEY", &certificate, "holds no private key in PEM form"),
        (
            "KEY",
            &broken_key,
            "private key does not match the certificate",
        ),
        (
            "KEY",
            &locked_key,
            "holds no private key in PEM form without a passphrase",
        ),
        (
            "KEY",
            &other_key,
            "private key does not match the certificate",
        ),
    ];
    for kind in ["WEBHOOK", "NATS"] {
        let names = ["CA", "CERT", "KEY"].map(|name| format!("{kind}_{name}"));
        let good = [&authority.ca(), &certificate, &key];
        for (changed, path, problem) in &cases {
            let files = names
                .iter()
                .zip(good)
                .map(|(name, good)| match name.ends_with(changed) {
                    true => (&name[..], &path[..]),
                    false => (&name[..], &good[..]),
                });
            let usual = usual("nats://127.0.0.1:1", "https://127.0.0.1:1/");
            let (code, log) = Relay::start(usual.into_iter().chain(files)).ended().await;
            assert_eq!(code, Some(78), "{kind}_{changed}={path}: {log:#?}");
            let problems: Vec<_> = log
                .iter()
                .filter(|line| line.contains("bad conf"))
                .collect();
            assert_eq!(problems.len(), 1, "{log:#?}");
            let named = format!("bad configuration: {kind}_{changed} names {path:?}, wh");
            assert!(problems[0].contains(&named), "{log:#?}");
            assert!(problems[0].contains(problem), "{log:#?}");
        }
        let half = [(&names[1][..], &certificate[..])];
        let usual = usual("nats://127.0.0.1:1", "https://127.0.0.1:1/");
        let (code, log) = Relay::start(usual.into_iter().chain(half)).ended().await;
        assert_eq!(code, Some(78), "{log:#?}");
        let problem = format!("{kind}_KEY is not set, but {kind}_CERT is; set both or neither");
        assert!(log.last().unwrap().contains(&problem), "{log:#?}");
    }
}
