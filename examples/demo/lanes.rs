//! A bulk edit, once with one relay and once with four, between which NATS divides it.

use std::time::{Duration, Instant};

use async_nats::Client;

use crate::support::{Answer, Lanes, Mode, NatsServer, Relay, Webhook, next, out_of_order};

const PAGES: usize = 100;
const EDITS: usize = 400;
/// How long the webhook takes for each request.
const LATENCY: Duration = Duration::from_millis(20);
/// How much faster four lanes have to be.
const FACTOR: f64 = 3.0;

/// Returns whether each page kept its order and four lanes were fast enough.
pub async fn compare() -> bool {
    println!("{EDITS} edits of {PAGES} pages, and a webhook that takes {LATENCY:?}\n");

    let nats = NatsServer::start().await;
    let webhook = Webhook::start(|_, _| Answer::ok_after(LATENCY)).await;
    let _relay = Relay::listening(&nats, &webhook, &[]).await;
    let (one, one_in_order) = edit(&nats.client().await, &webhook).await;
    report("one relay", one, one_in_order);

    let nats = NatsServer::with_config(&Lanes::mappings(4)).await;
    let webhook = Webhook::start(|_, _| Answer::ok_after(LATENCY)).await;
    let _lanes = Lanes::start(&nats, &webhook, Mode::Core, 4).await;
    let (four, four_in_order) = edit(&nats.client().await, &webhook).await;
    report("four lanes", four, four_in_order);

    let factor = one.as_secs_f64() / four.as_secs_f64();
    println!("\nFour lanes are {factor:.1} times as fast. The server's configuration:\n");
    println!("{}", Lanes::mappings(4));
    one_in_order && four_in_order && factor >= FACTOR
}

/// Publishes the edits as a CMS would. Returns how long it took to relay them all, and whether each page's edits came
/// in order, to the webhook and to the browsers.
async fn edit(client: &Client, webhook: &Webhook) -> (Duration, bool) {
    let mut browser = client.subscribe("relayed.cache.>").await.unwrap();
    let start = Instant::now();
    for number in 0..EDITS {
        let page = format!("pages.{}", number % PAGES);
        let payload = format!("{page} {number}");
        let subject = format!("cms.cache.{page}");
        client.publish(subject, payload.into()).await.unwrap();
    }
    let mut relayed = Vec::new();
    for _ in 0..EDITS {
        let payload = next(&mut browser).await.payload;
        relayed.push(String::from_utf8_lossy(&payload).into_owned());
    }
    let elapsed = start.elapsed();
    let told = webhook.bodies();
    let in_order =
        told.len() == EDITS && out_of_order(told).is_empty() && out_of_order(relayed).is_empty();
    (elapsed, in_order)
}

fn report(who: &str, elapsed: Duration, in_order: bool) {
    let rate = EDITS as f64 / elapsed.as_secs_f64();
    let order = match in_order {
        true => "each page's edits in order",
        false => "NOT IN ORDER",
    };
    println!(
        "{who:<10}  {:>5.1} s  {rate:>4.0} edits/s  {order}",
        elapsed.as_secs_f64()
    );
}
