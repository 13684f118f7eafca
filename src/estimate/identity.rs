//! Identifies a prompt and each prefix of its messages by keyed hashes, so that a later request can be recognised as
//! the continuation of an earlier one.
//!
//! A hash covers what the estimate reads: texts, sizes of images and the like. White space between JSON tokens,
//! identifiers of tool calls and `cache_control` do not change it. The key is random and lasts as long as the process.

use super::Role;
use super::count_cache::{HashedText, TextHash};
use super::keyed_hash::KeyedHash;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;

/// Number of prefixes that are kept, from the longest on. A conversation rarely grows by more messages at once.
const MAX_PREFIXES: usize = 64;

/// One or more messages at the beginning of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptPrefix {
    /// Keyed hash of the messages.
    pub hash: u64,
    /// Number of texts of the prompt up to the end of the prefix.
    texts: usize,
    /// Number of thoughts of earlier answers up to the end of the prefix.
    thoughts: usize,
    /// Number of references to content outside the request, up to the end of the prefix.
    pub(crate) unseen: u64,
    /// Number of tool calls up to the end of the prefix.
    calls: u64,
    /// Number of messages in the prefix.
    pub(crate) messages: u64,
    /// The author of the last message.
    role: Role,
}

/// The identity of a prompt, as far as its fields are read.
#[derive(Debug)]
pub(super) struct Identity {
    /// The sum of the hashes of all fields but the messages. The order of the fields does not matter.
    settings: u64,
    /// The name and the content of the current field of the settings; `None`: nothing was added from this field.
    field: Option<KeyedHash>,
    field_name: &'static str,
    messages: KeyedHash,
    /// Whether the current field holds the messages.
    is_in_messages: bool,
    /// Index of the first text of the messages.
    first_text: Option<usize>,
    /// The last prefixes, the longest one last.
    prefixes: VecDeque<PromptPrefix>,
    /// Keyed hash of the system messages at the beginning.
    system: u64,
    /// Whether all messages so far are system messages.
    is_system_only: bool,
    /// Whether two fields hold messages. Their texts are not contiguous then, and the prompt has no prefixes.
    is_ambiguous: bool,
}

impl Default for Identity {
    fn default() -> Self {
        Self {
            settings: 0,
            field: None,
            field_name: "",
            messages: KeyedHash::default(),
            is_in_messages: false,
            first_text: None,
            prefixes: VecDeque::new(),
            system: 0,
            is_system_only: true,
            is_ambiguous: false,
        }
    }
}

impl Identity {
    /// A field of the body begins. `text`: index of the next text.
    pub(super) fn begin_field(&mut self, name: &'static str, text: usize) {
        self.settings = self.settings();
        self.field = None;
        self.field_name = name;
        self.is_in_messages = matches!(name, "messages" | "contents" | "input");
        if self.is_in_messages {
            self.is_ambiguous |= self.first_text.is_some();
            self.first_text = Some(text);
        }
    }

    pub(super) fn add_number(&mut self, kind: IdentityPart, number: u64) {
        // One step is faster than two. Numbers have fewer than 56 bits, except for hashes, which look random.
        let number = number ^ (kind as u64) << 56;
        if self.is_in_messages {
            self.messages.add(number);
        } else {
            let name = self.field_name.as_bytes();
            self.field.get_or_insert_with(|| KeyedHash::of_text(name)).add(number);
        }
    }

    pub(super) fn add_text(&mut self, kind: IdentityPart, text: &HashedText<'_>) {
        let hash = text.hash.unwrap_or_else(|| TextHash::of(text.text.as_bytes()));
        self.add_number(kind, hash.0);
    }

    /// Ends a message.
    pub(super) fn end_message(&mut self, role: Role, so_far: PromptSizes) {
        self.add_number(IdentityPart::MessageEnd, role as u64);
        if !self.is_in_messages {
            return;
        }
        let hash = self.messages.value();
        self.is_system_only &= role == Role::System;
        if self.is_system_only {
            self.system = hash;
        }
        if self.prefixes.len() == MAX_PREFIXES {
            self.prefixes.pop_front();
        }
        let PromptSizes { texts, thoughts, unseen, calls, messages } = so_far;
        self.prefixes.push_back(PromptPrefix { hash, texts, thoughts, unseen, calls, messages, role });
    }

    /// The hash of the system messages at the beginning of the messages; 0 without one.
    pub(super) fn system(&self) -> u64 {
        self.system
    }

    /// The hash of the settings: of all fields but the messages.
    pub(super) fn settings(&self) -> u64 {
        self.field.as_ref().map_or(self.settings, |field| self.settings.wrapping_add(field.value()))
    }

    /// The prefixes, the longest one first.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = PromptPrefix> {
        self.prefixes.iter().rev().filter(|_| !self.is_ambiguous).copied()
    }

    /// Indices of the texts that belong to the messages.
    pub(super) fn message_texts(&self) -> Range<usize> {
        let last = self.prefixes.back().map_or(0, |prefix| prefix.texts);
        self.first_text.filter(|_| !self.is_ambiguous).map_or(0..0, |first| first..last.max(first))
    }

    /// The prefix with the answer that follows a prefix: with the next messages and calls of the model.
    fn answer_after(&self, prefix: &PromptPrefix) -> Option<&PromptPrefix> {
        let mut calls = prefix.calls;
        let is_answer = |next: &&PromptPrefix| {
            let is_call = next.calls > std::mem::replace(&mut calls, next.calls);
            is_call || next.role == Role::Assistant
        };
        self.prefixes.iter().skip_while(|other| *other != prefix).skip(1).take_while(is_answer).last()
    }

    /// The texts of a prefix whose tokens are known.
    pub(super) fn known_texts(&self, prefix: &PromptPrefix, tokens: u64) -> KnownTexts {
        let first = self.message_texts().start;
        let answer = self.answer_after(prefix);
        KnownTexts {
            texts: first..prefix.texts.max(first),
            tokens,
            echo: answer.map_or(0..0, |answer| prefix.texts..answer.texts),
            has_calls_last: answer.is_some_and(|answer| answer.calls > prefix.calls)
                && self.prefixes.back().is_some_and(|last| last.role != Role::User),
            echo_thoughts: answer.map_or(0..0, |answer| prefix.thoughts..answer.thoughts),
            echo_messages: answer.map_or(0..0, |answer| prefix.messages..answer.messages),
        }
    }
}

/// Numbers of parts of a prompt so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct PromptSizes {
    pub(super) texts: usize,
    pub(super) thoughts: usize,
    /// References to content outside the request.
    pub(super) unseen: u64,
    pub(super) calls: u64,
    pub(super) messages: u64,
}

/// A reference to an earlier answer, or to a part of it (Responses API).
#[derive(Debug)]
pub struct AnswerReference<'a> {
    /// The id of a response or of an item.
    pub(crate) id: Cow<'a, str>,
    pub(crate) kind: ReferenceKind,
    /// Number of messages before it.
    pub(crate) message: u64,
}

/// What a reference stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReferenceKind {
    /// A response with everything before it.
    Response,
    /// One item of a response.
    Item,
    /// Reasoning of a response. The request contains the item without its content.
    Reasoning,
}

/// What a number or text that is added to an identity means.
#[derive(Clone, Copy, Debug)]
pub(super) enum IdentityPart {
    Text,
    Tokens,
    MessageEnd,
    Call,
    Reasoning,
    Encrypted,
    Tools,
    ToolRequirement,
    Schema,
    Reasons,
    Image,
    Pages,
    Recording,
    FileName,
    Reference,
}

/// Texts of a prompt that need not be counted.
#[derive(Debug, Default)]
pub(super) struct KnownTexts {
    /// Their indices.
    pub(super) texts: Range<usize>,
    /// The sum of their tokens.
    pub(super) tokens: u64,
    /// Indices of the texts of the answer after them.
    pub(super) echo: Range<usize>,
    /// Whether the answer has tool calls, and the prompt ends with their results.
    pub(super) has_calls_last: bool,
    /// Indices of the thoughts of the answer after them.
    pub(super) echo_thoughts: Range<usize>,
    /// Indices of the messages of the answer after them.
    pub(super) echo_messages: Range<u64>,
}

#[cfg(test)]
mod tests;
