//! Renders function definitions as the model reads them.

use super::compact::compact;
use super::schema::{FunctionDefinition, ParameterSchema};
use foldhash::HashSet;
use std::borrow::Cow;

/// Schemas nested deeper than this are rendered as `any`.
const MAX_DEPTH: usize = 16;

/// The form in which a model reads function definitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Style {
    /// TypeScript with one property per line, for OpenAI's models with `cl100k_base`.
    Lines,
    /// TypeScript; an object whose properties have no descriptions takes one line.
    Compact,
    /// Like `Compact`, with the titles of schemas as comments.
    Titled,
    /// The names and descriptions as text, and the parameters as compact JSON.
    Json {
        /// Tokens that the template adds for each function.
        function: u8,
        /// Tokens of the model per 100 tokens of the parameters' JSON.
        percent: u8,
        /// The fields of a function are in the tool itself, as in the Responses API.
        is_flat: bool,
        /// Whether tools that the provider hosts cost nothing by themselves.
        has_free_hosted: bool,
    },
    /// The words alone: names, descriptions, types and values, without the punctuation and keywords of JSON Schema.
    /// Tools that the provider hosts cost nothing by themselves.
    Words,
}

impl Style {
    /// Whether tools that the provider hosts cost nothing by themselves.
    pub(super) fn has_free_hosted(self) -> bool {
        matches!(self, Self::Words | Self::Json { has_free_hosted: true, .. })
    }

    /// Whether the fields of a function are in the tool itself, and a nested `function` is ignored.
    pub(super) fn is_flat(self) -> bool {
        matches!(self, Self::Titled | Self::Json { is_flat: true, .. })
    }
}

/// The function definitions of a request as the model reads them.
pub(super) struct Rendering {
    style: Style,
    pub(super) text: String,
    /// In `Style::Json`: the schemas of the parameters. Otherwise empty, and they are in `text`.
    pub(super) parameters: String,
    /// `text` does not grow beyond this number of bytes.
    max_text: usize,
    /// Bytes of schemas that may still be read.
    read_left: usize,
}

/// The position of a schema in the rendering.
#[derive(Clone, Copy)]
struct SchemaContext<'s, 'a> {
    /// The definitions of the function, for references.
    definitions: &'s [(Cow<'a, str>, &'a str)],
    depth: usize,
    /// Spaces before each line.
    indent: usize,
    /// Whether this schema is the target of a reference. References inside it are not followed.
    is_referenced: bool,
}

impl Rendering {
    /// `max_text` bounds the rendered text, and `max_read` the schemas that are read for it (bytes).
    pub(super) fn new(style: Style, max_text: usize, max_read: usize) -> Self {
        Self { style, text: String::new(), parameters: String::new(), max_text, read_left: max_read }
    }

    /// Renders one function.
    pub(super) fn add_function(&mut self, function: &FunctionDefinition<'_>) {
        if self.style == Style::Words {
            self.push(&[&function.name]);
            if !function.description.is_empty() {
                self.push(&[" ", &function.description]);
            }
            let schema = self.read(function.parameters.unwrap_or("{}"));
            self.words(&schema, 0);
            self.push(&["\n"]);
            return;
        }
        if matches!(self.style, Style::Json { .. }) {
            self.push(&[&function.name, " ", &function.description, " "]);
            compact(function.parameters.unwrap_or("{}"), &[], &mut self.parameters);
            self.parameters.push('\n');
            return;
        }
        self.comment(&function.description, 0);
        let schema = self.read(function.parameters.unwrap_or("{}"));
        let context =
            SchemaContext { definitions: &schema.definitions, depth: 0, indent: 0, is_referenced: false };
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
            self.object(&schema, context);
            self.push(&[")"]);
        }
        self.push(&[" => any;\n\n"]);
    }

    /// Whether a bound is reached. From then on nothing is rendered.
    fn is_full(&self) -> bool {
        self.text.len() > self.max_text || self.read_left == 0
    }

    fn read<'a>(&mut self, json: &'a str) -> ParameterSchema<'a> {
        self.read_left = self.read_left.saturating_sub(json.len());
        ParameterSchema::read(json)
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

    /// Renders the words of a schema.
    fn words(&mut self, schema: &ParameterSchema<'_>, depth: usize) {
        if depth >= MAX_DEPTH || self.is_full() {
            return;
        }
        for word in schema.types.iter().chain([&schema.description]).filter(|word| !word.is_empty()) {
            self.push(&[" ", word]);
        }
        for value in &schema.values {
            self.push(&[" ", value.trim_matches('"')]);
        }
        for (name, json) in &schema.properties {
            self.push(&[" ", name]);
            let property = self.read(json);
            self.words(&property, depth + 1);
        }
        for json in schema.items.iter().chain(&schema.alternatives) {
            let inner = self.read(json);
            self.words(&inner, depth + 1);
        }
    }

    /// Whether comments are rendered for a property.
    fn has_comments(&self, schema: &ParameterSchema<'_>) -> bool {
        !schema.description.is_empty() || (self.style == Style::Titled && !schema.title.is_empty())
    }

    fn object(&mut self, schema: &ParameterSchema<'_>, context: SchemaContext<'_, '_>) {
        let properties: Vec<(&str, ParameterSchema)> =
            schema.properties.iter().map(|(name, json)| (&**name, self.read(json))).collect();
        let required: HashSet<&str> = schema.required.iter().map(|name| &**name).collect();
        let in_lines = self.style == Style::Lines || properties.iter().any(|(_, p)| self.has_comments(p));
        self.push(&[if in_lines { "{\n" } else { "{" }]);
        for (at, (name, property)) in properties.iter().enumerate() {
            if self.is_full() {
                return;
            }
            let mark = if required.contains(name) { ": " } else { "?: " };
            if in_lines {
                // The oldest form has no comments on nested properties.
                if context.indent < 2 || self.style != Style::Lines {
                    self.property_comments(property, context.indent);
                }
                self.indent(context.indent);
                self.push(&[name, mark]);
                self.schema_type(property, context);
                self.push(&[","]);
                self.default(property);
                self.push(&["\n"]);
            } else {
                self.push(&[if at > 0 { ", " } else { "" }, name, mark]);
                self.schema_type(property, context);
            }
        }
        if in_lines {
            self.indent(context.indent.saturating_sub(2));
        }
        self.push(&["}"]);
    }

    fn property_comments(&mut self, property: &ParameterSchema<'_>, indent: usize) {
        if self.style == Style::Titled {
            self.comment(&property.title, indent);
        }
        self.comment(&property.description, indent);
    }

    fn default(&mut self, property: &ParameterSchema<'_>) {
        if let Some(json) = property.default.filter(|_| self.style != Style::Lines) {
            self.push(&[" // default: ", json.trim_matches('"')]);
        }
    }

    fn schema_type(&mut self, schema: &ParameterSchema<'_>, context: SchemaContext<'_, '_>) {
        let deeper = SchemaContext { depth: context.depth + 1, ..context };
        if context.depth >= MAX_DEPTH || self.is_full() {
            self.push(&["any"]);
        } else if !schema.reference.is_empty() {
            self.reference(&schema.reference, deeper);
        } else if !schema.values.is_empty() {
            self.union(schema.values.iter(), |renderer, json| renderer.push(&[json]));
        } else if !schema.alternatives.is_empty() {
            self.union(schema.alternatives.iter(), |renderer, json| {
                let schema = renderer.read(json);
                renderer.schema_type(&schema, deeper);
            });
        } else if schema.types.is_empty() {
            let kind = if schema.properties.is_empty() { "any" } else { "object" };
            self.named_type(kind, schema, deeper);
        } else {
            self.union(schema.types.iter(), |renderer, kind| {
                renderer.named_type(&kind.to_ascii_lowercase(), schema, deeper);
            });
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

    fn named_type(&mut self, kind: &str, schema: &ParameterSchema<'_>, context: SchemaContext<'_, '_>) {
        match kind {
            "string" | "boolean" | "null" => self.push(&[kind]),
            "number" | "integer" => self.push(&["number"]),
            "array" => self.array(schema, context),
            "object" if schema.properties.is_empty() => self.push(&["object"]),
            "object" => self.object(schema, SchemaContext { indent: context.indent + 2, ..context }),
            _ => self.push(&["any"]),
        }
    }

    fn array(&mut self, schema: &ParameterSchema<'_>, context: SchemaContext<'_, '_>) {
        let Some(items) = schema.items.map(|json| self.read(json)) else { return self.push(&["any[]"]) };
        self.schema_type(&items, context);
        self.push(&["[]"]);
    }

    fn reference(&mut self, reference: &str, context: SchemaContext<'_, '_>) {
        let name = reference.rsplit('/').next().unwrap_or_default();
        self.read_left = self.read_left.saturating_sub(context.definitions.len());
        match context.definitions.iter().find(|(known, _)| known == name) {
            Some((_, json)) if !context.is_referenced => {
                let schema = self.read(json);
                self.schema_type(&schema, SchemaContext { is_referenced: true, ..context });
            }
            _ => self.push(&["any"]),
        }
    }
}
