//! Tool calls of earlier answers, in the forms in which models read them.
//!
//! Most models read each call by itself. OpenAI's chat API joins several calls of one message into one call of
//! `multi_tool_use.parallel`, whose arguments are JSON, and joins their results into one message, one in each line. In
//! the Responses API the calls stay apart. In both, arguments have no white space between their tokens. OpenAI's models
//! with `cl100k_base` read calls as they were sent.

use super::PromptPart;
use super::prompt::Prompt;
use super::readers::Readers;
use super::tools::compact;
use std::borrow::Cow;

/// A call in a message of the assistant.
#[derive(Debug, Default)]
pub(crate) struct CallTexts<'a> {
    pub(crate) name: Cow<'a, str>,
    pub(crate) arguments: Cow<'a, str>,
}

impl<'a> CallTexts<'a> {
    /// Adds the call by itself. Its name is there twice: in the call and in the result.
    fn add_to(self, prompt: &mut Prompt<'a>, readers: Readers) {
        prompt.add_text_for(readers, PromptPart::Messages, self.name, 2);
        add_arguments(prompt, readers, self.arguments);
    }

    /// Adds the call to the joined calls of its message.
    fn join(&self, joined: &mut String) {
        joined.push_str(if joined.is_empty() { r#"{"tool_uses":["# } else { "," });
        for part in [r#"{"recipient_name":"functions."#, &self.name, r#"","parameters":"#] {
            joined.push_str(part);
        }
        if is_compact(&self.arguments) {
            joined.push_str(&self.arguments);
        } else {
            compact(&self.arguments, &[], joined);
        }
        joined.push('}');
    }
}

/// Adds the arguments of a call as JSON. OpenAI's models read them without white space.
fn add_arguments<'a>(prompt: &mut Prompt<'a>, readers: Readers, json: Cow<'a, str>) {
    if is_compact(&json) {
        return prompt.add_text_for(readers, PromptPart::Messages, json, 1);
    }
    let mut without_space = String::with_capacity(json.len());
    compact(&json, &[], &mut without_space);
    prompt.add_text_for(Readers::AS_SENT, PromptPart::Messages, json, 1);
    let others = readers.without(Readers::AS_SENT);
    prompt.add_rendered(others, PromptPart::Messages, without_space);
}

/// Whether a text is not JSON, or has no white space between its tokens.
fn is_compact(text: &str) -> bool {
    if !text.starts_with(['{', '[']) {
        return true;
    }
    let mut in_string = false;
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => in_string = !in_string,
            b'\\' if in_string => drop(bytes.next()),
            _ if !in_string && byte.is_ascii_whitespace() => return false,
            _ => {}
        }
    }
    true
}

/// The calls of one message, as far as they are read.
#[derive(Debug, Default)]
pub(crate) struct MessageCalls<'a> {
    count: u64,
    /// The only call so far.
    first: Option<CallTexts<'a>>,
    /// The calls as one call; empty if there are less than two.
    joined: String,
}

impl<'a> MessageCalls<'a> {
    /// Adds the next call.
    pub(crate) fn add(&mut self, prompt: &mut Prompt<'a>, call: CallTexts<'a>) {
        self.count += 1;
        if self.count == 1 {
            self.first = Some(call);
            return;
        }
        let apart = Readers::ALL.without(Readers::JOINED);
        for call in self.first.take().into_iter().chain([call]) {
            call.join(&mut self.joined);
            call.add_to(prompt, apart);
        }
    }

    /// Ends the message. Returns the number of its calls.
    pub(crate) fn end(self, prompt: &mut Prompt<'a>) -> u64 {
        if let Some(call) = self.first {
            call.add_to(prompt, Readers::ALL);
        } else if !self.joined.is_empty() {
            prompt.add_rendered(Readers::JOINED, PromptPart::Messages, self.joined + "]}");
        }
        self.count
    }
}

/// Adds a call that is an item of its own (Responses API).
pub(crate) fn add_call_arguments<'a>(prompt: &mut Prompt<'a>, json: Cow<'a, str>) {
    add_arguments(prompt, Readers::ALL, json);
}

#[cfg(test)]
mod tests;
