//! Signs of life of the main loop: for the status endpoints, and for systemd along with readiness and
//! a status line (sd_notify(3)). Where neither wants them, all of this does nothing.

use std::{
    convert::Infallible,
    future::pending,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use log::warn;
use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

use crate::{lock::lock, monitor::Monitor};

/// A sign of life is given at least this often.
const LONGEST_BEAT: Duration = Duration::from_secs(1);

/// systemd is not kept waiting for longer than this: a NATS server that is down must not hold up the units
/// that are ordered after the relay, or a boot.
const LONGEST_START: Duration = Duration::from_secs(10);

/// The heartbeat of the main loop.
pub struct Heartbeat {
    /// The time between two signs of life, if anyone wants them.
    every: Option<Duration>,
    /// Whether systemd wants signs of life.
    watchdog: bool,
    started: Instant,
    /// Whether systemd knows that the relay is ready.
    is_ready: AtomicBool,
    /// The status line that systemd knows.
    known: Mutex<String>,
}

impl Heartbeat {
    /// As the environment says; `shown` where the status is shown elsewhere as well.
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

    /// Tells systemd that the start is over: the relay is subscribed, or has waited long enough for that.
    pub fn ready(&self, monitor: &Monitor) {
        if !self.is_ready.swap(true, Relaxed) {
            self.tell(Some(NotifyState::Ready), monitor);
        }
    }

    /// The relay was asked to stop.
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
        // A beat that comes late is no reason for several at once.
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            beats.tick().await;
            monitor.add_turn();
            if self.started.elapsed() >= LONGEST_START {
                self.ready(monitor);
            }
            if self.watchdog {
                // On its own: whatever is wrong with the status line must not look like a hang.
                notify(&[NotifyState::Watchdog]);
            }
            self.tell(None, monitor);
        }
    }

    /// Sends `state`, and the status line if it has changed.
    fn tell(&self, state: Option<NotifyState<'_>>, monitor: &Monitor) {
        let line = monitor.line();
        let mut known = lock(&self.known);
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
