//! Tokens that an API adds to a prompt for its messages, tools and schema.

use super::PromptPart;
use super::tools::Style;
use crate::api::Api;

/// The prompt format of a model family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenAI's models with `cl100k_base`.
    Early,
    /// OpenAI's models with `o200k_base` that do not reason.
    Omni,
    /// OpenAI's o-series.
    Reasoning,
    /// OpenAI's models from gpt-5 up to gpt-5.2.
    FirstHarmony,
    /// OpenAI's later models.
    Harmony,
    /// All other models: a chat template with the tools as JSON.
    Template(ChatTemplate),
}

/// Tokens that the chat template of a model family adds, in tokens of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChatTemplate {
    /// For each request.
    pub(super) request: i64,
    /// For each message.
    pub(super) message: i64,
    /// For a request with a system prompt, in addition to those of a message.
    pub(super) system: i64,
    /// For a request without a system prompt: the prompt that the template has instead.
    pub(super) default_system: i64,
    /// The part of `request` that is in the prompt of a chat only if there are functions that the model may call, but
    /// need not.
    pub(super) description: i64,
    /// For each request with functions.
    pub(super) functions: i64,
    /// For each function.
    pub(super) function: u8,
    /// Tokens of the model per 100 `o200k_base` tokens of the parameters' compact JSON.
    pub(super) parameters: u8,
    /// Whether the model reads functions as TypeScript types, and not as JSON.
    pub(super) reads_types: bool,
    /// Whether the model reads the words of functions only (`Style::Words`).
    pub(super) reads_words: bool,
    /// Whether tools that the provider hosts cost nothing by themselves.
    pub(super) has_free_hosted: bool,
    /// For a request that must call a tool.
    pub(super) required: i64,
    /// For a request that allows one call at a time and leaves the choice to the model.
    pub(super) serial: i64,
    /// For each tool call together with its result.
    pub(super) call: i64,
    /// For each argument of a tool call.
    pub(super) argument: i64,
    /// For each message with several tool calls, in addition. Most templates join their results, which saves tokens.
    pub(super) parallel_calls: i64,
    /// The cost of a schema for the answer. `None`: the schema is not in the prompt, it only constrains the
    /// generation.
    pub(super) schema: Option<SchemaCost>,
    /// For a request that turns reasoning on.
    pub(super) reasoning: i64,
    /// Whether tools that must not be called are left out of the prompt.
    pub(super) drops_forbidden_tools: bool,
}

/// The cost of a schema for the answer that is in the prompt as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SchemaCost {
    /// Tokens for each request with a schema.
    pub(super) request: i64,
    /// Tokens of the model per 100 tokens of the schema's compact JSON.
    pub(super) percent: u64,
}

/// Tokens that an API adds to a request, in tokens of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Overhead {
    /// For each request, including the start of the reply.
    request: i64,
    /// For each message: the separators.
    message: i64,
    /// For a request with a system prompt.
    system: i64,
    /// For a request without one.
    default_system: i64,
    /// The part of `request` that a chat has only if there are functions that the model may call, but need not.
    description: i64,
    /// For each message of the assistant, in addition.
    assistant: i64,
    /// For each tool call.
    call: i64,
    /// For each argument of a tool call.
    argument: i64,
    /// For each message with several tool calls.
    parallel_calls: i64,
    /// For each of these calls but the first.
    further_call: i64,
    /// For each call that the provider has stored by itself.
    stored_call: i64,
    /// For each line break between results that are joined, if it is a token of its own.
    result_break: i64,
    /// For each space that is added to the JSON of results that are joined.
    result_space: i64,
    /// For each result in a message with the name of its tool.
    named_result: i64,
    /// For each message with tool calls and text.
    call_with_text: i64,
    /// For each result of a tool call.
    result: i64,
    /// For each request with functions.
    functions: i64,
    /// For each request with functions or a schema and a system message, which contains them at its end.
    after_system: i64,
    /// For each request with a schema for the answer.
    schema: i64,
    /// For each message of the assistant with text in such a request.
    answer_with_schema: i64,
    /// For a request that must call one named tool, in addition to the name.
    required_by_name: i64,
    /// For a request that must call some tool.
    required: i64,
    /// For a request that must not call a tool.
    forbidden: i64,
    /// For a request that allows one call at a time and leaves the choice to the model.
    serial: i64,
}

// Several calls of a message, with two results or more, cost the same in the chat API as one call and one result, apart
// from their text (`calls`): `further_call` takes back `call` and the message of the result. In the Responses API, each
// call and each result is an item of its own.

/// OpenAI's first models. From OpenAI's cookbook, "How to count tokens with tiktoken"; functions by the project
/// openai-chat-tokens.
const EARLY: Overhead = Overhead {
    request: 3,
    message: 3,
    system: 0,
    default_system: 0,
    description: 0,
    assistant: 0,
    call: 4,
    argument: 0,
    parallel_calls: 15,
    further_call: 0,
    stored_call: 0,
    result_break: 0,
    result_space: 0,
    named_result: 1,
    call_with_text: 6,
    result: -1,
    functions: 9,
    after_system: -4,
    schema: 7,
    answer_with_schema: 0,
    required_by_name: 4,
    required: 0,
    forbidden: 1,
    serial: 0,
};

/// Models with `o200k_base` that do not reason, in the chat API. Fitted to 115 exchanges with tools and 29 with a
/// schema.
const OMNI_CHAT: Overhead = Overhead {
    call: 5,
    parallel_calls: 10,
    further_call: -9,
    result_break: 1,
    result_space: 1,
    named_result: 0,
    call_with_text: 4,
    result: 0,
    functions: 3,
    schema: 8,
    answer_with_schema: 3,
    required_by_name: 7,
    ..EARLY
};

/// The same models in the Responses API. Fitted to 79 exchanges with tools and 28 with a schema.
const OMNI_RESPONSES: Overhead = Overhead {
    call: 5,
    parallel_calls: 0,
    stored_call: 3,
    named_result: 0,
    call_with_text: 0,
    result: 0,
    functions: -3,
    after_system: 0,
    schema: 1,
    required_by_name: 7,
    required: 9,
    serial: 21,
    ..EARLY
};

/// Models from gpt-5 on in the chat API. Fitted to 46 exchanges with text alone, 22 with tools and 11 with a
/// schema.
const HARMONY_CHAT: Overhead = Overhead {
    request: 2,
    assistant: 2,
    call: 9,
    parallel_calls: 10,
    further_call: -13,
    result_break: 1,
    result_space: 1,
    named_result: 0,
    call_with_text: 6,
    result: 0,
    functions: 84,
    after_system: 0,
    schema: 5,
    answer_with_schema: 3,
    ..EARLY
};

/// The same models in the Responses API. Fitted to 83 exchanges with text alone, 81 with tools and 55 with a
/// schema.
const HARMONY_RESPONSES: Overhead = Overhead {
    request: 2,
    assistant: 2,
    call: 14,
    parallel_calls: 16,
    further_call: -6,
    named_result: 0,
    call_with_text: 0,
    result: 0,
    functions: 3,
    after_system: 0,
    schema: 0,
    required_by_name: 0,
    forbidden: 0,
    serial: 78,
    ..EARLY
};

/// gpt-5 up to gpt-5.2 in the Responses API.
const FIRST_HARMONY_RESPONSES: Overhead =
    Overhead { call: 11, parallel_calls: 0, further_call: 0, ..HARMONY_RESPONSES };

/// The o-series in the chat API. It differs from gpt-5 in the tools.
const REASONING_CHAT: Overhead = Overhead { functions: 3, ..HARMONY_CHAT };

/// The o-series in the Responses API.
const REASONING_RESPONSES: Overhead = Overhead { functions: -1, ..FIRST_HARMONY_RESPONSES };

impl ChatTemplate {
    const fn overhead(&self) -> Overhead {
        Overhead {
            request: self.request,
            message: self.message,
            system: self.system,
            default_system: self.default_system,
            description: self.description,
            assistant: 0,
            call: self.call,
            argument: self.argument,
            parallel_calls: self.parallel_calls,
            further_call: 0,
            stored_call: 0,
            result_break: 0,
            result_space: 0,
            named_result: 1,
            call_with_text: 0,
            result: 0,
            functions: self.functions,
            after_system: 0,
            schema: if let Some(schema) = self.schema { schema.request } else { 0 },
            answer_with_schema: 0,
            required_by_name: self.required,
            required: self.required,
            forbidden: 0,
            serial: self.serial,
        }
    }
}

/// How many messages and tool calls a prompt has.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MessageCounts {
    pub(super) messages: u64,
    /// Messages of the assistant.
    pub(super) assistant: u64,
    /// Tool calls.
    pub(super) calls: u64,
    /// Arguments of all tool calls.
    pub(super) arguments: u64,
    /// Messages with several tool calls.
    pub(super) parallel_calls: u64,
    /// The calls in these messages without the first of each.
    pub(super) further_calls: u64,
    /// Calls that the provider has stored, and that have no other call beside them.
    pub(super) stored_calls: u64,
    /// Results of several calls whose line break is a token of its own.
    pub(super) result_breaks: u64,
    /// Spaces that are added to results of several calls.
    pub(super) result_spaces: u64,
    /// Results with the name of their tool.
    pub(super) named_results: u64,
    /// Messages with tool calls.
    pub(super) call_messages: u64,
    /// Messages with text and tool calls.
    pub(super) calls_with_text: u64,
    /// Results of tool calls.
    pub(super) results: u64,
}

/// Whether the model may or must call a tool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ToolRequirement {
    /// The model decides.
    #[default]
    Free,
    /// The model must not call a tool.
    Forbidden,
    /// The model must call a tool.
    Required,
    /// The model must call one named tool. Its name is counted separately.
    Named,
}

impl MessageCounts {
    /// Messages of the assistant with text.
    fn answers(&self) -> u64 {
        (self.assistant + self.calls_with_text).saturating_sub(self.call_messages)
    }

    /// The same calls as items of the Responses API: each call and each result is an item without a role, and a message
    /// that has only calls is no item.
    fn converted(self, overhead: &Overhead) -> i64 {
        let only_calls = self.call_messages.saturating_sub(self.calls_with_text);
        let items = overhead.message.saturating_sub(1);
        times(items, self.calls) - times(overhead.message + 1 + overhead.assistant, only_calls)
    }
}

/// The properties of a prompt that determine its overhead.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PromptFacts {
    pub(super) api: Api,
    /// Whether a chat was converted to a request of the Responses API.
    pub(super) is_converted: bool,
    pub(super) counts: MessageCounts,
    pub(super) tool_requirement: ToolRequirement,
    /// Whether the model may call one tool at a time only.
    pub(super) is_serial: bool,
    /// Whether the request turns the model's reasoning on or off.
    pub(super) reasons: Option<bool>,
    pub(super) has_system: bool,
    pub(super) has_functions: bool,
    pub(super) has_schema: bool,
}

impl Format {
    /// The constants of the format in an API.
    const fn overhead(self, api: Api) -> Overhead {
        match (self, api) {
            (Self::Early, _) => EARLY,
            (Self::Omni, Api::Responses) => OMNI_RESPONSES,
            (Self::Omni, _) => OMNI_CHAT,
            (Self::Reasoning, Api::Responses) => REASONING_RESPONSES,
            (Self::Reasoning, _) => REASONING_CHAT,
            (Self::FirstHarmony, Api::Responses) => FIRST_HARMONY_RESPONSES,
            (Self::Harmony, Api::Responses) => HARMONY_RESPONSES,
            (Self::FirstHarmony | Self::Harmony, _) => HARMONY_CHAT,
            (Self::Template(template), _) => template.overhead(),
        }
    }

    /// The form in which the model reads functions.
    pub(super) const fn style(self, api: Api) -> Style {
        match (self, api) {
            (Self::Early, _) => Style::Lines,
            (Self::Template(ChatTemplate { reads_types: true, .. }), _) => Style::Compact,
            (Self::Template(ChatTemplate { reads_words: true, .. }), _) => Style::Words,
            (Self::Template(template), _) => {
                let is_flat = matches!(api, Api::Responses);
                let ChatTemplate { function, parameters: percent, has_free_hosted, .. } = template;
                Style::Json { function, percent, is_flat, has_free_hosted }
            }
            (_, Api::Responses) => Style::Titled,
            _ => Style::Compact,
        }
    }

    /// Whether the name of a tool that must be called is in the prompt.
    pub(super) fn names_chosen_tool(self, api: Api) -> bool {
        self.overhead(api).required_by_name > 0
    }

    /// Adds the overhead of a request to its parts. `per_request` replaces the tokens for each request.
    pub(super) fn add_overhead(
        self,
        facts: &PromptFacts,
        per_request: Option<u32>,
        parts: &mut [u64; PromptPart::ALL.len()],
    ) {
        if matches!(facts.api, Api::Completions | Api::Embeddings) {
            return;
        }
        let mut overhead = self.overhead(facts.api);
        if let Some(tokens) = per_request {
            overhead = Overhead { request: i64::from(tokens), default_system: 0, description: 0, ..overhead };
        }
        // A template can cost less than the estimate so far, which makes `tokens` negative. If a part has too few
        // tokens, the rest is subtracted from the messages, because their roles were counted in advance.
        let mut add = |part: PromptPart, tokens: i64| {
            let missing = tokens.unsigned_abs().saturating_sub(parts[part as usize]);
            parts[part as usize] = parts[part as usize].saturating_add_signed(tokens);
            if tokens < 0 {
                let messages = &mut parts[PromptPart::Messages as usize];
                *messages = messages.saturating_sub(missing);
            }
        };
        for tokens in overhead.of_messages(&facts.counts) {
            add(PromptPart::Overhead, tokens);
        }
        if facts.is_converted {
            add(PromptPart::Overhead, facts.counts.converted(&overhead));
        }
        add(PromptPart::Overhead, if facts.has_system { overhead.system } else { overhead.default_system });
        if let Self::Template(template) = self
            && facts.reasons == Some(true)
        {
            add(PromptPart::Overhead, template.reasoning);
        }
        let may_call = facts.has_functions && facts.tool_requirement == ToolRequirement::Free;
        if facts.api == Api::Chat && !may_call {
            add(PromptPart::Overhead, -overhead.description);
        }
        let after_system = if facts.has_system { overhead.after_system } else { 0 };
        if facts.has_functions {
            let choice = overhead.of_tool_requirement(facts.tool_requirement, facts.is_serial);
            add(PromptPart::Tools, overhead.functions + after_system + choice);
        }
        if facts.has_schema {
            let after_system = if facts.has_functions { 0 } else { after_system };
            add(PromptPart::Schema, overhead.schema + after_system);
            add(PromptPart::Schema, times(overhead.answer_with_schema, facts.counts.answers()));
        }
    }
}

fn times(tokens: i64, n: u64) -> i64 {
    tokens.saturating_mul(i64::try_from(n).unwrap_or(i64::MAX))
}

impl Overhead {
    fn of_messages(&self, counts: &MessageCounts) -> [i64; 13] {
        [
            self.request,
            times(self.message, counts.messages),
            times(self.assistant, counts.assistant),
            times(self.call, counts.calls),
            times(self.argument, counts.arguments),
            times(self.parallel_calls, counts.parallel_calls),
            times(self.further_call, counts.further_calls),
            times(self.stored_call, counts.stored_calls),
            times(self.result_break, counts.result_breaks),
            times(self.result_space, counts.result_spaces),
            times(self.named_result, counts.named_results),
            times(self.call_with_text, counts.calls_with_text),
            times(self.result, counts.results),
        ]
    }

    fn of_tool_requirement(&self, choice: ToolRequirement, is_serial: bool) -> i64 {
        match choice {
            ToolRequirement::Free if is_serial => self.serial,
            ToolRequirement::Free => 0,
            ToolRequirement::Forbidden => self.forbidden,
            ToolRequirement::Required => self.required,
            ToolRequirement::Named => self.required_by_name,
        }
    }
}
