//! Which tokenizer counts for a model, and the counting.

use super::known::{Key, Thing};
use rustc_hash::{FxHashSet, FxHasher};
use std::cell::RefCell;
use std::hash::Hasher as _;
use std::sync::LazyLock;
use std::thread;

/// The vocabularies that are built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// `o200k_base`; `o200k_harmony` counts ordinary text alike.
    O200k,
    /// `cl100k_base`.
    Cl100k,
}

impl Encoding {
    /// Its published name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::O200k => "o200k_base",
            Self::Cl100k => "cl100k_base",
        }
    }
}

/// Shorter texts are counted as quickly as they are looked up.
const SHORTEST_KNOWN: usize = 24;

/// A vocabulary, and its tokens by their bytes: most words of ordinary text are one token, which a
/// lookup tells much faster than the encoder.
struct Vocabulary {
    tokenizer: &'static bpe_openai::Tokenizer,
    tokens: FxHashSet<&'static [u8]>,
}

static O200K: LazyLock<Vocabulary> = LazyLock::new(|| Vocabulary::of(bpe_openai::o200k_base()));
static CL100K: LazyLock<Vocabulary> = LazyLock::new(|| Vocabulary::of(bpe_openai::cl100k_base()));

impl Vocabulary {
    fn of(tokenizer: &'static bpe_openai::Tokenizer) -> Self {
        let ids = 0..u32::try_from(tokenizer.bpe.num_tokens()).unwrap_or(0);
        Self { tokenizer, tokens: ids.map(|id| tokenizer.bpe.token_bytes(id)).collect() }
    }

    fn count(&self, text: &str, recent: &mut Recent) -> u64 {
        self.tokenizer.split(text).map(|piece| recent.tokens(piece.as_bytes(), |p| self.tokens_of(p))).sum()
    }

    fn tokens_of(&self, piece: &[u8]) -> u32 {
        if self.tokens.contains(piece) {
            return 1;
        }
        u32::try_from(self.tokenizer.bpe.count(piece)).unwrap_or(u32::MAX)
    }
}

/// How many slots a thread remembers pieces in: 160 KiB, which stays in the core's own cache, where
/// the vocabulary of some 10 MB does not.
const SLOTS: usize = 8_192;

/// The pieces that a thread has counted lately, each in the slot that its hash names. Exact: a slot
/// holds the piece itself.
#[derive(Default)]
struct Recent(Vec<Slot>);

#[derive(Clone, Copy, Default)]
struct Slot {
    piece: [u8; 15],
    /// 0: empty.
    length: u8,
    tokens: u32,
}

thread_local! {
    static RECENT: [RefCell<Recent>; 2] = const { [RefCell::new(Recent(Vec::new())), RefCell::new(Recent(Vec::new()))] };
}

impl Recent {
    fn tokens(&mut self, piece: &[u8], count: impl FnOnce(&[u8]) -> u32) -> u64 {
        let mut slot = Slot::default();
        if piece.is_empty() || piece.len() > slot.piece.len() {
            return u64::from(count(piece));
        }
        if self.0.is_empty() {
            self.0 = vec![Slot::default(); SLOTS];
        }
        slot.piece[..piece.len()].copy_from_slice(piece);
        slot.length = u8::try_from(piece.len()).unwrap_or(0);
        let mut hasher = FxHasher::default();
        hasher.write(&slot.piece);
        let Ok(index) = usize::try_from(hasher.finish() % SLOTS as u64) else {
            return u64::from(count(piece));
        };
        let known = &mut self.0[index];
        if known.length != slot.length || known.piece != slot.piece {
            slot.tokens = count(piece);
            *known = slot;
        }
        u64::from(known.tokens)
    }
}

impl Encoding {
    fn cell(self) -> &'static LazyLock<Vocabulary> {
        match self {
            Self::O200k => &O200K,
            Self::Cl100k => &CL100K,
        }
    }
}

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
    pub(super) fn tag(self) -> u32 {
        self.encoding as u32
    }

    /// What tells its own counts, which are scaled, from others'.
    pub(super) fn scaled_tag(self) -> u32 {
        self.tag() | u32::try_from(self.percent).unwrap_or(0) << 8
    }

    /// Whether its vocabulary is at hand.
    pub(super) fn is_loaded(self) -> bool {
        LazyLock::get(self.encoding.cell()).is_some()
    }

    /// Tokens of a text. Spellings of special tokens are ordinary text.
    pub fn count(self, text: &str) -> u64 {
        if text.len() < SHORTEST_KNOWN {
            return self.scaled(self.count_anew(text));
        }
        let key = Key::of(self.tag(), Thing::Text, text);
        self.scaled(key.count().unwrap_or_else(|| {
            let tokens = self.count_anew(text);
            key.remember(tokens);
            tokens
        }))
    }

    /// Tokens of a text, if that is told at once: because it was counted lately, or because it is so
    /// short that counting takes no more than looking it up.
    pub fn count_if_known(self, text: &str) -> Option<u64> {
        if text.len() < SHORTEST_KNOWN {
            return Some(self.count(text));
        }
        Key::of(self.tag(), Thing::Text, text).count().map(|tokens| self.scaled(tokens))
    }

    fn count_anew(self, text: &str) -> u64 {
        RECENT.with(|recent| {
            let mut recent = recent[self.encoding as usize].borrow_mut();
            self.encoding.cell().count(text, &mut recent)
        })
    }

    fn scaled(self, tokens: u64) -> u64 {
        if self.percent == 100 { tokens } else { (tokens * self.percent).div_ceil(100) }
    }
}

/// Loads both vocabularies, side by side: some 60 ms, so that no request has to wait for them.
pub fn warm() {
    let cl100k = thread::spawn(|| Encoding::Cl100k.cell().tokens_of(b"warm"));
    Encoding::O200k.cell().tokens_of(b"warm");
    // A panic there would show again at the first count; there is nothing to add to it here.
    drop(cl100k.join());
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn counts_any_text_like_the_published_tokenizer(text in "([a-zA-Z]{1,9} ?|[ -~]{0,12}|\\PC{0,6}|\\s{1,3}|[0-9]{1,5}){0,40}") {
            let count = |encoding| Tokenizer { encoding, percent: 100 }.count(&text);
            let o200k = tiktoken_rs::o200k_base_singleton().encode_ordinary(&text).len() as u64;
            let cl100k = tiktoken_rs::cl100k_base_singleton().encode_ordinary(&text).len() as u64;
            proptest::prop_assert_eq!((count(Encoding::O200k), count(Encoding::Cl100k)), (o200k, cl100k));
        }
    }

    #[test]
    fn counts_like_the_published_tokenizer() {
        for (text, o200k, cl100k) in [
            ("tiktoken is great!", 6, 6),
            ("", 0, 0),
            ("<|endoftext|>", 7, 7),
            ("你好，世界", 3, 6),
            ("1234567890", 4, 4),
        ] {
            let count = |encoding| Tokenizer { encoding, percent: 100 }.count(text);
            assert_eq!((count(Encoding::O200k), count(Encoding::Cl100k)), (o200k, cl100k), "{text}");
        }
        let text = "Ünïcode and code: fn main() { println!(\"hi\"); }\n\n  don't 日本語 <|im_start|>";
        let oracle = tiktoken_rs::o200k_base_singleton().encode_ordinary(text).len() as u64;
        assert_eq!(Tokenizer { encoding: Encoding::O200k, percent: 100 }.count(text), oracle);
    }
}
