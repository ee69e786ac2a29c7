use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::TcpListener,
    sync::Notify,
    task::JoinHandle,
};

use tokio_rustls::TlsAcceptor;

use super::until;

/// A webhook endpoint that notes every request and answers each as it is told.
pub struct Webhook {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Received>>>,
    server: JoinHandle<()>,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Received {
    pub line: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
    /// Which connection it came on, from 0.
    pub connection: usize,
    pub at: Instant,
    /// When the answer was sent, if it was.
    pub answered: Option<Instant>,
    /// When the endpoint was done with it, answered or not.
    pub ended: Option<Instant>,
    /// The status it was answered with; 0 where that is no plain status.
    pub status: u16,
}

impl Received {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// What the endpoint does with a request.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Answers with a status after a delay.
    Status(u16, Duration),
    /// Answers with 200 once it is told to.
    OkAfter(Arc<Notify>),
    /// Sends these bytes and keeps the connection.
    Raw(Vec<u8>),
    /// Sends these bytes over and over, until the other side has enough.
    Endless(Vec<u8>),
    /// Never answers.
    Hang,
    /// Closes the connection.
    Close,
}

impl Answer {
    pub const OK: Self = Self::Status(200, Duration::ZERO);

    pub fn status(status: u16) -> Self {
        Self::Status(status, Duration::ZERO)
    }

    pub fn ok_after(delay: Duration) -> Self {
        Self::Status(200, delay)
    }

    /// A complete answer: status line and headers as given, then a body.
    pub fn full(head: &str, body: &str) -> Self {
        let length = body.len();
        Self::Raw(format!("HTTP/1.1 {head}\r\ncontent-length: {length}\r\n\r\n{body}").into())
    }
}

impl Webhook {
    pub async fn ok() -> Self {
        Self::start(|_, _| Answer::OK).await
    }

    /// Answers request `n`, counted from 0, with the `n`th answer, and all later ones with 200.
    pub async fn script(answers: impl Into<Vec<Answer>>) -> Self {
        let answers = answers.into();
        Self::start(move |n, _| answers.get(n).cloned().unwrap_or(Answer::OK)).await
    }

    /// Answers request `n`, counted from 0, as `answer` says.
    pub async fn start(
        answer: impl Fn(usize, &Received) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), answer)
    }

    /// Behind TLS.
    pub async fn https(acceptor: TlsAcceptor) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::serve(listener, Some(acceptor), |_, _| Answer::OK)
    }

    pub fn on(
        listener: TcpListener,
        answer: impl Fn(usize, &Received) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::serve(listener, None, answer)
    }

    fn serve(
        listener: TcpListener,
        acceptor: Option<TlsAcceptor>,
        answer: impl Fn(usize, &Received) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let endpoint = Arc::new(Endpoint {
            requests: Arc::clone(&requests),
            answer,
        });
        let server = tokio::spawn(async move {
            for connection in 0.. {
                let Ok((stream, _)) = listener.accept().await else {
                    return;
                };
                let endpoint = Arc::clone(&endpoint);
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    stream.set_nodelay(true).ok()?;
                    match acceptor {
                        Some(acceptor) => {
                            endpoint
                                .serve(acceptor.accept(stream).await.ok()?, connection)
                                .await
                        }
                        None => endpoint.serve(stream, connection).await,
                    }
                });
            }
        });
        Self {
            address,
            requests,
            server,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn requests(&self) -> Vec<Received> {
        self.requests.lock().unwrap().clone()
    }

    /// The bodies of all requests, as text.
    pub fn bodies(&self) -> Vec<String> {
        self.requests().iter().map(Received::text).collect()
    }

    pub fn count(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    /// All requests, once there are at least `count`.
    pub async fn received(&self, count: usize) -> Vec<Received> {
        until(&format!("the webhook has {count} requests"), async || {
            self.count() >= count
        })
        .await;
        self.requests()
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Endpoint<F> {
    requests: Arc<Mutex<Vec<Received>>>,
    answer: F,
}

impl<F: Fn(usize, &Received) -> Answer> Endpoint<F> {
    /// Serves a connection until either side has enough of it.
    async fn serve<S>(&self, stream: S, connection: usize) -> Option<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut stream = BufReader::new(stream);
        loop {
            let request = read_request(&mut stream, connection).await?;
            let (index, answer) = {
                let mut requests = self.requests.lock().unwrap();
                requests.push(request);
                let index = requests.len() - 1;
                (index, (self.answer)(index, &requests[index]))
            };
            let answered = self.answer(&mut stream, index, answer).await;
            self.requests.lock().unwrap()[index].ended = Some(Instant::now());
            answered?;
        }
    }

    /// Answers request `index`; nothing if the connection is over.
    async fn answer<S>(&self, stream: &mut S, index: usize, answer: Answer) -> Option<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let bytes = match answer {
            Answer::OkAfter(told) => {
                told.notified().await;
                self.plain(index, 200)
            }
            Answer::Status(status, delay) => {
                if !delay.is_zero() {
                    tokio::time::sleep(delay).await;
                }
                self.plain(index, status)
            }
            Answer::Raw(bytes) => bytes,
            Answer::Endless(bytes) => loop {
                stream.write_all(&bytes).await.ok()?;
            },
            // Until the other side closes the connection.
            Answer::Hang => return stream.read_u8().await.ok().map(|_| ()),
            Answer::Close => return None,
        };
        self.requests.lock().unwrap()[index].answered = Some(Instant::now());
        stream.write_all(&bytes).await.ok()
    }

    /// An answer to request `index` that has nothing but a status.
    fn plain(&self, index: usize, status: u16) -> Vec<u8> {
        self.requests.lock().unwrap()[index].status = status;
        format!("HTTP/1.1 {status} Test\r\ncontent-length: 0\r\n\r\n").into_bytes()
    }
}

async fn read_request<S: AsyncRead + Unpin>(
    stream: &mut BufReader<S>,
    connection: usize,
) -> Option<Received> {
    let mut line = String::new();
    stream
        .read_line(&mut line)
        .await
        .ok()
        .filter(|length| *length > 0)?;
    let mut headers = HashMap::new();
    loop {
        let mut bytes = Vec::new();
        stream.read_until(b'\n', &mut bytes).await.ok()?;
        let header = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        let Some((name, value)) = header.split_once(": ") else {
            break;
        };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let length = headers
        .get("content-length")
        .map_or(0, |length: &String| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    let line = line.trim_end().to_owned();
    Some(Received {
        line,
        headers,
        body,
        connection,
        at: Instant::now(),
        answered: None,
        ended: None,
        status: 0,
    })
}
