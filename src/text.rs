//! Text for people. Text from elsewhere is made to fit on one line: subjects, responses, URLs and errors can
//! contain anything.

use std::borrow::Cow;

/// The most bytes of one piece of text from elsewhere, such as a URL.
pub const LONGEST_PIECE: usize = 500;

/// The most bytes of the text about one event, in a header or a status line.
pub const LONGEST_NOTE: usize = 1000;

/// The most bytes of a line of the log, or of a report.
pub const LONGEST_LINE: usize = 3500;

/// Marks a cut.
const ELLIPSIS: &str = "…";

/// Returns `text` in at most `max` bytes, with a space for each character that would break the line, control a
/// terminal or reorder the text. A text that is too long is cut in the middle, because a line has its subject at the
/// beginning and its reason at the end.
#[must_use]
pub fn one_line(text: &str, max: usize) -> Cow<'_, str> {
    // Nearly all text is like this: ASCII, and the µ of µs (C2 B5 in UTF-8). A loop without an early exit is
    // the fastest way to find out, because the compiler vectorizes it.
    let is_plain = |all, byte| all & matches!(byte, b' '..=b'~' | 0xc2 | 0xb5);
    if text.len() <= max && text.bytes().fold(true, is_plain) {
        return Cow::Borrowed(text);
    }
    if text.len() > max {
        let room = max.saturating_sub(ELLIPSIS.len());
        let (mut head, mut tail) = (room.div_ceil(2), text.len() - room / 2);
        while !text.is_char_boundary(head) {
            head -= 1;
        }
        while !text.is_char_boundary(tail) {
            tail += 1;
        }
        let cut = [&text[..head], ELLIPSIS, &text[tail..]].concat();
        Cow::Owned(cut.replace(is_unfit, " "))
    } else if text.contains(is_unfit) {
        Cow::Owned(text.replace(is_unfit, " "))
    } else {
        Cow::Borrowed(text)
    }
}

/// Returns whether `c` is a control character, a line or paragraph separator, or changes the direction of the text.
fn is_unfit(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Returns the chain of causes of an error. A cause that its error already ends with is not repeated.
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

/// Returns a number of things: `1 message`, `2 messages`.
#[must_use]
pub fn count(number: u64, thing: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {thing}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;
    use proptest::prelude::*;

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

    #[test]
    fn what_fits_is_left_alone() {
        for text in ["", "cms.cache.a b", "größer 日本 👩‍👩‍👧 می‌خواهم"] {
            assert!(matches!(one_line(text, 100), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn what_does_not_fit_becomes_a_space() {
        for unfit in [
            '\0', '\t', '\n', '\r', '\u{1b}', '\u{7f}', '\u{9b}', '\u{200f}', '\u{2028}',
            '\u{202e}', '\u{2066}',
        ] {
            assert_eq!(one_line(&format!("a{unfit}b"), 100), "a b", "{unfit:?}");
        }
    }

    #[test]
    fn long_text_keeps_its_beginning_and_its_end() {
        assert_eq!(one_line("0123456789abcdef", 16), "0123456789abcdef");
        assert_eq!(one_line("0123456789abcde\n", 16), "0123456789abcde ");
        assert_eq!(one_line("0123456789abcdef\n", 16), "0123456…bcdef ");
        assert_eq!(one_line("ääääääää", 12), "ää…ää");
    }

    proptest! {
        #[test]
        fn the_result_is_one_bounded_line(text in any::<String>(), max in 3_usize..50) {
            let line = one_line(&text, max);
            prop_assert!(line.len() <= max);
            prop_assert!(!line.contains(is_unfit));
        }
    }
}
