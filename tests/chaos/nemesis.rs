//! What goes wrong: one fault or two at a time, by a seed, and each of them ends.

use std::{
    fmt,
    time::{Duration, Instant},
};

use fastrand::Rng;

use crate::{
    stage::{Cast, Stage},
    support::Network,
    traffic::{Confirmed, Mood},
};

/// What can go wrong. The numbers are those of relays and servers, from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    RelayKilled(usize),
    RelayStopped(usize),
    RelaySuspended(usize),
    ServerKilled(usize),
    ServerStopped(usize),
    ServerSuspended(usize),
    ServerRetired(usize),
    /// The leader of the input stream, of its consumer, or of the relayed stream steps down.
    LeaderSteppedDown(&'static str),
    /// Between a relay and one server, or all of them.
    NetworkCut(usize, Option<usize>),
    NetworkReset(usize),
    NetworkSlow(usize, Duration),
    WebhookDown,
    WebhookHanging,
    WebhookFailing,
    WebhookSlow(Duration),
}

/// The subjects by which a leader is told to step down.
const STEP_DOWN: [&str; 3] = [
    "STREAM.LEADER.STEPDOWN.CMS",
    "CONSUMER.LEADER.STEPDOWN.CMS.relay",
    "STREAM.LEADER.STEPDOWN.RELAYED",
];

impl fmt::Display for Fault {
    /// Its kind.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RelayKilled(_) => "relay killed",
            Self::RelayStopped(_) => "relay stopped",
            Self::RelaySuspended(_) => "relay suspended",
            Self::ServerKilled(_) => "server killed",
            Self::ServerStopped(_) => "server stopped",
            Self::ServerSuspended(_) => "server suspended",
            Self::ServerRetired(_) => "server retired",
            Self::LeaderSteppedDown(_) => "leader stepped down",
            Self::NetworkCut(..) => "network cut",
            Self::NetworkReset(_) => "network reset",
            Self::NetworkSlow(..) => "network slow",
            Self::WebhookDown => "webhook down",
            Self::WebhookHanging => "webhook hanging",
            Self::WebhookFailing => "webhook failing",
            Self::WebhookSlow(_) => "webhook slow",
        })
    }
}

impl Fault {
    /// One that is possible with so many servers and relays.
    fn random(random: &mut Rng, cast: Cast) -> Self {
        let relay = random.usize(0..cast.relays);
        let server = random.usize(0..cast.servers);
        let is_cluster = cast.servers > 1;
        loop {
            return match random.u8(0..15) {
                0 => Self::RelayKilled(relay),
                1 => Self::RelayStopped(relay),
                2 => Self::RelaySuspended(relay),
                3 => Self::ServerKilled(server),
                4 => Self::ServerStopped(server),
                5 => Self::ServerSuspended(server),
                6 => Self::ServerRetired(server),
                7 if is_cluster => Self::LeaderSteppedDown(STEP_DOWN[random.usize(0..3)]),
                8 => Self::NetworkCut(relay, Some(server).filter(|_| random.bool())),
                9 => Self::NetworkReset(relay),
                10 => Self::NetworkSlow(relay, Duration::from_millis(random.u64(5..400))),
                11 => Self::WebhookDown,
                12 => Self::WebhookHanging,
                13 => Self::WebhookFailing,
                14 => Self::WebhookSlow(Duration::from_millis(random.u64(50..4000))),
                _ => continue,
            };
        }
    }

    /// Whether it can go wrong while `other` does.
    fn goes_with(self, other: Self) -> bool {
        match (self.server(), other.server()) {
            // With two servers of three gone, the streams have no leader, and nobody can do anything.
            (Some(_), Some(_)) => false,
            _ => self.part() != other.part(),
        }
    }

    fn server(self) -> Option<usize> {
        match self {
            Self::ServerKilled(server)
            | Self::ServerStopped(server)
            | Self::ServerSuspended(server)
            | Self::ServerRetired(server) => Some(server),
            _ => None,
        }
    }

    /// The relay that is struck, and whether it is its network.
    fn relay(self) -> Option<(usize, bool)> {
        match self {
            Self::RelayKilled(relay) | Self::RelayStopped(relay) | Self::RelaySuspended(relay) => {
                Some((relay, false))
            }
            Self::NetworkCut(relay, _)
            | Self::NetworkReset(relay)
            | Self::NetworkSlow(relay, _) => Some((relay, true)),
            _ => None,
        }
    }

    /// What is struck: two faults do not strike the same.
    fn part(self) -> String {
        match (self.server(), self.relay()) {
            (Some(server), _) => format!("server {server}"),
            (_, Some((relay, is_network))) => format!("relay {relay} {is_network}"),
            _ if matches!(self, Self::LeaderSteppedDown(_)) => "leader".to_owned(),
            _ => "webhook".to_owned(),
        }
    }

    /// Whether nothing can come through before it is over.
    fn stops_everything(self, cast: Cast) -> bool {
        match self {
            Self::RelayKilled(_)
            | Self::RelayStopped(_)
            | Self::RelaySuspended(_)
            | Self::NetworkCut(_, None)
            | Self::NetworkSlow(..) => cast.relays == 1,
            Self::NetworkCut(_, Some(_)) => cast.relays == 1 && cast.servers == 1,
            Self::ServerKilled(_)
            | Self::ServerStopped(_)
            | Self::ServerSuspended(_)
            | Self::ServerRetired(_) => cast.servers == 1,
            Self::LeaderSteppedDown(_) | Self::NetworkReset(_) => false,
            Self::WebhookDown
            | Self::WebhookHanging
            | Self::WebhookFailing
            | Self::WebhookSlow(_) => true,
        }
    }

    async fn begin(self, stage: &mut Stage) {
        match self {
            Self::RelayKilled(relay) => stage.kill_relay(relay).await,
            Self::RelayStopped(relay) => stage.stop_relay(relay).await,
            Self::RelaySuspended(relay) => stage.signal_relay(relay, "STOP"),
            Self::ServerKilled(server) => stage.servers[server].kill(),
            Self::ServerStopped(server) => stage.servers[server].stop(),
            Self::ServerSuspended(server) => stage.servers[server].freeze(),
            Self::ServerRetired(server) => stage.servers[server].retire().await,
            Self::LeaderSteppedDown(api) => {
                // There may be no leader just now to be told.
                let subject = format!("$JS.API.{api}");
                let told = stage.client.request(subject, "".into());
                let _ = tokio::time::timeout(Duration::from_secs(1), told).await;
            }
            Self::NetworkCut(relay, server) => stage.set_network(relay, server, Network::Cut),
            Self::NetworkReset(relay) => {
                for link in &stage.replicas[relay].links {
                    link.reset();
                }
            }
            Self::NetworkSlow(relay, delay) => {
                stage.set_network(relay, None, Network::Slow(delay));
            }
            Self::WebhookDown => stage.front.set(Network::Down),
            Self::WebhookHanging => stage.endpoint.set(Mood::Hanging),
            Self::WebhookFailing => stage.endpoint.set(Mood::Failing),
            Self::WebhookSlow(delay) => stage.endpoint.set(Mood::Slow(delay)),
        }
    }

    async fn end(self, stage: &mut Stage) {
        match self {
            Self::RelayKilled(relay) | Self::RelayStopped(relay) => stage.start_relay(relay),
            Self::RelaySuspended(relay) => stage.signal_relay(relay, "CONT"),
            Self::ServerKilled(server)
            | Self::ServerStopped(server)
            | Self::ServerRetired(server) => stage.servers[server].restart(),
            Self::ServerSuspended(server) => stage.servers[server].thaw(),
            Self::LeaderSteppedDown(_) | Self::NetworkReset(_) => {}
            Self::NetworkCut(relay, _) | Self::NetworkSlow(relay, _) => {
                stage.set_network(relay, None, Network::Good);
            }
            Self::WebhookDown => stage.front.set(Network::Good),
            Self::WebhookHanging | Self::WebhookFailing | Self::WebhookSlow(_) => {
                stage.endpoint.set(Mood::Good);
            }
        }
    }
}

/// Faults that were there at the same time, and what came of them.
#[derive(Clone, Debug)]
pub struct Episode {
    pub faults: Vec<Fault>,
    /// The names of the relays that they could make lose, repeat or delay what they work on; of those
    /// that were started after it, too.
    pub struck: Vec<String>,
    pub began: Instant,
    /// When all of them were over.
    pub ended: Instant,
    /// When a message that was published after that had come through.
    pub recovered: Option<Instant>,
    /// The longest time in which no message came through though one could have.
    pub standstill: Duration,
}

impl Episode {
    /// The kind of fault, or that there were two.
    pub fn kind(&self) -> String {
        match &self.faults[..] {
            [fault] => fault.to_string(),
            _ => "two at a time".to_owned(),
        }
    }

    /// Whether it struck the webhook.
    pub fn is_of_webhook(&self) -> bool {
        self.faults.iter().any(|fault| fault.part() == "webhook")
    }
}

/// Decides by a seed what goes wrong next.
pub struct Nemesis {
    random: Rng,
}

/// How long a relay may take to go on, whatever went wrong. The webhook's backoff is the longest wait.
pub const PATIENCE: Duration = Duration::from_secs(60);

impl Nemesis {
    pub fn new(seed: u64) -> Self {
        Self {
            random: Rng::with_seed(seed),
        }
    }

    /// Makes something go wrong, ends it, and waits until a message comes through that was published after
    /// that.
    pub async fn strike(&mut self, stage: &mut Stage, confirmed: &Confirmed) -> Episode {
        let random = &mut self.random;
        let mut faults = vec![Fault::random(random, stage.cast)];
        if random.u8(0..4) == 0 {
            let second = Fault::random(random, stage.cast);
            if second.goes_with(faults[0]) {
                faults.push(second);
            }
        }
        // Short faults are as likely as long ones.
        let duration = Duration::from_millis(1 << random.u32(4..14)).mul_f64(0.5 + random.f64());
        let offset = duration.mul_f64(random.f64());
        let mut struck = names(stage, &faults);
        let began = Instant::now();
        faults[0].begin(stage).await;
        if let Some(second) = faults.get(1) {
            tokio::time::sleep(offset).await;
            second.begin(stage).await;
        }
        tokio::time::sleep(duration.saturating_sub(began.elapsed())).await;
        for fault in &faults {
            fault.end(stage).await;
        }
        let ended = Instant::now();
        // The one after the next is not being published yet.
        let next = confirmed.lock().unwrap().len() + 1;
        let reached = stage.reached(next, PATIENCE).await;
        struck.extend(names(stage, &faults));
        let from = match faults
            .iter()
            .any(|fault| fault.stops_everything(stage.cast))
        {
            true => ended,
            false => began,
        };
        Episode {
            faults,
            struck,
            began,
            ended,
            recovered: reached.then(Instant::now),
            standstill: stage.endpoint.longest_standstill(from, confirmed),
        }
    }

    /// A while in which nothing goes wrong.
    pub fn pause(&mut self) -> Duration {
        Duration::from_millis(self.random.u64(0..1500))
    }
}

/// The relays that faults strike: one, or all.
fn names(stage: &Stage, faults: &[Fault]) -> Vec<String> {
    let replicas = stage.replicas.iter().enumerate();
    replicas
        .filter(|(n, _)| {
            faults.iter().any(|fault| match fault.relay() {
                Some((relay, _)) => relay == *n,
                None => fault.part() != "webhook",
            })
        })
        .map(|(_, replica)| replica.name.clone())
        .collect()
}
