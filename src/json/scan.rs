//! Scans the structure of JSON without parsing values. Linear in the input, without recursion.

use memchr::memchr;

/// Longer keys are cut to this length. The longest key that callers look for is `usageMetadata`.
const MAX_KEY_BYTES: usize = 16;
/// This many bytes are examined together.
const STRIDE: usize = 32;
/// This many bytes are examined one by one before a search that takes time to begin.
const NEAR: usize = 12;
/// The same within a string. Few keys are longer.
const NEAR_QUOTE: usize = 24;
/// Brackets are counted in blocks of this size. The count of a block fits in a byte.
const COUNTED_BLOCK: usize = 128;

/// Whether brackets outside of strings nest deeper than `max` levels.
pub(crate) fn nests_deeper_than(max: usize, json: &[u8]) -> bool {
    // Most requests have few brackets, even in their texts. Counting them takes a fraction of the time of the lexer.
    if !has_more_openings_than(max, json) {
        return false;
    }
    let (mut lexer, mut depth, mut at) = (Lexer::default(), 0usize, 0);
    while let Some(found) = lexer.next_bracket(json, at) {
        at = found + 1;
        if matches!(json[found], b'{' | b'[') {
            depth += 1;
            if depth > max {
                return true;
            }
        } else {
            depth = depth.saturating_sub(1);
        }
    }
    false
}

/// Whether there are more than `max` opening brackets, within strings or outside.
fn has_more_openings_than(max: usize, json: &[u8]) -> bool {
    let mut openings = 0;
    for block in json.chunks(COUNTED_BLOCK) {
        // A brace differs from a square bracket in one bit. The compiler vectorises a sum of bytes that cannot overflow.
        let in_block = block.iter().fold(0u8, |sum, byte| sum.wrapping_add(u8::from(byte | 0x20 == b'{')));
        openings += usize::from(in_block);
        if openings > max {
            return true;
        }
    }
    false
}

/// The length of a string without its quotes; `json` begins after the opening quote. `None`: the string does not end.
pub(crate) fn string_length(json: &[u8]) -> Option<usize> {
    Lexer::InString.skip_string(json, 0).map(|end| end - 1)
}

/// What a `MemberScanner` finds, in the order of the input.
pub(crate) enum Found<'a> {
    /// A member's key as written, cut to `MAX_KEY_BYTES`. Escapes are not resolved.
    Key {
        key: &'a [u8],
        /// The document is a list of objects.
        is_in_list: bool,
    },
    /// The next bytes of the member's value, with surrounding whitespace.
    Value {
        part: &'a [u8],
        /// The value is complete.
        is_last: bool,
    },
}

/// Finds the top-level members of a JSON document: of an object, or of each object in a list.
///
/// The document may be cut into pieces anywhere. Buffers one key and nothing else.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MemberScanner {
    lexer: Lexer,
    depth: u32,
    /// The depth of the members: 1 in an object, 2 in a list of objects. 0 before the document begins.
    member_depth: u32,
    /// At `member_depth`: the next string is a key.
    expects_key: bool,
    capture: Capture,
    key: [u8; MAX_KEY_BYTES],
    key_length: usize,
    is_complete: bool,
    /// In a list of objects: no element follows the opening bracket or the last comma yet.
    expects_element: bool,
}

/// The part of a member that the current bytes belong to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Capture {
    #[default]
    Nothing,
    Key,
    Value,
}

impl MemberScanner {
    /// Whether the document's last bracket was read.
    pub(crate) fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Whether the document is a list.
    pub(crate) fn is_list(&self) -> bool {
        self.member_depth == 2
    }

    /// The text between the document so far and another element, if the document is a list of objects whose end has
    /// not arrived and of which no element is incomplete.
    pub(crate) fn list_separator(&self) -> Option<&'static str> {
        let is_between_elements = self.is_list() && self.depth == 1 && self.lexer == Lexer::Outside;
        is_between_elements.then_some(if self.expects_element { "" } else { "," })
    }

    /// Scans the next piece.
    pub(crate) fn feed(&mut self, piece: &[u8], mut found: impl FnMut(Found<'_>)) {
        // Start of the captured bytes in this piece.
        let (mut from, mut at) = (0, 0);
        while at < piece.len() {
            if self.lexer != Lexer::Outside {
                let Some(end) = self.lexer.skip_string(piece, at) else { break };
                at = end;
                if self.capture == Capture::Key {
                    self.extend_key(&piece[from..end - 1]);
                    self.capture = Capture::Nothing;
                }
                continue;
            }
            if self.depth > self.member_depth {
                at = self.skip_below_members(piece, at);
                continue;
            }
            if !self.expects_element {
                let is_special = |byte: &u8| CLASSES[usize::from(*byte)] != Class::Plain;
                let Some(plain) = piece[at..].iter().position(is_special) else { break };
                at += plain;
            }
            let byte = piece[at];
            at += 1;
            let is_at_members = self.depth == self.member_depth && self.depth > 0;
            match byte {
                b'"' => {
                    self.lexer = Lexer::InString;
                    self.expects_element = false;
                    if is_at_members && self.expects_key {
                        self.capture = Capture::Key;
                        self.key_length = 0;
                        from = at;
                    }
                }
                b'{' | b'[' => self.open(byte),
                b'}' | b']' => {
                    if is_at_members {
                        self.end_value(&piece[from..at - 1], &mut found);
                    }
                    self.depth = self.depth.saturating_sub(1);
                    self.is_complete |= self.depth == 0;
                }
                b',' if is_at_members => {
                    self.end_value(&piece[from..at - 1], &mut found);
                    self.expects_key = true;
                    // In malformed JSON a colon may follow.
                    self.key_length = 0;
                }
                b':' if is_at_members && self.expects_key => {
                    self.expects_key = false;
                    self.capture = Capture::Value;
                    let key = &self.key[..self.key_length];
                    found(Found::Key { key, is_in_list: self.member_depth == 2 });
                    from = at;
                }
                b',' => self.expects_element = true,
                _ => self.expects_element &= byte.is_ascii_whitespace(),
            }
        }
        match self.capture {
            Capture::Nothing => {}
            Capture::Key => self.extend_key(&piece[from..]),
            Capture::Value => found(Found::Value { part: &piece[from..], is_last: false }),
        }
    }

    /// Skips to the next quote or bracket below the members and reads it. Returns the index after it.
    fn skip_below_members(&mut self, piece: &[u8], at: usize) -> usize {
        let at = at + until_structural(&piece[at..]);
        match piece.get(at) {
            None => return at,
            Some(b'"') => self.lexer = Lexer::InString,
            Some(b'{' | b'[') => self.depth = self.depth.saturating_add(1),
            Some(_) => self.depth -= 1,
        }
        at + 1
    }

    fn open(&mut self, bracket: u8) {
        self.depth = self.depth.saturating_add(1);
        if self.depth == 1 {
            self.member_depth = if bracket == b'[' { 2 } else { 1 };
        }
        self.expects_key = self.depth == self.member_depth && bracket == b'{';
        self.key_length = 0;
        self.expects_element = self.depth == 1 && bracket == b'[';
    }

    fn end_value(&mut self, last_bytes: &[u8], found: &mut impl FnMut(Found<'_>)) {
        if self.capture == Capture::Value {
            self.capture = Capture::Nothing;
            found(Found::Value { part: last_bytes, is_last: true });
        }
    }

    fn extend_key(&mut self, part: &[u8]) {
        let part = &part[..part.len().min(MAX_KEY_BYTES - self.key_length)];
        self.key[self.key_length..][..part.len()].copy_from_slice(part);
        self.key_length += part.len();
    }
}

/// Whether the current position is inside a string.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Lexer {
    #[default]
    Outside,
    InString,
    AfterBackslash,
}

impl Lexer {
    /// Finds the next bracket outside of strings, at `at` or later.
    fn next_bracket(&mut self, json: &[u8], mut at: usize) -> Option<usize> {
        loop {
            if *self != Self::Outside {
                at = self.skip_string(json, at)?;
            }
            at += until_structural(json.get(at..)?);
            if *json.get(at)? != b'"' {
                return Some(at);
            }
            *self = Self::InString;
            at += 1;
        }
    }

    /// Skips the rest of a string. Returns the index after its closing quote; `None`: it continues in the next
    /// piece.
    ///
    /// Searches quotes only, and then looks back for a backslash: most escapes in texts are those of line feeds.
    fn skip_string(&mut self, json: &[u8], mut at: usize) -> Option<usize> {
        if *self == Self::AfterBackslash {
            json.get(at)?;
            *self = Self::InString;
            at += 1;
        }
        // Most strings are keys, whose end is near. A string with escaped quotes is a text, whose end is far.
        let mut near = NEAR_QUOTE;
        loop {
            let rest = json.get(at..)?;
            let (begin, far) = rest.split_at(rest.len().min(near));
            let found = begin.iter().position(|byte| *byte == b'"');
            let Some(quote) = found.or_else(|| Some(begin.len() + memchr(b'"', far)?)) else {
                if ends_within_escape(rest) {
                    *self = Self::AfterBackslash;
                }
                return None;
            };
            at += quote + 1;
            if !ends_within_escape(&rest[..quote]) {
                *self = Self::Outside;
                return Some(at);
            }
            near = 0;
        }
    }
}

/// Whether the byte that follows is escaped: the text ends with an odd number of backslashes. The text must not begin
/// within an escape.
fn ends_within_escape(text: &[u8]) -> bool {
    text.ends_with(b"\\") && text.iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1
}

/// What a byte means outside of strings.
#[derive(Clone, Copy, PartialEq)]
enum Class {
    /// A part of a number, a word or white space.
    Plain,
    /// A comma or a colon.
    Separator,
    /// A quote or a bracket.
    Structural,
}

static CLASSES: [Class; 256] = {
    let mut classes = [Class::Plain; 256];
    classes[b',' as usize] = Class::Separator;
    classes[b':' as usize] = Class::Separator;
    let (mut at, structural) = (0, br#""{}[]"#);
    while at < structural.len() {
        classes[structural[at] as usize] = Class::Structural;
        at += 1;
    }
    classes
};

/// Number of bytes before the next quote or bracket. In embeddings, most bytes are neither.
fn until_structural(bytes: &[u8]) -> usize {
    let (near, far) = bytes.split_at(bytes.len().min(NEAR));
    if let Some(found) = near.iter().position(|byte| CLASSES[usize::from(*byte)] == Class::Structural) {
        return found;
    }
    // The compiler cannot vectorise a table. A brace differs from a square bracket in one bit.
    let is_structural = |byte: &u8| *byte == b'"' || matches!(byte | 0x20, b'{' | b'}');
    // A stride is examined without early exit, so that the compiler can vectorise it.
    let has_none = |stride: &&[u8]| !stride.iter().fold(false, |any, byte| any | is_structural(byte));
    let skipped = far.chunks_exact(STRIDE).take_while(has_none).count() * STRIDE;
    near.len() + skipped + far[skipped..].iter().position(is_structural).unwrap_or(far.len() - skipped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Members of a document as (key, value), and whether it is complete.
    fn members(pieces: &[&[u8]]) -> (Vec<(String, String)>, bool) {
        let (mut scanner, mut members) = (MemberScanner::default(), Vec::<(String, Vec<u8>, bool)>::new());
        for piece in pieces {
            scanner.feed(piece, |found| match found {
                Found::Key { key, .. } => {
                    members.push((String::from_utf8_lossy(key).into(), Vec::new(), false));
                }
                Found::Value { part, is_last } => {
                    let (_, value, is_complete) = members.last_mut().unwrap();
                    value.extend_from_slice(part);
                    *is_complete = is_last;
                }
            });
        }
        let text = |value: Vec<u8>| String::from_utf8_lossy(&value).trim().to_owned();
        let complete = members.into_iter().filter(|(.., is_complete)| *is_complete);
        (complete.map(|(key, value, _)| (key, text(value))).collect(), scanner.is_complete())
    }

    fn cut(text: &[u8], cuts: &[usize]) -> (Vec<(String, String)>, bool) {
        let (mut pieces, mut from) = (Vec::new(), 0);
        for cut in cuts.iter().copied().chain([text.len()]) {
            let cut = cut.clamp(from, text.len());
            pieces.push(&text[from..cut]);
            from = cut;
        }
        members(&pieces)
    }

    #[test]
    fn only_top_level_members_are_found() {
        for (json, want) in [
            (r#"{"a":1,"b":{"c":[2,"}"]}}"#, &[("a", "1"), ("b", r#"{"c":[2,"}"]}"#)][..]),
            (r#" {"a" : "x,\"y\":" , "b":[]} "#, &[("a", r#""x,\"y\":""#), ("b", "[]")]),
            (r#"[{"a":1},{"b":[{"c":2}]}]"#, &[("a", "1"), ("b", r#"[{"c":2}]"#)]),
            (
                r#"{"\u0061":null,"a key that is too long":1}"#,
                &[(r"\u0061", "null"), ("a key that is to", "1")],
            ),
            (r#""a":1"#, &[]),
            (r#"{"a":1"#, &[]),
            ("[1,2]", &[]),
        ] {
            let want: Vec<_> =
                want.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            assert_eq!(cut(json.as_bytes(), &[]).0, want, "{json}");
            assert_eq!(cut(json.as_bytes(), &(0..json.len()).collect::<Vec<_>>()).0, want, "{json}");
        }
    }

    #[test]
    fn a_document_is_complete_at_its_last_bracket() {
        assert!(members(&[br#"{"a":"}"}"#]).1);
        assert!(!members(&[br#"{"a":"}""#]).1);
    }

    #[test]
    fn a_string_ends_at_its_first_unescaped_quote() {
        for (json, length) in [
            (r#"ab":1"#, Some(2)),
            (r#"","#, Some(0)),
            (r#"a\"b\\""#, Some(6)),
            ("ab", None),
            (r"a\\", None),
            (r"\", None),
        ] {
            assert_eq!(string_length(json.as_bytes()), length, "{json}");
        }
    }

    #[test]
    fn brackets_within_strings_do_not_nest() {
        let nested = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(!nests_deeper_than(3, nested(3).as_bytes()) && nests_deeper_than(3, nested(4).as_bytes()));
        for (json, is_deeper) in [
            (r#"["[[\"[["]"#, false),
            (r#"["\\",[[["#, true),
            ("]]][[[[", true),
            ("[[[][][]]]", false),
            ("\"[[[[\\", false),
        ] {
            assert_eq!(nests_deeper_than(3, json.as_bytes()), is_deeper, "{json}");
        }
    }

    proptest! {
        #[test]
        fn members_do_not_depend_on_cuts(
            parts in prop::collection::vec("[-0-9., \n]{0,70}|[\\[\\]{}:,\\\\]|\"[a-z\\[}:,]{0,3}\"", 0..20),
            mut cuts in prop::collection::vec(0usize..300, 0..12),
        ) {
            let text = format!(r#"{{"a":[{}],"b":{{"x":[[{}]],"c":3}}}}"#, parts.concat(), "1,".repeat(50));
            cuts.sort_unstable();
            let whole = cut(text.as_bytes(), &[]);
            prop_assert_eq!(&whole, &cut(text.as_bytes(), &cuts));
            prop_assert_eq!(&whole, &cut(text.as_bytes(), &(0..text.len()).collect::<Vec<_>>()));
        }

        #[test]
        fn strides_find_the_same_byte_as_a_plain_search(parts in prop::collection::vec("[-0-9., \n]{0,70}|[\\[\\]{}\"]", 0..20)) {
            let text = parts.concat();
            let want = text.find(|c| "\"{}[]".contains(c)).unwrap_or(text.len());
            prop_assert_eq!(until_structural(text.as_bytes()), want);
        }

        #[test]
        fn openings_are_counted_as_by_a_plain_search(parts in prop::collection::vec("[a-z ;{}\\[\\]\u{e9}\u{5b57}]{0,300}|[{\\[]{0,300}", 0..6)) {
            let text = parts.concat();
            let openings = text.matches(['{', '[']).count();
            for max in [openings.saturating_sub(1), openings, 3, 128, 300] {
                prop_assert_eq!(has_more_openings_than(max, text.as_bytes()), openings > max);
            }
        }

        #[test]
        fn the_end_of_a_string_is_that_of_a_plain_search(
            parts in prop::collection::vec(r#"[a-z ]{0,40}|[\u{e9}\u{5b57}\u{1f600}]{0,20}|(\\\\|\\"|\\n|\\u00e9){0,8}"#, 0..12),
            end in prop_oneof![Just(""), Just("\""), Just("\",\"b\""), Just("\\"), Just("\\\"")],
        ) {
            let text = parts.concat() + end;
            let mut is_escaped = false;
            let want = text.bytes().position(|byte| {
                let ends = byte == b'"' && !is_escaped;
                is_escaped = byte == b'\\' && !is_escaped;
                ends
            });
            prop_assert_eq!(string_length(text.as_bytes()), want);
            // In two pieces, cut anywhere.
            for cut in 0..=text.len() {
                let (first, second) = text.as_bytes().split_at(cut);
                let mut lexer = Lexer::InString;
                let end = lexer.skip_string(first, 0);
                let end = end.or_else(|| lexer.skip_string(second, 0).map(|end| cut + end));
                prop_assert_eq!(end, want.map(|length| length + 1));
            }
        }

        #[test]
        fn nesting_agrees_with_a_json_parser(levels in 0usize..20, text in "[\\[\\]{}\\\\\"a]{0,12}", max in 0usize..20) {
            let inner = serde_json::json!([&text]);
            let json = (0..levels).fold(inner, |inner, _| serde_json::json!({ &text: inner })).to_string();
            prop_assert_eq!(nests_deeper_than(max, json.as_bytes()), levels + 1 > max);
        }
    }
}
