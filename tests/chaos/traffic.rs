//! What goes through the relays: messages of all sorts, published without a pause, and the webhook that
//! gets them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use async_nats::{Client, ConnectOptions, HeaderMap, ServerAddr, jetstream};
use bytes::Bytes;
use fastrand::Rng;
use tokio::{sync::watch, task::JoinHandle, time::timeout};

use crate::support::{Answer, Received, Webhook};

/// How long the publisher waits between two messages at most, in milliseconds.
const PACE: u64 = 30;

/// How long a webhook that is well takes at most, in milliseconds: most of the time a relay is at work.
const LATENCY: u64 = 12;

/// How long the publisher waits for the stream to confirm a message, before it publishes it again.
const CONFIRMATION_TIMEOUT: Duration = Duration::from_secs(2);

/// Message `n` of a run: sizes, bytes and headers vary, and some come without an id of their own.
pub fn message(seed: u64, n: usize) -> (String, HeaderMap, Vec<u8>) {
    let mut random = Rng::with_seed(seed.wrapping_add(n as u64));
    let subject = format!("cms.cache.{}.{}", random.u8(0..7), random.alphanumeric());
    let mut headers = HeaderMap::new();
    // An empty payload tells nobody which message it is.
    let is_empty = random.u8(0..10) == 0;
    if is_empty || random.u8(0..4) != 0 {
        headers.insert("Nats-Msg-Id", n.to_string());
    }
    if random.bool() {
        headers.insert("X-Editor", "Zoë");
        for _ in 0..random.u8(0..4) {
            let value: String = (0..random.usize(0..80))
                .map(|_| random.alphanumeric())
                .collect();
            headers.append("x-tag", value);
        }
    }
    if random.u8(0..4) == 0 {
        headers.insert("Content-Type", "application/octet-stream");
    }
    let payload = match is_empty {
        true => Vec::new(),
        false => {
            let length = 1 << random.u32(0..15);
            let noise = std::iter::repeat_with(|| random.u8(..)).take(length);
            format!("{n} ")
                .into_bytes()
                .into_iter()
                .chain(noise)
                .collect()
        }
    };
    (subject, headers, payload)
}

/// The number of a message as it stands in a request to the webhook.
fn number(request: &Received) -> Option<usize> {
    let digits = request.body.split(|byte| *byte == b' ').next();
    let in_payload = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    in_payload.or_else(|| request.header("webhook-id")?.parse().ok())
}

/// Publishes message after message, each until the stream has confirmed it, through whatever happens.
pub struct Publisher {
    confirmed: Confirmed,
    is_to_end: watch::Sender<bool>,
    publishing: JoinHandle<()>,
}

/// When the stream confirmed each message, by its number.
pub type Confirmed = Arc<Mutex<Vec<Instant>>>;

impl Publisher {
    /// By a client that no fault of the network reaches.
    pub async fn start(servers: &[ServerAddr], seed: u64) -> Self {
        let jetstream = jetstream::new(client(servers).await);
        let confirmed = Confirmed::default();
        let times = Arc::clone(&confirmed);
        let (is_to_end, ending) = watch::channel(false);
        let publishing = tokio::spawn(async move {
            for n in 0.. {
                if *ending.borrow() {
                    return;
                }
                publish(&jetstream, message(seed, n)).await;
                times.lock().unwrap().push(Instant::now());
                tokio::time::sleep(Duration::from_millis(fastrand::u64(0..PACE))).await;
            }
        });
        Self {
            confirmed,
            is_to_end,
            publishing,
        }
    }

    /// What is confirmed so far.
    pub fn confirmed(&self) -> Confirmed {
        Arc::clone(&self.confirmed)
    }

    /// Ends once the last message is confirmed; how many there are.
    pub async fn end(self) -> usize {
        self.is_to_end.send_replace(true);
        self.publishing.await.unwrap();
        self.confirmed.lock().unwrap().len()
    }
}

/// Publishes a message until the stream has confirmed it. One without an id may then be in it twice.
async fn publish(
    jetstream: &jetstream::Context,
    (subject, headers, payload): (String, HeaderMap, Vec<u8>),
) {
    let payload = Bytes::from(payload);
    loop {
        let (headers, payload) = (headers.clone(), payload.clone());
        let sent = jetstream.publish_with_headers(subject.clone(), headers, payload);
        let confirmed = async { sent.await.ok()?.await.ok() };
        if let Ok(Some(_)) = timeout(CONFIRMATION_TIMEOUT, confirmed).await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..PACE))).await;
    }
}

/// A client that stays connected to whichever server is there.
pub async fn client(servers: &[ServerAddr]) -> Client {
    let options = ConnectOptions::new()
        .retry_on_initial_connect()
        .ignore_discovered_servers()
        .connection_timeout(Duration::from_secs(1))
        .ping_interval(Duration::from_secs(1))
        .reconnect_delay_callback(|_| Duration::from_millis(200));
    options.connect(servers).await.unwrap()
}

/// How the webhook treats requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mood {
    Good,
    Hanging,
    Failing,
    /// Takes so long, which may be longer than it is given.
    Slow(Duration),
}

/// What the webhook has answered so far.
#[derive(Default)]
pub struct Answers {
    /// When each message, by its `webhook-id`, was first answered with 200.
    pub successes: HashMap<String, SystemTime>,
    /// The same in order, with the number of the message instead of its id.
    pub times: Vec<(Instant, Option<usize>)>,
    /// The largest number of a message that was answered with 200.
    pub latest: Option<usize>,
}

/// The webhook, in changing moods.
pub struct Endpoint {
    pub webhook: Webhook,
    pub mood: Arc<Mutex<Mood>>,
    pub answers: Arc<Mutex<Answers>>,
}

impl Endpoint {
    pub async fn start(seed: u64) -> Self {
        let mood = Arc::new(Mutex::new(Mood::Good));
        let answers = Arc::new(Mutex::new(Answers::default()));
        let random = Mutex::new(Rng::with_seed(seed));
        let (own_mood, own_answers) = (Arc::clone(&mood), Arc::clone(&answers));
        let webhook = Webhook::start(move |_, request| {
            let delay = match *own_mood.lock().unwrap() {
                Mood::Good => Duration::from_millis(fastrand::u64(0..LATENCY)),
                Mood::Slow(delay) => delay,
                Mood::Hanging => return Answer::Hang,
                Mood::Failing => {
                    let mut random = random.lock().unwrap();
                    return match random.u8(0..6) {
                        0 => Answer::full("503 Busy\r\nretry-after: 1", "busy"),
                        1 => Answer::full("429 Slower", "slower"),
                        2 => Answer::Close,
                        3 => Answer::Raw(b"HTTP/1.1 what\r\n\r\n".to_vec()),
                        _ => Answer::status(500),
                    };
                }
            };
            let mut answers = own_answers.lock().unwrap();
            let id = request.header("webhook-id").unwrap_or_default().to_owned();
            let at = SystemTime::now() + delay;
            let first = *answers
                .successes
                .entry(id)
                .and_modify(|first| *first = at.min(*first))
                .or_insert(at);
            let number = number(request);
            if first == at {
                answers.times.push((Instant::now() + delay, number));
            }
            answers.latest = answers.latest.max(number);
            Answer::ok_after(delay)
        })
        .await;
        Self {
            webhook,
            mood,
            answers,
        }
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    /// Whether message `n` or a later one has succeeded.
    pub fn has_reached(&self, n: usize) -> bool {
        let latest = self.answers.lock().unwrap().latest;
        latest.is_some_and(|latest| latest >= n)
    }

    /// The longest time since `from` in which a message that the stream had did not come through, nor did
    /// any other.
    pub fn longest_standstill(&self, from: Instant, confirmed: &Confirmed) -> Duration {
        let (answers, confirmed) = (self.answers.lock().unwrap(), confirmed.lock().unwrap());
        let (mut last, mut longest) = (from, Duration::ZERO);
        for (at, number) in &answers.times {
            let waited_since = number.and_then(|number| confirmed.get(number));
            let since = waited_since.map_or(last, |since| last.max(*since));
            longest = longest.max(at.saturating_duration_since(since));
            last = last.max(*at);
        }
        longest
    }
}
