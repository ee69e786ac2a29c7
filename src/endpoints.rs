//! `/livez`, `/readyz` and `/metrics` over HTTP, apart from the main loop.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use log::{info, warn};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};

use crate::{config::BadConfiguration, status::Status};

/// So many clients are served at the same time; further ones wait in the kernel's queue.
const MAX_CLIENTS: usize = 16;

/// A client gets this long for its one request, and its answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// No request needs more room for its head.
const MAX_HEAD_BYTES: usize = 8 * 1024;

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const PROMETHEUS: HeaderValue =
    HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// Listens, and answers in the background from then on.
///
/// # Errors
/// If the address can't be listened on.
pub async fn start(address: SocketAddr, status: Arc<Status>) -> Result<(), BadConfiguration> {
    let listener = TcpListener::bind(address).await.map_err(|error| {
        BadConfiguration(format!(
            "STATUS_LISTEN {address} cannot be listened on: {error}"
        ))
    })?;
    let address = listener.local_addr().unwrap_or(address);
    info!("status on http://{address}/livez, /readyz and /metrics");
    tokio::spawn(serve(listener, status));
    Ok(())
}

async fn serve(listener: TcpListener, status: Arc<Status>) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        // Never closed, so it never fails.
        let Ok(place) = Arc::clone(&clients).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!("a client of the status port was not accepted: {error}");
                // Such as too many open files; it won't be better at once.
                tokio::time::sleep(PATIENCE).await;
                continue;
            }
        };
        let status = Arc::clone(&status);
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let response = answer(&request, &status);
                async { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .max_buf_size(MAX_HEAD_BYTES)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // Whatever a client does wrong is its own matter.
            let _ = timeout(PATIENCE, connection).await;
            drop(place);
        });
    }
}

fn answer(request: &Request<Incoming>, status: &Status) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(
            StatusCode::METHOD_NOT_ALLOWED,
            "only GET and HEAD".to_owned(),
        );
    }
    match request.uri().path() {
        "/livez" => check(status.alive()),
        "/readyz" => check(status.ready()),
        "/metrics" => match status.metrics() {
            Ok(metrics) => {
                let mut response = text(StatusCode::OK, metrics);
                response.headers_mut().insert(CONTENT_TYPE, PROMETHEUS);
                response
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /livez, /readyz and /metrics".to_owned(),
        ),
    }
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
