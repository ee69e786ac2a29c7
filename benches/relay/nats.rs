//! As much of the NATS client protocol as the floor and the load need, on a blocking socket:
//! <https://docs.nats.io/reference/reference-protocols/nats-protocol>.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, bail};

const BUFFER_BYTES: usize = 256 * 1024;

/// A connection to a NATS server.
pub struct Connection {
    reader: BufReader<TcpStream>,
    line: Vec<u8>,
    /// What is published, until it is flushed.
    outgoing: Vec<u8>,
}

/// A message as it comes.
pub struct Message {
    pub subject: String,
    pub reply: Option<String>,
    /// The whole block, beginning with `NATS/1.0`; empty if there is none.
    pub headers: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Message {
    /// Whether it is a word of the server, such as "503, no responders".
    pub fn is_status(&self) -> bool {
        self.headers.starts_with(b"NATS/1.0 ")
    }
}

/// What a server sends.
enum Operation {
    Message(Message),
    Pong,
}

impl Connection {
    pub fn open(url: &str) -> anyhow::Result<Self> {
        let address = url.strip_prefix("nats://").unwrap_or(url);
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        let mut connection = Self {
            reader: BufReader::with_capacity(BUFFER_BYTES, stream),
            line: Vec::new(),
            outgoing: Vec::new(),
        };
        connection.outgoing.extend_from_slice(
            b"CONNECT {\"verbose\":false,\"pedantic\":false,\"headers\":true,\"no_responders\":true}\r\n",
        );
        connection.round_trip()?;
        Ok(connection)
    }

    /// Waiting longer than this for the server is an error.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.reader.get_ref().set_read_timeout(Some(patience))
    }

    pub fn subscribe(&mut self, subject: &str) -> anyhow::Result<()> {
        write!(self.outgoing, "SUB {subject} 1\r\n")?;
        self.round_trip()?;
        Ok(())
    }

    /// Publishes, once it is flushed.
    pub fn publish(
        &mut self,
        subject: &str,
        reply: &str,
        headers: &[u8],
        payload: &[u8],
    ) -> io::Result<()> {
        let (length, total) = (headers.len(), headers.len() + payload.len());
        if headers.is_empty() {
            write!(self.outgoing, "PUB {subject} {reply} {total}\r\n")?;
        } else {
            write!(self.outgoing, "HPUB {subject} {reply} {length} {total}\r\n")?;
        }
        self.outgoing.extend_from_slice(headers);
        self.outgoing.extend_from_slice(payload);
        self.outgoing.extend_from_slice(b"\r\n");
        if self.outgoing.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.reader.get_ref().write_all(&self.outgoing)?;
        self.outgoing.clear();
        Ok(())
    }

    /// The next message, which is waited for.
    pub fn next(&mut self) -> anyhow::Result<Message> {
        loop {
            if let Operation::Message(message) = self.operation()? {
                return Ok(message);
            }
        }
    }

    /// Returns once the server has processed all of the above, with the messages that came meanwhile.
    pub fn round_trip(&mut self) -> anyhow::Result<Vec<Message>> {
        self.outgoing.extend_from_slice(b"PING\r\n");
        self.flush()?;
        let mut messages = Vec::new();
        while let Operation::Message(message) = self.operation()? {
            messages.push(message);
        }
        Ok(messages)
    }

    fn operation(&mut self) -> anyhow::Result<Operation> {
        loop {
            self.line.clear();
            if self.reader.read_until(b'\n', &mut self.line)? == 0 {
                bail!("NATS closed the connection");
            }
            let line = std::str::from_utf8(&self.line)?.trim_end();
            let (operation, arguments) = line.split_once(' ').unwrap_or((line, ""));
            match operation {
                "MSG" | "HMSG" => {
                    let with_headers = operation == "HMSG";
                    let message = read_message(&mut self.reader, arguments, with_headers)?;
                    return Ok(Operation::Message(message));
                }
                "PONG" => return Ok(Operation::Pong),
                "PING" => self.reader.get_ref().write_all(b"PONG\r\n")?,
                "INFO" | "+OK" => {}
                _ => bail!("NATS says {line}"),
            }
        }
    }
}

/// `<subject> <sid> [reply] [header length] <total length>`, then headers and payload.
fn read_message(
    reader: &mut impl Read,
    arguments: &str,
    with_headers: bool,
) -> anyhow::Result<Message> {
    let mut arguments: Vec<_> = arguments.split(' ').collect();
    let mut number = || -> anyhow::Result<usize> {
        let last = arguments.pop().context("a message without a length")?;
        Ok(last.parse()?)
    };
    let total = number()?;
    let length = if with_headers { number()? } else { 0 };
    let mut headers = vec![0; length];
    reader.read_exact(&mut headers)?;
    let mut payload = vec![0; total - length];
    reader.read_exact(&mut payload)?;
    reader.read_exact(&mut [0; 2])?;
    Ok(Message {
        subject: arguments[0].to_owned(),
        reply: arguments.get(2).map(|reply| (*reply).to_owned()),
        headers,
        payload,
    })
}
