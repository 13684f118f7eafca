//! Reads the text that content streams show.

use super::fonts::{FontCodes, Fonts};
use super::lexer::{Lexer, PdfToken, unescaped, unhexed};
use super::objects::name_key;
use crate::estimate::media::document_text::DocumentText;

/// A shift to the right in a list of strings that separates words, in thousandths of the font's size.
const WORD_SPACE: i64 = -200;

/// The state of reading a content stream.
struct ContentReader<'d> {
    fonts: &'d Fonts,
    out: &'d mut DocumentText,
    font: FontCodes<'d>,
    in_text: bool,
    in_list: bool,
    /// The last two numbers.
    operands: [i64; 2],
    last_name: &'d [u8],
    /// Vertical position of the text.
    y: i64,
    /// Vertical position of the last text.
    last_y: i64,
    /// Whether the position has changed since the last text.
    has_moved: bool,
    /// Characters of the last string, at most 3. Some writers place each character on its own.
    last_length: u32,
    /// The length of the output before the strings that no operator has shown yet.
    unshown: Option<(usize, u64)>,
}

/// Appends the text that a content stream shows.
pub(super) fn read(content: &[u8], fonts: &Fonts, out: &mut DocumentText) {
    let mut reader = ContentReader {
        fonts,
        out,
        font: FontCodes::Unknown,
        in_text: false,
        in_list: false,
        operands: [0; 2],
        last_name: b"",
        y: 0,
        last_y: i64::MIN,
        has_moved: false,
        last_length: 0,
        unshown: None,
    };
    let mut lexer = Lexer::new(content);
    while let Some(token) = lexer.next() {
        match token {
            PdfToken::Keyword(b"ID") => {
                reader.restore();
                lexer.at += image_end(lexer.rest());
            }
            PdfToken::Keyword(operator) => reader.operator(operator),
            PdfToken::Integer(n) | PdfToken::Real(n) => reader.number(n),
            PdfToken::Name(name) => reader.last_name = name,
            PdfToken::Literal(text) if reader.in_text => reader.string(unescaped(text)),
            PdfToken::Hex(digits) if reader.in_text => reader.string(unhexed(digits)),
            PdfToken::ArrayStart => reader.in_list = true,
            PdfToken::ArrayEnd => reader.in_list = false,
            _ => {}
        }
    }
    reader.restore();
    reader.out.separate(' ');
}

impl ContentReader<'_> {
    fn operator(&mut self, operator: &[u8]) {
        self.in_list = false;
        match operator {
            b"Tj" | b"TJ" | b"'" | b"\"" => {
                self.unshown = None;
                (self.last_y, self.has_moved) = (self.y, false);
                if matches!(operator, b"'" | b"\"") {
                    self.move_to(self.y - 1);
                }
                return;
            }
            b"BT" => {
                self.in_text = true;
                self.move_to(0);
            }
            b"ET" => self.in_text = false,
            b"Td" | b"TD" => self.move_to(self.y.saturating_add(self.operands[1])),
            b"Tm" => self.move_to(self.operands[1]),
            b"T*" => self.move_to(self.y.saturating_sub(1)),
            b"Tf" => self.font = self.fonts.named(name_key(self.last_name)),
            _ => {}
        }
        self.restore();
    }

    fn number(&mut self, n: i64) {
        if !self.in_list {
            self.operands = [self.operands[1], n];
        } else if n < WORD_SPACE && self.in_text {
            self.out.separate(' ');
        }
    }

    fn move_to(&mut self, y: i64) {
        self.y = y;
        self.has_moved = true;
    }

    /// Takes back the strings that no operator has shown.
    fn restore(&mut self) {
        if let Some((length, more)) = self.unshown.take() {
            self.out.text.truncate(length);
            self.out.more_characters = more;
        }
    }

    fn string(&mut self, bytes: impl Iterator<Item = u8>) {
        if self.unshown.is_none() {
            self.unshown = Some((self.out.text.len(), self.out.more_characters));
            // Providers join lines by spaces.
            if self.y != self.last_y || (self.has_moved && self.last_length > 2) {
                self.out.separate(' ');
            }
            self.last_length = 0;
        }
        let before = self.out.characters();
        self.font.decode(bytes, self.out);
        let length = self.out.characters() - before;
        self.last_length = self.last_length.saturating_add(u32::try_from(length).unwrap_or(u32::MAX)).min(3);
    }
}

/// The length of the data of an inline image, which ends with `EI` between white space.
fn image_end(rest: &[u8]) -> usize {
    let ends = memchr::memmem::find_iter(rest, b"EI");
    let is_space = |at: usize| rest.get(at).is_none_or(u8::is_ascii_whitespace);
    let mut real = ends.filter(|&at| at > 0 && is_space(at - 1) && is_space(at + 2));
    real.next().map_or(rest.len(), |at| at + 2)
}
