//! The vocabularies, and the fast paths of the built-in ones.
//!
//! This thread has counted most words of ordinary text recently. Only other pieces are encoded.

use super::count_cache::{CacheKey, CachedCount, TextHash};
use super::file::FileVocabulary;
use foldhash::fast::FixedState;
use std::cell::RefCell;
use std::hash::{BuildHasher as _, Hasher as _};
use tollgate_vocabularies::Vocabulary as Tokens;

/// Pieces up to this size (bytes) are fast to encode. Longer ones with a run of one character are slow: the
/// encoder tries every token that the run could end with.
const MAX_QUICK_PIECE: usize = 64;
/// Runs of one byte below this length do not slow the encoder down.
const MIN_SLOW_RUN: usize = 32;
/// Slow pieces up to this size (bytes) are counted exactly. Longer ones are cut into their runs, which may
/// count one token too many or too few per run.
const MAX_EXACT_PIECE: usize = 4 * 1024;
/// Bytes of slow pieces that are counted exactly per request; they take about 10 ms.
const MAX_EXACT_BYTES: usize = 32 * 1024;
/// Runs are counted in parts of this length (bytes), so that the cache answers for all parts but one.
const RUN_PART: usize = 256;

/// A vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// `o200k_base`, built in. `o200k_harmony` gives the same counts for ordinary text.
    O200k,
    /// `cl100k_base`, built in.
    Cl100k,
    /// The vocabulary of a `tokenizer.json` file.
    File(&'static FileVocabulary),
}

impl Encoding {
    /// The published name, or the name of the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::O200k => "o200k_base",
            Self::Cl100k => "cl100k_base",
            Self::File(file) => file.name(),
        }
    }

    /// Identifies the vocabulary in cache keys.
    pub(super) fn id(self) -> u64 {
        match self {
            Self::O200k => O200K_ID,
            Self::Cl100k => CL100K_ID,
            Self::File(file) => FIRST_FILE_ID + u64::from(file.number()),
        }
    }

    /// Whether the vocabulary can count at once; otherwise the first count takes some milliseconds longer.
    pub(super) fn is_ready(self) -> bool {
        match self {
            Self::O200k => tollgate_vocabularies::o200k_base().is_ready(),
            Self::Cl100k => tollgate_vocabularies::cl100k_base().is_ready(),
            Self::File(_) => true,
        }
    }

    /// The tokens of a text.
    pub(super) fn count(self, text: &str) -> u64 {
        match self {
            Self::O200k => O200K_PIECES.with_borrow_mut(|cache| Vocabulary::o200k().count(text, cache)),
            Self::Cl100k => CL100K_PIECES.with_borrow_mut(|cache| Vocabulary::cl100k().count(text, cache)),
            // If the vocabulary of the file cannot encode this text, the default one counts it.
            Self::File(file) => file.count(text).unwrap_or_else(|| Self::O200k.count(text)),
        }
    }
}

const O200K_ID: u64 = 0;
const CL100K_ID: u64 = 1;
const FIRST_FILE_ID: u64 = 2;

/// A built-in vocabulary.
#[derive(Clone, Copy)]
struct Vocabulary {
    tokens: &'static Tokens,
    id: u64,
}

thread_local! {
    static O200K_PIECES: RefCell<PieceCache> = const { RefCell::new(PieceCache::NEW) };
    static CL100K_PIECES: RefCell<PieceCache> = const { RefCell::new(PieceCache::NEW) };
}

/// Restores the budget of exact counting (`MAX_EXACT_BYTES`) on this thread. Call it for each request.
pub(super) fn begin_request() {
    for cache in [&O200K_PIECES, &CL100K_PIECES] {
        cache.with_borrow_mut(|cache| cache.exact_bytes_left = MAX_EXACT_BYTES);
    }
}

impl Vocabulary {
    fn o200k() -> Self {
        Self { tokens: tollgate_vocabularies::o200k_base(), id: O200K_ID }
    }

    fn cl100k() -> Self {
        Self { tokens: tollgate_vocabularies::cl100k_base(), id: CL100K_ID }
    }

    fn count(&self, text: &str, cache: &mut PieceCache) -> u64 {
        let pieces = self.tokens.split(text).map(str::as_bytes);
        pieces
            .map(|piece| {
                if piece.len() <= MAX_QUICK_PIECE {
                    self.count_short(piece, cache)
                } else {
                    self.count_long(piece, cache)
                }
            })
            .sum()
    }

    fn count_short(&self, piece: &[u8], cache: &mut PieceCache) -> u64 {
        cache.count(piece, |piece| self.encode(piece))
    }

    fn encode(&self, piece: &[u8]) -> u64 {
        self.tokens.count(piece) as u64
    }

    fn count_long(&self, piece: &[u8], cache: &mut PieceCache) -> u64 {
        if runs(piece).next().is_none() {
            return self.encode(piece);
        }
        if piece.len() <= MAX_EXACT_PIECE && piece.len() <= cache.exact_bytes_left {
            return self.count_cached(piece, &mut cache.exact_bytes_left);
        }
        let (mut tokens, mut from) = (0, 0);
        for (start, end) in runs(piece) {
            tokens += self.encode_if_any(&piece[from..start]) + self.count_run(piece[start], end - start);
            from = end;
        }
        tokens + self.encode_if_any(&piece[from..])
    }

    fn encode_if_any(&self, piece: &[u8]) -> u64 {
        if piece.is_empty() { 0 } else { self.encode(piece) }
    }

    /// The tokens of `length` times the same byte.
    fn count_run(&self, byte: u8, length: usize) -> u64 {
        let part = [byte; RUN_PART];
        let of = |part: &[u8]| if part.is_empty() { 0 } else { self.count_cached(part, &mut 0) };
        of(&part) * (length / RUN_PART) as u64 + of(&part[..length % RUN_PART])
    }

    /// Counts a slow piece with the cache of the process. A piece that is not cached reduces `left`, the bytes that
    /// may still be counted exactly.
    fn count_cached(&self, piece: &[u8], left: &mut usize) -> u64 {
        let key = CacheKey::of(self.id, CachedCount::Piece, TextHash::of(piece));
        key.cached().unwrap_or_else(|| {
            *left = left.saturating_sub(piece.len());
            let tokens = self.encode(piece);
            key.insert(tokens);
            tokens
        })
    }
}

/// Start and end of each run of one byte that is at least `MIN_SLOW_RUN` long.
fn runs(piece: &[u8]) -> impl Iterator<Item = (usize, usize)> {
    let all = piece.chunk_by(|a, b| a == b).scan(0, |start, run| {
        let from = *start;
        *start += run.len();
        Some((from, *start))
    });
    all.filter(|(start, end)| end - start >= MIN_SLOW_RUN)
}

/// Slots of a thread's piece cache. They take 160 KiB, which fits in the core's own cache; the vocabulary
/// of about 10 MB does not.
const PIECE_SLOTS: usize = 8_192;

/// The counts of the pieces that a thread has counted most recently. The hash of a piece selects its slot. A slot
/// holds the piece itself, so counts are exact.
struct PieceCache {
    slots: Vec<PieceSlot>,
    /// Bytes of slow pieces that may still be counted exactly for this request.
    exact_bytes_left: usize,
}

#[derive(Clone, Copy, Default)]
struct PieceSlot {
    piece: [u8; 15],
    /// Bytes of `piece` in use; 0: the slot is empty.
    length: u8,
    tokens: u32,
}

impl PieceCache {
    const NEW: Self = Self { slots: Vec::new(), exact_bytes_left: MAX_EXACT_BYTES };

    fn count(&mut self, piece: &[u8], count: impl FnOnce(&[u8]) -> u64) -> u64 {
        let mut slot = PieceSlot::default();
        if piece.is_empty() || piece.len() > slot.piece.len() {
            return count(piece);
        }
        if self.slots.is_empty() {
            self.slots = vec![PieceSlot::default(); PIECE_SLOTS];
        }
        slot.piece[..piece.len()].copy_from_slice(piece);
        slot.length = u8::try_from(piece.len()).unwrap_or(0);
        let mut hasher = FixedState::default().build_hasher();
        hasher.write(&slot.piece);
        let Ok(index) = usize::try_from(hasher.finish() % PIECE_SLOTS as u64) else { return count(piece) };
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
    fn every_published_token_is_one_token() {
        let vocabularies = [
            (tollgate_vocabularies::o200k_base(), tiktoken_rs::o200k_base_singleton(), 199_998),
            (tollgate_vocabularies::cl100k_base(), tiktoken_rs::cl100k_base_singleton(), 100_256),
        ];
        for (vocabulary, oracle, tokens) in vocabularies {
            for token in 0..tokens {
                let bytes = oracle.decode_bytes(&[token]).unwrap();
                assert_eq!(vocabulary.count(&bytes), 1, "{token}: {bytes:?}");
            }
            assert_eq!(vocabulary.tokens(), tokens as usize);
        }
    }

    #[test]
    fn runs_reports_start_and_end() {
        let piece = format!("ab{}c{}{}", "-".repeat(40), "=".repeat(31), "*".repeat(32));
        assert_eq!(runs(piece.as_bytes()).collect::<Vec<_>>(), [(2, 42), (74, 106)]);
        assert_eq!(runs(b"").count(), 0);
    }

    #[test]
    fn long_runs_are_exact_up_to_a_bound_and_close_beyond_it() {
        for unit in ["-", "=", "*", "/", "\t", "_", "#"] {
            for length in [65, 100, 511, 1_000, 4_095, 100_000] {
                for text in [unit.repeat(length), format!("a {}x={}\n", unit.repeat(length), unit.repeat(40))]
                {
                    begin_request();
                    let [o200k, cl100k] = oracle(&text);
                    let counted = [Encoding::O200k.count(&text), Encoding::Cl100k.count(&text)];
                    if text.len() <= MAX_EXACT_PIECE {
                        assert_eq!(counted, [o200k, cl100k], "{unit} {length}");
                    }
                    for (counted, exact) in counted.into_iter().zip([o200k, cl100k]) {
                        let most = 2 + text.len() as u64 / RUN_PART as u64;
                        assert!(counted.abs_diff(exact) <= most, "{unit} {length}: {counted} for {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn exact_counting_of_slow_pieces_is_bounded_per_request() {
        begin_request();
        let piece = |n: usize| format!("{}{}", "-".repeat(2_000 + n), "=".repeat(100));
        for n in 0..40 {
            Encoding::O200k.count(&piece(n));
        }
        O200K_PIECES.with_borrow(|cache| {
            assert!(cache.exact_bytes_left < MAX_EXACT_PIECE, "{}", cache.exact_bytes_left);
        });
        begin_request();
        O200K_PIECES.with_borrow(|cache| assert_eq!(cache.exact_bytes_left, MAX_EXACT_BYTES));
    }
}
