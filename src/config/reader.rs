//! Looks up variables, parses them, and collects every problem, so that one run reports all of them. A variable with
//! a problem counts as unset or as its default meanwhile, which nobody sees: a configuration with problems is refused.

use std::time::Duration;

use super::{
    environment::Environment,
    variables::{
        Default::{Off, Required, Value},
        find,
    },
};

/// Takes variables from the environment and collects the problems.
pub(super) struct Reader<'a> {
    pub(super) environment: &'a Environment,
    pub(super) problems: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(environment: &'a Environment) -> Self {
        Self {
            environment,
            problems: environment.problems.clone(),
        }
    }

    /// Notes a problem of a variable: `problem` is the sentence after its name.
    pub(super) fn note(&mut self, name: &str, problem: &str) {
        let problem = format!("{name} {problem}");
        // A variable that several settings depend on is read for each of them.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Returns whether a problem of a variable was noted.
    pub(super) fn has_problem(&self, name: &str) -> bool {
        let start = format!("{name} ");
        self.problems.iter().any(|it| it.starts_with(&start))
    }

    /// Returns whether a variable is set, even to a bad value.
    pub(super) fn is_set(&self, name: &str) -> bool {
        self.environment.text(name) != Ok(None)
    }

    /// Returns the value of a variable that may be unset.
    pub(super) fn optional<T>(
        &mut self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.environment.text(name).transpose()?;
        let value = value.and_then(|text| parse(&text));
        value.map_err(|problem| self.note(name, &problem)).ok()
    }

    /// Returns the value of a variable that must be set or has a default.
    pub(super) fn value<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> T {
        if let Some(value) = self.optional(name, &parse) {
            return value;
        }
        let variable = find(name).map(|variable| (variable.default, variable.meaning));
        let text = match variable {
            Some((Value(text), _)) => text,
            Some((Required(example), meaning)) => {
                if !self.has_problem(name) {
                    self.note(name, &format!("is required, but not set: {meaning}"));
                }
                example
            }
            Some((Off, _)) | None => unreachable!("{name} has no default"),
        };
        parse(text).unwrap_or_else(|problem| unreachable!("{name}: {problem}"))
    }

    /// Returns the values of two variables that must be set together.
    pub(super) fn both_or_neither<A, B>(
        &mut self,
        (a_name, parse_a): (&str, impl FnOnce(&str) -> Result<A, String>),
        (b_name, parse_b): (&str, impl FnOnce(&str) -> Result<B, String>),
    ) -> Option<(A, B)> {
        let a = self.optional(a_name, parse_a);
        let b = self.optional(b_name, parse_b);
        for (is_valid, set, missing) in
            [(a.is_some(), a_name, b_name), (b.is_some(), b_name, a_name)]
        {
            if is_valid && !self.is_set(missing) {
                let problem = format!("is not set, but {set} is; set both or neither");
                self.note(missing, &problem);
            }
        }
        a.zip(b)
    }
}

/// Accepts any text.
pub(super) fn any_text(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

/// Parses one of a few words into its value.
pub(super) fn parse_choice<T: Copy>(text: &str, choices: &[(&str, T)]) -> Result<T, String> {
    let chosen = choices.iter().find(|(word, _)| *word == text);
    chosen.map(|(_, choice)| *choice).ok_or_else(|| {
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        format!("is {text:?}; write {}", words.join(" or "))
    })
}

pub(super) fn parse_bool(text: &str) -> Result<bool, String> {
    parse_choice(text, &[("true", true), ("false", false)])
}

pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= Duration::from_secs(86_400) => Ok(duration),
        _ => Err(format!(
            "{text:?} is not a valid duration of at most a day; write it like 500ms, 15s or 2m"
        )),
    }
}
