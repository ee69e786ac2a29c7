//! TLS: whom to trust, and what a failure means in words.

use anyhow::bail;
use rustls::{ClientConfig, RootCertStore};
use rustls_native_certs::{load_certs_from_paths, load_native_certs};

use crate::config::{self, Destination};

/// Makes the one provider of cryptography known to everything in the process that speaks TLS.
pub fn install_provider() {
    // It is set already where there are several relays in one process, and that is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// What a client needs on the way to https destinations, if there are any. It trusts the CAs that the
/// configuration names, or else the system's.
///
/// # Errors
/// If there is no CA to trust.
pub fn client_config(config: &config::Webhook) -> anyhow::Result<Option<ClientConfig>> {
    // Without https there is no need to read the system's trust store into memory.
    if !config.destinations.iter().any(Destination::needs_tls) {
        return Ok(None);
    }
    let found = match &config.trust {
        Some(file) => load_certs_from_paths(Some(file), None),
        None => load_native_certs(),
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let reasons: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
        bail!(
            "there is no CA to trust, and so no https; install the system's CA certificates, or name \
             a PEM file in SSL_CERT_FILE ({})",
            reasons.join("; ")
        );
    }
    Ok(Some(
        ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth(),
    ))
}

/// What the text of an error of the TLS library means, and what to do about it; nothing if it says so
/// itself. `ca` is the variable that names the CAs to trust, `plain` the scheme without TLS.
///
/// It goes by the text because the NATS client hands out nothing else.
#[must_use]
pub fn explain(error: &str, ca: &str, plain: &str) -> Option<String> {
    let is = |part| error.contains(part);
    // A bad signature is that of another CA of the same name.
    if is("UnknownIssuer") || is("BadSignature") {
        return Some(format!(
            "its certificate is signed by a CA that is not trusted; name the PEM file of that CA in {ca}"
        ));
    }
    if is("CaUsedAsEndEntity") {
        return Some(format!(
            "its certificate is that of a CA, which no server may use; give the server a certificate \
             signed by the CA, and name the CA in {ca}"
        ));
    }
    if is("certificate expired") || is("Expired") {
        return Some("its certificate has expired; renew it".to_owned());
    }
    if is("certificate not valid yet") || is("NotValidYet") {
        return Some("its certificate is not valid yet; check the clocks".to_owned());
    }
    if is("CertificateRequired") {
        return Some("it demands a client certificate".to_owned());
    }
    if is("InvalidContentType") {
        return Some(format!(
            "it does not speak TLS there; check host and port, or write {plain}://"
        ));
    }
    if is("tls handshake eof") {
        return Some(format!(
            "it hung up during the TLS handshake; check host and port, or write {plain}://"
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{
        AlertDescription, CertificateError, Error, InvalidMessage, OtherError, pki_types::UnixTime,
    };
    use std::{fmt, sync::Arc, time::Duration};

    /// Named like the verifier's, of which the library shows the name alone.
    #[derive(Debug)]
    struct CaUsedAsEndEntity;

    impl fmt::Display for CaUsedAsEndEntity {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            fmt::Debug::fmt(self, f)
        }
    }

    impl std::error::Error for CaUsedAsEndEntity {}

    #[test]
    fn what_the_library_says_is_put_into_words() {
        let time = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let other = OtherError(Arc::new(CaUsedAsEndEntity));
        for (error, words) in [
            (
                CertificateError::UnknownIssuer.into(),
                "name the PEM file of that CA in CA_FILE",
            ),
            (CertificateError::Other(other).into(), "is that of a CA"),
            (CertificateError::Expired.into(), "has expired"),
            (
                CertificateError::ExpiredContext {
                    time: time(2),
                    not_after: time(1),
                }
                .into(),
                "has expired",
            ),
            (
                CertificateError::NotValidYetContext {
                    time: time(1),
                    not_before: time(2),
                }
                .into(),
                "check the clocks",
            ),
            (
                Error::AlertReceived(AlertDescription::CertificateRequired),
                "client certificate",
            ),
            (
                Error::InvalidMessage(InvalidMessage::InvalidContentType),
                "write nats://",
            ),
        ] {
            let explained = explain(&error.to_string(), "CA_FILE", "nats");
            assert!(
                explained.as_ref().is_some_and(|text| text.contains(words)),
                "{error}: {explained:?}"
            );
        }
        assert_eq!(explain("Connection refused (os error 111)", "", ""), None);
    }
}
