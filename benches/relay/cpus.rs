//! Who runs on which CPU. Left to the scheduler, a relay shares a CPU with the webhook at one time and
//! not at another, and a message then takes up to 2.5 times as long, whatever the relay. So the relay
//! has one to itself; the server, the webhook and the load share another.

use std::{fmt, thread};

/// The CPUs in use.
pub struct Cpus {
    count: usize,
    /// Whether the relay has one to itself, as far as the system lets itself be told.
    split: bool,
}

const RELAY: usize = 0;
const ALL_ELSE: usize = 1;

impl Cpus {
    /// Moves this thread, and all that it will start, to the CPU of everything but the relay.
    pub fn split() -> Self {
        let count = thread::available_parallelism().map_or(1, Into::into);
        let split = count > 1 && move_to(RELAY) && move_to(ALL_ELSE);
        Self { count, split }
    }

    /// Does `start`, which starts a relay.
    pub fn start<T>(&self, start: impl FnOnce() -> T) -> T {
        if !self.split {
            return start();
        }
        // A process starts where the thread that starts it runs.
        move_to(RELAY);
        let started = start();
        move_to(ALL_ELSE);
        started
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, split } = self;
        match split {
            true => write!(f, "CPUs: {count}, one for the relay and one for all else"),
            false => write!(f, "CPUs: {count}, shared"),
        }
    }
}

/// Moves this thread to a CPU; whether that worked.
#[cfg(target_os = "linux")]
fn move_to(cpu: usize) -> bool {
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(cpu);
    rustix::thread::sched_setaffinity(None, &cpus).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn move_to(_: usize) -> bool {
    false
}
