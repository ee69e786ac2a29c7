//! Signs of life of the main loop: for the status endpoints, and for systemd together with readiness and
//! a status line (sd_notify(3)). If neither needs them, all of this does nothing.

use std::{
    convert::Infallible,
    future::pending,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use log::warn;
use parking_lot::Mutex;
use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

use crate::monitor::Monitor;

/// How often to give a sign of life, at least.
const LONGEST_BEAT: Duration = Duration::from_secs(1);

/// The longest time to keep systemd waiting, because a NATS server that is down must not hold up a boot or the units
/// that are ordered after the relay.
const LONGEST_START: Duration = Duration::from_secs(10);

/// The heartbeat of the main loop.
pub struct Heartbeat {
    /// The time between two signs of life, if anyone needs them.
    every: Option<Duration>,
    /// Whether systemd needs signs of life.
    watchdog: bool,
    started: Instant,
    /// Whether systemd knows that the relay is ready.
    is_ready: AtomicBool,
    /// The status line last sent to systemd.
    known: Mutex<String>,
}

impl Heartbeat {
    /// Returns the heartbeat that the environment asks for; `shown` if the status is shown elsewhere as well.
    #[must_use]
    pub fn new(shown: bool) -> Self {
        let watchdog = sd_notify::watchdog_enabled();
        let every = watchdog.map_or(LONGEST_BEAT, |limit| LONGEST_BEAT.min(limit / 2));
        let systemd = std::env::var_os("NOTIFY_SOCKET").is_some();
        Self {
            every: (systemd || shown).then_some(every),
            watchdog: watchdog.is_some(),
            started: Instant::now(),
            is_ready: AtomicBool::default(),
            known: Mutex::default(),
        }
    }

    /// Tells systemd that the start is complete: the relay is subscribed, or has waited long enough.
    pub fn ready(&self, monitor: &Monitor) {
        if !self.is_ready.swap(true, Relaxed) {
            self.tell(Some(NotifyState::Ready), monitor);
        }
    }

    /// Notes that the relay was asked to stop.
    pub fn stopping(&self, monitor: &Monitor) {
        monitor.set_stopping();
        self.tell(Some(NotifyState::Stopping), monitor);
    }

    /// Gives a sign of life whenever one is due; never ends.
    pub async fn beat(&self, monitor: &Monitor) -> Infallible {
        let Some(every) = self.every else {
            return pending().await;
        };
        let mut beats = interval(every);
        // A late beat must not cause several at once.
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            beats.tick().await;
            monitor.add_turn();
            if self.started.elapsed() >= LONGEST_START {
                self.ready(monitor);
            }
            if self.watchdog {
                // Separately, so that a problem with the status line does not look like a hang.
                notify(&[NotifyState::Watchdog]);
            }
            self.tell(None, monitor);
        }
    }

    /// Sends `state`, and the status line if it has changed.
    fn tell(&self, state: Option<NotifyState<'_>>, monitor: &Monitor) {
        let line = monitor.line();
        let mut known = self.known.lock();
        let changed = (line != *known).then_some(NotifyState::Status(&line));
        let states: Vec<_> = state.into_iter().chain(changed).collect();
        if !states.is_empty() {
            notify(&states);
        }
        *known = line;
    }
}

/// Sends `states` in one datagram, which systemd drops as a whole if it has more than 4,096 bytes or
/// a NUL.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("cannot notify systemd: {error}");
    }
}
