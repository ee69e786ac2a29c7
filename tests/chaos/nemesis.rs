//! What goes wrong: one fault or two at a time, by a seed, and each of them ends.

use std::{
    fmt,
    time::{Duration, Instant},
};

use fastrand::Rng;

use crate::{
    stage::{Cast, Replay, Stage},
    support::{NatsServer, Network},
    traffic::{Confirmed, Mood},
};

/// What can go wrong. The numbers are those of relays and servers, from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    RelayKilled(usize),
    RelayStopped(usize),
    RelaySuspended(usize),
    /// Suspended, and its network is back only after a while, as with a laptop that is put to sleep.
    RelayAsleep(usize, Duration),
    /// Every relay but this one is suspended and cut off, at the same time.
    RelaysAsleep(usize),
    /// Cut off from NATS and from the webhook.
    RelayIsolated(usize),
    /// Stopped while everything from and to NATS takes longer.
    RelayStoppedFarAway(usize, Duration),
    ServerKilled(usize),
    ServerStopped(usize),
    ServerSuspended(usize),
    ServerRetired(usize),
    /// The leader of the input stream, of its consumer, or of the relayed stream steps down.
    LeaderSteppedDown(&'static str),
    /// An environment is handed out again so many messages that it had before.
    Replayed(&'static str, Replay, u64),
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
    "CONSUMER.LEADER.STEPDOWN.CMS.production",
    "STREAM.LEADER.STEPDOWN.RELAYED",
];

impl fmt::Display for Fault {
    /// Its kind.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RelayKilled(_) => "relay killed",
            Self::RelayStopped(_) => "relay stopped",
            Self::RelaySuspended(_) => "relay suspended",
            Self::RelayAsleep(..) => "relay asleep",
            Self::RelaysAsleep(_) => "all relays but one asleep",
            Self::RelayIsolated(_) => "relay isolated",
            Self::RelayStoppedFarAway(..) => "relay stopped far away",
            Self::ServerKilled(_) => "server killed",
            Self::ServerStopped(_) => "server stopped",
            Self::ServerSuspended(_) => "server suspended",
            Self::ServerRetired(_) => "server retired",
            Self::LeaderSteppedDown(_) => "leader stepped down",
            Self::Replayed(_, Replay::Reset, _) => "consumer reset",
            Self::Replayed(_, Replay::Recreated, _) => "consumer recreated",
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

/// What a fault strikes. Two at a time do not strike the same.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Relays,
    Servers,
    Consumer,
    Webhook,
}

impl Fault {
    /// One that is possible with so many servers and relays.
    fn random(random: &mut Rng, cast: Cast) -> Self {
        let relay = random.usize(0..cast.replicas());
        let server = random.usize(0..cast.servers);
        let is_cluster = cast.servers > 1;
        loop {
            return match random.u8(0..21) {
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
                15 => Self::RelayAsleep(relay, Duration::from_millis(random.u64(0..2000))),
                16 if cast.relays > 1 => Self::RelaysAsleep(relay),
                17 => Self::RelayIsolated(relay),
                18 => Self::RelayStoppedFarAway(relay, Duration::from_millis(random.u64(20..80))),
                19 | 20 if cast.limit.is_none() => {
                    let environment = cast.environments[random.usize(0..cast.environments.len())];
                    let replay = match random.bool() && NatsServer::is_at_least((2, 14)) {
                        true => Replay::Reset,
                        false => Replay::Recreated,
                    };
                    Self::Replayed(environment, replay, random.u64(0..60))
                }
                _ => continue,
            };
        }
    }

    /// Returns whether it can go wrong while `other` does.
    fn goes_with(self, other: Self, cast: Cast) -> bool {
        match (self.part(), other.part()) {
            // A server that is killed forgets what its consumer has just been told.
            (Part::Servers, Part::Consumer) | (Part::Consumer, Part::Servers) => false,
            (Part::Relays, Part::Relays) => {
                let others = other.relays(cast);
                self.relays(cast)
                    .iter()
                    .all(|relay| !others.contains(relay))
            }
            // With two servers of three gone, the streams have no leader, and nobody can do anything.
            (part, other) => part != other,
        }
    }

    /// What is struck.
    fn part(self) -> Part {
        match self {
            Self::RelayKilled(_)
            | Self::RelayStopped(_)
            | Self::RelaySuspended(_)
            | Self::RelayAsleep(..)
            | Self::RelaysAsleep(_)
            | Self::RelayIsolated(_)
            | Self::RelayStoppedFarAway(..)
            | Self::NetworkCut(..)
            | Self::NetworkReset(_)
            | Self::NetworkSlow(..) => Part::Relays,
            Self::ServerKilled(_)
            | Self::ServerStopped(_)
            | Self::ServerSuspended(_)
            | Self::ServerRetired(_)
            | Self::LeaderSteppedDown(_) => Part::Servers,
            Self::Replayed(..) => Part::Consumer,
            Self::WebhookDown
            | Self::WebhookHanging
            | Self::WebhookFailing
            | Self::WebhookSlow(_) => Part::Webhook,
        }
    }

    /// The relays that it could make lose, repeat or delay what they work on.
    fn relays(self, cast: Cast) -> Vec<usize> {
        let all = 0..cast.replicas();
        match self {
            Self::RelayKilled(relay)
            | Self::RelayStopped(relay)
            | Self::RelaySuspended(relay)
            | Self::RelayAsleep(relay, _)
            | Self::RelayIsolated(relay)
            | Self::RelayStoppedFarAway(relay, _)
            | Self::NetworkCut(relay, _)
            | Self::NetworkReset(relay)
            | Self::NetworkSlow(relay, _) => vec![relay],
            Self::RelaysAsleep(awake) => all.filter(|relay| *relay != awake).collect(),
            Self::Replayed(environment, ..) => cast.relays_of(environment).collect(),
            Self::ServerKilled(_)
            | Self::ServerStopped(_)
            | Self::ServerSuspended(_)
            | Self::ServerRetired(_)
            | Self::LeaderSteppedDown(_) => all.collect(),
            Self::WebhookDown
            | Self::WebhookHanging
            | Self::WebhookFailing
            | Self::WebhookSlow(_) => Vec::new(),
        }
    }

    /// Returns whether nothing can come through in some environment before it is over.
    fn stops_everything(self, cast: Cast) -> bool {
        match self {
            Self::LeaderSteppedDown(_) | Self::NetworkReset(_) | Self::Replayed(..) => false,
            Self::NetworkCut(_, Some(_)) => cast.relays == 1 && cast.servers == 1,
            _ => match self.part() {
                Part::Servers => cast.servers == 1,
                Part::Webhook => true,
                Part::Relays | Part::Consumer => {
                    let struck = self.relays(cast);
                    let is_struck = |relay| struck.contains(&relay);
                    let mut environments = cast.environments.iter();
                    environments.any(|environment| cast.relays_of(environment).all(is_struck))
                }
            },
        }
    }

    /// Returns whether another relay takes over from one that it strikes, if it lasts.
    fn is_for_takeover(self) -> bool {
        matches!(
            self,
            Self::RelaySuspended(_)
                | Self::RelayAsleep(..)
                | Self::RelaysAsleep(_)
                | Self::RelayIsolated(_)
                | Self::NetworkCut(_, None)
        )
    }

    async fn begin(self, stage: &mut Stage) {
        match self {
            Self::RelayKilled(relay) => stage.kill_relay(relay).await,
            Self::RelayStopped(relay) => stage.stop_relay(relay).await,
            Self::RelaySuspended(relay) => stage.signal_relay(relay, "STOP"),
            Self::RelayAsleep(..) | Self::RelaysAsleep(_) => {
                for relay in self.relays(stage.cast) {
                    stage.signal_relay(relay, "STOP");
                    stage.set_network(relay, None, Network::Cut);
                }
            }
            Self::RelayIsolated(relay) => {
                stage.set_network(relay, None, Network::Cut);
                stage.replicas[relay].front.set(Network::Cut);
            }
            Self::RelayStoppedFarAway(relay, delay) => {
                stage.set_network(relay, None, Network::Slow(delay));
                // It gets some messages this way before it is stopped.
                tokio::time::sleep(10 * delay).await;
                stage.stop_relay(relay).await;
            }
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
            Self::Replayed(environment, how, count) => {
                stage.replay(environment, how, count).await;
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
            Self::WebhookDown => stage.set_fronts(Network::Down),
            Self::WebhookHanging => stage.endpoint.set(Mood::Hanging),
            Self::WebhookFailing => stage.endpoint.set(Mood::Failing),
            Self::WebhookSlow(delay) => stage.endpoint.set(Mood::Slow(delay)),
        }
    }

    async fn end(self, stage: &mut Stage) {
        match self {
            Self::RelayKilled(relay) | Self::RelayStopped(relay) => stage.start_relay(relay),
            Self::RelaySuspended(relay) => stage.signal_relay(relay, "CONT"),
            Self::RelayAsleep(relay, delay) => {
                stage.signal_relay(relay, "CONT");
                tokio::time::sleep(delay).await;
                stage.set_network(relay, None, Network::Good);
            }
            Self::RelaysAsleep(_) => {
                for relay in self.relays(stage.cast) {
                    stage.signal_relay(relay, "CONT");
                    stage.set_network(relay, None, Network::Good);
                }
            }
            Self::RelayIsolated(relay) => {
                stage.set_network(relay, None, Network::Good);
                stage.replicas[relay].front.set(Network::Good);
            }
            Self::RelayStoppedFarAway(relay, _) => {
                stage.set_network(relay, None, Network::Good);
                stage.start_relay(relay);
            }
            Self::ServerKilled(server)
            | Self::ServerStopped(server)
            | Self::ServerRetired(server) => stage.servers[server].restart(),
            Self::ServerSuspended(server) => stage.servers[server].thaw(),
            Self::LeaderSteppedDown(_) | Self::Replayed(..) | Self::NetworkReset(_) => {}
            Self::NetworkCut(relay, _) | Self::NetworkSlow(relay, _) => {
                stage.set_network(relay, None, Network::Good);
            }
            Self::WebhookDown => stage.set_fronts(Network::Good),
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

    /// Returns whether it struck the webhook.
    pub fn is_of_webhook(&self) -> bool {
        let mut faults = self.faults.iter();
        faults.any(|fault| fault.part() == Part::Webhook)
    }

    /// Returns whether a network may have held up what a relay had sent until it was back.
    pub fn holds_network(&self) -> bool {
        self.faults.iter().any(|fault| {
            matches!(
                fault,
                Fault::RelayAsleep(..)
                    | Fault::RelaysAsleep(_)
                    | Fault::RelayIsolated(_)
                    | Fault::NetworkCut(..)
            )
        })
    }

    /// Returns whether a server may have forgotten what it was told.
    pub fn is_of_server(&self) -> bool {
        let mut faults = self.faults.iter();
        faults.any(|fault| fault.part() == Part::Servers)
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
            if second.goes_with(faults[0], stage.cast) {
                faults.push(second);
            }
        }
        // Short faults are as likely as long ones, but for those that must last longer than the ack wait.
        let duration = match faults.iter().any(|fault| fault.is_for_takeover()) && random.bool() {
            true => Duration::from_secs(6),
            false => Duration::from_millis(1 << random.u32(4..14)),
        };
        let duration = duration.mul_f64(0.5 + random.f64());
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

/// The names of the relays that faults strike.
fn names(stage: &Stage, faults: &[Fault]) -> Vec<String> {
    let struck = faults.iter().flat_map(|fault| fault.relays(stage.cast));
    struck
        .map(|relay| stage.replicas[relay].name.clone())
        .collect()
}
