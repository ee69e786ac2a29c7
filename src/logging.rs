//! How log lines look: for a person on a terminal, or for systemd's journal.

use std::{borrow::Cow, io::Write};

use env_logger::Builder;
use log::{Level, Record};

use crate::text;

/// Starts logging to standard error, as `filter` says (see `env_logger`).
pub fn start(filter: &str) {
    let mut builder = Builder::new();
    builder.parse_filters(filter);
    if writes_to_journal() {
        // The journal keeps the time itself and takes the priority from this prefix (sd-daemon(3)).
        builder.format(|out, record| {
            let priority = match record.level() {
                Level::Error => 3,
                Level::Warn => 4,
                Level::Info => 6,
                Level::Debug | Level::Trace => 7,
            };
            writeln!(out, "<{priority}>{}", line(record))
        });
    } else {
        builder.format(|out, record| {
            let (time, level) = (out.timestamp_millis(), record.level());
            let style = out.default_level_style(level);
            writeln!(out, "[{time} {style}{level:<5}{style:#}] {}", line(record))
        });
    }
    builder.init();
}

/// The text of a record, on one line.
fn line(record: &Record<'_>) -> String {
    let line = record.args().to_string();
    match text::one_line(&line, text::LONGEST_LINE) {
        Cow::Borrowed(_) => line,
        Cow::Owned(fit) => fit,
    }
}

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
