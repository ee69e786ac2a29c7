//! The floor: what a relay costs at the least. The same job on one thread, with blocking sockets and
//! no library. It takes the same variables, expects everything to go well, and ends if it doesn't.

use std::{
    env,
    io::{BufReader, Write, stderr},
    net::TcpStream,
    time::Instant,
};

use anyhow::{Context, ensure};

use crate::{nats::Connection, webhook::read_http};

const INBOX: &str = "_INBOX.floor.*";
const PULLED: &str = "_INBOX.floor.pulled";
const CONFIRMED: &str = "_INBOX.floor.confirmed";

/// The request is valid for longer than this process lives.
const PULL: &[u8] = br#"{"batch":1,"expires":600000000000}"#;

pub fn run() -> anyhow::Result<()> {
    let prefix = env::var("NATS_SUBJECT_PREFIX")?;
    let relayed_prefix = env::var("NATS_RELAYED_SUBJECT_PREFIX")?;
    let mut nats = Connection::open(&env::var("NATS_HOST")?)?;

    let url = env::var("WEBHOOK_DESTINATION")?;
    let url = url.strip_prefix("http://").context("only http://")?;
    let (host, path) = url.split_once('/').context("a URL without a path")?;
    let mut webhook = BufReader::new(TcpStream::connect(host)?);
    webhook.get_ref().set_nodelay(true)?;

    // In durable mode, the subject of pull requests.
    let mut pull = None;
    if let (Ok(stream), Ok(consumer)) = (env::var("NATS_STREAM"), env::var("NATS_CONSUMER")) {
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}");
        nats.subscribe(INBOX)?;
        nats.publish(&subject, PULLED, b"", PULL)?;
        nats.flush()?;
        pull = Some(subject);
    } else {
        nats.subscribe(&format!("{prefix}.>"))?;
    }

    let mut buffer = Vec::new();
    let mut early = None;
    loop {
        let message = match early.take() {
            Some(message) => message,
            None => nats.next()?,
        };
        let start = Instant::now();
        let (subject, length) = (&message.subject, message.payload.len());

        buffer.clear();
        write!(
            buffer,
            "POST /{path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: floor\r\n\
             content-type: application/json\r\nx-nats-subject: {subject}\r\n\
             content-length: {length}\r\n\r\n"
        )?;
        buffer.extend_from_slice(&message.payload);
        webhook.get_ref().write_all(&buffer)?;
        let answer = read_http(&mut webhook, &mut buffer)?.context("no answer")?;
        ensure!(answer.starts_with("HTTP/1.1 2"), "answered {answer}");

        let rest = subject.strip_prefix(&prefix).context("other prefix")?;
        let relayed_subject = format!("{relayed_prefix}{rest}");
        nats.publish(&relayed_subject, "", &message.headers, &message.payload)?;
        if let Some(pull) = &pull {
            nats.publish(pull, PULLED, b"", PULL)?;
            nats.publish(&message.reply, CONFIRMED, b"", b"+ACK")?;
        }
        nats.flush()?;
        // The next message may come before the ack is confirmed.
        let mut confirmed = pull.is_none();
        while !confirmed {
            let answer = nats.next()?;
            confirmed = answer.subject == CONFIRMED;
            if !confirmed {
                early = Some(answer);
            }
        }
        let elapsed = start.elapsed();
        let line = format!("{subject} -> {relayed_subject} (200, {elapsed:.1?})\n");
        // The line is one write, as that of the relay is.
        stderr().write_all(line.as_bytes())?;
    }
}
