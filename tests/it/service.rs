//! What a service manager gets to hear, over a real datagram socket.

use std::{
    os::unix::net::UnixDatagram,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::support::{Answer, NatsServer, Relay, Webhook, until_ok};

/// A socket as systemd has it for `Type=notify`.
struct Manager {
    socket: UnixDatagram,
    directory: TempDir,
}

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(10)))
            .unwrap();
        Self { socket, directory }
    }

    fn path(&self) -> String {
        self.directory
            .path()
            .join("notify")
            .to_str()
            .unwrap()
            .to_owned()
    }

    /// The next notification, if one comes within a moment.
    fn poll(&self) -> Option<String> {
        let mut buffer = vec![0; 1 << 17];
        let length = self.socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// Waits for a notification that contains `text`; all up to it.
    async fn heard(&self, text: &str) -> Vec<String> {
        let mut all = Vec::new();
        until_ok(&format!("{text} is heard"), async || {
            all.extend(self.poll());
            match all.last() {
                Some(last) if last.contains(text) => Ok(()),
                _ => Err(all.clone()),
            }
        })
        .await;
        all
    }
}

#[tokio::test]
async fn readiness_status_watchdog_and_stopping_are_told() {
    let mut nats = NatsServer::start().await;
    nats.kill();
    let webhook =
        Webhook::script([Answer::OK, Answer::status(422), Answer::OK, Answer::Hang]).await;
    let manager = Manager::new();
    let path = manager.path();
    let variables = [
        ("NOTIFY_SOCKET", &path[..]),
        ("WATCHDOG_USEC", "200000"),
        ("SHUTDOWN_TIMEOUT", "100ms"),
    ];
    let relay = Relay::between(&nats, &webhook.url(), &variables);
    relay.logged_times("cannot connect to NATS", 3).await;
    let before = manager.heard("STATUS=Waiting for NATS for ").await.concat();
    assert!(
        !before.contains("READY=1"),
        "it is not ready before it is subscribed"
    );
    nats.restart();
    let ready = manager.heard("READY=1").await.pop().unwrap();
    assert!(ready.contains("STATUS=Listening"), "{ready:?}");

    nats.publish("cms.cache.x", "good").await;
    manager.heard("; 1 relayed, 0 failed").await;
    nats.publish("cms.cache.x", "bad").await;
    manager
        .heard("STATUS=Gave up on cms.cache.x 0s ago: ")
        .await;
    nats.publish("cms.cache.x", "good").await;
    // What is over is forgotten.
    manager
        .heard("STATUS=Relaying; 2 relayed, 1 failed, 0 dropped, 0 waiting\n")
        .await;

    // A hung webhook is no reason for systemd to think that the relay hangs.
    nats.publish("cms.cache.x", "hangs").await;
    webhook.received(4).await;
    nats.publish("cms.cache.x", "waits").await;
    manager.heard("1 waiting").await;
    for _ in 0..3 {
        manager.heard("WATCHDOG=1").await;
    }
    relay.signal("TERM");
    manager.heard("STOPPING=1").await;
    assert_eq!(relay.ended().await.0, Some(0));
}

#[tokio::test]
async fn a_start_without_nats_holds_up_nothing_for_longer_than_ten_seconds() {
    let mut nats = NatsServer::start().await;
    nats.kill();
    let webhook = Webhook::ok().await;
    let manager = Manager::new();
    let path = manager.path();
    let started = Instant::now();
    let relay = Relay::between(&nats, &webhook.url(), &[("NOTIFY_SOCKET", &path)]);
    let ready = manager.heard("READY=1").await;
    let took = started.elapsed();
    assert!((9..13).contains(&took.as_secs()), "{took:?}");
    relay.logged_times("cannot connect to NATS", 3).await;
    let last = ready.concat();
    assert!(last.contains("STATUS=Waiting for NATS for "), "{last}");

    nats.restart();
    relay.logged("listening on").await;
    nats.publish("cms.cache.x", "x").await;
    let later = manager.heard("; 1 relayed, 0 failed").await.concat();
    assert!(later.contains("STATUS=Relaying; 1 relayed"), "{later}");
    assert!(!later.contains("READY=1"), "it is told once: {later}");
}

#[tokio::test]
async fn no_message_makes_systemd_drop_what_it_is_told() {
    let nats = NatsServer::start().await;
    let elsewhere = format!(
        "302 Found\r\nlocation: http://x.example/{}",
        "y".repeat(100_000)
    );
    let webhook = Webhook::script([
        Answer::full(&elsewhere, ""),
        Answer::full("422 No", "no\0body"),
        Answer::status(422),
    ])
    .await;
    let manager = Manager::new();
    let path = manager.path();
    let variables = [
        ("NOTIFY_SOCKET", &path[..]),
        ("WATCHDOG_USEC", "200000"),
        ("WEBHOOK_MAX_ATTEMPTS", "1"),
    ];
    let relay = Relay::listening(&nats, &webhook, &variables).await;
    let long = format!("cms.cache.{}", "x".repeat(4000));
    let mut told = Vec::new();
    for (subject, reason) in [
        ("cms.cache.x", "redirects are not followed"),
        ("cms.cache.x", "no body"),
        (&long, "answered 422 Unprocessable Entity"),
    ] {
        nats.publish_raw(subject.as_bytes(), b"", b"x").await;
        told.extend(manager.heard(reason).await);
        for _ in 0..3 {
            told.extend(manager.heard("WATCHDOG=1").await);
        }
    }
    for datagram in &told {
        assert!(datagram.len() < 2048, "{} bytes", datagram.len());
        assert!(!datagram.contains('\0'), "{datagram:?}");
        let alone = !datagram.contains("WATCHDOG") || datagram == "WATCHDOG=1\n";
        assert!(alone, "{datagram:?}");
    }
    for line in relay.log() {
        assert!(line.len() < 4096, "{} bytes", line.len());
    }
}

#[tokio::test]
async fn a_watchdog_of_another_process_is_not_fed() {
    let nats = NatsServer::start().await;
    let webhook = Webhook::ok().await;
    let manager = Manager::new();
    let path = manager.path();
    let variables = [
        ("NOTIFY_SOCKET", &path[..]),
        ("WATCHDOG_USEC", "20000"),
        ("WATCHDOG_PID", "1"),
    ];
    let relay = Relay::between(&nats, &webhook.url(), &variables);
    manager.heard("READY=1").await;
    nats.publish("cms.cache.x", "x").await;
    relay.logged(" -> ").await;
    relay.signal("TERM");
    let all = manager.heard("STOPPING=1").await.concat();
    assert!(!all.contains("WATCHDOG"), "{all}");
}

#[tokio::test]
async fn the_journal_gets_priorities_and_no_timestamps() {
    // A shell gives the relay a file as standard error, and its device and inode as the journal's.
    let script =
        r#"exec 2>log; export JOURNAL_STREAM="$(stat -L -c %d:%i /proc/self/fd/2)"; exec "$0""#;
    let directory = tempfile::tempdir().unwrap();
    let run = |stream: &str| {
        let script = script.replace("$(stat -L -c %d:%i /proc/self/fd/2)", stream);
        let status = std::process::Command::new("sh")
            .args(["-c", &script])
            .arg(Relay::program())
            .env("NATS_HOSTS", "x")
            .current_dir(directory.path())
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(78));
        std::fs::read_to_string(directory.path().join("log")).unwrap()
    };
    let log = run("$(stat -L -c %d:%i /proc/self/fd/2)");
    let lines: Vec<_> = log.lines().collect();
    assert!(lines[0].starts_with("<6>nats-webhook-relay "), "{log}");
    assert!(lines[2].starts_with("<4>NATS_HOSTS is set"), "{log}");
    assert!(lines[3].starts_with("<3>bad configuration: "), "{log}");
    // The variable alone is inherited by whatever a service starts.
    assert!(run("1:1").starts_with('['), "another's journal");
}
