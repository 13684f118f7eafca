//! The prompt of a request: readers of bodies fill it, and `estimate` counts it.

mod calls;

use super::attachments::Attachments;
use super::count_cache::HashedText;
use super::identity::{
    AnswerReference, Identity, IdentityPart, KnownTexts, PromptPrefix, PromptSizes, ReferenceKind,
};
use super::images::{ImageDetail, ImageUrlKey, PromptImage};
use super::keyed_hash::KeyedHash;
use super::media::{Pdf, Recording};
use super::models::Model;
use super::overhead::{MessageCounts, PromptFacts, ToolRequirement};
use super::readers::Readers;
use super::thinking::{EarlierThinking, EncryptedCost, EncryptedThought, ThinkingTokens, ThoughtContent};
use super::tools::{self, AnswerSchema, ToolCost, ToolList};
use super::{PromptEstimate, PromptPart, RequestKind, vocabulary};
use crate::api::Api;
use calls::{CallItems, JoinedResults};
use std::borrow::Cow;

/// `estimate_if_quick` does not count texts with a longer stretch without a space (bytes).
const MAX_QUICK_RUN: usize = 256;
/// A prompt with more text (bytes) is not tokenised. Two bytes count as a token: no long text in any language has
/// more tokens.
const MAX_COUNTED_BYTES: usize = 4 * 1024 * 1024;
/// Number of tools that a conversation can load.
const MAX_LOADED_TOOLS: usize = 256;
/// Number of texts that are stored separately. In further texts, two bytes count as a token: a list of millions of
/// tiny texts would take many times the memory of its body.
const MAX_TEXTS: usize = 1 << 17;
/// Number of images by URL whose cost is looked up.
const MAX_IMAGE_URLS: usize = 64;
/// Number of references to earlier answers that are looked up.
const MAX_REFERENCES: usize = 64;

/// The author of a message, as far as it affects the cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Instructions of the developer.
    System,
    /// The model.
    Assistant,
    /// The user.
    User,
    /// Any other author, or an item that is not a message.
    #[default]
    Other,
    /// A tool: the result of a call.
    Tool,
}

/// The input of the model for a request: texts to count, and known numbers of tokens.
///
/// Each method that adds something also adds it to the identity of the prompt.
#[derive(Debug, Default)]
pub struct Prompt<'a> {
    api: Api,
    identity: Identity,
    /// The texts that an earlier request has counted.
    known: KnownTexts,
    /// Texts to count.
    texts: Vec<PromptText<'a>>,
    /// Bytes of the texts beyond `MAX_TEXTS`.
    excess_bytes: u64,
    /// Known tokens by part.
    tokens: [u64; PromptPart::ALL.len()],
    counts: MessageCounts,
    /// The results that follow calls of one message (chat API).
    results: JoinedResults,
    /// The calls before the next item (Responses API).
    call_items: CallItems,
    /// Reasoning of earlier answers. Some models read it again.
    thinking: EarlierThinking<'a>,
    /// Index of the first text of the first system message.
    system: Option<usize>,
    /// The lists of tool definitions.
    tools: Vec<ToolList<'a>>,
    /// Names of tools with `defer_loading` that the conversation has loaded.
    loaded_tools: Vec<Cow<'a, str>>,
    tool_requirement: ToolRequirement,
    /// The model may call one tool at a time only.
    is_serial: bool,
    /// Name of the tool that must be called; empty without one.
    chosen_tool: Cow<'a, str>,
    schema: Option<AnswerSchema<'a>>,
    /// Whether the request turns the model's reasoning on or off.
    reasons: Option<bool>,
    attachments: Attachments<'a>,
    /// The images that the request has by URL only.
    image_urls: Vec<ImageUrlKey>,
    /// Bytes of documents that were decompressed so far; `media` bounds them.
    pub(crate) inflated: usize,
    /// Number of prompts in a list. Each gets its own answers.
    pub prompts: u64,
    /// Number of references to content outside the request.
    pub unseen: u64,
    /// References to earlier answers.
    references: Vec<AnswerReference<'a>>,
    /// Number of messages before the last message of the user.
    last_user_message: Option<u64>,
}

/// A text to count.
#[derive(Debug)]
struct PromptText<'a> {
    part: PromptPart,
    text: HashedText<'a>,
    /// The number of times that it is in the prompt.
    times: u32,
    readers: Readers,
}

/// Filling.
impl<'a> Prompt<'a> {
    pub(crate) fn of(api: Api) -> Self {
        Self { api, ..Self::default() }
    }

    /// A governed field of the body begins.
    pub(crate) fn begin_field(&mut self, name: &'static str) {
        self.identity.begin_field(name, self.texts.len());
    }

    /// Adds text that is not counted and that identifies content outside the request: a URL or an id.
    pub(crate) fn identify(&mut self, text: &str) {
        self.identity.add_text(IdentityPart::Reference, &text.into());
    }

    /// Adds a reference to an earlier answer.
    pub(crate) fn refer_to_answer(&mut self, kind: ReferenceKind, id: Cow<'a, str>) {
        self.identify(&id);
        if self.references.len() < MAX_REFERENCES {
            self.references.push(AnswerReference { id, kind, message: self.counts.messages });
        }
        self.unseen += u64::from(kind != ReferenceKind::Reasoning);
    }

    /// Adds a text that is in the prompt `times` times.
    pub(crate) fn add_text(&mut self, part: PromptPart, text: Cow<'a, str>, times: u32) {
        self.add_text_for(Readers::ALL, part, text, times);
    }

    /// Adds a text that is in the prompt of these models `times` times.
    pub(super) fn add_text_for(
        &mut self,
        readers: Readers,
        part: PromptPart,
        text: Cow<'a, str>,
        times: u32,
    ) {
        if text.is_empty() {
            return;
        }
        if self.texts.len() < MAX_TEXTS {
            let text = HashedText::of(text);
            self.identity.add_text(IdentityPart::Text, &text);
            self.texts.push(PromptText { part, text, times, readers });
        } else {
            self.excess_bytes += text.len() as u64 * u64::from(times);
        }
    }

    /// Adds another form of texts that were added for other models.
    pub(super) fn add_rendered(&mut self, readers: Readers, part: PromptPart, text: String) {
        if self.texts.len() < MAX_TEXTS {
            self.texts.push(PromptText { part, text: HashedText::of(text.into()), times: 1, readers });
        }
    }

    /// Adds a known number of tokens.
    pub(crate) fn add_tokens(&mut self, part: PromptPart, tokens: u64) {
        self.identity.add_number(IdentityPart::Tokens, tokens);
        let sum = &mut self.tokens[part as usize];
        *sum = sum.saturating_add(tokens);
    }

    /// Number of texts so far: the index of the next text.
    pub(crate) fn text_count(&self) -> usize {
        self.texts.len()
    }

    /// Ends a message. Its texts begin at the index `first_text`.
    pub(crate) fn end_message(&mut self, role: Role, first_text: usize) {
        if role == Role::User {
            self.thinking.end_user_message(self.counts.messages);
            self.last_user_message = Some(self.counts.messages);
        }
        self.counts.messages += 1;
        self.counts.assistant += u64::from(role == Role::Assistant);
        self.counts.results += u64::from(role == Role::Tool);
        if role == Role::System && self.system.is_none() && first_text < self.texts.len() {
            self.system = Some(first_text);
        }
        let so_far = PromptSizes {
            texts: self.texts.len(),
            thoughts: self.thinking.count(),
            unseen: self.unseen,
            calls: self.counts.calls,
            messages: self.counts.messages,
        };
        self.identity.end_message(role, so_far);
    }

    /// Adds reasoning of an earlier answer. It belongs to the message that ends next.
    pub(crate) fn add_reasoning(&mut self, text: Cow<'a, str>) {
        if text.is_empty() {
            return;
        }
        let bytes = text.len() as u64;
        let text = HashedText::of(text);
        self.identity.add_text(IdentityPart::Reasoning, &text);
        if !self.thinking.add(self.counts.messages, ThoughtContent::Text(text)) {
            self.excess_bytes += bytes;
        }
    }

    /// Adds reasoning of an earlier answer in base64, which only the provider can decrypt.
    pub(crate) fn add_encrypted_reasoning(&mut self, base64: &str) {
        if !base64.is_empty() {
            let thought = EncryptedThought::of(base64);
            self.identity.add_number(IdentityPart::Encrypted, thought.characters);
            self.thinking.add(self.counts.messages, ThoughtContent::Encrypted(thought));
        }
    }

    /// Adds a summary of earlier messages in base64, which only the provider can decrypt. Every model reads it.
    pub(crate) fn add_encrypted_summary(&mut self, base64: &str) {
        self.add_tokens(PromptPart::Messages, EncryptedCost::OPENAI.tokens(base64.len() as u64));
    }

    /// Adds the JSON of a list of tool definitions.
    pub(crate) fn add_tools(&mut self, json: &'a str) {
        self.add_tool_list(json, ToolList::of);
    }

    /// Adds the JSON of a list of tool definitions that the conversation has loaded.
    pub(crate) fn add_loaded_tools(&mut self, json: &'a str) {
        self.add_tool_list(json, ToolList::of_loaded);
    }

    fn add_tool_list(&mut self, json: &'a str, read: fn(&'a str) -> ToolList<'a>) {
        if json != "null" {
            let tools = read(json);
            self.identity.add_number(IdentityPart::Tools, tools.hash.0);
            self.tools.push(tools);
        }
    }

    /// The conversation has loaded the tool with this name, which may have `defer_loading`.
    pub(crate) fn load_tool(&mut self, name: Cow<'a, str>) {
        self.identify(&name);
        if !name.is_empty() && self.loaded_tools.len() < MAX_LOADED_TOOLS {
            self.loaded_tools.push(name);
        }
    }

    /// The model must not call a tool.
    pub(crate) fn forbid_tools(&mut self) {
        self.identity.add_number(IdentityPart::ToolRequirement, 1);
        self.tool_requirement = ToolRequirement::Forbidden;
    }

    /// The model may call one tool at a time only.
    pub(crate) fn forbid_parallel_calls(&mut self) {
        self.identity.add_number(IdentityPart::ToolRequirement, 3);
        self.is_serial = true;
    }

    /// The model must call a tool.
    pub(crate) fn require_tools(&mut self) {
        self.identity.add_number(IdentityPart::ToolRequirement, 2);
        self.tool_requirement = ToolRequirement::Required;
    }

    /// The model must call this tool.
    pub(crate) fn require_tool_named(&mut self, name: Cow<'a, str>) {
        self.tool_requirement = ToolRequirement::Named;
        let name = HashedText::of(name);
        self.identity.add_text(IdentityPart::ToolRequirement, &name);
        self.chosen_tool = name.text;
    }

    /// The request turns the model's reasoning on or off.
    pub(crate) fn set_reasoning(&mut self, reasons: bool) {
        self.identity.add_number(IdentityPart::Reasons, u64::from(reasons));
        self.reasons = Some(reasons);
    }

    /// The request sets a reasoning effort of at most `medium`, which counts as no reasoning. An explicit
    /// `set_reasoning` takes precedence.
    pub(crate) fn default_to_no_reasoning(&mut self) {
        self.identity.add_number(IdentityPart::Reasons, 2);
        self.reasons.get_or_insert(false);
    }

    /// Sets the JSON schema that the answer has to match, with its name and description.
    pub(crate) fn set_answer_schema(&mut self, name: Cow<'a, str>, description: Cow<'a, str>, json: &'a str) {
        if !description.is_empty() {
            self.add_tokens(PromptPart::Schema, 1);
            self.add_text(PromptPart::Schema, description, 1);
        }
        let name = HashedText::of(name);
        self.identity.add_text(IdentityPart::Schema, &name);
        self.identity.add_text(IdentityPart::Schema, &json.into());
        self.schema = Some(AnswerSchema { name: name.text, json });
    }

    /// Adds an image by its width and height in pixels; `None` if the size is unknown.
    pub(crate) fn add_image(&mut self, size: Option<(u32, u32)>, detail: ImageDetail) {
        let (width, height) = size.unwrap_or_default();
        self.identity.add_number(IdentityPart::Image, u64::from(width) << 32 | u64::from(height));
        self.identity.add_number(IdentityPart::Image, detail as u64);
        self.attachments.add_image(PromptImage { size, detail });
    }

    /// Adds an image by its URL, which is not fetched.
    pub(crate) fn add_image_at(&mut self, url: &str, detail: ImageDetail) {
        self.identify(url);
        if !url.is_empty() && self.image_urls.len() < MAX_IMAGE_URLS {
            let hash = KeyedHash::of_text(url.as_bytes()).with(detail as u64).value();
            self.image_urls.push(ImageUrlKey { hash, message: self.counts.messages });
        }
        self.add_image(None, detail);
    }

    /// The images that the request has by URL only.
    pub(crate) fn image_urls(&self) -> &[ImageUrlKey] {
        &self.image_urls
    }

    /// Adds the pages of a document.
    pub(crate) fn add_document(&mut self, pdf: Pdf) {
        self.identity.add_number(IdentityPart::Pages, pdf.pages.iter().map(|(_, count)| count).sum());
        self.identity.add_number(IdentityPart::Pages, pdf.text.more_characters);
        let text = self.attachments.add_document(pdf);
        self.identity.add_text(IdentityPart::Pages, text);
    }

    /// Adds sound or video.
    pub(crate) fn add_recording(&mut self, recording: Recording) {
        self.identity.add_number(IdentityPart::Recording, recording.milliseconds);
        self.identity.add_number(IdentityPart::Recording, u64::from(recording.is_video));
        self.attachments.add_recording(recording);
    }

    /// Adds a file by its name, which may be empty. Its content is added separately.
    pub(crate) fn add_file(&mut self, name: Cow<'a, str>) {
        let name = HashedText::of(name);
        self.identity.add_text(IdentityPart::FileName, &name);
        self.attachments.add_file(name);
    }
}

/// Recognising.
impl<'a> Prompt<'a> {
    /// The keyed hash of the system messages at the beginning of the messages; 0 without one.
    pub fn system(&self) -> u64 {
        self.identity.system()
    }

    /// The keyed hash of the settings: of everything but the messages.
    pub fn settings(&self) -> u64 {
        self.identity.settings()
    }

    /// The prefixes of the messages, the longest one first: all messages. Shorter prefixes are left out if there are
    /// many. Embeddings and completions have none.
    pub fn prefixes(&self) -> impl Iterator<Item = PromptPrefix> {
        self.identity.prefixes()
    }

    /// The references to earlier answers.
    pub fn references(&self) -> impl Iterator<Item = &AnswerReference<'a>> {
        self.references.iter()
    }

    /// Whether a reference is before the last message of the user. Most models do not read reasoning there.
    pub(crate) fn is_earlier(&self, reference: &AnswerReference<'_>) -> bool {
        self.last_user_message.is_some_and(|last| reference.message <= last)
    }

    /// Whether a message of the user is in the prompt.
    pub fn has_user_message(&self) -> bool {
        self.last_user_message.is_some()
    }

    /// Sets the number of text tokens of a prefix of this prompt (see `PromptEstimate::message_texts`). They are not
    /// counted again.
    pub fn set_known(&mut self, prefix: &PromptPrefix, tokens: u64) {
        self.known = self.identity.known_texts(prefix, tokens);
    }
}

/// Counting.
impl Prompt<'_> {
    /// Counts the prompt if that takes at most about 50 microseconds: most of its texts are cached, and the
    /// others are short and ordinary. `None` otherwise.
    pub fn estimate_if_quick(&self, model: &Model) -> Option<PromptEstimate> {
        vocabulary::begin_request();
        let tokenizer = model.tokenizer;
        let mut uncached = 0;
        let mut count = |text: &HashedText<'_>| {
            tokenizer.count_if_cached(text).or_else(|| {
                uncached += text.text.len();
                let is_quick =
                    uncached <= tokenizer.max_quick_bytes() && longest_run(&text.text) <= MAX_QUICK_RUN;
                is_quick.then(|| tokenizer.count_hashed(text))
            })
        };
        let style = model.style(self.api);
        self.sum(model, &mut count, &|list| tools::count_if_cached(tokenizer, style, list))
    }

    /// Counts the prompt with the model's tokenizer. Takes about 20 microseconds per KiB of text.
    pub fn estimate(&self, model: &Model) -> PromptEstimate {
        vocabulary::begin_request();
        let is_rough = self.bytes() > MAX_COUNTED_BYTES;
        let estimate = if is_rough { self.sum_roughly(model) } else { self.sum_exactly(model) };
        let estimate = estimate.unwrap_or_default();
        PromptEstimate { is_rough: is_rough || estimate.is_rough, ..estimate }
    }

    fn bytes(&self) -> usize {
        self.texts.iter().map(|text| text.text.text.len()).sum::<usize>()
            + self.thinking.text_bytes()
            + self.attachments.text_bytes()
            + self.tools.iter().map(|list| list.json.len()).sum::<usize>()
    }

    /// Counts two bytes per token.
    fn sum_roughly(&self, model: &Model) -> Option<PromptEstimate> {
        let tokens = |text: &str| text.len() as u64 / 2;
        let tool_cost = |list: ToolList<'_>| {
            Some(ToolCost { tokens: tokens(list.json), has_functions: true, has_hosted: false })
        };
        self.sum(model, &mut |text| Some(tokens(&text.text)), &tool_cost)
    }

    fn sum_exactly(&self, model: &Model) -> Option<PromptEstimate> {
        let (tokenizer, style) = (model.tokenizer, model.style(self.api));
        self.sum(model, &mut |text| Some(tokenizer.count_hashed(text)), &|list| {
            Some(tools::count(tokenizer, style, list))
        })
    }

    /// Adds up all parts. `None` as soon as `count` or `count_tools` returns `None`.
    fn sum(
        &self,
        model: &Model,
        count: &mut dyn FnMut(&HashedText<'_>) -> Option<u64>,
        count_tools: &dyn Fn(ToolList<'_>) -> Option<ToolCost>,
    ) -> Option<PromptEstimate> {
        let mut parts = self.tokens;
        let mut add = |part: PromptPart, tokens: u64| parts[part as usize] += tokens;
        let tools = self.tool_cost(model, count_tools)?;
        add(PromptPart::Tools, tools.tokens);
        // The functions follow the first system message on a new line.
        let joined = self.system.filter(|_| tools.has_functions);
        let of_messages = self.identity.message_texts();
        let (mut message_texts, mut settings_texts, mut echo) = (self.known.tokens, 0, 0);
        add(PromptPart::Messages, self.known.tokens);
        let reader = model.reader(self.api);
        for (at, PromptText { part, text, times, readers }) in self.texts.iter().enumerate() {
            if self.known.texts.contains(&at) || !readers.include(reader) {
                continue;
            }
            let is_joined = joined == Some(at);
            let tokens = if is_joined { count(&format!("{}\n", text.text).into())? } else { count(text)? };
            let tokens = tokens * u64::from(*times);
            add(*part, tokens);
            message_texts += if of_messages.contains(&at) { tokens } else { 0 };
            settings_texts += if of_messages.contains(&at) { 0 } else { tokens };
            echo += if self.known.echo.contains(&at) { tokens } else { 0 };
        }
        let thinking = self.thinking_tokens(model, count)?;
        add(PromptPart::Messages, thinking.all);
        if self.tool_requirement == ToolRequirement::Named && model.names_chosen_tool(self.api) {
            add(PromptPart::Tools, count(&(&*self.chosen_tool).into())?);
        }
        let schema = self.schema.as_ref().filter(|_| model.reads_schema());
        if let Some(schema) = schema {
            add(PromptPart::Schema, schema_tokens(schema, model, count)?);
        }
        add(PromptPart::Messages, self.excess_bytes / 2);
        let attached = self.attachments.tokens(model.media(), self.api, count)?;
        add(PromptPart::Images, attached.images);
        add(PromptPart::Messages, attached.others);
        let facts = PromptFacts {
            api: self.api,
            is_converted: false,
            counts: self.counts,
            tool_requirement: self.tool_requirement,
            is_serial: self.is_serial,
            reasons: self.reasons,
            has_system: self.system.is_some(),
            has_functions: tools.has_functions,
            has_schema: schema.is_some(),
        };
        model.add_overhead(&facts, &mut parts);
        Some(PromptEstimate {
            parts,
            is_rough: self.excess_bytes > 0,
            unseen: self.unseen,
            is_partial: tools.has_hosted || self.unseen > 0,
            kind: self.kind(),
            message_texts,
            settings_texts,
            echo: if model.counts_exactly() { 0 } else { echo },
            echo_thinking: thinking.of_echo,
            recalls_reasoning: self.recalls_reasoning(model),
            reads_references: model.thinking().reads_references,
            is_known_model: model.is_known,
        })
    }

    /// The tokens of earlier reasoning that the model reads.
    fn thinking_tokens(
        &self,
        model: &Model,
        count: &mut dyn FnMut(&HashedText<'_>) -> Option<u64>,
    ) -> Option<ThinkingTokens> {
        let habits = model.thinking();
        let mut sum = ThinkingTokens::default();
        for (at, thought) in self.thinking.read_by(habits) {
            let tokens = match thought {
                ThoughtContent::Text(text) if habits.reads_text => count(text)?,
                ThoughtContent::Text(_) => 0,
                ThoughtContent::Encrypted(thought) => habits.encrypted.of(*thought),
            };
            sum.all += tokens;
            if self.known.echo_thoughts.contains(&at) {
                sum.of_echo += tokens.saturating_sub(habits.encrypted.format);
            }
        }
        Some(sum)
    }

    /// Whether the model reads the reasoning of the answer after the known prefix, although the prompt does not have it.
    fn recalls_reasoning(&self, model: &Model) -> bool {
        let is_referenced = || {
            let is_echo = |r: &AnswerReference<'_>| self.known.echo_messages.contains(&r.message);
            self.references.iter().any(|r| r.kind == ReferenceKind::Reasoning && is_echo(r))
        };
        let habits = model.thinking();
        habits.is_recalled && self.known.has_calls_last || habits.reads_references && is_referenced()
    }

    fn tool_cost(&self, model: &Model, count: &dyn Fn(ToolList<'_>) -> Option<ToolCost>) -> Option<ToolCost> {
        let mut sum = ToolCost::default();
        if self.tool_requirement == ToolRequirement::Forbidden && !model.reads_forbidden_tools() {
            return Some(sum);
        }
        for list in &self.tools {
            let cost = count(list.with_loaded(&self.loaded_tools))?;
            sum.tokens += cost.tokens;
            sum.has_functions |= cost.has_functions;
            sum.has_hosted |= cost.has_hosted;
        }
        Some(sum)
    }

    pub(crate) fn kind(&self) -> RequestKind {
        if !self.attachments.is_empty() {
            RequestKind::Images
        } else if !self.tools.is_empty() || self.schema.is_some() {
            RequestKind::Tools
        } else {
            RequestKind::Plain
        }
    }
}

fn schema_tokens(
    schema: &AnswerSchema<'_>,
    model: &Model,
    count: &mut dyn FnMut(&HashedText<'_>) -> Option<u64>,
) -> Option<u64> {
    match model.schema_percent() {
        Some(percent) => Some((count(&schema.whole().into())? * percent).div_ceil(100)),
        None => count(&schema.rendered().into()),
    }
}

/// The longest stretch of a text without a space, in bytes. One long run of dashes is the slowest text to
/// tokenise: 40 times slower per byte than words.
fn longest_run(text: &str) -> usize {
    let mut last = 0;
    let spaces = memchr::memchr_iter(b' ', text.as_bytes()).chain([text.len()]);
    spaces.into_iter().map(|at| at - std::mem::replace(&mut last, at)).max().unwrap_or(0)
}
