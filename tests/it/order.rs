//! Durable mode keeps the order through whatever happens to replicas and streams, and relays whatever its
//! operator has handed out again.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use async_nats::{
    Subscriber,
    jetstream::{
        Context,
        consumer::{DeliverPolicy, Info, PullConsumer, pull},
    },
};
use futures::StreamExt;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use crate::support::{
    Answer, NatsServer, Network, Proxy, Received, Relay, Webhook, next, publish_all, until,
};

/// Two relays on the consumer `relay` of the stream `CMS`, each with a link of its own to NATS. The webhook
/// knows them by their names, `a` and `b`; only `a` runs from the start.
struct Replicas {
    nats: NatsServer,
    jetstream: Context,
    relayed: Subscriber,
    webhook: Webhook,
    link: Proxy,
    a: Relay,
}

/// How a replica loses what it has to another one.
#[derive(Clone, Copy)]
enum Pause {
    Suspended,
    CutOff,
}

impl Replicas {
    async fn start(webhook: Webhook) -> Self {
        Self::with(NatsServer::with_stream().await, webhook, &[]).await
    }

    async fn with(nats: NatsServer, webhook: Webhook, changes: &[(&str, &str)]) -> Self {
        let link = Proxy::to(SocketAddr::from(([127, 0, 0, 1], nats.port()))).await;
        let host = format!("nats://{}", link.address());
        let own = [("NATS_HOST", &host[..]), ("WEBHOOK_HEADER_X_RELAY", "a")];
        Self {
            jetstream: nats.jetstream().await,
            relayed: nats.client().await.subscribe("relayed.>").await.unwrap(),
            a: Relay::durable(&nats, &webhook, &[&own, changes].concat()).await,
            link,
            webhook,
            nats,
        }
    }

    async fn b(&self) -> Relay {
        self.b_with(&[]).await
    }

    async fn b_with(&self, changes: &[(&str, &str)]) -> Relay {
        let own = [("WEBHOOK_HEADER_X_RELAY", "b")];
        Relay::durable(&self.nats, &self.webhook, &[&own, changes].concat()).await
    }

    fn pause(&self, pause: Pause) {
        match pause {
            Pause::Suspended => self.a.signal("STOP"),
            Pause::CutOff => self.link.set(Network::Cut),
        }
    }

    fn resume(&self, pause: Pause) {
        match pause {
            Pause::Suspended => self.a.signal("CONT"),
            Pause::CutOff => self.link.set(Network::Good),
        }
    }

    async fn publish(&self, numbers: std::ops::Range<usize>) {
        publish_all(&self.jetstream, numbers).await;
    }

    /// The next messages that are relayed carry these numbers.
    async fn expect(&mut self, numbers: impl IntoIterator<Item = usize>) {
        for n in numbers {
            let payload = next(&mut self.relayed).await.payload;
            assert_eq!(payload, n.to_string(), "{:#?}", self.a.log());
        }
    }

    /// The requests that `a` has made for message `n`.
    fn requests_of_a(&self, n: usize) -> usize {
        let requests = self.webhook.requests();
        let of_a = |request: &&Received| request.text() == n.to_string() && is_of_a(request);
        requests.iter().filter(of_a).count()
    }

    async fn consumer(&self) -> Info {
        let stream = self.jetstream.get_stream_no_info("CMS").await.unwrap();
        stream.consumer_info("relay").await.unwrap()
    }

    /// Waits until the consumer has handed out messages so many times.
    async fn delivered(&self, count: u64) {
        until(&format!("there are {count} deliveries"), async || {
            self.consumer().await.delivered.consumer_sequence >= count
        })
        .await;
    }

    /// Waits until every message is acknowledged.
    async fn drained(&self) {
        until("all is acknowledged", async || {
            let info = self.consumer().await;
            info.num_pending == 0 && info.num_ack_pending == 0
        })
        .await;
    }

    /// Creates the consumer anew, so that it begins with the message of this sequence.
    async fn recreate_consumer(&self, sequence: u64) {
        let stream = self.jetstream.get_stream_no_info("CMS").await.unwrap();
        let config = pull::Config {
            durable_name: Some("relay".to_owned()),
            filter_subject: "cms.cache.>".to_owned(),
            max_ack_pending: 1,
            ack_wait: Duration::from_secs(5),
            deliver_policy: DeliverPolicy::ByStartSequence {
                start_sequence: sequence,
            },
            ..Default::default()
        };
        // Without a moment between them: a relay that finds no consumer ends.
        let _ = stream.delete_consumer("relay").await;
        stream.create_consumer(config).await.unwrap();
    }
}

/// How an operator has messages handed out again.
#[derive(Clone, Copy, Debug)]
enum Replay {
    /// The consumer is deleted and created anew.
    Recreated,
    /// As by `nats consumer reset`.
    Reset,
}

impl Replay {
    /// Those that the server knows.
    fn all() -> Vec<Self> {
        if NatsServer::is_at_least((2, 14)) {
            return vec![Self::Reset, Self::Recreated];
        }
        eprintln!("a reset is not tested: it takes nats-server 2.14");
        vec![Self::Recreated]
    }

    /// From the message of this sequence on.
    async fn from(self, replicas: &Replicas, sequence: u64) {
        match self {
            Self::Recreated => replicas.recreate_consumer(sequence).await,
            Self::Reset => {
                let stream = replicas.jetstream.get_stream_no_info("CMS").await.unwrap();
                stream
                    .reset_consumer("relay", Some(sequence))
                    .await
                    .unwrap();
            }
        }
    }
}

fn is_of_a(request: &Received) -> bool {
    request.header("x-relay") == Some("a")
}

/// A webhook that answers `a` about message `n` only once it is told to, and everything else at once.
async fn holding(n: usize) -> (Webhook, Arc<Notify>) {
    let release = Arc::new(Notify::new());
    let held = Arc::clone(&release);
    let webhook = Webhook::start(move |_, request| {
        match is_of_a(request) && request.text() == n.to_string() {
            true => Answer::OkAfter(Arc::clone(&held)),
            false => Answer::OK,
        }
    });
    (webhook.await, release)
}

/// Stops a relay, as its operator would.
async fn stop(relay: Relay) {
    relay.signal("TERM");
    let (code, log) = relay.ended().await;
    assert_eq!(code, Some(0), "{log:#?}");
}

/// A replica that has lost its message is handed a later one, and then its webhook answers the lost one.
async fn a_lost_message_is_abandoned(pause: Pause) {
    let (webhook, release) = holding(0).await;
    let mut replicas = Replicas::start(webhook).await;
    replicas.publish(0..1).await;
    replicas.webhook.received(1).await;
    replicas.pause(pause);
    let b = replicas.b().await;
    replicas.publish(1..2).await;
    replicas.expect(0..2).await;
    stop(b).await;
    replicas.resume(pause);
    replicas.publish(2..3).await;
    replicas.delivered(4).await;
    release.notify_one();
    replicas.expect([2]).await;
    replicas.a.logged("cms.cache.x is abandoned").await;
}

#[tokio::test]
async fn a_resumed_replica_abandons_its_message_though_it_has_been_handed_a_later_one() {
    a_lost_message_is_abandoned(Pause::Suspended).await;
}

#[tokio::test]
async fn a_replica_that_was_cut_off_abandons_its_message_though_it_has_been_handed_a_later_one() {
    a_lost_message_is_abandoned(Pause::CutOff).await;
}

/// A delivery reaches a replica only after another one has been handed the same message, and later ones.
async fn a_late_delivery_is_abandoned(pause: Pause) {
    let mut replicas = Replicas::start(Webhook::ok().await).await;
    until("it has asked for a message", async || {
        replicas.consumer().await.num_waiting > 0
    })
    .await;
    replicas.pause(pause);
    replicas.publish(0..1).await;
    replicas.delivered(1).await;
    let b = replicas.b().await;
    replicas.publish(1..2).await;
    replicas.expect(0..2).await;
    stop(b).await;
    replicas.resume(pause);
    until("it has made up its mind", async || {
        !replicas.a.lines("cms.cache.x").is_empty()
    })
    .await;
    replicas.publish(2..3).await;
    replicas.expect([2]).await;
}

#[tokio::test]
async fn a_resumed_replica_republishes_nothing_that_had_reached_it_while_it_was_suspended() {
    a_late_delivery_is_abandoned(Pause::Suspended).await;
}

#[tokio::test]
async fn a_delivery_that_a_bad_network_has_held_up_is_not_republished_late() {
    a_late_delivery_is_abandoned(Pause::CutOff).await;
}

#[tokio::test]
async fn a_resumed_replica_does_not_go_on_publishing_what_another_one_has_relayed() {
    let nats = NatsServer::with_stream().await;
    nats.create_stream("RELAYED", "relayed.>", 1).await;
    let changes = [("NATS_RELAYED_STREAM", "RELAYED")];
    let mut replicas = Replicas::with(nats, Webhook::ok().await, &changes).await;
    // Nothing confirms what is published.
    replicas.jetstream.delete_stream("RELAYED").await.unwrap();
    replicas.publish(0..1).await;
    replicas.a.logged("RELAYED has not confirmed").await;
    replicas.pause(Pause::Suspended);
    replicas.nats.create_stream("RELAYED", "relayed.>", 1).await;
    let b = replicas.b_with(&changes).await;
    replicas.publish(1..2).await;
    b.logged_times(" -> ", 2).await;
    stop(b).await;
    replicas.resume(Pause::Suspended);
    replicas.publish(2..3).await;
    let mut heard = Vec::new();
    while heard.last().is_none_or(|last| last != "2") {
        let payload = next(&mut replicas.relayed).await.payload;
        heard.push(String::from_utf8_lossy(&payload).into_owned());
    }
    assert!(heard.is_sorted(), "{heard:?}: {:#?}", replicas.a.log());
}

#[tokio::test]
async fn what_was_published_on_a_connection_that_broke_before_it_arrived_is_published_again() {
    let (webhook, release) = holding(1).await;
    let mut replicas = Replicas::start(webhook).await;
    replicas.publish(0..2).await;
    // From now on it is known that this subject may be published on.
    replicas.expect([0]).await;
    replicas.webhook.received(2).await;
    replicas.link.set(Network::Cut);
    release.notify_one();
    replicas.link.holds("relayed.cache.x").await;
    replicas.link.reset();
    replicas.a.logged("lost the connection").await;
    replicas.link.set(Network::Good);
    replicas.drained().await;
    replicas.publish(2..3).await;
    replicas.expect([1, 2]).await;
}

#[tokio::test]
async fn without_a_connection_nobody_is_asked_whether_a_message_may_be_published() {
    let nats = NatsServer::with_stream().await;
    let (webhook, release) = holding(0).await;
    // Longer than a message can be assumed to be still its own.
    let changes = [("REPUBLISH_DELAY", "1500ms")];
    let mut replicas = Replicas::with(nats, webhook, &changes).await;
    replicas.publish(0..1).await;
    replicas.webhook.received(1).await;
    replicas.link.set(Network::Cut);
    release.notify_one();
    replicas.a.logged("cannot be published yet").await;
    replicas.link.set(Network::Down);
    replicas.a.logged_times("cannot connect to NATS", 7).await;
    let asked = replicas.a.lines("cannot be published yet").len();
    assert!(asked <= 2, "{:#?}", replicas.a.log());
    replicas.link.set(Network::Good);
    replicas.expect([0]).await;
}

#[tokio::test]
async fn an_ack_that_is_repeated_does_not_overtake_its_message() {
    const LARGE: usize = 16 << 20;
    let config = "max_payload: 33554432, jetstream { store_dir: \"$DIR/jetstream\" }";
    let nats = NatsServer::with_config(config).await;
    nats.create_stream("CMS", "cms.cache.>", 1).await;
    let release = Arc::new(Notify::new());
    let held = Arc::clone(&release);
    let webhook = Webhook::start(move |_, request| match request.body.len() == LARGE {
        true => Answer::OkAfter(Arc::clone(&held)),
        false => Answer::OK,
    });
    let mut replicas = Replicas::with(nats, webhook.await, &[]).await;
    replicas.publish(0..1).await;
    replicas.expect([0]).await;
    let large = replicas
        .jetstream
        .publish("cms.cache.x", vec![b'x'; LARGE].into());
    large.await.unwrap().await.unwrap();
    replicas.webhook.received(2).await;
    replicas.link.set(Network::Cut);
    release.notify_one();
    replicas.link.holds("relayed.cache.x").await;
    // Another relay gets the next message as soon as this one is acknowledged.
    let _b = replicas.b().await;
    replicas.publish(1..2).await;
    // The message fills the connection, and the ack is repeated after 2.25 s.
    sleep(Duration::from_secs(3)).await;
    replicas.link.reset();
    replicas.a.logged("lost the connection").await;
    replicas.link.set(Network::Good);
    let message = next(&mut replicas.relayed).await;
    assert_eq!(message.payload.len(), LARGE, "{:#?}", replicas.a.log());
    replicas.expect([1]).await;
}

#[tokio::test]
async fn a_message_whose_confirmation_was_lost_is_not_called_another_relay_s() {
    let (webhook, release) = holding(1).await;
    let mut replicas = Replicas::start(webhook).await;
    replicas.publish(0..3).await;
    replicas.expect([0]).await;
    replicas.webhook.received(2).await;
    replicas.link.set(Network::Slow(Duration::from_millis(400)));
    release.notify_one();
    // The next message is handed out, and neither it nor the confirmation arrives.
    replicas.delivered(3).await;
    replicas.link.reset();
    replicas.a.logged("lost the connection").await;
    replicas.link.set(Network::Good);
    replicas.expect([1, 2]).await;
    replicas.a.logged_times(" -> ", 3).await;
    assert_eq!(replicas.a.lines("another relay"), [""; 0]);
}

#[tokio::test]
async fn what_was_acknowledged_on_a_connection_that_broke_is_not_republished_late() {
    let mut replicas = Replicas::start(Webhook::ok().await).await;
    until("it has asked for a message", async || {
        replicas.consumer().await.num_waiting > 0
    })
    .await;
    replicas.link.set(Network::Slow(Duration::from_millis(300)));
    replicas.publish(0..2).await;
    replicas.expect(0..2).await;
    // The ack has come with the message, and its confirmation is on its way.
    replicas.drained().await;
    // Another relay has asked for the next one before this one can again.
    let stream = replicas.jetstream.get_stream("CMS").await.unwrap();
    let consumer: PullConsumer = stream.get_consumer("relay").await.unwrap();
    let batch = consumer
        .batch()
        .max_messages(1)
        .expires(crate::support::PATIENCE);
    let mut messages = batch.messages().await.unwrap();
    until("it has asked, too", async || {
        replicas.consumer().await.num_waiting == 2
    })
    .await;
    replicas.link.set(Network::Good);
    replicas.link.reset();
    replicas.publish(2..3).await;
    let other = messages.next().await.unwrap().unwrap();
    assert_eq!(other.payload, "2", "{:#?}", replicas.a.log());
    other.double_ack().await.unwrap();
    replicas.a.logged_times("connected to NATS", 2).await;
    replicas.publish(3..4).await;
    replicas.expect([3]).await;
}

#[tokio::test]
async fn a_resumed_replica_does_not_go_on_trying_what_another_one_has() {
    let release = Arc::new(Notify::new());
    let held = Arc::clone(&release);
    let webhook = Webhook::start(move |_, request| match is_of_a(request) {
        true => Answer::full("503 Busy\r\nretry-after: 2", "busy"),
        false => Answer::OkAfter(Arc::clone(&held)),
    });
    let mut replicas = Replicas::start(webhook.await).await;
    replicas.publish(0..1).await;
    replicas.a.logged("cms.cache.x, attempt 1: ").await;
    replicas.pause(Pause::Suspended);
    let _b = replicas.b().await;
    replicas.webhook.received(2).await;
    assert_eq!(replicas.requests_of_a(0), 1);
    replicas.resume(Pause::Suspended);
    until("it has made up its mind", async || {
        replicas.requests_of_a(0) > 1 || !replicas.a.lines("cms.cache.x is abandoned").is_empty()
    })
    .await;
    assert_eq!(replicas.requests_of_a(0), 1, "it has not been its message");
    release.notify_one();
    replicas.expect([0]).await;
}

#[tokio::test]
async fn a_resumed_replica_abandons_its_message_though_the_consumer_counts_anew() {
    const COUNT: usize = 10;
    for replay in Replay::all() {
        let (webhook, release) = holding(COUNT).await;
        let mut replicas = Replicas::start(webhook).await;
        replicas.publish(0..COUNT + 1).await;
        replicas.expect(0..COUNT).await;
        replicas.webhook.received(COUNT + 1).await;
        replicas.pause(Pause::Suspended);
        // The numbers of its deliveries begin again, and end below that of the one that is held.
        replay.from(&replicas, COUNT as u64 + 1).await;
        let b = replicas.b().await;
        replicas.publish(COUNT + 1..COUNT + 4).await;
        replicas.expect(COUNT..COUNT + 4).await;
        // For a second it goes without saying that a message is still its own.
        sleep(Duration::from_secs(1)).await;
        release.notify_one();
        replicas.resume(Pause::Suspended);
        until("it has made up its mind", async || {
            let lines = replicas.a.lines("cms.cache.x");
            lines.len() > COUNT
        })
        .await;
        replicas.publish(COUNT + 4..COUNT + 5).await;
        replicas.expect([COUNT + 4]).await;
        stop(b).await;
    }
}

#[tokio::test]
async fn a_message_that_a_limit_drops_is_abandoned_though_its_relay_is_handed_a_later_one() {
    let release = Arc::new(Notify::new());
    let webhook = Webhook::script([Answer::OkAfter(Arc::clone(&release))]).await;
    let mut replicas = Replicas::start(webhook).await;
    let mut stream = replicas.jetstream.get_stream("CMS").await.unwrap();
    let mut config = stream.info().await.unwrap().config.clone();
    config.max_messages = 1;
    replicas.jetstream.update_stream(config).await.unwrap();
    let b = replicas.b().await;
    until("both have asked for a message", async || {
        replicas.consumer().await.num_waiting == 2
    })
    .await;
    replicas.publish(0..1).await;
    let first = replicas.webhook.received(1).await.remove(0);
    // What comes next makes room for itself. The other relay has asked for it first, unless its request has
    // expired just now.
    let mut last = 1;
    replicas.publish(1..2).await;
    while timeout(Duration::from_secs(1), replicas.webhook.received(2))
        .await
        .is_err()
    {
        last += 1;
        replicas.publish(last..last + 1).await;
    }
    replicas.expect([last]).await;
    let holder = match is_of_a(&first) {
        true => {
            stop(b).await;
            replicas.a
        }
        false => {
            stop(replicas.a).await;
            b
        }
    };
    publish_all(&replicas.jetstream, last + 1..last + 2).await;
    let stream = replicas.jetstream.get_stream("CMS").await.unwrap();
    until("it is handed out", async || {
        let info = stream.consumer_info("relay").await.unwrap();
        info.delivered.consumer_sequence >= last as u64 + 2
    })
    .await;
    // For a second it goes without saying that a message is still its own.
    sleep(Duration::from_secs(1)).await;
    release.notify_one();
    let payload = next(&mut replicas.relayed).await.payload;
    assert_eq!(payload, (last + 1).to_string(), "{:#?}", holder.log());
    holder.logged("cms.cache.x is abandoned").await;
}

#[tokio::test]
async fn what_is_handed_out_again_on_request_is_relayed_again() {
    for replay in Replay::all() {
        let mut replicas = Replicas::start(Webhook::ok().await).await;
        replicas.publish(0..10).await;
        replicas.expect(0..10).await;
        replicas.drained().await;
        for from in [0, 7] {
            let before = replicas.webhook.count();
            replay.from(&replicas, from as u64 + 1).await;
            replicas.drained().await;
            let bodies = replicas.webhook.bodies().split_off(before);
            let expected: Vec<_> = (from..10).map(|n| n.to_string()).collect();
            assert_eq!(bodies, expected, "{replay:?} from {from}");
            replicas.expect(from..10).await;
        }
        replicas.publish(10..11).await;
        replicas.expect([10]).await;
    }
}

#[tokio::test]
async fn what_is_handed_out_again_is_relayed_by_a_relay_that_abandoned_a_message_once() {
    for replay in Replay::all() {
        let (webhook, release) = holding(0).await;
        let mut replicas = Replicas::start(webhook).await;
        replicas.publish(0..1).await;
        replicas.webhook.received(1).await;
        replicas.pause(Pause::Suspended);
        let b = replicas.b().await;
        replicas.publish(1..10).await;
        replicas.expect(0..10).await;
        replicas.resume(Pause::Suspended);
        release.notify_one();
        replicas.a.logged("cms.cache.x is abandoned").await;
        stop(b).await;
        replay.from(&replicas, 1).await;
        release.notify_one();
        replicas.expect(0..10).await;
        let deliveries = replicas.consumer().await.delivered.consumer_sequence;
        assert_eq!(deliveries, 10, "each is handed out once: {replay:?}");
    }
}

#[tokio::test]
async fn a_message_is_not_acknowledged_to_a_consumer_that_did_not_hand_it_out() {
    let is_recreated = Arc::new(AtomicBool::new(false));
    let succeeds = Arc::clone(&is_recreated);
    let webhook = Webhook::start(move |_, request| match request.text().as_str() {
        "0" if succeeds.load(SeqCst) => Answer::OK,
        "0" => Answer::full("503 Busy\r\nretry-after: 2", "busy"),
        _ if is_of_a(request) => Answer::Hang,
        _ => Answer::OK,
    });
    let mut replicas = Replicas::start(webhook.await).await;
    replicas.publish(0..1).await;
    replicas.webhook.received(1).await;
    replicas.jetstream.delete_stream("CMS").await.unwrap();
    replicas.nats.create_stream("CMS", "cms.cache.>", 1).await;
    replicas.recreate_consumer(1).await;
    replicas.publish(1..2).await;
    replicas.delivered(1).await;
    is_recreated.store(true, SeqCst);
    until("the new message is POSTed", async || {
        replicas.webhook.bodies().contains(&"1".to_owned())
    })
    .await;
    replicas.a.kill().await;
    let info = replicas.consumer().await;
    assert_eq!(info.num_ack_pending, 1, "{:#?}", replicas.a.log());
    let _b = replicas.b().await;
    while next(&mut replicas.relayed).await.payload != "1" {}
}
