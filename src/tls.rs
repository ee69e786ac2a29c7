//! TLS: whom to trust, and what a failure means in words.

use anyhow::{Context, bail};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use rustls_native_certs::{load_certs_from_paths, load_native_certs};

use crate::config::{self, Destination, TlsNames, WEBHOOK_TLS};

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
    let found = match &config.tls.ca {
        Some(file) => load_certs_from_paths(Some(file), None),
        None => load_native_certs(),
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let reasons: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
        bail!(
            "there is no CA to trust, and so no https; install the system's CA certificates, or name \
             a PEM file in SSL_CERT_FILE or {} ({})",
            WEBHOOK_TLS.ca,
            reasons.join("; ")
        );
    }
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let Some((certificate, key)) = &config.tls.certificate else {
        return Ok(Some(builder.with_no_client_auth()));
    };
    let chain = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
    let chain = chain.with_context(|| format!("cannot read {}", WEBHOOK_TLS.certificate))?;
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("cannot read {}", WEBHOOK_TLS.key))?;
    builder
        .with_client_auth_cert(chain, key)
        .map(Some)
        .with_context(|| format!("cannot use {}", WEBHOOK_TLS.certificate))
}

/// What the text of an error of the TLS library means, and what to do about it; nothing if it says so
/// itself.
///
/// It goes by the text because the NATS client hands out nothing else.
#[must_use]
pub fn explain(error: &str, names: &TlsNames) -> Option<String> {
    if let Some((_, alert)) = error.split_once("received fatal alert: ") {
        return explain_alert(alert, names);
    }
    let TlsNames {
        ca,
        certificate,
        key,
        without_tls,
        ..
    } = names;
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
    if is("InvalidContentType") {
        return Some(format!(
            "it does not speak TLS there; check host and port, or {without_tls}"
        ));
    }
    if is("close_notify") {
        return Some("it hung up without an answer".to_owned());
    }
    if is("tls handshake eof") {
        return Some(format!(
            "it hung up during the TLS handshake; check host and port, or {without_tls}; if it asks for \
             a client certificate, check {certificate} and {key}"
        ));
    }
    None
}

/// What the server has against the client certificate (RFC 8446, 6.2), if it is that.
fn explain_alert(alert: &str, names: &TlsNames) -> Option<String> {
    let TlsNames {
        certificate, key, ..
    } = names;
    Some(match alert {
        "CertificateRequired" => {
            format!("it demands a client certificate; set {certificate} and {key}")
        }
        "CertificateExpired" => {
            let restart = match names.are_reread {
                true => "",
                false => ", and start the relay again",
            };
            format!(
                "it says that the client certificate has expired; renew the one in {certificate}{restart}"
            )
        }
        // As above, another CA of the same name.
        "UnknownCA" | "DecryptError" => format!(
            "it does not trust the CA of the client certificate; check {certificate}, which must also \
             hold the certificates of the CAs between it and the root"
        ),
        // Some servers say so where there is none.
        "BadCertificate"
        | "UnsupportedCertificate"
        | "CertificateRevoked"
        | "CertificateUnknown"
        | "AccessDenied" => format!(
            "it refuses the client certificate, or demands one ({alert}); check {certificate} and {key}"
        ),
        // Up to TLS 1.2 that may be what is missing.
        "HandshakeFailure" => format!(
            "it refuses the TLS handshake ({alert}); if it demands a client certificate, set \
             {certificate} and {key}"
        ),
        _ => return None,
    })
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
                "name the PEM file of that CA in WEBHOOK_CA",
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
                "it demands a client certificate; set WEBHOOK_CERT and WEBHOOK_KEY",
            ),
            (
                Error::AlertReceived(AlertDescription::CertificateExpired),
                "the client certificate has expired; renew the one in WEBHOOK_CERT, and start",
            ),
            (
                Error::AlertReceived(AlertDescription::UnknownCA),
                "does not trust the CA of the client certificate; check WEBHOOK_CERT",
            ),
            (
                Error::AlertReceived(AlertDescription::BadCertificate),
                "refuses the client certificate, or demands one (BadCertificate)",
            ),
            (
                Error::AlertReceived(AlertDescription::HandshakeFailure),
                "if it demands a client certificate, set WEBHOOK_CERT and WEBHOOK_KEY",
            ),
            (
                Error::InvalidMessage(InvalidMessage::InvalidContentType),
                "or write http://",
            ),
        ] {
            let explained = explain(&error.to_string(), &WEBHOOK_TLS);
            assert!(
                explained.as_ref().is_some_and(|text| text.contains(words)),
                "{error}: {explained:?}"
            );
        }
        let hung_up = "peer closed connection without sending TLS close_notify: https://docs.rs/x";
        assert_eq!(
            explain(hung_up, &WEBHOOK_TLS).as_deref(),
            Some("it hung up without an answer")
        );
        for other in [
            "Connection refused (os error 111)",
            "received fatal alert: InternalError",
        ] {
            assert_eq!(explain(other, &WEBHOOK_TLS), None);
        }
    }
}
