//! The tokens of tool definitions.
//!
//! A model reads tools as a TypeScript namespace or as JSON, according to its [`Style`]. The oldest form was found
//! by experiment (the project openai-chat-tokens, and posts by OpenAI's staff). The later ones were fitted to
//! recorded exchanges; `models` has the constants.

mod compact;
mod reader;
mod rendering;
mod schema;

pub(super) use compact::{AnswerSchema, compact, separators};
pub(super) use rendering::Style;

use super::count_cache::{CacheKey, CachedCount, TextHash};
use super::tokenizer::Tokenizer;
use reader::ToolListReader;
use rendering::Rendering;
use std::borrow::Cow;

/// Tokens added for a hosted tool (web search and the like). The providers do not publish these figures.
const HOSTED_TOOL_TOKENS: u64 = 300;
/// Bound of the rendered text, as a multiple of the definition's size: each reference renders its schema again.
const MAX_RENDERING_FACTOR: usize = 4;
/// Bound of the bytes read, as a multiple of the definition's size: members of unions and referenced schemas
/// are read again wherever they are rendered.
const MAX_READ_FACTOR: usize = 64;

/// The JSON of a list of tools, with its hash.
#[derive(Clone, Copy, Debug)]
pub(super) struct ToolList<'a> {
    pub(super) json: &'a str,
    pub(super) hash: TextHash,
    loaded: LoadedTools<'a>,
}

/// The tools of a list that are in the prompt although they have `defer_loading`.
#[derive(Clone, Copy, Debug)]
enum LoadedTools<'a> {
    All,
    /// Those that the conversation names.
    Named(&'a [Cow<'a, str>]),
}

impl<'a> ToolList<'a> {
    /// Tools of a request. Tools with `defer_loading` are not in the prompt.
    pub(super) fn of(json: &'a str) -> Self {
        Self { json, hash: TextHash::of(json.as_bytes()), loaded: LoadedTools::Named(&[]) }
    }

    /// Tools that the conversation has loaded.
    pub(super) fn of_loaded(json: &'a str) -> Self {
        let tools = Self::of(json);
        if tools.has_deferred() { tools.with(LoadedTools::All, &["all"]) } else { tools }
    }

    /// The same list in a conversation that has loaded the tools with these names.
    pub(super) fn with_loaded<'b>(self, names: &'b [Cow<'b, str>]) -> ToolList<'b>
    where
        'a: 'b,
    {
        let is_affected = !names.is_empty() && matches!(self.loaded, LoadedTools::Named(_));
        if is_affected && self.has_deferred() { self.with(LoadedTools::Named(names), names) } else { self }
    }

    fn with<'b>(self, loaded: LoadedTools<'b>, parts: &[impl AsRef<str>]) -> ToolList<'b>
    where
        'a: 'b,
    {
        let parts: Vec<&str> = [self.json].into_iter().chain(parts.iter().map(AsRef::as_ref)).collect();
        ToolList { json: self.json, hash: TextHash::of(parts.join("\n").as_bytes()), loaded }
    }

    fn has_deferred(&self) -> bool {
        memchr::memmem::find(self.json.as_bytes(), b"defer_loading").is_some()
    }

    fn is_loaded(&self, name: &str) -> bool {
        match self.loaded {
            LoadedTools::All => true,
            LoadedTools::Named(names) => names.iter().any(|loaded| loaded == name),
        }
    }
}

/// The cost of a list of tools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ToolCost {
    /// Tokens of the model.
    pub(super) tokens: u64,
    /// Whether the list has a function.
    pub(super) has_functions: bool,
    /// Whether the list has a tool that the provider hosts.
    pub(super) has_hosted: bool,
}

impl ToolCost {
    /// Packs the cost into one number for the cache. It is never 0, because 0 means an empty slot.
    fn pack(self) -> u64 {
        (self.tokens + 1) << 2 | u64::from(self.has_hosted) << 1 | u64::from(self.has_functions)
    }

    fn unpack(packed: u64) -> Self {
        let tokens = (packed >> 2).saturating_sub(1);
        Self { tokens, has_functions: packed & 1 == 1, has_hosted: packed & 2 == 2 }
    }
}

/// The cost of a list of tools if it is cached. Callers send the same tools with every request.
pub(super) fn count_if_cached(tokenizer: Tokenizer, style: Style, tools: ToolList<'_>) -> Option<ToolCost> {
    key(tokenizer, style, tools.hash).cached().map(ToolCost::unpack)
}

/// The cost of a list of tools: from the cache, or rendered and counted.
pub(super) fn count(tokenizer: Tokenizer, style: Style, tools: ToolList<'_>) -> ToolCost {
    let key = key(tokenizer, style, tools.hash);
    if let Some(packed) = key.cached() {
        return ToolCost::unpack(packed);
    }
    let cost = render_and_count(tokenizer, style, tools);
    key.insert(cost.pack());
    cost
}

/// The cache key. It differs from the key of the same JSON as a text.
fn key(tokenizer: Tokenizer, style: Style, hash: TextHash) -> CacheKey {
    let (counted, constants) = match style {
        Style::Lines => (CachedCount::ToolsInLines, 0),
        Style::Compact => (CachedCount::CompactTools, 0),
        Style::Titled => (CachedCount::TitledTools, 0),
        Style::Json { function, percent, .. } => {
            (CachedCount::JsonTools, u16::from_be_bytes([percent, function]))
        }
        Style::Words => (CachedCount::ToolWords, 0),
    };
    let flat = u64::from(style.is_flat()) << 47 | u64::from(style.has_free_hosted()) << 46;
    CacheKey::of(tokenizer.scaled_id() | u64::from(constants) << 48 | flat, counted, hash)
}

fn render_and_count(tokenizer: Tokenizer, style: Style, tools: ToolList<'_>) -> ToolCost {
    let json = tools.json;
    let max_text = json.len() * MAX_RENDERING_FACTOR + 256;
    let max_read = json.len().saturating_mul(MAX_READ_FACTOR) + (1 << 16);
    // Anything but a list of tools counts as text; the upstream will reject the request.
    let Some(list) = ToolListReader::read(tools, Rendering::new(style, max_text, max_read), style.is_flat())
    else {
        return ToolCost { tokens: tokenizer.count(json), ..ToolCost::default() };
    };
    let mut tokens = if style.has_free_hosted() { 0 } else { list.hosted * HOSTED_TOOL_TOKENS };
    let rendered = &list.rendering;
    if let Style::Json { function, percent, .. } = style {
        let parameters = Tokenizer::exact(tokenizer.encoding).count(&rendered.parameters);
        tokens += tokenizer.count(&rendered.text)
            + (parameters * u64::from(percent)).div_ceil(100)
            + list.functions * u64::from(function);
    } else if style == Style::Words {
        tokens += tokenizer.count(rendered.text.trim_end());
    } else if list.functions > 0 {
        tokens += tokenizer.count(&namespace(style, &rendered.text));
    }
    ToolCost { tokens, has_functions: list.functions > 0, has_hosted: list.hosted > 0 }
}

fn namespace(style: Style, functions: &str) -> String {
    let head = if style == Style::Lines { "" } else { "# Tools\n\n## functions\n\n" };
    format!("{head}namespace functions {{\n\n{functions}}} // namespace functions")
}
