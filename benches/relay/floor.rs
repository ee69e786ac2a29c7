//! The floor: what a relay costs at the least. The same job on one thread, with blocking sockets and
//! no library. It takes the same variables, expects everything to go well, and ends if it doesn't.

use std::{
    env,
    io::{BufRead, BufReader, Read, Write, stderr},
    net::TcpStream,
    time::Instant,
};

use anyhow::{Context, ensure};

use crate::nats::{Connection, Message};

const INBOX: &str = "_INBOX.floor";

pub fn run() -> anyhow::Result<()> {
    let prefix = env::var("NATS_SUBJECT_PREFIX")?;
    let mut floor = Floor {
        nats: Connection::open(&env::var("NATS_HOST")?)?,
        webhook: Webhook::connect(&env::var("WEBHOOK_DESTINATION")?)?,
        relayed_prefix: env::var("NATS_RELAYED_SUBJECT_PREFIX")?,
        prefix,
        line: String::new(),
    };
    match (env::var("NATS_STREAM"), env::var("NATS_CONSUMER")) {
        (Ok(stream), Ok(consumer)) => floor.relay_durably(&stream, &consumer),
        _ => floor.relay(),
    }
}

struct Floor {
    nats: Connection,
    webhook: Webhook,
    prefix: String,
    relayed_prefix: String,
    line: String,
}

impl Floor {
    fn relay(&mut self) -> anyhow::Result<()> {
        self.nats.subscribe(&format!("{}.>", self.prefix))?;
        loop {
            let message = self.nats.next()?;
            let start = Instant::now();
            self.webhook.post(&message)?;
            let target = self.publish(&message)?;
            self.nats.flush()?;
            self.log(&message, &target, start)?;
        }
    }

    fn relay_durably(&mut self, stream: &str, consumer: &str) -> anyhow::Result<()> {
        let next = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}");
        let confirmed = format!("{INBOX}.ack");
        self.nats.subscribe(&format!("{INBOX}.*"))?;
        let mut early = None;
        let mut pulling = false;
        loop {
            if !pulling {
                self.pull(&next)?;
                self.nats.flush()?;
            }
            let message = match early.take() {
                Some(message) => message,
                None => self.nats.next()?,
            };
            pulling = false;
            if message.is_status() {
                continue;
            }
            let start = Instant::now();
            self.webhook.post(&message)?;
            let ack = message.reply.as_deref().context("no ack subject")?;
            self.pull(&next)?;
            pulling = true;
            let target = self.publish(&message)?;
            self.nats.publish(ack, &confirmed, b"", b"+ACK")?;
            self.nats.flush()?;
            // The next message may come before the confirmation.
            loop {
                let answer = self.nats.next()?;
                if answer.subject == confirmed {
                    break;
                }
                early = Some(answer);
            }
            self.log(&message, &target, start)?;
        }
    }

    fn pull(&mut self, subject: &str) -> anyhow::Result<()> {
        let reply = format!("{INBOX}.pull");
        let request = br#"{"batch":1,"expires":30000000000}"#;
        Ok(self.nats.publish(subject, &reply, b"", request)?)
    }

    fn publish(&mut self, message: &Message) -> anyhow::Result<String> {
        let rest = message.subject.strip_prefix(&self.prefix);
        let target = format!("{}{}", self.relayed_prefix, rest.context("other prefix")?);
        self.nats
            .publish(&target, "", &message.headers, &message.payload)?;
        Ok(target)
    }

    fn log(&mut self, message: &Message, target: &str, start: Instant) -> anyhow::Result<()> {
        use std::fmt::Write as _;

        self.line.clear();
        let (subject, elapsed) = (&message.subject, start.elapsed());
        writeln!(self.line, "{subject} -> {target} (200, {elapsed:.1?})")?;
        Ok(stderr().write_all(self.line.as_bytes())?)
    }
}

struct Webhook {
    host: String,
    path: String,
    stream: BufReader<TcpStream>,
    buffer: Vec<u8>,
}

impl Webhook {
    fn connect(url: &str) -> anyhow::Result<Self> {
        let rest = url.strip_prefix("http://").context("only http://")?;
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let stream = TcpStream::connect(host)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            host: host.to_owned(),
            path: path.to_owned(),
            stream: BufReader::new(stream),
            buffer: Vec::new(),
        })
    }

    fn post(&mut self, message: &Message) -> anyhow::Result<()> {
        let Self {
            host, path, buffer, ..
        } = self;
        let (subject, length) = (&message.subject, message.payload.len());
        buffer.clear();
        write!(
            buffer,
            "POST /{path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: floor\r\n\
             content-type: application/json\r\nx-nats-subject: {subject}\r\n\
             content-length: {length}\r\n\r\n"
        )?;
        buffer.extend_from_slice(&message.payload);
        self.stream.get_ref().write_all(buffer)?;
        let head = read_head(&mut self.stream, buffer)?.context("no answer")?;
        ensure!(
            head.line.starts_with("HTTP/1.1 2"),
            "answered {}",
            head.line
        );
        buffer.resize(head.content_length, 0);
        Ok(self.stream.read_exact(buffer)?)
    }
}

/// What matters of the head of an HTTP request or answer.
pub struct Head {
    pub line: String,
    pub content_length: usize,
}

/// Reads the next head; none at the end of the connection.
pub fn read_head(reader: &mut impl BufRead, buffer: &mut Vec<u8>) -> anyhow::Result<Option<Head>> {
    let mut head: Option<Head> = None;
    loop {
        buffer.clear();
        if reader.read_until(b'\n', buffer)? == 0 {
            return Ok(None);
        }
        let line = buffer.trim_ascii_end();
        match &mut head {
            Some(_) if line.is_empty() => return Ok(head),
            Some(head) => {
                let (name, value) = line.split_at(line.len().min("content-length:".len()));
                if name.eq_ignore_ascii_case(b"content-length:") {
                    head.content_length = std::str::from_utf8(value)?.trim().parse()?;
                }
            }
            None => {
                head = Some(Head {
                    line: String::from_utf8_lossy(line).into_owned(),
                    content_length: 0,
                });
            }
        }
    }
}
