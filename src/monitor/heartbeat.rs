//! Signs of life of the main loop: for the status endpoints, and for systemd along with readiness and
//! a status line (sd_notify(3)). Where neither wants them, all of this does nothing.

use std::{convert::Infallible, future::pending, sync::Mutex, time::Duration};

use log::warn;
use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

use crate::{lock::lock, monitor::Monitor};

/// A sign of life is given at least this often.
const LONGEST_BEAT: Duration = Duration::from_secs(1);

/// The heartbeat of the main loop.
pub struct Heartbeat {
    /// The time between two signs of life, if anyone wants them.
    every: Option<Duration>,
    /// Whether systemd wants signs of life.
    watchdog: bool,
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
            known: Mutex::default(),
        }
    }

    /// The relay is subscribed.
    pub fn ready(&self, monitor: &Monitor) {
        self.tell(Some(NotifyState::Ready), monitor);
    }

    /// The relay was asked to stop.
    pub fn stopping(&self, monitor: &Monitor) {
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
        warn!("systemd cannot be told how we are: {error}");
    }
}
