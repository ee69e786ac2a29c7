//! The smallest permissions for a NATS user, as docs/permissions.md has them.

use crate::support::{Answer, Mode, NatsServer, Relay, Webhook, until, until_ok};

const INBOX: (&str, &str) = ("NATS_INBOX_PREFIX", "_INBOX_relay");
const GROUP: (&str, &str) = ("NATS_QUEUE_GROUP", "workers");
const FAILED: (&str, &str) = ("NATS_FAILED_SUBJECT_PREFIX", "failed.cache");
const STREAMS: [(&str, &str); 2] = [
    ("NATS_RELAYED_STREAM", "RELAYED"),
    ("NATS_FAILED_STREAM", "FAILED"),
];

/// The lines of the page's block for a mode, without those that these settings do not need.
pub fn block(mode: Mode, settings: &[(&str, &str)]) -> Vec<&'static str> {
    let title = match mode {
        Mode::Core => "## Core mode\n\n```\n",
        Mode::Durable => "## Durable mode\n\n```\n",
    };
    let page = include_str!("../../docs/permissions.md");
    let (_, rest) = page.split_once(title).expect("the block is there");
    let (block, _) = rest.split_once("```").expect("the block ends");
    let is_set = |text: &str| {
        let mut names = text.split(" or ").map(|name| name.split('=').next());
        names.any(|name| settings.iter().any(|(set, _)| Some(*set) == name))
    };
    block
        .lines()
        .filter(|line| match line.split_once(" # ") {
            None => true,
            Some((_, condition)) => match condition.split_once(' ') {
                Some(("with", names)) => is_set(names),
                Some(("without", names)) => !is_set(names),
                _ => panic!("{line}"),
            },
        })
        .collect()
}

/// Whether a line of a block permits something.
fn permits(line: &str) -> bool {
    line.trim_start().starts_with('"')
}

/// A server with a user that has these permissions and no others, and its streams.
async fn server(permissions: &[&str]) -> NatsServer {
    let nats = NatsServer::with_config(&format!(
        "jetstream {{ store_dir: \"$DIR/jetstream\" }}
         authorization {{ users = [
            {{ user: admin, password: good }},
            {{ user: relay, password: good
               {}
            }}
         ] }}
         no_auth_user: admin",
        permissions.join("\n")
    ))
    .await;
    for (stream, subject) in [
        ("CMS", "cms.cache.>"),
        ("RELAYED", "relayed.cache.>"),
        ("FAILED", "failed.cache.>"),
    ] {
        nats.create_stream(stream, subject, 1).await;
    }
    nats
}

/// All that is set for a relay in this mode.
fn variables<'a>(mode: Mode, settings: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let durable = [("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay")];
    let mode = match mode {
        Mode::Core => &[][..],
        Mode::Durable => &durable,
    };
    let user = [("NATS_USER", "relay"), ("NATS_PASS", "good"), INBOX];
    [mode, &user, settings].concat()
}

/// A webhook that refuses what is `bad`.
async fn webhook() -> Webhook {
    Webhook::start(|_, request| match request.text().as_str() {
        "bad" => Answer::status(422),
        _ => Answer::OK,
    })
    .await
}

/// How many messages each of the relay's streams has got.
async fn kept(nats: &NatsServer) -> [u64; 2] {
    let jetstream = nats.jetstream().await;
    let mut kept = [0; 2];
    for ((_, name), kept) in STREAMS.iter().zip(&mut kept) {
        let stream = jetstream.get_stream(*name).await.unwrap();
        *kept = stream.cached_info().state.messages;
    }
    kept
}

#[tokio::test]
async fn the_smallest_permissions_are_enough_and_none_of_them_is_too_many() {
    let everything = [&STREAMS[..], &[FAILED]].concat();
    for (mode, settings) in [
        (Mode::Core, &[][..]),
        (Mode::Core, &[GROUP]),
        (Mode::Core, &[STREAMS[0]]),
        (Mode::Core, &[&everything[..], &[GROUP]].concat()),
        (Mode::Durable, &[]),
        (Mode::Durable, &[FAILED]),
        (Mode::Durable, &[STREAMS[0]]),
        (Mode::Durable, &everything),
    ] {
        let permissions = block(mode, settings);
        let variables = variables(mode, settings);
        let nats = server(&permissions).await;
        let webhook = webhook().await;
        let relay = Relay::listening(&nats, &webhook, &variables).await;
        nats.publish("cms.cache.x", "good").await;
        nats.publish("cms.cache.x", "bad").await;
        let expected = [1, u64::from(settings.contains(&FAILED))];
        until("both streams have what they should", async || {
            kept(&nats).await == expected
        })
        .await;
        let (code, report) = Relay::check(&nats, &webhook, &variables).await;
        assert_eq!(code, Some(0), "{report:#?}");
        relay.logged("cms.cache.x is not relayed: ").await;
        relay.signal("TERM");
        let (_, log) = relay.ended().await;
        let complaints: Vec<_> = log
            .iter()
            .filter(|line| line.contains("WARN") || line.contains("ERROR"))
            .collect();
        assert_eq!(complaints.len(), 1, "only what is given up: {log:#?}");
        // Core mode asks its inbox, permitted or not.
        let is_refused = nats.log().contains("Violation");
        assert_eq!(is_refused, mode == Mode::Core, "{}", nats.log());

        // Without any one of them it says what is missing.
        for missing in permissions.iter().filter(|line| permits(line)) {
            let mut rest = permissions.clone();
            for line in rest.iter_mut().filter(|line| line == &missing) {
                // An empty list would permit everything.
                *line = "\"nothing\"";
            }
            let nats = server(&rest).await;
            let relay = Relay::between(&nats, &webhook.url(), &variables);
            let subject = missing.split(['"', ' ', '>']).find(|part| !part.is_empty());
            until_ok(&format!("it complains of {missing}"), async || {
                nats.publish("cms.cache.x", "good").await;
                nats.publish("cms.cache.x", "bad").await;
                let log = relay.log();
                let complains = log.iter().any(|line| {
                    (line.contains("no permission") || line.contains("allow $JS"))
                        && line.contains(subject.unwrap_or_default())
                });
                if complains { Ok(()) } else { Err(log) }
            })
            .await;
        }
    }
}

#[tokio::test]
async fn whoever_may_not_use_the_inbox_is_told_of_the_prefix() {
    for (mode, settings) in [(Mode::Durable, &[][..]), (Mode::Core, &STREAMS[..1])] {
        let nats = server(&block(mode, settings)).await;
        let webhook = webhook().await;
        let own: Vec<_> = variables(mode, settings)
            .into_iter()
            .filter(|variable| *variable != INBOX)
            .collect();
        let relay = Relay::between(&nats, &webhook.url(), &own);
        let (code, log) = relay.ended().await;
        assert_eq!(code, Some(1), "{log:#?}");
        let last = log.last().unwrap();
        assert!(
            last.contains("no permission to subscribe to _INBOX.>")
                && last.contains("set NATS_INBOX_PREFIX"),
            "{log:#?}"
        );
    }
}
