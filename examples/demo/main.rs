//! The main job, live: a real nats-server, a small webhook endpoint, the relay as its users run it, and a few messages
//! as a CMS would publish them. With `--durable`, messages are published while the relay is down, and it is killed in
//! the middle. With `--lanes`, four relays share a bulk edit. `scripts/demo` runs it. It exits with 0 only if
//! everything arrived, in order, and the four were at least three times as fast as one.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lanes;
#[path = "../../tests/it/support/mod.rs"]
mod support;

use std::{
    ops::RangeInclusive,
    pin::Pin,
    process::ExitCode,
    time::{Duration, Instant},
};

use async_nats::{Client, ConnectOptions};
use support::{Answer, NatsServer, Relay, Webhook, next};
use tokio::signal::unix::{SignalKind, signal};

const SUBJECTS: [&str; 5] = [
    "pages.home",
    "pages.about",
    "posts.42",
    "menus.main",
    "pages.home",
];
/// How long the webhook takes for each request.
const LATENCY: Duration = Duration::from_millis(20);
/// What the webhook answers, request by request: the third message fails twice at first.
const STATUSES: [u16; 7] = [200, 200, 503, 503, 200, 200, 200];
/// Which message each request should carry.
const ORDER: [&str; 7] = ["1", "2", "3", "3", "3", "4", "5"];

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let demo: Pin<Box<dyn Future<Output = bool>>> = match &arguments[..] {
        [] => Box::pin(core()),
        [flag] if flag == "--durable" => Box::pin(durable()),
        [flag] if flag == "--lanes" => Box::pin(lanes::compare()),
        _ => {
            eprintln!("Usage: scripts/demo [--durable | --lanes]");
            return ExitCode::FAILURE;
        }
    };
    // Whichever ends first, everything that was started ends with it.
    tokio::select! {
        good = demo => {
            println!("{}", if good { GOOD } else { BAD });
            if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        _ = tokio::signal::ctrl_c() => ExitCode::from(130),
        _ = terminate.recv() => ExitCode::from(143),
    }
}

const GOOD: &str =
    "Everything arrived, in order, and was relayed only after its webhook succeeded.";
const BAD: &str = "FAILED: something was lost, out of order or too slow.";

/// What happened, and when.
type Timeline = Vec<(Instant, String)>;

/// Prints what happened, and what the webhook got, by the time since `start`.
fn print(mut timeline: Timeline, webhook: &Webhook, start: Instant) {
    for request in webhook.requests() {
        let status = match request.status {
            0 => "not at all".to_owned(),
            status => status.to_string(),
        };
        let what = format!("#{}   webhook answered {status}", request.text());
        timeline.push((request.answered.unwrap_or(request.at), what));
    }
    timeline.sort_by_key(|(at, _)| *at);
    for (at, what) in timeline {
        println!("{:>8.1} ms  {what}", (at - start).as_secs_f64() * 1000.0);
    }
}

async fn core() -> bool {
    let nats = NatsServer::with_config("authorization { user: demo, password: demo }").await;
    println!("nats-server  {}, with a user and a password", nats.url());
    let webhook = Webhook::script(STATUSES.map(|status| Answer::Status(status, LATENCY))).await;
    println!(
        "webhook      {}, which fails twice for the third message",
        webhook.url()
    );
    let login = [("NATS_USER", "demo"), ("NATS_PASS", "demo")];
    let relay = Relay::listening(&nats, &webhook, &login).await;
    println!("relay        cms.cache.> -> webhook -> relayed.cache.>\n");

    let login = || ConnectOptions::with_user_and_password("demo".into(), "demo".into());
    let browser = nats.client_with(login()).await;
    let mut relayed = browser.subscribe("relayed.cache.>").await.unwrap();
    browser.flush().await.unwrap();
    let cms = nats.client_with(login()).await;

    let start = Instant::now();
    let mut timeline = Timeline::new();
    for (number, subject) in (1..).zip(SUBJECTS) {
        let subject = format!("cms.cache.{subject}");
        timeline.push((
            Instant::now(),
            format!("#{number} published            {subject}"),
        ));
        cms.publish(subject, number.to_string().into())
            .await
            .unwrap();
    }
    let mut in_order = true;
    for (number, subject) in (1..).zip(SUBJECTS) {
        let message = next(&mut relayed).await;
        let payload = String::from_utf8_lossy(&message.payload).into_owned();
        in_order &= payload == number.to_string();
        in_order &= message.subject.as_str() == format!("relayed.cache.{subject}");
        let what = format!("#{payload}     relayed          {}", message.subject);
        timeline.push((Instant::now(), what));
    }
    in_order &= webhook.bodies() == ORDER;
    print(timeline, &webhook, start);

    relay.signal("TERM");
    let (code, log) = relay.ended().await;
    println!("\nThe relay's own log:\n  {}\n", log.join("\n  "));
    in_order && code == Some(0)
}

async fn durable() -> bool {
    let nats = NatsServer::with_stream().await;
    println!(
        "nats-server  {}, with the stream CMS of cms.cache.>",
        nats.url()
    );
    let webhook = Webhook::start(|_, _| Answer::Status(200, LATENCY)).await;
    println!("webhook      {}\n", webhook.url());
    let browser = nats.client().await;
    let mut relayed = browser.subscribe("relayed.cache.>").await.unwrap();
    browser.flush().await.unwrap();
    let cms = nats.client().await;

    let start = Instant::now();
    let act = async {
        let mut timeline = Timeline::new();
        publish(&cms, 1..=4, "the relay is not running yet", &mut timeline).await;
        let mut relay = Relay::durable(&nats, &webhook, &[]).await;
        timeline.push((Instant::now(), "-- the relay is started".to_owned()));
        webhook.received(3).await;
        relay.kill().await;
        timeline.push((
            Instant::now(),
            "-- the relay is killed with kill -9".to_owned(),
        ));
        publish(&cms, 5..=8, "the relay is down", &mut timeline).await;
        let relay = Relay::durable(&nats, &webhook, &[]).await;
        timeline.push((Instant::now(), "-- the relay is started again".to_owned()));
        (relay, timeline)
    };
    let listen = async {
        let (mut first, mut timeline) = (Vec::new(), Timeline::new());
        while first.len() < 8 {
            let payload = String::from_utf8_lossy(&next(&mut relayed).await.payload).into_owned();
            let again = if first.contains(&payload) {
                " again"
            } else {
                ""
            };
            timeline.push((Instant::now(), format!("#{payload}     relayed{again}")));
            if again.is_empty() {
                first.push(payload);
            }
        }
        (first, timeline)
    };
    let ((relay, acted), (first, heard)) = tokio::join!(act, listen);
    print([acted, heard].concat(), &webhook, start);
    relay.signal("TERM");
    let (code, _) = relay.ended().await;
    println!("\nA message interrupted by a kill is redelivered after the ack wait of 5 s.\n");
    first.into_iter().eq((1..=8).map(|n| n.to_string())) && code == Some(0)
}

async fn publish(cms: &Client, numbers: RangeInclusive<u32>, when: &str, timeline: &mut Timeline) {
    timeline.push((Instant::now(), format!("-- {when}")));
    for number in numbers {
        timeline.push((
            Instant::now(),
            format!("#{number} published            cms.cache.x"),
        ));
        cms.publish("cms.cache.x", number.to_string().into())
            .await
            .unwrap();
    }
    cms.flush().await.unwrap();
}
