//! Filling: tool calls and their results.

use super::super::PromptPart;
use super::super::identity::IdentityPart;
use super::super::readers::Readers;
use super::super::tools::separators;
use super::Prompt;
use std::borrow::Cow;

/// The results that follow the calls of one message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum JoinedResults {
    /// There was one call, or none.
    #[default]
    No,
    /// There were several calls, and no result yet.
    None,
    /// The last result, and whether a line break after it is a token of its own.
    Some { ends_in_word: bool },
}

/// Calls in items that follow each other (Responses API).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CallItems {
    count: u64,
    /// Whether the first one has an id: the provider has stored it.
    is_stored: bool,
}

impl<'a> Prompt<'a> {
    /// Adds a tool call with this number of arguments.
    pub(crate) fn add_tool_call(&mut self, arguments: u64) {
        self.identity.add_number(IdentityPart::Call, arguments);
        self.counts.calls += 1;
        self.counts.arguments += arguments;
    }

    /// Number of tool calls so far.
    pub(crate) fn call_count(&self) -> u64 {
        self.counts.calls
    }

    /// Records how many tool calls a message had, and whether it had text too.
    pub(crate) fn end_tool_calls(&mut self, calls: u64, has_text: bool) {
        self.counts.parallel_calls += u64::from(calls > 1);
        self.counts.further_calls += calls.saturating_sub(1);
        self.counts.call_messages += u64::from(calls > 0);
        self.counts.calls_with_text += u64::from(calls > 0 && has_text);
        self.results = if calls > 1 { JoinedResults::None } else { JoinedResults::No };
    }

    /// Adds the name of the tool to the result of a call. The models that join calls know it from the call.
    pub(crate) fn name_tool_result(&mut self, name: Cow<'a, str>) {
        if !name.is_empty() {
            self.counts.named_results += 1;
            self.add_text_for(Readers::AS_SENT, PromptPart::Messages, name, 1);
        }
    }

    /// Ends the result of a call in a message of its own (chat API). Its texts begin at the index `first_text`.
    pub(crate) fn end_tool_result(&mut self, first_text: usize) {
        if self.results == JoinedResults::No {
            return;
        }
        if self.results == (JoinedResults::Some { ends_in_word: true }) {
            self.counts.result_breaks += 1;
        }
        let result = self.texts.get(first_text..).and_then(<[_]>::last).map_or("", |last| &*last.text.text);
        if let Some(separators) = separators(result) {
            self.counts.result_spaces += separators + 1;
        }
        self.results = JoinedResults::Some { ends_in_word: result.ends_with(char::is_alphanumeric) };
    }

    /// Records that an item is a call (Responses API), and whether the provider has stored it.
    pub(crate) fn end_call_item(&mut self, is_stored: bool) {
        self.call_items.count += 1;
        match self.call_items.count {
            1 => {
                self.call_items.is_stored = is_stored;
                self.counts.stored_calls += u64::from(is_stored);
            }
            2 => {
                self.counts.parallel_calls += 1;
                self.counts.further_calls += 1;
                self.counts.stored_calls -= u64::from(self.call_items.is_stored);
            }
            _ => self.counts.further_calls += 1,
        }
    }

    /// Records that an item is not a call (Responses API).
    pub(crate) fn end_other_item(&mut self) {
        self.call_items = CallItems::default();
    }
}
