//! Where settings come from: the process environment, `.env.local` and `.env`, and `X_FILE`.

use std::{collections::BTreeMap, ffi::OsString, fs, io, path::Path};

use super::variables::{
    ADDRESS, DESTINATION, FILE_SUFFIX, HOST, PASS, USER, VARIABLES, has_file_form, is_known,
};

/// Names that other programs use for the same settings.
const ALIASES: [(&str, &str); 4] = [
    ("NATS_URL", HOST),
    ("NATS_USERNAME", USER),
    ("NATS_PASSWORD", PASS),
    ("WEBHOOK_URL", DESTINATION),
];

/// Every variable that is set. An empty value counts as unset.
#[derive(Clone, Default)]
pub struct Environment {
    /// The values, or the problems with them. Of a dotenv variable that means nothing to the relay, only the name is
    /// kept.
    variables: BTreeMap<String, Result<String, String>>,
    /// A sentence for each dotenv file that says which variables it sets.
    pub files: Vec<String>,
    /// The dotenv files that can't be read, and why.
    pub(super) problems: Vec<String>,
    /// Settings that are probably mistakes.
    pub warnings: Vec<String>,
}

impl Environment {
    /// Reads the process environment, and then the dotenv files in `directory`.
    ///
    /// These files usually belong to another program with another syntax: only the lines that set our own variables
    /// count, and no other line is a problem or changes how ours are parsed.
    #[must_use]
    pub fn load(directory: &Path) -> Self {
        let mut environment: Self = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .collect();
        for (name, value) in &environment.variables {
            let value = value.as_deref().unwrap_or_default();
            let is_in =
                |quote| value.len() > 1 && value.starts_with(quote) && value.ends_with(quote);
            if is_known(name) && (is_in('"') || is_in('\'')) {
                environment.warnings.push(format!(
                    "the value of {name} is in quotes, which are part of it here; docker --env-file keeps them"
                ));
            }
        }
        for file in [".env.local", ".env"].map(|file| directory.join(file)) {
            // A directory may be a Python virtual environment.
            if file.is_dir() || !file.exists() {
                continue;
            }
            match read_file(&file) {
                Ok(content) => environment.fill(&file, &String::from_utf8_lossy(&content)),
                Err(error) => {
                    let problem = format!("{} cannot be read: {error}", file.display());
                    environment.problems.push(problem);
                }
            }
        }
        let misnamed = environment.misnamed();
        environment.warnings.extend(misnamed);
        environment
    }

    /// Adds the variables of a dotenv file that are not yet set, directly or by `X_FILE`.
    fn fill(&mut self, file: &Path, text: &str) {
        let file = file.display();
        let mut new = BTreeMap::new();
        for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let Some(name) = name_set_by(line).map(str::to_owned) else {
                continue;
            };
            let stem = name.strip_suffix(FILE_SUFFIX).unwrap_or(&name);
            if !is_known(&name) {
                self.variables.entry(name).or_insert(Ok(String::new()));
            } else if !self.variables.contains_key(stem)
                && !self.variables.contains_key(&format!("{stem}{FILE_SUFFIX}"))
            {
                let number = index + 1;
                let value =
                    read_value(line).map_err(|fault| format!("in {file}, line {number}, {fault}"));
                if value != Ok(String::new()) {
                    new.insert(name, value);
                }
            }
        }
        let names = match new.is_empty() {
            true => "nothing of the relay".to_owned(),
            false => Vec::from_iter(new.keys().cloned()).join(", "),
        };
        self.files.push(format!("{file} sets {names}"));
        self.variables.extend(new);
    }

    /// Returns the text of a variable, or of the file that its `X_FILE` names.
    pub(crate) fn text(&self, name: &str) -> Result<Option<String>, String> {
        let file_name = format!("{name}{FILE_SUFFIX}");
        let value = self.variables.get(name).cloned().transpose()?;
        let path = match has_file_form(name) {
            true => self.variables.get(&file_name).cloned().transpose()?,
            false => None,
        };
        match (value, path) {
            (Some(_), Some(_)) => Err(format!("and {file_name} are both set; keep one of them")),
            (value, None) => Ok(value),
            (None, Some(path)) => read_secret(Path::new(&path)).map(Some).map_err(|fault| {
                let shown = shown(Path::new(&path));
                format!("cannot be taken from {shown}, which {file_name} names: {fault}")
            }),
        }
    }

    /// Returns the names of all variables that are set, ours or not.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.variables.keys().map(String::as_str)
    }

    /// Returns a sentence for each unknown variable that is another name for a known one, or one letter away from it.
    /// Other unknown variables are none of our business: Kubernetes, for one, sets `NATS_PORT` by itself.
    pub(crate) fn misnamed(&self) -> Vec<String> {
        let is_set = |name| self.text(name) != Ok(None);
        let meant = |name: &&str| {
            let stem = name.strip_suffix(FILE_SUFFIX).unwrap_or(name);
            let mut names = VARIABLES.iter().map(|variable| variable.name);
            match ALIASES.iter().find(|(alias, _)| *alias == stem) {
                // If the right one is set too, the other is for another program, such as the nats command.
                Some((_, HOST)) if is_set(ADDRESS) => None,
                Some((_, known)) => Some(*known).filter(|known| !is_set(known)),
                None => names.find(|known| strsim::osa_distance(stem, known) <= 1),
            }
        };
        self.names()
            .filter(|name| !is_known(name))
            .filter_map(|name| Some((name, meant(&name)?)))
            .map(|(name, meant)| format!("{name} is set but not known; did you mean {meant}?"))
            .collect()
    }
}

impl<N: Into<String>, V: Into<OsString>> FromIterator<(N, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        let variables = variables
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| {
                let text = value.into_string();
                (name, text.map_err(|_| "is not valid UTF-8".to_owned()))
            })
            .collect();
        Self {
            variables,
            ..Self::default()
        }
    }
}

/// Reads the value that a file holds, without one trailing newline.
fn read_secret(path: &Path) -> Result<String, String> {
    let content = read_file(path).map_err(|error| error.to_string())?;
    let text = String::from_utf8(content).map_err(|_| "it is not valid UTF-8")?;
    let value = text.strip_suffix('\n').unwrap_or(&text);
    match value.strip_suffix('\r').unwrap_or(value) {
        "" => Err("the file is empty".to_owned()),
        value => Ok(value.to_owned()),
    }
}

/// Returns the content of a file that a setting names. It must be a regular file, because reading a pipe could block
/// forever, and a device may never end.
pub(super) fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    match fs::metadata(path)?.is_file() {
        true => fs::read(path),
        false => Err(io::Error::other(
            "it is not a regular file; copy what it holds into one",
        )),
    }
}

/// Returns a path as it may be shown. A value that is not an absolute path may be a secret set by mistake.
pub(super) fn shown(path: &Path) -> String {
    match path.is_absolute() {
        true => format!("{path:?}"),
        false => "a relative path".to_owned(),
    }
}

/// Returns the name of the variable that a line sets, if it sets one.
fn name_set_by(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
    let end = line.find(|c: char| !c.is_ascii_alphanumeric() && !"_.-".contains(c))?;
    let (name, rest) = line.split_at(end);
    let sets = rest.trim_start().starts_with(['=', ':']);
    (sets && !name.is_empty()).then_some(name)
}

/// Reads the value in a line of ours. The error quotes nothing, because the line may contain a secret.
pub(crate) fn read_value(line: &str) -> Result<String, &'static str> {
    const BAD: &str = "is not a valid NAME=value on one line; put a value with spaces, quotes, # or $ in \
                       single quotes";
    const DOLLAR: &str =
        "has a $ that would be replaced by the value of a variable; put the value in single quotes";
    let value = line.split_once('=').ok_or(BAD)?.1.trim_start();
    let replaceable = match value.strip_prefix('\'') {
        Some(literal) => literal.split_once('\'').map_or("", |(_, rest)| rest),
        None => value,
    };
    // A comment may hold anything; but within double quotes, # begins none.
    let replaceable = match value.starts_with('"') {
        true => replaceable,
        false => replaceable.split(" #").next().unwrap_or_default(),
    };
    // Otherwise a password would silently change.
    let unescaped = replaceable.replace(r"\\", "").replace(r"\$", "");
    if unescaped.contains('$') {
        return Err(DOLLAR);
    }
    match dotenvy::from_read_iter(line.as_bytes()).next() {
        // A replacement character stands for bytes that are not UTF-8.
        Some(Ok((_, value))) if !value.contains(char::REPLACEMENT_CHARACTER) => Ok(value),
        _ => Err(BAD),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::variables::{DESTINATION, HOST, NKEY, PASS, WEBHOOK_CERT};
    use std::os::unix::ffi::OsStringExt;

    /// Returns the value that a dotenv file gives to `NATS_PASS`.
    fn password(file: &str) -> Result<Option<String>, String> {
        let mut environment = Environment::default();
        environment.fill(Path::new(".env"), file);
        environment.text("NATS_PASS")
    }

    #[test]
    fn a_line_of_ours_that_cannot_be_read_is_reported_with_its_number_and_without_its_text() {
        for (text, line) in [
            ("A=1\nNATS_PASS: hunter2\n", 2),
            ("NATS_PASS=hunter2 hunter2 # note\n", 1),
            ("# note\n\nNATS_PASS='hunter2\nB=2\n", 3),
            ("NATS_PASS=it's hunter2\nB='2'", 1),
            ("NATS_PASS='hunter2\nB='2'", 1),
            ("NATS_PASS='hunter2' x", 1),
            ("NATS_PASS=hunter\u{fffd}", 1),
        ] {
            let problem = password(text).unwrap_err();
            let expected = format!("in .env, line {line}, is not valid");
            assert!(
                problem
                    .replace("is not a valid", "is not valid")
                    .starts_with(&expected),
                "{problem}"
            );
            assert!(!problem.contains("hunter"), "{problem}");
        }
    }

    #[test]
    fn a_dollar_that_would_be_substituted_is_refused() {
        for text in [
            "NATS_PASS=pa$word",
            "export NATS_PASS=${HOME}",
            "NATS_PASS=\"pa$word\"",
            "NATS_PASS=\"a #$word\"",
            "NATS_PASS='a'$word",
            "NATS_PASS=x#$word",
            "NATS_PASS=\\\\$word",
            "NATS_PASS=x'$a'$b",
            "NATS_PASS=\"'$a'\"",
        ] {
            let problem = password(text).unwrap_err();
            assert!(
                problem.starts_with("in .env, line 1, has a $ "),
                "{text:?}: {problem}"
            );
            assert!(
                problem.ends_with("in single quotes") && !problem.contains("word"),
                "{problem}"
            );
        }
        for (text, value) in [
            ("NATS_PASS='pa$word'", "pa$word"),
            ("NATS_PASS=pa\\$word # costs $1", "pa$word"),
            ("NATS_PASS=\"pa\\$word\"\t# note", "pa$word"),
            ("  # $1\nNATS_PASS=1\n# $2", "1"),
            ("NATS_PASS='$two\"' # $3", "$two\""),
        ] {
            assert_eq!(password(text), Ok(Some(value.to_owned())), "{text:?}");
        }
    }

    #[test]
    fn values_are_taken_as_people_write_them() {
        for (text, value) in [
            ("\u{feff}NATS_PASS=1 # one\r\n", Some("1")),
            ("export NATS_PASS='two # $words'\n", Some("two # $words")),
            ("NATS_PASS = three  ", Some("three")),
            ("#NATS_PASS=4", None),
            ("NATS_PASS=\nNATS_PASS=''", None),
            ("NATS_PASS=5\nNATS_PASS=6", Some("6")),
            ("A='\nNATS_PASS=7\n'", Some("7")),
        ] {
            assert_eq!(password(text), Ok(value.map(str::to_owned)), "{text:?}");
        }
    }

    #[test]
    fn the_first_source_wins_also_over_the_file_form_of_a_later_one() {
        let set = [
            ("NATS_USER", "1"),
            ("NATS_PASS_FILE", "/b"),
            ("NATS_TOKEN", ""),
        ];
        let mut environment = Environment::from_iter(set);
        let file = "NATS_USER=x\nNATS_USER_FILE=x\nNATS_PASS=$x\nNATS_TOKEN=3\nSECRET=x";
        environment.fill(Path::new(".env"), file);
        assert_eq!(environment.files, [".env sets NATS_TOKEN"]);
        assert_eq!(environment.text("NATS_USER"), Ok(Some("1".to_owned())));
        assert_eq!(environment.text("NATS_TOKEN"), Ok(Some("3".to_owned())));
        let names: Vec<_> = environment.names().collect();
        assert_eq!(
            names,
            ["NATS_PASS_FILE", "NATS_TOKEN", "NATS_USER", "SECRET"]
        );
    }

    #[test]
    fn a_value_may_stand_in_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("value");
        let environment = Environment::from_iter([("X_FILE", &path)]);
        let read = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            environment.text("X")
        };
        assert_eq!(read(b" a b\n"), Ok(Some(" a b".to_owned())));
        assert_eq!(read(b"a\n\n"), Ok(Some("a\n".to_owned())));
        assert_eq!(read(b"a\r\n"), Ok(Some("a".to_owned())));
        for (content, fault) in [
            (&b"\n"[..], "the file is empty"),
            (b"", "the file is empty"),
            (b"\xff", "not valid UTF-8"),
        ] {
            assert!(read(content).unwrap_err().contains(fault), "{content:?}");
        }
        fs::remove_file(&path).unwrap();
        assert!(environment.text("X").unwrap_err().contains("No such file"));
    }

    #[test]
    fn both_forms_of_a_variable_and_other_bytes_than_text_are_refused() {
        let both = Environment::from_iter([("X", "1"), ("X_FILE", "/x")]);
        assert_eq!(
            both.text("X").unwrap_err(),
            "and X_FILE are both set; keep one of them"
        );
        let binary = Environment::from_iter([("X", OsString::from_vec(vec![0xff]))]);
        assert_eq!(binary.text("X").unwrap_err(), "is not valid UTF-8");
    }

    #[test]
    fn what_was_meant_is_named_and_foreign_variables_are_left_alone() {
        for (name, expected) in [
            ("WEBHOOK_DESTINATON", Some(DESTINATION)),
            ("NATS_HOSTS", Some(HOST)),
            ("NATS_PASSS_FILE", Some(PASS)),
            ("WEBHOOK_CETR", Some(WEBHOOK_CERT)),
            ("WEBHOK_CERTS", None),
            // It names a file itself.
            ("NATS_NKEY_FILE", Some(NKEY)),
            ("NATS_PORT", None),
            ("NATS_SERVICE_HOST", None),
            ("PATH", None),
            ("http_proxy", None),
            ("NATS_TOKEN_FILE", None),
            ("NATS_URL", Some(HOST)),
            ("NATS_PASSWORD_FILE", Some(PASS)),
        ] {
            let environment = Environment::from_iter([(name, "x")]);
            let expected =
                expected.map(|known| format!("{name} is set but not known; did you mean {known}?"));
            assert_eq!(environment.misnamed(), Vec::from_iter(expected));
        }
        // The nats command takes NATS_URL.
        for known in [HOST, ADDRESS, "NATS_HOST_FILE"] {
            let environment = Environment::from_iter([("NATS_URL", "x"), (known, "x")]);
            assert_eq!(environment.misnamed(), Vec::<String>::new(), "{known}");
        }
    }
}
