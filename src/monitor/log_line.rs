//! How a log line looks: to a person, in systemd's journal, or to a program that reads JSON.

use std::{
    borrow::Cow,
    env,
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    time::SystemTime,
};

use humantime::format_rfc3339_millis;
use log::{
    Level, Record,
    kv::{self, Key, Value, VisitSource, VisitValue},
};

use crate::{config::LogFormat, text};

/// What is common to all lines.
pub(super) struct LogLine {
    format: LogFormat,
    goes_to_journal: bool,
    is_coloured: bool,
    /// The text of the last line, kept because a new one each time costs more.
    text: String,
}

impl LogLine {
    /// Lines for standard error, as it is now.
    pub(super) fn new(format: LogFormat) -> Self {
        Self {
            format,
            goes_to_journal: goes_to_journal(),
            is_coloured: is_coloured(),
            text: String::new(),
        }
    }

    /// Writes a record as one line.
    pub(super) fn write(&mut self, out: &mut impl Write, record: &Record<'_>) -> io::Result<()> {
        let line = match self.format {
            LogFormat::Text => {
                self.text.clear();
                // It never fails: a string takes anything.
                let _ = write!(self.text, "{}", record.args());
                text::one_line(&self.text, text::LONGEST_LINE)
            }
            LogFormat::Json => Cow::Owned(json(record)),
        };
        match (self.goes_to_journal, self.format) {
            // The journal keeps the time itself and takes the priority from this prefix (sd-daemon(3)).
            (true, _) => writeln!(out, "<{}>{line}", priority(record.level())),
            (false, LogFormat::Json) => writeln!(out, "{line}"),
            (false, LogFormat::Text) => {
                let (level, time) = (record.level(), format_rfc3339_millis(SystemTime::now()));
                let (colour, reset) = match self.is_coloured {
                    true => (colour(level), "\x1b[0m"),
                    false => ("", ""),
                };
                writeln!(out, "[{time} {colour}{level:<5}{reset}] {line}")
            }
        }
    }
}

/// The priority that the journal has for a level (syslog(3)).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// What makes a terminal show a level in its colour (ECMA-48, SGR).
fn colour(level: Level) -> &'static str {
    match level {
        Level::Error => "\x1b[1;31m",
        Level::Warn => "\x1b[33m",
        Level::Info => "\x1b[32m",
        Level::Debug => "\x1b[34m",
        Level::Trace => "\x1b[36m",
    }
}

/// Whether lines go to a terminal that shows colours to somebody who wants them (<https://no-color.org>).
fn is_coloured() -> bool {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
    io::stderr().is_terminal() && !is_set("NO_COLOR") && !is_dumb
}

/// A record as a JSON object: time, level, message, and the fields of the event. Quotes need room of their
/// own, so that its parts may have to be cut shorter than those of a text are.
fn json(record: &Record<'_>) -> String {
    let mut longest = text::LONGEST_LINE;
    loop {
        let line = json_within(record, longest);
        if line.len() <= text::LONGEST_LINE {
            return line;
        }
        longest /= 2;
    }
}

/// A record as a JSON object, each part of which has at most so many bytes before it is quoted.
fn json_within(record: &Record<'_>, longest: usize) -> String {
    let mut object = JsonObject {
        line: String::from("{"),
        longest,
    };
    let now = format_rfc3339_millis(SystemTime::now());
    object.text("time", &now.to_string());
    object.text("level", record.level().as_str());
    object.text("message", &record.args().to_string());
    // It never fails, as no visit does.
    let _ = record.key_values().visit(&mut object);
    object.line + "}"
}

struct JsonObject {
    line: String,
    longest: usize,
}

impl JsonObject {
    fn text(&mut self, name: &str, text: &str) {
        self.field(name, &*text::one_line(text, self.longest));
    }

    fn field(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        if !self.line.ends_with('{') {
            self.line.push(',');
        }
        let (name, value) = (serde_json::Value::from(name), value.into());
        let _ = write!(self.line, "{name}:{value}");
    }
}

impl<'kvs> VisitSource<'kvs> for JsonObject {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        let (object, name) = (self, key.as_str());
        value.visit(Field { object, name })
    }
}

/// A field of an object, whose value is not known yet.
struct Field<'a> {
    object: &'a mut JsonObject,
    name: &'a str,
}

impl VisitValue<'_> for Field<'_> {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), kv::Error> {
        self.object.text(self.name, &value.to_string());
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), kv::Error> {
        self.object.field(self.name, value);
        Ok(())
    }

    fn visit_f64(&mut self, value: f64) -> Result<(), kv::Error> {
        self.object.field(self.name, value);
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), kv::Error> {
        // The event has no such thing.
        Ok(())
    }
}

/// Whether standard error is the stream that systemd names in `JOURNAL_STREAM`; the variable alone
/// is inherited by whatever a service starts (systemd.exec(5)).
#[cfg(target_os = "linux")]
fn goes_to_journal() -> bool {
    use std::os::linux::fs::MetadataExt;

    let stderr = std::fs::metadata("/proc/self/fd/2")
        .map(|file| format!("{}:{}", file.st_dev(), file.st_ino()));
    // Where there is no /proc, nobody can tell.
    matches!((env::var("JOURNAL_STREAM"), stderr), (Ok(named), Ok(stderr)) if named == stderr)
}

#[cfg(not(target_os = "linux"))]
fn goes_to_journal() -> bool {
    false
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_json_is_bounded_and_whole_whatever_is_in_it() {
        for text in ["\"", "\\", "ä", "\n", "x"].map(|text| text.repeat(10_000)) {
            let values = [("subject", &text[..]), ("reason", &text[..])];
            let line = json(
                &Record::builder()
                    .args(format_args!("{text}"))
                    .key_values(&values)
                    .build(),
            );
            assert!(line.len() <= text::LONGEST_LINE, "{}", line.len());
            let object: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert!(object["reason"].as_str().unwrap().len() > 100, "{line}");
        }
    }
}
