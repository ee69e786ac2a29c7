//! Wiring only: arguments, environment, logger, signals, exit code.

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
    task::Poll,
};

use futures::{Stream, stream::poll_fn};
use log::{error, info, warn};
use nats_webhook_relay::{
    config::{self, Config},
    environment::Environment,
    logging, run,
};
use tokio::signal::unix::{SignalKind, signal};

/// The exit code for a bad configuration, EX_CONFIG of sysexits(3): restarting does not help.
const EX_CONFIG: u8 = 78;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments
        .iter()
        .map(|argument| argument.to_str())
        .collect::<Vec<_>>()[..]
    {
        [] => relay().await,
        [Some("--help" | "-h")] => print(&help()),
        [Some("--version" | "-V")] => print(&format!("{}\n", version())),
        _ => {
            let _ = write!(io::stderr(), "Not understood: {arguments:?}\n\n{}", help());
            EX_CONFIG.into()
        }
    }
}

async fn relay() -> ExitCode {
    let config = match configure() {
        Ok(config) => config,
        Err(problems) => {
            for problem in problems {
                error!("bad configuration: {problem}");
            }
            return EX_CONFIG.into();
        }
    };
    let outcome = match stop_requests() {
        Ok(stop) => run(config, stop).await,
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(()) => {
            info!("stopped");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            error!("cannot go on: {reason:#}");
            ExitCode::FAILURE
        }
    }
}

/// Reads the settings, and starts logging as they say.
fn configure() -> Result<Config, Vec<String>> {
    let loaded = Environment::load(Path::new("."));
    let filter = match &loaded {
        Ok(environment) => config::log_filter(environment),
        Err(_) => Ok("info".to_owned()),
    };
    logging::start(filter.as_deref().unwrap_or("info"));
    info!("{}", version());
    let environment = loaded?;
    for (name, known) in config::misspellings(&environment) {
        warn!("{name} is set but not known; is {known} meant?");
    }
    match (filter, Config::from_environment(&environment)) {
        (Ok(_), config) => config,
        (Err(problem), config) => Err(config
            .err()
            .unwrap_or_default()
            .into_iter()
            .chain([problem])
            .collect()),
    }
}

/// An item for each SIGTERM or SIGINT.
fn stop_requests() -> io::Result<impl Stream<Item = ()> + Unpin> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(poll_fn(move |context| {
        match (terminate.poll_recv(context), interrupt.poll_recv(context)) {
            (Poll::Pending, Poll::Pending) => Poll::Pending,
            _ => Poll::Ready(Some(())),
        }
    }))
}

fn version() -> &'static str {
    concat!("nats-webhook-relay ", env!("CARGO_PKG_VERSION"))
}

fn help() -> String {
    format!(
        "Relays NATS messages to a webhook, and republishes each one only after its webhook
succeeded: one message at a time, in order.

Usage: nats-webhook-relay [--help | --version]

All settings are environment variables; .env.local, then .env in the working directory fill
what the environment leaves unset. X_FILE may name a file that holds the value of X.

{}
Exit codes: 0 stopped by its operator; 1 cannot go on; 78 bad configuration.
",
        config::help()
    )
}

fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
