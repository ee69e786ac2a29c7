//! The NATS servers, and how to log in.

use std::path::PathBuf;

use async_nats::ServerAddr;
use secrecy::SecretString;

use super::{
    files::{read_credentials, read_nkey},
    reader::{Noted, Reader, any_text, parse_bool},
    tls::{NATS_TLS, Tls},
    variables::{ADDRESS, CA, CERT, CREDS, HOST, NKEY, PASS, TLS_FIRST, TOKEN, USER},
};

/// What the URL of a server may start with: in clear text until the server wants TLS, with TLS, and as a web
/// socket in clear text and with TLS.
const SCHEMES: [&str; 4] = ["nats://", "tls://", "ws://", "wss://"];

/// The NATS servers and how to log in.
#[derive(Debug)]
pub struct Nats {
    /// Servers of one cluster; at least one.
    pub servers: Vec<ServerAddr>,
    /// How to log in.
    pub login: Login,
    /// Whom to trust, and the client certificate.
    pub tls: Tls,
    /// Whether a connection without TLS is out of the question.
    pub requires_tls: bool,
    /// Whether the TLS handshake comes before the server's greeting.
    pub tls_first: bool,
}

/// How to log in to NATS.
#[derive(Debug)]
pub enum Login {
    /// Not at all.
    Anonymous,
    /// With `NATS_USER` and `NATS_PASS`.
    Password {
        /// The user.
        user: String,
        /// Its password.
        password: SecretString,
    },
    /// With `NATS_TOKEN`.
    Token(SecretString),
    /// With the seed that `NATS_NKEY` holds.
    Nkey(SecretString),
    /// With the JWT and the seed that `NATS_CREDS` holds.
    Credentials(SecretString),
}

impl Nats {
    /// Whether one of the servers is reached by a web socket.
    #[must_use]
    pub fn has_web_socket(&self) -> bool {
        self.servers.iter().any(ServerAddr::is_websocket)
    }

    /// `trust` is the file of `SSL_CERT_FILE`, which counts where `NATS_CA` is not set.
    pub(super) fn read(
        reader: &mut Reader<'_>,
        trust: Result<Option<PathBuf>, Noted>,
    ) -> Result<Self, Noted> {
        let servers = read_servers(reader);
        let login = Login::read(reader);
        let tls = Tls::read(reader, &NATS_TLS);
        let tls_first = reader.value(TLS_FIRST, parse_bool);
        let (tls, tls_first) = (tls?, tls_first?);
        let servers = servers?;
        // Whoever names a CA or a certificate for NATS wants no connection without TLS.
        let demands = [
            (CA, tls.ca.is_some()),
            (CERT, tls.certificate.is_some()),
            (TLS_FIRST, tls_first),
        ];
        let demand = demands.into_iter().find(|(_, is_set)| *is_set);
        if let Some((variable, _)) = demand
            && servers.iter().any(|server| server.scheme() == "ws")
        {
            let problem = format!(
                "has an entry that starts with ws://, which is without TLS, but {variable} is set; write \
                 wss://, or unset {variable}"
            );
            let name = [HOST, ADDRESS].into_iter().find(|name| reader.is_set(name));
            return Err(reader.note(name.unwrap_or(HOST), &problem));
        }
        Ok(Self {
            servers,
            login: login?,
            requires_tls: demand.is_some(),
            tls: tls.or_trust(trust?),
            tls_first,
        })
    }
}

impl Login {
    /// What to look at where the server refuses it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Anonymous => "set NATS_USER and NATS_PASS, NATS_TOKEN, NATS_NKEY or NATS_CREDS",
            Self::Password { .. } => "check NATS_USER and NATS_PASS",
            Self::Token(_) => "check NATS_TOKEN",
            Self::Nkey(_) => "check NATS_NKEY",
            Self::Credentials(_) => "check NATS_CREDS",
        }
    }

    /// The one way to log in that is set.
    fn read(reader: &mut Reader<'_>) -> Result<Self, Noted> {
        let set: Vec<_> = [USER, TOKEN, NKEY, CREDS]
            .into_iter()
            .filter(|name| reader.is_set(name))
            .collect();
        if let [first, others @ ..] = &set[..]
            && !others.is_empty()
        {
            let others = others.join(", ");
            let problem = format!("and {others} are both set; keep one way to log in");
            return Err(reader.note(first, &problem));
        }
        let token = reader.optional(TOKEN, any_text);
        let nkey = reader.optional(NKEY, read_nkey);
        let credentials = reader.optional(CREDS, read_credentials);
        let password = reader.both_or_neither((USER, any_text), (PASS, any_text));
        let login = match (password?, token?, nkey?, credentials?) {
            (Some((user, password)), ..) => Self::Password {
                user,
                password: password.into(),
            },
            (_, Some(token), ..) => Self::Token(token.into()),
            (_, _, Some(seed), _) => Self::Nkey(seed),
            (_, _, _, Some(text)) => Self::Credentials(text),
            (None, None, None, None) => Self::Anonymous,
        };
        Ok(login)
    }
}

/// The servers of `NATS_HOST`, or of its other name.
fn read_servers(reader: &mut Reader<'_>) -> Result<Vec<ServerAddr>, Noted> {
    let host = reader.text(HOST);
    let address = reader.text(ADDRESS);
    match (host?, address?) {
        (Some(host), Some(address)) if host != address => {
            let problem = format!("and {ADDRESS} have different values; keep one of them");
            Err(reader.note(HOST, &problem))
        }
        (None, Some(_)) => reader.value(ADDRESS, parse_servers),
        _ => reader.value(HOST, parse_servers),
    }
}

fn parse_servers(text: &str) -> Result<Vec<ServerAddr>, String> {
    text.split(',')
        .map(|part| parse_server(part.trim()))
        .collect()
}

fn parse_server(text: &str) -> Result<ServerAddr, String> {
    let example = "write each server like nats://localhost:4222";
    if text.is_empty() {
        return Err(format!(
            "has an empty entry; {example}, separated by single commas"
        ));
    }
    if !SCHEMES.iter().any(|scheme| text.starts_with(scheme)) {
        return Err(format!(
            "has an entry that does not start with nats://, tls://, ws:// or wss://; {example}"
        ));
    }
    let address: ServerAddr = text
        .parse()
        .map_err(|_| format!("has an entry that is no URL; {example}"))?;
    if address.host().is_empty() {
        return Err(format!("has an entry without a host; {example}"));
    }
    if address.username().is_some() || address.password().is_some() {
        return Err(format!(
            "contains a login; set {USER} and {PASS}, or {TOKEN} instead"
        ));
    }
    Ok(address)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{
        tests::{assert_refused, problems, with},
        variables::{CA, CERT, KEY},
    };

    #[test]
    fn there_is_one_way_to_log_in() {
        assert!(matches!(
            with(&[(TOKEN, "t")]).unwrap().nats.login,
            Login::Token(_)
        ));
        let problems = problems(&[(TOKEN, "t"), (USER, "u"), (PASS, "p")]);
        assert_eq!(
            problems,
            ["NATS_USER and NATS_TOKEN are both set; keep one way to log in"]
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
            (HOST, "nats://a,,nats://b", "has an empty entry"),
            (HOST, "nats://", "has an entry"),
            (HOST, "nats://host:99999", "is no URL"),
            (HOST, "wsx://localhost", "does not start with nats://"),
            (HOST, "ws://", "is no URL"),
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
            let expected = "NATS_HOST has an entry that starts with ws://, which is without TLS, but \
                            NATS_TLS_FIRST is set; write wss://";
            assert!(problems[0].starts_with(expected), "{problems:?}");
        }
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
            assert_eq!(nats.has_web_socket(), expected, "{hosts}");
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
