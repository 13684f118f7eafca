//! The governed fields of a body: the fields that determine the permissions and the costs of a request.

use super::edit::{Span, StreamOptions};
use super::inputs::Inputs;
use super::spelling::position;
use super::{Body, BodyFault, anthropic, chat, gemini, offset, responses};
use crate::api::Api;
use crate::estimate::{Prompt, PromptPart, ReferenceKind};
use crate::json::{
    Expected, JsonVisitor, LooseText, Text, Visit, raw, raw_unless_null, string, value, whole_number,
};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

const MAX_COMPLETION_BOUND: u64 = (1 << 31) - 1;
const MAX_CHOICES: u64 = 128;

/// The governed fields of an API. Each may occur in a body only once and only in this spelling, because other
/// parsers ignore the case of names, and use the last of two equal names.
fn governed(api: Api) -> &'static [&'static str] {
    // This function is longer than a screen because it is a table with one name per line.
    match api {
        Api::Chat | Api::Completions | Api::Embeddings => &[
            "model",
            "stream",
            "stream_options",
            "max_tokens",
            "max_completion_tokens",
            "max_output_tokens",
            "n",
            "best_of",
            "messages",
            "prompt",
            "suffix",
            "input",
            "tools",
            "functions",
            "tool_choice",
            "parallel_tool_calls",
            "function_call",
            "response_format",
            "thinking",
            "reasoning",
            "reasoning_effort",
        ],
        Api::Responses => &[
            "model",
            "stream",
            "max_output_tokens",
            "instructions",
            "input",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "text",
            "reasoning",
            "previous_response_id",
            "conversation",
            "prompt",
        ],
        Api::Messages => &[
            "model",
            "stream",
            "max_tokens",
            "system",
            "messages",
            "tools",
            "tool_choice",
            "output_format",
            "output_config",
            "thinking",
            "mcp_servers",
        ],
        // Google's servers accept both spellings.
        Api::Gemini => &[
            "model",
            "contents",
            "systemInstruction",
            "system_instruction",
            "tools",
            "generationConfig",
            "generation_config",
            "cachedContent",
            "cached_content",
        ],
    }
}

/// The state of reading one body.
pub(super) struct BodyReader<'a> {
    api: Api,
    text: &'a str,
    pub(super) body: Body<'a>,
    /// The governed field that is being read; empty if the reader is not inside a governed field.
    pub(super) field: &'static str,
    pub(super) fault: Option<BodyFault>,
}

impl<'a> BodyReader<'a> {
    pub(super) fn of(api: Api, text: &'a str) -> Self {
        let body = Body { prompt: Prompt::of(api), ..Body::default() };
        Self { api, text, body, field: "", fault: None }
    }
}

pub(super) struct TopLevel<'r, 'a>(pub(super) &'r mut BodyReader<'a>);

impl<'a> DeserializeSeed<'a> for TopLevel<'_, 'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for TopLevel<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        let names = governed(self.0.api);
        let mut seen = [false; 32];
        while let Some(Text(key)) = map.next_key()? {
            let Some(field) = position(names, &key) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let name = names[field];
            self.0.field = name;
            // Camel case and snake case of a name are one field.
            let first = match self.0.api {
                Api::Gemini => names.iter().position(|other| is_same_field(other, name)).unwrap_or(field),
                _ => field,
            };
            if seen[first] || key != name {
                let how = if seen[first] { "twice" } else { "in another case" };
                self.0.fault = Some(BodyFault::Invalid(format!("has the field '{name}' {how}")));
            } else {
                seen[first] = true;
                self.0.read_field(name, &mut map)?;
            }
            if self.0.fault.is_some() {
                return Err(A::Error::custom("see `fault`"));
            }
            self.0.field = "";
        }
        Ok(())
    }
}

/// Whether two names differ at most in case and underscores.
fn is_same_field(one: &'static str, other: &'static str) -> bool {
    let letters = |name: &'static str| name.bytes().filter(|&b| b != b'_').map(|b| b.to_ascii_lowercase());
    letters(one).eq(letters(other))
}

impl<'a> BodyReader<'a> {
    fn read_field<A: MapAccess<'a>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        let prompt = &mut self.body.prompt;
        prompt.begin_field(name);
        match (self.api, name) {
            (Api::Messages, "messages") => value(map, &mut anthropic::AnthropicMessages::of(prompt)),
            (Api::Messages, "system") => anthropic::system(prompt, map),
            (_, "messages") => value(map, &mut chat::ChatMessages(prompt)),
            (Api::Responses, "input") => value(map, &mut responses::ResponsesInput(prompt)),
            (Api::Responses, "instructions") => {
                let mut text = LooseText::default();
                value(map, &mut text)?;
                responses::instructions(prompt, text.0);
                Ok(())
            }
            (_, "reasoning_effort") => {
                let effort = string(map)?;
                if matches!(&*effort, "none" | "minimal" | "low" | "medium") {
                    prompt.default_to_no_reasoning();
                }
                Ok(())
            }
            (_, "mcp_servers") => value(map, &mut McpServers(prompt)),
            (Api::Responses, "previous_response_id") => {
                let id = string(map)?;
                if !id.is_empty() {
                    prompt.refer_to_answer(ReferenceKind::Response, id);
                }
                Ok(())
            }
            (Api::Responses, "prompt" | "conversation")
            | (Api::Gemini, "cachedContent" | "cached_content") => {
                if let Some(reference) = raw_unless_null(map)? {
                    prompt.identify(reference);
                    prompt.unseen += 1;
                }
                Ok(())
            }
            (_, "prompt" | "input") => value(map, &mut Inputs::of(prompt)),
            (_, "suffix") => {
                let mut text = LooseText::default();
                value(map, &mut text)?;
                prompt.add_text(PromptPart::Messages, text.0, 1);
                Ok(())
            }
            (_, "contents") => value(map, &mut gemini::GeminiContents(prompt)),
            (_, "systemInstruction" | "system_instruction") => gemini::system(prompt, map),
            (_, "tools" | "functions") => {
                prompt.add_tools(raw(map)?);
                Ok(())
            }
            (_, "parallel_tool_calls") => value(map, &mut ParallelCalls(prompt)),
            (Api::Messages, "tool_choice") => value(map, &mut AnthropicToolChoice(prompt)),
            (_, "tool_choice" | "function_call") => value(map, &mut ToolChoice(prompt)),
            (_, "thinking") => value(map, &mut Thinking(prompt)),
            (_, "reasoning") => value(map, &mut Reasoning(prompt)),
            (_, "response_format" | "text" | "output_format" | "output_config") => {
                let mut format = ResponseFormat::default();
                value(map, &mut format)?;
                format.add_to(prompt);
                Ok(())
            }
            _ => {
                self.read_value(name, raw(map)?);
                Ok(())
            }
        }
    }

    /// Reads a field whose value is parsed as a whole, and records where the bounds of the completion are.
    fn read_value(&mut self, name: &'static str, raw: &'a str) {
        if name == "model" {
            self.body.model_at = Some(Span::of(self.text, raw));
        }
        if matches!(name, "generationConfig" | "generation_config") && raw == "null" {
            self.body.bounds.null_config = Some(Span::of(self.text, raw));
        }
        if raw != "null" || name == "stream_options" {
            self.read_json(name, raw);
        }
        // A null is replaced when the bound is lowered.
        let is_bound = matches!(name, "max_tokens" | "max_completion_tokens" | "max_output_tokens");
        if is_bound && (name == "max_output_tokens") == (self.api == Api::Responses) {
            let at = Span::of(self.text, raw);
            let bounds = &mut self.body.bounds;
            match (self.api, name, raw) {
                (Api::Chat, "max_tokens", "null") => bounds.null_max_tokens = Some(at),
                _ => bounds.existing.push(at),
            }
        }
    }

    fn read_json(&mut self, name: &'static str, raw: &'a str) {
        let accepts_zero = self.api == Api::Completions && name == "max_tokens";
        let read = match name {
            "model" => serde_json::from_str(raw)
                .map(|model: Text| self.body.model = Some(model.0))
                .map_err(|_| "a string"),
            "stream" => raw.parse().map(|streams| self.body.streams = streams).map_err(|_| "true or false"),
            "max_tokens" | "max_completion_tokens" | "max_output_tokens" => {
                let bound = bounded(raw, u64::from(!accepts_zero), MAX_COMPLETION_BOUND);
                self.body.max_tokens = self.body.max_tokens.max(bound);
                bound.map(drop).ok_or(if accepts_zero { ZERO_UP_TO_MAX } else { UP_TO_MAX })
            }
            "n" | "best_of" => {
                let choices = bounded(raw, 1, MAX_CHOICES);
                self.body.choices = self.body.choices.max(choices.unwrap_or(0));
                choices.map(drop).ok_or(UP_TO_CHOICES)
            }
            "stream_options" => StreamOptions::read(raw, offset(self.text, raw))
                .map(|options| self.body.stream_options = Some(options)),
            _ => self.generation_config(raw),
        };
        if let Err(expected) = read {
            self.fault.get_or_insert(BodyFault::Value { param: name, expected });
        }
    }

    /// Reads Gemini's `generationConfig`.
    fn generation_config(&mut self, raw: &'a str) -> Result<(), &'static str> {
        let mut config = GenerationConfig::default();
        if !raw.starts_with('{')
            || Visit(&mut config).deserialize(&mut serde_json::Deserializer::from_str(raw)).is_err()
        {
            return Err("an object without fields twice or in another case");
        }
        let GenerationConfig { max_tokens, choices, format } = config;
        let is_empty = raw[1..raw.len() - 1].trim().is_empty();
        self.body.bounds.config = Some((offset(self.text, raw) + 1, is_empty));
        if let Some(max_tokens) = max_tokens {
            self.body.bounds.existing.push(Span::of(self.text, max_tokens));
            if max_tokens != "null" {
                let Some(tokens) = bounded(max_tokens, 1, MAX_COMPLETION_BOUND) else {
                    self.fault = Some(BodyFault::Value { param: "maxOutputTokens", expected: UP_TO_MAX });
                    return Ok(());
                };
                self.body.max_tokens = Some(tokens);
            }
        }
        if let Some(choices) = choices.filter(|choices| *choices != "null") {
            let Some(choices) = bounded(choices, 1, MAX_CHOICES) else {
                self.fault = Some(BodyFault::Value { param: "candidateCount", expected: UP_TO_CHOICES });
                return Ok(());
            };
            self.body.choices = choices;
        }
        format.add_to(&mut self.body.prompt);
        Ok(())
    }
}

const UP_TO_MAX: &str = "a whole number from 1 to 2147483647";
const ZERO_UP_TO_MAX: &str = "a whole number from 0 to 2147483647";
const UP_TO_CHOICES: &str = "a whole number from 1 to 128";

/// Reads a whole number within bounds from JSON text.
fn bounded(raw: &str, min: u64, max: u64) -> Option<u64> {
    whole_number(raw).filter(|n| (min..=max).contains(n))
}

/// `tool_choice`, or the deprecated `function_call`.
struct ToolChoice<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for ToolChoice<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["function", "name"];

    fn text(&mut self, word: Cow<'a, str>) -> Result<(), Expected> {
        match &*word {
            "none" => self.0.forbid_tools(),
            "required" => self.0.require_tools(),
            _ => {}
        }
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        if name == "function" {
            return value(object, self);
        }
        let name = string(object)?;
        if !name.is_empty() {
            self.0.require_tool_named(name);
        }
        Ok(())
    }
}

/// `parallel_tool_calls`.
struct ParallelCalls<'p, 'a>(&'p mut Prompt<'a>);

impl JsonVisitor<'_> for ParallelCalls<'_, '_> {
    fn boolean(&mut self, are_allowed: bool) -> Result<(), Expected> {
        if !are_allowed {
            self.0.forbid_parallel_calls();
        }
        Ok(())
    }
}

/// Anthropic's `tool_choice`: `auto`, `any`, `none`, or a `tool` and its name.
struct AnthropicToolChoice<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for AnthropicToolChoice<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["type", "name", "disable_parallel_tool_use"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        if name == "disable_parallel_tool_use" {
            if raw(object)? == "true" {
                self.0.forbid_parallel_calls();
            }
            return Ok(());
        }
        let text = string(object)?;
        match (name, &*text) {
            (_, "") => {}
            ("name", _) => self.0.require_tool_named(text),
            (_, "any") => self.0.require_tools(),
            (_, "none") => self.0.forbid_tools(),
            _ => {}
        }
        Ok(())
    }
}

/// `mcp_servers`: the gateway cannot see the tools of these servers.
struct McpServers<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for McpServers<'_, 'a> {
    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let server = list.next_element::<&'a serde_json::value::RawValue>()?;
        if let Some(server) = server {
            self.0.identify(server.get());
            self.0.unseen += 1;
        }
        Ok(server.is_some())
    }
}

/// `thinking`: `enabled`, `adaptive` or `disabled`.
struct Thinking<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for Thinking<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["type"];

    fn field<M: MapAccess<'a>>(&mut self, _: &'static str, object: &mut M) -> Result<(), M::Error> {
        let kind = string(object)?;
        // With `adaptive` the model decides; the provider adds nothing to the prompt.
        match &*kind {
            "enabled" => self.0.set_reasoning(true),
            "disabled" | "adaptive" => self.0.set_reasoning(false),
            _ => {}
        }
        Ok(())
    }
}

/// `reasoning`: a field of OpenAI, and the form in which resellers offer Anthropic's `thinking`.
struct Reasoning<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for Reasoning<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["enabled", "effort", "max_tokens", "mode"];

    fn boolean(&mut self, enabled: bool) -> Result<(), Expected> {
        self.0.set_reasoning(enabled);
        Ok(())
    }

    fn number(&mut self, _: Option<u64>) -> Result<(), Expected> {
        self.0.set_reasoning(true);
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        if matches!(name, "enabled" | "max_tokens") {
            return value(object, self);
        }
        match (name, &*string(object)?) {
            // Several models work on the request, and the prompt is charged several times.
            ("mode", "pro") => {
                self.0.identify("pro");
                self.0.unseen += 1;
            }
            ("effort", "none" | "minimal") => self.0.set_reasoning(false),
            ("effort", "low" | "medium" | "high" | "xhigh") => self.0.set_reasoning(true),
            _ => {}
        }
        Ok(())
    }
}

/// The format of the answer: a schema and its name, at any depth.
#[derive(Default)]
struct ResponseFormat<'a> {
    name: Cow<'a, str>,
    description: Cow<'a, str>,
    schema: Option<&'a str>,
}

impl<'a> JsonVisitor<'a> for ResponseFormat<'a> {
    const FIELDS: &'static [&'static str] = &["format", "json_schema", "name", "description", "schema"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "name" => set_unless_empty(&mut self.name, string(object)?),
            "description" => set_unless_empty(&mut self.description, string(object)?),
            "schema" => self.schema = raw_unless_null(object)?.or(self.schema),
            _ => value(object, self)?,
        }
        Ok(())
    }
}

fn set_unless_empty<'a>(field: &mut Cow<'a, str>, text: Cow<'a, str>) {
    if !text.is_empty() {
        *field = text;
    }
}

impl<'a> ResponseFormat<'a> {
    fn add_to(self, prompt: &mut Prompt<'a>) {
        if let Some(schema) = self.schema {
            prompt.set_answer_schema(self.name, self.description, schema);
        }
    }
}

/// Bounds and formats in Gemini's `generationConfig`.
#[derive(Default)]
struct GenerationConfig<'a> {
    max_tokens: Option<&'a str>,
    choices: Option<&'a str>,
    format: ResponseFormat<'a>,
}

impl<'a> JsonVisitor<'a> for GenerationConfig<'a> {
    const FIELDS: &'static [&'static str] = &[
        "maxOutputTokens",
        "max_output_tokens",
        "candidateCount",
        "candidate_count",
        "responseSchema",
        "response_schema",
        "responseJsonSchema",
        "response_json_schema",
    ];

    fn other_field<M: MapAccess<'a>>(&mut self, name: Cow<'a, str>, object: &mut M) -> Result<(), M::Error> {
        if position(Self::FIELDS, &name).is_some() {
            return Err(M::Error::custom("a field in another case"));
        }
        object.next_value::<IgnoredAny>().map(drop)
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        let value = Some(raw(object)?);
        let is_duplicate = match name {
            "maxOutputTokens" | "max_output_tokens" => {
                std::mem::replace(&mut self.max_tokens, value).is_some()
            }
            "candidateCount" | "candidate_count" => std::mem::replace(&mut self.choices, value).is_some(),
            _ => {
                self.format.schema = value.filter(|schema| *schema != "null").or(self.format.schema);
                false
            }
        };
        if is_duplicate { Err(M::Error::custom("duplicate field")) } else { Ok(()) }
    }
}
