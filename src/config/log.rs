//! What is logged, and how.

use super::{
    Environment, log_filter,
    reader::{Noted, Reader},
    variables::{LOG, LOG_FORMAT},
};

/// What is logged, and how.
#[derive(Clone, Debug)]
pub struct Log {
    /// What, in the form that env_logger knows.
    pub filter: String,
    /// How.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Log {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, Noted> {
        let filter = reader.value(LOG, log_filter::parse);
        let format = reader.value(LOG_FORMAT, parse_format);
        Ok(Self {
            filter: filter?,
            format: format?,
        })
    }

    /// How the problems of a bad configuration are logged: as it says, if it says that much.
    #[must_use]
    pub fn of_problems(environment: &Environment) -> Self {
        let format = Reader::new(environment).value(LOG_FORMAT, parse_format);
        Self {
            filter: "info".to_owned(),
            format: format.unwrap_or(LogFormat::Text),
        }
    }
}

fn parse_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err(format!("is {text:?}; write text or json")),
    }
}
