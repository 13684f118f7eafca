//! Which tokenizer counts for a model, and the counting.

use super::file::FileVocabulary;
use super::known::{Key, Thing};
use super::vocabulary::{self, CL100K, O200K, Vocabulary};
use std::sync::LazyLock;
use std::thread;

/// A vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// `o200k_base`; `o200k_harmony` counts ordinary text alike. Built in.
    O200k,
    /// `cl100k_base`. Built in.
    Cl100k,
    /// One that a `tokenizer.json` file describes.
    File(&'static FileVocabulary),
}

impl Encoding {
    /// Its published name, or that of its file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::O200k => "o200k_base",
            Self::Cl100k => "cl100k_base",
            Self::File(file) => file.name(),
        }
    }

    /// What tells its counts from others'.
    pub(super) fn tag(self) -> u64 {
        match self {
            Self::O200k => 0,
            Self::Cl100k => 1,
            Self::File(file) => 2 + u64::from(file.number()),
        }
    }

    fn built_in(self) -> Option<&'static LazyLock<Vocabulary>> {
        match self {
            Self::O200k => Some(&O200K),
            Self::Cl100k => Some(&CL100K),
            Self::File(_) => None,
        }
    }

    fn count(self, text: &str) -> u64 {
        match self {
            Self::O200k => vocabulary::count(&O200K, text),
            Self::Cl100k => vocabulary::count(&CL100K, text),
            // A file that cannot count this text is as good as none.
            Self::File(file) => file.count(text).unwrap_or_else(|| vocabulary::count(&O200K, text)),
        }
    }
}

/// Shorter texts are counted as quickly as they are looked up.
const SHORTEST_KNOWN: usize = 24;
/// So much text is counted where it arrives: some 50 microseconds, by a file's vocabulary too.
const QUICK_TEXT: usize = 2 * 1024;
const QUICK_TEXT_BY_FILE: usize = 128;

/// Counts tokens as a model's own tokenizer does, or near it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokenizer {
    /// The vocabulary that counts.
    pub encoding: Encoding,
    /// What the model's own tokenizer makes of 100 tokens of `encoding`; 100: it is the same one.
    pub percent: u64,
}

impl Tokenizer {
    pub(super) const fn exact(encoding: Encoding) -> Self {
        Self { encoding, percent: 100 }
    }

    /// What tells this vocabulary's counts from others'.
    pub(super) fn tag(self) -> u64 {
        self.encoding.tag()
    }

    /// What tells its own counts, which are scaled, from others'.
    pub(super) fn scaled_tag(self) -> u64 {
        self.tag() | self.percent << 32
    }

    /// Bytes of text not counted lately that take no more than about 50 microseconds.
    pub(super) fn quick_text(self) -> usize {
        match self.encoding.built_in() {
            Some(cell) if LazyLock::get(cell).is_some() => QUICK_TEXT,
            Some(_) => 0,
            None => QUICK_TEXT_BY_FILE,
        }
    }

    /// Tokens of texts that belong together. Takes about 20 microseconds for 1 KiB.
    pub fn count_all<'t>(self, texts: impl IntoIterator<Item = &'t str>) -> u64 {
        vocabulary::begin();
        texts.into_iter().map(|text| self.count(text)).sum()
    }

    /// Tokens of a text. Spellings of special tokens are ordinary text.
    pub(super) fn count(self, text: &str) -> u64 {
        if text.len() < SHORTEST_KNOWN {
            return self.scaled(self.encoding.count(text));
        }
        let key = Key::of(self.tag(), Thing::Text, text.as_bytes());
        self.scaled(key.count().unwrap_or_else(|| {
            let tokens = self.encoding.count(text);
            key.remember(tokens);
            tokens
        }))
    }

    /// Tokens of a text, if that is told at once: because it was counted lately, or because it is so
    /// short that counting takes no more than looking it up.
    pub(super) fn count_if_known(self, text: &str) -> Option<u64> {
        if text.len() < SHORTEST_KNOWN {
            return Some(self.count(text));
        }
        Key::of(self.tag(), Thing::Text, text.as_bytes()).count().map(|tokens| self.scaled(tokens))
    }

    fn scaled(self, tokens: u64) -> u64 {
        if self.percent == 100 { tokens } else { (tokens * self.percent).div_ceil(100) }
    }
}

/// Loads both built-in vocabularies, side by side: some 60 ms, so that no request has to wait for them.
pub fn warm() {
    let cl100k = thread::spawn(|| vocabulary::count(&CL100K, "warm"));
    vocabulary::count(&O200K, "warm");
    // A panic there would show again at the first count; there is nothing to add to it here.
    drop(cl100k.join());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(text: &str) -> [u64; 2] {
        [Encoding::O200k, Encoding::Cl100k].map(|encoding| Tokenizer::exact(encoding).count_all([text]))
    }

    fn oracle(text: &str) -> [u64; 2] {
        [tiktoken_rs::o200k_base_singleton(), tiktoken_rs::cl100k_base_singleton()]
            .map(|oracle| oracle.encode_ordinary(text).len() as u64)
    }

    proptest::proptest! {
        #[test]
        fn counts_any_text_like_the_published_tokenizer(text in "([a-zA-Z]{1,9} ?|[ -~]{0,12}|\\PC{0,6}|\\s{1,3}|[0-9]{1,5}){0,40}") {
            proptest::prop_assert_eq!(counts(&text), oracle(&text));
        }

        #[test]
        fn counts_runs_like_the_published_tokenizer(runs in proptest::collection::vec(("[-=*/_ \t#a.]", 1usize..200), 1..12)) {
            let text: String = runs.iter().map(|(unit, times)| unit.repeat(*times)).collect();
            proptest::prop_assert_eq!(counts(&text), oracle(&text));
        }
    }

    #[test]
    fn counts_like_the_published_tokenizer() {
        for (text, want) in [
            ("tiktoken is great!", [6, 6]),
            ("antidisestablishmentarianism", [6, 6]),
            ("2 + 2 = 4", [7, 7]),
            ("お誕生日おめでとう", [8, 9]),
            ("", [0, 0]),
            ("<|endoftext|>", [7, 7]),
            ("<|im_start|>", [6, 6]),
            ("你好，世界", [3, 6]),
            ("हिन्दी", [3, 6]),
            ("👨‍👩‍👧‍👦", [11, 18]),
            (".\n/", [1, 2]),
            ("don't DON'T", [2, 4]),
            ("\u{200d}\u{200d}\u{200d}\u{200d}\u{200d}\u{200d}\u{200d}\u{200d}\u{200d}\u{200d}", [10, 20]),
            ("1234567890", [4, 4]),
        ] {
            assert_eq!(counts(text), want, "{text}");
        }
        assert_eq!(counts(&"a".repeat(100)), [13, 13]);
        assert_eq!(counts(&" ".repeat(81)), [2, 1]);
        for text in [
            "Ünïcode and code: fn main() { println!(\"hi\"); }\n\n  don't 日本語 <|im_start|>",
            "é'ſ'LLE",
            "𐥕's",
            "\n \n",
            " <|endoftext|>",
        ] {
            assert_eq!(counts(text), oracle(text), "{text}");
        }
    }
}
