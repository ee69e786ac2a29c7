//! The webhook endpoint: a thread per connection, so that neither a runtime nor its timers stand
//! between a request and its answer.

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use crate::load::number;

/// An HTTP endpoint that answers 200 after a delay, and counts.
#[derive(Default)]
pub struct Webhook {
    pub url: String,
    pub delay_millis: AtomicU64,
    /// The number that is due next: all messages below it have been answered, if they came in order.
    pub next: AtomicU64,
    /// How many messages did not follow the one before.
    pub out_of_order: AtomicU64,
}

impl Webhook {
    /// It lives as long as the benchmark does; there are few of them, and idle ones cost nothing.
    pub fn start() -> anyhow::Result<Arc<Self>> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let webhook = Arc::new(Self {
            url: format!("http://{}/hook", listener.local_addr()?),
            ..Self::default()
        });
        let shared = Arc::clone(&webhook);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let webhook = Arc::clone(&shared);
                // A connection that breaks shows in the count.
                thread::spawn(move || webhook.serve(stream));
            }
        });
        Ok(webhook)
    }

    fn serve(&self, stream: TcpStream) -> anyhow::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::with_capacity(64 * 1024, stream);
        let mut body = Vec::new();
        while read_http(&mut reader, &mut body)?.is_some() {
            thread::sleep(Duration::from_millis(self.delay_millis.load(SeqCst)));
            let number = number(&body)?;
            if self.next.swap(number + 1, SeqCst) != number {
                self.out_of_order.fetch_add(1, SeqCst);
            }
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
            reader.get_ref().write_all(answer)?;
        }
        Ok(())
    }
}

/// Reads an HTTP request or answer. Returns its first line, or none at the end of the connection.
pub fn read_http(reader: &mut impl BufRead, body: &mut Vec<u8>) -> anyhow::Result<Option<String>> {
    let mut first = String::new();
    if reader.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    let mut length = 0;
    let mut line = String::new();
    // An empty line ends the headers.
    while reader.read_line(&mut line)? > 0 && !line.trim_end().is_empty() {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
        line.clear();
    }
    body.resize(length, 0);
    reader.read_exact(body)?;
    Ok(Some(first))
}
