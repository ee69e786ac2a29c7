//! How log lines look: for a person on a terminal, or for systemd's journal. And how they are written:
//! without ever waiting long for whoever reads them.

use std::{
    borrow::Cow,
    io::{self, Write},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use env_logger::{Builder, fmt::Formatter};
use log::{Level, Record};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
};

use crate::text;

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

/// Starts logging to standard error, as `filter` says (see `env_logger`).
pub fn start(filter: &str) {
    open_stderr_anew();
    let write_line = if writes_to_journal() {
        write_for_journal
    } else {
        write_for_person
    };
    let room = Mutex::new(Room::default());
    let mut builder = Builder::new();
    builder.parse_filters(filter);
    builder.format(move |out, record| {
        let mut room = room.lock().unwrap_or_else(PoisonError::into_inner);
        if !room.is_there() {
            DROPPED.fetch_add(1, Relaxed);
            return Ok(());
        }
        if let Some(dropped) = room.unreported() {
            let report = format!("{dropped} log lines could not be written and were dropped");
            write_line(out, Level::Warn, &report)?;
        }
        write_line(out, record.level(), &line(record))
    });
    builder.init();
}

/// The journal keeps the time itself and takes the priority from this prefix (sd-daemon(3)).
fn write_for_journal(out: &mut Formatter, level: Level, line: &str) -> io::Result<()> {
    let priority = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    writeln!(out, "<{priority}>{line}")
}

fn write_for_person(out: &mut Formatter, level: Level, line: &str) -> io::Result<()> {
    let (time, style) = (out.timestamp_millis(), out.default_level_style(level));
    writeln!(out, "[{time} {style}{level:<5}{style:#}] {line}")
}

/// The text of a record, on one line.
fn line(record: &Record<'_>) -> String {
    let line = record.args().to_string();
    match text::one_line(&line, text::LONGEST_LINE) {
        Cow::Borrowed(_) => line,
        Cow::Owned(fit) => fit,
    }
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

/// Whether standard error is the stream that systemd names in `JOURNAL_STREAM`; the variable alone
/// is inherited by whatever a service starts (systemd.exec(5)).
#[cfg(target_os = "linux")]
fn writes_to_journal() -> bool {
    use std::os::linux::fs::MetadataExt;

    let stderr = std::fs::metadata("/proc/self/fd/2")
        .map(|file| format!("{}:{}", file.st_dev(), file.st_ino()));
    std::env::var("JOURNAL_STREAM").ok() == stderr.ok()
}

#[cfg(not(target_os = "linux"))]
fn writes_to_journal() -> bool {
    false
}
