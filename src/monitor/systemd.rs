//! Signs of life of the main loop: for the status endpoints, and for systemd together with readiness and
//! a status line (sd_notify(3)).

use std::{
    convert::Infallible,
    mem,
    time::{Duration, Instant},
};

use log::debug;
use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

use super::Monitor;
use crate::text;

/// How often to give a sign of life, at least.
const LONGEST_BEAT: Duration = Duration::from_secs(1);

/// The longest time to keep systemd waiting, because a NATS server that is down must not hold up a boot or the units
/// that are ordered after the relay.
const LONGEST_START: Duration = Duration::from_secs(10);

impl Monitor {
    /// Tells systemd that the start is complete: the relay is subscribed, or has waited long enough.
    pub fn started(&self) {
        if !mem::replace(&mut self.state.lock().is_started, true) {
            notify(&[NotifyState::Ready, NotifyState::Status(&self.line())]);
        }
    }

    /// Notes that the relay was asked to stop.
    pub fn stopping(&self) {
        self.state.lock().is_stopping = true;
        notify(&[NotifyState::Stopping, NotifyState::Status(&self.line())]);
    }

    /// Gives a sign of life whenever one is due; never ends.
    pub async fn beat(&self) -> Infallible {
        let (start, watchdog) = (Instant::now(), sd_notify::watchdog_enabled());
        let every = watchdog.map_or(LONGEST_BEAT, |limit| LONGEST_BEAT.min(limit / 2));
        let mut beats = interval(every);
        // A late beat must not cause several at once.
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            beats.tick().await;
            self.state.lock().last_turn = Instant::now();
            if start.elapsed() >= LONGEST_START {
                self.started();
            }
            if watchdog.is_some() {
                // Separately, so that a problem with the status line does not look like a hang.
                notify(&[NotifyState::Watchdog]);
            }
            notify(&[NotifyState::Status(&self.line())]);
        }
    }

    /// Returns the essence in one bounded line, without secrets.
    fn line(&self) -> String {
        let (_, now) = self.state.lock().now(&self.metrics);
        let [relayed, given_up, dropped, waiting] = self.metrics.counts();
        let line = format!(
            "{now}; {relayed} relayed, {given_up} failed, {dropped} dropped, {waiting} waiting"
        );
        text::one_line(&line, text::LONGEST_NOTE).into_owned()
    }
}

/// Sends `states` in one datagram, which systemd drops as a whole if it has more than 4,096 bytes or
/// a NUL. Without systemd, this does nothing.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("cannot notify systemd: {error}");
    }
}
