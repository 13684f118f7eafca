//! Reads tool definitions in the formats of all providers.

use super::ToolList;
use super::rendering::Rendering;
use super::schema::FunctionDefinition;
use crate::json::{Expected, JsonVisitor, Visit, element, raw, string, value};
use serde::de::{DeserializeSeed as _, MapAccess, SeqAccess};
use std::borrow::Cow;

/// Reads a list of tools in the format of any provider, and renders each function.
pub(super) struct ToolListReader<'l> {
    list: ToolList<'l>,
    pub(super) rendering: Rendering,
    /// Functions in the list.
    pub(super) functions: u64,
    /// Tools in the list that the provider hosts.
    pub(super) hosted: u64,
    is_flat: bool,
}

impl<'l> ToolListReader<'l> {
    /// `None` if the JSON is not a list of tools. `is_flat`: a tool with its own name has all fields of its function;
    /// a nested `function` is ignored.
    pub(super) fn read(list: ToolList<'l>, rendering: Rendering, is_flat: bool) -> Option<Self> {
        let mut reader = Self { list, rendering, functions: 0, hosted: 0, is_flat };
        Visit(&mut reader).deserialize(&mut serde_json::Deserializer::from_str(list.json)).ok()?;
        Some(reader)
    }
}

impl<'a> JsonVisitor<'a> for ToolListReader<'_> {
    fn text(&mut self, _: Cow<'a, str>) -> Result<(), Expected> {
        Err(Expected("a list of tools"))
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let mut tool = ToolReader {
            functions: FunctionListReader { rendering: &mut self.rendering, count: 0 },
            flat: FunctionDefinition::default(),
            nested: FunctionDefinition::default(),
            is_deferred: false,
        };
        let has_element = element(list, &mut tool)?;
        let ToolReader { mut functions, flat, nested, is_deferred } = tool;
        let name = if flat.name.is_empty() { &nested.name } else { &flat.name };
        if is_deferred && !self.list.is_loaded(name) {
            return Ok(has_element);
        }
        if !self.is_flat || flat.name.is_empty() {
            functions.add(&nested);
        }
        if has_element && functions.count == 0 && flat.parameters.is_some() {
            functions.add(&flat);
        }
        let declared = functions.count;
        self.functions += declared;
        self.hosted += u64::from(has_element && declared == 0);
        Ok(has_element)
    }
}

/// Reads one tool. Gemini puts several functions into one.
struct ToolReader<'r, 'a> {
    functions: FunctionListReader<'r>,
    /// The function if its fields are in the tool object itself, as in the Responses API.
    flat: FunctionDefinition<'a>,
    /// The function if its fields are in `function`, as in the chat API.
    nested: FunctionDefinition<'a>,
    /// The tool is in the prompt only once the conversation has loaded it.
    is_deferred: bool,
}

impl<'a> JsonVisitor<'a> for ToolReader<'_, 'a> {
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
        "defer_loading",
    ];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "defer_loading" => {
                self.is_deferred = raw(object)? == "true";
                Ok(())
            }
            "function" => value(object, &mut self.nested),
            "functionDeclarations" | "function_declarations" | "tools" => value(object, &mut self.functions),
            // A function in the tool object itself may have only a type and a name, without parameters.
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

/// Reads a list of functions and renders each.
struct FunctionListReader<'r> {
    rendering: &'r mut Rendering,
    count: u64,
}

impl FunctionListReader<'_> {
    fn add(&mut self, function: &FunctionDefinition<'_>) {
        if !function.name.is_empty() {
            self.count += 1;
            self.rendering.add_function(function);
        }
    }
}

impl<'a> JsonVisitor<'a> for FunctionListReader<'_> {
    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let mut function = FunctionDefinition::default();
        let has_element = element(list, &mut function)?;
        self.add(&function);
        Ok(has_element)
    }
}
