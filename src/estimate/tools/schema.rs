//! Readers of function definitions and of the JSON schemas in them.

use crate::json::{Expected, JsonVisitor, Visit, element, raw, raw_unless_null, string, value};
use serde::de::{DeserializeSeed as _, IgnoredAny, MapAccess, SeqAccess};
use serde_json::value::RawValue;
use std::borrow::Cow;

#[derive(Default)]
pub(super) struct FunctionDefinition<'a> {
    pub(super) name: Cow<'a, str>,
    pub(super) description: Cow<'a, str>,
    /// The JSON schema of the parameters.
    pub(super) parameters: Option<&'a str>,
}

impl<'a> JsonVisitor<'a> for FunctionDefinition<'a> {
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
            _ => self.parameters = raw_unless_null(object)?.or(self.parameters),
        }
        Ok(())
    }
}

/// The keywords of one JSON schema that are rendered. Schemas inside it stay JSON until they are rendered.
#[derive(Default)]
pub(super) struct ParameterSchema<'a> {
    /// `type`.
    pub(super) types: Vec<Cow<'a, str>>,
    pub(super) title: Cow<'a, str>,
    pub(super) description: Cow<'a, str>,
    /// `enum` and `const`.
    pub(super) values: Vec<&'a str>,
    pub(super) properties: Vec<(Cow<'a, str>, &'a str)>,
    pub(super) required: Vec<Cow<'a, str>>,
    pub(super) items: Option<&'a str>,
    pub(super) default: Option<&'a str>,
    /// `anyOf`, `oneOf` and `allOf`.
    pub(super) alternatives: Vec<&'a str>,
    /// `$ref`.
    pub(super) reference: Cow<'a, str>,
    /// `$defs` and `definitions`.
    pub(super) definitions: Vec<(Cow<'a, str>, &'a str)>,
}

impl<'a> ParameterSchema<'a> {
    /// Reads up to the first syntax error. The rest is not rendered.
    pub(super) fn read(json: &'a str) -> Self {
        let mut schema = Self::default();
        drop(Visit(&mut schema).deserialize(&mut serde_json::Deserializer::from_str(json)));
        schema
    }
}

impl<'a> JsonVisitor<'a> for ParameterSchema<'a> {
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
            "type" => value(object, &mut StringsReader(&mut self.types)),
            "required" => value(object, &mut StringsReader(&mut self.required)),
            "title" => string(object).map(|text| self.title = text),
            "description" => string(object).map(|text| self.description = text),
            "default" => raw(object).map(|json| self.default = Some(json)),
            "$ref" => string(object).map(|name| self.reference = name),
            "const" => raw(object).map(|value| self.values.push(value)),
            "items" => raw_unless_null(object).map(|items| self.items = items),
            "enum" => value(object, &mut ListReader(&mut self.values)),
            "properties" => value(object, &mut MembersReader(&mut self.properties)),
            "$defs" | "definitions" => value(object, &mut MembersReader(&mut self.definitions)),
            _ => value(object, &mut ListReader(&mut self.alternatives)),
        }
    }
}

/// Reads a string or a list of strings.
struct StringsReader<'r, 'a>(&'r mut Vec<Cow<'a, str>>);

impl<'a> JsonVisitor<'a> for StringsReader<'_, 'a> {
    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.0.push(text);
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        element(list, self)
    }
}

/// Reads a list of values as JSON.
struct ListReader<'r, 'a>(&'r mut Vec<&'a str>);

impl<'a> JsonVisitor<'a> for ListReader<'_, 'a> {
    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let next = list.next_element::<&'a RawValue>()?;
        self.0.extend(next.map(RawValue::get));
        Ok(next.is_some())
    }
}

/// Reads the members of an object in their order, with values as JSON.
struct MembersReader<'r, 'a>(&'r mut Vec<(Cow<'a, str>, &'a str)>);

impl<'a> JsonVisitor<'a> for MembersReader<'_, 'a> {
    fn other_field<M: MapAccess<'a>>(&mut self, name: Cow<'a, str>, object: &mut M) -> Result<(), M::Error> {
        self.0.push((name, raw(object)?));
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        Ok(list.next_element::<IgnoredAny>()?.is_some())
    }
}
