//! Interprets a response: success, the destination's fault or the message's, and how to fix it. Some destinations quote
//! the request, and then its secrets must not reach the log.

use std::{
    borrow::Cow,
    cmp::Reverse,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use log::warn;
use percent_encoding::percent_decode_str;
use reqwest::{
    Response, StatusCode, Url,
    header::{CONTENT_TYPE, LOCATION, RETRY_AFTER},
};
use tokio::time::{Instant, timeout_at};

use super::{Destination, Failure, Webhook};
use crate::{config, text};

/// The longest `Retry-After` that is honoured.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);

/// How long to wait for the body of a response, whose meaning is known without it.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);

/// How much of a body is read, so that its connection can be used again.
const READ_BYTES: usize = 64 * 1024;

/// How many characters of a body are shown.
const EXCERPT: usize = 200;

/// Statuses for which the destination or the settings are at fault, not the message.
const TEMPORARY: [u16; 9] = [401, 403, 404, 405, 407, 408, 421, 425, 429];

impl Webhook {
    /// Judges a response. Returns its outcome, and whether its connection can be used again.
    pub(super) async fn judge(
        &self,
        destination: &Destination,
        mut response: Response,
        deadline: Instant,
    ) -> Result<(StatusCode, bool), Failure> {
        let deadline = deadline.min(Instant::now() + BODY_TIMEOUT);
        let (body, is_whole) = read(&mut response, READ_BYTES, deadline).await;
        let (status, headers) = (response.status(), response.headers());
        if status.is_success() {
            let content_type = headers.get(CONTENT_TYPE);
            let is_html = content_type.is_some_and(|it| it.as_bytes().starts_with(b"text/html"));
            // A login page succeeds without being the handler.
            if is_html && !destination.warned_of_html.swap(true, Relaxed) {
                warn!(
                    "{} answered {status} with an HTML page, which counts as success; is it the handler, or a \
                     login page?",
                    destination.url
                );
            }
            // The message has arrived, no matter whether the rest of the response does.
            return Ok((status, is_whole));
        }
        let header = |name| headers.get(name)?.to_str().ok();
        let retry_after = header(RETRY_AFTER);
        let retry_after = retry_after.and_then(|text| parse_retry_after(text, SystemTime::now()));
        let target = header(LOCATION).filter(|_| status.is_redirection());
        let (target, hint) = target
            .and_then(|target| self.redirect(&destination.url.secret_url, target))
            .unwrap_or((String::new(), hint(status)));
        let excerpt = self.sent_secrets.excerpt(&body, is_whole);
        Err(Failure {
            reason: format!("answered {status}{target}{excerpt}{hint}"),
            status: Some(status.as_u16()),
            retry_after: retry_after.unwrap_or_default(),
            is_unreachable: false,
            is_permanent: self.gives_up_on(status),
        })
    }

    fn gives_up_on(&self, status: StatusCode) -> bool {
        match &self.give_up_on {
            Some(statuses) => statuses
                .iter()
                .any(|range| range.contains(&status.as_u16())),
            None => status.is_client_error() && !TEMPORARY.contains(&status.as_u16()),
        }
    }

    /// Describes the target of a redirect, which is never followed, with a hint.
    fn redirect(&self, own: &Url, location: &str) -> Option<(String, &'static str)> {
        let target = own.join(location).ok()?;
        // URLs without a host, such as mailto: or data:, may be unsafe to show.
        let target = Some(target).filter(Url::has_host)?;
        let path = |url: &Url| url.path().trim_end_matches('/').to_lowercase();
        let is_login = |word: &str| path(&target).contains(word);
        let hint = if own.host() == target.host() && path(own) == path(&target) {
            "; redirects are not followed; set WEBHOOK_DESTINATION to it"
        } else if ["login", "signin", "sign-in", "auth", "sso"]
            .into_iter()
            .any(is_login)
        {
            "; it requires a login: does the route need an exemption?"
        } else {
            "; redirects are not followed; check WEBHOOK_DESTINATION, and whether the route needs an exemption"
        };
        let target = config::without_secrets(&target);
        let target = self.sent_secrets.redact(&target);
        let target = text::one_line(&target, text::LONGEST_PIECE);
        Some((format!(" to {target}"), hint))
    }
}

/// Returns a hint for a status for which the destination or the settings are at fault.
fn hint(status: StatusCode) -> &'static str {
    match status.as_u16() {
        300..=399 => "; redirects are not followed; check WEBHOOK_DESTINATION",
        401 | 403 => "; check the secret on both sides",
        404 | 405 => "; check the path in WEBHOOK_DESTINATION, and whether the route is deployed",
        407 => "; check the login in the URL of the proxy",
        421 => "; check the host in WEBHOOK_DESTINATION",
        _ => "",
    }
}

/// Reads the body of a response, up to a size and a deadline. Returns it, and whether it is complete; a
/// truncated body is fine.
async fn read(response: &mut Response, bound: usize, deadline: Instant) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    while body.len() < bound {
        match timeout_at(deadline, response.chunk()).await {
            Ok(Ok(Some(chunk))) => {
                let fits = chunk.len().min(bound - body.len());
                body.extend_from_slice(&chunk[..fits]);
            }
            Ok(Ok(None)) => return (body, true),
            _ => break,
        }
    }
    (body, false)
}

/// Returns the wait that a `Retry-After` header asks for, in seconds or as a date (RFC 9110, 10.2.3).
pub(crate) fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let wait = match value.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = httpdate::parse_http_date(value.trim()).ok()?;
            date.duration_since(now).unwrap_or_default()
        }
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

/// The shortest secret. Redacting shorter text would make other text unreadable.
const SHORTEST: usize = 4;

/// The secrets that the relay sends, in every form in which they are sent; the longest comes first.
#[derive(Default)]
pub(super) struct Secrets(Vec<String>);

impl Secrets {
    pub(super) fn of(config: &config::Webhook) -> Self {
        let mut secrets = Self::default();
        for destination in &config.destinations {
            secrets.add_url(&destination.secret_url);
            if let Some(proxy) = &destination.secret_proxy {
                secrets.add_url(proxy);
            }
        }
        for value in config.headers.values() {
            let value = String::from_utf8_lossy(value.as_bytes());
            // As in `Bearer <token>`.
            secrets.add(value.split_once(' ').map_or("", |(_, rest)| rest));
            secrets.add(&value);
        }
        // A secret that contains another one goes first, so that no part of it remains.
        secrets.0.sort_by_key(|secret| Reverse(secret.len()));
        secrets
    }

    /// Adds the login and the query of a URL.
    fn add_url(&mut self, url: &Url) {
        let password = url.password().unwrap_or_default();
        self.add(password);
        let login = format!("{}:{}", decode(url.username()), decode(password));
        if login != ":" {
            self.add(&STANDARD.encode(login));
        }
        let query = url.query().unwrap_or_default();
        self.add(query);
        for pair in query.split('&') {
            self.add(pair.split_once('=').map_or(pair, |(_, value)| value));
        }
    }

    /// Adds a secret, and its decoded form.
    fn add(&mut self, secret: &str) {
        for form in [secret, &decode(secret)] {
            if form.len() >= SHORTEST {
                self.0.push(form.to_owned());
            }
        }
    }

    /// Redacts all secrets in a text.
    fn redact<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut text = Cow::Borrowed(text);
        for secret in &self.0 {
            if text.contains(secret) {
                text = Cow::Owned(text.replace(secret, "***"));
            }
        }
        text
    }

    /// Returns the beginning of a body for the end of a log line.
    fn excerpt(&self, body: &[u8], is_whole: bool) -> String {
        let body = String::from_utf8_lossy(body);
        let body = self.redact(&body);
        // A body that was cut may end in the beginning of a secret.
        let unsafe_end = match is_whole {
            true => 0,
            false => self.0.first().map_or(0, String::len),
        };
        let end = body.len().saturating_sub(unsafe_end);
        let safe = body.char_indices().take_while(|(index, _)| *index < end);
        let beginning: String = safe.take(EXCERPT).map(|(_, character)| character).collect();
        match text::one_line(&beginning, text::LONGEST_PIECE).trim() {
            "" => String::new(),
            line => format!(": {line}"),
        }
    }
}

fn decode(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::{convert::Infallible, time::UNIX_EPOCH};

    use bytes::Bytes;
    use futures::stream;
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use reqwest::Body;

    #[tokio::test]
    async fn a_body_is_read_up_to_its_bound_however_it_is_cut() {
        for (bound, expected) in [(2, "ab"), (5, "abcde"), (7, "abcdefg"), (100, "abcdefghij")] {
            let chunks = ["abc", "defg", "hij"].map(|chunk| {
                Ok::<_, Infallible>(Frame::data(Bytes::from_static(chunk.as_bytes())))
            });
            let body = Body::wrap(StreamBody::new(stream::iter(chunks)));
            let deadline = Instant::now() + Duration::from_secs(10);
            let mut response = hyper::Response::new(body).into();
            let read = read(&mut response, bound, deadline).await;
            let is_whole = bound == 100;
            assert_eq!(read, (expected.into(), is_whole), "{bound}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_bounded() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777); // Sun, 06 Nov 1994 08:49:37 GMT
        for (value, seconds) in [
            ("0", Some(0)),
            (" 7 ", Some(7)),
            ("3600", Some(60)),
            ("99999999999999999999999", None),
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
        let excerpt = |body: &str| Secrets::default().excerpt(body.as_bytes(), true);
        assert_eq!(
            excerpt("no\r\n\x1b[31mway\u{fffd}"),
            ": no   [31mway\u{fffd}"
        );
        assert_eq!(excerpt(" \n"), "");
        assert_eq!(excerpt(&"\u{e4}".repeat(200)).chars().count(), 202);
    }

    /// Returns the secrets sent to a destination, with this in `WEBHOOK_HEADER_AUTHORIZATION`.
    fn sent(url: &str, authorization: &str) -> Secrets {
        let variables = [
            ("WEBHOOK_DESTINATION", url),
            ("WEBHOOK_HEADER_AUTHORIZATION", authorization),
            ("NATS_HOST", "nats://localhost"),
            ("NATS_SUBJECT_PREFIX", "a"),
            ("NATS_RELAYED_SUBJECT_PREFIX", "b"),
        ];
        let config = config::Config::from_environment(&variables.into_iter().collect());
        Secrets::of(&config.unwrap().webhook)
    }

    #[test]
    fn secrets_that_were_sent_are_redacted_in_each_form() {
        let url = "http://user:p%C3%A4ssword@host/?key=s%20ecret&plain=hunter2&x=1";
        let secrets = sent(url, "Bearer token-1234");
        for (text, expected) in [
            ("no such page", "no such page"),
            ("bad p%C3%A4ssword", "bad ***"),
            ("bad pässword", "bad ***"),
            // user:pässword
            ("got Basic dXNlcjpww6Rzc3dvcmQ=", "got Basic ***"),
            ("POST /?key=s%20ecret&plain=hunter2&x=1", "POST /?***"),
            ("key is s ecret, or s%20ecret", "key is ***, or ***"),
            ("plain: hunter2", "plain: ***"),
            ("x: 1", "x: 1"),
            ("Bearer token-1234, token-1234", "***, ***"),
        ] {
            assert_eq!(secrets.redact(text), expected);
        }
    }

    #[test]
    fn the_beginning_of_a_secret_is_no_part_of_an_excerpt() {
        let secrets = sent("http://host/", "token-1234");
        for (cut, expected) in [
            ("it was token-1234, or token-123", ": it was ***, or"),
            ("token-123", ""),
            ("it was not even begun", ": it was not"),
        ] {
            assert_eq!(secrets.excerpt(cut.as_bytes(), false), expected);
            let whole = secrets.excerpt(cut.as_bytes(), true);
            assert!(whole.len() > expected.len(), "{whole}");
        }
    }

    #[test]
    fn a_user_without_a_password_is_a_login_too() {
        // api-key:
        let answer = "got Basic YXBpLWtleTo=";
        assert_eq!(
            sent("http://api-key@host", "").redact(answer),
            "got Basic ***"
        );
        assert!(sent("http://host", "").0.is_empty());
    }
}
