//! Interprets a response: success, the destination's fault or the message's, and how to fix it.

use std::{
    sync::atomic::Ordering::Relaxed,
    time::{Duration, SystemTime},
};

use log::warn;
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

/// How much of a successful response is read so that its connection can be used again.
const DRAIN_BYTES: usize = 64 * 1024;

/// How much of any other response is read. Its secrets are redacted before it is cut to an excerpt.
const READ_BYTES: usize = 8 * 1024;

/// How many characters of any other response are shown.
const EXCERPT: usize = 200;

/// Statuses for which the destination or the settings are at fault, not the message.
const TEMPORARY: [u16; 9] = [401, 403, 404, 405, 407, 408, 421, 425, 429];

impl Webhook {
    /// Judges a response. Returns its outcome, and whether its connection can be used again.
    pub(super) async fn judge(
        &self,
        destination: &Destination,
        response: Response,
        deadline: Instant,
    ) -> Result<(StatusCode, bool), Failure> {
        let status = response.status();
        let deadline = deadline.min(Instant::now() + BODY_TIMEOUT);
        if status.is_success() {
            destination.warn_of_html(&response);
            // The message has arrived, no matter whether the rest of the response does.
            let (_, is_whole) = read(response, DRAIN_BYTES, deadline).await;
            return Ok((status, is_whole));
        }
        let retry_after = retry_after(&response);
        let (target, hint) = match status.is_redirection() {
            true => self.redirect(destination, &response),
            false => (String::new(), hint(status)),
        };
        let (body, is_whole) = read(response, READ_BYTES, deadline).await;
        let body = String::from_utf8_lossy(&body);
        let excerpt = excerpt(&match is_whole {
            true => self.sent_secrets.redact(&body),
            false => self.sent_secrets.redact_cut(&body),
        });
        let reason = format!("answered {status}{target}{excerpt}{hint}");
        if self.gives_up_on(status) {
            return Err(Failure::Permanent { reason, status });
        }
        Err(Failure::Temporary {
            reason,
            status: Some(status),
            retry_after,
            is_refused: false,
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

    /// Describes the target of a redirect, and how to fix it.
    fn redirect(&self, destination: &Destination, response: &Response) -> (String, &'static str) {
        let location = response.headers().get(LOCATION);
        let own = &destination.url.secret_url;
        let target = location
            .and_then(|location| own.join(location.to_str().ok()?).ok())
            // For example mailto: or data:, no part of which is known to be safe to show.
            .filter(Url::has_host);
        let Some(target) = target else {
            return (
                " without a usable Location".to_owned(),
                "; check WEBHOOK_DESTINATION",
            );
        };
        let hint = redirect_hint(own, &target);
        let target = config::without_secrets(&target);
        let target = self.sent_secrets.redact(&target);
        let target = text::one_line(&target, text::LONGEST_PIECE);
        (format!(" to {target}"), hint)
    }
}

impl Destination {
    /// Warns once about a success with an HTML page: a login page succeeds without being the handler.
    fn warn_of_html(&self, response: &Response) {
        let content_type = response.headers().get(CONTENT_TYPE);
        let is_html = content_type.is_some_and(|value| value.as_bytes().starts_with(b"text/html"));
        if is_html && !self.warned_of_html.swap(true, Relaxed) {
            warn!(
                "{} answered {} with an HTML page, which counts as success; is it the handler, or a login page?",
                self.url,
                response.status()
            );
        }
    }
}

/// Returns a hint for a redirect, which is never followed.
fn redirect_hint(own: &Url, target: &Url) -> &'static str {
    let path = |url: &Url| url.path().trim_end_matches('/').to_owned();
    let words = ["login", "signin", "sign-in", "auth", "sso"];
    let is_same = own.host() == target.host() && path(own) == path(target);
    if is_same {
        "; redirects are not followed; set WEBHOOK_DESTINATION to it"
    } else if words
        .iter()
        .any(|word| path(target).to_lowercase().contains(word))
    {
        "; it requires a login: does the route need an exemption?"
    } else {
        "; redirects are not followed: does the route need an exemption, or WEBHOOK_DESTINATION a different URL?"
    }
}

/// Returns a hint for a status for which the destination or the settings are at fault.
fn hint(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 | 403 => "; check the secret on both sides",
        404 | 405 => "; check the path in WEBHOOK_DESTINATION, and whether the route is deployed",
        407 => "; check the login in the URL of the proxy",
        421 => "; check the host in WEBHOOK_DESTINATION",
        _ => "",
    }
}

/// Reads the body of a response, up to a size and a deadline. Returns it, and whether it is complete; a
/// truncated body is fine.
async fn read(mut response: Response, bound: usize, deadline: Instant) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        match timeout_at(deadline, response.chunk()).await {
            Ok(Ok(Some(chunk))) => {
                let fits = chunk.len().min(bound - body.len());
                body.extend_from_slice(&chunk[..fits]);
                if body.len() == bound {
                    return (body, false);
                }
            }
            Ok(Ok(None)) => return (body, true),
            _ => return (body, false),
        }
    }
}

/// Returns the beginning of a body for the end of a log line.
fn excerpt(body: &str) -> String {
    let beginning: String = body.chars().take(EXCERPT).collect();
    match text::one_line(&beginning, text::LONGEST_PIECE).trim() {
        "" => String::new(),
        line => format!(": {line}"),
    }
}

/// Returns the wait that a `Retry-After` header asks for, in seconds or as a date (RFC 9110, 10.2.3).
fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    parse_retry_after(value, SystemTime::now())
}

pub(crate) fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number too large to parse is a long wait as well.
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
            let read = read(hyper::Response::new(body).into(), bound, deadline).await;
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
        assert_eq!(
            excerpt("no\r\n\x1b[31mway\u{fffd}"),
            ": no   [31mway\u{fffd}"
        );
        assert_eq!(excerpt(" \n"), "");
        assert_eq!(excerpt(&"\u{e4}".repeat(200)).chars().count(), 202);
    }

    #[test]
    fn the_hint_of_a_redirect_fits_its_target() {
        let own = "http://app.example/api/hook".parse().unwrap();
        for (target, words) in [
            (
                "http://app.example/api/hook/",
                "set WEBHOOK_DESTINATION to it",
            ),
            (
                "https://app.example/api/hook",
                "set WEBHOOK_DESTINATION to it",
            ),
            (
                "https://app.example/Login?next=/api/hook",
                "it requires a login",
            ),
            ("https://id.example/oauth2/authorize", "it requires a login"),
            (
                "http://app.example/en/api/hook",
                "does the route need an exemption, or",
            ),
        ] {
            let hint = redirect_hint(&own, &target.parse().unwrap());
            assert!(hint.contains(words), "{target}: {hint}");
        }
    }
}
