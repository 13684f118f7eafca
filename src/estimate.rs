//! The prompt tokens of a request body, counted before it is forwarded.
//!
//! Pure: texts and sizes in, numbers out. Readers of bodies fill a [`Prompt`] with what the model will
//! read; a [`Model`] knows what each of that costs; [`Calibration`] learns how far off that was.

mod calibration;
mod file;
mod images;
mod known;
pub mod media;
mod models;
mod rules;
mod tokenizer;
mod tools;
mod vocabulary;

use crate::api::Api;
use std::borrow::Cow;

pub use calibration::{Calibration, CalibrationSample, Correction, RequestKind};
pub use file::FileVocabulary;
pub use images::ImageDetail;
use models::Choice;
pub use models::Model;
pub use rules::Models;
pub use tokenizer::{Encoding, Tokenizer, warm};

/// Texts with longer stretches without a space are counted elsewhere.
const LONGEST_QUICK_RUN: usize = 256;
/// More text than this is not tokenised: two bytes a token, which no language exceeds for long.
const MOST_TEXT: usize = 4 * 1024 * 1024;
/// Texts beyond so many are not kept apart, but taken at two bytes a token: a list of millions of
/// tiny texts would take many times the memory of its body.
const MOST_TEXTS: usize = 1 << 17;

/// Which part of a request a token belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptPart {
    /// What messages or inputs say.
    Messages,
    /// Definitions of tools and functions.
    Tools,
    /// A schema for the answer.
    Schema,
    /// Images, and pages of documents, which models read as images.
    Images,
    /// What the API adds of its own.
    Overhead,
}

impl PromptPart {
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

/// Who says a message, as far as that matters to its cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Instructions.
    System,
    /// What the model said.
    Assistant,
    /// Anybody else.
    #[default]
    Other,
    /// The result of a tool call.
    Tool,
}

/// What a request asks the model to read: texts to be counted, and tokens that are known.
#[derive(Debug, Default)]
pub struct Prompt<'a> {
    api: Api,
    texts: Vec<(PromptPart, Cow<'a, str>, u32)>,
    /// Bytes of texts beyond `MOST_TEXTS`.
    crowded: u64,
    tokens: [u64; PromptPart::ALL.len()],
    messages: u64,
    of_assistant: u64,
    calls: u64,
    arguments: u64,
    crowds: u64,
    remarks: u64,
    results: u64,
    /// What the model thought before.
    thoughts: Vec<Cow<'a, str>>,
    hidden_thoughts: u64,
    /// The first text of the first system message.
    system: Option<usize>,
    /// Lists of tool definitions, as written.
    tools: Vec<&'a str>,
    tool_choice: Choice,
    chosen_tool: Cow<'a, str>,
    schema: Option<tools::AnswerSchema<'a>>,
    thinks: Option<bool>,
    images: Vec<images::Image>,
    pages: u64,
    /// Tokens of the text on them, by the number of its characters.
    page_text: u64,
    /// How many bytes of documents were inflated to be read.
    pub(crate) inflated: usize,
    /// Tenths of a second of it.
    sound: u64,
    /// How many prompts of a list are completed, each with its own answers.
    pub prompts: u64,
    /// What the request refers to but does not carry.
    pub unseen: u64,
}

/// Prompt tokens by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptEstimate {
    parts: [u64; PromptPart::ALL.len()],
    /// There was too much text to count it exactly.
    pub is_rough: bool,
    /// How many things the request refers to but does not carry; nothing is counted for them.
    pub unseen: u64,
    /// Part of the prompt is the provider's own, or somewhere else: how far off this was says nothing of
    /// the next one.
    pub is_partial: bool,
    /// What the request is like, as far as estimates differ.
    pub kind: RequestKind,
    /// The model's name, or that of its family, is known.
    pub knows_model: bool,
}

impl PromptEstimate {
    /// All prompt tokens.
    pub fn tokens(&self) -> u64 {
        self.parts.iter().sum()
    }

    /// Those of one part.
    pub fn of(&self, part: PromptPart) -> u64 {
        self.parts[part as usize]
    }
}

impl<'a> Prompt<'a> {
    pub(crate) fn of(api: Api) -> Self {
        Self { api, ..Self::default() }
    }

    /// Adds a text that is to be counted, so many times.
    pub(crate) fn add_text(&mut self, part: PromptPart, text: Cow<'a, str>, times: u32) {
        if text.is_empty() {
            return;
        }
        if self.texts.len() < MOST_TEXTS {
            self.texts.push((part, text, times));
        } else {
            self.crowded += text.len() as u64 * u64::from(times);
        }
    }

    /// Adds tokens that are known.
    pub(crate) fn add_tokens(&mut self, part: PromptPart, tokens: u64) {
        let sum = &mut self.tokens[part as usize];
        *sum = sum.saturating_add(tokens);
    }

    /// How many texts there are so far: where the next one will stand.
    pub(crate) fn text_count(&self) -> usize {
        self.texts.len()
    }

    /// A message has ended whose texts began at `first_text`.
    pub(crate) fn end_message(&mut self, role: Role, first_text: usize) {
        self.messages += 1;
        self.of_assistant += u64::from(role == Role::Assistant);
        self.results += u64::from(role == Role::Tool);
        if role == Role::System && self.system.is_none() && first_text < self.texts.len() {
            self.system = Some(first_text);
        }
    }

    /// A tool was called, with so many arguments.
    pub(crate) fn add_tool_call(&mut self, arguments: u64) {
        self.calls += 1;
        self.arguments += arguments;
    }

    /// A chat's message has called so many tools, perhaps after saying something.
    pub(crate) fn end_tool_calls(&mut self, calls: u64, says_something: bool) {
        self.crowds += u64::from(calls > 1);
        self.remarks += u64::from(calls > 0 && says_something);
    }

    /// What the model thought before; some models read it again.
    pub(crate) fn add_reasoning(&mut self, text: Cow<'a, str>) {
        if self.thoughts.len() < MOST_TEXTS {
            self.thoughts.push(text);
        } else {
            self.crowded += text.len() as u64;
        }
    }

    /// The same in base64 that only the provider can read. Fitted to 23 exchanges with Gemini's models.
    pub(crate) fn add_encrypted_reasoning(&mut self, base64: &str) {
        self.hidden_thoughts = self.hidden_thoughts.saturating_add(base64.len() as u64 / 6);
    }

    /// A list of tool definitions, as written.
    pub(crate) fn add_tools(&mut self, json: &'a str) {
        if json != "null" {
            self.tools.push(json);
        }
    }

    /// No tool may be used.
    pub(crate) fn forbid_tools(&mut self) {
        self.tool_choice = Choice::Forbidden;
    }

    /// Some tool must be used.
    pub(crate) fn require_tools(&mut self) {
        self.tool_choice = Choice::Required;
    }

    /// This tool must be used.
    pub(crate) fn require_tool_named(&mut self, name: Cow<'a, str>) {
        self.tool_choice = Choice::Named;
        self.chosen_tool = name;
    }

    /// The model is told to think, or not to.
    pub(crate) fn set_reasoning(&mut self, thinks: bool) {
        self.thinks = Some(thinks);
    }

    /// The model is told to think little; what says whether it thinks at all counts more.
    pub(crate) fn default_to_no_reasoning(&mut self) {
        self.thinks.get_or_insert(false);
    }

    /// A schema for the answer, its name, and what is said of it.
    pub(crate) fn set_answer_schema(&mut self, name: Cow<'a, str>, description: Cow<'a, str>, json: &'a str) {
        if !description.is_empty() {
            self.add_tokens(PromptPart::Schema, 1);
            self.add_text(PromptPart::Schema, description, 1);
        }
        self.schema = Some(tools::AnswerSchema { name, json });
    }

    /// An image; `None`: its size cannot be told.
    pub(crate) fn add_image(&mut self, size: Option<(u32, u32)>, detail: ImageDetail) {
        self.images.push(images::Image { size, detail });
    }

    /// Pages of a document, and the characters that stand on them.
    pub(crate) fn add_pages(&mut self, pages: u64, characters: u64) {
        self.pages = self.pages.saturating_add(pages);
        self.page_text = self.page_text.saturating_add(characters / 4);
    }

    /// Sound of so many tenths of a second.
    pub(crate) fn add_audio(&mut self, tenths: u64) {
        self.sound = self.sound.saturating_add(tenths);
    }

    fn kind(&self) -> RequestKind {
        if !self.images.is_empty() || self.pages > 0 {
            RequestKind::Images
        } else if !self.tools.is_empty() || self.schema.is_some() {
            RequestKind::Tools
        } else {
            RequestKind::Plain
        }
    }

    /// Counts everything, if that takes no more than about 50 microseconds: most of it was counted lately,
    /// and what was not is little and ordinary.
    pub fn estimate_if_quick(&self, model: &Model) -> Option<PromptEstimate> {
        vocabulary::begin();
        let tokenizer = model.tokenizer;
        let mut anew = 0;
        let mut count = |text: &str| {
            tokenizer.count_if_known(text).or_else(|| {
                anew += text.len();
                let is_quick = anew <= tokenizer.quick_text() && longest_run(text) <= LONGEST_QUICK_RUN;
                is_quick.then(|| tokenizer.count(text))
            })
        };
        self.sum(model, &mut count, &|json| tools::count_if_known(tokenizer, model.style(self.api), json))
    }

    /// Counts everything with the model's tokenizer. Takes time: about 20 microseconds for 1 KiB of text.
    pub fn estimate(&self, model: &Model) -> PromptEstimate {
        vocabulary::begin();
        let tokenizer = model.tokenizer;
        let bytes = self.texts.iter().map(|(_, text, _)| text.len()).sum::<usize>()
            + self.thoughts.iter().map(|text| text.len()).sum::<usize>()
            + self.tools.iter().map(|json| json.len()).sum::<usize>();
        let is_rough = bytes > MOST_TEXT;
        let roughly = |text: &str| Some(text.len() as u64 / 2);
        let estimate = if is_rough {
            let of_tools = |json: &str| {
                Some(tools::Cost { tokens: json.len() as u64 / 2, has_functions: true, has_hosted: false })
            };
            self.sum(model, &mut { roughly }, &of_tools)
        } else {
            self.sum(model, &mut |text| Some(tokenizer.count(text)), &|json| {
                Some(tools::count(tokenizer, model.style(self.api), json))
            })
        };
        let estimate = estimate.unwrap_or_default();
        PromptEstimate { is_rough: is_rough || estimate.is_rough, ..estimate }
    }

    /// Everything together; `None` as soon as a count is refused.
    fn sum(
        &self,
        model: &Model,
        count: &mut dyn FnMut(&str) -> Option<u64>,
        count_tools: &dyn Fn(&str) -> Option<tools::Cost>,
    ) -> Option<PromptEstimate> {
        let mut parts = self.tokens;
        let mut add = |part: PromptPart, tokens: u64| parts[part as usize] += tokens;
        let (mut has_functions, mut has_hosted) = (false, false);
        let drops_tools = self.tool_choice == Choice::Forbidden && !model.reads_forbidden_tools();
        for json in self.tools.iter().filter(|_| !drops_tools) {
            let cost = count_tools(json)?;
            add(PromptPart::Tools, cost.tokens);
            has_functions |= cost.has_functions;
            has_hosted |= cost.has_hosted;
        }
        // A namespace of functions stands at the end of the system message, a line further down.
        let joined = self.system.filter(|_| has_functions);
        for (at, (part, text, times)) in self.texts.iter().enumerate() {
            let tokens = if joined == Some(at) { count(&format!("{text}\n"))? } else { count(text)? };
            add(*part, tokens * u64::from(*times));
        }
        if model.reads_thoughts() {
            add(PromptPart::Messages, self.hidden_thoughts);
            for text in &self.thoughts {
                add(PromptPart::Messages, count(text)?);
            }
        }
        if self.tool_choice == Choice::Named && model.names_choice(self.api) {
            add(PromptPart::Tools, count(&self.chosen_tool)?);
        }
        let schema = self.schema.as_ref().filter(|_| model.reads_schema());
        if let Some(schema) = schema {
            let tokens = match model.schema_percent() {
                Some(percent) => (count(&schema.whole())? * percent).div_ceil(100),
                None => count(&schema.rendered())?,
            };
            add(PromptPart::Schema, tokens);
        }
        add(PromptPart::Messages, self.crowded / 2);
        add(
            PromptPart::Images,
            model.images(&self.images) + model.pages(self.api, self.pages, self.page_text),
        );
        add(PromptPart::Messages, Model::sound(self.api, self.sound));
        let facts = models::Facts {
            api: self.api,
            messages: self.messages,
            of_assistant: self.of_assistant,
            calls: self.calls,
            arguments: self.arguments,
            crowds: self.crowds,
            remarks: self.remarks,
            results: self.results,
            choice: self.tool_choice,
            thinks: self.thinks,
            has_system: self.system.is_some(),
            has_functions,
            has_schema: schema.is_some(),
        };
        model.overhead(&facts, &mut parts);
        let kind = self.kind();
        let is_partial = has_hosted || self.unseen > 0;
        Some(PromptEstimate {
            parts,
            is_rough: self.crowded > 0,
            unseen: self.unseen,
            is_partial,
            kind,
            knows_model: model.is_known,
        })
    }
}

/// The longest stretch of a text without a space. Words are quick to count; one long run of dashes is
/// the worst that the tokenizer knows, 40 times slower byte for byte.
fn longest_run(text: &str) -> usize {
    let mut last = 0;
    let spaces = memchr::memchr_iter(b' ', text.as_bytes()).chain([text.len()]);
    spaces.into_iter().map(|at| at - std::mem::replace(&mut last, at)).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::Body;
    use serde_json::{Value, json};

    fn estimate(api: Api, body: &Value) -> PromptEstimate {
        let text = body.to_string();
        let body = Body::read(api, text.as_bytes()).unwrap();
        body.prompt.estimate(&Models::default().named(body.model.as_deref().unwrap_or_default()))
    }

    /// What a request costs more with these fields.
    fn more(api: Api, body: &Value, fields: &Value) -> i64 {
        let mut with = body.clone();
        let fields = fields.as_object().unwrap().clone();
        with.as_object_mut().unwrap().extend(fields);
        let [without, with] = [body, &with].map(|b| i64::try_from(estimate(api, b).tokens()).unwrap());
        with - without
    }

    #[test]
    fn a_tool_that_must_be_used_costs_more_at_anthropic() {
        let tool = json!({"name": "look", "description": "Looks.", "input_schema": {"type": "object"}});
        let body = json!({"model": "claude-sonnet-4-6", "max_tokens": 9, "tools": [tool],
            "messages": [{"role": "user", "content": "Hi"}]});
        let more = |choice: Value| more(Api::Messages, &body, &json!({"tool_choice": choice}));
        assert_eq!(more(json!({"type": "auto"})), 0);
        assert_eq!(more(json!({"type": "none"})), 0);
        let any = more(json!({"type": "any"}));
        assert!(any > 50, "{any}");
        let named = more(json!({"type": "tool", "name": "look"}));
        assert!((any + 1..any + 4).contains(&named), "{named}");
    }

    #[test]
    fn what_was_thought_counts_where_it_is_read_again() {
        let thought = "First I look at the map. Then I count the bridges that lead across the river. ";
        let cost = |model: &str| {
            let [without, with] = ["", thought].map(|thought| {
                let messages = json!([{"role": "user", "content": "How many?"},
                    {"role": "assistant", "content": "7", "reasoning_content": thought}]);
                estimate(Api::Chat, &json!({"model": model, "messages": messages})).tokens()
            });
            with - without
        };
        assert_eq!([cost("gpt-4o"), cost("glm-4.7"), cost("grok-4")], [0, 0, 0]);
        assert!(cost("deepseek-chat") > 15 && cost("qwen3-8b") > 15);
        let signed = |model: &str| {
            let part = json!({"text": "7", "thoughtSignature": "A".repeat(180)});
            estimate(Api::Gemini, &json!({"model": model, "contents": [{"role": "model", "parts": [part]}]}))
        };
        assert_eq!(signed("gemini-3-pro").tokens() - signed("gemini-2.5-pro").tokens(), 30);
    }

    #[test]
    fn calls_cost_by_their_arguments_where_each_is_named() {
        let cost = |model: &str, arguments: Value| {
            let call = json!({"id": "1", "type": "function",
                "function": {"name": "add", "arguments": arguments.to_string()}});
            let messages =
                json!([{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]);
            estimate(Api::Chat, &json!({"model": model, "messages": messages})).of(PromptPart::Overhead)
        };
        let [none, two] =
            [json!({}), json!({"a": {"x": 1, "y": 2}, "b": 2})].map(|a| cost("claude-sonnet-4-6", a));
        assert_eq!(two - none, 20);
        assert_eq!(cost("gpt-4o", json!({})), cost("gpt-4o", json!({"a": 1})));
    }

    #[test]
    fn each_function_and_its_parameters_cost_by_the_family() {
        let schema =
            json!({"type": "object", "properties": {"city": {"type": "string", "description": "The city."}}});
        let tool = json!({"type": "function", "function": {"name": "weather", "description": "Tells it.",
            "parameters": schema}});
        let of = |tools: Vec<&Value>| {
            let messages = json!([{"role": "user", "content": "?"}]);
            estimate(Api::Chat, &json!({"model": "mistral-large", "messages": messages, "tools": tools}))
                .of(PromptPart::Tools)
        };
        let [one, two, three] = [vec![&tool], vec![&tool; 2], vec![&tool; 3]].map(of);
        assert!((30..90).contains(&(two - one)), "{one} {two}");
        assert!((two - one).abs_diff(three - two) <= 2, "{one} {two} {three}");
    }

    #[test]
    fn what_is_not_in_the_request_makes_an_estimate_partial() {
        let message = |part: Value| json!([{"role": "user", "content": [part]}]);
        let part = |url: &str| message(json!({"type": "document_url", "document_url": url}));
        let of =
            |messages: Value| estimate(Api::Chat, &json!({"model": "mistral-large", "messages": messages}));
        assert!(of(part("https://example.com/a.pdf")).is_partial);
        // "%PDF-1.4 /Type /Page "
        let pdf = of(part("data:application/pdf;base64,JVBERi0xLjQgL1R5cGUgL1BhZ2Ug"));
        assert!(!pdf.is_partial && pdf.of(PromptPart::Images) > 0);
        let pro = |mode: &str| {
            estimate(
                Api::Responses,
                &json!({"model": "gpt-5.6-x", "input": "Hi", "reasoning": {"mode": mode}}),
            )
        };
        assert!(pro("pro").is_partial && !pro("standard").is_partial);
    }
}
