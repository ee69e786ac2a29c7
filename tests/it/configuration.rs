//! The configuration as a process meets it.

use std::{collections::HashMap, fs};

use nats_webhook_relay::{VARIABLES, VariableDefault};

use crate::support::{Answer, NatsServer, Relay, Webhook, until};

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
        ("LOG_FORMAT", "yaml"),
    ])
    .ended()
    .await;
    assert_eq!(code, Some(78), "{log:#?}");
    for variable in
        GOOD.map(|(name, _)| name)
            .iter()
            .chain(&["NATS_PASS", "WEBHOOK_TIMEOUT", "LOG_FORMAT"])
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

/// What stands in the `.env` files of Next.js projects, and means nothing to the relay.
const FOREIGN: [&str; 36] = [
    "APP_NAME=My Great App",
    "APP_NAME=My Great App # and more",
    "DATABASE_URL=postgres://app:pa$$word@localhost:5432/app",
    "URL=http://$HOST:$PORT/",
    "URL=\"http://${HOST}/\"",
    "ADMIN_HASH=$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy",
    "QUERY=`select * from \"pages\" where title = 'x'`",
    "QUERY=`one\ntwo`",
    "FLAGS={\"a\": [1, 2], \"b\": \"it's\"}",
    "/* not a comment of dotenv */",
    "/*",
    "*/",
    "// nor is this",
    "; nor this",
    "KEY: value",
    "KEY : a value",
    "just some words",
    "LONELY",
    "export LONELY",
    "export A=1 B=2",
    "NOTE=don't",
    "NOTE='don't'",
    "'",
    "\"",
    "`",
    "A='",
    "A=\"",
    "A=\"unfinished",
    "A=\"\n-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQ==\n-----END PRIVATE KEY-----\n\"",
    "A='one\n\n  two\n'",
    "A=\\x \\",
    "9LIVES=cat",
    "SOME-NAME=x",
    "=x",
    "<<<<<<< HEAD",
    "NAME=M\u{fc}ller \u{1f980} \u{0}",
];

#[tokio::test]
async fn what_is_not_ours_in_a_dotenv_file_stops_nothing_and_changes_nothing() {
    let ours = GOOD
        .map(|(name, value)| format!("{name}={value}\n"))
        .concat();
    let mut wrong = Vec::new();
    for foreign in FOREIGN {
        for (before, after) in [(foreign, ""), ("", foreign), (foreign, foreign)] {
            let directory = tempfile::tempdir().unwrap();
            let file = format!("{before}\n{ours}{after}");
            fs::write(directory.path().join(".env"), file).unwrap();
            let relay = Relay::start_in(directory, []);
            let connects = until("it starts or ends", async || {
                let log = relay.log().concat();
                log.contains("NATS at nats://127.0.0.1:1:") || log.contains("bad configuration")
            });
            connects.await;
            if !relay.lines("bad configuration").is_empty() || !relay.lines("not known").is_empty()
            {
                wrong.push((before, after, relay.log()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}: {wrong:#?}", wrong.len());
    // Nor do other bytes than text.
    let directory = tempfile::tempdir().unwrap();
    let file = [b"NAME=M\xfcller\n", ours.as_bytes()].concat();
    fs::write(directory.path().join(".env"), file).unwrap();
    fs::create_dir(directory.path().join(".env.local")).unwrap();
    Relay::start_in(directory, [])
        .logged("NATS at nats://127.0.0.1:1:")
        .await;
}

#[tokio::test]
async fn a_line_of_ours_that_cannot_be_read_is_reported_with_all_other_problems() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(
        directory.path().join(".env.local"),
        "# $1\nNATS_PASS=pa$hunter2\nNATS_USER=hunter2 hunter2\n",
    )
    .unwrap();
    // What the environment sets is not read from the file.
    fs::write(directory.path().join(".env"), "NATS_HOST=$HOST\n").unwrap();
    let variables = GOOD.into_iter().chain([("WEBHOOK_TIMEOUT", "15")]);
    let (code, log) = Relay::start_in(directory, variables).ended().await;
    assert_eq!(code, Some(78), "{log:#?}");
    let problems: Vec<_> = log
        .iter()
        .filter(|line| line.contains("bad conf"))
        .collect();
    assert_eq!(problems.len(), 3, "{log:#?}");
    for problem in [
        "/.env.local, line 2, has a $ that would be replaced",
        "/.env.local, line 3, is not a valid NAME=value",
        "WEBHOOK_TIMEOUT ",
    ] {
        assert!(
            problems.iter().any(|line| line.contains(problem)),
            "{log:#?}"
        );
    }
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
    let expected = "/.env cannot be read: it is not a regular file";
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
async fn a_value_in_quotes_is_pointed_out() {
    let quoted = [("NATS_QUEUE_GROUP", "\"g\""), ("GREETING", "'hello'")];
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join(".env"), "LOG_FORMAT='text'\n").unwrap();
    let relay = Relay::start_in(directory, GOOD.into_iter().chain(quoted));
    relay.logged("cannot connect").await;
    let lines = relay.lines("in quotes");
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(
        lines[0].contains("WARN") && lines[0].contains("NATS_QUEUE_GROUP"),
        "{lines:#?}"
    );
}

#[tokio::test]
async fn a_misspelt_variable_is_pointed_out() {
    let variables = GOOD
        .into_iter()
        .chain([("WEBHOOK_TIMEOUTS", "1s"), ("NATS_PORT", "tcp://")]);
    let relay = Relay::start(variables);
    relay.logged("cannot connect").await;
    relay.logged("is set but not known").await;
    assert_eq!(relay.lines("is set but not known").len(), 1);
    assert_eq!(
        relay
            .lines("WEBHOOK_TIMEOUTS is set but not known; did you mean WEBHOOK_TIMEOUT?")
            .len(),
        1
    );
}

#[tokio::test]
async fn a_log_filter_of_another_program_does_not_silence_the_relay() {
    for (filter, levels, warns) in [
        ("sqlx=warn,next=debug", &["WARN", "INFO"][..], true),
        ("warning", &["WARN", "INFO"], true),
        ("nats-webhook-relay=info", &["WARN", "INFO"], true),
        ("info,sqlx=warn", &["WARN", "INFO"], false),
        ("warn", &["WARN"], false),
        ("nats_webhook_relay::forward=warn", &["WARN"], false),
        ("off", &[], false),
        ("sqlx=warn,OFF", &[], false),
    ] {
        let webhook = Webhook::script([Answer::status(503)]).await;
        let nats = NatsServer::start().await;
        let relay = Relay::between(&nats, &webhook.url(), &[("RUST_LOG", filter)]);
        until("a message gets through", async || {
            nats.publish("cms.cache.x", "x").await;
            webhook.count() > 1
        })
        .await;
        relay.signal("TERM");
        let (_, log) = relay.ended().await;
        for level in ["WARN", "INFO"] {
            let shows = log.iter().any(|line| line.contains(level));
            assert_eq!(shows, levels.contains(&level), "{filter}: {log:#?}");
        }
        let warning = format!("RUST_LOG={filter:?} shows nothing of the relay");
        let warned = log.iter().any(|line| line.contains(&warning));
        assert_eq!(warned, warns, "{filter}: {log:#?}");
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
    let read = format!("{}/.env sets NATS_HOST", directory.path().display());
    let others = GOOD.into_iter().filter(|(name, _)| *name != "NATS_HOST");
    let relay = Relay::start_in(directory, others);
    relay.logged(&read).await;

    // Under a service manager nobody misses one.
    let relay = Relay::start(GOOD);
    relay.logged("cannot connect").await;
    assert_eq!(relay.lines(".env"), [""; 0]);
}

#[test]
fn settings_can_be_checked_offline() {
    let check = |changes: &[(&str, &str)]| {
        let output = std::process::Command::new(Relay::program())
            .arg("--check=config")
            .env_clear()
            .envs(GOOD)
            .envs(changes.iter().copied())
            .current_dir(std::env::temp_dir())
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let (code, report) = check(&[]);
    assert_eq!(code, Some(0), "{report}");
    assert!(
        report.ends_with("ok      configuration: valid\n"),
        "{report}"
    );
    let (code, report) = check(&[("WEBHOOK_TIMEOUT", "15"), ("NATS_USER", "u")]);
    assert_eq!(code, Some(78), "{report}");
    assert_eq!(
        report.matches("FAILED  configuration: ").count(),
        2,
        "{report}"
    );
}

#[tokio::test]
async fn a_trust_store_that_is_not_there_is_a_bad_configuration() {
    let https = [
        ("SSL_CERT_FILE", "/nowhere.pem"),
        ("WEBHOOK_DESTINATION", "https://127.0.0.1:1/"),
    ];
    let (code, log) = Relay::start(GOOD.into_iter().chain(https)).ended().await;
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
        let (name, meaning) = (variable.name, variable.meaning);
        let default = match variable.default {
            VariableDefault::Required(_) => " (required)".to_owned(),
            VariableDefault::Off => String::new(),
            VariableDefault::Value(value) => format!(" (default: {value})"),
        };
        let entry = format!("\n  {name}{default}\n      {meaning}\n");
        assert!(help.contains(&entry), "{entry}: {help}");
    }
    let version = concat!("nats-webhook-relay ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(output(&["--version"]), (Some(0), version.to_owned()));
    assert!(help.lines().all(|line| line.len() <= 100), "{help}");
    for flag in ["-h, --help", "-V, --version", "--check"] {
        assert!(help.contains(flag), "{flag}");
    }
    for arguments in [&["--chek"][..], &["serve"], &["--help", "--version"]] {
        let (code, text) = output(arguments);
        assert_eq!((code, text.lines().count()), (Some(78), 1), "{text}");
        let hint = "see nats-webhook-relay --help\n";
        assert!(text.ends_with(hint), "{text}");
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
            format!("{:?}", variable.kind).to_lowercase(),
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
        ("WEBHOOK_GIVE_UP_ON", "3xx"),
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
