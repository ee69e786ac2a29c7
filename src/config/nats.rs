//! The NATS servers, and how to log in.

use std::fmt;

use async_nats::{Auth, ServerAddr};
use nkeys::KeyPair;

use super::{
    environment::Environment,
    files::{Tls, read_credentials, read_nkey},
    reader::{Reader, any_text, parse_bool},
    variables::*,
};

/// The NATS servers and how to log in.
#[derive(Debug)]
pub struct Nats {
    /// Servers of one cluster; at least one.
    pub servers: Vec<ServerAddr>,
    /// How to log in.
    pub login: Login,
    /// The CAs to trust, and the client certificate.
    pub tls: Tls,
    /// Whether every connection must use TLS.
    pub requires_tls: bool,
    /// Whether the TLS handshake comes before the server's greeting.
    pub tls_first: bool,
    /// Whether to ignore the servers that a cluster advertises.
    pub ignore_discovered: bool,
}

/// How to log in to NATS: the variables that say so. The values and the files that they name are read again for
/// each connection, because they may have been renewed.
#[derive(Clone)]
pub struct Login(Environment);

impl Nats {
    pub(super) fn read(reader: &mut Reader<'_>) -> Self {
        let [host, address] = [HOST, ADDRESS].map(|name| reader.optional(name, any_text));
        if host.is_some() && address.is_some() && host != address {
            let problem = format!("and {ADDRESS} have different values; keep one of them");
            reader.note(HOST, &problem);
        }
        let (name, servers) = match reader.is_set(ADDRESS) && !reader.is_set(HOST) {
            true => (ADDRESS, reader.optional(ADDRESS, parse_servers)),
            false => (HOST, Some(reader.value(HOST, parse_servers))),
        };
        let servers = servers.unwrap_or_default();
        let tls_first = reader.value(TLS_FIRST, parse_bool);
        let has = |scheme| servers.iter().any(|server| server.scheme() == scheme);
        // Each of these means that a password must never be sent in the clear, to any server.
        let requires_tls =
            reader.is_set(CA) || reader.is_set(CERT) || tls_first || has("tls") || has("wss");
        if requires_tls && has("ws") {
            let problem = "has an entry that starts with ws://, which has no TLS, but NATS_CA, \
                           NATS_CERT, NATS_TLS_FIRST or another entry requires it; write wss://";
            reader.note(name, problem);
        }
        // A cluster advertises its web sockets without a scheme, and the client treats them as nats://.
        let ignore_discovered =
            reader.value(IGNORE_DISCOVERED, parse_bool) || has("ws") || has("wss");
        Self {
            servers,
            login: Login::read(reader),
            tls: Tls::read(reader, [CA, CERT, KEY], requires_tls),
            requires_tls,
            tls_first,
            ignore_discovered,
        }
    }
}

/// The variables of all ways to log in.
const LOGINS: [&str; 5] = [USER, PASS, TOKEN, NKEY, CREDS];

/// Logins that exclude each other. Credentials may be combined with a token, or with a user and a password, as auth
/// callout requires.
const EXCLUSIVE: [(&str, &str); 4] = [(USER, TOKEN), (USER, NKEY), (TOKEN, NKEY), (NKEY, CREDS)];

impl Login {
    /// Returns whether there is no login.
    #[must_use]
    pub fn is_anonymous(&self) -> bool {
        self.set().next().is_none()
    }

    /// Returns the hint for a refused login.
    #[must_use]
    pub fn hint(&self) -> String {
        match self.is_anonymous() {
            true => "set NATS_USER and NATS_PASS, NATS_TOKEN, NATS_NKEY or NATS_CREDS".to_owned(),
            false => format!("check {}", Vec::from_iter(self.set()).join(" and ")),
        }
    }

    /// Returns the login for a server that has sent this `nonce`.
    ///
    /// # Errors
    /// If a value or a file can't be used any more.
    pub fn answer(&self, nonce: &[u8]) -> Result<Auth, String> {
        let mut reader = Reader::new(&self.0);
        let auth = Self::auth(&mut reader, nonce);
        match reader.problems.is_empty() {
            true => Ok(auth),
            false => Err(reader.problems.join("; ")),
        }
    }

    fn set(&self) -> impl Iterator<Item = &'static str> {
        LOGINS
            .into_iter()
            .filter(|name| Reader::new(&self.0).is_set(name))
    }

    /// Keeps the variables of the login, and finds their problems.
    fn read(reader: &mut Reader<'_>) -> Self {
        for (name, other) in EXCLUSIVE {
            if reader.is_set(name) && reader.is_set(other) {
                let problem = format!("and {other} are both set; keep one way to log in");
                reader.note(name, &problem);
            }
        }
        Self::auth(reader, &[]);
        Self(reader.environment.clone())
    }

    fn auth(reader: &mut Reader<'_>, nonce: &[u8]) -> Auth {
        let mut auth = Auth::new();
        let password = reader.both_or_neither((USER, any_text), (PASS, any_text));
        (auth.username, auth.password) = password.unzip();
        auth.token = reader.optional(TOKEN, any_text);
        let nkey = reader.optional(NKEY, read_nkey);
        auth.nkey = nkey.as_ref().map(KeyPair::public_key);
        let (jwt, pair) = reader.optional(CREDS, read_credentials).unzip();
        auth.jwt = jwt;
        // With a seed, signing never fails.
        auth.signature = nkey.or(pair).and_then(|pair| pair.sign(nonce).ok());
        auth
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.set()).finish()
    }
}

fn parse_servers(text: &str) -> Result<Vec<ServerAddr>, String> {
    text.split(',')
        .map(|part| parse_server(part.trim()))
        .collect()
}

fn parse_server(text: &str) -> Result<ServerAddr, String> {
    let schemes = ["nats://", "tls://", "ws://", "wss://"];
    if !schemes.iter().any(|scheme| text.starts_with(scheme)) {
        return Err(
            "has an entry that does not start with nats://, tls://, ws:// or wss://; write each server \
             like nats://localhost:4222, separated by single commas"
                .to_owned(),
        );
    }
    match text.parse::<ServerAddr>() {
        Ok(server) if server.username().is_some() || server.password().is_some() => Err(format!(
            "contains a login; set {USER} and {PASS}, or {TOKEN} instead"
        )),
        Ok(server) if !server.host().is_empty() => Ok(server),
        _ => Err(
            "has an entry that is not a valid URL; write each server like nats://localhost:4222"
                .to_owned(),
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::tests::{assert_refused, problems, with};

    #[test]
    fn there_is_one_way_to_log_in_but_credentials_may_have_company() {
        let login = with(&[(TOKEN, "t")]).unwrap().nats.login;
        assert_eq!(login.hint(), "check NATS_TOKEN");
        assert_eq!(login.answer(b"nonce").unwrap().token.as_deref(), Some("t"));
        let password = [(USER, "u"), (PASS, "p")];
        let [seed, credentials] = ["seed", "creds"].map(|name| {
            let file = tempfile::NamedTempFile::with_suffix(name).unwrap();
            let seed = nkeys::KeyPair::new_user().seed().unwrap();
            let text = match name {
                "seed" => format!("{seed}\n"),
                _ => format!(
                    "-----BEGIN NATS USER JWT-----\r\njwt\r\n------END NATS USER JWT------\r\n\r\n\
                     -----BEGIN USER NKEY SEED-----\r\n{seed}\r\n------END USER NKEY SEED------\r\n"
                ),
            };
            std::fs::write(file.path(), text).unwrap();
            file
        });
        let seed = [(NKEY, seed.path().to_str().unwrap())];
        let credentials = [(CREDS, credentials.path().to_str().unwrap())];
        for (a, b, problem) in [
            (
                &[(TOKEN, "t")][..],
                &password[..],
                "NATS_USER and NATS_TOKEN are both set",
            ),
            (&seed, &password, "NATS_USER and NATS_NKEY are both set"),
            (
                &seed,
                &[(TOKEN, "t")],
                "NATS_TOKEN and NATS_NKEY are both set",
            ),
            (&seed, &credentials, "NATS_NKEY and NATS_CREDS are both set"),
        ] {
            let problems = problems(&[a, b].concat());
            assert!(
                problems.len() == 1 && problems[0].starts_with(problem),
                "{problems:?}"
            );
        }
        let login = with(&[&credentials[..], &password].concat())
            .unwrap()
            .nats
            .login;
        assert_eq!(login.hint(), "check NATS_USER and NATS_PASS and NATS_CREDS");
        let auth = login.answer(b"nonce").unwrap();
        assert_eq!(auth.jwt.as_deref(), Some("jwt"));
        assert_eq!(auth.username.as_deref(), Some("u"));
        assert!(auth.signature.is_some() && auth.nkey.is_none());
        assert_eq!(
            format!("{login:?}"),
            r#"{"NATS_USER", "NATS_PASS", "NATS_CREDS"}"#
        );
    }

    #[test]
    fn the_host_has_another_name() {
        assert_eq!(problems(&[(HOST, ""), (ADDRESS, "nats://a")]), [""; 0]);
        assert_eq!(
            problems(&[(HOST, "nats://a"), (ADDRESS, "nats://a")]),
            [""; 0]
        );
        assert!(problems(&[(ADDRESS, "nats://b")])[0].contains("different values"));
        assert!(problems(&[(HOST, ""), (ADDRESS, "b")])[0].starts_with("NATS_ADDRESS has"));
    }

    #[test]
    fn every_refusal_names_the_variable_and_the_fault() {
        assert_refused(&[
            (HOST, "", "not set"),
            (HOST, "localhost:4222", "does not start with nats://"),
            (HOST, "http://localhost", "does not start with nats://"),
            (HOST, "nats://a,,nats://b", "does not start with nats://"),
            (HOST, "nats://", "has an entry"),
            (HOST, "nats://host:99999", "is not a valid URL"),
            (HOST, "wsx://localhost", "does not start with nats://"),
            (HOST, "ws://", "is not a valid URL"),
            (HOST, "wss://u:p@host", "contains a login"),
            (HOST, "nats://u:p@host", "contains a login"),
            (HOST, "nats://:p@host", "contains a login"),
            (USER, "u", "NATS_PASS is not set"),
            (PASS, "p", "NATS_USER is not set"),
            (NKEY, "/nowhere", "cannot be read"),
            (NKEY, "Cargo.toml", "no seed"),
            (CREDS, "/nowhere", "cannot be read"),
            (CREDS, "Cargo.toml", "no credentials"),
            (CA, "/nowhere", "cannot be read"),
            (CA, "Cargo.toml", "no certificate"),
            (CERT, "Cargo.toml", "no certificate"),
            (KEY, "Cargo.toml", "no private key"),
            (TLS_FIRST, "yes", "write true or false"),
        ]);
    }

    #[test]
    fn a_web_socket_without_tls_is_refused_where_tls_is_demanded() {
        let names = |list| [(HOST, list), (TLS_FIRST, "true")];
        assert_eq!(problems(&names("wss://a, nats://b")), [""; 0]);
        for host in ["ws://a", "nats://a, ws://b/path"] {
            assert_eq!(problems(&[(HOST, host)]), [""; 0]);
            let problems = problems(&names(host));
            assert_eq!(problems.len(), 1, "{problems:?}");
            let expected = "NATS_HOST has an entry that starts with ws://, which has no TLS, but \
                            NATS_CA, NATS_CERT, NATS_TLS_FIRST or another entry requires it; write wss://";
            assert!(problems[0].starts_with(expected), "{problems:?}");
        }
        assert_eq!(problems(&[(HOST, "ws://a, wss://b")]).len(), 1);
        let address = [(HOST, ""), (ADDRESS, "ws://a"), (TLS_FIRST, "true")];
        assert!(problems(&address)[0].starts_with(ADDRESS));
    }

    #[test]
    fn web_sockets_are_told_by_their_scheme() {
        for (hosts, expected) in [
            ("nats://a, tls://b", false),
            ("nats://a, ws://b", true),
            ("wss://a", true),
        ] {
            let nats = with(&[(HOST, hosts)]).unwrap().nats;
            assert_eq!(nats.ignore_discovered, expected, "{hosts}");
            assert_eq!(nats.requires_tls, !hosts.contains("ws://"), "{hosts}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_one_problem() {
        for changes in [
            &[(HOST, ""), ("NATS_HOST_FILE", "/nowhere")][..],
            &[(HOST, ""), ("NATS_ADDRESS_FILE", "/nowhere")],
            &[("NATS_ADDRESS_FILE", "/nowhere")],
            &[(USER, "u"), ("NATS_PASS_FILE", "/nowhere")],
            &[("NATS_USER_FILE", "/nowhere"), (PASS, "p")],
        ] {
            let problems = problems(changes);
            assert_eq!(problems.len(), 1, "{changes:?}: {problems:?}");
            assert!(problems[0].contains("/nowhere"), "{problems:?}");
        }
        let both = [
            (HOST, ""),
            ("NATS_HOST_FILE", "/nowhere"),
            ("NATS_ADDRESS_FILE", "/nowhere"),
        ];
        assert_eq!(problems(&both).len(), 2);
    }
}
