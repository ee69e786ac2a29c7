//! The webhook endpoint: a thread per connection, so that neither a runtime nor its timers stand
//! between a request and its answer.

use std::{
    io::{BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use crate::{floor::read_head, load::number};

/// An HTTP endpoint that answers 200 after a delay, and counts.
pub struct Webhook {
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    delay_micros: AtomicU64,
    /// The next number that is due.
    next: AtomicU64,
    out_of_order: AtomicU64,
}

impl Webhook {
    pub fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::<State>::default();
        let shared = Arc::clone(&state);
        // It lives as long as the benchmark does; there are few of them, and they cost nothing idle.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                // A connection that breaks shows in the count.
                thread::spawn(move || serve(stream, &state));
            }
        });
        Ok(Self { address, state })
    }

    pub fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    pub fn set_delay(&self, delay: Duration) {
        let micros = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.state.delay_micros.store(micros, SeqCst);
    }

    /// All messages below this number have been answered, as far as they came in order.
    pub fn next(&self) -> u64 {
        self.state.next.load(SeqCst)
    }

    /// How many messages did not follow the one before.
    pub fn out_of_order(&self) -> u64 {
        self.state.out_of_order.load(SeqCst)
    }
}

fn serve(stream: TcpStream, state: &State) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(64 * 1024, stream);
    let mut buffer = Vec::new();
    while let Some(head) = read_head(&mut reader, &mut buffer)? {
        buffer.resize(head.content_length, 0);
        reader.read_exact(&mut buffer)?;
        let delay = state.delay_micros.load(SeqCst);
        if delay > 0 {
            thread::sleep(Duration::from_micros(delay));
        }
        let number = number(&buffer)?;
        if state.next.swap(number + 1, SeqCst) != number {
            state.out_of_order.fetch_add(1, SeqCst);
        }
        reader
            .get_ref()
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
    }
    Ok(())
}
