//! Wiring only: arguments, environment, logger, signals, exit code.

use std::io::{self, Write};

use futures::{Stream, stream::poll_fn};
use log::{error, info, warn};
use nats_webhook_relay::{
    Config, Environment, finish_logging, help as variables, reasons, run, start_logging,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc::unbounded_channel,
};

const VERSION: &str = concat!("nats-webhook-relay ", env!("CARGO_PKG_VERSION"));

/// A file is at its size limit (setrlimit(2)).
const SIGXFSZ: i32 = 25;

/// How the process ends: its exit code.
#[derive(Clone, Copy)]
enum End {
    /// It was stopped, or there was nothing to complain about.
    Good = 0,
    /// It cannot continue.
    Failed = 1,
    /// A bad configuration, EX_CONFIG of sysexits(3): restarting does not help.
    BadConfiguration = 78,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let end = run_as_told().await;
    finish_logging();
    // The runtime would wait for its threads, and one of them may be waiting for a resolver that does not
    // respond.
    std::process::exit(end as i32);
}

/// Does what the arguments say.
async fn run_as_told() -> End {
    let arguments = std::env::args_os().skip(1);
    let arguments = Vec::from_iter(arguments.map(|it| it.to_string_lossy().into_owned()));
    match &arguments.join(" ")[..] {
        // In a separate task: whenever something wakes the main future, the runtime first asks the
        // kernel for events, which would be two more system calls for each message.
        "" => tokio::spawn(relay()).await.unwrap_or(End::Failed),
        "--help" | "-h" => print(&help()),
        "--check" => check(true).await,
        "--check=config" => check(false).await,
        "--version" | "-V" => print(&format!("{VERSION}\n")),
        given => {
            let _ = writeln!(
                io::stderr(),
                "nats-webhook-relay does not understand {given:?}; see nats-webhook-relay --help"
            );
            End::BadConfiguration
        }
    }
}

async fn relay() -> End {
    // Before anything slow: a signal without a handler kills the process, or is lost if the process is the
    // first one of a container.
    let stop = stop_requests();
    let (environment, config) = read();
    start_logging(&environment);
    std::panic::set_hook(Box::new(|panic| error!("a task panicked: {panic}")));
    info!("{VERSION}");
    for file in &environment.files {
        info!("{file}");
    }
    for warning in &environment.warnings {
        warn!("{warning}");
    }
    for problem in config.as_ref().err().into_iter().flatten() {
        error!("bad configuration: {problem}");
    }
    let Ok(config) = config else {
        return End::BadConfiguration;
    };
    for destination in &config.webhook.destinations {
        if let Some(proxy) = destination.proxy() {
            info!("{destination} is reached through the proxy {proxy}");
        }
    }
    let ended = async { run(config, stop?).await };
    match ended.await {
        Ok(()) => {
            info!("stopped");
            End::Good
        }
        Err(reason) => {
            error!("exiting: {}", reasons(&reason));
            End::Failed
        }
    }
}

/// Reports whether the configuration is valid and, if `tries` is set, whether it works.
async fn check(tries: bool) -> End {
    let (environment, config) = read();
    for file in &environment.files {
        print(&format!("ok      environment: {file}\n"));
    }
    for warning in &environment.warnings {
        print(&format!("warning {warning}\n"));
    }
    for problem in config.as_ref().err().into_iter().flatten() {
        print(&format!("FAILED  configuration: {problem}\n"));
    }
    let Ok(config) = config else {
        return End::BadConfiguration;
    };
    let valid = print("ok      configuration: valid\n");
    if !tries {
        return valid;
    }
    match nats_webhook_relay::check(config, &mut io::stdout()).await {
        Ok(true) => End::Good,
        Ok(false) => End::Failed,
        Err(reason) => {
            print(&format!("FAILED  {}\n", reasons(&reason)));
            End::Failed
        }
    }
}

/// Reads the environment and the settings in it, or all problems with either.
fn read() -> (Environment, Result<Config, Vec<String>>) {
    let directory = std::env::current_dir().unwrap_or_default();
    let mut environment = Environment::load(&directory);
    let config = Config::from_environment(&environment);
    // If everything is set without a dotenv file, nobody misses one.
    if config.is_err() && environment.files.is_empty() {
        let directory = directory.display();
        let sentence = format!("found neither .env.local nor .env in {directory}");
        environment.files.push(sentence);
    }
    (environment, config)
}

/// Returns a stream with an item for each SIGTERM, SIGINT or SIGHUP. Separate tasks wait for the signals, because
/// the relay polls for a request to stop before each step, and polling a channel costs far less than polling three
/// signals.
fn stop_requests() -> io::Result<impl Stream<Item = ()> + Unpin> {
    // With a handler, a write to a log file that is at its size limit fails; without one, it kills the process.
    let _ = signal(SignalKind::from_raw(SIGXFSZ));
    let mut kinds = vec![SignalKind::terminate(), SignalKind::interrupt()];
    // Under nohup it has to outlive the terminal.
    if !ignores_hangup() {
        kinds.push(SignalKind::hangup());
    }
    let (sender, mut receiver) = unbounded_channel();
    for kind in kinds {
        let (sender, mut signal) = (sender.clone(), signal(kind)?);
        tokio::spawn(
            async move { while signal.recv().await.is_some() && sender.send(()).is_ok() {} },
        );
    }
    Ok(poll_fn(move |context| receiver.poll_recv(context)))
}

/// Returns whether the process was started with SIGHUP ignored, if the system tells (proc(5), `SigIgn`).
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|it| it.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}

fn help() -> String {
    format!(
        "Relays NATS messages to a webhook, and republishes each one only after its webhook
succeeded: one message at a time, in order.

Usage: nats-webhook-relay [--check | --check=config | --help | --version]

      --check         tests the configuration: connects, but sends and changes nothing
      --check=config  tests the settings alone, offline
  -h, --help          prints this
  -V, --version       prints the version

All settings are environment variables; .env.local, then .env in the working directory fill in
what the environment leaves unset. X_FILE may name a file that holds the value of X.

{}
Exit codes: 0 stopped by a signal; 1 failed; 78 bad configuration.
",
        variables()
    )
}

fn print(text: &str) -> End {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => End::Good,
        Err(_) => End::Failed,
    }
}
