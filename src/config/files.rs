//! The files that settings name: how they are read, shown, and found to hold what they should.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use nkeys::KeyPair;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use secrecy::{ExposeSecret, SecretSlice};

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
        parse_credentials(str::from_utf8(content).ok()?)
    })
}

/// Takes the line below each of the two `-----BEGIN …-----`.
fn parse_credentials(text: &str) -> Option<(String, KeyPair)> {
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let mut below = lines
        .windows(2)
        .filter(|pair| pair[0].starts_with("---") && pair[0].contains("BEGIN"))
        .map(|pair| pair[1]);
    let (jwt, seed) = (below.next()?, below.next()?);
    Some((jwt.to_owned(), KeyPair::from_seed(seed).ok()?))
}

/// Reads the path of a file of CAs. Unparsable certificates are skipped, because the system's file may have some.
pub(super) fn check_authorities(path: &str) -> Result<PathBuf, String> {
    read(path, "certificate in PEM form that can be used", |pem| {
        let certificates = CertificateDer::pem_slice_iter(pem).flatten();
        let (usable, _) = RootCertStore::empty().add_parsable_certificates(certificates);
        (usable > 0).then(|| path.into())
    })
}

/// Reads a certificate, with those of intermediate CAs if there are any, and its path.
pub(super) fn read_chain(path: &str) -> Result<(PathBuf, Vec<CertificateDer<'static>>), String> {
    read(path, "certificate in PEM form", |pem| {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(pem).flatten().collect();
        (!chain.is_empty()).then(|| (path.into(), chain))
    })
}

/// Reads a private key, and its path.
pub(super) fn read_key(path: &str) -> Result<(PathBuf, PrivateKeyDer<'static>), String> {
    let what = "private key in PEM form without a passphrase";
    read(path, what, |pem| {
        Some((path.into(), PrivateKeyDer::from_pem_slice(pem).ok()?))
    })
}

/// Reads a file, and what `parse` finds in it.
fn read<T>(path: &str, what: &str, parse: impl FnOnce(&[u8]) -> Option<T>) -> Result<T, String> {
    let path = Path::new(path);
    let content = read_file(path)
        .map_err(|error| format!("names {}, which cannot be read: {error}", shown(path)))?;
    let content = SecretSlice::from(content);
    parse(content.expose_secret())
        .ok_or_else(|| format!("names {}, which holds no {what}", shown(path)))
}

/// The maximum size of a file with settings; the certificates of all public CAs take a quarter of it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Returns the content of a file that a setting names. It must be a regular file, because reading a pipe could block
/// forever, and a device may never end.
pub(super) fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other(
            "it is not a regular file; copy what it holds into one",
        ));
    }
    let mut content = Vec::new();
    fs::File::open(path)?
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut content)?;
    if content.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other(
            "it is larger than 1 MiB, so it can't be what is meant",
        ));
    }
    Ok(content)
}

/// Returns a path as it may be shown. A value that is not an absolute path may be a secret set by mistake.
pub(super) fn shown(path: &Path) -> String {
    if path.is_absolute() {
        format!("{path:?}")
    } else {
        "a relative path".to_owned()
    }
}
