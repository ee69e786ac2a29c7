//! Chooses the server to try next, and explains failures to connect.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use async_nats::{ConnectErrorKind, ReconnectToServer, Server, ServerAddr, Statistics};
use log::warn;

use super::{BACKOFF, LASTING, events::Observer};
use crate::{config::Nats, tls};

/// Returns whether the text of an error says that a server has refused the login.
pub(super) fn is_refusal(error: &str) -> bool {
    use ConnectErrorKind::{Authentication, AuthorizationViolation};

    [AuthorizationViolation, Authentication]
        .iter()
        .any(|refusal| error.starts_with(&refusal.to_string()))
}

/// Returns the address of a server, without a login that a cluster may have advertised with it.
#[must_use]
pub fn show(server: &ServerAddr) -> String {
    format!("{}://{}:{}", server.scheme(), server.host(), server.port())
}

/// Explains why there is no connection to a server.
pub(super) fn explain(error: &str, server: &ServerAddr, nats: &Nats) -> String {
    if is_refusal(error) {
        // In the server's words, if any, which are often the client's.
        let reason = error.rsplit(": nats: ").next().unwrap_or(error);
        return format!("refused the login ({reason}); {}", nats.login.hint());
    }
    // The client uses this text for every network failure.
    let error = error.strip_prefix("IO error: ").unwrap_or(error);
    let is_silent = error == "timed out" || error.contains("expected INFO, got nothing");
    let hint = match error {
        // The greeting of a NATS server is not HTTP.
        "invalid HTTP version" => {
            "it does not speak HTTP there, and so has no web socket; check host and port, or write \
             nats://"
        }
        _ if nats.tls_first && error.contains("InvalidContentType") => {
            "it does not begin with the TLS handshake; unset NATS_TLS_FIRST unless the server has \
             handshake_first, else check host and port"
        }
        _ if is_silent && !nats.tls_first && !server.is_websocket() => {
            "it sends no greeting; if it wants the TLS handshake first (handshake_first), set \
             NATS_TLS_FIRST=true, else check host and port"
        }
        _ => return tls::explain(error, "NATS").unwrap_or_else(|| error.to_owned()),
    };
    hint.to_owned()
}

/// The state of connecting.
#[derive(Default)]
pub(super) struct Progress {
    /// Attempts since the last connection that lasted.
    attempts: usize,
    /// The server of the last attempt.
    pub(super) server: Option<ServerAddr>,
    /// When it was connected to.
    pub(super) connected: Option<Instant>,
    /// The number of connections before that attempt.
    connections: u64,
    /// Whether a server has accepted the login before. If not, a refusal is final.
    pub(super) was_accepted: bool,
}

impl Observer {
    /// Chooses one server after the other, without a wait in the first round, then with growing waits.
    pub(super) fn choose(&self, servers: &[Server]) -> Option<ReconnectToServer> {
        let mut progress = self.progress.lock();
        if let Some(since) = progress.connected.take()
            && since.elapsed() >= LASTING
        {
            progress.attempts = 0;
        }
        let next = servers.get(progress.attempts % servers.len().max(1))?;
        let delay = match progress.attempts / servers.len() {
            0 => Duration::ZERO,
            rounds => BACKOFF.wait(rounds as u32),
        };
        let connects = |statistics: &Arc<Statistics>| statistics.connects.load(Relaxed);
        let connections = self.statistics.get().map_or(0, connects);
        let last = servers
            .iter()
            .find(|it| Some(&it.addr) == progress.server.as_ref());
        if let Some(last) = last.filter(|_| connections == progress.connections) {
            self.say_failed(last, delay, progress.was_accepted);
        }
        progress.connections = connections;
        progress.attempts += 1;
        progress.server = Some(next.addr.clone());
        Some(ReconnectToServer {
            addr: next.addr.clone(),
            delay: Some(delay),
        })
    }

    fn say_failed(&self, server: &Server, delay: Duration, was_accepted: bool) {
        // The client reports no error for a name that does not resolve.
        let error = server.last_error.as_deref();
        let error = error.unwrap_or("its name does not resolve");
        if is_refusal(error) && !was_accepted {
            // It ends the relay, which logs it.
            return;
        }
        let reason = explain(error, &server.addr, &self.config.nats);
        let advertised = match server.is_discovered && error.contains("not valid for name") {
            true => {
                "; the cluster advertises that address: have it advertise a name of its certificate \
                 (client_advertise), or set NATS_IGNORE_DISCOVERED_SERVERS=true"
            }
            false => "",
        };
        let wait = match delay.is_zero() {
            true => "now".to_owned(),
            false => format!("in {delay:.1?}"),
        };
        let server = show(&server.addr);
        let failure = format!("cannot connect to NATS at {server}: {reason}{advertised}");
        warn!("{failure}; next attempt {wait}");
        self.monitor.set_unreachable(failure);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{config::Config, monitor::Monitor};

    #[test]
    fn a_refusal_says_once_why() {
        let config = config();
        let said = "authorization violation: nats: authorization violation";
        let reason = explain(said, &config.nats.servers[0], &config.nats);
        let once = "refused the login (authorization violation); set NATS_USER";
        assert!(reason.starts_with(once), "{reason}");
    }

    fn config() -> Arc<Config> {
        let config = Config::from_environment(&crate::Environment::from_iter([
            ("WEBHOOK_DESTINATION", "http://localhost"),
            ("NATS_HOST", "nats://a,nats://b"),
            ("NATS_SUBJECT_PREFIX", "cms"),
            ("NATS_RELAYED_SUBJECT_PREFIX", "relayed"),
        ]));
        Arc::new(config.unwrap())
    }

    #[test]
    fn every_server_is_tried_at_once_in_the_first_round_and_after_waits_in_later_ones() {
        let config = config();
        let monitor = Arc::new(Monitor::new(None).unwrap());
        let (observer, _events) = Observer::new(&config, &monitor, false);
        let servers = config.nats.servers.iter().map(|address| Server {
            addr: address.clone(),
            failed_attempts: 0,
            did_connect: false,
            is_discovered: false,
            last_error: None,
        });
        let servers: Vec<_> = servers.collect();
        let choose = || {
            let chosen = observer.choose(&servers).unwrap();
            (chosen.addr.host().to_owned(), chosen.delay.unwrap())
        };
        for longest_wait in [Duration::ZERO, BACKOFF.first, 2 * BACKOFF.first] {
            for host in ["a", "b"] {
                let (chosen, wait) = choose();
                assert_eq!(chosen, host);
                assert!(
                    (longest_wait / 2..=longest_wait).contains(&wait),
                    "{wait:?}"
                );
            }
        }
        // A connection that did not last changes nothing; after one that did, a first round follows.
        let connected = |before| {
            observer.progress.lock().connected = Instant::now().checked_sub(before);
        };
        connected(Duration::ZERO);
        assert_ne!(choose().1, Duration::ZERO);
        connected(LASTING);
        assert_eq!(choose(), ("a".to_owned(), Duration::ZERO));
    }
}
