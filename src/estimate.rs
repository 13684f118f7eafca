//! Estimates the prompt tokens of a request before it is forwarded.
//!
//! Nothing here does I/O. Readers of bodies fill a [`Prompt`] with the content that the model will read. A
//! [`Model`] holds the costs. A [`Calibration`] learns the errors of earlier estimates.

mod attachments;
mod calibration;
mod calls;
mod count_cache;
mod file;
mod identity;
mod images;
mod keyed_hash;
mod known;
pub(crate) mod media;
mod media_rules;
mod models;
mod names;
mod overhead;
mod prompt;
mod provider;
mod readers;
mod rules;
mod thinking;
mod tokenizer;
mod tools;
mod vocabulary;

pub(crate) use calibration::bounded;
pub use calibration::{Calibration, CalibrationSample, Correction, RequestKind};
pub(crate) use calls::{CallTexts, MessageCalls, add_call_arguments};
pub use file::FileVocabulary;
pub use identity::{AnswerReference, PromptPrefix, ReferenceKind};
pub use images::ImageDetail;
pub(crate) use images::ImageUrlKey;
pub(crate) use keyed_hash::KeyedHash;
pub(crate) use known::{KnownModels, ModelRank, PUBLIC_MODELS};
pub use models::Model;
pub use prompt::{Prompt, Role};
pub use provider::Provider;
pub use rules::Models;
pub use tokenizer::{Tokenizer, warm};
pub use vocabulary::Encoding;

/// The part of a request that a token belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptPart {
    /// Contents of messages or inputs.
    Messages,
    /// Definitions of tools and functions.
    Tools,
    /// The JSON schema that the answer has to match.
    Schema,
    /// Images, and pages of documents, which models read as images.
    Images,
    /// Tokens that the API adds.
    Overhead,
}

impl PromptPart {
    /// All parts, in display order.
    pub const ALL: [Self; 5] = [Self::Messages, Self::Tools, Self::Schema, Self::Images, Self::Overhead];

    /// The name in the output of `tollgate count`.
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

/// What the number of an estimate comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EstimateSource {
    /// The built-in rules and tables alone.
    #[default]
    Rules,
    /// The rules, corrected by answers to requests of the same model and kind.
    Calibration,
    /// The rules, corrected by answers to requests with the same tools, settings and system prompt.
    Setup,
    /// The reported tokens of an earlier request of the same conversation, and the rules for the new messages.
    Conversation,
}

impl EstimateSource {
    /// All sources, in display order.
    pub const ALL: [Self; 4] = [Self::Rules, Self::Calibration, Self::Setup, Self::Conversation];

    /// The name in metrics, log lines and the output of `tollgate count`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rules => "rules",
            Self::Calibration => "calibration",
            Self::Setup => "setup",
            Self::Conversation => "conversation",
        }
    }
}

/// The estimated prompt tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptEstimate {
    parts: [u64; PromptPart::ALL.len()],
    /// Whether there was too much text to tokenise. In this case every two bytes count as a token.
    pub is_rough: bool,
    /// Number of references to content outside the request. The estimate counts no tokens for this content.
    pub unseen: u64,
    /// Whether the provider adds a part of the prompt, or stores a part of it elsewhere. Calibration must not learn
    /// from this request.
    pub is_partial: bool,
    /// The kind of request, for calibration.
    pub kind: RequestKind,
    /// Tokens of the texts of all messages.
    pub message_texts: u64,
    /// Of these, the tokens of the answer after a known prefix. 0 if the count of texts is exact.
    pub echo: u64,
    /// Tokens of the reasoning of this answer, as far as the model reads it again.
    pub echo_thinking: u64,
    /// Whether the model reads all reasoning of this answer again, although the request does not contain it.
    pub recalls_reasoning: bool,
    /// Whether the model reads reasoning before the last message of the user, if the request refers to it by its id.
    pub reads_references: bool,
    /// Tokens of the instructions and of other texts that are not part of the conversation.
    pub settings_texts: u64,
    /// Whether the model is in a built-in table or in a rule of the config.
    pub is_known_model: bool,
}

impl PromptEstimate {
    /// The sum of all parts.
    pub fn tokens(&self) -> u64 {
        self.parts.iter().sum()
    }

    /// Whether the prompt has content, apart from tokens that the API adds.
    pub fn has_content(&self) -> bool {
        self.tokens() > self.of(PromptPart::Overhead)
    }

    /// The tokens of one part.
    pub fn of(&self, part: PromptPart) -> u64 {
        self.parts[part as usize]
    }
}

#[cfg(test)]
mod tests;
