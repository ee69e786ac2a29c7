//! Signs of life of the main loop: for the status endpoints, and for systemd along with readiness and
//! a status line (sd_notify(3)). Where neither wants them, all of this does nothing.

use std::{convert::Infallible, future::pending, pin::Pin, time::Duration};

use log::warn;
use sd_notify::NotifyState;
use tokio::time::{Instant, Sleep, sleep};

use crate::status::Status;

/// A sign of life is given at least this often.
const LONGEST_BEAT: Duration = Duration::from_secs(1);

/// The heartbeat of the main loop.
pub struct Heartbeat {
    /// The next sign of life, and the time between two of them.
    beat: Option<(Pin<Box<Sleep>>, Duration)>,
    /// Whether systemd waits for our word.
    systemd: bool,
    /// Whether systemd wants signs of life.
    watchdog: bool,
    /// The status line that systemd knows.
    known: String,
}

impl Heartbeat {
    /// As the environment says; `shown` where the status is shown elsewhere as well. Must be called
    /// within a tokio runtime.
    #[must_use]
    pub fn new(shown: bool) -> Self {
        let watchdog = sd_notify::watchdog_enabled();
        let every = watchdog.map_or(LONGEST_BEAT, |limit| LONGEST_BEAT.min(limit / 2));
        let systemd = std::env::var_os("NOTIFY_SOCKET").is_some();
        Self {
            beat: (systemd || shown).then(|| (Box::pin(sleep(every)), every)),
            systemd,
            watchdog: watchdog.is_some(),
            known: String::new(),
        }
    }

    /// The relay is subscribed.
    pub fn ready(&mut self, status: &Status) {
        self.tell(Some(NotifyState::Ready), status);
    }

    /// The relay was asked to stop.
    pub fn stopping(&mut self, status: &Status) {
        self.tell(Some(NotifyState::Stopping), status);
    }

    /// Gives a sign of life whenever one is due; never ends.
    pub async fn beat(&mut self, status: &Status) -> Infallible {
        loop {
            let Some((due, every)) = &mut self.beat else {
                return pending().await;
            };
            due.as_mut().await;
            due.as_mut().reset(Instant::now() + *every);
            status.add_turn();
            if self.watchdog {
                // On its own: whatever is wrong with the status line must not look like a hang.
                notify(&[NotifyState::Watchdog]);
            }
            self.tell(None, status);
        }
    }

    /// Sends `state`, and the status line if it has changed.
    fn tell(&mut self, state: Option<NotifyState<'_>>, status: &Status) {
        if !self.systemd {
            return;
        }
        let line = status.line();
        let changed = (line != self.known).then_some(NotifyState::Status(&line));
        let states: Vec<_> = state.into_iter().chain(changed).collect();
        if !states.is_empty() {
            notify(&states);
        }
        self.known = line;
    }
}

/// Sends `states` in one datagram, which systemd drops as a whole if it has more than 4,096 bytes or
/// a NUL.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("systemd cannot be told how we are: {error}");
    }
}
