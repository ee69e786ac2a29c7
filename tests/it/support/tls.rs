use std::{net::IpAddr, path::PathBuf, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType, date_time_ymd};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tempfile::TempDir;
use tokio_rustls::TlsAcceptor;

/// A CA of one's own, and what it signs for 127.0.0.1, as PEM files.
pub struct Authority {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        Self {
            directory,
            issuer: Issuer::new(params, key),
        }
    }

    /// The path of `ca.pem`.
    pub fn ca(&self) -> String {
        self.file("ca.pem")
    }

    /// The paths of a certificate for 127.0.0.1 and app.invalid, and of its key.
    pub fn issue(&self, name: &str) -> (String, String) {
        self.issue_with(name, |_| {})
    }

    fn issue_with(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (String, String) {
        let mut params = CertificateParams::new(["app.invalid".to_owned()]).unwrap();
        let address = IpAddr::from([127, 0, 0, 1]);
        params.subject_alt_names.push(SanType::IpAddress(address));
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let paths = (
            self.file(&format!("{name}.pem")),
            self.file(&format!("{name}.key")),
        );
        std::fs::write(&paths.0, certificate.pem()).unwrap();
        std::fs::write(&paths.1, key.serialize_pem()).unwrap();
        paths
    }

    /// The paths of a certificate that has expired, and of its key.
    pub fn issue_expired(&self, name: &str) -> (String, String) {
        let expired = date_time_ymd(2000, 1, 1);
        self.issue_with(name, |params| params.not_after = expired)
    }

    /// A TLS server's side, with a certificate of its own.
    pub fn acceptor(&self) -> TlsAcceptor {
        acceptor(self.issue("webhook"), None)
    }

    /// A TLS server's side that demands a client certificate of this authority.
    pub fn demanding_acceptor(&self) -> TlsAcceptor {
        acceptor(self.issue("webhook"), Some(self.ca()))
    }

    /// A TLS server's side that shows the CA's own certificate, as nobody should.
    pub fn acceptor_with_the_ca(&self) -> TlsAcceptor {
        let key = self.file("ca.key");
        std::fs::write(&key, self.issuer.key().serialize_pem()).unwrap();
        acceptor((self.ca(), key), None)
    }

    /// A TLS server's side with a certificate that has expired.
    pub fn acceptor_of_old(&self) -> TlsAcceptor {
        acceptor(self.issue_expired("old"), None)
    }

    fn file(&self, name: &str) -> String {
        let path: PathBuf = self.directory.path().join(name);
        path.to_str().unwrap().to_owned()
    }
}

/// A TLS server's side, which demands a client certificate of a CA if one is named.
fn acceptor((certificate, key): (String, String), client_ca: Option<String>) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients = match client_ca {
        None => WebPkiClientVerifier::no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            roots
                .add(CertificateDer::from_pem_file(ca).unwrap())
                .unwrap();
            WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(&provider))
                .build()
                .unwrap()
        }
    };
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(clients)
        .with_single_cert(
            vec![CertificateDer::from_pem_file(certificate).unwrap()],
            PrivateKeyDer::from_pem_file(key).unwrap(),
        )
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}
