//! Telling systemd how we are: readiness, a status line, the watchdog (sd_notify(3)).
//! Where no `NOTIFY_SOCKET` is set, all of this does nothing.

use std::{convert::Infallible, future::pending, pin::Pin, time::Duration};

use log::warn;
use sd_notify::NotifyState;
use tokio::time::{Instant, Sleep, sleep};

use crate::status::Status;

/// The status line is renewed at least this often, where it has changed.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// The service manager that waits for our word.
pub struct Systemd {
    /// The next sign of life, and the time between two of them.
    beat: Option<(Pin<Box<Sleep>>, Duration)>,
    /// Whether it wants signs of life.
    watchdog: bool,
    /// The status line that it knows.
    known: String,
}

impl Systemd {
    /// As the environment says. Must be called within a tokio runtime.
    #[must_use]
    pub fn from_environment() -> Self {
        let watchdog = sd_notify::watchdog_enabled();
        let every = watchdog.map_or(STATUS_EVERY, |limit| STATUS_EVERY.min(limit / 2));
        let listens = std::env::var_os("NOTIFY_SOCKET").is_some();
        Self {
            beat: listens.then(|| (Box::pin(sleep(every)), every)),
            watchdog: watchdog.is_some(),
            known: String::new(),
        }
    }

    /// The relay is subscribed.
    pub fn ready(&mut self, status: &Status) {
        self.tell(&[NotifyState::Ready], status);
    }

    /// The relay was asked to stop.
    pub fn stopping(&mut self, status: &Status) {
        self.tell(&[NotifyState::Stopping], status);
    }

    /// Gives a sign of life whenever one is due; never ends.
    pub async fn beat(&mut self, status: &Status) -> Infallible {
        loop {
            let Some((due, every)) = &mut self.beat else {
                return pending().await;
            };
            due.as_mut().await;
            due.as_mut().reset(Instant::now() + *every);
            let alive: &[_] = if self.watchdog {
                &[NotifyState::Watchdog]
            } else {
                &[]
            };
            self.tell(alive, status);
        }
    }

    /// Sends `states`, and the status line if it has changed.
    fn tell(&mut self, states: &[NotifyState<'_>], status: &Status) {
        if self.beat.is_none() {
            return;
        }
        let line = status.line();
        let mut states = states.to_vec();
        if line != self.known {
            states.push(NotifyState::Status(&line));
        }
        if states.is_empty() {
            return;
        }
        if let Err(error) = sd_notify::notify(&states) {
            warn!("systemd cannot be told how we are: {error}");
        }
        self.known = line;
    }
}
