//! One attempt to POST: success, a temporary failure (maybe with a wait) or a permanent one.
//!
//! Headers follow Standard Webhooks
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>).

mod addresses;
mod answer;
mod endpoint;
mod id;
mod secrets;
mod signing;

use std::{
    error::Error,
    ops::RangeInclusive,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use futures::TryFutureExt;
use reqwest::{
    Request, StatusCode,
    header::{
        ACCEPT, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
        USER_AGENT,
    },
};
use rustls::ClientConfig;
use tokio::time::{Instant, timeout_at};

#[cfg(any(fuzzing, test))]
pub(crate) use self::answer::parse_retry_after;
pub use self::{addresses::Addresses, endpoint::Endpoint, id::Ids};
use self::{
    endpoint::{met_dead_connection, was_refused},
    id::header,
    secrets::Secrets,
    signing::SigningKey,
};
use crate::{
    config::{self, PassHeaders},
    source::Delivery,
    tls,
};

const AGENT: &str = concat!("nats-webhook-relay/", env!("CARGO_PKG_VERSION"));
const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
const NATS_SUBJECT: HeaderName = HeaderName::from_static("x-nats-subject");

/// The message headers that are always passed on. No other is unless the settings name it: a publisher must not
/// be able to set, say, `Authorization`.
const PASSED_ON: [HeaderName; 3] = [
    CONTENT_TYPE,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
];

/// Where and how to POST.
pub struct Webhook {
    destinations: Vec<Destination>,
    timeout: Duration,
    signing_keys: Vec<SigningKey>,
    sent_secrets: Secrets,
    /// The statuses for which the relay gives up, if not the usual ones.
    give_up_on: Option<Vec<RangeInclusive<u16>>>,
    pass_headers: PassHeaders,
}

/// One destination.
pub struct Destination {
    /// Its URL without secrets.
    pub url: config::Destination,
    /// How it is reached.
    pub reach: Reach,
    /// Whether a warning about an HTML page was logged.
    warned_of_html: AtomicBool,
    /// The part that all requests to it have in common, with a placeholder for each header that differs, so that a
    /// copy never has to grow.
    template: Request,
}

/// How a destination is reached.
pub enum Reach {
    /// By its name, at any of its addresses.
    Name(Endpoint),
    /// At every address of its name, each of which is a destination of its own.
    EveryAddress(Addresses),
}

/// Why an attempt did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// Another attempt may succeed.
    Temporary {
        /// What happened, without secrets.
        reason: String,
        /// The status of the response, if there was one.
        status: Option<StatusCode>,
        /// The shortest wait before the next attempt, if the destination asks for one.
        retry_after: Option<Duration>,
        /// Whether there was no connection, because it was refused or there is no route.
        is_refused: bool,
    },
    /// No further attempt can succeed.
    Permanent {
        /// What happened, without secrets.
        reason: String,
        /// The status of the response.
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
        let tls = tls::client_config(config)?;
        let destinations = config
            .destinations
            .iter()
            .map(|destination| Destination::new(destination, config, tls.as_ref()))
            .collect::<anyhow::Result<_>>()?;
        Ok(Self {
            destinations,
            timeout: config.timeout,
            signing_keys: config.signing_keys.iter().map(SigningKey::new).collect(),
            sent_secrets: Secrets::of(config),
            give_up_on: config.give_up_on.clone(),
            pass_headers: config.pass_headers.clone(),
        })
    }

    /// Returns the destinations.
    #[must_use]
    pub fn destinations(&self) -> &[Destination] {
        &self.destinations
    }

    /// Makes one attempt to POST a message.
    ///
    /// # Errors
    /// If the destination did not respond with success in time.
    pub fn post(
        &self,
        destination: &Destination,
        endpoint: &Endpoint,
        delivery: &Delivery,
        id: &HeaderValue,
    ) -> impl Future<Output = Result<StatusCode, Failure>> {
        let posted = self.try_to_post(destination, endpoint, delivery, id);
        posted.map_err(|mut failure| {
            // Some destinations quote what they were sent.
            let (Failure::Temporary { reason, .. } | Failure::Permanent { reason, .. }) =
                &mut failure;
            *reason = self.sent_secrets.redact(reason).into_owned();
            failure
        })
    }

    async fn try_to_post(
        &self,
        destination: &Destination,
        endpoint: &Endpoint,
        delivery: &Delivery,
        id: &HeaderValue,
    ) -> Result<StatusCode, Failure> {
        let start = Instant::now();
        let deadline = start + self.timeout;
        let (response, is_last) = loop {
            let was_idle = endpoint.is_idle.swap(false, Relaxed);
            let is_last = endpoint.is_last_use(was_idle, start);
            let mut request = self.request(destination, delivery, id);
            if is_last {
                let headers = request.headers_mut();
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            match timeout_at(deadline, endpoint.client.execute(request)).await {
                Ok(Ok(response)) => break (response, is_last),
                // The destination closed the connection as the request went out, and never saw the request.
                Ok(Err(error)) if was_idle && met_dead_connection(&error) => {}
                Ok(Err(error)) => {
                    return Err(Failure::Temporary {
                        is_refused: was_refused(&error),
                        reason: destination.describe(error),
                        status: None,
                        retry_after: None,
                    });
                }
                Err(_) => return Err(temporary(format!("no answer within {:?}", self.timeout))),
            }
        };
        let (status, is_whole) = self.judge(destination, response, deadline).await?;
        endpoint.is_idle.store(is_whole && !is_last, Relaxed);
        Ok(status)
    }

    fn request(&self, destination: &Destination, delivery: &Delivery, id: &HeaderValue) -> Request {
        let Destination { template, .. } = destination;
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
        if !self.pass_headers.is_empty() {
            self.pass_headers(delivery, headers);
        }
        match HeaderValue::from_bytes(delivery.subject.as_bytes()) {
            Ok(subject) => headers.insert(NATS_SUBJECT, subject),
            // It has a control character, which no HTTP header can contain.
            Err(_) => headers.remove(NATS_SUBJECT),
        };
        headers.insert(WEBHOOK_ID, id.clone());
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        headers.insert(WEBHOOK_TIMESTAMP, now.into());
        let signatures: Vec<_> = self
            .signing_keys
            .iter()
            .map(|secret| secret.sign(id.as_bytes(), now, &delivery.payload))
            .collect();
        if !signatures.is_empty()
            && let Ok(signatures) = HeaderValue::from_str(&signatures.join(" "))
        {
            headers.insert(WEBHOOK_SIGNATURE, signatures);
        }
        // The HTTP client leaves it out if there is no body, and some servers insist on it
        // (RFC 9110, 8.6).
        headers.insert(CONTENT_LENGTH, delivery.payload.len().into());
        *request.body_mut() = Some(delivery.payload.clone().into());
        request
    }
}

impl Webhook {
    /// Adds the message headers that the settings name, except those that the relay sets itself.
    fn pass_headers(&self, delivery: &Delivery, headers: &mut HeaderMap) {
        for (name, values) in delivery.headers.iter() {
            let Ok(name) = HeaderName::try_from(AsRef::<str>::as_ref(name)) else {
                continue;
            };
            if self.pass_headers.contains(name.as_str()) && !headers.contains_key(&name) {
                for value in values {
                    if let Ok(value) = HeaderValue::from_str(value.as_str()) {
                        headers.append(&name, value);
                    }
                }
            }
        }
    }
}

impl Destination {
    fn new(
        url: &config::Destination,
        config: &config::Webhook,
        tls: Option<&ClientConfig>,
    ) -> anyhow::Result<Self> {
        let endpoint = Endpoint::new(url, tls, None)?;
        // This turns the login in the URL into a header.
        let template = endpoint.client.post(url.secret_url.clone()).build();
        let mut template = template
            .map_err(reqwest::Error::without_url)
            .with_context(|| format!("cannot POST to {url}"))?;
        let headers = template.headers_mut();
        for (name, value) in &config.headers {
            headers.entry(name).or_insert_with(|| value.clone());
        }
        for (name, value) in [
            (ACCEPT, "*/*"),
            (USER_AGENT, AGENT),
            (CONTENT_TYPE, "application/json"),
            (CONTENT_LENGTH, ""),
            (NATS_SUBJECT, ""),
            (WEBHOOK_ID, ""),
            (WEBHOOK_TIMESTAMP, ""),
        ] {
            headers
                .entry(name)
                .or_insert(HeaderValue::from_static(value));
        }
        let reach = match url.every_address {
            false => Reach::Name(endpoint),
            true => {
                let authority = config::authority(&url.secret_url);
                let (url, tls) = (url.clone(), tls.cloned());
                let open = move |address| Endpoint::new(&url, tls.as_ref(), Some(address));
                Reach::EveryAddress(Addresses::new(authority, config.timeout, Box::new(open)))
            }
        };
        Ok(Self {
            url: url.clone(),
            reach,
            warned_of_html: AtomicBool::new(false),
            template,
        })
    }

    /// Describes a failed request by its root cause, which is the most specific, and never contains the URL.
    fn describe(&self, error: reqwest::Error) -> String {
        let error = error.without_url();
        let mut cause: &dyn Error = &error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let cause = cause.to_string();
        let cause = tls::explain(&cause, "WEBHOOK").unwrap_or(cause);
        if !error.is_connect() {
            return format!("no valid answer: {cause}");
        }
        let server = config::authority(&self.url.secret_url);
        match self.url.proxy() {
            Some(proxy) => format!("cannot connect to {server} through the proxy {proxy}: {cause}"),
            None => format!("cannot connect to {server}: {cause}"),
        }
    }
}

/// Returns a temporary failure without a response.
#[must_use]
pub fn temporary(reason: String) -> Failure {
    Failure::Temporary {
        reason,
        status: None,
        retry_after: None,
        is_refused: false,
    }
}
