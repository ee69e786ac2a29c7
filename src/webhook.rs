//! One attempt to POST: success, a temporary failure (maybe with a wait) or a permanent one.
//!
//! Headers and signatures (symmetric, `v1`) follow Standard Webhooks
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>).

mod answer;
mod destination;

use std::{
    borrow::Cow,
    ops::RangeInclusive,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_nats::header::NATS_MESSAGE_ID;
use base64::{Engine, engine::general_purpose::STANDARD};
use reqwest::{
    Method, Request, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue, MaxSizeReached},
};
use ring::hmac;
use secrecy::ExposeSecret;
use tokio::time::{Instant, timeout_at};

#[cfg(any(fuzzing, test))]
pub(crate) use self::answer::parse_retry_after;
pub use self::destination::{Destination, Endpoint};
use self::{answer::Secrets, destination::met_dead_connection};
use crate::{
    config::{self, PassHeaders},
    source::Delivery,
    tls,
};

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

/// How long a connection is used, so that the relay follows a name that has moved.
const LONGEST_USE: Duration = Duration::from_secs(30);

/// The longest `Nats-Msg-Id` that serves as a `webhook-id`.
const LONGEST_ID: usize = 256;

/// Where and how to POST.
pub struct Webhook {
    /// Where; at least one.
    pub destinations: Vec<Destination>,
    /// How long an attempt may take.
    pub timeout: Duration,
    signing_keys: Vec<hmac::Key>,
    sent_secrets: Secrets,
    /// The statuses for which the relay gives up, if not the usual ones.
    give_up_on: Option<Vec<RangeInclusive<u16>>>,
    pass_headers: PassHeaders,
}

/// Why an attempt did not succeed.
#[derive(Debug)]
pub struct Failure {
    /// What happened, without secrets.
    pub reason: String,
    /// The status of the response, if there was one.
    pub status: Option<u16>,
    /// The shortest wait before another attempt, which the destination may ask for.
    pub retry_after: Duration,
    /// Whether there was no connection.
    pub is_unreachable: bool,
    /// Whether no further attempt can succeed.
    pub is_permanent: bool,
}

impl Failure {
    /// Returns a temporary failure without a response.
    fn temporary(reason: String) -> Self {
        Self {
            reason,
            status: None,
            retry_after: Duration::ZERO,
            is_unreachable: false,
            is_permanent: false,
        }
    }
}

impl Webhook {
    /// Prepares requests to the configured destinations; sends nothing.
    ///
    /// # Errors
    /// If TLS can't be set up.
    pub fn new(config: &config::Webhook) -> anyhow::Result<Self> {
        tls::install_provider();
        let tls = tls::client_config(config)?;
        let destinations = config.destinations.iter();
        let destinations = destinations.map(|url| Destination::new(url, config, tls.as_ref()));
        let keys = config.signing_keys.iter();
        let keys = keys.map(|key| hmac::Key::new(hmac::HMAC_SHA256, key.expose_secret()));
        Ok(Self {
            destinations: destinations.collect::<anyhow::Result<_>>()?,
            timeout: config.timeout,
            signing_keys: keys.collect(),
            sent_secrets: Secrets::of(config),
            give_up_on: config.give_up_on.clone(),
            pass_headers: config.pass_headers.clone(),
        })
    }

    /// Makes one attempt to POST a message.
    ///
    /// # Errors
    /// If the destination did not respond with success in time.
    pub async fn post(
        &self,
        destination: &Destination,
        endpoint: &Endpoint,
        delivery: &Delivery,
        id: &HeaderValue,
    ) -> Result<StatusCode, Failure> {
        let start = Instant::now();
        let deadline = start + self.timeout;
        let (response, opened, is_last) = loop {
            let waiting = endpoint.waiting.lock().take();
            let opened = waiting.unwrap_or(start);
            let is_last = start - opened >= LONGEST_USE;
            let request = self.request(&destination.template, delivery, id);
            let mut request = request.map_err(|_| Failure {
                is_permanent: true,
                ..Failure::temporary("it has more headers than a request can carry".to_owned())
            })?;
            if is_last {
                let headers = request.headers_mut();
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            match timeout_at(deadline, endpoint.client.execute(request)).await {
                Ok(Ok(response)) => break (response, opened, is_last),
                // The destination closed the connection as the request went out, and presumably never saw the request.
                Ok(Err(error)) if waiting.is_some() && met_dead_connection(&error) => {}
                Ok(Err(error)) => return Err(destination.failure(error)),
                Err(_) => {
                    let reason = format!("no answer within {:?}", self.timeout);
                    return Err(Failure::temporary(reason));
                }
            }
        };
        let (status, is_whole) = self.judge(destination, response, deadline).await?;
        if is_whole && !is_last {
            *endpoint.waiting.lock() = Some(opened);
        }
        Ok(status)
    }

    /// Returns the request for a message.
    ///
    /// # Errors
    /// If the message has more headers that are passed on than fit into one.
    fn request(
        &self,
        template: &Request,
        delivery: &Delivery,
        id: &HeaderValue,
    ) -> Result<Request, MaxSizeReached> {
        let mut request = Request::new(Method::POST, template.url().clone());
        let headers = request.headers_mut();
        headers.clone_from(template.headers());
        // A subject with a control character can't be in any HTTP header.
        if let Ok(subject) = HeaderValue::from_bytes(delivery.subject.as_bytes()) {
            headers.insert(NATS_SUBJECT, subject);
        }
        headers.insert(WEBHOOK_ID, id.clone());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        headers.insert(WEBHOOK_TIMESTAMP, now.into());
        if !self.signing_keys.is_empty() {
            let keys = self.signing_keys.iter();
            let signatures = keys.map(|key| sign(key, id.as_bytes(), now, &delivery.payload));
            let signatures = signatures.collect::<Vec<_>>().join(" ");
            if let Ok(signatures) = HeaderValue::try_from(signatures) {
                headers.insert(WEBHOOK_SIGNATURE, signatures);
            }
        }
        // The HTTP client leaves it out if there is no body, and some servers insist on it
        // (RFC 9110, 8.6).
        headers.insert(CONTENT_LENGTH, delivery.payload.len().into());
        for (name, values) in delivery.headers.iter() {
            let Ok(name) = HeaderName::from_bytes(name.as_ref()) else {
                continue;
            };
            let is_listed = || self.pass_headers.contains(name.as_str());
            if PASSED_ON.contains(&name) || (is_listed() && !template.headers().contains_key(&name))
            {
                for value in values {
                    if let Ok(value) = HeaderValue::from_str(value.as_str()) {
                        headers.try_append(&name, value)?;
                    }
                }
            }
        }
        if !headers.contains_key(CONTENT_TYPE) {
            let json = HeaderValue::from_static("application/json");
            headers.try_insert(CONTENT_TYPE, json)?;
        }
        *request.body_mut() = Some(delivery.payload.clone().into());
        Ok(request)
    }
}

/// Returns the signature of a request: `v1,` and base64.
fn sign(key: &hmac::Key, id: &[u8], timestamp: u64, payload: &[u8]) -> String {
    let mut signed = hmac::Context::with_key(key);
    signed.update(id);
    signed.update(format!(".{timestamp}.").as_bytes());
    signed.update(payload);
    format!("v1,{}", STANDARD.encode(signed.sign()))
}

/// The ids of a message, the same on every attempt.
pub struct Ids<'a> {
    /// Its `Nats-Msg-Id`, else its position in its stream, else a random one.
    pub message: Cow<'a, str>,
    /// The same if it can be signed, else its position, else a random one.
    pub webhook: HeaderValue,
}

impl<'a> Ids<'a> {
    /// Returns the ids of this message.
    #[must_use]
    pub fn of(delivery: &'a Delivery) -> Self {
        let mut headers = delivery.headers.iter();
        // Some libraries write it in lower case.
        let own = headers.find(|(name, _)| {
            AsRef::<str>::as_ref(*name).eq_ignore_ascii_case(NATS_MESSAGE_ID.as_ref())
        });
        let own = own.and_then(|(_, values)| Some(values.first()?.as_str()));
        let own = own.filter(|id| !id.is_empty());
        let other = || match &delivery.ack {
            Some(ack) => ack.id(),
            None => format!("msg_{:032x}", fastrand::u128(..)),
        };
        let message = own.map_or_else(|| Cow::from(other()), Cow::from);
        let webhook = match own.filter(|id| id.len() <= LONGEST_ID && !id.contains(is_unsignable)) {
            Some(id) => HeaderValue::try_from(id),
            None if own.is_some() => HeaderValue::try_from(other().replace(is_unsignable, "_")),
            // A stream's name may have any characters.
            None => HeaderValue::try_from(message.replace(is_unsignable, "_")),
        };
        Self {
            message,
            // This never fails, because all of these are visible ASCII.
            webhook: webhook.unwrap_or(HeaderValue::from_static("msg")),
        }
    }
}

/// Returns whether an id with this character can't be signed: the signed text is `id.timestamp.payload`, so that a dot
/// in the id would make it ambiguous (Standard Webhooks, "Signature scheme").
fn is_unsignable(character: char) -> bool {
    !character.is_ascii_graphic() || character == '.'
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn key(text: &str) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &STANDARD.decode(text).unwrap())
    }

    /// The example of the specification, as its reference libraries test it.
    #[test]
    fn signs_the_example_of_the_specification() {
        assert_eq!(
            sign(
                &key("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
                b"msg_p5jXN8AQM9LWM0D4loKWxJek",
                1_614_265_330,
                br#"{"test": 2432232314}"#
            ),
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
        );
    }

    #[test]
    fn another_implementation_agrees() {
        let text = "C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
        let other = standardwebhooks::Webhook::new(text).unwrap();
        for payload in ["", "{}", "äöü\0\r\n"] {
            assert_eq!(
                sign(&key(text), b"id", 17, payload.as_bytes()),
                other.sign("id", 17, payload.as_bytes()).unwrap()
            );
        }
    }

    #[test]
    fn an_id_that_cannot_be_signed_is_not_used() {
        for (id, is_used) in [
            ("msg_1-a", true),
            ("a.b", false),
            ("a b", false),
            ("ä", false),
            (&"x".repeat(257), false),
        ] {
            let mut headers = async_nats::HeaderMap::new();
            headers.insert(NATS_MESSAGE_ID, id);
            let delivery = Delivery {
                subject: "a.b".into(),
                headers,
                payload: Default::default(),
                ack: None,
                unrelayable: None,
            };
            let ids = Ids::of(&delivery);
            assert_eq!(ids.message, id);
            let webhook = ids.webhook.to_str().unwrap();
            assert_eq!(webhook == id, is_used, "{id:?}");
            assert_eq!(webhook.starts_with("msg_"), is_used || id != "msg_1-a");
        }
    }
}
