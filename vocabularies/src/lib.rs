//! Counts tokens with OpenAI's vocabularies (`data/`, published with tiktoken under the MIT licence).
//!
//! `build.rs` computes the tables (`format.rs`), and the binary contains them as they are used: nothing is built or
//! copied at start, and pages that are not used do not take memory.
//!
//! A text is split into pieces with a regular expression, and byte-pair encoding of each piece gives its tokens.
//! The encoder takes the longest token that can follow the last one, and goes back if none can. It visits each
//! position of the text once, so its time is linear. The method is that of the crate bpe
//! (<https://github.com/github/rust-gems>).

mod encoder;
mod format;
mod pieces;
mod tables;

use pieces::{Pieces, Splitter};
use std::sync::LazyLock;
use tables::{Tables, tables};

/// A vocabulary: how texts are split into pieces, and the tokens.
#[derive(Debug)]
pub struct Vocabulary {
    splitter: LazyLock<Splitter>,
    tables: Tables,
}

static O200K_BASE: Vocabulary =
    Vocabulary { splitter: LazyLock::new(Splitter::o200k_base), tables: tables!("o200k_base") };
static CL100K_BASE: Vocabulary =
    Vocabulary { splitter: LazyLock::new(Splitter::cl100k_base), tables: tables!("cl100k_base") };

/// `o200k_base`, without special tokens.
pub fn o200k_base() -> &'static Vocabulary {
    &O200K_BASE
}

/// `cl100k_base`, without special tokens.
pub fn cl100k_base() -> &'static Vocabulary {
    &CL100K_BASE
}

impl Vocabulary {
    /// Splits a text into pieces, as tiktoken does. A token never spans two pieces.
    pub fn split<'t>(&self, text: &'t str) -> Pieces<'_, 't> {
        self.splitter.split(text)
    }

    /// The tokens of a piece. A piece that is a token is one token.
    pub fn count(&self, piece: &[u8]) -> usize {
        encoder::count(&self.tables, piece)
    }

    /// How many tokens there are.
    pub fn tokens(&self) -> usize {
        self.tables.len()
    }

    /// Whether the regular expression has been compiled. The first text compiles it, in some milliseconds.
    pub fn is_ready(&self) -> bool {
        LazyLock::get(&self.splitter).is_some()
    }
}
