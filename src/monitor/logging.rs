//! How log lines are written: without ever waiting long for whoever reads them.

use std::{
    io,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use env_logger::Builder;
use log::{Level, Record};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
};

use super::log_line::LogLine;
use crate::{config::Log, lock::lock};

/// How long a line waits for a reader that is behind, so that a burst is logged as a whole.
const ROOM_TIMEOUT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000_000,
};

/// Once this was in vain, no line waits for so long: a reader that has stopped must not stop the relay.
const PAUSE: Duration = Duration::from_secs(10);

/// Lines that could not be written.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// How many lines of the log could not be written.
#[must_use]
pub fn dropped() -> u64 {
    DROPPED.load(Relaxed)
}

/// Starts logging to standard error, what and as the settings say.
pub fn start(settings: &Log) {
    open_stderr_anew();
    let state = Mutex::new((Room::default(), LogLine::new(settings.format)));
    let mut builder = Builder::new();
    builder.parse_filters(&settings.filter);
    builder.format(move |out, record| {
        let (room, line) = &mut *lock(&state);
        if !room.is_there() {
            DROPPED.fetch_add(1, Relaxed);
            return Ok(());
        }
        if let Some(dropped) = room.unreported() {
            let report = format_args!("{dropped} log lines could not be written and were dropped");
            let report = Record::builder().level(Level::Warn).args(report).build();
            line.write(out, &report)?;
        }
        line.write(out, record)
    });
    builder.init();
}

/// Whether standard error can take a line.
///
/// A pipe or socket that can take anything takes PIPE_BUF bytes at once (pipe(7)), more than a line and
/// a report have. On a terminal, or where others write to the same pipe, the room may be gone a moment
/// later: then, on Linux, [`open_stderr_anew`] makes the write fail, and cuts the line.
#[derive(Default)]
struct Room {
    /// How many of the dropped lines were reported.
    reported: u64,
    /// When a line waited in vain.
    in_vain: Option<Instant>,
}

impl Room {
    fn is_there(&mut self) -> bool {
        if stderr_takes_a_line(&Timespec::default()) {
            return true;
        }
        let is_dropping = dropped() > self.reported;
        if is_dropping || self.in_vain.is_some_and(|since| since.elapsed() < PAUSE) {
            return false;
        }
        if stderr_takes_a_line(&ROOM_TIMEOUT) {
            return true;
        }
        self.in_vain = Some(Instant::now());
        false
    }

    /// How many lines were dropped since this was asked last, if any.
    fn unreported(&mut self) -> Option<u64> {
        let dropped = dropped();
        let since = dropped - self.reported;
        self.reported = dropped;
        (since > 0).then_some(since)
    }
}

fn stderr_takes_a_line(timeout: &Timespec) -> bool {
    let stderr = io::stderr();
    let mut polled = [PollFd::new(&stderr, PollFlags::OUT)];
    let found = retry_on_intr(|| poll(&mut polled, Some(timeout)));
    // Beside room there would be an error where nobody can read any more.
    found.is_ok() && polled[0].revents() == PollFlags::OUT
}

/// Makes no write to standard error wait. Others may write to the same pipe or terminal, and must not
/// notice; hence not by a flag of what is shared with them. A file would be written from its beginning
/// then, and never waits anyway; what cannot be opened, such as a socket, stays as it is.
#[cfg(target_os = "linux")]
fn open_stderr_anew() {
    use rustix::{
        fs::{Mode, OFlags, open},
        stdio::dup2_stderr,
    };

    const STDERR: &str = "/proc/self/fd/2";

    let is_file = std::fs::metadata(STDERR).is_ok_and(|stderr| stderr.is_file());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    if !is_file && let Ok(anew) = open(STDERR, flags, Mode::empty()) {
        let _ = dup2_stderr(anew);
    }
}

#[cfg(not(target_os = "linux"))]
fn open_stderr_anew() {}
