//! What is known of models: by which vocabulary they count, and what their APIs add to a prompt.

use super::Part;
use super::images::{Image, Rule};
use super::tokenizer::{Encoding, Tokenizer};
use super::tools::Style;
use crate::api::Api;

/// A model, as far as estimates differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// What counts its tokens.
    pub tokenizer: Tokenizer,
    /// Whether its name, or a rule of the config, says anything of it.
    pub is_known: bool,
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
    /// Any other: a chat template with the tools as JSON in it.
    Template(Template),
}

/// What the chat template of a family adds, and how many times the tokens of its compact JSON a
/// definition of tools takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Template {
    request: i64,
    message: i64,
    functions: i64,
    tools_percent: u64,
    /// More for each call of a tool and its result.
    call: i64,
    /// More for a request with a schema for the answer; `None`: it guides what is generated and is not
    /// put into the prompt.
    schema: Option<i64>,
    /// More for a request that has the model think.
    thinking: i64,
    /// Whether it thinks unless it is told not to.
    thinks: bool,
    /// Whether tools that may not be used are left out.
    drops_forbidden: bool,
}

const TEMPLATE: Template = Template {
    request: 3,
    message: 3,
    functions: 80,
    tools_percent: 130,
    call: 15,
    schema: None,
    thinking: 0,
    thinks: false,
    drops_forbidden: true,
};

const fn template(request: i64, message: i64, functions: i64, tools_percent: u64, call: i64) -> Format {
    Format::Template(Template { request, message, functions, tools_percent, call, ..TEMPLATE })
}

/// Anthropic's: thinking was found in 30 exchanges, schemas in 14.
const fn claude(message: i64, functions: i64, tools_percent: u64, schema: i64) -> Format {
    Format::Template(Template {
        request: 4,
        message,
        functions,
        tools_percent,
        call: 45,
        schema: Some(schema),
        thinking: 28,
        thinks: false,
        drops_forbidden: false,
    })
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
            (Self::Early, _) => EARLY,
            (Self::Template(t), _) => Overhead {
                request: t.request,
                message: t.message,
                functions: t.functions,
                call: t.call,
                result: 0,
                after_system: 0,
                schema: if let Some(schema) = t.schema { schema } else { 0 },
                named: 0,
                forbidden: 0,
                ..EARLY
            },
            // 79 with tools, 28 with a schema.
            (Self::Omni, Api::Responses) => Overhead {
                call: 3,
                result: 0,
                functions: -3,
                after_system: 0,
                schema: 1,
                named: 7,
                required: 9,
                ..EARLY
            },
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
            (Self::Template(t), _) => Style::Json { percent: t.tools_percent },
            (_, Api::Responses) => Style::Titled,
            _ => Style::Compact,
        }
    }
}

const O200K: Encoding = Encoding::O200k;
const CL100K: Encoding = Encoding::Cl100k;

/// Models by the beginning of their name; the first match decides. Names whose vocabulary is
/// published (tiktoken's model list) count exactly, the other families in proportion to o200k: by what the
/// vocabularies make of the same texts, and for those that are not published by recorded exchanges.
const FAMILIES: &[(&str, Encoding, u64, Format)] = &[
    ("gpt-4o", O200K, 100, Format::Omni),
    ("gpt-4.1", O200K, 100, Format::Omni),
    ("gpt-4.5", O200K, 100, Format::Omni),
    ("gpt-4", CL100K, 100, Format::Early),
    ("gpt-3.5", CL100K, 100, Format::Early),
    ("gpt-35", CL100K, 100, Format::Early),
    ("text-", CL100K, 100, Format::Early),
    ("davinci", CL100K, 100, Format::Early),
    ("babbage", CL100K, 100, Format::Early),
    ("curie", CL100K, 100, Format::Early),
    ("ada", CL100K, 100, Format::Early),
    ("code-", CL100K, 100, Format::Early),
    // Its template says who it is in 61 tokens. 18 exchanges.
    (
        "gpt-oss",
        O200K,
        100,
        Format::Template(Template {
            request: 62,
            functions: 1,
            tools_percent: 140,
            schema: Some(80),
            ..TEMPLATE
        }),
    ),
    ("gpt-audio", O200K, 100, Format::Omni),
    ("gpt-realtime", O200K, 100, Format::Omni),
    ("gpt-", O200K, 100, Format::Harmony),
    ("chatgpt-", O200K, 100, Format::Omni),
    ("o1", O200K, 100, Format::Reasoning),
    ("o3", O200K, 100, Format::Reasoning),
    ("o4", O200K, 100, Format::Reasoning),
    ("codex-", O200K, 100, Format::Harmony),
    ("computer-use", O200K, 100, Format::Omni),
    ("llama-2", O200K, 135, template(4, 3, 150, 135, 0)),
    // 39 plain, 27 with tools. From 3.1 on the template has a date.
    ("llama-3.1", O200K, 105, template(28, 3, 130, 110, 0)),
    ("llama-3.2", O200K, 105, template(28, 3, 130, 110, 0)),
    ("llama-3.3", O200K, 105, template(28, 3, 130, 110, 0)),
    ("llama", O200K, 105, template(4, 3, 150, 110, 0)),
    ("meta-llama", O200K, 105, template(4, 3, 150, 110, 0)),
    // 8 plain, 30 with tools.
    ("kimi", O200K, 105, template(3, 2, 5, 95, 10)),
    ("minimax", O200K, 105, template(3, 2, 80, 120, 15)),
    // 24 with tools.
    ("glm", O200K, 105, template(3, 2, 83, 127, 40)),
    // 83 plain, 100 with tools.
    (
        "deepseek-v4",
        O200K,
        108,
        Format::Template(Template {
            request: 2,
            message: -1,
            functions: 210,
            call: 40,
            thinking: 80,
            thinks: true,
            ..TEMPLATE
        }),
    ),
    ("deepseek", O200K, 108, template(2, -1, 210, 130, 40)),
    // 112 plain, 129 with tools. The template of 3.5 says more of tools.
    ("qwen3.5", O200K, 103, template(4, 3, 230, 101, 50)),
    ("qwen3-5", O200K, 103, template(4, 3, 230, 101, 50)),
    ("qwen", O200K, 103, template(4, 3, 77, 132, 30)),
    ("mistral-7b", O200K, 135, template(2, -1, 10, 135, 0)),
    // 70 plain, 121 with tools.
    ("mistral", O200K, 115, template(2, -1, 10, 132, 0)),
    ("ministral", O200K, 115, template(2, -1, 10, 132, 0)),
    ("magistral", O200K, 115, template(2, -1, 10, 132, 0)),
    ("codestral", O200K, 115, template(2, -1, 10, 132, 0)),
    ("pixtral", O200K, 115, template(2, -1, 10, 132, 0)),
    ("gemma", O200K, 108, template(0, 3, 10, 100, 8)),
    // 102 plain, 310 with tools.
    ("gemini", O200K, 102, template(-1, 0, 0, 88, 8)),
    // 22 plain, 91 with tools. It is told who it is.
    (
        "grok",
        O200K,
        105,
        Format::Template(Template {
            request: 110,
            message: 2,
            functions: 120,
            tools_percent: 115,
            call: 50,
            schema: Some(60),
            ..TEMPLATE
        }),
    ),
    // 16 plain.
    ("sonar", O200K, 100, template(-1, -1, 0, 100, 0)),
    ("command", O200K, 105, template(3, 3, 100, 120, 15)),
    // 298 plain, 230 with tools; the first prompts about tools are published, the later ones have grown.
    ("claude-3", O200K, 110, claude(2, 310, 133, 180)),
    ("claude-sonnet-4-6", O200K, 110, claude(2, 590, 95, 180)),
    ("claude-opus-4-6", O200K, 110, claude(2, 590, 95, 180)),
    ("claude-haiku-4", O200K, 110, claude(2, 500, 120, 180)),
    ("claude-opus-4-5", O200K, 110, claude(2, 500, 120, 180)),
    ("claude-sonnet-4-5", O200K, 110, claude(2, 500, 120, 180)),
    // 56 plain, 33 with tools.
    ("claude-opus-4-7", O200K, 140, claude(3, 620, 160, 220)),
    ("claude-opus-4-8", O200K, 140, claude(3, 620, 160, 220)),
    ("claude-sonnet-4", O200K, 110, claude(2, 310, 133, 180)),
    ("claude-opus-4", O200K, 110, claude(2, 310, 133, 180)),
    ("claude", O200K, 140, claude(3, 460, 160, 220)),
];

/// Any other model.
const UNKNOWN: (Encoding, u64, Format) = (O200K, 110, Format::Template(TEMPLATE));

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
    /// Whether the model is told to think, or not to.
    pub(super) thinks: Option<bool>,
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
    /// The model of this name, by the built-in table, else a guess on the safe side.
    pub(super) fn built_in(name: &str) -> Self {
        let name = family_name(name);
        let known = FAMILIES.iter().find(|(prefix, ..)| name.starts_with(prefix));
        let (encoding, percent, format) = known.map_or(UNKNOWN, |&(_, e, percent, f)| (e, percent, f));
        let (tokenizer, images) = (Tokenizer { encoding, percent }, Rule::of_model(&name));
        Self { tokenizer, is_known: known.is_some(), format, images }
    }

    /// The same, counted by this vocabulary. What has one of OpenAI's and an unknown name is a model of theirs.
    pub(super) fn counted_by(self, encoding: Encoding) -> Self {
        let format = match encoding {
            Encoding::O200k if !self.is_known => Format::Omni,
            Encoding::Cl100k if !self.is_known => Format::Early,
            _ => self.format,
        };
        Self { tokenizer: Tokenizer::exact(encoding), is_known: true, format, ..self }
    }

    pub(super) fn images(&self, images: &[Image]) -> u64 {
        images.iter().map(|&image| self.images.tokens(image)).sum()
    }

    /// Pages of a document, as the images and the text that the model gets of them.
    pub(super) fn pages(&self, api: Api, pages: u64, text: u64) -> u64 {
        let text = if self.images.reads_page_text() { text } else { 0 };
        pages.saturating_mul(self.images.page(api)).saturating_add(text)
    }

    /// Sound of so many tenths of a second: 10 tokens a second at OpenAI, 32 at Google, as their guides say.
    pub(super) fn sound(&self, api: Api, tenths: u64) -> u64 {
        if api == Api::Gemini { tenths.saturating_mul(32).div_ceil(10) } else { tenths }
    }

    /// How functions are written down for it.
    pub(super) fn style(&self, api: Api) -> Style {
        self.format.style(api)
    }

    /// Whether a schema for the answer is put into its prompt.
    pub(super) fn reads_schema(&self) -> bool {
        !matches!(self.format, Format::Template(Template { schema: None, .. }))
    }

    /// Whether tools are put into its prompt though none may be used.
    pub(super) fn reads_forbidden_tools(&self) -> bool {
        !matches!(self.format, Format::Template(Template { drops_forbidden: true, .. }))
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
        if let Format::Template(Template { thinking, thinks, .. }) = self.format
            && facts.thinks.unwrap_or(thinks)
        {
            add(Part::Overhead, thinking);
        }
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
    // OpenRouter writes claude-sonnet-4.6, Anthropic claude-sonnet-4-6; Databricks puts its own name before.
    let name = name.to_ascii_lowercase();
    let name = name.strip_prefix("databricks-").unwrap_or(&name);
    if name.starts_with("claude") { name.replace('.', "-") } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_decides_the_encoding() {
        for (model, encoding, percent) in [
            ("gpt-4o-mini", O200K, 100),
            ("gpt-4.1", O200K, 100),
            ("gpt-4", CL100K, 100),
            ("gpt-4-turbo-2024-04-09", CL100K, 100),
            ("gpt-3.5-turbo", CL100K, 100),
            ("gpt-35-turbo-16k", CL100K, 100),
            ("ft:gpt-4o-2024-08-06:org::id", O200K, 100),
            ("ft:gpt-4.1-mini:org::id", O200K, 100),
            ("openai/GPT-4o", O200K, 100),
            ("gpt-6-x", O200K, 100),
            ("o4", O200K, 100),
            ("codex-mini-latest", O200K, 100),
            ("gpt-oss-120b", O200K, 100),
            ("text-embedding-3-small", CL100K, 100),
            ("claude-sonnet-4", O200K, 110),
            ("anthropic/claude-sonnet-4.6", O200K, 110),
            ("claude-opus-4-7", O200K, 140),
            ("meta-llama/Llama-3-8b", O200K, 105),
            ("who-knows", O200K, 110),
            ("é", O200K, 110),
        ] {
            assert_eq!(Model::built_in(model).tokenizer, Tokenizer { encoding, percent }, "{model}");
        }
    }
}
