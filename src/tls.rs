//! TLS: which CAs to trust, and explanations of failures.

use anyhow::bail;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use rustls_native_certs::{load_certs_from_paths, load_native_certs};

use crate::config::{self, Destination};

/// Installs the crypto provider for everything in the process that uses TLS.
pub fn install_provider() {
    // It fails if another relay in this process has already installed it, which is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Returns the TLS configuration for https destinations, if there are any. It trusts the CAs that the
/// configuration names, or else the system's.
///
/// # Errors
/// If there is no CA to trust, or if a file has changed since the settings were read.
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
             a PEM file in SSL_CERT_FILE or WEBHOOK_CA ({})",
            reasons.join("; ")
        );
    }
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let Some((certificate, key)) = &config.tls.certificate else {
        return Ok(Some(builder.with_no_client_auth()));
    };
    let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(key)?;
    Ok(Some(builder.with_client_auth_cert(chain, key)?))
}

/// Parts of the alerts about a client certificate (RFC 8446, 6.2). Before TLS 1.3 the last one may mean that it is missing.
const REFUSALS: &str = "Certificate UnknownCA DecryptError AccessDenied HandshakeFailure";

/// Explains the text of a common error of the TLS library, with a hint. `kind` is the first part of the variables'
/// names: `NATS` or `WEBHOOK`.
///
/// It uses the text because the NATS client provides nothing else.
#[must_use]
pub fn explain(error: &str, kind: &str) -> Option<String> {
    let is = |parts: &[&str]| parts.iter().any(|part| error.contains(part));
    if let Some((_, alert)) = error.split_once("received fatal alert: ")
        && REFUSALS.split(' ').any(|part| alert.contains(part))
    {
        return Some(format!(
            "it refuses the client certificate, or demands one ({alert}); check {kind}_CERT and {kind}_KEY"
        ));
    }
    // A bad signature comes from another CA of the same name.
    Some(if is(&["UnknownIssuer", "BadSignature"]) {
        format!(
            "its certificate is signed by a CA that is not trusted; name the PEM file of that CA in {kind}_CA"
        )
    } else if is(&["CaUsedAsEndEntity"]) {
        format!(
            "its certificate is that of a CA, which no server may use; give it one signed by that CA, and \
             name the CA in {kind}_CA"
        )
    } else if is(&["InvalidContentType", "tls handshake eof"]) {
        "it does not speak TLS there; check scheme, host and port".to_owned()
    } else if is(&["close_notify"]) {
        "it hung up without an answer".to_owned()
    } else {
        return None;
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

    #[test]
    fn what_the_library_says_is_put_into_words() {
        let alert = |alert| Error::AlertReceived(alert);
        for (error, words) in [
            (
                CertificateError::UnknownIssuer.into(),
                "name the PEM file of that CA in WEBHOOK_CA",
            ),
            (
                alert(AlertDescription::CertificateRequired),
                "or demands one (CertificateRequired); check WEBHOOK_CERT and WEBHOOK_KEY",
            ),
            (alert(AlertDescription::UnknownCA), "(UnknownCA)"),
            (
                alert(AlertDescription::HandshakeFailure),
                "(HandshakeFailure)",
            ),
            (
                Error::InvalidMessage(InvalidMessage::InvalidContentType),
                "it does not speak TLS there",
            ),
        ] {
            let explained = explain(&error.to_string(), "WEBHOOK");
            assert!(
                explained.as_ref().is_some_and(|text| text.contains(words)),
                "{error}: {explained:?}"
            );
        }
        for other in [
            "Connection refused (os error 111)",
            "received fatal alert: InternalError",
        ] {
            assert_eq!(explain(other, "WEBHOOK"), None);
        }
    }
}
