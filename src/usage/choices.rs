//! Whether an event that has come in part can still be the one that only reports usage: not once its list of
//! choices is seen to have an item.

/// Follows the JSON of one event, fed in pieces; linear, keeps nothing of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Choices {
    depth: u32,
    place: Place,
    /// How much of the name was matched by the key that is being read; `None`: it is another one.
    matched: Option<usize>,
    has_item: bool,
    line: Line,
}

/// Only lines of data have JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Line {
    #[default]
    Begins,
    Data,
    Other,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Place {
    /// Outside of strings, or before the JSON.
    #[default]
    Outside,
    String,
    Escape,
    /// Behind a top-level string that is the name.
    BehindName,
    /// Behind the name and its colon.
    BeforeList,
    /// In the list, before an item.
    InList,
}

const NAME: &[u8] = b"choices";

impl Choices {
    /// Whether an item was seen in the list of choices.
    pub(super) fn has_item(&self) -> bool {
        self.has_item
    }

    /// Reads the next piece.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.has_item {
                return;
            }
            self.line = match (self.line, byte) {
                (_, b'\n' | b'\r') => Line::Begins,
                (Line::Begins, b'd') => Line::Data,
                (Line::Begins, _) => Line::Other,
                (line, _) => line,
            };
            if self.line != Line::Other {
                self.place = self.after(byte);
            }
        }
    }

    fn after(&mut self, byte: u8) -> Place {
        match self.place {
            Place::Escape => Place::String,
            Place::String => self.in_string(byte),
            Place::BehindName if byte == b':' => Place::BeforeList,
            Place::BeforeList if byte == b'[' => Place::InList,
            Place::InList if byte != b']' && !byte.is_ascii_whitespace() => {
                self.has_item = true;
                Place::InList
            }
            Place::InList if byte == b']' => Place::Outside,
            waits @ (Place::BehindName | Place::BeforeList | Place::InList) if byte.is_ascii_whitespace() => {
                waits
            }
            _ => self.outside(byte),
        }
    }

    fn in_string(&mut self, byte: u8) -> Place {
        match byte {
            b'"' if self.matched == Some(NAME.len()) => Place::BehindName,
            b'"' => Place::Outside,
            b'\\' => {
                self.matched = None;
                Place::Escape
            }
            _ => {
                self.matched = self.matched.filter(|&at| NAME.get(at) == Some(&byte)).map(|at| at + 1);
                Place::String
            }
        }
    }

    fn outside(&mut self, byte: u8) -> Place {
        match byte {
            b'"' => {
                self.matched = (self.depth == 1).then_some(0);
                return Place::String;
            }
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        Place::Outside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has_item(event: &str) -> bool {
        let mut choices = Choices::default();
        choices.feed(event.as_bytes());
        let mut in_pieces = Choices::default();
        event.bytes().for_each(|byte| in_pieces.feed(&[byte]));
        assert_eq!(choices.has_item(), in_pieces.has_item());
        choices.has_item()
    }

    #[test]
    fn only_an_item_of_the_events_own_list_of_choices_counts() {
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
        ] {
            assert_eq!(has_item(event), want, "{event}");
        }
    }
}
