//! Vocabularies that `tokenizer.json` files describe, in Hugging Face's format: of Llama, Qwen, Mistral and
//! any other model whose vocabulary is published.
//!
//! They count exactly, but some ten times slower than those that are built in, and take 100 MB and more each.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A larger file is no vocabulary.
const LARGEST_FILE: u64 = 256 << 20;
/// Text is counted in parts of about this size: some vocabularies take quadratic time.
const PART: usize = 8 * 1024;

/// A vocabulary from a file. Like those that are built in it stays as long as the process does.
pub struct FileVocabulary {
    number: u32,
    path: PathBuf,
    name: String,
    #[cfg(feature = "tokenizer-files")]
    tokenizer: tokenizers::Tokenizer,
}

/// All that were loaded, in the order of their numbers.
static LOADED: Mutex<Vec<&'static FileVocabulary>> = Mutex::new(Vec::new());

impl FileVocabulary {
    /// Loads a file, unless it is loaded already. Takes a second for a large one.
    ///
    /// # Errors
    /// Why the file cannot be used.
    pub fn load(path: &Path) -> Result<&'static Self, String> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = loaded.iter().find(|known| known.path == path) {
            return Ok(known);
        }
        let size = std::fs::metadata(path).map_err(|error| format!("it cannot be read: {error}"))?.len();
        if size > LARGEST_FILE {
            return Err(format!("it is larger than {} MiB", LARGEST_FILE >> 20));
        }
        let number = u32::try_from(loaded.len()).unwrap_or(u32::MAX);
        let new: &'static Self = Box::leak(Box::new(Self::read(path, number)?));
        loaded.push(new);
        Ok(new)
    }

    /// The name of its file.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Tokens of a text; `None` where it cannot be counted by this vocabulary.
    pub(super) fn count(&self, text: &str) -> Option<u64> {
        parts(text).map(|part| self.tokens(part)).sum()
    }
}

#[cfg(feature = "tokenizer-files")]
impl FileVocabulary {
    fn read(path: &Path, number: u32) -> Result<Self, String> {
        let what = |error: tokenizers::Error| format!("it is no tokenizer.json that can be used: {error}");
        let mut tokenizer = tokenizers::Tokenizer::from_file(path).map_err(what)?;
        // What a model adds is counted by the rules for its messages; a caller's "<|im_end|>" is text.
        tokenizer.set_encode_special_tokens(true);
        tokenizer.with_truncation(None).map_err(what)?;
        tokenizer.with_padding(None);
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let new = Self { number, path: path.to_owned(), name, tokenizer };
        new.count("Does it count?").map(|_| new).ok_or_else(|| "it cannot count a plain sentence".to_owned())
    }

    fn tokens(&self, text: &str) -> Option<u64> {
        // A file can describe something that panics at some text.
        let encode = || self.tokenizer.encode_fast(text, false).map(|encoded| encoded.len() as u64);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(encode)).ok()?.ok()
    }
}

#[cfg(not(feature = "tokenizer-files"))]
impl FileVocabulary {
    fn read(_: &Path, _: u32) -> Result<Self, String> {
        Err("this build of Tollgate cannot read such files: build it with the feature tokenizer-files"
            .to_owned())
    }

    fn tokens(&self, _: &str) -> Option<u64> {
        None
    }
}

/// A text in parts, cut before a space between two letters where there is one, where no token crosses.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let part;
        (part, rest) = rest.split_at(cut(rest));
        (!part.is_empty()).then_some(part)
    })
}

fn cut(text: &str) -> usize {
    if text.len() <= PART {
        return text.len();
    }
    let bytes = text.as_bytes();
    let is_letter = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphabetic);
    let between_words =
        (PART / 2..PART).rev().find(|&at| bytes[at] == b' ' && is_letter(at - 1) && is_letter(at + 1));
    between_words.unwrap_or_else(|| text.floor_char_boundary(PART))
}

impl fmt::Debug for FileVocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileVocabulary").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Each file is loaded once.
impl PartialEq for FileVocabulary {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for FileVocabulary {}
