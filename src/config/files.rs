//! The files that settings name: how they are read, shown, and found to hold what they should.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use async_nats::ConnectOptions;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use secrecy::{ExposeSecret, SecretString};

/// The seed of an nkey that a file holds.
pub(super) fn read_nkey(path: &str) -> Result<SecretString, String> {
    let text = SecretString::from(read(path, read_text)?);
    let seed = text.expose_secret().trim();
    match nkeys::KeyPair::from_seed(seed) {
        Ok(_) => Ok(seed.into()),
        Err(_) => Err(format!(
            "names {}, which holds no seed of an nkey (SU...)",
            shown(Path::new(path))
        )),
    }
}

/// The JWT and the seed that a credentials file holds.
pub(super) fn read_credentials(path: &str) -> Result<SecretString, String> {
    let text = SecretString::from(read(path, read_text)?);
    match ConnectOptions::with_credentials(text.expose_secret()) {
        Ok(_) => Ok(text),
        Err(_) => Err(format!(
            "names {}, which holds no credentials (a JWT and a seed)",
            shown(Path::new(path))
        )),
    }
}

/// The path of a file of certificates, if that is what it is.
pub(super) fn check_certificates(path: &str) -> Result<PathBuf, String> {
    let pem = read(path, read_file)?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect();
    if found.is_empty() || found.iter().any(Result::is_err) {
        return Err(format!(
            "names {}, which holds no certificate in PEM form",
            shown(Path::new(path))
        ));
    }
    Ok(path.into())
}

/// The path of a file with a private key, if that is what it is.
pub(super) fn check_key(path: &str) -> Result<PathBuf, String> {
    let pem = read(path, read_file)?;
    PrivateKeyDer::from_pem_slice(&pem)
        .map(|_| path.into())
        .map_err(|error| {
            let shown = shown(Path::new(path));
            format!("names {shown}, which holds no private key in PEM form: {error}")
        })
}

/// What a file holds, as `read` finds it.
fn read<T>(path: &str, read: fn(&Path) -> io::Result<T>) -> Result<T, String> {
    let path = Path::new(path);
    read(path).map_err(|error| format!("names {}, which cannot be read: {error}", shown(path)))
}

/// No file with settings is larger; certificates of all the world's CAs take a quarter of it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The content of a file that a setting names. A pipe could wait for ever, and a device never end.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
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
