//! The meaning of the codes in a document's strings.

use super::lexer::{Lexer, PdfToken, unhexed};
use super::objects::{Objects, StreamFilter};
use crate::estimate::media::document_text::DocumentText;
use crate::estimate::media::inflate::{Budget, Compression, Inflater};
use foldhash::HashMap;

/// Maps that are read of a document.
const MAX_MAPS: usize = 64;
/// Entries that are read of a map.
const MAX_ENTRIES: usize = 8_192;
/// Ligatures in the fonts of TeX, from code 11 on.
const TEX_LIGATURES: [&str; 5] = ["ff", "fi", "fl", "ffi", "ffl"];

/// The fonts of a document by the names that its contents use.
#[derive(Default)]
pub(super) struct Fonts {
    named: HashMap<u128, (bool, Option<CodeMap>)>,
}

/// How the current font's codes are read.
#[derive(Clone, Copy)]
pub(super) enum FontCodes<'f> {
    /// The font was not found.
    Unknown,
    /// One byte, or two bytes if `is_wide`, for each character.
    Known { is_wide: bool, map: Option<&'f CodeMap> },
}

impl Fonts {
    /// Reads the maps of all named fonts.
    pub(super) fn read(
        file: &[u8],
        objects: &Objects,
        inflater: &mut Inflater,
        budget: &mut Budget<'_>,
    ) -> Self {
        let mut maps = 0;
        let named = objects.named_fonts().map(|(name, font)| {
            let stream = font.to_unicode.and_then(|number| objects.stream(number));
            let stream = stream.filter(|_| maps < MAX_MAPS && !budget.is_empty());
            let map = stream.map(|stream| {
                maps += 1;
                match stream.filter {
                    StreamFilter::Flate => {
                        _ = inflater.inflate(Compression::Zlib, stream.bytes(file), budget);
                    }
                    StreamFilter::None => inflater.copy(stream.bytes(file), budget),
                    _ => inflater.output.clear(),
                }
                CodeMap::read(&inflater.output)
            });
            (name, (font.is_wide, map))
        });
        Self { named: named.collect() }
    }

    pub(super) fn named(&self, name: u128) -> FontCodes<'_> {
        self.named.get(&name).map_or(FontCodes::Unknown, |(is_wide, map)| FontCodes::Known {
            is_wide: *is_wide,
            map: map.as_ref(),
        })
    }
}

impl FontCodes<'_> {
    /// Appends the characters of a string.
    pub(super) fn decode(self, bytes: impl Iterator<Item = u8>, out: &mut DocumentText) {
        match self {
            Self::Known { is_wide: true, map } => {
                let mut bytes = bytes.peekable();
                while let Some(high) = bytes.next() {
                    let code = u16::from_be_bytes([high, bytes.next().unwrap_or(0)]);
                    match map.and_then(|map| map.character(code)) {
                        Some(c) => out.push(c),
                        None => out.more_characters += 1,
                    }
                }
            }
            Self::Known { is_wide: false, map: Some(map) } => {
                for byte in bytes {
                    match map.character(u16::from(byte)) {
                        Some(c) => out.push(c),
                        None => simple(byte, out),
                    }
                }
            }
            Self::Known { map: None, .. } => all_simple(bytes, out),
            Self::Unknown => unknown(bytes, out),
        }
    }
}

/// Codes of a font with a standard encoding.
fn all_simple(bytes: impl Iterator<Item = u8>, out: &mut DocumentText) {
    if out.is_full() {
        out.more_characters += bytes.map(simple_length).sum::<u64>();
    } else {
        bytes.for_each(|byte| simple(byte, out));
    }
}

/// The number of characters that `simple` appends for a code to a text that is full.
fn simple_length(byte: u8) -> u64 {
    match byte {
        11..=13 => 2,
        14..=15 => 3,
        b' '..=b'~' | 0x80.. => 1,
        _ => 0,
    }
}

/// A code of a font with a standard encoding.
fn simple(byte: u8, out: &mut DocumentText) {
    match byte {
        11..=15 => TEX_LIGATURES[usize::from(byte - 11)].chars().for_each(|c| out.push(c)),
        b' '..=b'~' | 0xa0.. => out.push(char::from(byte)),
        b'\t' | b'\n' => out.separate(' '),
        0x80..=0x9f => out.push('\u{2019}'),
        _ => {}
    }
}

/// A string of a font that was not found. Codes of two bytes mostly begin with a byte below 32.
fn unknown(mut bytes: impl Iterator<Item = u8>, out: &mut DocumentText) {
    const SAMPLE: usize = 16;
    let (mut sample, mut length) = ([0; SAMPLE], 0);
    for (place, byte) in sample.iter_mut().zip(&mut bytes) {
        *place = byte;
        length += 1;
    }
    let sample = &sample[..length];
    let small = sample.iter().step_by(2).filter(|byte| **byte < 32).count();
    if small * 2 > length.div_ceil(2) {
        out.more_characters += (sample.len() + bytes.count()) as u64 / 2;
    } else {
        all_simple(sample.iter().copied(), out);
        all_simple(bytes, out);
    }
}

/// A map from codes to Unicode.
#[derive(Default)]
pub(super) struct CodeMap {
    /// First and last code, and the character of the first; sorted.
    ranges: Vec<(u16, u16, u16)>,
}

impl CodeMap {
    /// Reads `<0003> <0020>` between `beginbfchar` and `endbfchar`, and `<0024> <0026> <0041>` or a list of
    /// characters as the third value between `beginbfrange` and `endbfrange`.
    fn read(stream: &[u8]) -> Self {
        let mut map = Self::default();
        let (mut values, mut size, mut listed) = (Vec::new(), 0, None);
        for token in Lexer::new(stream) {
            match token {
                PdfToken::Keyword(b"beginbfchar") => size = 2,
                PdfToken::Keyword(b"beginbfrange") => size = 3,
                PdfToken::Keyword(b"endbfchar" | b"endbfrange") => (size, listed) = (0, None),
                PdfToken::ArrayStart if values.len() == 2 => listed = values.first().copied(),
                PdfToken::ArrayEnd => {
                    listed = None;
                    values.clear();
                }
                PdfToken::Hex(digits) if size > 0 => {
                    let value = unit(digits);
                    if let Some(code) = &mut listed {
                        map.ranges.push((*code, *code, value));
                        *code = code.wrapping_add(1);
                    } else {
                        values.push(value);
                        if values.len() == size {
                            map.ranges.push((values[0], values[size - 2], values[size - 1]));
                            values.clear();
                        }
                    }
                }
                _ => {}
            }
            if map.ranges.len() >= MAX_ENTRIES {
                break;
            }
        }
        map.ranges.sort_unstable();
        map
    }

    fn character(&self, code: u16) -> Option<char> {
        let after = self.ranges.partition_point(|(first, ..)| *first <= code);
        let &(first, last, target) = self.ranges[..after].last()?;
        let unit = target.checked_add(code - first).filter(|_| code <= last)?;
        char::from_u32(u32::from(unit)).filter(|c| *c != '\0')
    }
}

/// The first code or character in a hexadecimal string.
fn unit(digits: &[u8]) -> u16 {
    let mut bytes = unhexed(digits);
    match (bytes.next(), bytes.next()) {
        (Some(high), Some(low)) => u16::from_be_bytes([high, low]),
        (Some(only), None) => u16::from(only),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_beyond_the_collected_text_are_counted_as_characters() {
        for byte in 0..=255 {
            let mut text = DocumentText::default();
            text.push_str(&"x".repeat(1 << 20));
            assert!(text.is_full());
            let before = text.more_characters;
            simple(byte, &mut text);
            assert_eq!(text.more_characters - before, simple_length(byte), "{byte}");
        }
    }
}
