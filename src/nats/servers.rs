//! Chooses the server to try next, and explains failures to connect.

use std::{
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use async_nats::{ConnectErrorKind, ReconnectToServer, Server, ServerAddr};
use log::warn;

use super::{BACKOFF, LASTING, events::Observer};
use crate::tls;

/// A server has refused the login.
pub(super) const REFUSALS: [ConnectErrorKind; 2] = [
    ConnectErrorKind::AuthorizationViolation,
    ConnectErrorKind::Authentication,
];

/// Returns whether the text of an error says that.
pub(super) fn is_refusal(error: &str) -> bool {
    REFUSALS
        .iter()
        .any(|refusal| error.starts_with(&refusal.to_string()))
}

/// Returns the message for a refused login. The client's error and the server's often are the same words.
pub(super) fn refusal(error: &str, hint: &str) -> String {
    let reason = match error.split_once(": nats: ") {
        Some((reason, said)) if reason == said => reason,
        _ => error,
    };
    format!("refused the login ({reason}); {hint}")
}

/// Returns the address of a server, without a login that a cluster may have advertised with it.
#[must_use]
pub fn show(server: &ServerAddr) -> String {
    format!("{}://{}:{}", server.scheme(), server.host(), server.port())
}

/// Explains why there is no connection to a server. `tls_first` tells whether the TLS handshake came first.
pub(super) fn explain(error: &str, server: &ServerAddr, tls_first: bool) -> String {
    // The client uses this text for every network failure.
    let error = error.strip_prefix("IO error: ").unwrap_or(error);
    let is_socket = server.is_websocket();
    let hint = "if it wants the TLS handshake first (handshake_first), set NATS_TLS_FIRST=true, else \
                check host and port";
    if tls_first && error.contains("InvalidContentType") {
        return "it does not begin with the TLS handshake; unset NATS_TLS_FIRST unless the server has \
                handshake_first, else check host and port"
            .to_owned();
    }
    if !tls_first && !is_socket && error == "timed out" {
        return format!("no answer in time; {hint}");
    }
    if error.contains("expected INFO, got nothing") {
        return format!("the server closed the connection without a greeting; {hint}");
    }
    // The greeting of a NATS server is not HTTP.
    if error == "invalid HTTP version" {
        return "it does not speak HTTP there, and so has no web socket; check host and port, or write \
                nats://"
            .to_owned();
    }
    tls::explain(error, "NATS").unwrap_or_else(|| error.to_owned())
}

/// The state of connecting.
#[derive(Default)]
pub(super) struct Progress {
    /// Attempts since the last connection that lasted.
    attempts: usize,
    /// The server of the last attempt.
    server: Option<ServerAddr>,
    /// When it was connected to.
    pub(super) connected: Option<Instant>,
    /// The number of connections before that attempt.
    connections: u64,
}

impl Progress {
    /// Describes the server of the last attempt.
    pub(super) fn server(&self) -> String {
        self.server.as_ref().map(show).unwrap_or_default()
    }
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
        let rounds = progress.attempts / servers.len();
        let delay = match u32::try_from(rounds) {
            Ok(0) => Duration::ZERO,
            rounds => BACKOFF.wait(rounds.unwrap_or(u32::MAX)),
        };
        let connections = self.connections();
        let has_failed = connections == progress.connections;
        progress.connections = connections;
        if let Some(last) = progress.server.as_ref().filter(|_| has_failed) {
            let last = servers.iter().find(|server| server.addr == *last);
            if let Some(last) = last {
                self.say_failed(last, delay);
            }
        }
        progress.attempts += 1;
        progress.server = Some(next.addr.clone());
        Some(ReconnectToServer {
            addr: next.addr.clone(),
            delay: Some(delay),
        })
    }

    fn say_failed(&self, server: &Server, delay: Duration) {
        // The client reports no error for a name that does not resolve.
        let error = server.last_error.as_deref();
        let error = error.unwrap_or("its name does not resolve");
        let reason = match is_refusal(error) {
            // It ends the relay, which logs it.
            true if !self.was_accepted.load(Relaxed) => return,
            true => refusal(error, &self.hint),
            false => explain(error, &server.addr, self.tls_first),
        };
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

    fn connections(&self) -> u64 {
        self.statistics
            .get()
            .map_or(0, |statistics| statistics.connects.load(Relaxed))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{config::Config, monitor::Monitor};
    use std::sync::Arc;

    #[test]
    fn a_refusal_says_once_why() {
        let said = "authorization violation: nats: authorization violation";
        let once = "refused the login (authorization violation); check NATS_USER";
        assert_eq!(refusal(said, "check NATS_USER"), once);
    }

    #[test]
    fn every_server_is_tried_at_once_in_the_first_round_and_after_waits_in_later_ones() {
        let config = Config::from_environment(&crate::Environment::from_iter([
            ("WEBHOOK_DESTINATION", "http://localhost"),
            ("NATS_HOST", "nats://a,nats://b"),
            ("NATS_SUBJECT_PREFIX", "cms"),
            ("NATS_RELAYED_SUBJECT_PREFIX", "relayed"),
        ]));
        let config = config.unwrap();
        let monitor = Arc::new(Monitor::new(String::new()).unwrap());
        let (observer, _, _events) = Observer::new(&config, &monitor, true);
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
