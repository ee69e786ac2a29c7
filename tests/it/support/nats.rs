use std::{
    fs,
    process::{Child, Command, Stdio},
};

use async_nats::{Client, ConnectOptions, HeaderMap, Subscriber, jetstream};
use futures::StreamExt;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{PATIENCE, until, until_ok};

/// A nats-server on a free loopback port; killed when dropped.
pub struct NatsServer {
    process: Child,
    port: u16,
    directory: TempDir,
}

impl NatsServer {
    pub async fn start() -> Self {
        Self::with_config("").await
    }

    /// With a configuration file; `$DIR` in it is a directory of the server's own.
    pub async fn with_config(config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        write_config(&directory, config);
        let process = spawn(&directory, -1);
        let ports_file = directory
            .path()
            .join(format!("nats-server_{}.ports", process.id()));
        let port = until_ok("nats-server has written its ports", async || {
            let ports = fs::read_to_string(&ports_file).unwrap_or_default();
            let digits = ports.split_once("127.0.0.1:").map(|(_, rest)| rest);
            let port = digits.and_then(|rest| rest.split('"').next()?.parse().ok());
            port.ok_or(ports)
        })
        .await;
        Self {
            process,
            port,
            directory,
        }
    }

    /// Whether the one on PATH is of this version or a later one.
    pub fn is_at_least(version: (u32, u32)) -> bool {
        let output = Command::new("nats-server").arg("--version").output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        let (_, numbers) = text.trim().split_once(": v").expect("nats-server: v2.9.10");
        let mut numbers = numbers.split('.').map_while(|number| number.parse().ok());
        (numbers.next().unwrap(), numbers.next().unwrap()) >= version
    }

    /// With JetStream, and a stream `CMS` of everything below `cms.cache`.
    pub async fn with_stream() -> Self {
        let server = Self::with_config("jetstream { store_dir: \"$DIR/jetstream\" }").await;
        server.create_stream("CMS", "cms.cache.>", 1).await;
        server
    }

    /// Three with JetStream in one cluster: `n0`, `n1` and `n2`.
    pub async fn cluster() -> Vec<Self> {
        Self::cluster_with("", "").await
    }

    /// The same with more in each configuration, and in its section `cluster`.
    pub async fn cluster_with(more: &str, more_of_cluster: &str) -> Vec<Self> {
        let listeners: Vec<_> = (0..3)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let routes: Vec<_> = listeners
            .iter()
            .map(|listener| format!("nats://{}", listener.local_addr().unwrap()))
            .collect();
        drop(listeners);
        let mut servers = Vec::new();
        for (n, route) in routes.iter().enumerate() {
            let config = format!(
                "server_name: n{n}
                 jetstream {{ store_dir: \"$DIR/jetstream\" }}
                 cluster {{
                    name: c, listen: \"{}\", routes: [{}]
                    {more_of_cluster}
                 }}
                 {more}",
                route.trim_start_matches("nats://"),
                routes.join(", ")
            );
            servers.push(Self::with_config(&config).await);
        }
        servers
    }

    pub async fn jetstream(&self) -> jetstream::Context {
        jetstream::new(self.client().await)
    }

    pub async fn create_stream(&self, name: &str, subject: &str, num_replicas: usize) {
        let config = jetstream::stream::Config {
            name: name.to_owned(),
            subjects: vec![subject.to_owned()],
            num_replicas,
            ..Default::default()
        };
        let jetstream = self.jetstream().await;
        // A cluster needs a moment to elect a leader.
        until_ok("the stream is created", async || {
            jetstream.create_stream(config.clone()).await
        })
        .await;
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    pub async fn client(&self) -> Client {
        self.client_with(ConnectOptions::new()).await
    }

    pub async fn client_with(&self, options: ConnectOptions) -> Client {
        let options = options
            .retry_on_initial_connect()
            .subscription_capacity(1 << 24);
        let client = options.connect(self.url()).await.unwrap();
        tokio::time::timeout(PATIENCE, client.flush())
            .await
            .expect("nats-server is up")
            .unwrap();
        client
    }

    /// Publishes one message, and returns once the server has it.
    pub async fn publish(&self, subject: &'static str, payload: &'static str) {
        let client = self.client().await;
        client.publish(subject, payload.into()).await.unwrap();
        client.flush().await.unwrap();
    }

    /// Publishes a message with these bytes as its headers, as no client would.
    pub async fn publish_raw(&self, subject: &[u8], headers: &[u8], payload: &[u8]) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        let (head, total) = (headers.len(), headers.len() + payload.len());
        let (operation, sizes) = match head {
            0 => ("PUB", total.to_string()),
            _ => ("HPUB", format!("{head} {total}")),
        };
        let bytes = [
            format!("CONNECT {{\"headers\":true}}\r\n{operation} ").as_bytes(),
            subject,
            format!(" {sizes}\r\n").as_bytes(),
            headers,
            payload,
            b"\r\nPING\r\n",
        ]
        .concat();
        stream.write_all(&bytes).await.unwrap();
        let mut answer = String::new();
        while !answer.contains("PONG") {
            let mut buffer = [0; 1024];
            let length = stream.read(&mut buffer).await.unwrap();
            answer.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        assert!(!answer.contains("-ERR"), "{answer}");
    }

    /// As a power cut would.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// It keeps its connections, and says nothing any more, until [`Self::thaw`] or [`Self::kill`].
    pub fn freeze(&self) {
        self.signal("STOP");
    }

    /// It goes on as if nothing had been.
    pub fn thaw(&self) {
        self.signal("CONT");
    }

    /// As its operator would before an update: it sends its clients away one by one, and ends.
    pub async fn retire(&mut self) {
        self.signal("USR2");
        until("nats-server has retired", async || {
            self.process.try_wait().unwrap().is_some()
        })
        .await;
    }

    /// As its operator would: it writes down all that it knows.
    pub fn stop(&mut self) {
        self.signal("TERM");
        self.process.wait().unwrap();
    }

    fn signal(&self, name: &str) {
        let id = self.process.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &id]).status();
        assert!(sent.unwrap().success());
    }

    /// Again on the same port, with the same configuration and files.
    pub fn restart(&mut self) {
        self.process = spawn(&self.directory, self.port.into());
    }

    /// With another configuration at the next start.
    pub fn configure(&self, config: &str) {
        write_config(&self.directory, config);
    }

    /// With another configuration from now on.
    pub fn reload(&self, config: &str) {
        self.configure(config);
        let signal = format!("--signal=reload={}", self.process.id());
        assert!(
            Command::new("nats-server")
                .arg(signal)
                .status()
                .unwrap()
                .success()
        );
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn write_config(directory: &TempDir, config: &str) {
    let config = config.replace("$DIR", directory.path().to_str().unwrap());
    fs::write(directory.path().join("nats.conf"), config).unwrap();
}

fn spawn(directory: &TempDir, port: i32) -> Child {
    let directory = directory.path();
    Command::new("nats-server")
        .args(["-a", "127.0.0.1", "-p", &port.to_string()])
        .arg("-c")
        .arg(directory.join("nats.conf"))
        .arg("-l")
        .arg(directory.join("log"))
        .arg("--ports_file_dir")
        .arg(directory)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("nats-server is on PATH; scripts/test brings it")
}

/// The next message, which has to come.
pub async fn next(subscriber: &mut Subscriber) -> async_nats::Message {
    let message = tokio::time::timeout(PATIENCE, subscriber.next()).await;
    message
        .expect("a message comes in time")
        .expect("the subscription is open")
}

/// Publishes numbered messages, each once the stream has it, through whatever happens to servers.
pub async fn publish_all(jetstream: &jetstream::Context, numbers: std::ops::Range<usize>) {
    for n in numbers {
        until_ok(&format!("the stream has {n}"), async || {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Msg-Id", n.to_string());
            let sent = jetstream.publish_with_headers("cms.cache.x", headers, n.to_string().into());
            sent.await.unwrap().await
        })
        .await;
    }
}
