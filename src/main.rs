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
    check,
    config::{self, BadConfiguration, Config},
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
        // A task of its own: whenever something else wakes the main future, the runtime asks the
        // kernel for events first, which would be two more system calls for each message.
        [] => tokio::spawn(relay()).await.unwrap_or(ExitCode::FAILURE),
        [Some("--help" | "-h")] => print(&help()),
        [Some("--check")] => check().await,
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
            if reason.is::<BadConfiguration>() {
                error!("bad configuration: {reason}");
                return EX_CONFIG.into();
            }
            error!("cannot go on: {reason:#}");
            ExitCode::FAILURE
        }
    }
}

/// Says what of the configuration holds.
async fn check() -> ExitCode {
    let (environment, config) = read();
    for misspelling in config::misspellings(&environment) {
        print(&format!("warning {misspelling}\n"));
    }
    let config = match config {
        Ok(config) => config,
        Err(problems) => {
            for problem in problems {
                print(&format!("FAILED  configuration: {problem}\n"));
            }
            return EX_CONFIG.into();
        }
    };
    match check::check(&config).await {
        Ok(report) => {
            print(&report.text);
            if report.good {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(reason) => {
            print(&format!("FAILED  {reason:#}\n"));
            ExitCode::FAILURE
        }
    }
}

/// Reads the settings, and starts logging as they say.
fn configure() -> Result<Config, Vec<String>> {
    let (environment, config) = read();
    logging::start(config.as_ref().map_or("info", |config| &config.log_filter));
    info!("{}", version());
    for misspelling in config::misspellings(&environment) {
        warn!("{misspelling}");
    }
    config
}

/// Reads the environment and the settings in it, or all problems with either.
fn read() -> (Environment, Result<Config, Vec<String>>) {
    match Environment::load(Path::new(".")) {
        Ok(environment) => {
            let config = Config::from_environment(&environment);
            (environment, config)
        }
        Err(problems) => (Environment::default(), Err(problems)),
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

Usage: nats-webhook-relay [--check | --help | --version]

--check says what of the configuration holds: it connects, and sends and changes nothing.

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
