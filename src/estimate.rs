//! The prompt tokens of a request body, counted before it is forwarded.
//!
//! Pure: texts in, numbers out.

mod known;
mod tokenizer;

use std::borrow::Cow;

pub use tokenizer::{Encoding, Tokenizer, warm};

/// So much text is counted where it arrives.
const QUICK_TEXT: usize = 2 * 1024;
/// Texts with longer stretches without a space are counted elsewhere.
const LONGEST_QUICK_RUN: usize = 256;
/// More text than this is not tokenised: two bytes a token, which no language exceeds for long.
const MOST_TEXT: usize = 4 * 1024 * 1024;

/// Which part of a request a token belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What messages or inputs say.
    Messages,
    /// Definitions of tools and functions.
    Tools,
    /// A schema for the answer.
    Schema,
    /// Images.
    Images,
    /// What the API adds of its own.
    Overhead,
}

impl Part {
    /// All parts, in the order in which they are shown.
    pub const ALL: [Self; 5] = [Self::Messages, Self::Tools, Self::Schema, Self::Images, Self::Overhead];

    /// Its name in the output of `count`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Tools => "tools",
            Self::Schema => "schema",
            Self::Images => "images",
            Self::Overhead => "overhead",
        }
    }
}

/// What a request asks the model to read: texts to be counted, and tokens that are known.
#[derive(Debug, Default)]
pub struct Prompt<'a> {
    texts: Vec<(Part, Cow<'a, str>, u32)>,
    tokens: [u64; Part::ALL.len()],
    /// How many prompts of a list are completed, each with its own answers.
    pub prompts: u64,
}

/// Prompt tokens by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptEstimate {
    parts: [u64; Part::ALL.len()],
    /// There was too much text to count it exactly.
    pub is_rough: bool,
}

impl PromptEstimate {
    /// All prompt tokens.
    pub fn tokens(&self) -> u64 {
        self.parts.iter().sum()
    }

    /// Those of one part.
    pub fn of(&self, part: Part) -> u64 {
        self.parts[part as usize]
    }
}

impl<'a> Prompt<'a> {
    /// Adds a text that is to be counted, so many times.
    pub fn count(&mut self, part: Part, text: Cow<'a, str>, times: u32) {
        if !text.is_empty() {
            self.texts.push((part, text, times));
        }
    }

    /// Adds tokens that are known.
    pub fn add(&mut self, part: Part, tokens: u64) {
        self.tokens[part as usize] += tokens;
    }

    /// Counts everything, if that takes no more than about 50 microseconds: most of it was counted lately,
    /// and what was not is little and ordinary.
    pub fn estimate_if_quick(&self, tokenizer: &Tokenizer) -> Option<PromptEstimate> {
        let (mut parts, mut anew) = (self.tokens, 0);
        for (part, text, times) in &self.texts {
            let tokens = if let Some(tokens) = tokenizer.count_if_known(text) {
                tokens
            } else {
                anew += text.len();
                if anew > QUICK_TEXT || longest_run(text) > LONGEST_QUICK_RUN {
                    return None;
                }
                tokenizer.count(text)
            };
            parts[*part as usize] += tokens * u64::from(*times);
        }
        Some(PromptEstimate { parts, is_rough: false })
    }

    /// Counts everything with the model's tokenizer. Takes time: about 30 microseconds for 1 KiB of text.
    pub fn estimate(&self, tokenizer: &Tokenizer) -> PromptEstimate {
        let bytes: usize = self.texts.iter().map(|(_, text, _)| text.len()).sum();
        let is_rough = bytes > MOST_TEXT;
        let mut parts = self.tokens;
        for (part, text, times) in &self.texts {
            let tokens = if is_rough { text.len() as u64 / 2 } else { tokenizer.count(text) };
            parts[*part as usize] += tokens * u64::from(*times);
        }
        PromptEstimate { parts, is_rough }
    }
}

/// The longest stretch of a text without a space. Words are quick to count; one long run of dashes is
/// the worst that the tokenizer knows, 40 times slower byte for byte.
fn longest_run(text: &str) -> usize {
    let mut last = 0;
    let spaces = memchr::memchr_iter(b' ', text.as_bytes()).chain([text.len()]);
    spaces.into_iter().map(|at| at - std::mem::replace(&mut last, at)).max().unwrap_or(0)
}
