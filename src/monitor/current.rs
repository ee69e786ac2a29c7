//! The message being worked on, and how long it has been waiting.

use std::{
    sync::Mutex,
    time::{Duration, SystemTime},
};

use crate::lock::lock;

/// Since when the current message has been waiting to be relayed, if there is one.
#[derive(Default)]
pub struct Current(Mutex<Option<SystemTime>>);

/// While it is there, a message is being worked on.
pub struct Working<'a>(&'a Current);

impl Current {
    pub(super) fn begin(&self, since: SystemTime) -> Working<'_> {
        self.set(Some(since));
        Working(self)
    }

    /// How long the message has been waiting; none at all if there is no message.
    pub(super) fn age(&self) -> Duration {
        let since = *lock(&self.0);
        // Clocks differ between machines: a message can seem to come from the future.
        since
            .and_then(|since| since.elapsed().ok())
            .unwrap_or_default()
    }

    fn set(&self, since: Option<SystemTime>) {
        *lock(&self.0) = since;
    }
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.set(None);
    }
}
