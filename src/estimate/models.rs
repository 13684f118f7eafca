//! What is known of models: by which vocabulary they count, and what their APIs add to a prompt.

use super::images::{Image, Rule};
use super::tokenizer::{Encoding, Tokenizer};
use super::tools::Style;
use super::Part;
use crate::api::Api;
use crate::config::{ModelRule, TokenizerChoice};

/// A model, as far as estimates differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// What counts its tokens.
    pub tokenizer: Tokenizer,
    format: Format,
    images: Rule,
}

/// How a family of models has its prompts written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// OpenAI's models with `cl100k_base`.
    Early,
    /// OpenAI's models with `o200k_base` that do not reason.
    Omni,
    /// OpenAI's o-series.
    Reasoning,
    /// OpenAI's models from gpt-5 on.
    Harmony,
    /// Any other.
    Template,
}

/// What an API adds to what a request says, in tokens of the model's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Overhead {
    /// For each request; what begins the reply is in it.
    request: i64,
    /// For each message: what sets it apart from the next.
    message: i64,
    /// More for each message of the assistant's.
    assistant: i64,
    /// More for each call of a tool, and for each result of one.
    call: i64,
    result: i64,
    /// For each request with functions.
    functions: i64,
    /// More if there is a system message besides: functions and schemas then stand at its end.
    after_system: i64,
    /// For each request with a schema for the answer.
    schema: i64,
    /// For a tool that must be used, besides its name; for any tool that must; for none that may.
    named: i64,
    required: i64,
    forbidden: i64,
}

/// OpenAI's cookbook, "How to count tokens with tiktoken"; functions by openai-chat-tokens.
const EARLY: Overhead = Overhead {
    request: 3,
    message: 3,
    assistant: 0,
    call: 0,
    result: -1,
    functions: 9,
    after_system: -4,
    schema: 7,
    named: 4,
    required: 0,
    forbidden: 1,
};

impl Format {
    /// Fitted to recorded exchanges; beside each how many there were with such a request.
    const fn overhead(self, api: Api) -> Overhead {
        match (self, api) {
            (Self::Early | Self::Template, _) => EARLY,
            // 79 with tools, 28 with a schema.
            (Self::Omni, Api::Responses) => {
                Overhead { call: 3, result: 0, functions: -3, after_system: 0, schema: 1, named: 7, required: 9, ..EARLY }
            }
            // 115 with tools, 29 with a schema.
            (Self::Omni, _) => Overhead { call: 1, result: 0, functions: 3, schema: 8, named: 7, ..EARLY },
            // 83 plain, 81 with tools, 55 with a schema.
            (Self::Harmony, Api::Responses) => Overhead {
                request: 2,
                assistant: 2,
                call: 10,
                result: 0,
                functions: 3,
                after_system: 0,
                schema: 0,
                named: 0,
                forbidden: 0,
                ..EARLY
            },
            (Self::Reasoning, Api::Responses) => {
                Overhead { functions: -1, call: 7, ..Self::Harmony.overhead(Api::Responses) }
            }
            (Self::Reasoning, _) => Overhead { functions: 3, ..Self::Harmony.overhead(Api::Chat) },
            // 46 plain, 22 with tools, 11 with a schema.
            (Self::Harmony, _) => Overhead {
                request: 2,
                assistant: 2,
                call: 5,
                result: 0,
                functions: 84,
                after_system: 0,
                schema: 5,
                ..EARLY
            },
        }
    }

    const fn style(self, api: Api) -> Style {
        match (self, api) {
            (Self::Early, _) => Style::Lines,
            (_, Api::Responses) => Style::Titled,
            _ => Style::Compact,
        }
    }
}

/// Models by the beginning of their name; the first match decides. Names whose vocabulary is
/// published (tiktoken's model list) count exactly, the other families by measured ratios to o200k.
const FAMILIES: &[(&str, Encoding, u64, Format)] = &[
    ("gpt-4o", Encoding::O200k, 100, Format::Omni),
    ("gpt-4.1", Encoding::O200k, 100, Format::Omni),
    ("gpt-4.5", Encoding::O200k, 100, Format::Omni),
    ("gpt-4", Encoding::Cl100k, 100, Format::Early),
    ("gpt-3.5", Encoding::Cl100k, 100, Format::Early),
    ("gpt-35", Encoding::Cl100k, 100, Format::Early),
    ("text-", Encoding::Cl100k, 100, Format::Early),
    ("davinci", Encoding::Cl100k, 100, Format::Early),
    ("babbage", Encoding::Cl100k, 100, Format::Early),
    ("curie", Encoding::Cl100k, 100, Format::Early),
    ("ada", Encoding::Cl100k, 100, Format::Early),
    ("code-", Encoding::Cl100k, 100, Format::Early),
    ("gpt-oss", Encoding::O200k, 100, Format::Template),
    ("gpt-audio", Encoding::O200k, 100, Format::Omni),
    ("gpt-realtime", Encoding::O200k, 100, Format::Omni),
    ("gpt-", Encoding::O200k, 100, Format::Harmony),
    ("chatgpt-", Encoding::O200k, 100, Format::Omni),
    ("o1", Encoding::O200k, 100, Format::Reasoning),
    ("o3", Encoding::O200k, 100, Format::Reasoning),
    ("o4", Encoding::O200k, 100, Format::Reasoning),
    ("codex-", Encoding::O200k, 100, Format::Harmony),
    ("computer-use", Encoding::O200k, 100, Format::Omni),
    ("llama-2", Encoding::O200k, 135, Format::Template),
    ("llama", Encoding::O200k, 105, Format::Template),
    ("meta-llama", Encoding::O200k, 105, Format::Template),
    ("kimi", Encoding::O200k, 105, Format::Template),
    ("minimax", Encoding::O200k, 105, Format::Template),
    ("glm", Encoding::O200k, 105, Format::Template),
    ("deepseek", Encoding::O200k, 108, Format::Template),
    ("qwen", Encoding::O200k, 110, Format::Template),
    ("mistral-7b", Encoding::O200k, 135, Format::Template),
    ("mistral", Encoding::O200k, 115, Format::Template),
    ("gemma", Encoding::O200k, 115, Format::Template),
    ("gemini", Encoding::O200k, 115, Format::Template),
    ("claude", Encoding::O200k, 120, Format::Template),
];

/// Any other model.
const UNKNOWN: (Encoding, u64, Format) = (Encoding::O200k, 110, Format::Template);

/// What of a request its API adds to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Facts {
    pub(super) api: Api,
    pub(super) messages: u64,
    pub(super) of_assistant: u64,
    pub(super) calls: u64,
    pub(super) results: u64,
    pub(super) has_system: bool,
    pub(super) has_functions: bool,
    pub(super) has_schema: bool,
    pub(super) choice: Choice,
}

/// What a request says of the use of its tools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Choice {
    #[default]
    Free,
    /// No tool may be used.
    Forbidden,
    /// Some tool must be used.
    Required,
    /// This one must, whose name is counted already.
    Named,
}

impl Model {
    /// The model of this name: its vocabulary by the config's rules, else by its name, else a guess on
    /// the safe side.
    pub fn named(rules: &[ModelRule], model: &str) -> Self {
        let name = family_name(model);
        let known = FAMILIES.iter().find(|(prefix, ..)| name.starts_with(prefix));
        let (encoding, percent, format) = known.map_or(UNKNOWN, |&(_, e, percent, f)| (e, percent, f));
        let ruled = rules.iter().find(|r| r.pattern.matches(model)).map(|rule| match &rule.tokenizer {
            TokenizerChoice::Cl100k => Tokenizer::exact(Encoding::Cl100k),
            TokenizerChoice::O200k => Tokenizer::exact(Encoding::O200k),
            TokenizerChoice::File(_) => Tokenizer { encoding, percent },
        });
        let tokenizer = ruled.unwrap_or(Tokenizer { encoding, percent });
        Self { tokenizer, format, images: Rule::of_model(&name) }
    }

    pub(super) fn images(&self, images: &[Image]) -> u64 {
        images.iter().map(|&image| self.images.tokens(image)).sum()
    }

    /// A page of a document: the image of it, and its text.
    pub(super) fn page(&self) -> u64 {
        const TEXT_OF_A_PAGE: u64 = 500;
        self.images.page() + TEXT_OF_A_PAGE
    }

    /// How functions are written down for it.
    pub(super) fn style(&self, api: Api) -> Style {
        self.format.style(api)
    }

    /// Adds to the parts what the API adds to the request.
    pub(super) fn overhead(&self, facts: &Facts, parts: &mut [u64; Part::ALL.len()]) {
        if matches!(facts.api, Api::Completions | Api::Embeddings) {
            return;
        }
        let overhead = self.format.overhead(facts.api);
        let times = |tokens: i64, n: u64| tokens.saturating_mul(i64::try_from(n).unwrap_or(i64::MAX));
        let mut add = |part: Part, tokens: i64| {
            let sum = &mut parts[part as usize];
            *sum = sum.saturating_add_signed(tokens);
        };
        add(Part::Overhead, overhead.request);
        add(Part::Overhead, times(overhead.message, facts.messages));
        add(Part::Overhead, times(overhead.assistant, facts.of_assistant));
        add(Part::Overhead, times(overhead.call, facts.calls));
        add(Part::Overhead, times(overhead.result, facts.results));
        let after_system = if facts.has_system { overhead.after_system } else { 0 };
        if facts.has_functions {
            let choice = match facts.choice {
                Choice::Free => 0,
                Choice::Forbidden => overhead.forbidden,
                Choice::Required => overhead.required,
                Choice::Named => overhead.named,
            };
            add(Part::Tools, overhead.functions + after_system + choice);
        }
        if facts.has_schema {
            add(Part::Schema, overhead.schema + if facts.has_functions { 0 } else { after_system });
        }
    }

    /// Whether the name of a tool that must be used is in the prompt.
    pub(super) fn names_choice(&self, api: Api) -> bool {
        self.format.overhead(api).named > 0
    }
}

/// `openai/gpt-4o` is gpt-4o, and so is the fine-tune `ft:gpt-4o:org::id`.
fn family_name(model: &str) -> String {
    let name = model.rsplit('/').next().unwrap_or(model);
    let name = name.strip_prefix("ft:").map_or(name, |base| base.split(':').next().unwrap_or(base));
    name.to_ascii_lowercase()
}
