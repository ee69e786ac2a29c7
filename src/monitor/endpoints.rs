//! The page, `/livez`, `/readyz` and `/metrics` over HTTP, separate from the main loop.

use std::{
    collections::VecDeque, convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration,
};

use anyhow::Context;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY,
        X_CONTENT_TYPE_OPTIONS,
    },
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use log::{info, warn};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::{AbortHandle, yield_now},
    time::{sleep, timeout},
};

use super::{Monitor, page::POLICY};

/// Maximum concurrent clients; one more evicts the oldest. That is a silent one, because requests are answered at
/// once, and silent clients must not keep a probe waiting.
const MAX_CLIENTS: usize = 64;

/// How long a client gets for its one request and the response.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How many clients may wait to be accepted.
const BACKLOG: u32 = 4096;

/// How long to wait after a failed accept before retrying, for example with too many open files.
const PAUSE: Duration = Duration::from_secs(1);

/// The maximum size of a request's head.
const MAX_HEAD_BYTES: usize = 8 * 1024;

const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const PROMETHEUS: HeaderValue =
    HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// Listens, and serves requests in the background from then on.
///
/// # Errors
/// If the address can't be listened on. That can be temporary: its network may come up later, or another program may
/// release it.
pub fn start(address: SocketAddr, monitor: Arc<Monitor>) -> anyhow::Result<()> {
    let listener = listen(address)
        .with_context(|| format!("STATUS_LISTEN {address} cannot be listened on"))?;
    let address = listener.local_addr().unwrap_or(address);
    info!("status on http://{address}/ and /livez, /readyz and /metrics");
    tokio::spawn(serve(listener, monitor));
    Ok(())
}

/// Like [`TcpListener::bind`], with room for more clients that connect at the same moment: the kernel
/// lets those that do not fit wait for a second.
///
/// # Errors
/// If the address can't be listened on.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn serve(listener: TcpListener, monitor: Arc<Monitor>) {
    let mut clients: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!("a client of the status port was not accepted: {error}");
                sleep(PAUSE).await;
                continue;
            }
        };
        clients.retain(|client| !client.is_finished());
        if clients.len() >= MAX_CLIENTS
            && let Some(oldest) = clients.pop_front()
        {
            oldest.abort();
        }
        let client = serve_client(stream, Arc::clone(&monitor));
        clients.push_back(tokio::spawn(client).abort_handle());
        // However many clients connect at once, all other tasks get their turn, and evicted clients are gone.
        yield_now().await;
    }
}

async fn serve_client(stream: TcpStream, monitor: Arc<Monitor>) {
    let service = service_fn(|request| {
        let response = answer(&request, &monitor);
        async { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // Errors of a client are ignored.
    let _ = timeout(TIMEOUT, connection).await;
}

fn answer(request: &Request<Incoming>, monitor: &Monitor) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(
            StatusCode::METHOD_NOT_ALLOWED,
            "only GET and HEAD".to_owned(),
        );
    }
    match request.uri().path() {
        "/" => page(monitor),
        "/livez" => check(monitor.alive()),
        "/readyz" => check(monitor.ready()),
        "/metrics" => match monitor.metrics() {
            Ok(metrics) => {
                let mut response = text(StatusCode::OK, metrics);
                response.headers_mut().insert(CONTENT_TYPE, PROMETHEUS);
                response
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /, /livez, /readyz and /metrics".to_owned(),
        ),
    }
}

fn page(monitor: &Monitor) -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::OK, monitor.page().unwrap_or_default());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HTML);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Ok(policy) = HeaderValue::from_str(&POLICY) {
        headers.insert(CONTENT_SECURITY_POLICY, policy);
    }
    response
}

fn check(state: Result<(), String>) -> Response<Full<Bytes>> {
    match state {
        Ok(()) => text(StatusCode::OK, "ok".to_owned()),
        Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, reason),
    }
}

fn text(status: StatusCode, mut body: String) -> Response<Full<Bytes>> {
    if !body.ends_with('\n') {
        body.push('\n');
    }
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, TEXT);
    response
}
