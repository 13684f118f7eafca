//! Base64 of a request, decoded as a whole or in parts.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use std::borrow::Cow;

/// Accepts base64 with and without padding, and with unused bits that are not 0.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// Bytes of base64 that decide whether it has white space in it. Encoders break all lines at the same length.
const FIRST_LINE: usize = 1_024;

/// A file in base64.
pub(super) struct Base64<'a> {
    text: Cow<'a, str>,
}

impl<'a> Base64<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        let first = &text.as_bytes()[..text.len().min(FIRST_LINE)];
        let has_lines = first.iter().any(u8::is_ascii_whitespace);
        let text =
            if has_lines { Cow::Owned(text.split_ascii_whitespace().collect()) } else { Cow::Borrowed(text) };
        Self { text }
    }

    /// The number of bytes that the file has.
    pub(super) fn len(&self) -> usize {
        self.text.trim_end_matches('=').len() * 3 / 4
    }

    /// All bytes, up to the first invalid character.
    pub(super) fn bytes(&self) -> Vec<u8> {
        decoded(&self.text)
    }

    /// At most `count` bytes from the start.
    pub(super) fn start(&self, count: usize) -> Vec<u8> {
        self.part(0, count)
    }

    /// At most `count` bytes from the position `at`.
    pub(super) fn part(&self, at: usize, count: usize) -> Vec<u8> {
        let group = at / 3;
        let first = group.saturating_mul(4);
        let end = at.saturating_add(count).div_ceil(3).saturating_mul(4).min(self.text.len());
        let mut bytes = self.text.get(first..end).map(decoded).unwrap_or_default();
        bytes.drain(..(at - group * 3).min(bytes.len()));
        bytes.truncate(count);
        bytes
    }
}

fn decoded(text: &str) -> Vec<u8> {
    let is_url_safe = memchr::memchr2(b'-', b'_', text.as_bytes()).is_some();
    let engine = if is_url_safe { URL_SAFE } else { STANDARD };
    engine.decode(text).unwrap_or_else(|_| {
        let good = text.bytes().position(|b| !b.is_ascii_alphanumeric() && !b"+/-_".contains(&b));
        let good = good.unwrap_or(text.len()) / 4 * 4;
        engine.decode(text.get(..good).unwrap_or_default()).unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_the_same_as_that_part_of_all_bytes() {
        let bytes: Vec<u8> = (0..=255).collect();
        let text = STANDARD.encode(&bytes);
        let in_lines: String =
            text.as_bytes().chunks(76).flat_map(|l| [l, b"\r\n"].concat()).map(char::from).collect();
        for text in [&text, &in_lines, text.trim_end_matches('=')] {
            let file = Base64::of(text);
            assert_eq!((file.len(), file.bytes()), (256, bytes.clone()));
            for at in [0, 1, 2, 3, 100, 254, 256, 300] {
                for count in [0, 1, 2, 5, 400] {
                    let want: Vec<u8> = bytes.iter().copied().skip(at).take(count).collect();
                    assert_eq!(file.part(at, count), want, "{at} {count}");
                }
            }
        }
        assert_eq!(Base64::of("aGk!aGk").bytes(), b"hi\0"[..0].to_vec());
        assert_eq!(Base64::of("-_-_").bytes(), [0xfb, 0xff, 0xbf]);
        assert!(Base64::of("").bytes().is_empty());
    }
}
