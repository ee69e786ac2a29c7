//! Whom to trust, and which client certificate to show: for NATS and for webhooks alike.

use std::path::PathBuf;

use rustls::{Error::InconsistentKeys, InconsistentKeys::KeyMismatch, sign::CertifiedKey};

use super::{
    files::{check_authorities, read_certificate, read_key, shown},
    reader::{Noted, Reader},
    variables::{CA, CERT, KEY, WEBHOOK_CA, WEBHOOK_CERT, WEBHOOK_KEY},
};

/// The variables for TLS to one kind of server.
#[derive(Debug)]
pub struct TlsNames {
    /// Names the CAs to trust.
    pub ca: &'static str,
    /// Names the client certificate.
    pub certificate: &'static str,
    /// Names its key.
    pub key: &'static str,
    /// What to do where the server has no TLS.
    pub without_tls: &'static str,
    /// Whether the files are read again for each connection.
    pub are_reread: bool,
}

/// The variables for TLS to NATS. The client reads the files whenever it connects.
pub const NATS_TLS: TlsNames = TlsNames {
    ca: CA,
    certificate: CERT,
    key: KEY,
    without_tls: "write nats://, without NATS_CA and NATS_CERT",
    are_reread: true,
};

/// The same where NATS is reached by a web socket.
pub const WEB_SOCKET_TLS: TlsNames = TlsNames {
    without_tls: "write ws://, without NATS_CA and NATS_CERT",
    ..NATS_TLS
};

/// The variables for TLS to webhooks.
pub const WEBHOOK_TLS: TlsNames = TlsNames {
    ca: WEBHOOK_CA,
    certificate: WEBHOOK_CERT,
    key: WEBHOOK_KEY,
    without_tls: "write http://",
    are_reread: false,
};

/// The PEM files for TLS to one kind of server.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The CAs to trust, instead of the system's.
    pub ca: Option<PathBuf>,
    /// A client certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

impl Tls {
    pub(super) fn read(reader: &mut Reader<'_>, names: &TlsNames) -> Result<Self, Noted> {
        let ca = reader.optional(names.ca, check_authorities);
        let certificate =
            reader.both_or_neither((names.certificate, read_certificate), (names.key, read_key));
        let certificate = match certificate? {
            None => None,
            Some(((certificate, chain), (key, signing_key))) => {
                let pair = CertifiedKey::new(chain, signing_key);
                if matches!(pair.keys_match(), Err(InconsistentKeys(KeyMismatch))) {
                    let problem = format!(
                        "names {}, whose key does not belong to the first certificate in {}; \
                         set both to files of one pair",
                        shown(&key),
                        names.certificate
                    );
                    return Err(reader.note(names.key, &problem));
                }
                Some((certificate, key))
            }
        };
        Ok(Self {
            ca: ca?,
            certificate,
        })
    }

    /// Whether any of it is set.
    pub(super) fn is_set(&self) -> bool {
        self.ca.is_some() || self.certificate.is_some()
    }

    /// With the CAs in the file of `SSL_CERT_FILE`, where no others are named.
    pub(super) fn or_trust(self, trust: Option<PathBuf>) -> Self {
        Self {
            ca: self.ca.or(trust),
            ..self
        }
    }
}
