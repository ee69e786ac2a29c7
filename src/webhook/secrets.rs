//! The secrets that the relay sends to destinations. Some destinations quote the request in their response, and then
//! these secrets must not reach the log.

use std::borrow::Cow;

use base64::{Engine, engine::general_purpose::STANDARD};
use percent_encoding::percent_decode_str;
use reqwest::Url;

use crate::config;

/// The shortest secret. To redact shorter text would make other text unreadable.
const SHORTEST: usize = 4;

/// Replaces a secret.
const BLOT: &str = "***";

/// Secrets in every form in which they are sent.
#[derive(Default)]
pub struct Secrets(Vec<String>);

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
        secrets
            .0
            .sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        secrets.0.dedup();
        secrets
    }

    /// Adds the login and the query of a URL.
    fn add_url(&mut self, url: &Url) {
        let password = url.password().unwrap_or_default();
        self.add(password);
        let (user, decoded) = (decode(url.username()), decode(password));
        if url.password().is_some() || !user.is_empty() {
            self.add(&STANDARD.encode(format!("{user}:{decoded}")));
        }
        self.add(url.query().unwrap_or_default());
        for (_, value) in url.query_pairs() {
            self.add(&value);
        }
        for pair in url.query().unwrap_or_default().split('&') {
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
    #[must_use]
    pub fn redact<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut text = Cow::Borrowed(text);
        for secret in &self.0 {
            if text.contains(secret) {
                text = Cow::Owned(text.replace(secret, BLOT));
            }
        }
        text
    }

    /// Redacts all secrets in a text that was cut, and so may end in the beginning of a secret.
    pub(super) fn redact_cut<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let text = self.redact(text);
        let begins_at = |secret: &String| {
            let lengths = (1..=secret.len().min(text.len())).rev();
            let mut begun = lengths.filter_map(|length| secret.get(..length));
            Some(text.len() - begun.find(|begun| text.ends_with(begun))?.len())
        };
        match self.0.iter().filter_map(begins_at).min() {
            Some(end) => Cow::Owned(format!("{}{BLOT}", &text[..end])),
            None => text,
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
    fn what_was_sent_is_blotted_out_in_each_form() {
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
        for (cut, expected) in [
            ("key is s ecret, or hunt", "key is ***, or ***"),
            ("nothing", "nothing"),
            ("Bearer toke", "***"),
        ] {
            assert_eq!(secrets.redact_cut(cut), expected);
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
