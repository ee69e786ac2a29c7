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
        if !room.is_there(stderr_takes_a_line) {
            room.dropped += 1;
            DROPPED.store(room.dropped, Relaxed);
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
    /// How many lines were dropped.
    dropped: u64,
    /// How many of them were reported.
    reported: u64,
    /// When a line waited in vain.
    in_vain: Option<Instant>,
}

impl Room {
    /// Whether there is room, where `takes_a_line` tells whether there is some within a time.
    fn is_there(&mut self, takes_a_line: impl Fn(&Timespec) -> bool) -> bool {
        if takes_a_line(&Timespec::default()) {
            return true;
        }
        let is_dropping = self.dropped != self.reported;
        let may_wait = self.in_vain.is_none_or(|since| since.elapsed() >= PAUSE);
        if is_dropping || !may_wait {
            return false;
        }
        if takes_a_line(&ROOM_TIMEOUT) {
            return true;
        }
        self.in_vain = Some(Instant::now());
        false
    }

    /// How many lines were dropped since this was asked last, if any.
    fn unreported(&mut self) -> Option<u64> {
        let since = self.dropped - self.reported;
        self.reported = self.dropped;
        (since != 0).then_some(since)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// Standard error that has room never, after a wait, or at once.
    #[derive(Clone, Copy, PartialEq)]
    enum Stderr {
        Full,
        Slow,
        Free,
    }

    #[test]
    fn a_line_waits_for_a_slow_reader_but_not_for_one_that_has_stopped() {
        use Stderr::{Free, Full, Slow};

        let mut room = Room::default();
        for (stderr, is_there, waits, unreported) in [
            (Free, true, false, None),
            (Slow, true, true, None),
            (Full, false, true, None),
            // Until the lost ones are reported, no line waits.
            (Slow, false, false, None),
            (Free, true, false, Some(2)),
            (Free, true, false, None),
            // Nor for a while after that.
            (Slow, false, false, None),
            (Full, false, false, None),
            (Full, false, false, None),
            (Free, true, false, Some(3)),
        ] {
            let waited = Cell::new(false);
            let found = room.is_there(|timeout| {
                let may_wait = *timeout != Timespec::default();
                waited.set(waited.get() || may_wait);
                stderr == Free || (stderr == Slow && may_wait)
            });
            assert_eq!((found, waited.get()), (is_there, waits));
            match found {
                true => assert_eq!(room.unreported(), unreported),
                false => room.dropped += 1,
            }
        }
        room.in_vain = room.in_vain.map(|since| since - PAUSE);
        assert!(
            room.is_there(|timeout| *timeout == ROOM_TIMEOUT),
            "it waits again"
        );
    }
}
