//! Every way to log in to NATS, and each refused when it is wrong.

use std::time::{Duration, SystemTime};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use nkeys::KeyPair;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::{
    operating::{STATUS, address, until_answer},
    support::{Authority, NatsServer, Relay, Webhook, check, publish_all, usual},
};

async fn accepted(nats: &NatsServer, variables: &[(&str, &str)]) {
    let webhook = Webhook::ok().await;
    Relay::listening(nats, &webhook, variables).await;
}

async fn refused(nats: &NatsServer, variables: &[(&str, &str)], remedy: &str) {
    let (code, log) = Relay::between(nats, "http://127.0.0.1:1/", variables)
        .ended()
        .await;
    assert_eq!(code, Some(1), "{log:#?}");
    let last = log.last().unwrap();
    assert!(
        last.contains("refused the login") && last.contains(remedy),
        "{log:#?}"
    );
    let more = log.iter().filter(|line| line.contains("next attempt"));
    assert_eq!(more.count(), 0, "there is none: {log:#?}");
}

/// A file with this content, and its path.
fn file(content: &str) -> (tempfile::NamedTempFile, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    (file, path)
}

#[tokio::test]
async fn a_token() {
    let nats = NatsServer::with_config("authorization { token: good }").await;
    accepted(&nats, &[("NATS_TOKEN", "good")]).await;
    refused(&nats, &[("NATS_TOKEN", "bad")], "check NATS_TOKEN").await;
    refused(&nats, &[], "set NATS_USER and NATS_PASS, NATS_TOKEN").await;
}

#[tokio::test]
async fn an_nkey() {
    let (user, other) = (KeyPair::new_user(), KeyPair::new_user());
    let config = format!(
        "authorization {{ users = [{{ nkey: {} }}] }}",
        user.public_key()
    );
    let nats = NatsServer::with_config(&config).await;
    let (_good, path) = file(&format!("{}\n", user.seed().unwrap()));
    accepted(&nats, &[("NATS_NKEY", &path)]).await;
    let (_bad, path) = file(&other.seed().unwrap());
    refused(&nats, &[("NATS_NKEY", &path)], "check NATS_NKEY").await;
}

/// A JWT as NATS has them (ADR-14), for ever.
fn jwt(issuer: &KeyPair, subject: &KeyPair, nats: &Value) -> String {
    jwt_until(0, issuer, subject, nats)
}

/// The same until this second.
fn jwt_until(end: u64, issuer: &KeyPair, subject: &KeyPair, nats: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!(
        "{}.{}",
        part(&json!({ "typ": "JWT", "alg": "ed25519-nkey" })),
        part(&json!({
            "jti": "test",
            "iat": 1_700_000_000,
            "exp": end,
            "iss": issuer.public_key(),
            "sub": subject.public_key(),
            "name": "test",
            "nats": nats,
        }))
    );
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes()).unwrap());
    format!("{signed}.{signature}")
}

/// A server of an operator, with this account.
async fn operated(account: &KeyPair) -> NatsServer {
    let operator = KeyPair::new_operator();
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
        "conn": -1, "leaf": -1
    });
    let config = format!(
        "operator: {}\nresolver: MEMORY\nresolver_preload: {{ {}: {} }}",
        jwt(
            &operator,
            &operator,
            &json!({ "type": "operator", "version": 2 })
        ),
        account.public_key(),
        jwt(
            &operator,
            account,
            &json!({ "type": "account", "version": 2, "limits": limits })
        ),
    );
    NatsServer::with_config(&config).await
}

/// The credentials of a new user of an account, until this second.
fn credentials_until(end: u64, account: &KeyPair) -> String {
    let user = KeyPair::new_user();
    let claims = json!({
        "type": "user", "version": 2, "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1
    });
    format!(
        "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        jwt_until(end, account, &user, &claims),
        user.seed().unwrap()
    )
}

#[tokio::test]
async fn credentials_of_operator_mode() {
    let account = KeyPair::new_account();
    let nats = operated(&account).await;
    let (_good, path) = file(&credentials_until(0, &account));
    accepted(&nats, &[("NATS_CREDS", &path)]).await;
    let (_bad, path) = file(&credentials_until(0, &KeyPair::new_account()));
    refused(&nats, &[("NATS_CREDS", &path)], "check NATS_CREDS").await;
}

#[tokio::test]
async fn credentials_that_expire_are_read_anew_until_they_are_accepted() {
    let account = KeyPair::new_account();
    let nats = operated(&account).await;
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let (renewed, path) = file(&credentials_until(now + 3, &account));
    let webhook = Webhook::ok().await;
    let changes = [("NATS_CREDS", &path[..]), STATUS];
    let relay = Relay::listening(&nats, &webhook, &changes).await;
    let lines = relay.logged_times("cannot connect to NATS", 4).await;
    assert!(
        lines[3].contains("WARN") && lines[3].contains("check NATS_CREDS; next attempt in"),
        "{lines:#?}"
    );
    let address = address(&relay).await;
    until_answer(&address, "/readyz", 503, "not connected to NATS").await;
    std::fs::write(renewed.path(), credentials_until(0, &account)).unwrap();
    relay.logged_times("connected to NATS at", 2).await;
    until_answer(&address, "/readyz", 200, "ok").await;
}

#[tokio::test]
async fn a_password_that_is_changed_costs_nothing_that_waits() {
    let config = |password: &str| {
        format!(
            "jetstream {{ store_dir: \"$DIR/jetstream\" }}
             authorization {{ users = [
                {{ user: admin, password: admin }}, {{ user: relay, password: {password} }} ] }}
             no_auth_user: admin"
        )
    };
    let mut nats = NatsServer::with_config(&config("old")).await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    let (password, path) = file("old");
    let webhook = Webhook::ok().await;
    let login = [("NATS_USER", "relay"), ("NATS_PASS_FILE", &path)];
    let relay = Relay::durable(&nats, &webhook, &login).await;
    nats.stop();
    nats.configure(&config("new"));
    nats.restart();
    relay
        .logged_times("check NATS_USER and NATS_PASS; next", 3)
        .await;
    publish_all(&nats.jetstream().await, 0..3).await;
    std::fs::remove_file(password.path()).unwrap();
    relay.logged("which NATS_PASS_FILE names").await;
    std::fs::write(password.path(), "new\n").unwrap();
    relay.logged_times(" -> ", 3).await;
    assert_eq!(webhook.bodies(), ["0", "1", "2"]);
}

#[tokio::test]
async fn credentials_may_have_the_company_that_auth_callout_wants() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    let (_file, path) = file(&credentials_until(0, &KeyPair::new_account()));
    for (company, expected) in [
        (&[("NATS_TOKEN", "t")][..], json!([null, null, "t"])),
        (
            &[("NATS_USER", "u"), ("NATS_PASS", "p")],
            json!(["u", "p", null]),
        ),
    ] {
        let login = [company, &[("NATS_CREDS", &path), ("NATS_HOST", &url)]].concat();
        let nats = usual(&url, "http://127.0.0.1:1/");
        let _relay = Relay::start(nats.into_iter().chain(login));
        let (mut stream, _) = listener.accept().await.unwrap();
        let info = json!({
            "server_id": "x", "server_name": "x", "version": "2.10.0", "go": "x", "host": "x",
            "port": 1, "headers": true, "max_payload": 1024, "proto": 1, "client_id": 1,
            "auth_required": true, "nonce": "nonce", "client_ip": "127.0.0.1"
        });
        let greeting = format!("INFO {info}\r\n");
        stream.write_all(greeting.as_bytes()).await.unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).await.unwrap();
        let sent: Value = serde_json::from_str(line.strip_prefix("CONNECT ").unwrap()).unwrap();
        let found = ["user", "pass", "auth_token"].map(|name| sent[name].clone());
        assert_eq!(json!(found), expected);
        assert!(sent["jwt"].is_string() && sent["sig"].is_string(), "{sent}");
    }
}

#[tokio::test]
async fn tls_with_a_ca_of_one_s_own() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (certificate, key) = authority.issue("server");
    let config = format!("tls {{ cert_file: \"{certificate}\", key_file: \"{key}\" }}");
    let nats = NatsServer::with_config(&config).await;
    accepted(&nats, &[("NATS_CA", &authority.ca())]).await;
    // The file of the system's own variable counts as well, also from a dotenv file.
    accepted(&nats, &[("SSL_CERT_FILE", &authority.ca())]).await;
    let directory = tempfile::tempdir().unwrap();
    let dotenv = format!("SSL_CERT_FILE='{}'", authority.ca());
    std::fs::write(directory.path().join(".env"), dotenv).unwrap();
    let relay = Relay::start_in(
        directory,
        [
            ("WEBHOOK_DESTINATION", "http://127.0.0.1:1/"),
            ("NATS_HOST", &nats.url()),
            ("NATS_SUBJECT_PREFIX", "cms.cache"),
            ("NATS_RELAYED_SUBJECT_PREFIX", "relayed.cache"),
        ],
    );
    relay.logged("listening on").await;
    for variables in [&[("NATS_CA", &other.ca()[..])][..], &[]] {
        let relay = Relay::between(&nats, "http://127.0.0.1:1/", variables);
        let line = relay.logged("cannot connect to NATS").await;
        let hint = "signed by a CA that is not trusted; name the PEM file of that CA in NATS_CA";
        assert!(line.contains(hint), "{line}");
    }
}

#[tokio::test]
async fn a_server_without_tls_is_called_that() {
    let nats = NatsServer::start().await;
    let url = nats.url().replace("nats:", "tls:");
    let relay = Relay::between(&nats, "http://127.0.0.1:1/", &[("NATS_HOST", &url)]);
    let line = relay.logged("cannot connect to NATS").await;
    assert!(
        line.contains("it does not speak TLS there; check scheme, host and port"),
        "{line}"
    );
}

/// In front of a server, a TLS handshake that comes before the greeting; the port of that.
async fn handshake_first(nats: &NatsServer, authority: &Authority) -> u16 {
    let (acceptor, port) = (authority.acceptor(), nats.port());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own_port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // As nats-server does, it does not wait for ever.
                let handshake = timeout(Duration::from_millis(500), acceptor.accept(stream));
                let mut outer = handshake.await.ok()?.ok()?;
                let mut inner = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
                copy_bidirectional(&mut outer, &mut inner).await.ok()
            });
        }
    });
    own_port
}

/// The relay at a server that wants the handshake first, without and with the variable for it.
async fn handshake_first_is_hinted_at_and_done(nats: &NatsServer, url: &str, ca: &str) {
    let variables = [("NATS_HOST", url), ("NATS_CA", ca)];
    let relay = Relay::between(nats, "http://127.0.0.1:1/", &variables);
    let line = relay.logged("cannot connect to NATS").await;
    assert!(line.contains("set NATS_TLS_FIRST=true"), "{line}");
    let first = [&variables[..], &[("NATS_TLS_FIRST", "true")]].concat();
    accepted(nats, &first).await;
    let (_, lines) = check(&[&usual(url, "http://127.0.0.1:1/")[..], &first].concat()).await;
    let connected = format!("ok      NATS {url}: connected, without a login");
    assert!(lines.contains(&connected), "{lines:#?}");
}

#[tokio::test]
async fn a_server_that_wants_the_handshake_first() {
    let nats = NatsServer::start().await;
    let authority = Authority::new();
    let port = handshake_first(&nats, &authority).await;
    let url = format!("nats://127.0.0.1:{port}");
    handshake_first_is_hinted_at_and_done(&nats, &url, &authority.ca()).await;
}

/// The server's own `handshake_first`, where it has that.
#[tokio::test]
async fn a_server_with_handshake_first() {
    if !NatsServer::is_at_least((2, 10)) {
        eprintln!("skipped: this nats-server does not know handshake_first");
        return;
    }
    let authority = Authority::new();
    let (certificate, key) = authority.issue("server");
    let config = format!(
        "tls {{ cert_file: \"{certificate}\", key_file: \"{key}\", handshake_first: true }}"
    );
    let nats = NatsServer::with_config(&config).await;
    handshake_first_is_hinted_at_and_done(&nats, &nats.url(), &authority.ca()).await;
}

#[tokio::test]
async fn a_server_that_greets_before_the_handshake_is_called_that() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue("server");
    let config = format!("tls {{ cert_file: \"{certificate}\", key_file: \"{key}\" }}");
    let nats = NatsServer::with_config(&config).await;
    let (url, ca) = (nats.url(), authority.ca());
    let first = [("NATS_CA", &ca[..]), ("NATS_TLS_FIRST", "true")];
    let hint = "unset NATS_TLS_FIRST unless the server has handshake_first";
    let relay = Relay::between(&nats, "http://127.0.0.1:1/", &first);
    let line = relay.logged("cannot connect to NATS").await;
    assert!(line.contains(hint), "{line}");
    let (code, lines) = check(&[&usual(&url, "http://127.0.0.1:1/")[..], &first].concat()).await;
    assert_eq!(code, Some(1), "{lines:#?}");
    assert!(lines[1].contains(hint), "{lines:#?}");
}

#[tokio::test]
async fn a_server_that_says_nothing_may_want_the_handshake_first() {
    let nats = NatsServer::start().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", silent.local_addr().unwrap());
    let relay = Relay::between(&nats, "http://127.0.0.1:1/", &[("NATS_HOST", &url)]);
    let line = relay.logged("cannot connect to NATS").await;
    assert!(line.contains("set NATS_TLS_FIRST=true"), "{line}");
}

#[tokio::test]
async fn whoever_names_a_ca_gets_no_connection_without_tls() {
    let nats = NatsServer::start().await;
    let authority = Authority::new();
    let relay = Relay::between(
        &nats,
        "http://127.0.0.1:1/",
        &[("NATS_CA", &authority.ca())],
    );
    relay.logged("cannot connect to NATS").await;
    assert_eq!(relay.lines("connected to NATS at"), [""; 0]);
}

#[tokio::test]
async fn tls_with_a_client_certificate() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (certificate, key) = authority.issue("server");
    let ca = authority.ca();
    let config = format!(
        "tls {{ cert_file: \"{certificate}\", key_file: \"{key}\", ca_file: \"{ca}\", verify: true }}"
    );
    let nats = NatsServer::with_config(&config).await;
    let (certificate, key) = authority.issue("relay");
    accepted(
        &nats,
        &[
            ("NATS_CA", &ca),
            ("NATS_CERT", &certificate),
            ("NATS_KEY", &key),
        ],
    )
    .await;
    let (certificate, key) = other.issue("relay");
    for variables in [
        &[
            ("NATS_CA", &ca[..]),
            ("NATS_CERT", &certificate),
            ("NATS_KEY", &key),
        ][..],
        &[("NATS_CA", &ca)],
    ] {
        let relay = Relay::between(&nats, "http://127.0.0.1:1/", variables);
        let lines = relay.logged_times("cannot connect to NATS", 2).await;
        // What else it says depends on the server's version.
        let is_told = lines[0].contains("client certificate") && lines[0].contains("NATS_CERT");
        assert!(is_told, "{lines:#?}");
        assert_eq!(relay.lines("connected to NATS at"), [""; 0]);
    }
}
