//! The text of a document, collected within bounds.

/// Bytes of text that are collected of a document. Further characters are only counted.
const MAX_TEXT: usize = 128 << 10;

/// The text of a document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DocumentText {
    pub(crate) text: String,
    /// Characters that are not in `text`, because there are too many or their codes have no known meaning.
    pub(crate) more_characters: u64,
}

impl DocumentText {
    pub(super) fn push(&mut self, c: char) {
        if self.text.len() < MAX_TEXT {
            self.text.push(c);
        } else {
            self.more_characters += 1;
        }
    }

    pub(super) fn push_str(&mut self, text: &str) {
        let fits = text.floor_char_boundary(MAX_TEXT.saturating_sub(self.text.len()));
        self.text.push_str(&text[..fits]);
        self.more_characters += text[fits..].chars().count() as u64;
    }

    /// Whether further characters are only counted.
    pub(super) fn is_full(&self) -> bool {
        self.text.len() >= MAX_TEXT
    }

    /// Adds a space or line break, unless there is one.
    pub(super) fn separate(&mut self, by: char) {
        if !self.text.is_empty() && !self.text.ends_with([' ', '\n']) && self.text.len() < MAX_TEXT {
            self.text.push(by);
        }
    }

    /// All characters, roughly.
    pub(super) fn characters(&self) -> u64 {
        self.text.len() as u64 + self.more_characters
    }
}
