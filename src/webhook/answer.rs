//! What is read of an answer: its body within bounds, and how long it asks us to wait.

use std::time::{Duration, SystemTime};

use reqwest::{Response, header::RETRY_AFTER};
use tokio::time::{Instant, timeout_at};

use crate::text;

/// A longer `Retry-After` is not waited for.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);

/// The body of an answer, up to a bound and a deadline. What does not come is not missed.
pub(super) async fn read(mut response: Response, bound: usize, deadline: Instant) -> Vec<u8> {
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
pub(super) fn printable(bytes: &[u8]) -> String {
    let body = String::from_utf8_lossy(bytes);
    match text::one_line(&body, text::LONGEST_PIECE).trim() {
        "" => "(no body)".to_owned(),
        line => line.to_owned(),
    }
}

/// The wait that a `Retry-After` header asks for, in seconds or as a date (RFC 9110, 10.2.3).
pub(super) fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    parse_retry_after(value, SystemTime::now())
}

pub(crate) fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
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
            assert_eq!(read, expected.as_bytes(), "{bound}");
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
        assert_eq!(printable(b"no\r\n\x1b[31mway\xff"), "no   [31mway\u{fffd}");
        assert_eq!(printable(b" \n"), "(no body)");
    }
}
