//! What is known of models: by which vocabulary they count, and what their APIs add to a prompt.

use super::PromptPart;
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

/// What the chat template of a family adds, in its own tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Template {
    /// For each request, and for each message.
    request: i64,
    message: i64,
    /// For each request with functions, and around each of them.
    functions: i64,
    function: u8,
    /// What a token of the compact JSON of parameters comes to, in per cent.
    parameters: u8,
    /// More if some tool must be used.
    required: i64,
    /// More for each call of a tool and its result, and for each argument of a call.
    call: i64,
    argument: i64,
    /// More for a request with a schema for the answer, and what a token of it comes to, in per cent;
    /// `None`: it guides what is generated and is not put into the prompt.
    schema: Option<(i64, u64)>,
    /// More for a request that has the model think.
    thinking: i64,
    /// Whether what it thought before is put into the prompt again.
    recalls: bool,
    /// Whether tools that may not be used are left out.
    drops_forbidden: bool,
}

const TEMPLATE: Template = Template {
    request: 3,
    message: 3,
    functions: 60,
    function: 15,
    parameters: 125,
    required: 0,
    call: 20,
    argument: 0,
    schema: None,
    thinking: 0,
    recalls: true,
    drops_forbidden: true,
};

/// The request and a message; functions, one of them, its parameters; a call.
const fn template(
    around: (i64, i64),
    (functions, function, parameters): (i64, u8, u8),
    call: i64,
) -> Template {
    Template { request: around.0, message: around.1, functions, function, parameters, call, ..TEMPLATE }
}

/// Anthropic's: thinking was found in 30 exchanges, schemas in 14, calls in 109, tools that must be used
/// in 75.
const fn claude(message: i64, functions: (i64, u8, u8), required: i64) -> Template {
    Template {
        required,
        argument: 10,
        schema: Some((105, 172)),
        thinking: 28,
        drops_forbidden: false,
        ..template((4, message), functions, 47)
    }
}

/// xAI's: it is told who it is.
const fn grok(request: i64, functions: (i64, u8, u8), call: i64) -> Template {
    Template {
        schema: Some((20, 100)),
        recalls: false,
        drops_forbidden: false,
        ..template((request, 2), functions, call)
    }
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
    /// More for each call of a tool, for each argument of it, for each message with several calls or with
    /// something said besides, and for each result.
    call: i64,
    argument: i64,
    crowd: i64,
    remark: i64,
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
    call: 4,
    argument: 0,
    crowd: 15,
    remark: 6,
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
                argument: t.argument,
                crowd: 0,
                remark: 0,
                result: 0,
                after_system: 0,
                schema: if let Some((schema, _)) = t.schema { schema } else { 0 },
                named: t.required,
                required: t.required,
                forbidden: 0,
                ..EARLY
            },
            // 79 with tools, 28 with a schema.
            (Self::Omni, Api::Responses) => Overhead {
                call: 7,
                result: 0,
                functions: -3,
                after_system: 0,
                schema: 1,
                named: 7,
                required: 9,
                ..EARLY
            },
            // 115 with tools, 29 with a schema.
            (Self::Omni, _) => Overhead { call: 5, result: 0, functions: 3, schema: 8, named: 7, ..EARLY },
            // 83 plain, 81 with tools, 55 with a schema.
            (Self::Harmony, Api::Responses) => Overhead {
                request: 2,
                assistant: 2,
                call: 14,
                result: 0,
                functions: 3,
                after_system: 0,
                schema: 0,
                named: 0,
                forbidden: 0,
                ..EARLY
            },
            (Self::Reasoning, Api::Responses) => {
                Overhead { functions: -1, call: 11, ..Self::Harmony.overhead(Api::Responses) }
            }
            (Self::Reasoning, _) => Overhead { functions: 3, ..Self::Harmony.overhead(Api::Chat) },
            // 46 plain, 22 with tools, 11 with a schema.
            (Self::Harmony, _) => Overhead {
                request: 2,
                assistant: 2,
                call: 9,
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
            (Self::Template(t), _) => Style::Json { function: t.function, percent: t.parameters },
            (_, Api::Responses) => Style::Titled,
            _ => Style::Compact,
        }
    }
}

const O200K: Encoding = Encoding::O200k;
const CL100K: Encoding = Encoding::Cl100k;

/// OpenAI's models by the beginning of their name; the first match decides. Their vocabularies are
/// published (tiktoken's model list), and count exactly.
const OPENAI: &[(&str, Encoding, Format)] = &[
    ("gpt-4o", O200K, Format::Omni),
    ("gpt-4.1", O200K, Format::Omni),
    ("gpt-4.5", O200K, Format::Omni),
    ("gpt-4", CL100K, Format::Early),
    ("gpt-3.5", CL100K, Format::Early),
    ("gpt-35", CL100K, Format::Early),
    ("text-", CL100K, Format::Early),
    ("davinci", CL100K, Format::Early),
    ("babbage", CL100K, Format::Early),
    ("curie", CL100K, Format::Early),
    ("ada", CL100K, Format::Early),
    ("code-", CL100K, Format::Early),
    ("gpt-audio", O200K, Format::Omni),
    ("gpt-realtime", O200K, Format::Omni),
    ("gpt-", O200K, Format::Harmony),
    ("chatgpt-", O200K, Format::Omni),
    ("o1", O200K, Format::Reasoning),
    ("o3", O200K, Format::Reasoning),
    ("o4", O200K, Format::Reasoning),
    ("codex-", O200K, Format::Harmony),
    ("computer-use", O200K, Format::Omni),
];

const LLAMA: Template = template((4, 3), (144, 15, 100), 5);
/// It has a date in its template.
const LLAMA_3_1: Template = Template { request: 28, ..LLAMA };
const GLM: Template = Template { recalls: false, ..template((1, 2), (104, 15, 125), 18) };
const QWEN_3_5: Template = Template { argument: 8, ..template((6, 2), (199, 22, 142), 25) };
const MISTRAL: Template = template((2, -1), (5, 19, 136), 3);
const GEMINI_2: Template = Template { recalls: false, ..template((0, 0), (3, 8, 87), 12) };
const GROK_FAST: Template = grok(149, (149, 10, 103), 40);
const CLAUDE_4: Template = claude(1, (306, 17, 145), 0);
const CLAUDE_4_5: Template = claude(1, (494, 17, 143), 94);
const CLAUDE_4_6: Template = claude(1, (492, 18, 145), 92);
const CLAUDE_4_7: Template = claude(3, (690, 17, 165), 115);

/// Other families, also by the beginning of names, and before OpenAI's. They count in proportion to
/// `o200k_base`, in per cent: by what the vocabularies make of the same texts, and for those that are not
/// published by recorded exchanges. Beside each how many of those there were, plain and with tools.
const OTHERS: &[(&str, u64, Template)] = &[
    // 5, 13. Its template says who it is.
    ("gpt-oss", 100, Template { schema: Some((50, 100)), ..template((63, 3), (4, 14, 123), 20) }),
    ("llama-2", 135, Template { functions: 150, parameters: 125, ..LLAMA }),
    // 42, 28.
    ("llama-3.1", 105, LLAMA_3_1),
    ("llama-3.2", 105, LLAMA_3_1),
    ("llama-3.3", 105, LLAMA_3_1),
    ("llama", 105, LLAMA),
    ("meta-llama-3.1", 105, LLAMA_3_1),
    ("meta-llama", 105, LLAMA),
    // 8; 14 of k2.5, 16 of k2.
    ("kimi-k2.", 105, template((4, 2), (4, 8, 100), 20)),
    ("kimi", 105, template((4, 2), (5, 27, 125), 22)),
    ("minimax", 105, template((3, 2), (70, 15, 120), 15)),
    // 5; 16 of 4, 8 of 5.
    ("glm-4", 105, Template { call: 50, ..GLM }),
    ("glm", 105, GLM),
    // 83, 100. Whether it thinks unless it is told to has changed; mostly it did not.
    ("deepseek", 108, Template { argument: 10, thinking: 79, ..template((2, -1), (222, 13, 137), 33) }),
    // 19, 38. The template says more of tools than that of 3.
    ("qwen3.5", 103, QWEN_3_5),
    // 9, 13. Venice's name for it; Venice adds a prompt of its own.
    ("qwen3-5", 103, Template { functions: 981, ..QWEN_3_5 }),
    // 86, 78.
    ("qwen", 103, template((3, 3), (72, 24, 132), 18)),
    ("mistral-7b", 135, MISTRAL),
    // 0, 26. Venice's name for it, and Venice's prompt again.
    ("mistral-small-3-2", 110, template((2, -1), (960, 17, 133), 20)),
    ("mistral-small-2", 110, MISTRAL),
    ("mistral-small-3", 110, MISTRAL),
    // 29, 58. The latest has something more.
    ("mistral-small", 110, Template { request: 14, ..MISTRAL }),
    // 36, 40.
    ("mistral", 110, MISTRAL),
    ("ministral", 110, MISTRAL),
    ("magistral", 110, MISTRAL),
    ("codestral", 110, MISTRAL),
    ("pixtral", 110, MISTRAL),
    ("gemma", 108, template((0, 3), (10, 5, 100), 8)),
    // 0, 17.
    ("gemini-2.0", 100, Template { functions: 0, function: 0, parameters: 40, call: 8, ..GEMINI_2 }),
    // 86, 155.
    ("gemini-1", 100, GEMINI_2),
    ("gemini-2", 100, GEMINI_2),
    // 28, 54 of 3 and 3.5.
    ("gemini", 100, template((0, 0), (0, 11, 133), 8)),
    // 2, 12.
    ("grok-code", 100, Template { recalls: true, ..grok(194, (119, 15, 114), 40) }),
    // 4, 20.
    ("grok-4-fast", 100, GROK_FAST),
    ("grok-4.1-fast", 100, GROK_FAST),
    // 14, 32.
    ("grok-3-mini", 100, grok(128, (37, 18, 114), 20)),
    // 2, 27.
    ("grok", 100, grok(118, (53, 13, 126), 5)),
    // 16, 0.
    ("sonar", 100, template((0, 0), (0, 15, 100), 0)),
    ("command", 105, template((3, 3), (90, 15, 120), 15)),
    // 57, 18; what it is told of tools is published for these.
    ("claude-3", 110, Template { parameters: 142, function: 15, ..CLAUDE_4 }),
    // 99, 165.
    ("claude-sonnet-4-6", 106, CLAUDE_4_6),
    ("claude-opus-4-6", 106, CLAUDE_4_6),
    // 90, 127.
    ("claude-haiku-4", 110, CLAUDE_4_5),
    ("claude-opus-4-5", 110, CLAUDE_4_5),
    ("claude-sonnet-4-5", 110, CLAUDE_4_5),
    // 10, 9.
    ("claude-opus-4-7", 140, CLAUDE_4_7),
    ("claude-opus-4-8", 140, CLAUDE_4_7),
    // 9, 53.
    ("claude-sonnet-4", 110, CLAUDE_4),
    ("claude-opus-4", 110, CLAUDE_4),
    // 40, 21 of sonnet-5; the later ones are taken to be like it.
    ("claude", 140, Template { call: 32, ..claude(2, (372, 15, 170), 130) }),
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
    pub(super) arguments: u64,
    /// Messages of chats with several calls, and those that say something besides.
    pub(super) crowds: u64,
    pub(super) remarks: u64,
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
        let openai =
            || OPENAI.iter().find(|(prefix, ..)| name.starts_with(prefix)).map(|&(_, e, f)| (e, 100, f));
        let other = OTHERS.iter().find(|(prefix, ..)| name.starts_with(prefix));
        let other = other.map(|&(_, percent, template)| (O200K, percent, Format::Template(template)));
        let known = other.or_else(openai);
        let (encoding, percent, format) = known.unwrap_or(UNKNOWN);
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
    pub(super) fn sound(api: Api, tenths: u64) -> u64 {
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

    /// What a token of a schema comes to that is put into its prompt as it is, in per cent; `None`: it is
    /// written down without what only validates.
    pub(super) fn schema_percent(&self) -> Option<u64> {
        if let Format::Template(Template { schema: Some((_, percent)), .. }) = self.format {
            Some(percent)
        } else {
            None
        }
    }

    /// Whether what it thought before is put into its prompt again.
    pub(super) fn reads_thoughts(&self) -> bool {
        matches!(self.format, Format::Template(Template { recalls: true, .. }))
    }

    /// Whether tools are put into its prompt though none may be used.
    pub(super) fn reads_forbidden_tools(&self) -> bool {
        !matches!(self.format, Format::Template(Template { drops_forbidden: true, .. }))
    }

    /// Adds to the parts what the API adds to the request.
    pub(super) fn overhead(&self, facts: &Facts, parts: &mut [u64; PromptPart::ALL.len()]) {
        if matches!(facts.api, Api::Completions | Api::Embeddings) {
            return;
        }
        let overhead = self.format.overhead(facts.api);
        let times = |tokens: i64, n: u64| tokens.saturating_mul(i64::try_from(n).unwrap_or(i64::MAX));
        // Where a template takes less than was counted, and there is nothing left to take it from, the
        // messages pay: they were counted with their roles.
        let mut add = |part: PromptPart, tokens: i64| {
            let missing = tokens.unsigned_abs().saturating_sub(parts[part as usize]);
            parts[part as usize] = parts[part as usize].saturating_add_signed(tokens);
            if tokens < 0 {
                let messages = &mut parts[PromptPart::Messages as usize];
                *messages = messages.saturating_sub(missing);
            }
        };
        add(PromptPart::Overhead, overhead.request);
        add(PromptPart::Overhead, times(overhead.message, facts.messages));
        add(PromptPart::Overhead, times(overhead.assistant, facts.of_assistant));
        add(PromptPart::Overhead, times(overhead.call, facts.calls));
        add(PromptPart::Overhead, times(overhead.argument, facts.arguments));
        add(PromptPart::Overhead, times(overhead.crowd, facts.crowds));
        add(PromptPart::Overhead, times(overhead.remark, facts.remarks));
        add(PromptPart::Overhead, times(overhead.result, facts.results));
        if let Format::Template(Template { thinking, .. }) = self.format
            && facts.thinks == Some(true)
        {
            add(PromptPart::Overhead, thinking);
        }
        let after_system = if facts.has_system { overhead.after_system } else { 0 };
        if facts.has_functions {
            let choice = match facts.choice {
                Choice::Free => 0,
                Choice::Forbidden => overhead.forbidden,
                Choice::Required => overhead.required,
                Choice::Named => overhead.named,
            };
            add(PromptPart::Tools, overhead.functions + after_system + choice);
        }
        if facts.has_schema {
            add(PromptPart::Schema, overhead.schema + if facts.has_functions { 0 } else { after_system });
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
            ("anthropic/claude-sonnet-4.6", O200K, 106),
            ("claude-opus-4-7", O200K, 140),
            ("meta-llama/Llama-3-8b", O200K, 105),
            ("who-knows", O200K, 110),
            ("é", O200K, 110),
        ] {
            assert_eq!(Model::built_in(model).tokenizer, Tokenizer { encoding, percent }, "{model}");
        }
    }
}
