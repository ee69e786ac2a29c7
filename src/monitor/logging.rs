//! The log: the format of a line for people, for systemd's journal or as JSON; and how it is written without making the
//! relay wait for a reader.

use std::{
    env,
    fmt::{Display, Write as _},
    io::{self, IsTerminal, Write},
    mem,
    os::unix::fs::MetadataExt,
    thread,
    time::{Duration, SystemTime},
};

use env_logger::{Builder, Target};
use humantime::format_rfc3339_millis;
use log::{
    Level, LevelFilter, Log as _, Metadata, Record,
    kv::{self, Key, Value, VisitSource, VisitValue},
    warn,
};
use parking_lot::{Condvar, Mutex};

use crate::text;

/// The most bytes of lines that wait to be written: some thousand lines, enough for a burst.
const MAX_WAITING: usize = 1 << 20;

/// Writing pauses for this long after each batch, so that in a burst not every line wakes the thread.
const PAUSE: Duration = Duration::from_millis(5);

/// How long to wait at the end for the log to be written.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The log target of the relay's own lines.
const OWN: &str = "nats_webhook_relay";

/// Lines on their way to standard error.
static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    lines: Vec::new(),
    is_writing: false,
    dropped: 0,
});

/// Notified when a line arrives, and when all have been written.
static CHANGED: Condvar = Condvar::new();

struct Queue {
    lines: Vec<u8>,
    is_writing: bool,
    /// How many lines could not be written.
    dropped: u64,
}

/// Returns how many lines of the log could not be written.
#[must_use]
pub fn dropped() -> u64 {
    QUEUE.lock().dropped
}

/// Starts logging to standard error.
pub fn start(filter: &str, is_json: bool) {
    let format = Format {
        is_json,
        goes_to_journal: goes_to_journal(),
        is_coloured: is_coloured(),
    };
    let mut builder = Builder::new();
    builder.parse_filters(filter);
    let is_silent = is_silent(filter);
    if is_silent {
        builder.filter_module(OWN, LevelFilter::Info);
    }
    builder.format(move |out, record| format.write(out, record));
    // In a separate thread, because writing to a full pipe or a stopped terminal blocks.
    thread::spawn(write_lines);
    builder.target(Target::Pipe(Box::new(Enqueue))).init();
    if is_silent {
        warn!(
            "RUST_LOG={filter:?} shows nothing of the relay, so it also logs at info; write off to silence it"
        );
    }
}

/// Returns whether a filter shows nothing of the relay without saying so: it is meant for another program, or
/// has a misspelling, which is taken for the name of a module.
fn is_silent(filter: &str) -> bool {
    let error = Metadata::builder().target(OWN).level(Level::Error).build();
    let shows_errors = Builder::new().parse_filters(filter).build().enabled(&error);
    let says_so = |directive: &str| directive.trim().eq_ignore_ascii_case("off");
    !shows_errors && !filter.contains(OWN) && !filter.split(',').any(says_so)
}

/// Waits until all lines are written, but not for long.
pub fn finish() {
    let is_busy = |queue: &mut Queue| queue.is_writing || !queue.lines.is_empty();
    CHANGED.wait_while_for(&mut QUEUE.lock(), is_busy, END_TIMEOUT);
}

/// Hands lines to the thread that writes them, or drops them.
struct Enqueue;

impl Write for Enqueue {
    /// Takes one line, as env_logger passes it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut queue = QUEUE.lock();
        if queue.lines.len() + line.len() > MAX_WAITING {
            queue.dropped += 1;
        } else {
            queue.lines.extend_from_slice(line);
        }
        drop(queue);
        CHANGED.notify_all();
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the lines of the queue, forever.
fn write_lines() {
    let (mut reported, mut is_writable) = (0, true);
    loop {
        let (lines, dropped) = {
            let mut queue = QUEUE.lock();
            queue.is_writing = false;
            CHANGED.notify_all();
            CHANGED.wait_while(&mut queue, |queue| queue.lines.is_empty());
            queue.is_writing = true;
            (mem::take(&mut queue.lines), queue.dropped)
        };
        if is_writable && dropped > reported {
            let unreported = dropped - reported;
            warn!("{unreported} log lines could not be written and were dropped");
            reported = dropped;
        }
        is_writable = io::stderr().write_all(&lines).is_ok();
        if !is_writable {
            let lost = lines.iter().filter(|byte| **byte == b'\n').count();
            QUEUE.lock().dropped += lost as u64;
        }
        thread::sleep(PAUSE);
    }
}

/// How lines look.
struct Format {
    is_json: bool,
    goes_to_journal: bool,
    is_coloured: bool,
}

impl Format {
    /// Writes a record as one line.
    fn write(&self, out: &mut impl Write, record: &Record<'_>) -> io::Result<()> {
        let (level, time) = (record.level(), format_rfc3339_millis(SystemTime::now()));
        // The journal's priorities (sd-daemon(3), syslog(3)), and a terminal's colours (ECMA-48, SGR).
        let (priority, colour) = match level {
            Level::Error => (3, "1;31"),
            Level::Warn => (4, "33"),
            Level::Info => (6, "32"),
            Level::Debug | Level::Trace => (7, "34"),
        };
        if self.goes_to_journal {
            write!(out, "<{priority}>")?;
        }
        if self.is_json {
            return writeln!(out, "{}", json(record, &time));
        }
        match (self.goes_to_journal, self.is_coloured) {
            // It keeps the time itself.
            (true, _) => {}
            (false, true) => write!(out, "[{time} \x1b[{colour}m{level:<5}\x1b[0m] ")?,
            (false, false) => write!(out, "[{time} {level:<5}] ")?,
        }
        let text = record.args().to_string();
        writeln!(out, "{}", text::one_line(&text, text::LONGEST_LINE))
    }
}

/// Returns whether lines go to a terminal that shows colours to somebody who wants them (<https://no-color.org>).
fn is_coloured() -> bool {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
    io::stderr().is_terminal() && !is_set("NO_COLOR") && !is_dumb
}

/// Returns whether standard error is the stream that systemd names in `JOURNAL_STREAM`; the variable alone is
/// inherited by whatever a service starts (systemd.exec(5)).
fn goes_to_journal() -> bool {
    let stderr = std::fs::metadata("/proc/self/fd/2");
    let stderr = stderr.map(|file| format!("{}:{}", file.dev(), file.ino()));
    matches!((env::var("JOURNAL_STREAM"), stderr), (Ok(named), Ok(stderr)) if named == stderr)
}

/// Returns a record as a JSON object: time, level, message, and the fields of the event.
fn json(record: &Record<'_>, time: &impl Display) -> String {
    let start = format!(r#"{{"time":"{time}","level":"{}""#, record.level());
    let mut object = Object(start);
    object.add_text("message", &record.args().to_string());
    // It never fails, as no visit does.
    let _ = record.key_values().visit(&mut object);
    object.0 + "}"
}

/// A JSON object to whose end fields are added.
struct Object(String);

impl Object {
    fn add(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        let (name, value) = (serde_json::Value::from(name), value.into());
        let _ = write!(self.0, ",{name}:{value}");
    }

    fn add_text(&mut self, name: &str, text: &str) {
        self.add(name, &*text::one_line(text, text::LONGEST_NOTE));
    }
}

impl<'a> VisitSource<'a> for Object {
    fn visit_pair(&mut self, name: Key<'a>, value: Value<'a>) -> Result<(), kv::Error> {
        value.visit(Field(self, name.as_str()))
    }
}

/// A field of an object, whose value is not known yet. One that is null is left out.
struct Field<'a>(&'a mut Object, &'a str);

impl VisitValue<'_> for Field<'_> {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), kv::Error> {
        self.0.add_text(self.1, &value.to_string());
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), kv::Error> {
        self.0.add(self.1, value);
        Ok(())
    }

    fn visit_f64(&mut self, value: f64) -> Result<(), kv::Error> {
        self.0.add(self.1, value);
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), kv::Error> {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_json_is_bounded_and_whole_whatever_is_in_it() {
        for text in ["\"", "\\", "ä", "\n", "x"].map(|text| text.repeat(10_000)) {
            let values = [("subject", &text[..]), ("reason", &text[..])];
            let mut line = Vec::new();
            let format = Format {
                is_json: true,
                goes_to_journal: false,
                is_coloured: false,
            };
            let args = format_args!("{text}");
            let record = Record::builder().args(args).key_values(&values).build();
            format.write(&mut line, &record).unwrap();
            let line = String::from_utf8(line).unwrap();
            assert!(line.len() < 8 * text::LONGEST_NOTE, "{}", line.len());
            let object: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert!(object["reason"].as_str().unwrap().len() > 100, "{line}");
        }
    }
}
