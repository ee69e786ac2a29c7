//! Subject prefixes: validation, overlap and rewriting. Pure.
//!
//! A NATS subject is a list of non-empty tokens joined by dots
//! (<https://docs.nats.io/nats-concepts/subjects>).

use std::{fmt, str::FromStr};

/// One or more literal tokens joined by dots, such as `cms.cache`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// Returns the wildcard subject that matches everything below the prefix: `<prefix>.>`.
    #[must_use]
    pub fn wildcard(&self) -> String {
        format!("{self}.>")
    }

    /// Returns whether a subject can be below both prefixes: one equals the other or is its ancestor,
    /// token by token. `cms.cache` and `cms.cached` do not overlap.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.0 == other.0 || self.contains(&other.0) || other.contains(&self.0)
    }

    /// Returns `subject` with this prefix replaced by `target`; `None` if it is not below this prefix.
    #[must_use]
    pub fn rewrite(&self, subject: &str, target: &Self) -> Option<String> {
        self.rest_of(subject)
            .map(|rest| [&target.0, ".", rest].concat())
    }

    /// Returns whether every subject below the prefix matches `subject`, which may have wildcards.
    #[must_use]
    pub fn is_covered_by(&self, subject: &str) -> bool {
        let tokens = |text: &str| text.split('.').count();
        let is_open = subject.rsplit('.').next() == Some(">");
        is_open && tokens(subject) <= tokens(&self.0) + 1 && self.meets(subject)
    }

    /// Returns whether any subject below the prefix matches `subject`, which may have wildcards.
    #[must_use]
    pub fn meets(&self, subject: &str) -> bool {
        let (mut ours, mut theirs) = (self.0.split('.').chain([">"]), subject.split('.'));
        loop {
            match (ours.next(), theirs.next()) {
                (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
                (Some(_), Some("*")) => {}
                (Some(ours), Some(theirs)) if ours == theirs => {}
                _ => return false,
            }
        }
    }

    /// Returns whether `subject` is below the prefix.
    #[must_use]
    pub fn contains(&self, subject: &str) -> bool {
        self.rest_of(subject).is_some()
    }

    /// Returns the part of `subject` after `<prefix>.`, if it is below the prefix.
    fn rest_of<'a>(&self, subject: &'a str) -> Option<&'a str> {
        subject.strip_prefix(&self.0)?.strip_prefix('.')
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// With a longer subject, the line `HPUB <subject> <size> <size>` exceeds `max_control_line`, and the server closes
/// the connection. An operator can change that limit, but the server does not announce it.
pub(crate) const LONGEST_SUBJECT: usize = 4096 - "HPUB  67108864 67108864".len();

impl FromStr for Prefix {
    /// The problem with the text, and how to fix it.
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() + ".x".len() > LONGEST_SUBJECT {
            return Err(
                "is longer than a NATS subject can be; choose a short one, such as cms.cache",
            );
        }
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err("contains white space or a control character; remove it, as in cms.cache");
        }
        if text.split('.').any(str::is_empty) {
            return Err(
                "has an empty token; remove a dot at either end, or one of two in a row, as in cms.cache",
            );
        }
        if text.split('.').any(|token| matches!(token, "*" | ">")) {
            return Err(
                "contains a wildcard; give only the prefix, as in cms.cache, which includes everything below it",
            );
        }
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn invalid_prefixes_are_refused() {
        for (text, problem) in [
            ("", "has an empty token"),
            (".", "has an empty token"),
            ("cms.", "has an empty token"),
            (".cms", "has an empty token"),
            ("cms..cache", "has an empty token"),
            ("cms.*", "contains a wildcard"),
            (">", "contains a wildcard"),
            ("cms cache", "contains white space"),
            ("cms\tcache", "contains white space"),
            ("cms\u{a0}cache", "contains white space"),
            ("cms\0cache", "contains white space"),
            (&"x".repeat(LONGEST_SUBJECT - 1), "is longer than"),
        ] {
            let found = text.parse::<Prefix>().unwrap_err();
            assert!(found.starts_with(problem), "{text:?}: {found}");
        }
        let longest = "x".repeat(LONGEST_SUBJECT - 2);
        assert!(longest.parse::<Prefix>().is_ok());
    }

    #[test]
    fn overlap_is_decided_token_by_token() {
        for (a, b, expected) in [
            ("cms.cache", "cms.cache", true),
            ("cms", "cms.cache", true),
            ("cms.cache.deep", "cms.cache", true),
            ("cms.cache", "cms.cached", false),
            ("cms.cache", "relayed.cache", false),
            ("a", "b", false),
        ] {
            assert_eq!(prefix(a).overlaps(&prefix(b)), expected, "{a} {b}");
            assert_eq!(prefix(b).overlaps(&prefix(a)), expected, "{b} {a}");
        }
    }

    #[test]
    fn rewrites_the_leading_prefix_only() {
        let (from, to) = (prefix("cms.cache"), prefix("relayed.cache"));
        assert_eq!(
            from.rewrite("cms.cache.cms.cache.x", &to).as_deref(),
            Some("relayed.cache.cms.cache.x")
        );
        assert_eq!(from.rewrite("cms.cache", &to), None);
        assert_eq!(from.rewrite("cms.cached.x", &to), None);
        assert_eq!(from.rewrite("other.cms.cache.x", &to), None);
    }

    #[test]
    fn a_subject_covers_a_prefix_if_it_matches_all_that_is_below_and_meets_it_if_it_matches_any() {
        for (subject, covers, meets) in [
            ("relayed.cache.>", true, true),
            (">", true, true),
            ("relayed.>", true, true),
            ("*.cache.>", true, true),
            ("relayed.*.>", true, true),
            ("*.*.>", true, true),
            ("relayed.cache.*", false, true),
            ("relayed.cache.*.>", false, true),
            ("*.*.*.>", false, true),
            ("relayed.cache.pages.>", false, true),
            ("*.*.home", false, true),
            ("relayed.cache", false, false),
            ("relayed.*", false, false),
            ("relayed.cached.>", false, false),
            // Only a token of its own is a wildcard.
            ("relayed.cache.pages>", false, true),
            ("cms.cache.>", false, false),
            ("", false, false),
        ] {
            let prefix = prefix("relayed.cache");
            assert_eq!(prefix.is_covered_by(subject), covers, "{subject}");
            assert_eq!(prefix.meets(subject), meets, "{subject}");
        }
    }

    /// A token of few characters, so that equal ones, and ones that begin another, are common.
    fn tokens() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[abé$-]{1,2}", 1..4)
    }

    proptest! {
        #[test]
        fn rewriting_loses_nothing_and_never_matches_the_subscription(
            from in tokens(), to in tokens(), rest in tokens()
        ) {
            let (from, to, rest) = (prefix(&from.join(".")), prefix(&to.join(".")), rest.join("."));
            prop_assume!(!from.overlaps(&to));
            let subject = format!("{from}.{rest}");
            let rewritten = from.rewrite(&subject, &to).unwrap();
            prop_assert_eq!(from.rewrite(&rewritten, &to), None);
            prop_assert_eq!(to.rewrite(&rewritten, &from), Some(subject));
        }

        #[test]
        fn what_does_not_overlap_shares_no_subject(a in tokens(), b in tokens(), rest in tokens()) {
            let (a, b) = (prefix(&a.join(".")), prefix(&b.join(".")));
            prop_assume!(!a.overlaps(&b));
            let subject = format!("{a}.{}", rest.join("."));
            prop_assert_eq!(b.rest_of(&subject), None);
        }

        #[test]
        fn any_text_is_refused_or_kept_as_it_is(text in any::<String>()) {
            if let Ok(parsed) = text.parse::<Prefix>() {
                prop_assert_eq!(parsed.to_string(), text);
            }
        }
    }
}
