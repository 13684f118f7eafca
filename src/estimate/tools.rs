//! Definitions of tools and of the answer's schema, as the model reads them: a TypeScript namespace, and JSON
//! without what only a validator needs. The first form was found by experiment (openai-chat-tokens, and
//! posts by OpenAI's staff), the later ones by fitting exchanges with the API; the figures stand in `models`.

use super::known::{Key, Thing};
use super::tokenizer::Tokenizer;
use crate::json::{Expected, JsonVisitor, Visit, element, raw, string, value};
use rustc_hash::FxHashSet;
use serde::de::{DeserializeSeed as _, IgnoredAny, MapAccess, SeqAccess};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// A tool that the provider brings along: what it adds to the prompt is published nowhere.
const HOSTED_TOOL: u64 = 300;
/// Schemas nested deeper are `any`.
const DEEPEST: usize = 16;
/// No rendering gets this many times longer than what it renders: references repeat what they refer to.
const LONGEST_RENDERING: usize = 4;

/// No definition is read more often than this on the whole: what is in unions and behind references is read again
/// wherever it is rendered.
const MOST_READINGS: usize = 64;

/// How functions are written down for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// A property a line, as models with `cl100k_base` had them.
    Lines,
    /// Objects whose properties have no descriptions on one line.
    Compact,
    /// The same, with titles.
    Titled,
    /// What is said of a function as the text that it is, its parameters as compact JSON, of which a token
    /// comes to so many of the model's, in per cent; so many tokens stand around each function.
    Json { function: u8, percent: u8 },
}

/// What a list of tools costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cost {
    pub(super) tokens: u64,
    /// Whether there is a function among them.
    pub(super) has_functions: bool,
    /// Whether there is one that the provider brings along.
    pub(super) has_hosted: bool,
}

/// What a list of tools costs, if it was counted lately: callers send theirs with every request.
pub(super) fn count_if_known(tokenizer: Tokenizer, style: Style, json: &str) -> Option<Cost> {
    key(tokenizer, style, json).count().map(unpacked)
}

/// Renders a list of tools and counts that.
pub(super) fn count(tokenizer: Tokenizer, style: Style, json: &str) -> Cost {
    let key = key(tokenizer, style, json);
    let packed = key.count().unwrap_or_else(|| {
        let cost = count_anew(tokenizer, style, json);
        let packed = (cost.tokens + 1) << 2 | u64::from(cost.has_hosted) << 1 | u64::from(cost.has_functions);
        key.remember(packed);
        packed
    });
    unpacked(packed)
}

/// Tools are not known by the same key as the text that they are written in.
fn key(tokenizer: Tokenizer, style: Style, json: &str) -> Key {
    let (thing, how) = match style {
        Style::Lines => (Thing::ToolsInLines, 0),
        Style::Compact => (Thing::CompactTools, 0),
        Style::Titled => (Thing::TitledTools, 0),
        Style::Json { function, percent } => (Thing::JsonTools, u16::from_be_bytes([percent, function])),
    };
    Key::of(tokenizer.scaled_tag() | u64::from(how) << 48, thing, json.as_bytes())
}

fn unpacked(packed: u64) -> Cost {
    let tokens = (packed >> 2).saturating_sub(1);
    Cost { tokens, has_functions: packed & 1 == 1, has_hosted: packed & 2 == 2 }
}

fn count_anew(tokenizer: Tokenizer, style: Style, json: &str) -> Cost {
    let most = json.len() * LONGEST_RENDERING + 256;
    let work = json.len().saturating_mul(MOST_READINGS) + (1 << 16);
    let rendering = Rendering { style, text: String::new(), parameters: String::new(), most, work };
    let mut tools = Tools { rendering, functions: 0, hosted: 0 };
    // What is no list of tools is for the upstream to refuse: it is taken as the text that it is.
    if Visit(&mut tools).deserialize(&mut serde_json::Deserializer::from_str(json)).is_err() {
        return Cost { tokens: tokenizer.count(json), ..Cost::default() };
    }
    let mut tokens = tools.hosted * HOSTED_TOOL;
    let rendered = &tools.rendering;
    if let Style::Json { function, percent } = style {
        let parameters = Tokenizer::exact(tokenizer.encoding).count(&rendered.parameters);
        tokens += tokenizer.count(&rendered.text)
            + (parameters * u64::from(percent)).div_ceil(100)
            + tools.functions * u64::from(function);
    } else if tools.functions > 0 {
        tokens += tokenizer.count(&namespace(style, &rendered.text));
    }
    Cost { tokens, has_functions: tools.functions > 0, has_hosted: tools.hosted > 0 }
}

fn namespace(style: Style, functions: &str) -> String {
    let head = if style == Style::Lines { "" } else { "# Tools\n\n## functions\n\n" };
    format!("{head}namespace functions {{\n\n{functions}}} // namespace functions")
}

/// A schema for the answer, by its name.
#[derive(Debug)]
pub(super) struct AnswerSchema<'a> {
    pub(super) name: Cow<'a, str>,
    pub(super) json: &'a str,
}

impl AnswerSchema<'_> {
    /// As it stands in the prompt.
    pub(super) fn rendered(&self) -> String {
        let mut text = format!("# Response Formats\n\n## {}\n\n", self.name);
        compact(self.json, VALIDATING, &mut text);
        text
    }

    /// All of it.
    pub(super) fn whole(&self) -> String {
        let mut text = String::new();
        compact(self.json, &[], &mut text);
        text
    }
}

/// What of a schema only validates.
const VALIDATING: &[&str] = &[
    "\"additionalProperties\"",
    "\"required\"",
    "\"$schema\"",
    "\"format\"",
    "\"minimum\"",
    "\"maximum\"",
    "\"exclusiveMinimum\"",
    "\"exclusiveMaximum\"",
    "\"multipleOf\"",
    "\"minLength\"",
    "\"maxLength\"",
    "\"minItems\"",
    "\"maxItems\"",
    "\"pattern\"",
];

/// Writes JSON without the spaces between its parts, and without some members of its schemas.
/// In one pass and without a tree: a member that is left out is cut away again at its end.
fn compact(json: &str, without: &[&str], out: &mut String) {
    let mut objects: Vec<Open> = Vec::new();
    let mut chars = json.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            c if c.is_ascii_whitespace() => {}
            '"' => {
                let end = at + 1 + end_of_string(&json[at + 1..]);
                let text = json.get(at..end).unwrap_or_default();
                if let Some(open) = objects.last_mut().filter(|open| open.expects_key) {
                    open.begin_member(text, without, out.len());
                }
                out.push_str(text);
                while chars.offset() < end && chars.next().is_some() {}
            }
            '{' | '[' => {
                let names = objects.last().is_some_and(|open| open.holds_names);
                objects.push(Open {
                    is_object: c == '{',
                    expects_key: c == '{',
                    is_named: names,
                    ..Open::default()
                });
                out.push(c);
            }
            '}' | ']' => {
                if let Some(mut open) = objects.pop() {
                    open.end_member(out);
                }
                if out.ends_with(',') {
                    out.pop();
                }
                out.push(c);
            }
            ',' => {
                let was_cut = objects.last_mut().is_some_and(|open| open.end_member(out));
                if let Some(open) = objects.last_mut() {
                    open.expects_key = open.is_object;
                }
                if !was_cut {
                    out.push(',');
                }
            }
            c => out.push(c),
        }
    }
}

/// How long a string is from behind its opening quote, with the closing one.
fn end_of_string(rest: &str) -> usize {
    let mut at = 0;
    while let Some(found) = memchr::memchr2(b'"', b'\\', &rest.as_bytes()[at..]) {
        at += found;
        if rest.as_bytes()[at] == b'"' {
            return at + 1;
        }
        at = (at + 2).min(rest.len());
    }
    rest.len()
}

/// An object or a list that has begun and not ended.
#[derive(Default)]
struct Open {
    is_object: bool,
    expects_key: bool,
    /// Its members are named by the caller, not by JSON Schema.
    is_named: bool,
    /// The member that has begun has members named by the caller.
    holds_names: bool,
    /// Where the member begins that is to be left out.
    cut: Option<usize>,
}

impl Open {
    fn begin_member(&mut self, key: &str, without: &[&str], at: usize) {
        self.expects_key = false;
        let is_word = !self.is_named;
        self.holds_names = is_word && matches!(key, "\"properties\"" | "\"$defs\"" | "\"definitions\"");
        self.cut = (is_word && without.contains(&key)).then_some(at);
    }

    fn end_member(&mut self, out: &mut String) -> bool {
        self.holds_names = false;
        self.cut.take().map(|at| out.truncate(at)).is_some()
    }
}

/// A list of tools, in any provider's shape.
struct Tools {
    rendering: Rendering,
    functions: u64,
    hosted: u64,
}

impl<'a> JsonVisitor<'a> for Tools {
    fn text(&mut self, _: Cow<'a, str>) -> Result<(), Expected> {
        Err(Expected("a list of tools"))
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let mut tool = Tool {
            functions: Functions { rendering: &mut self.rendering, count: 0 },
            flat: Function::default(),
        };
        let there_is = element(list, &mut tool)?;
        let Tool { mut functions, flat } = tool;
        if there_is && functions.count == 0 && flat.parameters.is_some() {
            functions.add(&flat);
        }
        let declared = functions.count;
        self.functions += declared;
        self.hosted += u64::from(there_is && declared == 0);
        Ok(there_is)
    }
}

struct Tool<'r, 'a> {
    functions: Functions<'r>,
    flat: Function<'a>,
}

impl<'a> JsonVisitor<'a> for Tool<'_, 'a> {
    const FIELDS: &'static [&'static str] = &[
        "type",
        "function",
        "functionDeclarations",
        "function_declarations",
        "tools",
        "name",
        "description",
        "parameters",
        "input_schema",
    ];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "function" => {
                let mut function = Function::default();
                value(object, &mut function)?;
                self.functions.add(&function);
                Ok(())
            }
            "functionDeclarations" | "function_declarations" | "tools" => value(object, &mut self.functions),
            // A function without parameters has just this, and a name.
            "type" => {
                let kind = string(object)?;
                if kind == "function" || kind == "custom" {
                    self.flat.parameters.get_or_insert("{}");
                }
                Ok(())
            }
            _ => self.flat.field(name, object),
        }
    }
}

struct Functions<'r> {
    rendering: &'r mut Rendering,
    count: u64,
}

impl Functions<'_> {
    fn add(&mut self, function: &Function<'_>) {
        if !function.name.is_empty() {
            self.count += 1;
            self.rendering.function(function);
        }
    }
}

impl<'a> JsonVisitor<'a> for Functions<'_> {
    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let mut function = Function::default();
        let there_is = element(list, &mut function)?;
        self.add(&function);
        Ok(there_is)
    }
}

#[derive(Default)]
struct Function<'a> {
    name: Cow<'a, str>,
    description: Cow<'a, str>,
    parameters: Option<&'a str>,
}

impl<'a> JsonVisitor<'a> for Function<'a> {
    const FIELDS: &'static [&'static str] = &[
        "name",
        "description",
        "parameters",
        "input_schema",
        "parametersJsonSchema",
        "parameters_json_schema",
    ];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "name" => self.name = string(object)?,
            "description" => self.description = string(object)?,
            _ => self.parameters = Some(raw(object)?),
        }
        Ok(())
    }
}

/// What is known of one schema; the schemas within it are read when they are rendered.
#[derive(Default)]
struct Schema<'a> {
    kinds: Vec<Cow<'a, str>>,
    title: Cow<'a, str>,
    description: Cow<'a, str>,
    values: Vec<&'a str>,
    properties: Vec<(Cow<'a, str>, &'a str)>,
    required: Vec<Cow<'a, str>>,
    items: Option<&'a str>,
    default: Option<&'a str>,
    either: Vec<&'a str>,
    reference: Cow<'a, str>,
    definitions: Vec<(Cow<'a, str>, &'a str)>,
}

impl<'a> Schema<'a> {
    fn read(json: &'a str) -> Self {
        let mut schema = Self::default();
        // As far as it goes: what follows a fault is not rendered.
        drop(Visit(&mut schema).deserialize(&mut serde_json::Deserializer::from_str(json)));
        schema
    }
}

impl<'a> JsonVisitor<'a> for Schema<'a> {
    const FIELDS: &'static [&'static str] = &[
        "type",
        "title",
        "description",
        "default",
        "enum",
        "const",
        "properties",
        "required",
        "items",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "$defs",
        "definitions",
    ];
    const REJECTS_DUPLICATES: bool = false;

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "type" => value(object, &mut Strings(&mut self.kinds)),
            "required" => value(object, &mut Strings(&mut self.required)),
            "title" => string(object).map(|text| self.title = text),
            "description" => string(object).map(|text| self.description = text),
            "default" => raw(object).map(|json| self.default = Some(json)),
            "$ref" => string(object).map(|name| self.reference = name),
            "const" => raw(object).map(|value| self.values.push(value)),
            "items" => raw(object).map(|items| self.items = Some(items)),
            "enum" => value(object, &mut Raws(&mut self.values)),
            "properties" => value(object, &mut Members(&mut self.properties)),
            "$defs" | "definitions" => value(object, &mut Members(&mut self.definitions)),
            _ => value(object, &mut Raws(&mut self.either)),
        }
    }
}

/// A string or a list of them.
struct Strings<'r, 'a>(&'r mut Vec<Cow<'a, str>>);

impl<'a> JsonVisitor<'a> for Strings<'_, 'a> {
    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.0.push(text);
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        element(list, self)
    }
}

/// A list of values as written.
struct Raws<'r, 'a>(&'r mut Vec<&'a str>);

impl<'a> JsonVisitor<'a> for Raws<'_, 'a> {
    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let next = list.next_element::<&'a RawValue>()?;
        self.0.extend(next.map(RawValue::get));
        Ok(next.is_some())
    }
}

/// The members of an object, in their order, with values as written.
struct Members<'r, 'a>(&'r mut Vec<(Cow<'a, str>, &'a str)>);

impl<'a> JsonVisitor<'a> for Members<'_, 'a> {
    fn other_field<M: MapAccess<'a>>(&mut self, name: Cow<'a, str>, object: &mut M) -> Result<(), M::Error> {
        self.0.push((name, raw(object)?));
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        Ok(list.next_element::<IgnoredAny>()?.is_some())
    }
}

struct Rendering {
    style: Style,
    text: String,
    /// Schemas of parameters, where they are kept apart.
    parameters: String,
    most: usize,
    /// Bytes that may still be read.
    work: usize,
}

/// What a schema's references are looked up in, and how deep it stands.
#[derive(Clone, Copy)]
struct Place<'s, 'a> {
    definitions: &'s [(Cow<'a, str>, &'a str)],
    depth: usize,
    indent: usize,
    /// Within what a reference refers to; references there are not followed.
    referred: bool,
}

impl Rendering {
    fn function(&mut self, function: &Function<'_>) {
        if matches!(self.style, Style::Json { .. }) {
            self.push(&[&function.name, " ", &function.description, " "]);
            compact(function.parameters.unwrap_or("{}"), &[], &mut self.parameters);
            self.parameters.push('\n');
            return;
        }
        self.comment(&function.description, 0);
        let schema = self.read(function.parameters.unwrap_or("{}"));
        let place = Place { definitions: &schema.definitions, depth: 0, indent: 0, referred: false };
        self.push(&["type ", &function.name, " = "]);
        if schema.properties.is_empty() {
            self.push(&["()"]);
        } else {
            self.push(&["(_: "]);
            if self.style == Style::Titled && !(schema.title.is_empty() && schema.description.is_empty()) {
                self.push(&["\n"]);
                self.comment(&schema.title, 0);
                self.comment(&schema.description, 0);
            }
            self.object(&schema, place);
            self.push(&[")"]);
        }
        self.push(&[" => any;\n\n"]);
    }

    fn is_full(&self) -> bool {
        self.text.len() > self.most || self.work == 0
    }

    fn read<'a>(&mut self, json: &'a str) -> Schema<'a> {
        self.work = self.work.saturating_sub(json.len());
        Schema::read(json)
    }

    fn push(&mut self, parts: &[&str]) {
        if !self.is_full() {
            parts.iter().for_each(|part| self.text.push_str(part));
        }
    }

    fn indent(&mut self, spaces: usize) {
        self.push(&[" ".repeat(spaces).as_str()]);
    }

    fn comment(&mut self, description: &str, indent: usize) {
        for line in description.lines() {
            self.indent(indent);
            self.push(&["// ", line, "\n"]);
        }
    }

    /// The comments of a property.
    fn says(&self, schema: &Schema<'_>) -> bool {
        !schema.description.is_empty() || (self.style == Style::Titled && !schema.title.is_empty())
    }

    fn object(&mut self, schema: &Schema<'_>, place: Place<'_, '_>) {
        let properties: Vec<(&str, Schema)> =
            schema.properties.iter().map(|(name, json)| (&**name, self.read(json))).collect();
        let required: FxHashSet<&str> = schema.required.iter().map(|name| &**name).collect();
        let in_lines = self.style == Style::Lines || properties.iter().any(|(_, p)| self.says(p));
        self.push(&[if in_lines { "{\n" } else { "{" }]);
        for (at, (name, property)) in properties.iter().enumerate() {
            if self.is_full() {
                return;
            }
            let mark = if required.contains(name) { ": " } else { "?: " };
            if in_lines {
                // In the old form comments further in were left out.
                if place.indent < 2 || self.style != Style::Lines {
                    self.property_comments(property, place.indent);
                }
                self.indent(place.indent);
                self.push(&[name, mark]);
                self.kind(property, place);
                self.push(&[","]);
                self.default(property);
                self.push(&["\n"]);
            } else {
                self.push(&[if at > 0 { ", " } else { "" }, name, mark]);
                self.kind(property, place);
            }
        }
        if in_lines {
            self.indent(place.indent.saturating_sub(2));
        }
        self.push(&["}"]);
    }

    fn property_comments(&mut self, property: &Schema<'_>, indent: usize) {
        if self.style == Style::Titled {
            self.comment(&property.title, indent);
        }
        self.comment(&property.description, indent);
    }

    fn default(&mut self, property: &Schema<'_>) {
        if let Some(json) = property.default.filter(|_| self.style != Style::Lines) {
            self.push(&[" // default: ", json.trim_matches('"')]);
        }
    }

    fn kind(&mut self, schema: &Schema<'_>, place: Place<'_, '_>) {
        let deeper = Place { depth: place.depth + 1, ..place };
        if place.depth >= DEEPEST || self.is_full() {
            self.push(&["any"]);
        } else if !schema.reference.is_empty() {
            self.referred(&schema.reference, deeper);
        } else if !schema.values.is_empty() {
            self.union(schema.values.iter(), |me, json| me.push(&[json]));
        } else if !schema.either.is_empty() {
            self.union(schema.either.iter(), |me, json| {
                let schema = me.read(json);
                me.kind(&schema, deeper);
            });
        } else if schema.kinds.is_empty() {
            let kind = if schema.properties.is_empty() { "any" } else { "object" };
            self.named(kind, schema, deeper);
        } else {
            self.union(schema.kinds.iter(), |me, kind| me.named(&kind.to_ascii_lowercase(), schema, deeper));
        }
    }

    fn union<T>(&mut self, all: impl Iterator<Item = T>, mut one: impl FnMut(&mut Self, T)) {
        for (at, item) in all.enumerate() {
            if self.is_full() {
                return;
            }
            if at > 0 {
                self.push(&[" | "]);
            }
            one(self, item);
        }
    }

    fn named(&mut self, kind: &str, schema: &Schema<'_>, place: Place<'_, '_>) {
        match kind {
            "string" | "boolean" | "null" => self.push(&[kind]),
            "number" | "integer" => self.push(&["number"]),
            "array" => self.array(schema, place),
            "object" if schema.properties.is_empty() => self.push(&["object"]),
            "object" => self.object(schema, Place { indent: place.indent + 2, ..place }),
            _ => self.push(&["any"]),
        }
    }

    fn array(&mut self, schema: &Schema<'_>, place: Place<'_, '_>) {
        let Some(items) = schema.items.map(|json| self.read(json)) else { return self.push(&["any[]"]) };
        self.kind(&items, place);
        self.push(&["[]"]);
    }

    fn referred(&mut self, reference: &str, place: Place<'_, '_>) {
        let name = reference.rsplit('/').next().unwrap_or_default();
        self.work = self.work.saturating_sub(place.definitions.len());
        match place.definitions.iter().find(|(known, _)| known == name) {
            Some((_, json)) if !place.referred => {
                let schema = self.read(json);
                self.kind(&schema, Place { referred: true, ..place });
            }
            _ => self.push(&["any"]),
        }
    }
}
