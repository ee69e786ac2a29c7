//! Text as people read it.

/// The causes of an error, each named once: many an error repeats its cause.
#[must_use]
pub fn reasons(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// A number of things: `1 message`, `2 messages`.
#[must_use]
pub fn count(number: u64, thing: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {thing}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn a_cause_that_was_named_already_is_not_named_again() {
        let refused = anyhow!("refused")
            .context("IO error: refused")
            .context("cannot connect");
        assert_eq!(reasons(&refused), "cannot connect: IO error: refused");
        assert_eq!(reasons(&anyhow!("refused")), "refused");
    }

    #[test]
    fn one_thing_is_no_plural() {
        assert_eq!(count(1, "message"), "1 message");
        assert_eq!(count(0, "message"), "0 messages");
    }
}
