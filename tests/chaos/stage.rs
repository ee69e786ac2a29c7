//! All the parts of a run: servers, relays, the network between them, and the webhook.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use async_nats::{Client, ServerAddr};

use crate::{
    support::{NatsServer, Network, Proxy, Relay},
    traffic::{self, Endpoint},
};

/// How many servers and relays there are.
#[derive(Clone, Copy, Debug)]
pub struct Cast {
    pub servers: usize,
    pub relays: usize,
}

pub struct Stage {
    pub cast: Cast,
    pub servers: Vec<NatsServer>,
    pub replicas: Vec<Replica>,
    pub endpoint: Endpoint,
    /// The network before the webhook.
    pub front: Proxy,
    /// A client that no fault of the network reaches.
    pub client: Client,
    /// The log of each relay that has ended, by its name.
    pub logs: BTreeMap<String, Vec<String>>,
    /// Relays that ended though nobody wanted it, with what they said last.
    pub deaths: Vec<String>,
    /// The most memory that a relay has had, in kB.
    pub memory: u64,
}

/// A relay that is started again whenever it has ended.
pub struct Replica {
    /// To each of the servers.
    pub links: Vec<Proxy>,
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
        for (stream, subject) in [("CMS", "cms.cache.>"), ("RELAYED", "relayed.cache.>")] {
            servers[0].create_stream(stream, subject, replication).await;
        }
        let endpoint = Endpoint::start(seed).await;
        let front = Proxy::to(endpoint.webhook.address()).await;
        let mut replicas = Vec::new();
        for number in 1..=cast.relays {
            let mut links = Vec::new();
            for server in &servers {
                links.push(Proxy::to(SocketAddr::from(([127, 0, 0, 1], server.port()))).await);
            }
            replicas.push(Replica {
                links,
                relay: None,
                name: String::new(),
                number,
                starts: 0,
            });
        }
        let mut stage = Self {
            client: traffic::client(&addresses(&servers)).await,
            cast,
            servers,
            replicas,
            endpoint,
            front,
            logs: BTreeMap::new(),
            deaths: Vec::new(),
            memory: 0,
        };
        for replica in 0..cast.relays {
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
        let (servers, webhook) = (
            servers.join(","),
            format!("http://{}/", self.front.address()),
        );
        replica.relay = Some(Relay::start([
            ("WEBHOOK_DESTINATION", &webhook[..]),
            ("WEBHOOK_HEADER_X_RELAY", &replica.name),
            ("WEBHOOK_TIMEOUT", "2s"),
            ("NATS_HOST", &servers),
            ("NATS_SUBJECT_PREFIX", "cms.cache"),
            ("NATS_RELAYED_SUBJECT_PREFIX", "relayed.cache"),
            ("NATS_STREAM", "CMS"),
            ("NATS_CONSUMER", "relay"),
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

    /// Waits until message `n` or a later one has come through; whether it has in time.
    pub async fn reached(&mut self, n: usize, patience: Duration) -> bool {
        let start = Instant::now();
        while !self.endpoint.has_reached(n) {
            self.look_after_relays().await;
            if start.elapsed() > patience {
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
