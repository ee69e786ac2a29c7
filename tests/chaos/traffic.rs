//! What goes through the relays: messages of all sorts, published without a pause; the webhook that gets
//! them, and a subscriber of all that is relayed.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use async_nats::{Client, ConnectOptions, HeaderMap, ServerAddr, jetstream};
use bytes::Bytes;
use fastrand::Rng;
use futures::StreamExt;
use tokio::{sync::watch, task::JoinHandle, time::timeout};

use crate::support::{Answer, Received, Webhook};

/// How long the publisher waits between two messages at most, in milliseconds.
const PACE: u64 = 30;

/// How long a webhook that is well takes at most, in milliseconds: most of the time a relay is at work.
const LATENCY: u64 = 12;

/// How long the publisher waits for the stream to confirm a message, before it publishes it again.
const CONFIRMATION_TIMEOUT: Duration = Duration::from_secs(2);

/// The messages of a run.
#[derive(Clone, Copy)]
pub struct Messages {
    pub seed: u64,
    /// Whether each has an id of its own.
    pub have_ids: bool,
}

impl Messages {
    /// Message `n`: sizes, bytes and headers vary, and some come without an id of their own.
    pub fn get(self, n: usize) -> (String, HeaderMap, Vec<u8>) {
        let (subject, mut headers, payload) = message(self.seed, n);
        if self.have_ids {
            headers.insert("Nats-Msg-Id", n.to_string());
        }
        (subject, headers, payload)
    }
}

fn message(seed: u64, n: usize) -> (String, HeaderMap, Vec<u8>) {
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
    pub async fn start(servers: &[ServerAddr], messages: Messages) -> Self {
        let jetstream = jetstream::new(client(servers).await);
        let confirmed = Confirmed::default();
        let times = Arc::clone(&confirmed);
        let (is_to_end, ending) = watch::channel(false);
        let publishing = tokio::spawn(async move {
            for n in 0.. {
                if *ending.borrow() {
                    return;
                }
                publish(&jetstream, messages.get(n)).await;
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

/// A message as a subscriber heard it.
pub struct Heard {
    pub at: Instant,
    pub subject: String,
    /// Its id, without the prefix that it ends in.
    pub id: String,
}

/// Hears all that is relayed, as browsers do: each copy of it, by a client that no fault of the network
/// reaches.
pub struct Listener {
    heard: Arc<Mutex<Vec<Heard>>>,
    listening: JoinHandle<()>,
}

impl Listener {
    pub async fn start(client: &Client) -> Self {
        let mut relayed = client.subscribe("relayed.>").await.unwrap();
        client.flush().await.unwrap();
        let heard: Arc<Mutex<Vec<_>>> = Arc::default();
        let all = Arc::clone(&heard);
        let listening = tokio::spawn(async move {
            while let Some(message) = relayed.next().await {
                let (at, subject) = (Instant::now(), message.subject.to_string());
                let id = message.headers.as_ref().map(id_of).unwrap_or_default();
                all.lock().unwrap().push(Heard { at, subject, id });
            }
        });
        Self { heard, listening }
    }

    /// All that it has heard.
    pub fn end(self) -> Vec<Heard> {
        self.listening.abort();
        std::mem::take(&mut self.heard.lock().unwrap())
    }
}

/// The id of a relayed message, without the prefix that it ends in.
pub fn id_of(headers: &HeaderMap) -> String {
    let id = headers.get("Nats-Msg-Id").map_or("", |id| id.as_str());
    id.split('@').next().unwrap_or_default().to_owned()
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

/// What the webhook has answered to the relays of one environment so far.
#[derive(Clone, Default)]
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
    /// By environment.
    pub answers: Arc<Mutex<HashMap<String, Answers>>>,
}

impl Endpoint {
    pub async fn start(seed: u64, environments: &[&str]) -> Self {
        let mood = Arc::new(Mutex::new(Mood::Good));
        let none = |environment: &&str| (environment.to_string(), Answers::default());
        let answers: HashMap<_, _> = environments.iter().map(none).collect();
        let answers = Arc::new(Mutex::new(answers));
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
            let environment = request.header("x-environment").unwrap_or_default();
            let answers = answers.get_mut(environment).expect("a known environment");
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

    /// Returns whether message `n` or a later one has succeeded in each environment.
    pub fn has_reached(&self, n: usize) -> bool {
        let answers = self.answers.lock().unwrap();
        let is_there = |answers: &Answers| answers.latest.is_some_and(|latest| latest >= n);
        answers.values().all(is_there)
    }

    /// The longest time since `from` in which a message that the stream had did not come through in some
    /// environment, nor did any other.
    pub fn longest_standstill(&self, from: Instant, confirmed: &Confirmed) -> Duration {
        let (answers, confirmed) = (self.answers.lock().unwrap(), confirmed.lock().unwrap());
        let standstills = answers
            .values()
            .map(|answers| answers.longest_standstill(from, &confirmed));
        standstills.max().unwrap_or_default()
    }
}

impl Answers {
    fn longest_standstill(&self, from: Instant, confirmed: &[Instant]) -> Duration {
        let (mut last, mut longest) = (from, Duration::ZERO);
        for (at, number) in &self.times {
            let waited_since = number.and_then(|number| confirmed.get(number));
            let since = waited_since.map_or(last, |since| last.max(*since));
            longest = longest.max(at.saturating_duration_since(since));
            last = last.max(*at);
        }
        longest
    }
}
