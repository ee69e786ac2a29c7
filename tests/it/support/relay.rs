use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command as StdCommand, Stdio},
    sync::{Arc, Mutex},
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child, Command},
};

use super::{NatsServer, PATIENCE, Webhook, until, until_ok};

/// The relay as its users run it: a process with an environment; killed when dropped.
pub struct Relay {
    process: Child,
    log: Arc<Mutex<Vec<String>>>,
    directory: TempDir,
}

impl Relay {
    /// With nothing in its environment but `variables`, in an empty directory.
    pub fn start<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), variables)
    }

    pub fn start_in<'a>(
        directory: TempDir,
        variables: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Self {
        Self::spawn(Command::new(Self::program()), directory, variables)
    }

    fn spawn<'a>(
        mut command: Command,
        directory: TempDir,
        variables: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Self {
        let mut process = command
            .env_clear()
            .envs(profile())
            .envs(variables)
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let log = Arc::default();
        collect(process.stdout.take().unwrap(), &log);
        collect(process.stderr.take().unwrap(), &log);
        Self {
            process,
            log,
            directory,
        }
    }

    /// The program under test. Where cargo does not tell (in an example), it is where cargo puts it.
    pub fn program() -> PathBuf {
        match option_env!("CARGO_BIN_EXE_nats-webhook-relay") {
            Some(path) => path.into(),
            None => std::env::current_exe()
                .unwrap()
                .with_file_name("../nats-webhook-relay"),
        }
    }

    /// Between a server and a webhook, with changes; an empty value removes a variable.
    pub fn between(nats: &NatsServer, webhook: &str, changes: &[(&str, &str)]) -> Self {
        let url = nats.url();
        Self::start(
            usual(&url, webhook)
                .into_iter()
                .chain(changes.iter().copied()),
        )
    }

    /// Between a server and a webhook, started by another command, once it is subscribed.
    pub async fn under(command: &[&str], nats: &NatsServer, webhook: &Webhook) -> Self {
        let (url, webhook) = (nats.url(), webhook.url());
        let (program, arguments) = command.split_first().expect("a command");
        let mut command = Command::new(program);
        command.args(arguments).arg(Self::program());
        let relay = Self::spawn(command, tempfile::tempdir().unwrap(), usual(&url, &webhook));
        relay.logged("listening on").await;
        relay
    }

    /// The same, once it is subscribed.
    pub async fn listening(nats: &NatsServer, webhook: &Webhook, changes: &[(&str, &str)]) -> Self {
        let relay = Self::between(nats, &webhook.url(), changes);
        relay.logged("listening on").await;
        relay
    }

    /// In durable mode on the stream `CMS`, once it is subscribed.
    pub async fn durable(nats: &NatsServer, webhook: &Webhook, changes: &[(&str, &str)]) -> Self {
        let durable = [("NATS_STREAM", "CMS"), ("NATS_CONSUMER", "relay")];
        Self::listening(nats, webhook, &[&durable, changes].concat()).await
    }

    /// What `--check` says between a server and a webhook: its exit code and its lines.
    pub async fn check(
        nats: &NatsServer,
        webhook: &Webhook,
        changes: &[(&str, &str)],
    ) -> (Option<i32>, Vec<String>) {
        let (url, webhook) = (nats.url(), webhook.url());
        check(&[&usual(&url, &webhook), changes].concat()).await
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn id(&self) -> u32 {
        self.process.id().expect("the relay runs")
    }

    /// The log so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// The lines of the log so far that contain `text`.
    pub fn lines(&self, text: &str) -> Vec<String> {
        self.log()
            .into_iter()
            .filter(|line| line.contains(text))
            .collect()
    }

    /// The first line that contains `text`, once there is one.
    pub async fn logged(&self, text: &str) -> String {
        self.logged_times(text, 1).await.remove(0)
    }

    /// The lines that contain `text`, once there are at least `count`.
    pub async fn logged_times(&self, text: &str, count: usize) -> Vec<String> {
        until_ok(&format!("{text:?} is logged {count} times"), async || {
            let lines = self.lines(text);
            if lines.len() >= count {
                Ok(lines)
            } else {
                Err(self.log())
            }
        })
        .await
    }

    /// Sends a signal, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let id = self.id().to_string();
        let sent = StdCommand::new("kill")
            .args(["-s", name, &id])
            .status()
            .unwrap();
        assert!(sent.success(), "kill -s {name} {id}");
    }

    /// As a power cut would.
    pub async fn kill(&mut self) {
        self.process.kill().await.unwrap();
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    /// The exit code and the whole log, once it has ended; none if it was killed.
    pub async fn ended(mut self) -> (Option<i32>, Vec<String>) {
        let ended = tokio::time::timeout(PATIENCE, self.process.wait()).await;
        let status = ended
            .unwrap_or_else(|_| panic!("it did not end: {:#?}", self.log()))
            .unwrap();
        // The collectors hold the log as long as there is something to read.
        until("all of its log was read", async || {
            Arc::strong_count(&self.log) == 1
        })
        .await;
        (status.code(), self.log())
    }
}

/// The settings between a server and a webhook.
pub fn usual<'a>(nats: &'a str, webhook: &'a str) -> [(&'a str, &'a str); 4] {
    [
        ("WEBHOOK_DESTINATION", webhook),
        ("NATS_HOST", nats),
        ("NATS_SUBJECT_PREFIX", "cms.cache"),
        ("NATS_RELAYED_SUBJECT_PREFIX", "relayed.cache"),
    ]
}

/// Where `cargo llvm-cov`, if it runs the tests, wants to find what was executed.
fn profile() -> Option<(&'static str, OsString)> {
    const FILE: &str = "LLVM_PROFILE_FILE";

    std::env::var_os(FILE).map(|file| (FILE, file))
}

/// What `--check` prints, line by line, and its exit code.
pub async fn check(variables: &[(&str, &str)]) -> (Option<i32>, Vec<String>) {
    let output = Command::new(Relay::program())
        .arg("--check")
        .env_clear()
        .envs(profile())
        .envs(variables.iter().copied())
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    (
        output.status.code(),
        text.lines().map(str::to_owned).collect(),
    )
}

fn collect(from: impl AsyncRead + Send + Unpin + 'static, log: &Arc<Mutex<Vec<String>>>) {
    let log = Arc::clone(log);
    tokio::spawn(async move {
        let mut lines = BufReader::new(from).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            log.lock().unwrap().push(line);
        }
    });
}
