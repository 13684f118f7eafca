//! The JSON Schema of the config, made from the descriptions that the reader uses.
//!
//! The schema accepts every config that the reader accepts. It cannot express every rule of the reader, such as names that
//! refer to each other.

use super::description::{
    AMOUNT_PATTERN, DURATION_PATTERN, DefaultSpec, KeySpec, Reload, SIZE_PATTERN, SectionSpec, TextSpec,
    ValueSpec,
};
use super::top::TOP;
use super::units;
use serde_json::{Map, Value, json};

/// The JSON Schema of the config file (draft 2020-12).
pub(crate) fn schema() -> Value {
    let mut definitions = Map::new();
    for (name, definition) in [
        ("variable", variable()),
        ("boolean", any_of(vec![json!({"type": "boolean"}), json!({"enum": ["true", "false"]})])),
        ("duration", any_of(vec![pattern(DURATION_PATTERN), json!({"const": 0})])),
        ("size", any_of(vec![json!({"type": "integer", "minimum": 0}), pattern(SIZE_PATTERN)])),
    ] {
        definitions.insert(name.to_owned(), definition);
    }
    let mut root = section(&TOP, &mut definitions);
    if let Value::Object(root) = &mut root {
        root.insert("$schema".into(), "https://json-schema.org/draft/2020-12/schema".into());
        root.insert("title".into(), "Config file of Tollgate".into());
        root.insert("$defs".into(), Value::Object(definitions));
    }
    root
}

/// A reference to the environment or to a file. It may stand for any text.
fn variable() -> Value {
    json!({
        "type": "string",
        "pattern": r"\$\{[^}]*\}",
        "description": "An environment variable `${NAME}`, `${NAME:-default}`, or a file `${file:/path}`.",
    })
}

fn pattern(pattern: &str) -> Value {
    json!({"type": "string", "pattern": pattern})
}

/// One of several forms, or a variable.
fn any_of(mut forms: Vec<Value>) -> Value {
    forms.push(reference("variable"));
    json!({ "anyOf": forms })
}

fn reference(definition: &str) -> Value {
    json!({"$ref": format!("#/$defs/{definition}")})
}

fn section(spec: &SectionSpec, definitions: &mut Map<String, Value>) -> Value {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for key in spec.keys {
        properties.insert(key.name.to_owned(), property(key, definitions));
        if matches!(key.default, DefaultSpec::Required(_)) {
            required.push(key.name);
        }
    }
    let mut schema = json!({"type": "object", "properties": properties, "additionalProperties": false});
    if !required.is_empty() {
        schema["required"] = required.into();
    }
    schema
}

fn property(key: &KeySpec, definitions: &mut Map<String, Value>) -> Value {
    let mut schema = value(&key.value, definitions);
    let is_required = matches!(key.default, DefaultSpec::Required(_));
    if is_required && matches!(key.value, ValueSpec::Names(..)) {
        schema["minProperties"] = 1.into();
    }
    if !is_required && !key.is_restriction {
        let mut forms = match schema.get_mut("anyOf").map(Value::take) {
            Some(Value::Array(forms)) => forms,
            _ => vec![schema],
        };
        forms.push(json!({"type": "null"}));
        schema = json!({ "anyOf": forms });
    }
    schema["description"] = describe(key).into();
    if let DefaultSpec::Value(text) = key.default {
        schema["default"] = scalar_value(&key.value, text);
    }
    if is_scalar(&key.value)
        && let Some(text) = key.example_text()
    {
        schema["examples"] = vec![scalar_value(&key.value, &text)].into();
    }
    schema
}

/// The effect, the type and the default, as an editor shows them.
fn describe(key: &KeySpec) -> String {
    let default = match key.default {
        DefaultSpec::Required(_) => "Required.".to_owned(),
        DefaultSpec::Value(text) => format!("Default: `{text}`."),
        DefaultSpec::Absent(text) | DefaultSpec::Derived(text, _) => format!("Default: {text}."),
        DefaultSpec::Section => String::new(),
    };
    let about = without_links(key.about);
    let mut characters = about.chars();
    let first = characters.next().map(|c| c.to_ascii_uppercase());
    let about: String = first.into_iter().chain(characters).collect();
    let reload = match key.reload {
        Reload::Applies => "",
        Reload::NextStart => " A change applies from the next start on.",
        Reload::Refused => " Cannot change while the gateway runs.",
    };
    format!("{about}. Type: {}. {default}{reload}", key.value.label()).trim_end().to_owned()
}

/// Removes references to other documents, `([title](file))`, and the targets of other links.
fn without_links(markdown: &str) -> String {
    let mut text = String::new();
    let mut rest = markdown;
    while let Some((before, link)) = rest.split_once('[')
        && let Some((title, link)) = link.split_once("](")
        && let Some((_, after)) = link.split_once(')')
    {
        if let Some(before) = before.strip_suffix(" (") {
            text.push_str(before);
            rest = after.strip_prefix(')').unwrap_or(after);
        } else if let Some(before) = before.strip_suffix(", see ") {
            text.push_str(before);
            rest = after;
        } else {
            text.push_str(before);
            text.push_str(title);
            rest = after;
        }
    }
    text + rest
}

/// Whether values of this type are neither lists nor mappings, and an editor does not list them anyway.
fn is_scalar(spec: &ValueSpec) -> bool {
    use ValueSpec::{Amount, Decimal, Duration, Secret, SecretUrl, Size, Text};
    matches!(spec, Text(_) | Secret(_) | SecretUrl(_) | Amount { .. } | Decimal(_) | Duration | Size)
}

fn scalar_value(spec: &ValueSpec, text: &str) -> Value {
    match spec {
        ValueSpec::Amount { .. } => units::amount(text).map_or_else(|| text.into(), Value::from),
        ValueSpec::Boolean => (text == "true").into(),
        ValueSpec::Decimal(_) => text.parse::<f64>().map_or_else(|_| text.into(), Value::from),
        _ => text.into(),
    }
}

fn value(spec: &ValueSpec, definitions: &mut Map<String, Value>) -> Value {
    match spec {
        ValueSpec::Text(text) | ValueSpec::Secret(text) | ValueSpec::SecretUrl(text) => any_text(text),
        ValueSpec::Boolean => reference("boolean"),
        ValueSpec::Duration => reference("duration"),
        ValueSpec::Size => reference("size"),
        ValueSpec::Amount { min, max } => {
            any_of(vec![json!({"type": "integer", "minimum": min, "maximum": max}), pattern(AMOUNT_PATTERN)])
        }
        ValueSpec::Decimal(text) => any_of(vec![json!({"type": "number"}), pattern(text.pattern)]),
        ValueSpec::Words(words) => {
            let numeric = words.iter().filter_map(|word| word.0.parse::<u64>().ok());
            let numbers = numeric.map(|number| json!({ "const": number }));
            let words = words.iter().map(|word| match word.1 {
                "" => json!({"const": word.0}),
                about => json!({"const": word.0, "description": without_links(about)}),
            });
            any_of(words.chain(numbers).collect())
        }
        ValueSpec::List(element) => json!({"type": "array", "items": value(element, definitions)}),
        ValueSpec::OneOrMore(element) => {
            let element = value(element, definitions);
            json!({"anyOf": [element, {"type": "array", "minItems": 1, "items": element}]})
        }
        ValueSpec::Section(spec) => {
            if !definitions.contains_key(spec.name) {
                let definition = section(spec, definitions);
                definitions.insert(spec.name.to_owned(), definition);
            }
            reference(spec.name)
        }
        ValueSpec::Names(names, element) => {
            let mut schema = json!({"type": "object", "additionalProperties": value(element, definitions)});
            if !names.pattern.is_empty() {
                schema["propertyNames"] = json!({"pattern": names.pattern});
            }
            schema
        }
        ValueSpec::Either(specs) => {
            let forms: Vec<Value> = specs.iter().map(|spec| value(spec, definitions)).collect();
            json!({ "anyOf": forms })
        }
    }
}

/// Any single value: a name or a key may consist of digits.
fn any_text(text: &TextSpec) -> Value {
    let mut schema = json!({"type": ["string", "number", "boolean"]});
    if text.pattern.is_empty() {
        return schema;
    }
    schema["pattern"] = text.pattern.into();
    any_of(vec![schema])
}
