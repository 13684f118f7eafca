//! The built-in tables of models: vocabulary, prompt format and image rule of each family.

use super::PromptPart;
use super::media_rules::MediaRules;
use super::names::{MAX_NAME_BYTES, plain_name};
use super::overhead::{ChatTemplate, Format, PromptFacts, SchemaCost};
use super::provider::Provider;
use super::readers::Readers;
use super::thinking::ThinkingHabits;
use super::tokenizer::Tokenizer;
use super::tools::Style;
use super::vocabulary::Encoding;
use crate::api::Api;
use std::cell::RefCell;

/// The properties of a model that prompt estimates depend on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// Counts the model's tokens.
    pub tokenizer: Tokenizer,
    /// Whether a built-in table or a rule of the config has the model.
    pub is_known: bool,
    format: Format,
    media: MediaRules,
    thinking: ThinkingHabits,
    /// The entry of the tables; empty for an unknown model.
    family: &'static str,
    /// Tokens per request besides the messages, if the config sets them.
    overhead: Option<u32>,
    /// Multiplies the tokens of tools, in thousandths, if the config sets it.
    tool_factor: Option<u32>,
    /// The service that runs the model.
    provider: Provider,
}

/// The chat template of a model that is in neither table. Its figures are guesses, rather too high than too low.
/// The templates below take unset fields from it.
const TEMPLATE: ChatTemplate = ChatTemplate {
    request: 3,
    message: 3,
    system: 0,
    default_system: 0,
    description: 0,
    functions: 60,
    function: 15,
    parameters: 125,
    reads_types: false,
    reads_words: false,
    has_free_hosted: false,
    required: 0,
    serial: 0,
    call: 20,
    argument: 0,
    parallel_calls: 0,
    schema: None,
    reasoning: 0,
    drops_forbidden_tools: true,
};

/// A template by its fields: `request` and `message`; `functions`, `function` and `parameters`; `call`.
const fn template(
    (request, message): (i64, i64),
    (functions, function, parameters): (i64, u8, u8),
    call: i64,
) -> ChatTemplate {
    ChatTemplate { request, message, functions, function, parameters, call, ..TEMPLATE }
}

/// Anthropic's models. Fitted to 30 exchanges with reasoning, 14 with a schema, 109 with tool calls, 75 that must
/// call a tool and 115 with a system prompt. The system prompt is not a message: up to version 4.6 it costs fewer
/// tokens than one.
const fn claude(message: i64, functions: (i64, u8, u8), required: i64) -> ChatTemplate {
    ChatTemplate {
        system: -3,
        required,
        argument: 10,
        parallel_calls: 26,
        schema: Some(SchemaCost { request: 105, percent: 172 }),
        reasoning: 28,
        drops_forbidden_tools: false,
        ..template((4, message), functions, 41)
    }
}

/// xAI's models. Their prompt begins with a description of the model.
const fn grok(request: i64, functions: (i64, u8, u8), call: i64) -> ChatTemplate {
    ChatTemplate {
        schema: Some(SchemaCost { request: 20, percent: 100 }),
        drops_forbidden_tools: false,
        ..template((request, 2), functions, call)
    }
}

const O200K: Encoding = Encoding::O200k;
const CL100K: Encoding = Encoding::Cl100k;

/// OpenAI's models by the prefix of their name; the first match counts. The vocabularies are published in
/// tiktoken's list of models, so counts of text are exact.
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
    ("gpt-5.3", O200K, Format::Harmony),
    ("gpt-5.4", O200K, Format::Harmony),
    ("gpt-5.5", O200K, Format::Harmony),
    ("gpt-5.6", O200K, Format::Harmony),
    ("gpt-5.7", O200K, Format::Harmony),
    ("gpt-5.8", O200K, Format::Harmony),
    ("gpt-5.9", O200K, Format::Harmony),
    ("gpt-5", O200K, Format::FirstHarmony),
    ("gpt-", O200K, Format::Harmony),
    ("chatgpt-", O200K, Format::Omni),
    ("o1", O200K, Format::Reasoning),
    ("o3", O200K, Format::Reasoning),
    ("o4", O200K, Format::Reasoning),
    ("codex-", O200K, Format::Harmony),
    ("computer-use", O200K, Format::Omni),
];

// Templates that several entries of `OTHERS` share. Each entry gives the number of exchanges that its figures were
// fitted to.

const LLAMA: ChatTemplate = template((4, 3), (144, 15, 100), 5);
/// The template contains the date.
const LLAMA_3_1: ChatTemplate = ChatTemplate { request: 28, ..LLAMA };
const GLM: ChatTemplate = ChatTemplate { parallel_calls: -9, ..template((1, 2), (104, 15, 125), 18) };
const QWEN_3: ChatTemplate = ChatTemplate { parallel_calls: -6, ..template((3, 3), (72, 24, 132), 12) };
const QWEN_3_5: ChatTemplate =
    ChatTemplate { argument: 8, parallel_calls: -14, ..template((6, 2), (199, 22, 142), 18) };
const DEEPSEEK: ChatTemplate = ChatTemplate {
    argument: 10,
    parallel_calls: -25,
    reasoning: 79,
    ..template((2, -1), (222, 13, 137), 33)
};
const MISTRAL: ChatTemplate = ChatTemplate { parallel_calls: -13, ..template((2, -1), (5, 19, 136), 3) };
const GEMMA: ChatTemplate = template((0, 3), (10, 5, 100), 8);
const DEVSTRAL_2507: ChatTemplate = template((2, -1), (3, 12, 85), 3);
const GEMINI_2: ChatTemplate = ChatTemplate { has_free_hosted: true, ..template((0, 0), (3, 8, 87), 12) };
const GEMINI_3: ChatTemplate = ChatTemplate { has_free_hosted: true, ..template((0, 0), (0, 11, 133), 8) };
const GROK_FAST: ChatTemplate = grok(151, (147, 10, 103), 25);
const GROK_FAST_NON_REASONING: ChatTemplate = grok(167, (149, 10, 103), 25);
const GROK_3: ChatTemplate = ChatTemplate { description: 112, ..grok(118, (53, 13, 126), 5) };
// The prompt for tools invites Anthropic's models from version 4.5 on to call several at once. `serial` takes this
// paragraph back; without it all versions have about the same prompt.
const CLAUDE_4: ChatTemplate = ChatTemplate { serial: -20, ..claude(1, (306, 17, 145), 0) };
const CLAUDE_4_5: ChatTemplate = ChatTemplate { serial: -208, ..claude(1, (494, 17, 143), 94) };
const CLAUDE_4_6: ChatTemplate = ChatTemplate { system: -1, serial: -206, ..claude(1, (492, 18, 145), 92) };
const CLAUDE_4_7: ChatTemplate = ChatTemplate { system: 0, serial: -217, ..claude(3, (690, 17, 165), 115) };
const CLAUDE_5: ChatTemplate = ChatTemplate { system: 0, call: 32, ..claude(2, (372, 15, 170), 130) };

/// Other model families by the prefix of their name; the first match counts, before `OPENAI`.
///
/// The number is the tokens of the model per 100 tokens of `o200k_base`. It was measured on texts that both
/// vocabularies count. For models without a published vocabulary it was fitted to recorded exchanges.
///
/// A comment like "42 plain, 28 tools" gives the number of recorded exchanges that the entry was fitted to: with
/// text alone, and with tools. Measured in November 2026. Providers change their prompts: the figures are priors,
/// which calibration and `models` in the config replace.
const OTHERS: &[(&str, u64, ChatTemplate)] = &[
    // 5 plain, 13 tools. The template begins with a description of the model.
    (
        "gpt-oss",
        100,
        ChatTemplate {
            schema: Some(SchemaCost { request: 50, percent: 100 }),
            reads_types: true,
            ..template((63, 3), (19, 0, 100), 20)
        },
    ),
    ("llama-2", 135, ChatTemplate { functions: 150, parameters: 125, ..LLAMA }),
    // 42 plain, 28 tools.
    ("llama-3.1", 105, LLAMA_3_1),
    ("llama-3.2", 105, LLAMA_3_1),
    ("llama-3.3", 105, LLAMA_3_1),
    ("llama-4", 105, LLAMA),
    ("llama", 105, LLAMA),
    // 8 plain; tools: 14 with k2.5, 16 with k2.
    ("kimi-k2.", 105, ChatTemplate { parallel_calls: -11, ..template((4, 2), (4, 8, 100), 18) }),
    ("kimi", 105, template((4, 2), (5, 27, 125), 18)),
    ("moonshot", 105, template((4, 2), (5, 27, 125), 22)),
    // The template has a system prompt of its own.
    ("minimax-m2", 105, ChatTemplate { default_system: 25, ..template((12, 2), (70, 15, 120), 15) }),
    ("minimax", 105, template((3, 2), (70, 15, 120), 15)),
    // 5 plain; tools: 16 with version 4, 8 with version 5.
    ("glm-4", 105, ChatTemplate { call: -4, parallel_calls: 5, ..GLM }),
    ("glm-5.2", 105, ChatTemplate { request: 8, ..GLM }),
    ("glm-5.3", 105, ChatTemplate { request: 8, ..GLM }),
    ("glm", 105, GLM),
    // 83 plain, 100 tools. Whether it reasons by default has changed over time; in most exchanges it did not.
    ("deepseek-v3.1", 108, ChatTemplate { functions: 95, ..DEEPSEEK }),
    ("deepseek-r1", 108, ChatTemplate { functions: 95, ..DEEPSEEK }),
    ("deepseek", 108, DEEPSEEK),
    // 19 plain, 38 tools. The template has longer instructions for tools than that of version 3.
    ("qwen3.5", 103, QWEN_3_5),
    // 9 plain, 13 tools. The provider Venice uses this name, and adds its own prompt.
    ("qwen3-5", 103, ChatTemplate { functions: 981, ..QWEN_3_5 }),
    // The template writes each function as XML.
    ("qwen3-coder", 103, template((3, 3), (122, 40, 220), 18)),
    // 86 plain, 78 tools.
    ("qwen", 103, QWEN_3),
    ("qwq", 103, QWEN_3),
    ("qvq", 103, QWEN_3),
    ("mistral-7b", 135, MISTRAL),
    // 0 plain, 26 tools. Also at Venice, with its own prompt.
    ("mistral-small-3-2", 110, template((2, -1), (960, 17, 133), 20)),
    ("mistral-small-2", 110, MISTRAL),
    ("mistral-small-3", 110, MISTRAL),
    // 29 plain, 58 tools. The latest version adds 12 tokens for each request.
    ("mistral-small", 110, ChatTemplate { request: 14, ..MISTRAL }),
    // 36 plain, 40 tools.
    ("mistral", 110, MISTRAL),
    ("ministral", 110, MISTRAL),
    ("magistral-small", 110, ChatTemplate { request: 13, ..MISTRAL }),
    ("magistral", 110, MISTRAL),
    ("codestral", 110, MISTRAL),
    ("pixtral", 110, MISTRAL),
    ("voxtral", 110, MISTRAL),
    ("devstral-small-2507", 110, DEVSTRAL_2507),
    ("devstral-medium-2507", 110, DEVSTRAL_2507),
    ("devstral", 110, MISTRAL),
    ("mixtral", 135, MISTRAL),
    // The template has no place for a system prompt: it joins the first message.
    ("gemma-3n", 108, ChatTemplate { default_system: 11, ..GEMMA }),
    ("gemma-3", 108, ChatTemplate { default_system: 4, ..GEMMA }),
    ("gemma", 108, GEMMA),
    // 0 plain, 17 tools.
    ("gemini-2.0", 100, ChatTemplate { functions: 3, call: 8, reads_words: true, ..GEMINI_2 }),
    // 86 plain, 155 tools.
    ("gemini-1", 100, GEMINI_2),
    ("gemini-2", 100, GEMINI_2),
    // 28 plain, 54 tools, of versions 3 and 3.5.
    ("gemini-3.", 100, GEMINI_3),
    ("gemini-3", 100, GEMINI_3),
    ("gemini", 100, GEMINI_3),
    // 2 plain, 12 tools.
    ("grok-code", 100, grok(200, (113, 15, 114), 25)),
    // 4 plain, 20 tools.
    ("grok-4-fast-non-reasoning", 100, GROK_FAST_NON_REASONING),
    ("grok-4.1-fast-non-reasoning", 100, GROK_FAST_NON_REASONING),
    ("grok-4-fast", 100, GROK_FAST),
    ("grok-4.1-fast", 100, GROK_FAST),
    // 18 tools. The prompt was 118 until the middle of 2026.
    ("grok-4.3", 100, grok(191, (-20, 13, 126), 5)),
    // 38 plain.
    ("grok-2", 100, GROK_3),
    // 14 plain, 32 tools.
    ("grok-3-mini", 100, ChatTemplate { description: 122, ..grok(128, (37, 18, 114), 20) }),
    ("grok-3", 100, GROK_3),
    // 2 plain, 27 tools. At times the prompt of grok-4 was 683.
    ("grok", 100, grok(118, (53, 13, 126), 5)),
    // 16 plain, 0 tools.
    ("sonar", 100, template((0, 0), (0, 15, 100), 0)),
    ("command", 105, template((3, 3), (90, 15, 120), 15)),
    ("claude-2", 110, CLAUDE_4),
    ("claude-instant", 110, CLAUDE_4),
    // 57 plain, 18 tools. Anthropic publishes the size of the tool prompt for these models.
    ("claude-3", 110, ChatTemplate { parameters: 142, function: 15, ..CLAUDE_4 }),
    // 99 plain, 165 tools.
    ("claude-sonnet-4-6", 105, CLAUDE_4_6),
    ("claude-opus-4-6", 105, CLAUDE_4_6),
    // 90 plain, 127 tools.
    ("claude-haiku-4", 110, CLAUDE_4_5),
    ("claude-opus-4-5", 110, CLAUDE_4_5),
    ("claude-sonnet-4-5", 110, CLAUDE_4_5),
    // 10 plain, 9 tools.
    ("claude-opus-4-7", 140, CLAUDE_4_7),
    ("claude-opus-4-8", 117, ChatTemplate { functions: 305, serial: 0, ..CLAUDE_4_7 }),
    // 9 plain, 53 tools.
    ("claude-sonnet-4", 110, CLAUDE_4),
    ("claude-opus-4", 110, CLAUDE_4),
    // 40 plain, 21 tools.
    ("claude-sonnet-5", 140, CLAUDE_5),
    ("claude-opus-5", 108, CLAUDE_5),
    ("claude-fable-5", 108, CLAUDE_5),
    // Later models are assumed to be between these.
    ("claude", 120, CLAUDE_5),
];

/// Families with one token for each digit.
const SPLITS_DIGITS: &[&str] =
    &["gemini-1", "gemini-2.0", "gemini-2", "gemini-3.", "gemini-3", "gemini", "gemma"];

/// A model in neither table.
const UNKNOWN: (&str, Encoding, u64, Format) = ("", O200K, 110, Format::Template(TEMPLATE));

thread_local! {
    static RECENT: RefCell<RecentModels> = const { RefCell::new(RecentModels { models: Vec::new(), next: 0 }) };
}

/// Names that this thread has looked up. To find a name in the tables takes a microsecond, a quarter of the time of a
/// short request.
struct RecentModels {
    models: Vec<(Box<str>, Model)>,
    /// Index of the model that is replaced next.
    next: usize,
}

impl RecentModels {
    const MAX: usize = 16;

    fn model(&mut self, name: &str) -> Model {
        if let Some((_, model)) = self.models.iter().find(|(recent, _)| **recent == *name) {
            return *model;
        }
        let model = Model::find(name);
        if name.len() > MAX_NAME_BYTES {
            return model;
        }
        let entry = (name.into(), model);
        // The list grows until `next` returns to its start.
        match self.models.get_mut(self.next) {
            Some(oldest) => *oldest = entry,
            None => self.models.push(entry),
        }
        self.next = (self.next + 1) % Self::MAX;
        model
    }
}

/// What a provider changes in the template of a family.
#[derive(Clone, Copy)]
enum Change {
    /// `request` has this value.
    Request(i64),
    /// `functions` has this value.
    Functions(i64),
    /// The model reads the words of functions only. `functions`, `message` and `call` have these values. Calls have
    /// fewer words than their JSON has tokens.
    Words(i64, i64, i64),
}

/// Families by the prefix of their name that read another prompt at a provider.
const AT_PROVIDERS: &[(Provider, &str, Change)] = &[
    // Azure does not add xAI's description of the model.
    (Provider::Azure, "grok", Change::Request(1)),
    // The date is missing at OpenRouter.
    (Provider::Router, "llama-3.2", Change::Request(5)),
    (Provider::Router, "llama-3.3", Change::Request(5)),
    // Groq adds long instructions for calls.
    (Provider::Groq, "llama-4", Change::Functions(650)),
    // Without the roles of messages.
    (Provider::Vertex, "gemini", Change::Words(0, -1, -3)),
    // Most routers send requests with Google's models to Vertex AI. The newest ones are not there yet.
    (Provider::Router, "gemini-1", Change::Words(0, 0, -3)),
    (Provider::Router, "gemini-2.0", Change::Words(3, 0, 8)),
    (Provider::Router, "gemini-2", Change::Words(0, 0, -3)),
    (Provider::Router, "gemini-3.", Change::Request(0)),
    (Provider::Router, "gemini-3", Change::Words(0, 0, -3)),
];

impl Model {
    /// The model of this name in the built-in tables. The costs of an unknown model are guesses, rather too high
    /// than too low.
    pub(super) fn built_in(name: &str) -> Self {
        RECENT.with_borrow_mut(|recent| recent.model(name))
    }

    fn find(name: &str) -> Self {
        let name = plain_name(name, is_family);
        let openai = || OPENAI.iter().find(|(prefix, ..)| name.starts_with(prefix));
        let openai = || openai().map(|&(family, encoding, format)| (family, encoding, 100, format));
        let other = OTHERS.iter().find(|(prefix, ..)| name.starts_with(prefix));
        let other =
            other.map(|&(family, percent, template)| (family, O200K, percent, Format::Template(template)));
        let known = other.or_else(openai);
        let (family, encoding, percent, format) = known.unwrap_or(UNKNOWN);
        Self {
            tokenizer: Tokenizer { encoding, percent, splits_digits: SPLITS_DIGITS.contains(&family) },
            is_known: known.is_some(),
            format,
            media: MediaRules::of_model(&name),
            thinking: ThinkingHabits::of_model(&name),
            family,
            overhead: None,
            tool_factor: None,
            provider: Provider::Unknown,
        }
    }

    /// The same model at this provider.
    #[must_use]
    pub fn at(self, provider: Provider) -> Self {
        let is_changed =
            |(at, family, _): &&(Provider, &str, Change)| *at == provider && self.family.starts_with(*family);
        let format = match (self.format, AT_PROVIDERS.iter().find(is_changed)) {
            (Format::Template(template), Some((.., Change::Request(request)))) => {
                Format::Template(ChatTemplate { request: *request, ..template })
            }
            (Format::Template(template), Some((.., Change::Functions(functions)))) => {
                Format::Template(ChatTemplate { functions: *functions, ..template })
            }
            (Format::Template(template), Some((.., Change::Words(functions, message, call)))) => {
                let (functions, message, call) = (*functions, *message, *call);
                Format::Template(ChatTemplate { functions, message, call, reads_words: true, ..template })
            }
            (format, _) => format,
        };
        Self {
            provider,
            format,
            thinking: self.thinking.at(provider),
            media: self.media.at(provider),
            ..self
        }
    }

    /// The same model with figures of the config: tokens per request besides the messages, and the factor of tools in
    /// thousandths.
    pub(super) fn with_figures(self, overhead: Option<u32>, tool_factor: Option<u32>) -> Self {
        Self { overhead, tool_factor, ..self }
    }

    /// Tokens per request besides the messages, if the config sets them.
    pub fn overhead(&self) -> Option<u32> {
        self.overhead
    }

    /// The factor of tools in thousandths, if the config sets it.
    pub fn tool_factor(&self) -> Option<u32> {
        self.tool_factor
    }

    /// The API that reaches the model. Routers send chats with OpenAI's later models to the Responses API.
    fn read_by(&self, api: Api) -> Api {
        let is_late =
            matches!(self.format, Format::FirstHarmony | Format::Harmony) || self.family == "gpt-4.1";
        let is_converted = api == Api::Chat && self.provider == Provider::Router && is_late;
        if is_converted { Api::Responses } else { api }
    }

    /// The service that runs the model.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// The same model with this vocabulary. An unknown model with a vocabulary of OpenAI's is taken as a model of
    /// OpenAI's.
    pub(super) fn with_encoding(self, encoding: Encoding) -> Self {
        let base = match encoding {
            Encoding::O200k if !self.is_known => Self::built_in("gpt-4o"),
            Encoding::Cl100k if !self.is_known => Self::built_in("gpt-4"),
            _ => self,
        };
        Self { tokenizer: Tokenizer::exact(encoding), is_known: true, ..base }
    }

    /// How the model charges for images, documents, sound and video.
    pub(super) fn media(&self) -> &MediaRules {
        &self.media
    }

    /// Whether texts are counted exactly: the model is one of OpenAI's.
    pub(super) fn counts_exactly(&self) -> bool {
        !matches!(self.format, Format::Template(_))
    }

    /// The models that read the same texts as this one.
    pub(super) fn reader(&self, api: Api) -> Readers {
        match (self.format, self.read_by(api)) {
            (Format::Template(_) | Format::Early, _) => Readers::AS_SENT,
            (_, Api::Responses) => Readers::APART,
            _ => Readers::JOINED,
        }
    }

    /// The form in which the model reads functions.
    pub(super) fn style(&self, api: Api) -> Style {
        self.format.style(self.read_by(api))
    }

    /// Whether a schema for the answer is in the prompt.
    pub(super) fn reads_schema(&self) -> bool {
        !matches!(self.format, Format::Template(ChatTemplate { schema: None, .. }))
    }

    /// Tokens of the model per 100 tokens of a schema that is in the prompt as it is. `None`: the prompt has
    /// the schema without the keywords that only validate.
    pub(super) fn schema_percent(&self) -> Option<u64> {
        if let Format::Template(ChatTemplate { schema: Some(schema), .. }) = self.format {
            Some(schema.percent)
        } else {
            None
        }
    }

    /// Which reasoning of earlier answers is in the prompt.
    pub(super) fn thinking(&self) -> ThinkingHabits {
        self.thinking
    }

    /// Whether tools are in the prompt even if the model must not call them.
    pub(super) fn reads_forbidden_tools(&self) -> bool {
        !matches!(self.format, Format::Template(ChatTemplate { drops_forbidden_tools: true, .. }))
    }

    /// Whether the name of a tool that must be called is in the prompt.
    pub(super) fn names_chosen_tool(&self, api: Api) -> bool {
        self.format.names_chosen_tool(self.read_by(api))
    }

    /// Adds the overhead of a request to its parts.
    pub(super) fn add_overhead(&self, facts: &PromptFacts, parts: &mut [u64; PromptPart::ALL.len()]) {
        let api = self.read_by(facts.api);
        let facts = PromptFacts { api, is_converted: api != facts.api, ..*facts };
        self.format.add_overhead(&facts, self.overhead, parts);
        if let Some(factor) = self.tool_factor {
            let tools = &mut parts[PromptPart::Tools as usize];
            *tools = tools.saturating_mul(u64::from(factor)).div_ceil(1_000);
        }
    }
}

/// Whether a model of this name is in a table. The name is in lower case.
pub(super) fn is_family(name: &str) -> bool {
    OTHERS.iter().any(|(prefix, ..)| name.starts_with(prefix))
        || OPENAI.iter().any(|(prefix, ..)| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recent_names_are_bounded_and_stay_right() {
        let mut recent = RecentModels { models: Vec::new(), next: 0 };
        for round in 0..3 {
            for at in 0..20 {
                let name = format!("gpt-4o-{at}");
                assert_eq!(recent.model(&name), Model::find(&name), "{round}");
            }
            assert_eq!(recent.model("claude-3"), Model::find("claude-3"));
        }
        assert_eq!(recent.model(&"x".repeat(300)), Model::find("x"));
        assert_eq!(recent.models.len(), RecentModels::MAX);
    }

    #[test]
    fn a_model_name_selects_the_encoding() {
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
            ("anthropic/claude-sonnet-4.6", O200K, 105),
            ("claude-opus-4-7", O200K, 140),
            ("meta-llama/Llama-3-8b", O200K, 105),
            ("who-knows", O200K, 110),
            ("é", O200K, 110),
        ] {
            assert_eq!(
                Model::built_in(model).tokenizer,
                Tokenizer { encoding, percent, splits_digits: false },
                "{model}"
            );
        }
    }
}
