//! Every address of a name is told (`WEBHOOK_EVERY_ADDRESS`). The relay sees a hosts file of the test's own.

use std::{
    env, fs,
    path::PathBuf,
    process,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::{net::TcpListener, process::Command, time::sleep};

use crate::support::{Answer, NatsServer, Relay, Webhook, next};

/// A name whose addresses the test sets: what the relay sees as /etc/hosts.
struct Name {
    hosts: PathBuf,
    _directory: TempDir,
}

impl Name {
    /// None in a sandbox of Nix that forbids further namespaces.
    fn with(addresses: &[&str]) -> Option<Self> {
        let unshared = process::Command::new("unshare")
            .args(["--map-root-user", "--mount", "true"])
            .output()
            .unwrap();
        if !unshared.status.success() && env::var_os("NIX_BUILD_TOP").is_some() {
            eprintln!("skipped: {}", String::from_utf8_lossy(&unshared.stderr));
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let hosts = directory.path().join("hosts");
        let name = Self {
            hosts,
            _directory: directory,
        };
        name.set(addresses);
        Some(name)
    }

    fn set(&self, addresses: &[&str]) {
        let lines = addresses
            .iter()
            .map(|address| format!("{address} frontend.test\n"));
        fs::write(&self.hosts, lines.collect::<String>()).unwrap();
    }

    /// What starts a program that sees it, with these variables beside the usual ones.
    fn command(&self, port: u16, every_address: &str) -> Vec<String> {
        // The relay's own environment has no PATH. Without RESOLV_MULTI, glibc takes only the first line of
        // a name where there is no /etc/host.conf.
        let [env, unshare, mount] = ["env", "unshare", "mount"].map(path_of);
        let hosts = self.hosts.display();
        let destination = format!("WEBHOOK_DESTINATION=http://frontend.test:{port}/hook");
        let script = format!(r#"{mount} --bind {hosts} /etc/hosts && exec "$0" "$@""#);
        let every_address = format!("WEBHOOK_EVERY_ADDRESS={every_address}");
        [&env[..], "RESOLV_MULTI=on"]
            .into_iter()
            .chain([&destination[..], &every_address])
            .chain([&unshare, "--map-root-user", "--mount"])
            .chain(["/bin/sh", "-c", &script])
            .map(str::to_owned)
            .collect()
    }

    async fn relay(&self, nats: &NatsServer, webhook: &Webhook) -> Relay {
        self.relay_with("true", nats, webhook).await
    }

    async fn relay_with(&self, every_address: &str, nats: &NatsServer, webhook: &Webhook) -> Relay {
        let command = self.command(webhook.address().port(), every_address);
        let command: Vec<_> = command.iter().map(String::as_str).collect();
        Relay::under(&command, nats, webhook).await
    }
}

/// The path of a program.
fn path_of(program: &str) -> String {
    let directories = env::var_os("PATH").unwrap();
    env::split_paths(&directories)
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("there is no {program}"))
        .display()
        .to_string()
}

/// Replicas at these addresses, on one port; the `n`th answers its first request with the `n`th answer, and all
/// later ones with 200.
async fn replicas(addresses: &[&str], answers: &[Answer]) -> Vec<Webhook> {
    let mut port = 0;
    let mut replicas = Vec::new();
    for (address, answer) in addresses.iter().zip(answers) {
        let listener = TcpListener::bind((*address, port)).await.unwrap();
        port = listener.local_addr().unwrap().port();
        let answer = answer.clone();
        let first = move |n, _: &_| if n == 0 { answer.clone() } else { Answer::OK };
        replicas.push(Webhook::on(listener, first));
    }
    replicas
}

const ADDRESSES: [&str; 3] = ["127.0.0.1", "127.0.0.2", "127.0.0.3"];

#[tokio::test]
async fn every_address_is_told_before_the_message_is_republished() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let answers = [Answer::OK, Answer::status(503), Answer::OK];
    let replicas = replicas(&ADDRESSES, &answers).await;
    let Some(name) = Name::with(&ADDRESSES) else {
        return;
    };
    let relay = name.relay(&nats, &replicas[0]).await;
    let known = relay.lines("and each has to succeed");
    assert_eq!(known.len(), 1, "{:#?}", relay.log());
    let port = replicas[0].address().port();
    let every =
        format!("POST to http://frontend.test:{port}/hook at every address of its name, then");
    relay.logged(&every).await;
    nats.publish("cms.cache.a", "1").await;
    next(&mut relayed).await;
    let known = format!("frontend.test:{port} has 3 IPs, and each has to succeed: 127.0.0.1, ");
    relay.logged(&known).await;
    assert_eq!(relay.lines(&known).len(), 1, "{:#?}", relay.log());
    let counts: Vec<_> = replicas.iter().map(Webhook::count).collect();
    assert_eq!(counts, [1, 2, 1]);
    for replica in &replicas {
        let host = format!("frontend.test:{port}");
        assert_eq!(replica.requests()[0].header("host"), Some(&host[..]));
    }
    let failed = relay.logged("attempt 1: ").await;
    assert!(
        failed.contains(&format!(
            "http://frontend.test:{port}/hook at 127.0.0.2: answered 503"
        )),
        "{failed}"
    );
    let line = relay.logged(" -> ").await;
    assert!(line.contains("(200, 200 after 2 attempts, 200, "), "{line}");
}

#[tokio::test]
async fn addresses_come_and_go() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let down = [Answer::OK, Answer::status(503), Answer::OK];
    let replicas = replicas(&ADDRESSES, &down).await;
    let Some(name) = Name::with(&ADDRESSES[..2]) else {
        return;
    };
    let relay = name.relay(&nats, &replicas[0]).await;

    // One that is gone at the next attempt is not waited for.
    nats.publish("cms.cache.a", "1").await;
    replicas[1].received(1).await;
    name.set(&ADDRESSES[..1]);
    next(&mut relayed).await;
    relay
        .logged(" has 1 IP, and each has to succeed: 127.0.0.1")
        .await;
    assert_eq!(replicas[1].count(), 1);

    // Those that have come are told of what follows.
    name.set(&ADDRESSES);
    nats.publish("cms.cache.b", "2").await;
    next(&mut relayed).await;
    let counts: Vec<_> = replicas.iter().map(Webhook::count).collect();
    assert_eq!(counts, [2, 2, 1]);
    assert_eq!(replicas[2].bodies(), ["2"]);
}

#[tokio::test]
async fn a_family_that_refuses_connections_holds_nothing_up_once_the_other_has_succeeded() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let replicas = replicas(&ADDRESSES[..2], &[Answer::OK, Answer::status(503)]).await;
    let Some(name) = Name::with(&["127.0.0.1", "127.0.0.2", "::1"]) else {
        return;
    };
    let relay = name.relay(&nats, &replicas[0]).await;
    nats.publish("cms.cache.a", "1").await;
    next(&mut relayed).await;
    let line = relay.logged(" over the other IP version, ").await;
    assert!(
        line.contains("INFO") && line.contains(" at ::1 again: cannot connect"),
        "{line}"
    );
    // Of the family that has succeeded each is waited for.
    let counts: Vec<_> = replicas.iter().map(Webhook::count).collect();
    assert_eq!(counts, [1, 2]);
}

#[tokio::test]
async fn a_name_that_has_moved_is_followed_within_half_a_minute() {
    let nats = NatsServer::start().await;
    let replicas = replicas(&ADDRESSES[..2], &[Answer::OK, Answer::OK]).await;
    let Some(name) = Name::with(&ADDRESSES[..1]) else {
        return;
    };
    let _relay = name.relay_with("false", &nats, &replicas[0]).await;
    nats.publish("cms.cache.a", "1").await;
    replicas[0].received(1).await;
    name.set(&ADDRESSES[1..2]);
    let start = Instant::now();
    // Always in use, as by an editor who saves again and again.
    while replicas[1].count() == 0 {
        assert!(
            start.elapsed() < Duration::from_secs(35),
            "it was not followed"
        );
        nats.publish("cms.cache.a", "2").await;
        sleep(Duration::from_millis(500)).await;
    }
    let requests = replicas[0].requests();
    let (last, others) = requests.split_last().unwrap();
    assert_eq!(last.header("connection"), Some("close"));
    assert!(
        others.len() > 10 && last.connection == 0,
        "{}",
        others.len()
    );
    assert!(
        others
            .iter()
            .all(|request| request.header("connection").is_none())
    );
}

#[tokio::test]
async fn a_message_that_nobody_has_got_is_not_relayed() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let replicas = replicas(&ADDRESSES[..2], &[Answer::OK, Answer::status(503)]).await;

    // No address at first, then one that fails and is gone before its next attempt.
    let Some(name) = Name::with(&[]) else {
        return;
    };
    let relay = name.relay(&nats, &replicas[0]).await;
    nats.publish("cms.cache.a", "1").await;
    relay.logged("its name does not resolve").await;
    name.set(&ADDRESSES[1..2]);
    replicas[1].received(1).await;
    // While the name has none at all, nothing is POSTed to the one that it had.
    name.set(&[]);
    let unresolved = "/hook: its name does not resolve";
    let before = relay.lines(unresolved).len();
    relay.logged_times(unresolved, before + 1).await;
    name.set(&ADDRESSES[..1]);
    next(&mut relayed).await;
    let counts: Vec<_> = replicas.iter().map(Webhook::count).collect();
    assert_eq!(counts, [1, 1]);
    // Each attempt to find an address at all was one, too.
    let line = relay.logged(" -> ").await;
    let attempts = format!(
        "(200 after {} attempts, ",
        relay.lines(unresolved).len() + 2
    );
    assert!(line.contains(&attempts), "{:#?}", relay.log());
}

#[tokio::test]
async fn check_reaches_every_address() {
    let nats = NatsServer::start().await;
    let replicas = replicas(&ADDRESSES[..1], &[Answer::OK]).await;
    let Some(name) = Name::with(&ADDRESSES[..2]) else {
        return;
    };
    let command = name.command(replicas[0].address().port(), "true");
    let output = Command::new(&command[0])
        .args(&command[1..])
        .arg(Relay::program())
        .arg("--check")
        .env_clear()
        .env("NATS_HOST", nats.url())
        .env("NATS_SUBJECT_PREFIX", "cms.cache")
        .env("NATS_RELAYED_SUBJECT_PREFIX", "relayed.cache")
        .output()
        .await
        .unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{report}");
    for (result, address, what) in [
        ("ok      ", "127.0.0.1, 1 of 2", "reachable"),
        ("FAILED  ", "127.0.0.2, 2 of 2", "cannot connect: "),
    ] {
        let place = format!("at {address}: {what}");
        let is_told = |line: &str| line.starts_with(result) && line.contains(&place);
        assert!(report.lines().any(is_told), "{report}");
    }
    assert_eq!(replicas[0].count(), 0);
}
