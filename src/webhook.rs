//! One POST → success, a temporary failure (maybe with a wait) or a permanent one.
//!
//! Headers follow Standard Webhooks
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>).

use std::{
    error::Error,
    io,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use async_nats::{HeaderMap, header::NATS_MESSAGE_ID};
use reqwest::{
    Client, Proxy, Request, Response, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION, RETRY_AFTER},
    redirect, retry,
};
use rustls::ClientConfig;
use tokio::time::{Instant, timeout_at};

use crate::{
    config::{self, Destination, Secrets},
    signing::SigningSecret,
    source::Delivery,
    text, tls,
};

const USER_AGENT: &str = concat!("nats-webhook-relay/", env!("CARGO_PKG_VERSION"));
const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
const NATS_SUBJECT: HeaderName = HeaderName::from_static("x-nats-subject");

/// The message headers that are passed on as they are. No other is: a publisher must not be able
/// to set, say, `Authorization`.
const PASSED_ON: [HeaderName; 3] = [
    CONTENT_TYPE,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
];

/// An idle connection is closed before the usual server does it (Node.js after 5 s), so that no
/// request runs into a connection that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// How much of a successful answer is read so that its connection can be used again.
const DRAIN_BYTES: usize = 64 * 1024;

/// How much of a refusing answer is read for the log.
const EXCERPT_BYTES: usize = 200;

/// A longer `Retry-After` is not waited for.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);

/// So many headers an answer may have; the HTTP client's own bound is 100.
const MAX_HEADERS: usize = 1000;

/// Where and how to POST.
pub struct Webhook {
    targets: Vec<Target>,
    timeout: Duration,
    signing_secrets: Vec<SigningSecret>,
    sent_secrets: Secrets,
}

/// One destination.
pub struct Target {
    /// Its URL, as it may be shown.
    pub destination: Destination,
    /// Keeps the one connection to it.
    client: Client,
    /// Whether that connection waits for the next request, as far as we know.
    is_idle: AtomicBool,
    /// What all requests to it have in common.
    template: Request,
}

/// Why an attempt did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// Another attempt may succeed.
    Temporary {
        /// What happened, without secrets.
        reason: String,
        /// The status of the answer, if there was one.
        status: Option<StatusCode>,
        /// The shortest wait before the next attempt, if the destination asks for one.
        retry_after: Option<Duration>,
    },
    /// No further attempt can succeed.
    Permanent {
        /// What happened, without secrets.
        reason: String,
        /// The status of the answer.
        status: StatusCode,
    },
}

impl Webhook {
    /// Prepares requests to the configured destinations; sends nothing.
    ///
    /// # Errors
    /// If TLS can't be set up.
    pub fn new(config: &config::Webhook) -> anyhow::Result<Self> {
        tls::install_provider();
        // Without https there is no need to read the system's trust store into memory.
        let tls = config
            .destinations
            .iter()
            .any(Destination::is_https)
            .then(|| tls::client_config(config.trust.as_deref()))
            .transpose()?;
        let targets = config
            .destinations
            .iter()
            .map(|destination| Target::new(destination, config, tls.as_ref()))
            .collect::<anyhow::Result<_>>()?;
        Ok(Self {
            targets,
            timeout: config.timeout,
            signing_secrets: config.secrets.clone(),
            sent_secrets: config.sent_secrets(),
        })
    }

    /// Where messages are POSTed to.
    #[must_use]
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// One attempt to POST a message.
    ///
    /// # Errors
    /// If the destination did not answer with success in time.
    pub async fn post(
        &self,
        target: &Target,
        delivery: &Delivery,
        id: &HeaderValue,
    ) -> Result<StatusCode, Failure> {
        self.try_to_post(target, delivery, id)
            .await
            .map_err(|mut failure| {
                // Some destinations quote what they were sent.
                let (Failure::Temporary { reason, .. } | Failure::Permanent { reason, .. }) =
                    &mut failure;
                *reason = self.sent_secrets.blot_out(reason).into_owned();
                failure
            })
    }

    async fn try_to_post(
        &self,
        target: &Target,
        delivery: &Delivery,
        id: &HeaderValue,
    ) -> Result<StatusCode, Failure> {
        let deadline = Instant::now() + self.timeout;
        let send = || target.client.execute(self.request(target, delivery, id));
        let was_idle = target.is_idle.swap(false, Relaxed);
        let mut answer = timeout_at(deadline, send()).await;
        if let Ok(Err(error)) = &answer
            && was_idle
            && met_dead_connection(error)
        {
            // The destination closed the connection as the request went out, and saw nothing of it.
            answer = timeout_at(deadline, send()).await;
        }
        let response = match answer {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(temporary(target.describe(error))),
            Err(_) => return Err(temporary(format!("no answer within {:?}", self.timeout))),
        };
        let status = response.status();
        match status.as_u16() {
            200..=299 => {
                // The message has arrived, whatever becomes of the rest of the answer.
                read(response, DRAIN_BYTES, deadline).await;
                target.is_idle.store(true, Relaxed);
                Ok(status)
            }
            300..=399 => Err(Failure::Permanent {
                reason: target.redirect_reason(&response),
                status,
            }),
            408 | 425 | 429 | 500..=599 => Err(Failure::Temporary {
                retry_after: retry_after(&response),
                reason: format!("answered {status}"),
                status: Some(status),
            }),
            400..=499 => {
                let excerpt = printable(&read(response, EXCERPT_BYTES, deadline).await);
                Err(Failure::Permanent {
                    reason: format!("answered {status}: {excerpt}"),
                    status,
                })
            }
            _ => Err(temporary(format!(
                "answered {status}, which is no answer to a POST"
            ))),
        }
    }

    fn request(&self, target: &Target, delivery: &Delivery, id: &HeaderValue) -> Request {
        let Target { template, .. } = target;
        let mut request = Request::new(template.method().clone(), template.url().clone());
        let headers = request.headers_mut();
        headers.clone_from(template.headers());
        for name in PASSED_ON {
            if let Some(value) = header(&delivery.headers, name.as_str())
                && let Ok(value) = HeaderValue::from_str(value)
            {
                headers.insert(name, value);
            }
        }
        // A subject that no HTTP header can hold (it has a control character) is left out.
        if let Ok(subject) = HeaderValue::from_bytes(delivery.subject.as_bytes()) {
            headers.insert(NATS_SUBJECT, subject);
        }
        headers.insert(WEBHOOK_ID, id.clone());
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        headers.insert(WEBHOOK_TIMESTAMP, now.into());
        let signatures: Vec<_> = self
            .signing_secrets
            .iter()
            .map(|secret| secret.sign(id.as_bytes(), now, &delivery.payload))
            .collect();
        if !signatures.is_empty()
            && let Ok(signatures) = HeaderValue::from_str(&signatures.join(" "))
        {
            headers.insert(WEBHOOK_SIGNATURE, signatures);
        }
        // The HTTP client leaves it out where there is no body, and some servers insist on it
        // (RFC 9110, 8.6).
        headers.insert(CONTENT_LENGTH, delivery.payload.len().into());
        *request.body_mut() = Some(delivery.payload.clone().into());
        request
    }
}

impl Target {
    fn new(
        destination: &Destination,
        config: &config::Webhook,
        tls: Option<&ClientConfig>,
    ) -> anyhow::Result<Self> {
        let mut builder = Client::builder()
            .user_agent(USER_AGENT)
            .default_headers(config.headers.clone())
            .redirect(redirect::Policy::none())
            // Attempts are counted, and waited between, by the relay alone.
            .retry(retry::never().max_retries_per_request(0))
            .http1_max_headers(MAX_HEADERS)
            .pool_max_idle_per_host(1)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .tcp_nodelay(true)
            // The library's own idea of proxies includes them for localhost.
            .no_proxy();
        builder = match tls {
            Some(tls) => builder.tls_backend_preconfigured(tls.clone()),
            None => builder.tls_certs_only([]),
        };
        if let Some(proxy) = destination.proxy() {
            let through =
                Proxy::all(proxy.expose_url().clone()).map_err(reqwest::Error::without_url);
            builder =
                builder.proxy(through.with_context(|| format!("cannot use the proxy {proxy}"))?);
        }
        let client = builder.build().context("cannot set up the HTTP client")?;
        let template = client
            .post(destination.expose_url().clone())
            .header(CONTENT_TYPE, "application/json")
            .build()
            .map_err(reqwest::Error::without_url)
            .with_context(|| format!("cannot POST to {destination}"))?;
        Ok(Self {
            destination: destination.clone(),
            client,
            is_idle: AtomicBool::new(false),
            template,
        })
    }

    /// The cause at the bottom of a failed request, which says most, and never the URL.
    fn describe(&self, error: reqwest::Error) -> String {
        let error = error.without_url();
        let mut cause: &dyn Error = &error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let cause = cause.to_string();
        let cause = tls::explain(&cause, "SSL_CERT_FILE", "http").unwrap_or(cause);
        if !error.is_connect() {
            return format!("no valid answer: {cause}");
        }
        let server = self.destination.authority();
        match self.destination.proxy() {
            Some(proxy) => format!("cannot connect to {server} through the proxy {proxy}: {cause}"),
            None => format!("cannot connect to {server}: {cause}"),
        }
    }

    fn redirect_reason(&self, response: &Response) -> String {
        let target = response
            .headers()
            .get(LOCATION)
            .and_then(|location| location.to_str().ok())
            .and_then(|location| self.template.url().join(location).ok())
            // Such as mailto: or data:, of which nothing is known to be fit to be shown.
            .filter(|url| url.has_host());
        let status = response.status();
        match target {
            Some(url) => format!(
                "answered {status} to {}; redirects are not followed, set WEBHOOK_DESTINATION to it",
                text::one_line(&config::without_secrets(&url), text::LONGEST_PIECE)
            ),
            None => format!("answered {status} without a target; check WEBHOOK_DESTINATION"),
        }
    }
}

/// The `webhook-id` of a message, the same over retries: its `Nats-Msg-Id`, else its place in its
/// stream, else a random one.
#[must_use]
pub fn message_id(delivery: &Delivery) -> HeaderValue {
    let own = header(&delivery.headers, NATS_MESSAGE_ID.as_ref());
    let place = delivery.ack.as_ref().map(|ack| ack.id.as_str());
    let usable = own.into_iter().chain(place).find(|id| is_webhook_id(id));
    let random = || format!("msg_{:032x}", fastrand::u128(..));
    let id = usable.map_or_else(random, str::to_owned);
    // Never an error: all of these are visible ASCII.
    HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("msg"))
}

/// Whether `id` can be signed: the signed text is `id.timestamp.payload`, so that a dot in the id
/// would make it ambiguous (Standard Webhooks, "Signature scheme").
fn is_webhook_id(id: &str) -> bool {
    (1..=256).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic() && b != b'.')
}

/// The value of a message header, whatever the case of its name.
fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let name = name.as_bytes();
    headers
        .iter()
        .find(|(candidate, _)| AsRef::<[u8]>::as_ref(*candidate).eq_ignore_ascii_case(name))
        .and_then(|(_, values)| values.first())
        .map(async_nats::HeaderValue::as_str)
}

/// Whether a request failed because its connection had been closed by then.
fn met_dead_connection(error: &reqwest::Error) -> bool {
    let mut cause: Option<&dyn Error> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<hyper::Error>()
            && (error.is_incomplete_message() || error.is_canceled())
        {
            return true;
        }
        if let Some(error) = error.downcast_ref::<io::Error>() {
            use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
            return matches!(
                error.kind(),
                BrokenPipe | ConnectionAborted | ConnectionReset
            );
        }
        cause = error.source();
    }
    false
}

fn temporary(reason: String) -> Failure {
    Failure::Temporary {
        reason,
        status: None,
        retry_after: None,
    }
}

/// The body of an answer, up to a bound and a deadline. What does not come is not missed.
async fn read(mut response: Response, bound: usize, deadline: Instant) -> Vec<u8> {
    let mut body = Vec::new();
    while let Ok(Ok(Some(chunk))) = timeout_at(deadline, response.chunk()).await {
        let fits = chunk.len().min(bound - body.len());
        body.extend_from_slice(&chunk[..fits]);
        if body.len() == bound {
            break;
        }
    }
    body
}

/// The beginning of an answer, fit for one line.
fn printable(bytes: &[u8]) -> String {
    let body = String::from_utf8_lossy(bytes);
    match text::one_line(&body, text::LONGEST_PIECE).trim() {
        "" => "(no body)".to_owned(),
        line => line.to_owned(),
    }
}

/// The wait that a `Retry-After` header asks for, in seconds or as a date (RFC 9110, 10.2.3).
fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    parse_retry_after(value, SystemTime::now())
}

fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number that is too large to be read is a long wait as well.
        value.parse().map_or(Duration::MAX, Duration::from_secs)
    } else {
        httpdate::parse_http_date(value)
            .ok()?
            .duration_since(now)
            .unwrap_or_default()
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date_and_bounded() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777); // Sun, 06 Nov 1994 08:49:37 GMT
        for (value, seconds) in [
            ("0", Some(0)),
            (" 7 ", Some(7)),
            ("3600", Some(60)),
            ("99999999999999999999999", Some(60)),
            ("Sun, 06 Nov 1994 08:49:47 GMT", Some(10)),
            ("Sun, 06 Nov 1994 08:49:27 GMT", Some(0)),
            ("Sun, 06 Nov 1994 09:49:37 GMT", Some(60)),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("", None),
        ] {
            let expected = seconds.map(Duration::from_secs);
            assert_eq!(parse_retry_after(value, now), expected, "{value:?}");
        }
    }

    #[test]
    fn an_excerpt_is_one_printable_line() {
        assert_eq!(printable(b"no\r\n\x1b[31mway\xff"), "no   [31mway\u{fffd}");
        assert_eq!(printable(b" \n"), "(no body)");
    }

    #[test]
    fn an_id_that_cannot_be_signed_is_not_used() {
        for (id, good) in [
            ("msg_1-a", true),
            ("", false),
            ("a.b", false),
            ("a b", false),
            ("ä", false),
            (&"x".repeat(257), false),
        ] {
            assert_eq!(is_webhook_id(id), good, "{id:?}");
        }
    }
}
