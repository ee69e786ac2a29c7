//! The page with its style and script, `/livez`, `/readyz` and `/metrics` over HTTP, separate from the main loop.

use std::{collections::VecDeque, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use log::{info, warn};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, yield_now},
    time::{sleep, timeout},
};

use super::Monitor;

/// Maximum concurrent clients; one more evicts the oldest. That is a silent one, because requests are answered at
/// once, and silent clients must not keep a probe waiting.
const MAX_CLIENTS: usize = 64;

/// How long a client gets for its one request and the response.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait after a failed accept before retrying, for example with too many open files.
const PAUSE: Duration = Duration::from_secs(1);

/// The maximum size of a request's head.
const MAX_HEAD_BYTES: usize = 8 * 1024;

/// Keeps the page to itself.
const POLICY: &str = "default-src 'none'; base-uri 'none'; connect-src 'self'; form-action 'none'; \
                      frame-ancestors 'none'; script-src 'self'; style-src 'self'";

const TEXT: &str = "text/plain; charset=utf-8";

/// Listens, and serves requests in the background from then on.
///
/// # Errors
/// If the address can't be listened on. That can be temporary: its network may come up later, or another program may
/// release it.
pub async fn start(address: SocketAddr, monitor: Arc<Monitor>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on STATUS_LISTEN {address}"))?;
    let address = listener.local_addr().unwrap_or(address);
    info!("status on http://{address}/ and /livez, /readyz and /metrics");
    tokio::spawn(serve(listener, monitor));
    Ok(())
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
        .max_buf_size(MAX_HEAD_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // Errors of a client are ignored.
    let _ = timeout(TIMEOUT, connection).await;
}

fn answer(request: &Request<Incoming>, monitor: &Monitor) -> Response<Full<Bytes>> {
    let text = |status, text: &str| (status, TEXT, format!("{text}\n"));
    let check = |state: Result<(), String>| match state {
        Ok(()) => text(StatusCode::OK, "ok"),
        Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, &reason),
    };
    let file = |kind, text| (StatusCode::OK, kind, text);
    let (status, kind, body) = match request.uri().path() {
        "/" => file("text/html; charset=utf-8", monitor.page()),
        "/page.css" => file(
            "text/css; charset=utf-8",
            include_str!("page.css").to_owned(),
        ),
        "/page.js" => file("text/javascript", include_str!("page.js").to_owned()),
        "/livez" => check(monitor.alive()),
        "/readyz" => check(monitor.ready()),
        "/metrics" => match monitor.metrics() {
            Ok(metrics) => file("text/plain; version=0.0.4; charset=utf-8", metrics),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        },
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /, /livez, /readyz and /metrics",
        ),
    };
    // It never fails: all headers are visible ASCII.
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, kind)
        .header(header::CACHE_CONTROL, "no-store")
        .header(header::CONTENT_SECURITY_POLICY, POLICY)
        .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
        .body(Full::from(body))
        .unwrap_or_default()
}
