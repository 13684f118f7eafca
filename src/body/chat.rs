//! Chat messages. Each message costs 3 tokens and the reply 3 (OpenAI's cookbook). The costs of tool calls and
//! results were fitted to counts reported by the API.

use super::content::{MessageContent, member_count};
use crate::estimate::{CallTexts, MessageCalls, Prompt, PromptPart, Role};
use crate::json::{Expected, JsonVisitor, LooseText, element, string, value};
use serde::de::{MapAccess, SeqAccess};
use std::borrow::Cow;

/// `messages` of a chat.
pub(super) struct ChatMessages<'p, 'a>(pub(super) &'p mut Prompt<'a>);

const MESSAGE_LIST: Expected = Expected("a list of messages");

impl<'a> JsonVisitor<'a> for ChatMessages<'_, 'a> {
    fn text(&mut self, _: Cow<'a, str>) -> Result<(), Expected> {
        Err(MESSAGE_LIST)
    }

    fn number(&mut self, _: Option<u64>) -> Result<(), Expected> {
        Err(MESSAGE_LIST)
    }

    fn boolean(&mut self, _: bool) -> Result<(), Expected> {
        Err(MESSAGE_LIST)
    }

    fn object(&mut self) -> Result<(), Expected> {
        Err(MESSAGE_LIST)
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let first_text = self.0.text_count();
        let mut message = ChatMessage {
            prompt: &mut *self.0,
            role: Cow::Borrowed(""),
            has_content: false,
            name: Cow::Borrowed(""),
            calls: 0,
            thinking: Thoughts::default(),
        };
        let is_some = element(list, &mut message)?;
        if is_some {
            let ChatMessage { role, has_content, name, calls, thinking, .. } = message;
            thinking.add_to(self.0);
            finish_name(self.0, &role, name);
            finish(self.0, &role, has_content, calls, first_text);
        }
        Ok(is_some)
    }
}

struct ChatMessage<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    role: Cow<'a, str>,
    has_content: bool,
    name: Cow<'a, str>,
    calls: u64,
    thinking: Thoughts<'a>,
}

/// The reasoning of a message of the assistant. Routers send it in several fields, which repeat its text.
#[derive(Default)]
struct Thoughts<'a> {
    text: Cow<'a, str>,
    /// The signed text. Routers do not pass other text of these fields on.
    signed: Cow<'a, str>,
    /// The longest encrypted reasoning.
    encrypted: Cow<'a, str>,
}

impl<'a> Thoughts<'a> {
    fn add_to(self, prompt: &mut Prompt<'a>) {
        prompt.add_reasoning(if self.text.is_empty() { self.signed } else { self.text });
        prompt.add_encrypted_reasoning(&self.encrypted);
    }
}

/// `reasoning_details` of OpenRouter and Vercel, and `thinking_blocks` of LiteLLM.
impl<'a> JsonVisitor<'a> for Thoughts<'a> {
    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let mut block = ThoughtBlock::default();
        let is_some = element(list, &mut block)?;
        let ThoughtBlock { text, has_signature, data } = block;
        if data.len() > self.encrypted.len() {
            self.encrypted = data;
        }
        if has_signature && self.signed.is_empty() {
            self.signed = text;
        } else if has_signature {
            self.signed.to_mut().push_str(&text);
        }
        Ok(is_some)
    }
}

#[derive(Default)]
struct ThoughtBlock<'a> {
    text: Cow<'a, str>,
    has_signature: bool,
    /// Encrypted reasoning.
    data: Cow<'a, str>,
}

impl<'a> JsonVisitor<'a> for ThoughtBlock<'a> {
    const FIELDS: &'static [&'static str] = &["text", "thinking", "signature", "data"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        let text = string(object)?;
        match name {
            "signature" => self.has_signature = !text.is_empty(),
            "data" => self.data = text,
            _ => self.text = text,
        }
        Ok(())
    }
}

/// Adds the name of a message's author.
fn finish_name<'a>(prompt: &mut Prompt<'a>, role: &str, name: Cow<'a, str>) {
    if role == "tool" {
        prompt.name_tool_result(name);
    } else if !name.is_empty() {
        prompt.add_text(PromptPart::Messages, name, 1);
        prompt.add_tokens(PromptPart::Overhead, 1);
    }
}

fn finish(prompt: &mut Prompt<'_>, role: &str, has_content: bool, calls: u64, first_text: usize) {
    let kind = add_role(prompt, role);
    if kind == Role::Tool {
        prompt.end_tool_result(first_text);
    } else {
        prompt.end_tool_calls(calls, has_content);
    }
    prompt.end_message(kind, first_text);
}

/// Adds the tokens of a role. Each role of the API is one token.
pub(super) fn add_role(prompt: &mut Prompt<'_>, role: &str) -> Role {
    // The role of a function result costs nothing.
    prompt.add_tokens(PromptPart::Messages, if role == "function" { 0 } else { 1 + role.len() as u64 / 16 });
    match role {
        "system" | "developer" => Role::System,
        "tool" | "function" => Role::Tool,
        "assistant" => Role::Assistant,
        "user" => Role::User,
        _ => Role::Other,
    }
}

impl<'a> JsonVisitor<'a> for ChatMessage<'_, 'a> {
    const FIELDS: &'static [&'static str] = &[
        "role",
        "content",
        "name",
        "refusal",
        "reasoning_content",
        "reasoning",
        "reasoning_details",
        "thinking_blocks",
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
                let mut content = MessageContent::of(self.prompt);
                value(object, &mut content)?;
                self.has_content = content.has_any;
            }
            "name" => self.name = string(object)?,
            "refusal" => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.prompt.add_text(PromptPart::Messages, text.0, 1);
            }
            // Providers of open models use either name.
            "reasoning_content" | "reasoning" => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                if text.0.len() > self.thinking.text.len() {
                    self.thinking.text = text.0;
                }
            }
            "reasoning_details" | "thinking_blocks" => value(object, &mut self.thinking)?,
            "function_call" => {
                let mut call = FunctionCall::default();
                value(object, &mut call)?;
                if call.is_present {
                    self.prompt.add_text(PromptPart::Messages, call.texts.name, 1);
                    self.prompt.add_text(PromptPart::Messages, call.texts.arguments, 1);
                    self.prompt.add_tokens(PromptPart::Messages, 3);
                }
            }
            _ => {
                let mut calls = ToolCalls { prompt: self.prompt, calls: MessageCalls::default() };
                value(object, &mut calls)?;
                self.calls = calls.calls.end(self.prompt);
            }
        }
        Ok(())
    }
}

/// `tool_calls`.
struct ToolCalls<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    calls: MessageCalls<'a>,
}

impl<'a> JsonVisitor<'a> for ToolCalls<'_, 'a> {
    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let mut call = ToolCall::default();
        let is_some = element(list, &mut call)?;
        let FunctionCall { texts, members, is_present } = call.0;
        if is_present {
            self.prompt.add_tool_call(members);
        }
        if is_some {
            self.calls.add(self.prompt, texts);
        }
        Ok(is_some)
    }
}

/// One of `tool_calls`.
#[derive(Default)]
struct ToolCall<'a>(FunctionCall<'a>);

impl<'a> JsonVisitor<'a> for ToolCall<'a> {
    const FIELDS: &'static [&'static str] = &["function", "custom"];

    fn field<M: MapAccess<'a>>(&mut self, _: &'static str, object: &mut M) -> Result<(), M::Error> {
        value(object, &mut self.0)
    }
}

/// The name and arguments of a call.
#[derive(Default)]
struct FunctionCall<'a> {
    texts: CallTexts<'a>,
    /// The number of arguments.
    members: u64,
    /// Whether the value is an object.
    is_present: bool,
}

impl<'a> JsonVisitor<'a> for FunctionCall<'a> {
    const FIELDS: &'static [&'static str] = &["name", "arguments", "input"];

    fn object(&mut self) -> Result<(), Expected> {
        self.is_present = true;
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        let text = string(object)?;
        match name {
            _ if text.is_empty() => {}
            "name" => self.texts.name = text,
            _ => {
                if name == "arguments" {
                    self.members = member_count(&text);
                }
                self.texts.arguments = text;
            }
        }
        Ok(())
    }
}
