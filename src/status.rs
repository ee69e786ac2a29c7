//! What the relay is doing, for whoever watches it.

use std::{
    fmt::Write,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

/// Counters and states. Written where things happen, read by whoever shows them.
#[derive(Debug, Default)]
pub struct Status {
    server: Mutex<Option<String>>,
    relayed: AtomicU64,
    given_up: AtomicU64,
    dropped: AtomicU64,
    waiting: AtomicUsize,
    last_failure: Mutex<Option<String>>,
}

impl Status {
    /// Connected to a server, or to none.
    pub fn set_server(&self, server: Option<String>) {
        *lock(&self.server) = server;
    }

    /// One more message was relayed.
    pub fn add_relayed(&self) {
        self.relayed.fetch_add(1, Relaxed);
    }

    /// One more message was not relayed.
    pub fn add_given_up(&self, failure: String) {
        self.given_up.fetch_add(1, Relaxed);
        *lock(&self.last_failure) = Some(failure);
    }

    /// One more message did not fit into the buffer.
    pub fn add_dropped(&self) {
        self.dropped.fetch_add(1, Relaxed);
    }

    /// How many messages were dropped.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// An attempt failed.
    pub fn set_last_failure(&self, failure: String) {
        *lock(&self.last_failure) = Some(failure);
    }

    /// How many messages wait in the buffer.
    pub fn set_waiting(&self, messages: usize) {
        self.waiting.store(messages, Relaxed);
    }

    /// All of it in one line, without secrets.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = match &*lock(&self.server) {
            Some(server) => format!("connected to {server}"),
            None => "not connected to NATS".to_owned(),
        };
        let counts = [
            ("relayed", self.relayed.load(Relaxed)),
            ("given up", self.given_up.load(Relaxed)),
            ("dropped", self.dropped.load(Relaxed)),
            ("waiting", self.waiting.load(Relaxed) as u64),
        ];
        for (what, count) in counts {
            let _ = write!(line, ", {count} {what}");
        }
        if let Some(failure) = &*lock(&self.last_failure) {
            let _ = write!(line, "; last failure: {failure}");
        }
        line
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
