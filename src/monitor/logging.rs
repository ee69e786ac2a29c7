//! The log: the format of a line for people, for systemd's journal or as JSON; and how it is written without making the
//! relay wait for a reader.

use std::{
    env,
    fmt::{Display, Write as _},
    io::{self, ErrorKind, IsTerminal, Write},
    mem,
    os::unix::fs::MetadataExt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant, SystemTime},
};

use env_logger::{Builder, Target};
use humantime::format_rfc3339_millis;
use log::{
    Level, LevelFilter, Log as _, Metadata, Record,
    kv::{self, Key, Value, VisitSource, VisitValue},
    warn,
};
use parking_lot::Mutex;

use crate::text;

/// The most bytes of lines that wait to be written: some thousand lines, enough for a burst.
const MAX_WAITING: usize = 1 << 20;

/// Writing pauses for this long after each batch, so that in a burst not every line wakes the thread.
const PAUSE: Duration = Duration::from_millis(5);

/// How long to wait at the end for the log to be written.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The largest write to a pipe that is atomic (pipe(7)).
const PIPE_BUF: usize = 4096;

/// The log target of the relay's own lines.
const OWN: &str = "nats_webhook_relay";

/// Lines on their way to standard error.
static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    lines: Vec::new(),
    is_writing: false,
});

/// How many lines could not be written.
static DROPPED: AtomicU64 = AtomicU64::new(0);

struct Queue {
    lines: Vec<u8>,
    is_writing: bool,
}

/// Returns how many lines of the log could not be written.
#[must_use]
pub fn dropped() -> u64 {
    DROPPED.load(Relaxed)
}

/// Starts logging to standard error.
pub fn start(filter: &str, is_json: bool) {
    let format = Format::new(is_json);
    let mut builder = Builder::new();
    builder.parse_filters(filter);
    let is_silent = is_silent(filter);
    if is_silent {
        builder.filter_module(OWN, LevelFilter::Info);
    }
    builder.format(move |out, record| format.write(out, record));
    // In a separate thread, because writing to a full pipe or a stopped terminal blocks.
    let writer = thread::Builder::new().name("log".to_owned());
    if let Ok(writer) = writer.spawn(move || write_lines(format)) {
        let waker = writer.thread().clone();
        builder.target(Target::Pipe(Box::new(Enqueue(waker))));
    }
    builder.init();
    if is_silent {
        warn!(
            "RUST_LOG={filter:?} shows nothing of the relay, which logs at info besides; write off to silence it"
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
    let start = Instant::now();
    let is_done = || {
        let queue = QUEUE.lock();
        queue.lines.is_empty() && !queue.is_writing
    };
    while !is_done() && start.elapsed() < END_TIMEOUT {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Hands lines to the thread that writes them, or drops them.
struct Enqueue(thread::Thread);

impl Write for Enqueue {
    /// Takes one line, as env_logger passes it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let lines = &mut QUEUE.lock().lines;
        if lines.len() + line.len() > MAX_WAITING {
            DROPPED.fetch_add(1, Relaxed);
        } else {
            lines.extend_from_slice(line);
        }
        self.0.unpark();
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the lines of the queue, forever.
fn write_lines(format: Format) {
    let (mut reported, mut has_room) = (0, true);
    loop {
        let mut lines = {
            let mut queue = QUEUE.lock();
            queue.is_writing = !queue.lines.is_empty();
            mem::take(&mut queue.lines)
        };
        if lines.is_empty() {
            thread::park();
            continue;
        }
        let unreported = dropped() - reported;
        if unreported > 0 && has_room {
            let report =
                format_args!("{unreported} log lines could not be written and were dropped");
            let report = Record::builder().level(Level::Warn).args(report).build();
            // Writing to a vector never fails.
            let _ = format.write(&mut lines, &report);
            reported += unreported;
        }
        let mut rest = &lines[..];
        while !rest.is_empty() {
            let (batch, others) = rest.split_at(batch_length(rest));
            has_room = write_whole(batch).is_ok();
            if !has_room {
                let lost = batch.iter().filter(|byte| **byte == b'\n').count();
                DROPPED.fetch_add(lost as u64, Relaxed);
            }
            rest = others;
        }
        thread::sleep(PAUSE);
    }
}

/// Returns the length of the lines that fit into one write, or of one that is longer.
fn batch_length(lines: &[u8]) -> usize {
    let is_end = |byte: &u8| *byte == b'\n';
    let most = &lines[..lines.len().min(PIPE_BUF)];
    let last = most.iter().rposition(is_end);
    last.or_else(|| lines.iter().position(is_end))
        .map_or(lines.len(), |end| end + 1)
}

fn write_whole(mut text: &[u8]) -> io::Result<()> {
    while !text.is_empty() {
        match io::stderr().write(text) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(length) => text = &text[length..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Another process may have made what we share with it non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// How lines look.
#[derive(Clone, Copy)]
struct Format {
    is_json: bool,
    goes_to_journal: bool,
    is_coloured: bool,
}

impl Format {
    fn new(is_json: bool) -> Self {
        Self {
            is_json,
            goes_to_journal: goes_to_journal(),
            is_coloured: is_coloured(),
        }
    }

    /// Writes a record as one line.
    fn write(self, out: &mut impl Write, record: &Record<'_>) -> io::Result<()> {
        let (level, time) = (record.level(), format_rfc3339_millis(SystemTime::now()));
        // The journal's priorities (sd-daemon(3), syslog(3)), and a terminal's colours (ECMA-48, SGR).
        let (priority, colour) = match level {
            Level::Error => (3, "1;31"),
            Level::Warn => (4, "33"),
            Level::Info => (6, "32"),
            Level::Debug => (7, "34"),
            Level::Trace => (7, "36"),
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

/// Returns a record as a JSON object: time, level, message, and the fields of the event. Quotes need room of
/// their own, so that its parts may have to be cut shorter than those of a text.
fn json(record: &Record<'_>, time: &impl Display) -> String {
    let mut longest = text::LONGEST_LINE;
    loop {
        let mut object = Object {
            line: format!(r#"{{"time":"{time}","level":"{}""#, record.level()),
            longest,
        };
        object.add_text("message", &record.args().to_string());
        // It never fails, as no visit does.
        let _ = record.key_values().visit(&mut object);
        if object.line.len() < text::LONGEST_LINE {
            return object.line + "}";
        }
        longest /= 2;
    }
}

/// A JSON object to whose end fields are added, of texts with at most so many bytes before they are quoted.
struct Object {
    line: String,
    longest: usize,
}

impl Object {
    fn add(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        let (name, value) = (serde_json::Value::from(name), value.into());
        let _ = write!(self.line, ",{name}:{value}");
    }

    fn add_text(&mut self, name: &str, text: &str) {
        self.add(name, &*text::one_line(text, self.longest));
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
            assert!(line.len() <= text::LONGEST_LINE + 1, "{}", line.len());
            let object: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert!(object["reason"].as_str().unwrap().len() > 100, "{line}");
        }
    }

    #[test]
    fn a_batch_is_of_whole_lines() {
        let long = [vec![b'x'; PIPE_BUF], vec![b'\n']].concat();
        let short = "line\n".repeat(PIPE_BUF / 5);
        for (lines, length) in [
            (&b"a\nb\n"[..], 4),
            (b"a\nb", 2),
            (b"a", 1),
            (&[&long[..], b"b\n"].concat(), PIPE_BUF + 1),
            ((short.clone() + "line\n").as_bytes(), short.len()),
        ] {
            assert_eq!(batch_length(lines), length);
        }
    }
}
