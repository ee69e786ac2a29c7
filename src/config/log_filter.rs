//! `RUST_LOG`. env_logger takes whatever is no level for the name of a module, so that a misspelled
//! level would silence the log altogether.

use log::LevelFilter;

use super::misnamed::nearest;

/// The crate whose lines tell what becomes of each message.
const OWN: &str = "nats_webhook_relay";

/// The crates that a filter may name.
const CRATES: [&str; 9] = [
    OWN,
    "async_nats",
    "hyper",
    "hyper_util",
    "mio",
    "nkeys",
    "reqwest",
    "rustls",
    "tokio",
];

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Takes what env_logger understands as its author meant it.
///
/// # Errors
/// A sentence fragment that says what is wrong and what to write.
pub(super) fn parse(text: &str) -> Result<String, String> {
    if env_filter::Builder::new().try_parse(text).is_err() {
        return Err(format!(
            "{text:?} is no filter; write a level such as info or debug"
        ));
    }
    let directives = text.split('/').next().unwrap_or_default().split(',');
    let directives: Vec<_> = directives
        .map(str::trim)
        .filter(|directive| !directive.is_empty())
        .collect();
    let mut tells_of_messages = directives.is_empty();
    for directive in directives {
        let (name, level) = match directive.split_once('=') {
            Some((name, level)) => (name.trim(), Some(level)),
            None if directive.parse::<LevelFilter>().is_ok() => {
                tells_of_messages = true;
                continue;
            }
            None => (directive, None),
        };
        if !CRATES.iter().any(|known| names(name, known)) {
            return Err(unknown(directive, name, level));
        }
        tells_of_messages |= names(name, OWN);
    }
    if !tells_of_messages {
        return Err(format!(
            "{text:?} would silence the relay's own log; write info,{text}"
        ));
    }
    Ok(text.to_owned())
}

/// env_logger compares the beginning of a name only, so that `nats=debug` names a crate as well.
fn names(module: &str, known: &str) -> bool {
    match module.split_once("::") {
        Some((name, _)) => name == known,
        None => known.starts_with(module),
    }
}

fn unknown(directive: &str, name: &str, level: Option<&str>) -> String {
    let name_of_crate = name.replace('-', "_");
    let meant = match level {
        Some(level) => nearest(&name_of_crate, CRATES).map(|known| format!("{known}={level}")),
        None => nearest(&name.to_lowercase(), LEVELS)
            .or_else(|| nearest(&name_of_crate, CRATES))
            .map(str::to_owned),
    };
    match meant {
        Some(meant) => {
            format!("{directive:?} is neither a level nor a module that logs; is {meant} meant?")
        }
        None => format!(
            "{directive:?} is neither a level nor a module that logs; write one of {}, or a module and \
             a level such as {OWN}=debug",
            LEVELS.join(", ")
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_would_silence_the_log_is_refused_and_says_what_was_meant() {
        for (text, meant) in [
            ("warning", "is warn meant?"),
            ("infoo", "is info meant?"),
            ("INF", "is info meant?"),
            ("err", "is error meant?"),
            (
                "nats-webhook-relay=info",
                "is nats_webhook_relay=info meant?",
            ),
            (
                "nats_webhook_realy=info",
                "is nats_webhook_relay=info meant?",
            ),
            ("nats-webhook-relay", "is nats_webhook_relay meant?"),
            ("info,async-nats=debug", "is async_nats=debug meant?"),
            (
                "verbose",
                "write one of off, error, warn, info, debug, trace",
            ),
            ("1", "write one of off"),
            ("reqwest=debug", "write info,reqwest=debug"),
            ("nats_webhook_relay=loud", "is no filter"),
            ("a=b=c", "is no filter"),
        ] {
            let problem = parse(text).err().unwrap_or_default();
            assert!(problem.contains(meant), "{text}: {problem:?}");
        }
    }

    #[test]
    fn the_nixos_module_knows_the_same_crates() {
        let crates = include_str!("../../nix/log-crates.json");
        assert_eq!(serde_json::from_str::<Vec<String>>(crates).unwrap(), CRATES);
    }

    #[test]
    fn what_env_logger_understands_is_taken() {
        for text in [
            "info",
            "WARN",
            "off",
            " info , reqwest=debug ",
            "warn,nats_webhook_relay=debug",
            "nats_webhook_relay",
            "nats_webhook_relay::relay=trace",
            "nats=debug",
            "info/lost",
        ] {
            assert_eq!(parse(text), Ok(text.to_owned()));
        }
    }
}
