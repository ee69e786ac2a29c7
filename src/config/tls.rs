//! The CAs to trust and the client certificate, for NATS and for webhooks alike.

use std::path::PathBuf;

use rustls::{Error, crypto::ring, sign::CertifiedKey};

use super::{
    files::{check_authorities, read_chain, read_key, shown},
    reader::{Noted, Reader},
    variables::TRUST,
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
    /// Reads the variables for CAs, certificate and key. `SSL_CERT_FILE` is the default for the CAs, and is read only if
    /// anything `is_verified` with it, because it may be meant for other programs.
    pub(super) fn read(
        reader: &mut Reader<'_>,
        [ca, certificate, key]: [&str; 3],
        is_verified: bool,
    ) -> Result<Self, Noted> {
        let authorities = match reader.is_set(ca) {
            true => reader.optional(ca, check_authorities),
            false if is_verified => reader.optional(TRUST, check_authorities),
            false => reader.optional(TRUST, |path| Ok(path.into())),
        };
        let pair = reader.both_or_neither((certificate, read_chain), (key, read_key))?;
        let pair = match pair {
            None => None,
            Some(((chain_path, chain), (key_path, der))) => {
                match CertifiedKey::from_der(chain, der, &ring::default_provider()) {
                    Ok(_) => Some((chain_path, key_path)),
                    Err(Error::InvalidCertificate(error)) => {
                        let shown = shown(&chain_path);
                        let problem = format!(
                            "names {shown}, whose first certificate can't be used: {error}"
                        );
                        return Err(reader.note(certificate, &problem));
                    }
                    Err(error) => {
                        let shown = shown(&key_path);
                        let problem = format!(
                            "names {shown}, whose private key can't be used with the first certificate \
                             in {certificate}: {error}"
                        );
                        return Err(reader.note(key, &problem));
                    }
                }
            }
        };
        Ok(Self {
            ca: authorities?,
            certificate: pair,
        })
    }
}
