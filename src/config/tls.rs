//! The CAs to trust and the client certificate, for NATS and for webhooks alike.

use std::path::PathBuf;

use rustls::{Error, crypto::ring, sign::CertifiedKey};

use super::{
    files::{check_authorities, read_chain, read_key, shown},
    reader::Reader,
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
        [ca_name, certificate_name, key_name]: [&str; 3],
        is_verified: bool,
    ) -> Self {
        let ca = match reader.is_set(ca_name) {
            true => reader.optional(ca_name, check_authorities),
            false if is_verified => reader.optional(TRUST, check_authorities),
            false => reader.optional(TRUST, |path| Ok(path.into())),
        };
        let pair = reader.both_or_neither((certificate_name, read_chain), (key_name, read_key));
        let certificate = pair.map(|((chain_path, chain), (key_path, der))| {
            let pair = CertifiedKey::from_der(chain, der, &ring::default_provider());
            if let Err(Error::InvalidCertificate(error)) = pair {
                let shown = shown(&chain_path);
                let problem =
                    format!("names {shown}, whose first certificate can't be used: {error}");
                reader.note(certificate_name, &problem);
            } else if let Err(error) = pair {
                let problem = format!(
                    "names {}, whose private key can't be used with the first certificate in \
                     {certificate_name}: {error}",
                    shown(&key_path)
                );
                reader.note(key_name, &problem);
            }
            (chain_path, key_path)
        });
        Self { ca, certificate }
    }
}
