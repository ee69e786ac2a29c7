//! The configuration as a process meets it.

use std::{collections::HashMap, fs};

use nats_webhook_relay::{VARIABLES, VariableDefault};

use crate::support::{Answer, NatsServer, Relay, Webhook};

const GOOD: [(&str, &str); 4] = [
    ("WEBHOOK_DESTINATION", "http://127.0.0.1:1/"),
    ("NATS_HOST", "nats://127.0.0.1:1"),
    ("NATS_SUBJECT_PREFIX", "cms.cache"),
    ("NATS_RELAYED_SUBJECT_PREFIX", "relayed.cache"),
];

#[tokio::test]
async fn every_problem_is_reported_in_one_run() {
    let (code, log) = Relay::start([
        ("NATS_USER", "u"),
        ("WEBHOOK_TIMEOUT", "15"),
        ("RUST_LOG", "a=b=c"),
    ])
    .ended()
    .await;
    assert_eq!(code, Some(78), "{log:#?}");
    for variable in
        GOOD.map(|(name, _)| name)
            .iter()
            .chain(&["NATS_PASS", "WEBHOOK_TIMEOUT", "RUST_LOG"])
    {
        let lines = log
            .iter()
            .filter(|line| line.contains(&format!("configuration: {variable} ")));
        assert_eq!(lines.count(), 1, "{variable}: {log:#?}");
    }
}

#[tokio::test]
async fn the_environment_wins_over_env_local_and_that_over_env() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let lowest = GOOD.map(|(name, value)| format!("{name}='{value}'\n"));
    fs::write(file(".env"), lowest.concat()).unwrap();
    fs::write(
        file(".env.local"),
        "NATS_HOST=nats://127.0.0.1:2\nRUST_LOG=error\n",
    )
    .unwrap();
    let relay = Relay::start_in(directory, [("RUST_LOG", "warn")]);
    relay
        .logged("cannot connect to NATS at nats://127.0.0.1:2")
        .await;
}

#[tokio::test]
async fn a_malformed_dotenv_file_is_reported_with_file_and_line() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(
        directory.path().join(".env.local"),
        "# note\nNATS_PASS=hunter2 hunter2\n",
    )
    .unwrap();
    let (code, log) = Relay::start_in(directory, GOOD).ended().await;
    assert_eq!(code, Some(78), "{log:#?}");
    assert!(log.concat().contains(".env.local, line 2: "), "{log:#?}");
    assert!(!log.concat().contains("hunter2"), "{log:#?}");
}

#[tokio::test]
async fn a_dotenv_file_never_changes_a_password() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(
        directory.path().join(".env"),
        "# $1\nNATS_PASS=pa$hunter2\n",
    )
    .unwrap();
    let (code, log) = Relay::start_in(directory, GOOD).ended().await;
    assert_eq!(code, Some(78), "{log:#?}");
    let expected = "bad configuration: .env, line 2: has a $ that would be replaced";
    assert!(log.last().unwrap().contains(expected), "{log:#?}");
    assert!(!log.concat().contains("hunter2"), "{log:#?}");
}

#[tokio::test]
async fn only_regular_files_are_read() {
    let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pipe = other.path().join("pipe");
    for path in [&pipe, &directory.path().join(".env")] {
        let made = std::process::Command::new("mkfifo").arg(path).status();
        assert!(made.unwrap().success());
    }
    let pipe = pipe.to_str().unwrap().to_owned();
    let relay = Relay::start_in(directory, GOOD);
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(78), "{log:#?}");
    let expected = "bad configuration: .env: cannot be read: it is not a regular file";
    assert!(log.last().unwrap().contains(expected), "{log:#?}");

    let names = [
        "NATS_CA",
        "NATS_CERT",
        "NATS_KEY",
        "NATS_NKEY",
        "NATS_CREDS",
    ];
    for path in ["/dev/zero", &pipe, "/"] {
        for name in names.iter().chain(&["NATS_TOKEN_FILE"]) {
            let variables = GOOD.into_iter().chain([(*name, path)]);
            let (code, log) = Relay::start(variables).ended().await;
            assert_eq!(code, Some(78), "{name}: {log:#?}");
            let found = log.iter().any(|line| {
                line.contains(name)
                    && line.contains(&format!("{path:?}"))
                    && line.contains("not a regular file")
            });
            assert!(found, "{name}={path}: {log:#?}");
        }
    }
}

#[tokio::test]
async fn a_misspelt_variable_is_pointed_out() {
    let variables = GOOD
        .into_iter()
        .chain([("WEBHOOK_TIMEOUTS", "1s"), ("NATS_PORT", "tcp://")]);
    let relay = Relay::start(variables);
    relay.logged("cannot connect").await;
    assert_eq!(relay.lines("is set but not known").len(), 1);
    assert_eq!(
        relay
            .lines("WEBHOOK_TIMEOUTS is set but not known; is WEBHOOK_TIMEOUT meant?")
            .len(),
        1
    );
}

#[tokio::test]
async fn a_log_filter_that_would_silence_it_is_refused() {
    for (filter, meant) in [
        ("warning", "warn"),
        ("nats-webhook-relay=info", "nats_webhook_relay=info"),
    ] {
        let variables = GOOD.into_iter().chain([("RUST_LOG", filter)]);
        let (code, log) = Relay::start(variables).ended().await;
        assert_eq!(code, Some(78), "{log:#?}");
        let meant = format!(
            "bad configuration: RUST_LOG {filter:?} is neither a level nor a module \
                             that logs; is {meant} meant?"
        );
        assert!(log.last().unwrap().ends_with(&meant), "{log:#?}");
    }
}

#[tokio::test]
async fn it_says_where_dotenv_files_were_looked_for_and_which_were_read() {
    let (code, log) = Relay::start([]).ended().await;
    assert_eq!(code, Some(78));
    assert!(
        log[1].contains("found neither .env.local nor .env in /"),
        "{log:#?}"
    );

    let directory = tempfile::tempdir().unwrap();
    fs::write(
        directory.path().join(".env"),
        "NATS_HOST=nats://127.0.0.1:1\n",
    )
    .unwrap();
    let read = format!("read .env in {}", directory.path().display());
    let relay = Relay::start_in(directory, GOOD);
    relay.logged(&read).await;

    // Under a service manager nobody misses one.
    let relay = Relay::start(GOOD);
    relay.logged("cannot connect").await;
    assert_eq!(relay.lines(".env"), [""; 0]);
}

#[tokio::test]
async fn a_trust_store_that_is_not_there_is_a_bad_configuration() {
    let variables = GOOD.into_iter().chain([("SSL_CERT_FILE", "/nowhere.pem")]);
    let (code, log) = Relay::start(variables).ended().await;
    assert_eq!(code, Some(78), "{log:#?}");
    let problem = "bad configuration: SSL_CERT_FILE names \"/nowhere.pem\", which cannot be read";
    assert!(log.last().unwrap().contains(problem), "{log:#?}");
}

fn output(arguments: &[&str]) -> (Option<i32>, String) {
    let output = std::process::Command::new(Relay::program())
        .args(arguments)
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap(),
    )
}

#[test]
fn help_and_version_need_no_configuration_and_other_arguments_are_refused() {
    let (code, help) = output(&["--help"]);
    assert_eq!(code, Some(0));
    for variable in VARIABLES {
        assert!(
            help.contains(&format!("  {} ", variable.name)),
            "{}",
            variable.name
        );
        let words: Vec<_> = help.split_whitespace().collect();
        let note = variable.note.unwrap_or_default();
        assert!(words.join(" ").contains(note), "no {note}: {help}");
    }
    let version = concat!("nats-webhook-relay ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(output(&["--version"]), (Some(0), version.to_owned()));
    assert!(help.lines().all(|line| line.len() <= 100), "{help}");
    for flag in ["-h, --help", "-V, --version", "--check"] {
        assert!(help.contains(flag), "{flag}");
    }
    for (arguments, hint) in [
        (&["--chek"][..], "is --check meant?"),
        (&["-help"], "is --help meant?"),
        (&["serve"], "see nats-webhook-relay --help"),
        (&["--help", "--version"], "see nats-webhook-relay --help"),
    ] {
        let (code, text) = output(arguments);
        assert_eq!((code, text.lines().count()), (Some(78), 1), "{text}");
        assert!(text.trim_end().ends_with(hint), "{text}");
    }
}

#[test]
fn documents_agree_with_the_table_of_variables() {
    let page = include_str!("../../docs/settings.md");
    let example = include_str!("../../.env.example");
    let module: HashMap<String, String> =
        serde_json::from_str(include_str!("../../nix/variables.json")).unwrap();
    assert_eq!(module.len(), VARIABLES.len());
    for variable in VARIABLES {
        assert_eq!(
            module[variable.name],
            variable.kind.to_string(),
            "{}",
            variable.name
        );
        let row = page
            .lines()
            .find(|line| {
                let first = line.split('|').nth(1).unwrap_or_default();
                first.contains(&format!("`{}`", variable.name))
            })
            .unwrap_or_else(|| panic!("docs/settings.md lacks {}", variable.name));
        if let VariableDefault::Value(value) = variable.default {
            assert!(
                row.contains(&format!("`{value}`")),
                "another default: {row}"
            );
        }
        if let Some(note) = variable.note {
            assert!(row.replace('`', "").contains(note), "no {note}: {row}");
        }
        assert!(
            example.lines().any(|line| {
                line.trim_start_matches("# ")
                    .starts_with(&format!("{}=", variable.name))
            }),
            ".env.example lacks {}",
            variable.name
        );
    }
}

#[tokio::test]
async fn no_secret_is_logged_at_any_level() {
    let nats = NatsServer::with_config("authorization { user: relay, password: hunter2 }").await;
    let webhook = Webhook::script([
        Answer::status(503),
        Answer::Close,
        Answer::OK,
        Answer::full("302 Found\r\nlocation: /login?next=hunter2", ""),
    ])
    .await;
    let destination = format!(
        "http://user:hunter2@{}/hook?token=hunter2",
        webhook.address()
    );
    let variables = [
        ("NATS_USER", "relay"),
        ("NATS_PASS", "hunter2"),
        ("RUST_LOG", "trace"),
    ];
    let relay = Relay::between(&nats, &destination, &variables);
    relay.logged("listening on").await;
    let options =
        async_nats::ConnectOptions::with_user_and_password("relay".into(), "hunter2".into());
    let client = nats.client_with(options).await;
    for payload in ["first", "second"] {
        client.publish("cms.cache.x", payload.into()).await.unwrap();
    }
    let requests = webhook.received(4).await;
    assert!(
        requests[0].line.contains("token=hunter2"),
        "the query is sent"
    );
    let basic = "Basic dXNlcjpodW50ZXIy"; // user:hunter2
    assert_eq!(
        requests[0].header("authorization"),
        Some(basic),
        "the userinfo is sent"
    );
    relay.logged("is not relayed").await;
    relay.signal("TERM");
    let (_, log) = relay.ended().await;
    assert!(log.iter().any(|line| line.contains(" -> ")), "{log:#?}");
    for line in log {
        assert!(
            !line.contains("hunter2") && !line.contains("dXNlcjpodW50ZXIy"),
            "{line}"
        );
    }
}
