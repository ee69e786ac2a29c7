//! Where settings come from: the process environment, `.env.local` and `.env`, and `X_FILE`.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
};

use super::files::{read_text, shown};

/// The dotenv files, the one that wins first.
const DOTENV_FILES: [&str; 2] = [".env.local", ".env"];

/// Added to a variable's name for the variable that names a file holding its value.
pub const FILE_SUFFIX: &str = "_FILE";

/// Every variable that is set. An empty value counts as unset.
#[derive(Default)]
pub struct Environment {
    variables: BTreeMap<String, OsString>,
    /// The dotenv files that were read.
    files: Vec<&'static str>,
    /// Where they were looked for.
    directory: PathBuf,
}

impl Environment {
    /// The process environment, and below it the dotenv files in `directory`; and one sentence for each
    /// of these files that exists and can't be read or parsed. It names the file and the line, and
    /// quotes nothing, because the line may hold a secret.
    #[must_use]
    pub fn load(directory: &Path) -> (Self, Vec<String>) {
        let mut environment: Self = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .collect();
        environment.directory = directory.to_owned();
        let mut problems = Vec::new();
        for file in DOTENV_FILES {
            match read_dotenv(&directory.join(file)) {
                Ok(None) => {}
                Ok(Some(variables)) => {
                    environment.files.push(file);
                    environment.fill(variables);
                }
                Err(problem) => problems.push(format!("{file}{problem}")),
            }
        }
        (environment, problems)
    }

    /// Adds what is not set yet, neither by itself nor by way of its file.
    fn fill(&mut self, variables: BTreeMap<String, OsString>) {
        let new: Vec<_> = variables
            .into_iter()
            .filter(|(name, _)| {
                let twin = name
                    .strip_suffix(FILE_SUFFIX)
                    .map_or_else(|| format!("{name}{FILE_SUFFIX}"), str::to_owned);
                !self.variables.contains_key(name) && !self.variables.contains_key(&twin)
            })
            .collect();
        self.variables.extend(new);
    }

    /// The value of a variable as it is, whatever its bytes.
    #[must_use]
    pub fn raw(&self, name: &str) -> Option<&OsStr> {
        self.variables.get(name).map(OsString::as_os_str)
    }

    /// The text of a variable that names a file itself, and so has no `X_FILE`.
    ///
    /// # Errors
    /// If the value is not UTF-8.
    pub fn text(&self, name: &str) -> Result<Option<String>, String> {
        self.raw(name)
            .map(|value| {
                value
                    .to_str()
                    .map(str::to_owned)
                    .ok_or("is not valid UTF-8".to_owned())
            })
            .transpose()
    }

    /// The text of a variable, or of the file that its `X_FILE` names.
    ///
    /// # Errors
    /// If both are set, if the value is not UTF-8, or if the file can't be read or is empty.
    pub fn text_or_file(&self, name: &str) -> Result<Option<String>, String> {
        let file_name = format!("{name}{FILE_SUFFIX}");
        match (self.raw(name), self.raw(&file_name)) {
            (Some(_), Some(_)) => Err(format!("and {file_name} are both set; keep one of them")),
            (Some(_), None) => self.text(name),
            (None, Some(path)) => read_value(Path::new(path)).map(Some).map_err(|fault| {
                let shown = shown(Path::new(path));
                format!("cannot be taken from {shown}, which {file_name} names: {fault}")
            }),
            (None, None) => Ok(None),
        }
    }

    /// Whether there is a dotenv file.
    #[must_use]
    pub fn has_files(&self) -> bool {
        !self.files.is_empty()
    }

    /// Which dotenv files were read, in a sentence.
    #[must_use]
    pub fn files(&self) -> String {
        let directory = self.directory.display();
        match &self.files[..] {
            [] => format!(
                "found neither {} in {directory}",
                DOTENV_FILES.join(" nor ")
            ),
            files => format!("read {} in {directory}", files.join(" and ")),
        }
    }

    /// The names of all variables that are set.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.variables.keys().map(String::as_str)
    }
}

impl<N: Into<String>, V: Into<OsString>> FromIterator<(N, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        let variables = variables
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .filter(|(_, value)| !value.is_empty())
            .collect();
        Self {
            variables,
            ..Self::default()
        }
    }
}

/// A file's content as a value, one trailing newline removed.
fn read_value(path: &Path) -> Result<String, String> {
    let mut value = read_text(path).map_err(|error| error.to_string())?;
    if value.ends_with('\n') {
        value.pop();
        if value.ends_with('\r') {
            value.pop();
        }
    }
    if value.is_empty() {
        Err("the file is empty".to_owned())
    } else {
        Ok(value)
    }
}

/// The variables of a dotenv file, if there is such a file.
fn read_dotenv(path: &Path) -> Result<Option<BTreeMap<String, OsString>>, String> {
    let text = match read_text(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!(": cannot be read: {error}")),
    };
    parse_dotenv(&text).map(Some)
}

/// The variables in the text of a dotenv file.
pub(crate) fn parse_dotenv(text: &str) -> Result<BTreeMap<String, OsString>, String> {
    let text = text.trim_start_matches('\u{feff}');
    if let Some(line) = substituted_line(text) {
        return Err(format!(
            ", line {line}: has a $ that would be replaced by the value of a variable; put the value \
             in single quotes"
        ));
    }
    let variables = dotenvy::from_read_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| match error {
            dotenvy::Error::LineParse(line, _) => format!(
                ", line {}: is no NAME=value; put a value with spaces, quotes, # or $ in single quotes",
                line_number(text, &line)
            ),
            error => format!(": cannot be read: {error}"),
        })?;
    Ok(Environment::from_iter(variables).variables)
}

/// The number, from 1, of the first line in which the parser would replace a `$` and what follows it by
/// the value of another variable, or by nothing: a password would silently be another one.
fn substituted_line(text: &str) -> Option<usize> {
    let (mut line, mut before) = (1, '\n');
    let (mut quote, mut is_escaped, mut is_comment) = (None, false, false);
    for c in text.chars() {
        match c {
            '\n' => {
                line += 1;
                (is_escaped, is_comment) = (false, false);
            }
            _ if is_comment => {}
            _ if is_escaped => is_escaped = false,
            '\\' if quote != Some('\'') => is_escaped = true,
            '$' if quote != Some('\'') => return Some(line),
            '#' if quote.is_none() && before.is_whitespace() => is_comment = true,
            '\'' | '"' if quote.is_none() => quote = Some(c),
            _ if quote == Some(c) => quote = None,
            _ => {}
        }
        before = c;
    }
    None
}

/// The number, from 1, of the line at which `faulty` starts in `text`: what the parser hands back
/// is a line, or several where a quote is open, or the value alone, in any case without a comment.
fn line_number(text: &str, faulty: &str) -> usize {
    let first = faulty.lines().next().unwrap_or_default();
    text.lines()
        .position(|line| line == first)
        .or_else(|| text.lines().position(|line| line.contains(first)))
        .map_or(1, |index| index + 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::{fs, os::unix::ffi::OsStringExt};

    fn dotenv(text: &[u8]) -> Result<BTreeMap<String, OsString>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".env");
        fs::write(&path, text).unwrap();
        read_dotenv(&path).map(Option::unwrap)
    }

    #[test]
    fn a_malformed_dotenv_file_is_reported_with_its_line_and_without_its_text() {
        for (text, line) in [
            ("A=1\nthis is hunter2\nB=2\n", 2),
            ("A=1\nA\n", 2),
            ("# note\n\nA='hunter2\nB=2\n", 3),
            ("# note\nA=hunter2 hunter2 # note\n", 2),
        ] {
            let problem = dotenv(text.as_bytes()).unwrap_err();
            assert!(
                problem.starts_with(&format!(", line {line}: ")),
                "{text:?}: {problem}"
            );
            assert!(!problem.contains("hunter2"), "{problem}");
        }
        assert!(
            dotenv(b"A=\xff\n")
                .unwrap_err()
                .starts_with(": cannot be read")
        );
    }

    #[test]
    fn a_dollar_that_would_be_substituted_is_refused() {
        for (text, line) in [
            ("A=pa$word", 1),
            ("A=1\nexport B=${HOME}\n", 2),
            ("A=1\n\nB=\"pa$word\"\n", 3),
            ("# don't\nA='$1' # it's\nB=$1\n", 3),
            ("A='one\n# $two' \nB=\"three\nfour$\"\n", 4),
            ("A=x#$word", 1),
            ("A=\\\\$word", 1),
            ("A='$a'$b", 1),
            ("A=\"'$a'\"", 1),
            // In single quotes a backslash stands for itself.
            ("A='\\'$b", 1),
        ] {
            let problem = dotenv(text.as_bytes()).unwrap_err();
            let expected = format!(", line {line}: has a $ ");
            assert!(problem.starts_with(&expected), "{text:?}: {problem}");
            assert!(problem.ends_with("in single quotes"), "{problem}");
            assert!(!problem.contains("word"), "{problem}");
        }
        for (text, value) in [
            ("A='pa$word'", "pa$word"),
            ("A=pa\\$word # costs $1", "pa$word"),
            ("A=\"pa\\$word\"", "pa$word"),
            ("  # $1\nA=1\\\n# $2", "1"),
            ("A='one\n$two\n\"'\t# $3", "one\n$two\n\""),
        ] {
            let expected = Environment::from_iter([("A", value)]).variables;
            assert_eq!(dotenv(text.as_bytes()), Ok(expected), "{text:?}");
        }
    }

    #[test]
    fn dotenv_values_are_taken_as_people_write_them() {
        let variables =
            dotenv("\u{feff}A=1 # one\r\nexport B='two # $words'\n\n# C=3\nD=\n".as_bytes())
                .unwrap();
        let expected = [("A", "1"), ("B", "two # $words")];
        assert_eq!(variables, Environment::from_iter(expected).variables);
    }

    #[test]
    fn the_first_source_wins_also_over_the_file_form_of_a_later_one() {
        let mut environment = Environment::from_iter([("A", "1"), ("B_FILE", "/b"), ("C", "")]);
        environment.fill(
            Environment::from_iter([("A", "x"), ("A_FILE", "x"), ("B", "x"), ("C", "3")]).variables,
        );
        let expected = [("A", "1"), ("B_FILE", "/b"), ("C", "3")];
        assert_eq!(
            environment.variables,
            Environment::from_iter(expected).variables
        );
    }

    #[test]
    fn a_value_may_stand_in_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("value");
        let environment = Environment::from_iter([("X_FILE", &path)]);
        let read = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            environment.text_or_file("X")
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
        let (largest, too_large) = (vec![b'x'; 1 << 20], vec![b'x'; (1 << 20) + 1]);
        assert_eq!(read(&largest).unwrap().unwrap().len(), largest.len());
        assert!(read(&too_large).unwrap_err().contains("larger than 1 MiB"));
        fs::remove_file(&path).unwrap();
        assert!(
            environment
                .text_or_file("X")
                .unwrap_err()
                .contains("No such file")
        );
    }

    #[test]
    fn both_forms_of_a_variable_and_other_bytes_than_text_are_refused() {
        let both = Environment::from_iter([("X", "1"), ("X_FILE", "/x")]);
        assert_eq!(
            both.text_or_file("X").unwrap_err(),
            "and X_FILE are both set; keep one of them"
        );
        let binary = Environment::from_iter([("X", OsString::from_vec(vec![0xff]))]);
        assert_eq!(binary.text_or_file("X").unwrap_err(), "is not valid UTF-8");
    }
}
