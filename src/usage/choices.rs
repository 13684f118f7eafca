//! Detects a choice in a partly received event. An event with a choice cannot be the extra usage chunk, because the
//! list of choices in that chunk is empty.

use crate::json::{Found, MemberScanner};

/// A line with data begins so.
const DATA_PREFIX: &[u8] = b"data:";

/// Scans one event in pieces of any size. Takes linear time and buffers nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ChoiceDetector {
    scanner: MemberScanner,
    list: ChoiceList,
    /// Bytes of the current line so far.
    column: usize,
    /// Whether the current line begins with `data:`, as far as it has arrived.
    is_data_line: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum ChoiceList {
    /// The current value is not a list of choices.
    #[default]
    Elsewhere,
    /// After the key `choices`.
    Expected,
    /// After the opening bracket.
    Open,
    HasChoice,
}

impl ChoiceDetector {
    /// Whether the event's list of choices has an item.
    pub(super) fn has_choice(&self) -> bool {
        self.list == ChoiceList::HasChoice
    }

    /// Reads the next piece.
    pub(super) fn feed(&mut self, piece: &[u8]) {
        for line in piece.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            if self.has_choice() {
                return;
            }
            let prefix = &DATA_PREFIX[self.column.min(DATA_PREFIX.len())..];
            let prefix = &prefix[..prefix.len().min(line.len())];
            self.is_data_line = line.starts_with(prefix) && (self.column == 0 || self.is_data_line);
            if self.is_data_line {
                self.scan(&line[prefix.len()..]);
            }
            self.column =
                if line.ends_with(b"\n") || line.ends_with(b"\r") { 0 } else { self.column + line.len() };
        }
    }

    fn scan(&mut self, json: &[u8]) {
        let Self { scanner, list, .. } = self;
        scanner.feed(json, |found| {
            *list = match (*list, found) {
                (ChoiceList::HasChoice, _) => ChoiceList::HasChoice,
                (_, Found::Key { key, is_in_list }) if key == b"choices" && !is_in_list => {
                    ChoiceList::Expected
                }
                (list, Found::Value { part, is_last }) => {
                    let list = part.iter().fold(list, |list, &byte| list.after(byte));
                    if is_last && list != ChoiceList::HasChoice { ChoiceList::Elsewhere } else { list }
                }
                _ => ChoiceList::Elsewhere,
            }
        });
    }
}

impl ChoiceList {
    fn after(self, byte: u8) -> Self {
        match (self, byte) {
            _ if byte.is_ascii_whitespace() => self,
            (Self::Expected, b'[') => Self::Open,
            (Self::Open, b']') | (Self::Expected, _) => Self::Elsewhere,
            (Self::Open, _) => Self::HasChoice,
            _ => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has_choice(event: &str) -> bool {
        let mut detector = ChoiceDetector::default();
        detector.feed(event.as_bytes());
        let mut in_pieces = ChoiceDetector::default();
        event.bytes().for_each(|byte| in_pieces.feed(&[byte]));
        assert_eq!(detector.has_choice(), in_pieces.has_choice());
        detector.has_choice()
    }

    #[test]
    fn only_an_item_in_the_top_level_choices_is_a_choice() {
        for (event, want) in [
            (r#"data: {"id":1,"choices":[{"#, true),
            (r#"data: {"choices" : [ 5"#, true),
            (r#"data: {"choices":["#, false),
            (r#"data: {"choices":[ ],"usage":{"choices":[1"#, false),
            (r#"data: {"id":"choices","choices":[]"#, false),
            (r#"data: {"a":{"choices":[1]},"choices":[]"#, false),
            (r#"data: {"a":"\"choices\":[1","b":["#, false),
            (r#"data: {"choices":null,"a":[1"#, false),
            (r#"data: {"choicest":[1"#, false),
            (": {\"choices\":[1\ndata: {\"choices\":[]", false),
            ("event: {\"choices\":[1\r\ndata: {\"choices\":[2", true),
            ("data: {\"choices\":\r\ndata:[\ndata: ],\"usage\":1", false),
        ] {
            assert_eq!(has_choice(event), want, "{event}");
        }
    }
}
