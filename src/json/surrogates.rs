//! Halves of surrogate pairs in JSON strings.
//!
//! JSON escapes a character such as an emoji as a pair: `\ud83d\ude00`. Some clients cut a text between the halves.
//! The result is valid JSON by its grammar, but serde_json cannot decode it. Other parsers read U+FFFD.

use memchr::memchr;
use memchr::memmem::Finder;
use std::borrow::Cow;
use std::sync::LazyLock;

/// The beginning of an escaped code unit.
static ESCAPE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br"\u"));
/// Length of the escape of a UTF-16 code unit, such as `\ud83d`.
const ESCAPE_BYTES: usize = 6;

/// Replaces each half of a surrogate pair that stands alone by the escape of U+FFFD. All positions stay the same,
/// because both escapes have the same length.
pub(crate) fn replace_lone_surrogates(json: &[u8]) -> Cow<'_, [u8]> {
    if !may_have_surrogates(json) {
        return Cow::Borrowed(json);
    }
    let (mut replaced, mut at) = (Cow::Borrowed(json), 0);
    while let Some(found) = json.get(at..).and_then(|rest| memchr(b'\\', rest)) {
        let escape = at + found;
        at = escape + 2;
        let Some(unit) = code_unit(json, escape) else { continue };
        at = escape + ESCAPE_BYTES;
        match unit {
            0xd800..=0xdbff if matches!(code_unit(json, at), Some(0xdc00..=0xdfff)) => at += ESCAPE_BYTES,
            0xd800..=0xdfff => replaced.to_mut()[escape..at].copy_from_slice(br"\ufffd"),
            _ => {}
        }
    }
    replaced
}

/// Whether JSON contains `\ud8` to `\udf`. Most JSON does not, and this search is much faster than the one for every
/// backslash.
fn may_have_surrogates(json: &[u8]) -> bool {
    ESCAPE.find_iter(json).any(|at| {
        matches!(json.get(at + 2..at + 4), Some([b'd' | b'D', b'8' | b'9' | b'a'..=b'f' | b'A'..=b'F']))
    })
}

/// The UTF-16 code unit that is escaped at this position.
fn code_unit(json: &[u8], at: usize) -> Option<u16> {
    let digits = json.get(at..at + ESCAPE_BYTES)?.strip_prefix(br"\u")?;
    digits
        .iter()
        .try_fold(0, |unit, &digit| Some(unit << 4 | u16::try_from(char::from(digit).to_digit(16)?).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn replaced(json: &str) -> String {
        String::from_utf8(replace_lone_surrogates(json.as_bytes()).into_owned()).unwrap()
    }

    #[test]
    fn only_halves_that_stand_alone_are_replaced() {
        for (json, want) in [
            (r#""\ud83d""#, r#""\ufffd""#),
            (r#""\uDE00""#, r#""\ufffd""#),
            (r#""\ud83d\ude00""#, r#""\ud83d\ude00""#),
            (r#""\ude00\ud83d""#, r#""\ufffd\ufffd""#),
            (r#""\ud83d\ud83d\ude00\ude00""#, r#""\ufffd\ud83d\ude00\ufffd""#),
            (r#""\ud83d \ude00""#, r#""\ufffd \ufffd""#),
            (r#""\ud83d\n\ude00""#, r#""\ufffd\n\ufffd""#),
            (r#""\\ud83d""#, r#""\\ud83d""#),
            (r#""\\\ud83d""#, r#""\\\ufffd""#),
            (r#""\ud83""#, r#""\ud83""#),
            (r#""\ud83d\ude0"#, r#""\ufffd\ude0"#),
            (r#""\ud83d\"#, r#""\ufffd\"#),
            (r#""\u00e9 \ud7ff \ue000""#, r#""\u00e9 \ud7ff \ue000""#),
        ] {
            assert_eq!(replaced(json), want, "{json}");
        }
    }

    #[test]
    fn json_without_surrogates_is_not_copied() {
        assert!(matches!(replace_lone_surrogates(br#"{"a":"\u00e9\n\\ud7"}"#), Cow::Borrowed(_)));
        assert!(matches!(replace_lone_surrogates(br#"{"a":"\ud83d\ude00"}"#), Cow::Borrowed(_)));
    }

    proptest! {
        #[test]
        fn every_string_can_be_decoded_and_differs_only_in_lone_halves(
            units in prop::collection::vec(prop_oneof![0x20u16..0x80, 0xd7f0u16..0xe010, any::<u16>()], 0..12),
        ) {
            let escaped = units.iter().map(|unit| format!("\\u{unit:04x}")).collect::<Vec<_>>().concat();
            let json = format!("\"{escaped}\"");
            let decoded: String = serde_json::from_str(&replaced(&json)).unwrap();
            prop_assert_eq!(decoded, String::from_utf16_lossy(&units));
        }

        #[test]
        fn any_bytes_keep_their_length(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            prop_assert_eq!(replace_lone_surrogates(&bytes).len(), bytes.len());
        }
    }
}
