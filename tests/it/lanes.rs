//! Several relays between which NATS divides the messages, and the rest of docs/growing.md.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use async_nats::{
    Client, HeaderMap, Subscriber,
    jetstream::stream::{Config, Source, SubjectTransform},
};

use crate::support::{
    Answer, Lanes, Mode, NatsServer, Received, Relay, Webhook, next, out_of_order, until,
};

/// How many pages are edited; their subjects have one, two and three tokens after the prefix.
const PAGES: usize = 24;

const JETSTREAM: &str = "jetstream { store_dir: \"$DIR/jetstream\" }\n";

/// The subject of the message with this number, after the prefix.
fn page(number: usize) -> String {
    match number % PAGES {
        page @ 0..4 => format!("top{page}"),
        page @ 4..20 => format!("pages.{page}"),
        page => format!("posts.{page}.comments"),
    }
}

/// A server with JetStream, whose stream `CMS` takes messages with and without lanes.
async fn server(configuration: &str) -> NatsServer {
    let nats = NatsServer::with_config(&format!("{JETSTREAM}{configuration}")).await;
    let config = Config {
        name: "CMS".to_owned(),
        subjects: vec!["cms.cache.>".to_owned(), "lanes.*.*.cms.cache.>".to_owned()],
        ..Default::default()
    };
    nats.jetstream().await.create_stream(config).await.unwrap();
    nats
}

/// The server has another number of lanes from now on.
async fn reload(nats: &NatsServer, configuration: &str) {
    let reloads = || nats.log().matches("Reloaded server configuration").count();
    let before = reloads();
    nats.reload(&format!("{JETSTREAM}{configuration}"));
    until("the server has reloaded", async || reloads() > before).await;
}

/// Publishes an edit: the subject tells the page, and the payload page and number.
async fn edit(client: &Client, number: usize) {
    let page = page(number);
    let payload = format!("{page} {number}");
    let subject = format!("cms.cache.{page}");
    client.publish(subject, payload.into()).await.unwrap();
}

/// The next relayed edits, each of which has the subject of its page.
async fn relayed(subscriber: &mut Subscriber, count: usize) -> Vec<String> {
    let mut messages = Vec::new();
    for _ in 0..count {
        let message = next(subscriber).await;
        let text = String::from_utf8(message.payload.to_vec()).unwrap();
        let page = text.split(' ').next().unwrap();
        assert_eq!(message.subject.as_str(), format!("relayed.cache.{page}"));
        messages.push(text);
    }
    messages
}

/// These are the edits with these numbers, each once, and those of each page are in order.
fn assert_complete(messages: &[String], numbers: impl IntoIterator<Item = usize>) {
    assert_eq!(out_of_order(messages.to_vec()), [""; 0]);
    let mut all = messages.to_vec();
    let mut expected: Vec<_> = numbers
        .into_iter()
        .map(|number| format!("{} {number}", page(number)))
        .collect();
    all.sort();
    expected.sort();
    assert_eq!(all, expected);
}

/// The lane of a subject.
fn lane_of(subject: &str) -> usize {
    let token = subject.split('.').nth(2);
    token.and_then(|token| token.parse().ok()).expect("a lane")
}

/// Publishes edits; which of them went into which of four lanes.
async fn edit_all(client: &Client, numbers: std::ops::Range<usize>) -> [Vec<usize>; 4] {
    let mut mapped = client.subscribe("lanes.4.>").await.unwrap();
    let mut lanes: [Vec<usize>; 4] = Default::default();
    for number in numbers {
        edit(client, number).await;
        lanes[lane_of(&next(&mut mapped).await.subject)].push(number);
    }
    assert!(lanes.iter().all(|lane| !lane.is_empty()), "{lanes:?}");
    lanes
}

#[tokio::test]
async fn every_message_is_relayed_once_and_those_of_each_page_in_order() {
    const COUNT: usize = 20 * PAGES;
    for mode in [Mode::Core, Mode::Durable] {
        let nats = server(&Lanes::mappings(4)).await;
        let client = nats.client().await;
        let mut subscriber = client.subscribe("relayed.>").await.unwrap();
        let webhook =
            Webhook::start(|_, _| Answer::ok_after(Duration::from_millis(fastrand::u64(0..5))))
                .await;
        let _lanes = Lanes::start(&nats, &webhook, mode, 4).await;
        for number in 0..COUNT {
            edit(&client, number).await;
        }
        assert_complete(&relayed(&mut subscriber, COUNT).await, 0..COUNT);
        assert_complete(&webhook.bodies(), 0..COUNT);
        let overlap = |pair: &[Received]| pair[1].at < pair[0].answered.unwrap();
        assert!(webhook.requests().windows(2).any(overlap), "one at a time");
    }
}

#[tokio::test]
async fn while_the_relay_of_a_lane_is_dead_the_others_go_on() {
    const COUNT: usize = 4 * PAGES;
    for mode in [Mode::Core, Mode::Durable] {
        let nats = server(&Lanes::mappings(4)).await;
        let client = nats.client().await;
        let mut subscriber = client.subscribe("relayed.>").await.unwrap();
        let webhook = Webhook::ok().await;
        let mut lanes = Lanes::start(&nats, &webhook, mode, 4).await;
        lanes.0[2].kill().await;
        let [a, b, dead, c] = edit_all(&client, 0..COUNT).await;
        let alive = [a, b, c].concat();
        assert_complete(&relayed(&mut subscriber, alive.len()).await, alive);

        lanes.0[2] = Lanes::start_one(&nats, &webhook, mode, 2, 4, &[]).await;
        if mode == Mode::Durable {
            assert_complete(&relayed(&mut subscriber, dead.len()).await, dead);
        }
        let again = edit_all(&client, COUNT..2 * COUNT).await.concat();
        assert_complete(&relayed(&mut subscriber, again.len()).await, again);
    }
}

#[tokio::test]
async fn a_webhook_that_fails_for_a_lane_does_not_hold_up_the_others() {
    const COUNT: usize = 4 * PAGES;
    let nats = server(&Lanes::mappings(4)).await;
    let client = nats.client().await;
    let mut subscriber = client.subscribe("relayed.>").await.unwrap();
    let mut failed = client.subscribe("failed.>").await.unwrap();
    // What is in lane 1 is refused, and what is in lane 2 has to wait.
    let is_down = Arc::new(AtomicBool::new(true));
    let down = Arc::clone(&is_down);
    let webhook = Webhook::start(move |_, request| {
        match lane_of(request.header("x-nats-subject").unwrap()) {
            1 => Answer::status(422),
            2 if down.load(SeqCst) => Answer::status(503),
            _ => Answer::OK,
        }
    })
    .await;
    let mut relays = Vec::new();
    for lane in 0..4 {
        let changes = [("NATS_FAILED_SUBJECT_PREFIX", "failed.cache")];
        relays.push(Lanes::start_one(&nats, &webhook, Mode::Durable, lane, 4, &changes).await);
    }
    let [a, refused, waiting, b] = edit_all(&client, 0..COUNT).await;
    let good = [a, b].concat();
    assert_complete(&relayed(&mut subscriber, good.len()).await, good);
    for number in refused {
        let page = page(number);
        let message = next(&mut failed).await;
        assert_eq!(message.payload, format!("{page} {number}"));
        assert_eq!(message.subject.as_str(), format!("failed.cache.{page}"));
    }
    is_down.store(false, SeqCst);
    assert_complete(&relayed(&mut subscriber, waiting.len()).await, waiting);
}

/// Edits one page after the other until it is stopped.
struct Publisher {
    is_stopped: Arc<AtomicBool>,
    /// The number of the next edit.
    next: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Publisher {
    fn start(client: Client, first: usize) -> Self {
        let is_stopped = Arc::new(AtomicBool::new(false));
        let next = Arc::new(AtomicUsize::new(first));
        let (stop, number) = (Arc::clone(&is_stopped), Arc::clone(&next));
        let task = tokio::spawn(async move {
            while !stop.load(SeqCst) {
                edit(&client, number.load(SeqCst)).await;
                client.flush().await.unwrap();
                number.fetch_add(1, SeqCst);
                // The relays are to keep up, more or less.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        Self {
            is_stopped,
            next,
            task,
        }
    }

    /// Returns when the server has heard of it twice more: nats-server 2.9 does not apply the first
    /// mappings to what comes next from a connection, but only to what comes after that.
    async fn heard(&self) {
        let before = self.next.load(SeqCst);
        until("it has published more", async || {
            self.next.load(SeqCst) >= before + 2
        })
        .await;
    }

    /// The number after that of the last edit.
    async fn stop(self) -> usize {
        self.is_stopped.store(true, SeqCst);
        self.task.await.unwrap();
        self.next.load(SeqCst)
    }
}

/// A webhook that takes long enough for messages to wait.
async fn slow_webhook() -> Webhook {
    Webhook::start(|_, _| Answer::ok_after(Duration::from_millis(5))).await
}

/// A relay with edits under way, a listener, and its webhook.
async fn traffic(nats: &NatsServer, mode: Mode) -> (Subscriber, Webhook, Relay, Publisher) {
    let client = nats.client().await;
    let subscriber = client.subscribe("relayed.>").await.unwrap();
    let webhook = slow_webhook().await;
    let relay = match mode {
        Mode::Core => Relay::listening(nats, &webhook, &[]).await,
        Mode::Durable => Relay::durable(nats, &webhook, &[]).await,
    };
    let publisher = Publisher::start(nats.client().await, 0);
    more(&webhook).await;
    (subscriber, webhook, relay, publisher)
}

/// More requests come, so that there is traffic at what comes next.
async fn more(webhook: &Webhook) {
    webhook.received(webhook.count() + PAGES).await;
}

/// Waits until these consumers have nothing left, as the command of the page would say.
async fn drained(nats: &NatsServer, consumers: impl IntoIterator<Item = String>) {
    let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
    for consumer in consumers {
        until(&format!("{consumer} has nothing left"), async || {
            let info = stream.consumer_info(&consumer).await.unwrap();
            info.num_pending + info.num_ack_pending as u64 == 0
        })
        .await;
    }
}

/// All these edits were relayed and POSTed, each once, and those of each page in order.
async fn assert_all_arrived(subscriber: &mut Subscriber, webhook: &Webhook, count: usize) {
    assert_complete(&relayed(subscriber, count).await, 0..count);
    assert_complete(&webhook.bodies(), 0..count);
}

/// Stops a relay, which finishes what it has.
async fn stop(relay: Relay) {
    relay.signal("TERM");
    assert_eq!(relay.ended().await.0, Some(0));
}

#[tokio::test]
async fn in_durable_mode_lanes_are_added_while_messages_are_published() {
    let nats = server("").await;
    let (mut subscriber, webhook, one, publisher) = traffic(&nats, Mode::Durable).await;

    reload(&nats, &Lanes::mappings(4)).await;
    publisher.heard().await;
    drained(&nats, ["relay".to_owned()]).await;
    stop(one).await;
    let four = Lanes::start(&nats, &webhook, Mode::Durable, 4).await;
    more(&webhook).await;

    reload(&nats, &Lanes::mappings(8)).await;
    publisher.heard().await;
    drained(&nats, (0..4).map(|lane| format!("lane-4-{lane}"))).await;
    four.stop().await;
    let eight = Lanes::start(&nats, &webhook, Mode::Durable, 8).await;
    more(&webhook).await;

    reload(&nats, Lanes::NONE).await;
    publisher.heard().await;
    drained(&nats, (0..8).map(|lane| format!("lane-8-{lane}"))).await;
    eight.stop().await;
    let _one = Relay::durable(&nats, &webhook, &[]).await;
    more(&webhook).await;

    let count = publisher.stop().await;
    assert_all_arrived(&mut subscriber, &webhook, count).await;
}

#[tokio::test]
async fn in_core_mode_lanes_are_added_while_publishers_pause() {
    let nats = server("").await;
    let (mut subscriber, webhook, one, publisher) = traffic(&nats, Mode::Core).await;

    let count = publisher.stop().await;
    stop(one).await;
    reload(&nats, &Lanes::mappings(4)).await;
    let four = Lanes::start(&nats, &webhook, Mode::Core, 4).await;
    let publisher = Publisher::start(nats.client().await, count);
    more(&webhook).await;

    let count = publisher.stop().await;
    four.stop().await;
    reload(&nats, &Lanes::mappings(8)).await;
    let _eight = Lanes::start(&nats, &webhook, Mode::Core, 8).await;
    let publisher = Publisher::start(nats.client().await, count);
    more(&webhook).await;

    let count = publisher.stop().await;
    assert_all_arrived(&mut subscriber, &webhook, count).await;
}

#[tokio::test]
async fn in_core_mode_nothing_is_lost_where_publishers_cannot_pause() {
    let nats = server("").await;
    let (mut subscriber, webhook, one, publisher) = traffic(&nats, Mode::Core).await;

    let four = Lanes::start(&nats, &webhook, Mode::Core, 4).await;
    reload(&nats, &Lanes::mappings(4)).await;
    publisher.heard().await;
    stop(one).await;
    more(&webhook).await;

    let _eight = Lanes::start(&nats, &webhook, Mode::Core, 8).await;
    reload(&nats, &Lanes::mappings(8)).await;
    publisher.heard().await;
    four.stop().await;
    more(&webhook).await;

    let count = publisher.stop().await;
    let mut all = relayed(&mut subscriber, count).await;
    all.sort_by_key(|edit| edit.split(' ').nth(1).unwrap().parse::<usize>().unwrap());
    assert_complete(&all, 0..count);
}

/// Whether the server is new enough for a test of something that older ones do not have.
fn is_at_least(client: &Client, minor: i64) -> bool {
    let is_new = client.is_server_compatible(2, minor, 0);
    if !is_new {
        eprintln!("not tested: it takes nats-server 2.{minor}");
    }
    is_new
}

#[tokio::test]
async fn what_failed_comes_again_out_of_the_failed_stream_in_order_and_with_its_headers() {
    const COUNT: usize = PAGES;
    let nats = server("").await;
    let client = nats.client().await;
    if !is_at_least(&client, 10) {
        return;
    }
    nats.create_stream("FAILED", "failed.cache.>", 1).await;
    let mut subscriber = client.subscribe("relayed.>").await.unwrap();
    let is_broken = Arc::new(AtomicBool::new(true));
    let broken = Arc::clone(&is_broken);
    let webhook = Webhook::start(move |_, _| match broken.load(SeqCst) {
        true => Answer::status(422),
        false => Answer::OK,
    })
    .await;
    let changes = [
        ("NATS_FAILED_SUBJECT_PREFIX", "failed.cache"),
        ("NATS_FAILED_STREAM", "FAILED"),
    ];
    let relay = Relay::durable(&nats, &webhook, &changes).await;
    for number in 0..COUNT {
        let mut headers = HeaderMap::new();
        headers.insert("X-Own", number.to_string());
        let subject = format!("cms.cache.{}", page(number));
        let sent = client.publish_with_headers(subject, headers, number.to_string().into());
        sent.await.unwrap();
    }
    webhook.received(COUNT).await;
    drained(&nats, ["relay".to_owned()]).await;
    stop(relay).await;

    is_broken.store(false, SeqCst);
    let jetstream = nats.jetstream().await;
    let mut stream = jetstream.get_stream("CMS").await.unwrap();
    let before = stream.info().await.unwrap().config.clone();
    let mut config = before.clone();
    config.sources = Some(vec![Source {
        name: "FAILED".to_owned(),
        subject_transforms: vec![SubjectTransform {
            source: "failed.cache.>".to_owned(),
            destination: "cms.cache.>".to_owned(),
        }],
        ..Default::default()
    }]);
    jetstream.update_stream(config).await.unwrap();
    until("all are in the stream again", async || {
        let sources = stream.info().await.unwrap().sources.clone();
        sources
            .iter()
            .any(|source| source.lag == 0 && source.active.is_some())
    })
    .await;
    jetstream.update_stream(before).await.unwrap();
    let _relay = Relay::durable(&nats, &webhook, &changes).await;
    for number in 0..COUNT {
        let message = next(&mut subscriber).await;
        assert_eq!(message.payload, number.to_string());
        assert_eq!(
            message.subject.as_str(),
            format!("relayed.cache.{}", page(number))
        );
        let own = message.headers.unwrap().get("X-Own").unwrap().to_string();
        assert_eq!(own, number.to_string());
    }
}

#[tokio::test]
async fn a_paused_consumer_holds_messages_back_until_it_is_resumed() {
    let nats = server("").await;
    let client = nats.client().await;
    if !is_at_least(&client, 11) {
        return;
    }
    let mut subscriber = client.subscribe("relayed.>").await.unwrap();
    let webhook = Webhook::ok().await;
    let relay = Relay::durable(&nats, &webhook, &[]).await;
    let stream = nats.jetstream().await.get_stream("CMS").await.unwrap();
    let an_hour = std::time::SystemTime::now() + Duration::from_secs(3600);
    stream
        .pause_consumer("relay", an_hour.into())
        .await
        .unwrap();
    edit(&client, 0).await;
    // A relay that starts anew takes the consumer as it is, and waits, too.
    stop(relay).await;
    let _relay = Relay::durable(&nats, &webhook, &[]).await;
    let waiting = async || {
        let info = stream.consumer_info("relay").await.unwrap();
        (info.num_pending, info.num_waiting) == (1, 1)
    };
    until("it waits for the message", waiting).await;
    assert_eq!(webhook.count(), 0);
    stream.resume_consumer("relay").await.unwrap();
    assert_complete(&relayed(&mut subscriber, 1).await, 0..1);
}

#[tokio::test]
async fn a_stream_of_the_newest_edits_delivers_only_those() {
    let nats = server("").await;
    let client = nats.client().await;
    let mut subscriber = client.subscribe("relayed.>").await.unwrap();
    let jetstream = nats.jetstream().await;
    let mut stream = jetstream.get_stream("CMS").await.unwrap();
    let mut config = stream.info().await.unwrap().config.clone();
    config.max_messages_per_subject = 1;
    jetstream.update_stream(config).await.unwrap();
    for number in 0..10 * PAGES {
        edit(&client, number).await;
    }
    client.flush().await.unwrap();
    let last = 9 * PAGES..10 * PAGES;
    until("the stream has the newest", async || {
        stream.info().await.unwrap().state.last_sequence == 10 * PAGES as u64
    })
    .await;
    let webhook = Webhook::ok().await;
    let _relay = Relay::durable(&nats, &webhook, &[]).await;
    assert_complete(&relayed(&mut subscriber, PAGES).await, last.clone());
    assert_complete(&webhook.bodies(), last);
}

#[tokio::test]
async fn a_new_login_and_a_new_secret_lose_nothing() {
    let users = |relays: &str| {
        format!(
            "authorization {{ users: [ {{ user: cms, password: cms }}, {relays} ] }}
             no_auth_user: cms"
        )
    };
    let (old, new) = (
        "{ user: old, password: old }",
        "{ user: new, password: new }",
    );
    let nats = server(&users(old)).await;
    let client = nats.client().await;
    let mut subscriber = client.subscribe("relayed.>").await.unwrap();
    let webhook = slow_webhook().await;
    let secrets = [
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
    ];
    let both = secrets.join(" ");
    let changes = [
        ("NATS_USER", "old"),
        ("NATS_PASS", "old"),
        ("WEBHOOK_SECRET", secrets[0]),
    ];
    let relay = Relay::durable(&nats, &webhook, &changes).await;
    let publisher = Publisher::start(nats.client().await, 0);
    more(&webhook).await;

    reload(&nats, &users(&format!("{old}, {new}"))).await;
    stop(relay).await;
    let changes = [
        ("NATS_USER", "new"),
        ("NATS_PASS", "new"),
        ("WEBHOOK_SECRET", &both),
    ];
    let _relay = Relay::durable(&nats, &webhook, &changes).await;
    reload(&nats, &users(new)).await;
    more(&webhook).await;

    let count = publisher.stop().await;
    assert_complete(&relayed(&mut subscriber, count).await, 0..count);
    let signatures: Vec<_> = webhook
        .requests()
        .iter()
        .map(|request| {
            request
                .header("webhook-signature")
                .unwrap()
                .split(' ')
                .count()
        })
        .collect();
    assert!(
        signatures.is_sorted() && signatures.ends_with(&[2]),
        "{signatures:?}"
    );
}
