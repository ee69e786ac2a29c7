//! Signatures according to Standard Webhooks
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>,
//! "Signature scheme": symmetric, `v1`).

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::hmac;
use secrecy::{ExposeSecret, SecretSlice};

/// A key to sign with.
pub(super) struct SigningKey(hmac::Key);

impl SigningKey {
    pub(super) fn new(key: &SecretSlice<u8>) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key.expose_secret()))
    }

    /// Returns the signature of a request: `v1,` and base64.
    pub(super) fn sign(&self, id: &[u8], timestamp: u64, payload: &[u8]) -> String {
        let mut signed = hmac::Context::with_key(&self.0);
        signed.update(id);
        signed.update(format!(".{timestamp}.").as_bytes());
        signed.update(payload);
        format!("v1,{}", STANDARD.encode(signed.sign()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn key(text: &str) -> SigningKey {
        SigningKey::new(&STANDARD.decode(text).unwrap().into())
    }

    /// The example of the specification, as its reference libraries test it.
    #[test]
    fn signs_the_example_of_the_specification() {
        let secret = key("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        assert_eq!(
            secret.sign(
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
                key(text).sign(b"id", 17, payload.as_bytes()),
                other.sign("id", 17, payload.as_bytes()).unwrap()
            );
        }
    }
}
