//! Signatures as Standard Webhooks has them
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>,
//! "Signature scheme": symmetric, `v1`).

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::hmac;

/// What every secret begins with.
const PREFIX: &str = "whsec_";

/// A secret to sign with. `Debug` does not show it.
#[derive(Clone)]
pub struct SigningSecret(hmac::Key);

impl SigningSecret {
    /// Reads `whsec_` and base64 of 24 to 64 bytes.
    ///
    /// # Errors
    /// A sentence fragment that says what is wrong, without the secret.
    pub fn parse(text: &str) -> Result<Self, String> {
        let encoded = text
            .strip_prefix(PREFIX)
            .ok_or("has an entry that does not start with whsec_; write whsec_ and base64")?;
        let key = STANDARD
            .decode(encoded)
            .map_err(|_| "has an entry that is not base64 after whsec_; write whsec_ and base64")?;
        if !(24..=64).contains(&key.len()) {
            return Err(format!(
                "has an entry of {} bytes; a secret has 24 to 64 bytes before it is put into base64",
                key.len()
            ));
        }
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &key)))
    }

    /// The signature of a request: `v1,` and base64.
    #[must_use]
    pub fn sign(&self, id: &[u8], timestamp: u64, payload: &[u8]) -> String {
        let mut signed = hmac::Context::with_key(&self.0);
        signed.update(id);
        signed.update(format!(".{timestamp}.").as_bytes());
        signed.update(payload);
        format!("v1,{}", STANDARD.encode(signed.sign()))
    }
}

impl fmt::Debug for SigningSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningSecret")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The example of the specification, as its reference libraries test it.
    #[test]
    fn signs_the_example_of_the_specification() {
        let secret = SigningSecret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
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
        let text = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
        let other = standardwebhooks::Webhook::new(text).unwrap();
        for payload in ["", "{}", "äöü\0\r\n"] {
            assert_eq!(
                SigningSecret::parse(text)
                    .unwrap()
                    .sign(b"id", 17, payload.as_bytes()),
                other.sign("id", 17, payload.as_bytes()).unwrap()
            );
        }
    }
}
