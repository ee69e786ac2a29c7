//! Names of variables that are set and mean nothing to the relay, but were probably meant for it.

use std::fmt;

use super::{
    environment::{Environment, FILE_SUFFIX},
    variables::{
        ADDRESS, CREDS, DESTINATION, FAILED_PREFIX, HOST, Kind, LOG, PASS, PREFIX, RELAYED_PREFIX,
        SECRET, USER, VARIABLES, Variable, is_known,
    },
};

/// What other programs call the same thing.
const OTHER_NAMES: [(&str, &str); 13] = [
    ("NATS_URL", HOST),
    ("NATS_URLS", HOST),
    ("NATS_SERVER", HOST),
    ("NATS_SERVERS", HOST),
    ("NATS_USERNAME", USER),
    ("NATS_PASSWORD", PASS),
    ("NATS_CREDENTIALS", CREDS),
    ("NATS_PREFIX", PREFIX),
    ("NATS_RELAYED_PREFIX", RELAYED_PREFIX),
    ("NATS_FAILED_PREFIX", FAILED_PREFIX),
    ("WEBHOOK_URL", DESTINATION),
    ("WEBHOOK_SIGNING_SECRET", SECRET),
    ("LOG_LEVEL", LOG),
];

/// A set variable that was probably meant to be another one.
#[derive(Debug)]
pub struct Misnamed<'a> {
    name: &'a str,
    known: String,
}

impl fmt::Display for Misnamed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, known } = self;
        write!(f, "{name} is set but not known; is {known} meant?")
    }
}

/// All of them. Other unknown variables are none of our business: Kubernetes, for one, sets
/// `NATS_PORT` by itself.
#[must_use]
pub fn misnamed(environment: &Environment) -> Vec<Misnamed<'_>> {
    environment
        .names()
        .filter(|name| !is_known(name))
        .filter_map(|name| {
            let known = meant(environment, name)?;
            Some(Misnamed { name, known })
        })
        .collect()
}

/// The variable that was probably meant.
fn meant(environment: &Environment, name: &str) -> Option<String> {
    let (stem, suffix) = match name.strip_suffix(FILE_SUFFIX) {
        Some(stem) => (stem, FILE_SUFFIX),
        None => (name, ""),
    };
    let with_suffix = |known: &str| match Variable::find(known) {
        Some(variable) if variable.kind != Kind::File => format!("{known}{suffix}"),
        _ => known.to_owned(),
    };
    let another_name = OTHER_NAMES
        .iter()
        .find(|(other, _)| *other == name || *other == stem)
        .map(|(_, known)| *known);
    // Whoever has set the right one has the other for another program, such as the nats command.
    if let Some(known) = another_name {
        return (!is_set(environment, known)).then(|| with_suffix(known));
    }
    VARIABLES
        .iter()
        .find(|variable| is_close(stem, variable.name))
        .map(|variable| with_suffix(variable.name))
}

fn is_set(environment: &Environment, known: &str) -> bool {
    let has = |name: &str| !matches!(environment.text_or_file(name), Ok(None));
    has(known) || (known == HOST && has(ADDRESS))
}

/// Whether `word` is probably a misspelling of `known`.
fn is_close(word: &str, known: &str) -> bool {
    let tolerance = if known.len() < 12 { 1 } else { 2 };
    strsim::osa_distance(word, known) <= tolerance
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant_is_named_and_foreign_variables_are_left_alone() {
        for (set, expected) in [
            (&["WEBHOOK_DESTINATON"][..], Some(DESTINATION)),
            (&["NATS_HOSTS"], Some(HOST)),
            (&["NATS_PASSS_FILE"], Some("NATS_PASS_FILE")),
            // Two letters may be wrong in a name that is as long as this.
            (&["WEBHOK_CERTS"], Some("WEBHOOK_CERT")),
            (&["WEBHOK_CAS"], None),
            // It names a file itself.
            (&["NATS_NKEY_FILE"], Some("NATS_NKEY")),
            (&["NATS_CA_FILE"], Some("NATS_CA")),
            (&["NATS_URL"], Some(HOST)),
            (&["WEBHOOK_URL"], Some(DESTINATION)),
            (&["NATS_USERNAME"], Some(USER)),
            (&["NATS_PASSWORD"], Some(PASS)),
            (&["NATS_PASSWORD_FILE"], Some("NATS_PASS_FILE")),
            (&["LOG_LEVEL"], Some(LOG)),
            // The nats command takes NATS_URL.
            (&["NATS_URL", HOST], None),
            (&["NATS_URL", ADDRESS], None),
            (&["NATS_URL", "NATS_HOST_FILE"], None),
            (&["NATS_PORT"], None),
            (&["NATS_SERVICE_HOST"], None),
            (&["PATH"], None),
            (&["NATS_TOKEN_FILE"], None),
        ] {
            let environment = set.iter().map(|name| (*name, "x")).collect();
            let found: Vec<_> = misnamed(&environment)
                .into_iter()
                .map(|misnamed| misnamed.known)
                .collect();
            assert_eq!(found, Vec::from_iter(expected), "{set:?}");
        }
    }
}
