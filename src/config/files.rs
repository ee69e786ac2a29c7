//! Certificates and keys: the files that hold them, and whether they do.

use std::path::{Path, PathBuf};

use nkeys::KeyPair;
use rustls::{
    Error, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};

use super::{
    environment::{read_file, shown},
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
            if let Err(error) = pair {
                let what = "first certificate can't be used";
                let (name, path, what) = match error {
                    Error::InvalidCertificate(_) => (certificate_name, &chain_path, what),
                    _ => (
                        key_name,
                        &key_path,
                        "private key does not match the certificate",
                    ),
                };
                let problem = format!("names {}, whose {what}: {error}", shown(path));
                reader.note(name, &problem);
            }
            (chain_path, key_path)
        });
        Self { ca, certificate }
    }
}

/// Reads the key pair whose seed is in the file at `path`.
pub(super) fn read_nkey(path: &str) -> Result<KeyPair, String> {
    read(path, "seed of an nkey (SU...)", |content| {
        let seed = str::from_utf8(content).ok()?;
        KeyPair::from_seed(seed.trim()).ok()
    })
}

/// Reads the JWT and the key pair from a credentials file.
pub(super) fn read_credentials(path: &str) -> Result<(String, KeyPair), String> {
    read(path, "credentials (a JWT and a seed)", |content| {
        let lines: Vec<_> = str::from_utf8(content)
            .ok()?
            .lines()
            .map(str::trim)
            .collect();
        // The lines below the two `-----BEGIN …-----`.
        let mut below = lines
            .windows(2)
            .filter(|pair| pair[0].starts_with("---") && pair[0].contains("BEGIN"))
            .map(|pair| pair[1]);
        let (jwt, seed) = (below.next()?, below.next()?);
        Some((jwt.to_owned(), KeyPair::from_seed(seed).ok()?))
    })
}

/// Reads the path of a file of CAs. Unparsable certificates are skipped, because the system's file may have some.
fn check_authorities(path: &str) -> Result<PathBuf, String> {
    read(path, "certificate in PEM form that can be used", |pem| {
        let certificates = CertificateDer::pem_slice_iter(pem).flatten();
        let (usable, _) = RootCertStore::empty().add_parsable_certificates(certificates);
        (usable > 0).then(|| path.into())
    })
}

/// Reads a certificate, with those of intermediate CAs if there are any, and its path.
fn read_chain(path: &str) -> Result<(PathBuf, Vec<CertificateDer<'static>>), String> {
    read(path, "certificate in PEM form", |pem| {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(pem).flatten().collect();
        (!chain.is_empty()).then(|| (path.into(), chain))
    })
}

/// Reads a private key, and its path.
fn read_key(path: &str) -> Result<(PathBuf, PrivateKeyDer<'static>), String> {
    let what = "private key in PEM form without a passphrase";
    read(path, what, |pem| {
        Some((path.into(), PrivateKeyDer::from_pem_slice(pem).ok()?))
    })
}

/// Reads a file, and parses its content.
fn read<T>(path: &str, what: &str, parse: impl FnOnce(&[u8]) -> Option<T>) -> Result<T, String> {
    let path = Path::new(path);
    let content = read_file(path)
        .map_err(|error| format!("names {}, which cannot be read: {error}", shown(path)))?;
    parse(&content).ok_or_else(|| format!("names {}, which holds no {what}", shown(path)))
}
