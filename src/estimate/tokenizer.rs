//! The tokenizer of a model: a vocabulary, and a factor where the model's own vocabulary is not built in.

use super::count_cache::{CacheKey, CachedCount, HashedText};
use super::vocabulary::{self, Encoding};
use std::thread;

/// Bytes of new text that a built-in vocabulary counts in about 50 microseconds.
const MAX_QUICK_BYTES: usize = 2 * 1024;
/// Bytes of new text that the vocabulary of a file counts in about 50 microseconds.
const MAX_QUICK_BYTES_BY_FILE: usize = 128;

/// Counts tokens as the tokenizer of a model does, or approximately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokenizer {
    /// The vocabulary.
    pub encoding: Encoding,
    /// Tokens of the model's own tokenizer per 100 tokens of `encoding`; 100 if it is the same one.
    pub percent: u64,
    /// Whether every digit is a token. The built-in vocabularies have tokens of up to three digits.
    pub splits_digits: bool,
}

impl Tokenizer {
    pub(super) const fn exact(encoding: Encoding) -> Self {
        Self { encoding, percent: 100, splits_digits: false }
    }

    /// Identifies the tokenizer in cache keys of counts without the factor.
    fn id(self) -> u64 {
        self.encoding.id() | u64::from(self.splits_digits) << 63
    }

    /// The tokens of a text without the factor.
    fn unscaled(self, text: &str) -> u64 {
        let digits = if self.splits_digits { split_digits(text) } else { 0 };
        self.encoding.count(text) + digits
    }

    /// Identifies the tokenizer in cache keys of counts that include the factor.
    pub(super) fn scaled_id(self) -> u64 {
        self.id() | self.percent << 32
    }

    /// Bytes of text that the tokenizer counts in about 50 microseconds if the text is not cached. 0 while the
    /// vocabulary is not ready.
    pub(super) fn max_quick_bytes(self) -> usize {
        match self.encoding {
            Encoding::File(_) => MAX_QUICK_BYTES_BY_FILE,
            _ if self.encoding.is_ready() => MAX_QUICK_BYTES,
            _ => 0,
        }
    }

    /// The sum of the tokens of the texts of one request. Takes about 20 microseconds per KiB.
    pub fn count_all<'t>(self, texts: impl IntoIterator<Item = &'t str>) -> u64 {
        vocabulary::begin_request();
        texts.into_iter().map(|text| self.count(text)).sum()
    }

    /// The tokens of a text. Spellings of special tokens count as ordinary text.
    pub(super) fn count(self, text: &str) -> u64 {
        self.count_hashed(&text.into())
    }

    /// The tokens of a text whose hash is known.
    pub(super) fn count_hashed(self, text: &HashedText<'_>) -> u64 {
        let Some(key) = self.key(text) else { return self.scaled(self.unscaled(&text.text)) };
        self.scaled(key.cached().unwrap_or_else(|| {
            let tokens = self.unscaled(&text.text);
            key.insert(tokens);
            tokens
        }))
    }

    /// The tokens of a text if the count is available at once: the text is in the cache, or too short for it.
    pub(super) fn count_if_cached(self, text: &HashedText<'_>) -> Option<u64> {
        let Some(key) = self.key(text) else { return Some(self.scaled(self.unscaled(&text.text))) };
        key.cached().map(|tokens| self.scaled(tokens))
    }

    /// `None`: the text is too short for the cache.
    fn key(self, text: &HashedText<'_>) -> Option<CacheKey> {
        text.hash.map(|hash| CacheKey::of(self.id(), CachedCount::Text, hash))
    }

    fn scaled(self, tokens: u64) -> u64 {
        if self.percent == 100 { tokens } else { (tokens * self.percent).div_ceil(100) }
    }
}

/// How many more tokens a text has if every digit is a token, and not up to three digits.
fn split_digits(text: &str) -> u64 {
    let (mut more, mut run) = (0, 0u64);
    for b in text.bytes().chain([b' ']) {
        if b.is_ascii_digit() {
            run += 1;
        } else {
            more += run - run.div_ceil(3);
            run = 0;
        }
    }
    more
}

/// Makes both built-in vocabularies ready, in some milliseconds. Call it before the first request.
pub fn warm() {
    let cl100k = thread::spawn(|| Encoding::Cl100k.count("warm"));
    Encoding::O200k.count("warm");
    // If this panicked, the first count panics again and reports it.
    drop(cl100k.join());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(text: &str) -> [u64; 2] {
        [Encoding::O200k, Encoding::Cl100k].map(|encoding| Tokenizer::exact(encoding).count_all([text]))
    }

    #[test]
    fn digits_can_be_tokens_of_their_own() {
        let tokens = |splits_digits, text: &str| {
            Tokenizer { splits_digits, ..Tokenizer::exact(Encoding::O200k) }.count_all([text])
        };
        for (text, whole, split) in [("no digits", 2, 2), ("1234567890", 4, 10), ("7 120,135", 5, 9)] {
            assert_eq!((tokens(false, text), tokens(true, text)), (whole, split), "{text}");
        }
        // Long enough for the cache.
        let long = "The sum is 1234567890, and the difference is 1000.";
        assert_eq!(tokens(true, long) - tokens(false, long), 8);
    }

    fn oracle(text: &str) -> [u64; 2] {
        [tiktoken_rs::o200k_base_singleton(), tiktoken_rs::cl100k_base_singleton()]
            .map(|oracle| oracle.encode_ordinary(text).len() as u64)
    }

    proptest::proptest! {
        #[test]
        fn any_text_counts_as_in_the_published_tokenizer(text in "([a-zA-Z]{1,9} ?|[ -~]{0,12}|\\PC{0,6}|\\s{1,3}|[0-9]{1,5}){0,40}") {
            proptest::prop_assert_eq!(counts(&text), oracle(&text));
        }

        #[test]
        fn runs_count_as_in_the_published_tokenizer(runs in proptest::collection::vec(("[-=*/_ \t#a.]", 1usize..200), 1..12)) {
            let text: String = runs.iter().map(|(unit, times)| unit.repeat(*times)).collect();
            proptest::prop_assert_eq!(counts(&text), oracle(&text));
        }
    }

    #[test]
    fn known_texts_count_as_in_the_published_tokenizer() {
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
