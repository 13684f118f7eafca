//! Chat messages. 3 tokens a message and 3 for the reply (OpenAI's cookbook); the terms of tool calls and
//! results were fitted to counts that the API reported.

use super::content::{Content, members};
use crate::estimate::{Prompt, PromptPart, Role};
use crate::json::{Expected, LooseText, Take, element, string, value};
use serde::de::{MapAccess, SeqAccess};
use std::borrow::Cow;

/// `messages`.
pub(super) struct Messages<'p, 'a>(pub(super) &'p mut Prompt<'a>);

const A_LIST: Expected = Expected("a list of messages");

impl<'a> Take<'a> for Messages<'_, 'a> {
    fn text(&mut self, _: Cow<'a, str>) -> Result<(), Expected> {
        Err(A_LIST)
    }

    fn number(&mut self, _: Option<u64>) -> Result<(), Expected> {
        Err(A_LIST)
    }

    fn boolean(&mut self, _: bool) -> Result<(), Expected> {
        Err(A_LIST)
    }

    fn object(&mut self) -> Result<(), Expected> {
        Err(A_LIST)
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let first_text = self.0.text_count();
        let mut message =
            Message { prompt: &mut *self.0, role: Cow::Borrowed(""), has_content: false, calls: 0 };
        let there_is = element(list, &mut message)?;
        if there_is {
            let Message { role, has_content, calls, .. } = message;
            finish(self.0, &role, has_content, calls, first_text);
        }
        Ok(there_is)
    }
}

struct Message<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    role: Cow<'a, str>,
    has_content: bool,
    calls: u64,
}

fn finish(prompt: &mut Prompt<'_>, role: &str, has_content: bool, calls: u64, first_text: usize) {
    prompt.end_tool_calls(calls, has_content);
    let kind = add_role(prompt, role);
    prompt.end_message(kind, first_text);
}

/// Every role that the API knows is one token.
pub(super) fn add_role(prompt: &mut Prompt<'_>, role: &str) -> Role {
    // The role of a function's result is free.
    prompt.add_tokens(PromptPart::Messages, if role == "function" { 0 } else { 1 + role.len() as u64 / 16 });
    match role {
        "system" | "developer" => Role::System,
        "tool" | "function" => Role::Tool,
        "assistant" => Role::Assistant,
        _ => Role::Other,
    }
}

impl<'a> Take<'a> for Message<'_, 'a> {
    const FIELDS: &'static [&'static str] = &[
        "role",
        "content",
        "name",
        "refusal",
        "reasoning_content",
        "reasoning",
        "function_call",
        "tool_calls",
    ];

    fn text(&mut self, _: Cow<'a, str>) -> Result<(), Expected> {
        Err(Expected("a message, which is an object"))
    }

    fn number(&mut self, _: Option<u64>) -> Result<(), Expected> {
        Err(Expected("a message, which is an object"))
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "role" => self.role = string(object)?,
            "content" => {
                let mut content = Content::of(self.prompt);
                value(object, &mut content)?;
                self.has_content = content.has_any;
            }
            "name" => {
                let name = string(object)?;
                if !name.is_empty() {
                    self.prompt.add_text(PromptPart::Messages, name, 1);
                    self.prompt.add_tokens(PromptPart::Overhead, 1);
                }
            }
            "refusal" => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.prompt.add_text(PromptPart::Messages, text.0, 1);
            }
            // Providers of open models name it one or the other way.
            "reasoning_content" | "reasoning" => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.prompt.add_reasoning(text.0);
            }
            "function_call" => {
                let mut call = Call { prompt: self.prompt, times_name: 1, arguments: None };
                value(object, &mut call)?;
                if call.arguments.is_some() {
                    self.prompt.add_tokens(PromptPart::Messages, 3);
                }
            }
            _ => {
                let mut calls = Calls { prompt: self.prompt, count: 0 };
                value(object, &mut calls)?;
                self.calls = calls.count;
            }
        }
        Ok(())
    }
}

/// `tool_calls`.
struct Calls<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    count: u64,
}

impl<'a> Take<'a> for Calls<'_, 'a> {
    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let there_is = element(list, &mut ToolCall(self.prompt))?;
        if there_is {
            self.count += 1;
        }
        Ok(there_is)
    }
}

struct ToolCall<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> Take<'a> for ToolCall<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["function", "custom"];

    fn field<M: MapAccess<'a>>(&mut self, _: &'static str, object: &mut M) -> Result<(), M::Error> {
        let mut call = Call { prompt: self.0, times_name: 2, arguments: None };
        value(object, &mut call)?;
        let arguments = call.arguments;
        self.0.add_tool_call(arguments.unwrap_or(0));
        Ok(())
    }
}

/// The name and the arguments of a call.
struct Call<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    times_name: u32,
    /// How many arguments; `None`: there is no call.
    arguments: Option<u64>,
}

impl<'a> Take<'a> for Call<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["name", "arguments", "input"];

    fn object(&mut self) -> Result<(), Expected> {
        self.arguments = Some(0);
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        let text = string(object)?;
        if name == "arguments" {
            self.arguments = Some(members(&text));
        }
        self.prompt.add_text(PromptPart::Messages, text, if name == "name" { self.times_name } else { 1 });
        Ok(())
    }
}
