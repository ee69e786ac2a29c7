//! Looks up variables, parses them, and collects every problem, so that one run reports all of them.
//!
//! Code that reads several settings must read all of them before the first `?`, because an early return would hide
//! the problems of the others.

use std::time::Duration;

use reqwest::Url;

use super::{
    environment::Environment,
    variables::{Default, Kind, find},
};

/// There is no value, because a problem with it was noted. Only [`Reader::note`] returns this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) struct Noted(());

/// Takes variables from the environment and collects the problems.
pub(super) struct Reader<'a> {
    pub(super) environment: &'a Environment,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(environment: &'a Environment) -> Self {
        Self {
            environment,
            problems: environment.problems.clone(),
        }
    }

    /// Notes a problem of a variable: `problem` is the sentence after its name.
    pub(super) fn note(&mut self, name: &str, problem: &str) -> Noted {
        let problem = format!("{name} {problem}");
        // A variable that several settings depend on is read for each of them.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
        Noted(())
    }

    /// Returns whether a variable is set, even to a bad value.
    pub(super) fn is_set(&self, name: &str) -> bool {
        !matches!(self.look_up(name), Ok(None))
    }

    /// Returns the text of a variable, if it is set.
    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, Noted> {
        self.look_up(name)
            .map_err(|problem| self.note(name, &problem))
    }

    /// Returns the value of a variable that may be unset.
    pub(super) fn optional<T>(
        &mut self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, Noted> {
        let text = self.text(name)?;
        let value = text.map(|text| parse(&text)).transpose();
        value.map_err(|problem| self.note(name, &problem))
    }

    /// Returns the value of a variable, or its default. Without a default it must be set.
    pub(super) fn value<T>(
        &mut self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, Noted> {
        let variable = find(name).map(|variable| (variable.default, variable.meaning));
        let value = match (self.text(name)?, variable) {
            (Some(text), _) => parse(&text),
            (None, Some((Default::Value(text), _))) => parse(text),
            (None, variable) => Err(format!(
                "is required, but not set: {}",
                variable.unzip().1.unwrap_or_default()
            )),
        };
        value.map_err(|problem| self.note(name, &problem))
    }

    /// Returns the values of two variables that must be set together.
    pub(super) fn both_or_neither<A, B>(
        &mut self,
        (a_name, parse_a): (&str, impl FnOnce(&str) -> Result<A, String>),
        (b_name, parse_b): (&str, impl FnOnce(&str) -> Result<B, String>),
    ) -> Result<Option<(A, B)>, Noted> {
        let a = self.optional(a_name, parse_a);
        let b = self.optional(b_name, parse_b);
        let (missing, set) = match (a?, b?) {
            (Some(a), Some(b)) => return Ok(Some((a, b))),
            (None, None) => return Ok(None),
            (Some(_), None) => (b_name, a_name),
            (None, Some(_)) => (a_name, b_name),
        };
        let problem = format!("is not set, but {set} is; set both or neither");
        Err(self.note(missing, &problem))
    }

    /// Returns the result, or all problems that were noted.
    pub(super) fn finish<T>(self, whole: Result<T, Noted>) -> Result<T, Vec<String>> {
        match whole {
            Ok(whole) if self.problems.is_empty() => Ok(whole),
            _ => Err(self.problems),
        }
    }

    /// Looks up a variable in the environment.
    fn look_up(&self, name: &str) -> Result<Option<String>, String> {
        match find(name).map(|variable| variable.kind) {
            Some(Kind::File) => self.environment.text(name),
            _ => self.environment.text_or_file(name),
        }
    }
}

/// Accepts any text.
pub(super) fn any_text(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

/// Parses one of a few words, each with what it stands for.
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

/// Parses entries separated by white space; at least one.
pub(super) fn parse_list<T>(
    text: &str,
    parse: fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    if text.trim().is_empty() {
        return Err("holds nothing but white space; set it to a value, or unset it".into());
    }
    text.split_whitespace().map(parse).collect()
}

/// Parses an http(s) URL.
pub(super) fn parse_url(text: &str, example: &str) -> Result<Url, String> {
    let url = text.parse::<Url>();
    let url = url.map_err(|error| format!("is not a valid URL ({error}); {example}"))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        other => Err(format!(
            "starts with {other}:, not with http:// or https://; {example}"
        )),
    }
}
