//! The main job before one's eyes: a real nats-server with a login, a small webhook endpoint, the
//! relay as its users run it, and a few messages as a CMS would publish them. `scripts/demo` runs
//! it. It exits with 0 only if everything arrived, in order.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../tests/it/support/mod.rs"]
mod support;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use async_nats::ConnectOptions;
use support::{Answer, NatsServer, Received, Relay, Webhook, next};
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
    // Whichever ends first, everything that was started ends with it.
    tokio::select! {
        good = demo() => if good { ExitCode::SUCCESS } else { ExitCode::FAILURE },
        _ = tokio::signal::ctrl_c() => ExitCode::from(130),
        _ = terminate.recv() => ExitCode::from(143),
    }
}

async fn demo() -> bool {
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
    let mut timeline = Vec::new();
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
    let requests = webhook.requests();
    in_order &= requests.iter().map(Received::text).eq(ORDER);
    for request in &requests {
        let what = format!("#{}   webhook answered {}", request.text(), request.status);
        timeline.push((request.answered.unwrap_or(request.at), what));
    }
    timeline.sort_by_key(|(at, _)| *at);
    for (at, what) in timeline {
        println!("{:>8.1} ms  {what}", (at - start).as_secs_f64() * 1000.0);
    }

    relay.signal("TERM");
    let (code, log) = relay.ended().await;
    println!("\nThe relay's own log:\n  {}\n", log.join("\n  "));
    let good = in_order && code == Some(0);
    println!(
        "{}",
        if good {
            "Everything arrived, in order, and was relayed only after its webhook succeeded."
        } else {
            "FAILED: something did not arrive, or not in order."
        }
    );
    good
}
