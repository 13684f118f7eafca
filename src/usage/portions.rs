//! Where a text can be cut so that both parts have as many tokens as the whole.

/// No more than this is left of a text from which the front is taken.
const LONGEST_REST: usize = 2 * 1024;

/// Takes the front of a text that has yet to grow, for its tokens to be counted apart. Where a text of some
/// length has no certain place to be cut at, as of Chinese, all of it is taken: that may count a token too
/// many.
pub(super) fn take_front(text: &mut String) -> Option<String> {
    let at = certain_cut(text).or_else(|| (text.len() > LONGEST_REST).then_some(text.len()))?;
    let rest = text[at..].to_owned();
    let mut front = std::mem::replace(text, rest);
    front.truncate(at);
    front.shrink_to_fit();
    Some(front)
}

/// Tokenizers cut a text into words before they look at one. Those of OpenAI's have letters or digits of which
/// a word is made end before the next space, and none looks at what comes before it.
fn certain_cut(text: &str) -> Option<usize> {
    let from = text.len().saturating_sub(LONGEST_REST);
    let is_cut = |pair: &[u8]| pair[0].is_ascii_alphanumeric() && matches!(pair[1], b' ' | b'\n');
    text.as_bytes()[from..].windows(2).rposition(is_cut).map(|at| from + at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::{Encoding, Tokenizer};
    use proptest::prelude::*;

    fn count(encoding: Encoding, text: &str) -> u64 {
        Tokenizer { encoding, percent: 100 }.count_all([text])
    }

    proptest! {
        #[test]
        fn both_parts_have_the_tokens_of_the_whole(
            text in "([a-zA-Z]{1,9} {0,2}|[ -~]{0,12}|\\PC{0,6}|\\s{1,3}|'(ll|S|d)|[0-9]{1,5}){0,40}",
        ) {
            let mut rest = text.clone();
            let front = take_front(&mut rest).unwrap_or_default();
            prop_assert_eq!(&format!("{front}{rest}"), &text);
            for encoding in [Encoding::O200k, Encoding::Cl100k] {
                prop_assert_eq!(count(encoding, &front) + count(encoding, &rest), count(encoding, &text));
            }
        }
    }

    #[test]
    fn little_is_left_of_a_long_text() {
        for (text, rest) in
            [("a word ".repeat(1_000), 1), ("\u{65e5}".repeat(1_000), 0), ("\u{65e5}".repeat(600), 1_800)]
        {
            let mut text = text;
            let front = take_front(&mut text);
            assert_eq!((text.len(), front.is_none()), (rest, rest == 1_800));
        }
    }
}
