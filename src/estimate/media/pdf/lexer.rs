//! Splits PDF syntax into tokens: outside of streams, and in content streams.

/// A token. Text in it is as in the file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PdfToken<'a> {
    Integer(i64),
    /// A number with a fraction; only its whole part.
    Real(i64),
    /// Without the slash.
    Name(&'a [u8]),
    /// The bytes between the parentheses, with escapes.
    Literal(&'a [u8]),
    /// The digits between the angle brackets.
    Hex(&'a [u8]),
    ArrayStart,
    ArrayEnd,
    DictionaryStart,
    DictionaryEnd,
    /// Any other word: an operator, `obj`, `stream`, `R`.
    Keyword(&'a [u8]),
}

/// A string that is longer is not a string (bytes). Without a bound, each opening bracket could read the rest.
const MAX_STRING: usize = 64 * 1024;

pub(super) struct Lexer<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
    /// An opening bracket without a closing one was found. From then on brackets are ignored.
    ignores_literals: bool,
    ignores_hex: bool,
}

/// Whether a byte ends a word: white space and delimiters do.
static ENDS_WORD: [bool; 256] = {
    let (bytes, mut ends, mut at) = (b"\0\t\n\x0c\r ()<>[]{}/%", [false; 256], 0);
    while at < bytes.len() {
        ends[bytes[at] as usize] = true;
        at += 1;
    }
    ends
};

fn ends_word(b: u8) -> bool {
    ENDS_WORD[usize::from(b)]
}

impl<'a> Lexer<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, ignores_literals: false, ignores_hex: false }
    }

    /// The rest of the bytes.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    fn word(&mut self) -> &'a [u8] {
        let rest = self.rest();
        let length = rest.iter().position(|&b| ends_word(b)).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }

    /// The string after an opening parenthesis.
    fn literal(&mut self) -> Option<&'a [u8]> {
        let rest = self.rest();
        let bounded = &rest[..rest.len().min(MAX_STRING)];
        let (mut depth, mut at) = (0u32, 0);
        while let Some(found) = memchr::memchr3(b'(', b')', b'\\', bounded.get(at..)?) {
            at += found;
            match bounded[at] {
                b'\\' => at += 1,
                b'(' => depth += 1,
                _ if depth == 0 => {
                    self.at += at + 1;
                    return Some(&bounded[..at]);
                }
                _ => depth -= 1,
            }
            at += 1;
        }
        None
    }

    fn hex(&mut self) -> Option<&'a [u8]> {
        let rest = self.rest();
        let end = memchr::memchr(b'>', &rest[..rest.len().min(MAX_STRING)])?;
        self.at += end + 1;
        Some(&rest[..end])
    }
}

impl<'a> Iterator for Lexer<'a> {
    type Item = PdfToken<'a>;

    fn next(&mut self) -> Option<PdfToken<'a>> {
        loop {
            let &first = self.bytes.get(self.at)?;
            let next = self.bytes.get(self.at + 1);
            if !ends_word(first) {
                return Some(word_token(self.word()));
            }
            self.at += 1;
            return Some(match first {
                // An empty name before another one means nothing.
                b'/' if next == Some(&b'/') => continue,
                b'/' => PdfToken::Name(self.word()),
                b'[' => PdfToken::ArrayStart,
                b']' => PdfToken::ArrayEnd,
                b'<' if next == Some(&b'<') => {
                    self.at += 1;
                    PdfToken::DictionaryStart
                }
                b'>' if next == Some(&b'>') => {
                    self.at += 1;
                    PdfToken::DictionaryEnd
                }
                b'(' if !self.ignores_literals => {
                    let text = self.literal();
                    self.ignores_literals = text.is_none();
                    let Some(text) = text else { continue };
                    PdfToken::Literal(text)
                }
                b'<' if !self.ignores_hex => {
                    let digits = self.hex();
                    self.ignores_hex = digits.is_none();
                    let Some(digits) = digits else { continue };
                    PdfToken::Hex(digits)
                }
                b'%' => {
                    let rest = self.rest();
                    self.at += memchr::memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
                    continue;
                }
                _ => continue,
            });
        }
    }
}

fn word_token(word: &[u8]) -> PdfToken<'_> {
    let (sign, digits) = match word {
        [b'-', digits @ ..] => (-1, digits),
        [b'+', digits @ ..] | digits => (1, digits),
    };
    let whole = digits.iter().position(|b| !b.is_ascii_digit()).unwrap_or(digits.len());
    let is_number = whole == digits.len() || digits[whole] == b'.';
    if digits.is_empty() || !is_number || whole > 15 {
        return PdfToken::Keyword(word);
    }
    let value = digits[..whole].iter().fold(0, |n, b| n * 10 + i64::from(b - b'0')) * sign;
    if whole == digits.len() { PdfToken::Integer(value) } else { PdfToken::Real(value) }
}

/// The bytes of a literal string without escapes.
pub(super) fn unescaped(literal: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        loop {
            let &b = literal.get(at)?;
            at += 1;
            if b != b'\\' {
                return Some(b);
            }
            let &escaped = literal.get(at)?;
            at += 1;
            return Some(match escaped {
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'b' => 8,
                b'f' => 12,
                b'0'..=b'7' => {
                    let mut code = u16::from(escaped - b'0');
                    for _ in 0..2 {
                        let Some(digit @ b'0'..=b'7') = literal.get(at) else { break };
                        code = code * 8 + u16::from(digit - b'0');
                        at += 1;
                    }
                    code.to_le_bytes()[0]
                }
                // A line break in the file only.
                b'\r' | b'\n' => continue,
                other => other,
            });
        }
    })
}

/// The bytes of a hexadecimal string.
pub(super) fn unhexed(digits: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let mut digits = digits.iter().filter_map(|&b| char::from(b).to_digit(16));
    std::iter::from_fn(move || {
        let high = digits.next()?;
        let byte = high * 16 + digits.next().unwrap_or(0);
        u8::try_from(byte).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syntax_is_split_into_tokens() {
        use PdfToken::*;
        let text = b"% comment\n12 0 obj <</Type/Page /A[1 -2.5]>> (a\\)(b)) <48 65>Tj\nendobj";
        let tokens: Vec<_> = Lexer::new(text).collect();
        assert_eq!(
            tokens,
            [
                Integer(12),
                Integer(0),
                Keyword(b"obj"),
                DictionaryStart,
                Name(b"Type"),
                Name(b"Page"),
                Name(b"A"),
                ArrayStart,
                Integer(1),
                Real(-2),
                ArrayEnd,
                DictionaryEnd,
                Literal(b"a\\)(b)"),
                Hex(b"48 65"),
                Keyword(b"Tj"),
                Keyword(b"endobj"),
            ]
        );
        assert_eq!(unescaped(b"a\\)\\101\\\nb\\n").collect::<Vec<_>>(), b"a)Ab\n");
        assert_eq!(unhexed(b"48 656").collect::<Vec<_>>(), b"He`");
    }

    #[test]
    fn an_empty_name_before_another_name_is_ignored() {
        use PdfToken::*;
        assert_eq!(Lexer::new(b"///A / B").collect::<Vec<_>>(), [Name(b"A"), Name(b""), Keyword(b"B")]);
        assert_eq!(Lexer::new(b"//").collect::<Vec<_>>(), [Name(b"")]);
    }

    #[test]
    fn brackets_without_an_end_are_ignored() {
        use PdfToken::*;
        assert_eq!(
            Lexer::new(b"(a 1 <2 /B").collect::<Vec<_>>(),
            [Keyword(b"a"), Integer(1), Integer(2), Name(b"B")]
        );
        assert!(Lexer::new(&vec![b'('; 100_000]).next().is_none());
        assert!(Lexer::new(b"\\(").count() < 3 && Lexer::new(b"(\\").count() < 3);
    }
}
