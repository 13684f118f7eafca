//! Vocabularies from `tokenizer.json` files in Hugging Face's format: Llama, Qwen, Mistral and any other model
//! whose vocabulary is published.
//!
//! They count exactly, but about ten times slower than the built-in ones. Each takes 100 MB or more.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Maximum size of a file in bytes.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Text is counted in parts of about this size (bytes), because some vocabularies take quadratic time.
const PART_BYTES: usize = 8 * 1024;

/// A vocabulary from a file. It stays in memory until the process ends.
pub struct FileVocabulary {
    /// Unique among the loaded files.
    number: u32,
    path: PathBuf,
    name: String,
    #[cfg(feature = "tokenizer-files")]
    tokenizer: tokenizers::Tokenizer,
}

/// The loaded vocabularies, in the order of their numbers.
static LOADED: Mutex<Vec<&'static FileVocabulary>> = Mutex::new(Vec::new());

impl FileVocabulary {
    /// Loads a file unless it is loaded already. A large one takes a second.
    ///
    /// # Errors
    /// The reason why the file cannot be used.
    pub fn load(path: &Path) -> Result<&'static Self, String> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = loaded.iter().find(|known| known.path == path) {
            return Ok(known);
        }
        let size = std::fs::metadata(path).map_err(|error| format!("it cannot be read: {error}"))?.len();
        if size > MAX_FILE_BYTES {
            return Err(format!("it is larger than {} MiB", MAX_FILE_BYTES >> 20));
        }
        let number = u32::try_from(loaded.len()).unwrap_or(u32::MAX);
        let new: &'static Self = Box::leak(Box::new(Self::read(path, number)?));
        loaded.push(new);
        Ok(new)
    }

    /// The file name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// The tokens of a text; `None` if the vocabulary cannot encode it.
    pub(super) fn count(&self, text: &str) -> Option<u64> {
        parts(text).map(|part| self.tokens(part)).sum()
    }
}

#[cfg(feature = "tokenizer-files")]
impl FileVocabulary {
    fn read(path: &Path, number: u32) -> Result<Self, String> {
        let unusable = |error: tokenizers::Error| format!("it is not a usable tokenizer.json: {error}");
        let json = std::fs::read_to_string(path).map_err(|error| unusable(error.into()))?;
        // Unlike `from_file`, this is not generic, so the reader of the format is compiled only once.
        let mut tokenizer: tokenizers::Tokenizer = json.parse().map_err(unusable)?;
        // The spelling of a special token in a caller's text is ordinary text. The rules for messages count the
        // special tokens that a template adds.
        tokenizer.set_encode_special_tokens(true);
        tokenizer.with_truncation(None).map_err(unusable)?;
        tokenizer.with_padding(None);
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let new = Self { number, path: path.to_owned(), name, tokenizer };
        new.count("Does it count?")
            .map(|_| new)
            .ok_or_else(|| "it cannot count the tokens of a plain sentence".to_owned())
    }

    fn tokens(&self, text: &str) -> Option<u64> {
        // A tokenizer from a file can panic on some texts.
        let encode = || self.tokenizer.encode_fast(text, false).map(|encoded| encoded.len() as u64);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(encode)).ok()?.ok()
    }
}

#[cfg(not(feature = "tokenizer-files"))]
impl FileVocabulary {
    fn read(_: &Path, _: u32) -> Result<Self, String> {
        Err("this build of Tollgate cannot read tokenizer files: build it with the feature tokenizer-files"
            .to_owned())
    }

    fn tokens(&self, _: &str) -> Option<u64> {
        None
    }
}

/// Cuts a text into parts. Prefers cuts before a space between two ASCII letters, because no token crosses them.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let part;
        (part, rest) = rest.split_at(cut(rest));
        (!part.is_empty()).then_some(part)
    })
}

/// The length of the first part.
fn cut(text: &str) -> usize {
    if text.len() <= PART_BYTES {
        return text.len();
    }
    let bytes = text.as_bytes();
    let is_letter = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphabetic);
    let between_words = (PART_BYTES / 2..PART_BYTES)
        .rev()
        .find(|&at| bytes[at] == b' ' && is_letter(at - 1) && is_letter(at + 1));
    between_words.unwrap_or_else(|| text.floor_char_boundary(PART_BYTES))
}

impl fmt::Debug for FileVocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileVocabulary").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Compares the numbers: each file is loaded once.
impl PartialEq for FileVocabulary {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for FileVocabulary {}
