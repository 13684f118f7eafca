//! The vocabularies that are built in, and what makes counting by them quick: most words of ordinary text
//! are one token or were counted a moment ago.

use super::known::{Key, Thing};
use rustc_hash::{FxHashSet, FxHasher};
use std::cell::RefCell;
use std::hash::Hasher as _;
use std::sync::LazyLock;

use super::tokenizer::Encoding;

/// The encoder tries every token that a run of one character could end with: pieces up to this size
/// are quick all the same, and shorter runs too.
const QUICK_PIECE: usize = 64;
const LONG_RUN: usize = 32;
/// Slow pieces are counted exactly up to this size each and this sum for one request: a hundredth of a
/// second. Beyond it they are cut into their runs, which may count a token more or less for each.
const LARGEST_EXACT: usize = 4 * 1024;
const MOST_EXACT: usize = 32 * 1024;
/// Runs are counted in parts of this length: those of one character are counted once.
const PART_OF_RUN: usize = 256;

/// A vocabulary, and its tokens by their bytes: a lookup tells that a word is one of them much faster than
/// the encoder does.
pub(super) struct Vocabulary {
    tokenizer: &'static bpe_openai::Tokenizer,
    tokens: FxHashSet<&'static [u8]>,
    tag: u64,
}

pub(super) static O200K: LazyLock<Vocabulary> =
    LazyLock::new(|| Vocabulary::of(bpe_openai::o200k_base(), Encoding::O200k.tag()));
pub(super) static CL100K: LazyLock<Vocabulary> =
    LazyLock::new(|| Vocabulary::of(bpe_openai::cl100k_base(), Encoding::Cl100k.tag()));

thread_local! {
    static O200K_RECENT: RefCell<Recent> = const { RefCell::new(Recent::NEW) };
    static CL100K_RECENT: RefCell<Recent> = const { RefCell::new(Recent::NEW) };
}

/// A new request: what was counted exactly before takes nothing from it.
pub(super) fn begin() {
    for recent in [&O200K_RECENT, &CL100K_RECENT] {
        recent.with_borrow_mut(|recent| recent.exact_left = MOST_EXACT);
    }
}

/// Tokens of a text in a vocabulary.
pub(super) fn count(vocabulary: &LazyLock<Vocabulary>, text: &str) -> u64 {
    let recent = if std::ptr::eq(vocabulary, &raw const O200K) { &O200K_RECENT } else { &CL100K_RECENT };
    recent.with_borrow_mut(|recent| vocabulary.count(text, recent))
}

impl Vocabulary {
    fn of(tokenizer: &'static bpe_openai::Tokenizer, tag: u64) -> Self {
        let ids = 0..u32::try_from(tokenizer.bpe.num_tokens()).unwrap_or(0);
        Self { tokenizer, tokens: ids.map(|id| tokenizer.bpe.token_bytes(id)).collect(), tag }
    }

    fn count(&self, text: &str, recent: &mut Recent) -> u64 {
        let pieces = self.tokenizer.split(text).map(str::as_bytes);
        pieces
            .map(|piece| {
                if piece.len() <= QUICK_PIECE { self.short(piece, recent) } else { self.long(piece, recent) }
            })
            .sum()
    }

    fn short(&self, piece: &[u8], recent: &mut Recent) -> u64 {
        recent.tokens(piece, |piece| self.encoded(piece))
    }

    fn encoded(&self, piece: &[u8]) -> u64 {
        if self.tokens.contains(piece) { 1 } else { self.tokenizer.bpe.count(piece) as u64 }
    }

    fn long(&self, piece: &[u8], recent: &mut Recent) -> u64 {
        if runs(piece).next().is_none() {
            return self.encoded(piece);
        }
        if piece.len() <= LARGEST_EXACT && piece.len() <= recent.exact_left {
            return self.remembered(piece, &mut recent.exact_left);
        }
        let (mut tokens, mut from) = (0, 0);
        for (start, end) in runs(piece) {
            tokens += self.encoded_if_any(&piece[from..start]) + self.run(piece[start], end - start);
            from = end;
        }
        tokens + self.encoded_if_any(&piece[from..])
    }

    fn encoded_if_any(&self, piece: &[u8]) -> u64 {
        if piece.is_empty() { 0 } else { self.encoded(piece) }
    }

    /// Tokens of so many times the same byte.
    fn run(&self, byte: u8, length: usize) -> u64 {
        let part = [byte; PART_OF_RUN];
        let of = |part: &[u8]| if part.is_empty() { 0 } else { self.remembered(part, &mut 0) };
        of(&part) * (length / PART_OF_RUN) as u64 + of(&part[..length % PART_OF_RUN])
    }

    /// A piece that is slow to count: remembered beyond this thread. `left` pays for a new one.
    fn remembered(&self, piece: &[u8], left: &mut usize) -> u64 {
        let key = Key::of(self.tag, Thing::Piece, piece);
        key.count().unwrap_or_else(|| {
            *left = left.saturating_sub(piece.len());
            let tokens = self.encoded(piece);
            key.remember(tokens);
            tokens
        })
    }
}

/// Where one byte is repeated many times: start and end of each such run.
fn runs(piece: &[u8]) -> impl Iterator<Item = (usize, usize)> {
    let all = piece.chunk_by(|a, b| a == b).scan(0, |start, run| {
        let from = *start;
        *start += run.len();
        Some((from, *start))
    });
    all.filter(|(start, end)| end - start >= LONG_RUN)
}

/// How many slots a thread remembers pieces in: 160 KiB, which stays in the core's own cache, where
/// the vocabulary of some 10 MB does not.
const SLOTS: usize = 8_192;

/// The pieces that a thread has counted lately, each in the slot that its hash names. Exact: a slot
/// holds the piece itself.
struct Recent {
    slots: Vec<Slot>,
    /// So many bytes of slow pieces may still be counted exactly.
    exact_left: usize,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    piece: [u8; 15],
    /// 0: empty.
    length: u8,
    tokens: u32,
}

impl Recent {
    const NEW: Self = Self { slots: Vec::new(), exact_left: MOST_EXACT };

    fn tokens(&mut self, piece: &[u8], count: impl FnOnce(&[u8]) -> u64) -> u64 {
        let mut slot = Slot::default();
        if piece.is_empty() || piece.len() > slot.piece.len() {
            return count(piece);
        }
        if self.slots.is_empty() {
            self.slots = vec![Slot::default(); SLOTS];
        }
        slot.piece[..piece.len()].copy_from_slice(piece);
        slot.length = u8::try_from(piece.len()).unwrap_or(0);
        let mut hasher = FxHasher::default();
        hasher.write(&slot.piece);
        let Ok(index) = usize::try_from(hasher.finish() % SLOTS as u64) else { return count(piece) };
        let known = &mut self.slots[index];
        if known.length != slot.length || known.piece != slot.piece {
            slot.tokens = u32::try_from(count(piece)).unwrap_or(u32::MAX);
            *known = slot;
        }
        u64::from(known.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oracle(text: &str) -> [u64; 2] {
        [tiktoken_rs::o200k_base_singleton(), tiktoken_rs::cl100k_base_singleton()]
            .map(|oracle| oracle.encode_ordinary(text).len() as u64)
    }

    #[test]
    fn runs_are_found_where_they_stand() {
        let piece = format!("ab{}c{}{}", "-".repeat(40), "=".repeat(31), "*".repeat(32));
        assert_eq!(runs(piece.as_bytes()).collect::<Vec<_>>(), [(2, 42), (74, 106)]);
        assert_eq!(runs(b"").count(), 0);
    }

    #[test]
    fn long_runs_are_exact_up_to_a_bound_and_hardly_off_beyond_it() {
        for unit in ["-", "=", "*", "/", "\t", "_", "#"] {
            for length in [65, 100, 511, 1_000, 4_095, 100_000] {
                for text in [unit.repeat(length), format!("a {}x={}\n", unit.repeat(length), unit.repeat(40))]
                {
                    begin();
                    let [o200k, cl100k] = oracle(&text);
                    let counted = [count(&O200K, &text), count(&CL100K, &text)];
                    if text.len() <= LARGEST_EXACT {
                        assert_eq!(counted, [o200k, cl100k], "{unit} {length}");
                    }
                    for (counted, exact) in counted.into_iter().zip([o200k, cl100k]) {
                        let most = 2 + text.len() as u64 / PART_OF_RUN as u64;
                        assert!(counted.abs_diff(exact) <= most, "{unit} {length}: {counted} for {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_may_be_counted_exactly_is_bounded_for_each_request() {
        begin();
        let piece = |n: usize| format!("{}{}", "-".repeat(2_000 + n), "=".repeat(100));
        for n in 0..40 {
            count(&O200K, &piece(n));
        }
        O200K_RECENT
            .with_borrow(|recent| assert!(recent.exact_left < LARGEST_EXACT, "{}", recent.exact_left));
        begin();
        O200K_RECENT.with_borrow(|recent| assert_eq!(recent.exact_left, MOST_EXACT));
    }
}
