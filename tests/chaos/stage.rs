//! All the parts of a run: servers, relays, the network between them, and the webhook.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    time::{Duration, Instant},
};

use async_nats::{
    Client, ServerAddr,
    jetstream::{
        self,
        consumer::{DeliverPolicy, FromConsumer, pull},
    },
};

use crate::{
    support::{NatsServer, Network, Proxy, Relay, until_ok},
    traffic::{self, Endpoint},
};

/// Who takes part.
#[derive(Clone, Copy, Debug)]
pub struct Cast {
    pub servers: usize,
    /// How many relays each environment has.
    pub relays: usize,
    /// The environments that relay the same messages, each under a prefix of its own.
    pub environments: &'static [&'static str],
    /// How many messages the input stream keeps at most, if there is a limit.
    pub limit: Option<i64>,
}

impl Cast {
    /// Returns how many relays there are in all.
    pub fn replicas(self) -> usize {
        self.relays * self.environments.len()
    }

    /// Returns the environment that a relay belongs to.
    pub fn environment_of(self, replica: usize) -> &'static str {
        self.environments[replica / self.relays]
    }

    /// Returns the relays of an environment.
    pub fn relays_of(self, environment: &str) -> impl Iterator<Item = usize> {
        (0..self.replicas()).filter(move |relay| self.environment_of(*relay) == environment)
    }
}

impl fmt::Display for Cast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            servers, relays, ..
        } = self;
        write!(f, "servers {servers}, relays {relays}")?;
        if self.environments.len() > 1 {
            write!(f, ", environments {}", self.environments.len())?;
        }
        self.limit
            .map_or(Ok(()), |limit| write!(f, ", limit {limit}"))
    }
}

pub struct Stage {
    pub cast: Cast,
    pub servers: Vec<NatsServer>,
    pub replicas: Vec<Replica>,
    pub endpoint: Endpoint,
    /// A client that no fault of the network reaches.
    pub client: Client,
    /// The log of each relay that has ended, by its name.
    pub logs: BTreeMap<String, Vec<String>>,
    /// Relays that ended though nobody wanted it, with what they said last.
    pub deaths: Vec<String>,
    /// The most memory that a relay has had, in kB.
    pub memory: u64,
    pub replayed: Vec<Replayed>,
}

/// How an operator has messages handed out again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Replay {
    /// As by `nats consumer reset`.
    Reset,
    /// The consumer is deleted and created anew.
    Recreated,
}

/// What an environment was handed out again.
pub struct Replayed {
    pub environment: &'static str,
    /// From the message of this sequence on,
    pub from: u64,
    /// of which those up to this one had been acknowledged.
    pub to: u64,
    pub at: Instant,
    /// Whether a server has confirmed that.
    pub is_confirmed: bool,
}

/// A relay that is started again whenever it has ended.
pub struct Replica {
    /// The network between it and each of the servers.
    pub links: Vec<Proxy>,
    /// The network between it and the webhook.
    pub front: Proxy,
    pub environment: &'static str,
    relay: Option<Relay>,
    /// Which of the replicas, and which of its processes: `1.4`.
    pub name: String,
    number: usize,
    starts: usize,
}

impl Stage {
    pub async fn set(cast: Cast, seed: u64) -> Self {
        // The relays must not learn the way around the proxies.
        let retiring = "lame_duck_grace_period: \"1s\"";
        let servers = match cast.servers {
            1 => {
                let jetstream = "jetstream { store_dir: \"$DIR/jetstream\" }";
                vec![NatsServer::with_config(&format!("{jetstream}\n{retiring}")).await]
            }
            _ => NatsServer::cluster_with(retiring, "no_advertise: true").await,
        };
        let replication = servers.len();
        for (stream, subject) in [("CMS", "cms.cache.>"), ("RELAYED", "relayed.>")] {
            servers[0].create_stream(stream, subject, replication).await;
        }
        let client = traffic::client(&addresses(&servers)).await;
        if let Some(limit) = cast.limit {
            let jetstream = jetstream::new(client.clone());
            let mut stream = jetstream.get_stream("CMS").await.unwrap();
            let mut config = stream.info().await.unwrap().config.clone();
            config.max_messages = limit;
            jetstream.update_stream(config).await.unwrap();
        }
        let endpoint = Endpoint::start(seed, cast.environments).await;
        let mut replicas = Vec::new();
        for number in 1..=cast.replicas() {
            let mut links = Vec::new();
            for server in &servers {
                links.push(Proxy::to(SocketAddr::from(([127, 0, 0, 1], server.port()))).await);
            }
            replicas.push(Replica {
                links,
                front: Proxy::to(endpoint.webhook.address()).await,
                environment: cast.environment_of(number - 1),
                relay: None,
                name: String::new(),
                number,
                starts: 0,
            });
        }
        let mut stage = Self {
            client,
            cast,
            servers,
            replicas,
            endpoint,
            logs: BTreeMap::new(),
            deaths: Vec::new(),
            memory: 0,
            replayed: Vec::new(),
        };
        for replica in 0..cast.replicas() {
            stage.start_relay(replica);
        }
        stage
    }

    /// Where the servers are, past all proxies.
    pub fn addresses(&self) -> Vec<ServerAddr> {
        addresses(&self.servers)
    }

    pub fn start_relay(&mut self, replica: usize) {
        let replica = &mut self.replicas[replica];
        replica.starts += 1;
        replica.name = format!("{}.{}", replica.number, replica.starts);
        let links = replica.links.iter();
        let servers: Vec<_> = links
            .map(|link| format!("nats://{}", link.address()))
            .collect();
        let servers = servers.join(",");
        let webhook = format!("http://{}/", replica.front.address());
        let prefix = format!("relayed.{}", replica.environment);
        // Where others can take over, a request may outlive the ack wait.
        let timeout = if self.cast.relays > 1 { "8s" } else { "2s" };
        replica.relay = Some(Relay::start([
            ("WEBHOOK_DESTINATION", &webhook[..]),
            ("WEBHOOK_HEADER_X_RELAY", &replica.name),
            ("WEBHOOK_HEADER_X_ENVIRONMENT", replica.environment),
            ("WEBHOOK_TIMEOUT", timeout),
            ("NATS_HOST", &servers),
            ("NATS_SUBJECT_PREFIX", "cms.cache"),
            ("NATS_RELAYED_SUBJECT_PREFIX", &prefix),
            ("NATS_STREAM", "CMS"),
            ("NATS_CONSUMER", replica.environment),
            ("NATS_RELAYED_STREAM", "RELAYED"),
        ]));
    }

    pub fn signal_relay(&self, replica: usize, signal: &str) {
        if let Some(relay) = &self.replicas[replica].relay {
            relay.signal(signal);
        }
    }

    /// With `kill -9`.
    pub async fn kill_relay(&mut self, replica: usize) {
        self.weigh(replica);
        let Replica { relay, name, .. } = &mut self.replicas[replica];
        if let Some(mut relay) = relay.take() {
            relay.kill().await;
            self.logs.insert(name.clone(), relay.ended().await.1);
        }
    }

    /// As its operator does; it must end by itself.
    pub async fn stop_relay(&mut self, replica: usize) {
        self.weigh(replica);
        let Replica { relay, name, .. } = &mut self.replicas[replica];
        if let Some(relay) = relay.take() {
            relay.signal("TERM");
            let (code, log) = relay.ended().await;
            if code != Some(0) {
                self.deaths
                    .push(format!("{name} ended with {code:?} when it was stopped"));
            }
            self.logs.insert(name.clone(), log);
        }
    }

    /// Starts what has ended by itself again, as a service manager does, and notes that.
    pub async fn look_after_relays(&mut self) {
        for replica in 0..self.replicas.len() {
            let Replica { relay, name, .. } = &mut self.replicas[replica];
            let is_dead = |relay: &mut Relay| !relay.is_running();
            if let Some(dead) = relay.take_if(is_dead) {
                let (code, log) = dead.ended().await;
                let last = log.last().cloned().unwrap_or_default();
                self.deaths
                    .push(format!("{name} ended by itself with {code:?}: {last}"));
                self.logs.insert(name.clone(), log);
                self.start_relay(replica);
            } else {
                self.weigh(replica);
            }
        }
    }

    /// Notes how much memory a relay has had at most, where the system tells.
    fn weigh(&mut self, replica: usize) {
        if let Some(relay) = &self.replicas[replica].relay {
            let status = std::fs::read_to_string(format!("/proc/{}/status", relay.id()));
            let status = status.unwrap_or_default();
            let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let peak = peak.and_then(|peak| peak.split_whitespace().next()?.parse().ok());
            self.memory = self.memory.max(peak.unwrap_or(0));
        }
    }

    /// Sets the network between a relay and one server, or all of them.
    pub fn set_network(&self, replica: usize, server: Option<usize>, network: Network) {
        for (n, link) in self.replicas[replica].links.iter().enumerate() {
            if server.is_none_or(|server| server == n) {
                link.set(network);
            }
        }
    }

    /// Sets the network between each relay and the webhook.
    pub fn set_fronts(&self, network: Network) {
        for replica in &self.replicas {
            replica.front.set(network);
        }
    }

    /// Has the last messages that an environment has acknowledged handed out again; nothing, where no server
    /// can be told just now.
    pub async fn replay(&mut self, environment: &'static str, how: Replay, count: u64) {
        let jetstream = jetstream::new(self.client.clone());
        let stream = jetstream.get_stream_no_info("CMS").await.unwrap();
        let Ok(info) = stream.consumer_info(environment).await else {
            return;
        };
        let to = info.ack_floor.stream_sequence;
        let from = to.saturating_sub(count) + 1;
        let at = Instant::now();
        let is_confirmed = match how {
            Replay::Reset => stream.reset_consumer(environment, Some(from)).await.is_ok(),
            Replay::Recreated => {
                let mut config = pull::Config::try_from_consumer_config(info.config).unwrap();
                config.deliver_policy = DeliverPolicy::ByStartSequence {
                    start_sequence: from,
                };
                until_ok("the consumer is created anew", async || {
                    // It may be gone already, or a relay may have created it meanwhile.
                    let _ = stream.delete_consumer(environment).await;
                    stream.create_consumer(config.clone()).await
                })
                .await;
                true
            }
        };
        self.replayed.push(Replayed {
            environment,
            from,
            to,
            at,
            is_confirmed,
        });
    }

    /// Waits until message `n` or a later one has come through, as long as others do: after a replay there are many.
    /// Returns whether it has.
    pub async fn reached(&mut self, n: usize, patience: Duration) -> bool {
        let start = Instant::now();
        let (mut last, mut count) = (start, 0);
        while !self.endpoint.has_reached(n) {
            self.look_after_relays().await;
            let now = self.endpoint.webhook.count();
            if now > count {
                (last, count) = (Instant::now(), now);
            }
            if last.elapsed() > patience || start.elapsed() > 5 * patience {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        true
    }
}

fn addresses(servers: &[NatsServer]) -> Vec<ServerAddr> {
    let servers = servers.iter();
    servers
        .map(|server| server.url().parse().unwrap())
        .collect()
}
