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
use secrecy::{ExposeSecret, SecretString};

/// The pair of keys whose seed a file holds.
pub(super) fn read_nkey(path: &str) -> Result<KeyPair, String> {
    let seed = SecretString::from(read(path, read_text)?);
    KeyPair::from_seed(seed.expose_secret().trim()).map_err(|_| {
        format!(
            "names {}, which holds no seed of an nkey (SU...)",
            shown(Path::new(path))
        )
    })
}

/// The JWT and the pair of keys that a credentials file holds.
pub(super) fn read_credentials(path: &str) -> Result<(String, KeyPair), String> {
    let text = SecretString::from(read(path, read_text)?);
    parse_credentials(text.expose_secret()).ok_or_else(|| {
        format!(
            "names {}, which holds no credentials (a JWT and a seed)",
            shown(Path::new(path))
        )
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

/// The path of a file of CAs, if that is what it is. One that can't be used is no reason to refuse all
/// others: the system's file may have some.
pub(super) fn check_authorities(path: &str) -> Result<PathBuf, String> {
    let (path, found) = read_certificates(path)?;
    match RootCertStore::empty().add_parsable_certificates(found) {
        (0, _) => Err(format!(
            "names {}, which holds no certificate that can be read",
            shown(&path)
        )),
        _ => Ok(path),
    }
}

/// The path of a file of certificates, and what it holds: at least one.
pub(super) fn read_certificates(
    path: &str,
) -> Result<(PathBuf, Vec<CertificateDer<'static>>), String> {
    let pem = read(path, read_file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok((path.into(), found)),
        _ => Err(format!(
            "names {}, which holds no certificate in PEM form",
            shown(Path::new(path))
        )),
    }
}

/// Reads a private key from the file at `path`.
pub(super) fn read_key(path: &str) -> Result<(PathBuf, PrivateKeyDer<'static>), String> {
    let pem = read(path, read_file)?;
    match PrivateKeyDer::from_pem_slice(&pem) {
        Ok(key) => Ok((path.into(), key)),
        Err(error) => Err(format!(
            "names {}, which holds no private key in PEM form: {error} (one with a passphrase can't be used)",
            shown(Path::new(path))
        )),
    }
}

/// What a file holds, as `read` finds it.
fn read<T>(path: &str, read: fn(&Path) -> io::Result<T>) -> Result<T, String> {
    let path = Path::new(path);
    read(path).map_err(|error| format!("names {}, which cannot be read: {error}", shown(path)))
}

/// No file with settings is larger; certificates of all the world's CAs take a quarter of it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The content of a file that a setting names. A pipe could wait for ever, and a device never end.
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

/// The text of a file that a setting names.
pub(super) fn read_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read_file(path)?).map_err(|_| io::Error::other("it is not valid UTF-8"))
}

/// A path as it may be shown. What is no absolute path may be a secret in the place of one.
pub(super) fn shown(path: &Path) -> String {
    if path.is_absolute() {
        format!("{path:?}")
    } else {
        "a relative path".to_owned()
    }
}
