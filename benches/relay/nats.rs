//! As much of the NATS client protocol as the floor and the load need, on a blocking socket:
//! <https://docs.nats.io/reference/reference-protocols/nats-protocol>.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::bail;

/// Nothing in the benchmark takes so long, unless a relay has failed.
pub const TIMEOUT: Duration = Duration::from_secs(10);

const BUFFER_BYTES: usize = 256 * 1024;

/// A connection to a NATS server.
pub struct Connection {
    reader: BufReader<TcpStream>,
    line: String,
    /// What is published, until it is flushed.
    outgoing: Vec<u8>,
}

/// A message as it comes.
pub struct Message {
    pub subject: String,
    /// Empty if there is none.
    pub reply: String,
    /// The whole block, beginning with `NATS/1.0`; empty if there is none.
    pub headers: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Connection {
    pub fn open(url: &str) -> anyhow::Result<Self> {
        let address = url.strip_prefix("nats://").unwrap_or(url);
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let connect =
            r#"CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true}"#;
        let mut connection = Self {
            reader: BufReader::with_capacity(BUFFER_BYTES, stream),
            line: String::new(),
            outgoing: format!("{connect}\r\n").into_bytes(),
        };
        connection.round_trip()?;
        Ok(connection)
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
            if let Some(message) = self.message_or_pong()? {
                return Ok(message);
            }
        }
    }

    /// Returns once the server has processed all of the above, with how many messages came meanwhile.
    pub fn round_trip(&mut self) -> anyhow::Result<usize> {
        self.outgoing.extend_from_slice(b"PING\r\n");
        self.flush()?;
        let mut messages = 0;
        while self.message_or_pong()?.is_some() {
            messages += 1;
        }
        Ok(messages)
    }

    /// The next message, or none if a PONG came first.
    fn message_or_pong(&mut self) -> anyhow::Result<Option<Message>> {
        loop {
            self.line.clear();
            if self.reader.read_line(&mut self.line)? == 0 {
                bail!("NATS closed the connection");
            }
            let words: Vec<_> = self.line.split_whitespace().collect();
            let (subject, reply, head, total) = match words[..] {
                ["MSG", subject, _, total] => (subject, "", "0", total),
                ["MSG", subject, _, reply, total] => (subject, reply, "0", total),
                ["HMSG", subject, _, head, total] => (subject, "", head, total),
                ["HMSG", subject, _, reply, head, total] => (subject, reply, head, total),
                ["PONG"] => return Ok(None),
                ["PING"] => {
                    self.reader.get_ref().write_all(b"PONG\r\n")?;
                    continue;
                }
                ["INFO", ..] => continue,
                _ => bail!("NATS says {}", self.line),
            };
            let (head, total): (usize, usize) = (head.parse()?, total.parse()?);
            let mut headers = vec![0; head];
            self.reader.read_exact(&mut headers)?;
            let mut payload = vec![0; total - head];
            self.reader.read_exact(&mut payload)?;
            self.reader.read_exact(&mut [0; 2])?;
            return Ok(Some(Message {
                subject: subject.to_owned(),
                reply: reply.to_owned(),
                headers,
                payload,
            }));
        }
    }
}
