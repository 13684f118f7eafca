//! Masks the gateway's keys in the errors of an upstream: some backends repeat the key that they refuse.

use super::answer::BodyFilter;
use bytes::{Bytes, BytesMut};
use memchr::memmem::Finder;
use std::io;

/// Only this many bytes of a body are searched.
pub(crate) const MAX_SEARCHED_BYTES: usize = 64 * 1024;
/// Shorter keys are not searched. Placeholders such as `EMPTY` are no secret, and could be words of the error.
const MIN_KEY_BYTES: usize = 8;

/// Masks keys in the headers and in the beginning of the body of one answer. The length does not change.
pub struct KeyMask {
    keys: Vec<Finder<'static>>,
    /// Bytes at the end of the last piece that may be the beginning of a key.
    held: BytesMut,
    searched: usize,
    /// Called when the first key is found.
    on_found: Option<Box<dyn Fn() + Send + Sync>>,
}

impl KeyMask {
    /// `None`: there is no key that can be searched.
    pub(crate) fn new<'k>(
        keys: impl Iterator<Item = &'k [u8]>,
        on_found: Box<dyn Fn() + Send + Sync>,
    ) -> Option<Self> {
        let keys: Vec<_> = keys
            .filter(|key| (MIN_KEY_BYTES..=MAX_SEARCHED_BYTES).contains(&key.len()))
            .map(|key| Finder::new(key).into_owned())
            .collect();
        let mask = Self { keys, held: BytesMut::new(), searched: 0, on_found: Some(on_found) };
        (!mask.keys.is_empty()).then_some(mask)
    }

    /// The text with every key masked; `None`: it contains none.
    pub(crate) fn masked(&mut self, text: &[u8]) -> Option<Vec<u8>> {
        let mut masked: Option<Vec<u8>> = None;
        for key in &self.keys {
            for at in key.find_iter(text) {
                masked.get_or_insert_with(|| text.to_vec())[at..at + key.needle().len()].fill(b'*');
            }
        }
        if let (Some(on_found), true) = (&self.on_found, masked.is_some()) {
            on_found();
            self.on_found = None;
        }
        masked
    }

    /// Whether the text contains a key.
    pub(crate) fn finds_key(&self, text: &[u8]) -> bool {
        self.keys.iter().any(|key| key.find(text).is_some())
    }

    /// The length of the longest end of `text` with which a key begins.
    fn begun_key(&self, text: &[u8]) -> usize {
        let begun = |key: &Finder<'_>| {
            let longest = (key.needle().len() - 1).min(text.len());
            (1..=longest).rev().find(|&n| text.ends_with(&key.needle()[..n])).unwrap_or(0)
        };
        self.keys.iter().map(begun).max().unwrap_or(0)
    }
}

impl BodyFilter for KeyMask {
    /// The next piece, masked. Its last bytes are held back if a key may begin there.
    fn feed(&mut self, piece: Bytes) -> io::Result<Bytes> {
        let is_last = self.searched >= MAX_SEARCHED_BYTES;
        if is_last && self.held.is_empty() {
            return Ok(piece);
        }
        let mut whole = if self.held.is_empty() {
            piece
        } else {
            self.held.extend_from_slice(&piece);
            self.held.split().freeze()
        };
        if let Some(masked) = self.masked(&whole) {
            whole = masked.into();
        }
        let held = if is_last { 0 } else { self.begun_key(&whole) };
        let passed = whole.len() - held;
        self.searched += passed;
        self.held.extend_from_slice(&whole[passed..]);
        Ok(whole.slice(..passed))
    }

    fn finish(&mut self) -> (Bytes, Option<io::Error>) {
        (self.held.split().freeze(), None)
    }

    fn is_unfinished(&self) -> bool {
        !self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn mask(keys: &[&'static str]) -> (KeyMask, Arc<AtomicUsize>) {
        let found = Arc::new(AtomicUsize::new(0));
        let count = found.clone();
        let on_found = Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        (KeyMask::new(keys.iter().map(|key| key.as_bytes()), on_found).unwrap(), found)
    }

    /// The text in pieces of `step`, masked.
    fn through(keys: &[&'static str], text: &str, step: usize) -> (String, usize) {
        let (mut mask, found) = mask(keys);
        let mut out = Vec::new();
        for piece in text.as_bytes().chunks(step) {
            out.extend_from_slice(&mask.feed(Bytes::copy_from_slice(piece)).unwrap());
        }
        out.extend_from_slice(&mask.finish().0);
        (String::from_utf8(out).unwrap(), found.load(Ordering::Relaxed))
    }

    #[test]
    fn a_key_is_masked_wherever_the_body_is_cut() {
        let keys = ["sk-sk-secret", "other-key-1"];
        let text = "a sk-sk-sk-secret b sk-sk-secre other-key-1sk-sk-secret sk-sk-";
        let masked = "a sk-************ b sk-sk-secre *********************** sk-sk-";
        for step in 1..=text.len() {
            assert_eq!(through(&keys, text, step), (masked.to_owned(), 1), "{step}");
        }
        assert_eq!(through(&keys, "nothing", 3), ("nothing".to_owned(), 0));
    }

    #[test]
    fn only_the_first_64_kib_are_searched() {
        let text = format!("{}sk-secret-key{}sk-secret-key", " ".repeat(65_000), " ".repeat(10_000));
        let (out, found) = through(&["sk-secret-key"], &text, 1_000);
        assert_eq!((out.len(), out.matches("sk-secret-key").count(), found), (text.len(), 1, 1));
    }

    #[test]
    fn bytes_that_are_held_back_at_the_end_of_the_search_keep_their_place() {
        let key = "sk-secret-key";
        for rest in ["x".repeat(5_000), format!("{}{}", &key[3..], "y".repeat(70_000))] {
            let text = format!("{}sk-{rest}", " ".repeat(MAX_SEARCHED_BYTES));
            let (out, _) = through(&[key], &text, MAX_SEARCHED_BYTES + 3);
            assert_eq!(out, text.replace(key, &"*".repeat(key.len())));
        }
    }

    #[test]
    fn a_short_key_is_not_searched() {
        assert!(KeyMask::new([&b"sk"[..]].into_iter(), Box::new(|| ())).is_none());
    }
}
