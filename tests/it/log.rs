//! How the log looks, and a log that nobody reads.

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::{
    net::{TcpListener, TcpStream},
    process::{Child, Command},
};

use crate::{
    operating::metrics,
    support::{Answer, NatsServer, PATIENCE, Relay, Webhook, next, until, until_ok, usual},
};

/// Where a log goes, and where it can be read: a pipe, a socket, and a terminal.
fn standard_errors() -> Vec<(File, OwnedFd)> {
    let (pipe, into_pipe) = std::io::pipe().unwrap();
    let (socket, into_socket) = UnixStream::pair().unwrap();
    vec![
        (OwnedFd::from(pipe).into(), into_pipe.into()),
        (OwnedFd::from(socket).into(), into_socket.into()),
        #[cfg(target_os = "linux")]
        terminal(),
    ]
}

#[cfg(target_os = "linux")]
fn terminal() -> (File, OwnedFd) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let other_end = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
    (terminal.into(), other_end)
}

/// Writes until nothing more fits.
fn fill(into: OwnedFd) -> OwnedFd {
    let flags = fcntl_getfl(&into).unwrap();
    fcntl_setfl(&into, flags | OFlags::NONBLOCK).unwrap();
    let mut file = File::from(into);
    for size in [4096, 1] {
        loop {
            match file.write(&vec![b'\n'; size]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
    fcntl_setfl(&file, flags).unwrap();
    file.into()
}

/// A relay with this as its standard error, and the address of its status port, once it is subscribed.
async fn start(nats: &NatsServer, webhook: &Webhook, stderr: OwnedFd) -> (Child, String) {
    start_by(Command::new(Relay::program()), nats, webhook, stderr).await
}

/// The same, by another command.
async fn start_by(
    mut command: Command,
    nats: &NatsServer,
    webhook: &Webhook,
    stderr: OwnedFd,
) -> (Child, String) {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    let relay = command
        .env_clear()
        .envs(usual(&nats.url(), &webhook.url()))
        .env("STATUS_LISTEN", &address)
        .env("SHUTDOWN_TIMEOUT", "10m")
        .current_dir(std::env::temp_dir())
        .stderr(Stdio::from(stderr))
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    until_ok("it starts", async || TcpStream::connect(&address).await).await;
    crate::operating::until_answer(&address, "/readyz", 200, "ok").await;
    (relay, address)
}

fn signal(relay: &Child, name: &str) {
    let id = relay.id().unwrap().to_string();
    let sent = std::process::Command::new("kill")
        .args(["-s", name, &id])
        .status();
    assert!(sent.unwrap().success());
}

async fn ended(mut relay: Child) -> Option<i32> {
    let ended = tokio::time::timeout(PATIENCE, relay.wait()).await;
    ended.expect("it ends").unwrap().code()
}

#[tokio::test]
async fn what_nobody_reads_is_dropped_and_counted_and_stops_nothing() {
    let nats = NatsServer::start().await;
    let client = nats.client().await;
    let mut relayed = client.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::ok().await;
    for (mut reader, stderr) in standard_errors() {
        let (relay, address) = start(&nats, &webhook, fill(stderr)).await;
        // Long lines, because some thousand short ones wait for a reader.
        let subject = format!("cms.cache.{}", "x".repeat(1400));
        for _ in 0..600 {
            let subject = subject.clone();
            client.publish(subject, "x".into()).await.unwrap();
        }
        for _ in 0..600 {
            next(&mut relayed).await;
        }

        let log = Arc::new(Mutex::new(String::new()));
        let text = Arc::clone(&log);
        // Ends with the relay.
        std::thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                let new = String::from_utf8_lossy(&buffer[..length]);
                text.lock().unwrap().push_str(&new);
            }
        });
        until("there is room again", async || {
            log.lock().unwrap().contains("were dropped")
        })
        .await;
        client.publish("cms.cache.y", "y".into()).await.unwrap();
        until("the next line is written", async || {
            log.lock().unwrap().contains("cms.cache.y -> ")
        })
        .await;
        let dropped = metrics(&address).await["log_lines_dropped_total"];
        assert!(dropped > 100.0, "{dropped}");
        let report = format!("{dropped} log lines could not be written and were dropped");
        let text = log.lock().unwrap().clone();
        assert!(text.contains(&report), "{report}: {}", text.len());
        signal(&relay, "TERM");
        assert_eq!(ended(relay).await, Some(0));
    }
}

#[tokio::test]
async fn lines_that_a_file_does_not_take_are_counted_and_stop_nothing() {
    let nats = NatsServer::start().await;
    let mut relayed = nats.client().await.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::ok().await;
    let full = File::options().write(true).open("/dev/full").unwrap();
    let limited = tempfile::tempfile().unwrap();
    for (limit, stderr) in [("unlimited", full), ("0", limited)] {
        let mut command = Command::new("/bin/sh");
        let script = format!("ulimit -f {limit}; exec \"$0\"");
        command.args(["-c", &script]).arg(Relay::program());
        let (relay, address) = start_by(command, &nats, &webhook, stderr.into()).await;
        for _ in 0..100 {
            nats.publish("cms.cache.x", "x").await;
            next(&mut relayed).await;
        }
        until("the lines are counted", async || {
            metrics(&address).await["log_lines_dropped_total"] >= 100.0
        })
        .await;
        signal(&relay, "TERM");
        assert_eq!(ended(relay).await, Some(0));
    }
}

#[tokio::test]
async fn a_log_file_goes_on_where_it_was() {
    let nats = NatsServer::start().await;
    let webhook = Webhook::ok().await;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"before\n").unwrap();
    let stderr = file.as_file().try_clone().unwrap();
    let (_relay, _) = start(&nats, &webhook, stderr.into()).await;
    let log = async || std::fs::read_to_string(file.path()).unwrap();
    until("its lines are written", async || {
        log().await.contains("listening on cms.cache.>")
    })
    .await;
    let log = log().await;
    assert!(log.starts_with("before\n["), "{log}");
}

#[tokio::test]
async fn a_log_that_nobody_reads_delays_no_end() {
    let nats = NatsServer::start().await;
    let webhook = Webhook::script([Answer::Hang]).await;
    let (_reader, into_pipe) = std::io::pipe().unwrap();
    let (mut relay, _) = start(&nats, &webhook, fill(into_pipe.into())).await;
    nats.publish("cms.cache.x", "x").await;
    webhook.received(1).await;
    // Two that come at the same moment count as one.
    for _ in 0..100 {
        signal(&relay, "TERM");
        let moment = Duration::from_millis(200);
        if let Ok(status) = tokio::time::timeout(moment, relay.wait()).await {
            return assert_eq!(status.unwrap().code(), Some(0));
        }
    }
    panic!("it does not end");
}

#[test]
fn an_output_that_nobody_reads_is_no_crash() {
    for argument in ["--help", "--version", "--check"] {
        let (_, into_pipe) = std::io::pipe().unwrap();
        let output = std::process::Command::new(Relay::program())
            .arg(argument)
            .env_clear()
            .stdout(into_pipe)
            .output()
            .unwrap();
        let code = if argument == "--check" { 78 } else { 1 };
        assert_eq!(output.status.code(), Some(code), "{argument}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
}

/// The lines of a log in JSON.
fn objects(log: &[String]) -> Vec<serde_json::Value> {
    log.iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

#[tokio::test]
async fn in_json_every_line_is_an_object_with_the_fields_of_its_event() {
    let nats = NatsServer::start().await;
    let webhook = Webhook::script([Answer::status(503), Answer::OK, Answer::status(422)]).await;
    // The libraries say something, too.
    let changes = [("LOG_FORMAT", "json"), ("RUST_LOG", "trace")];
    let relay = Relay::listening(&nats, &webhook, &changes).await;
    nats.publish("cms.cache.quoted", "x").await;
    relay.logged("relayed.cache.quoted (200").await;
    nats.publish("cms.cache.refused", "x").await;
    relay.logged("cms.cache.refused is not relayed").await;
    relay.signal("TERM");
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(0));

    let objects = objects(&log);
    for object in &objects {
        let time = object["time"].as_str().unwrap();
        humantime::parse_rfc3339(time).unwrap();
        assert!(object["level"].is_string() && object["message"].is_string());
    }
    let event = |level: &str, subject: &str| {
        let mut found = objects
            .iter()
            .filter(|object| object["level"] == level && object["subject"] == subject);
        found.next().cloned().unwrap()
    };
    let failed = event("WARN", "cms.cache.quoted");
    assert_eq!(
        (&failed["status"], &failed["attempts"]),
        (&503.into(), &1.into())
    );
    assert!(
        failed["reason"].as_str().unwrap().contains("503"),
        "{failed}"
    );
    let relayed = event("INFO", "cms.cache.quoted");
    assert_eq!(relayed["relayed_subject"], "relayed.cache.quoted");
    assert_eq!(
        (&relayed["status"], &relayed["attempts"]),
        (&200.into(), &2.into())
    );
    assert!(relayed["seconds"].as_f64().unwrap() > 0.0, "{relayed}");
    let given_up = event("ERROR", "cms.cache.refused");
    assert_eq!(
        (&given_up["status"], &given_up["attempts"]),
        (&422.into(), &1.into())
    );
    assert!(given_up["relayed_subject"].is_null(), "{given_up}");
}

#[tokio::test]
async fn the_problems_of_a_bad_configuration_are_told_in_json_too() {
    let (code, log) = Relay::start([("LOG_FORMAT", "json")]).ended().await;
    assert_eq!(code, Some(78));
    let required = objects(&log).into_iter().find(|object| {
        object["level"] == "ERROR"
            && object["message"]
                .as_str()
                .unwrap()
                .contains("NATS_HOST is required")
    });
    assert!(required.is_some(), "{log:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_level_is_coloured_on_a_terminal_unless_that_is_not_wanted() {
    for (variable, value, is_coloured) in [
        ("TERM", "xterm", true),
        ("NO_COLOR", "1", false),
        ("NO_COLOR", "", true),
        ("TERM", "dumb", false),
    ] {
        let (mut terminal, stderr) = terminal();
        let status = std::process::Command::new(Relay::program())
            .env_clear()
            .env(variable, value)
            .current_dir(std::env::temp_dir())
            .stderr(Stdio::from(stderr))
            .status();
        assert_eq!(status.unwrap().code(), Some(78));
        let mut text = String::new();
        // A terminal that nobody writes to any more is an error to read from.
        let _ = terminal.read_to_string(&mut text);
        assert!(text.contains("ERROR"), "{text}");
        assert_eq!(
            text.contains("\x1b[1;31mERROR\x1b[0m"),
            is_coloured,
            "{variable}={value}: {text}"
        );
    }
}
