//! The schema agrees with the reader.

use super::generator::Generator;
use super::validator::refusal;
use super::*;
use crate::config::description::{DefaultSpec, KeySpec, SectionSpec, ValueSpec};
use crate::config::fault::Findings;
use crate::config::schema::schema;
use crate::config::top::TOP;
use crate::config::tree::{YamlNode, YamlValue};
use crate::config::{units, variables, yaml};
use proptest::prelude::*;
use serde_json::Value;
use std::sync::LazyLock;

static SCHEMA: LazyLock<Value> = LazyLock::new(schema);

/// Asserts that the schema accepts what the reader accepts, and that both refuse an unknown key.
pub(super) fn check_agreement(text: &str, read: &Result<Loaded, Faults>) {
    let has_unknown_key = matches!(read, Err(faults) if faults.to_string().contains(": unknown key \""));
    if read.is_err() && !has_unknown_key {
        return;
    }
    let Some(value) = value_of(text) else { return };
    let refusal = refusal(&value, &SCHEMA, &SCHEMA);
    match refusal {
        Some(reason) => assert!(read.is_err(), "the schema refuses a valid config: {reason}\n{text:.2000}"),
        None => assert!(!has_unknown_key, "the schema accepts an unknown key\n{text:.2000}"),
    }
}

/// The config as an editor sees it: with the types of YAML's core schema, and with variables as text.
pub(super) fn value_of(text: &str) -> Option<Value> {
    yaml::parse(text, &Findings::new("t.yaml")).map(|root| to_json(&root))
}

fn to_json(node: &YamlNode) -> Value {
    match &node.value {
        YamlValue::List(items) => items.iter().map(to_json).collect(),
        YamlValue::Map(entries) => {
            Value::Object(entries.iter().map(|(key, node)| (key.name.clone(), to_json(node))).collect())
        }
        YamlValue::Scalar(_) if node.is_null() => Value::Null,
        YamlValue::Scalar(scalar) => {
            let text = variables::unmask(&scalar.text);
            let plain = scalar.is_plain.then(|| plain_value(&text)).flatten();
            plain.unwrap_or_else(|| text.into())
        }
        YamlValue::Unknown => Value::Null,
    }
}

/// The boolean or the number that a plain scalar is in YAML's core schema.
fn plain_value(text: &str) -> Option<Value> {
    match text {
        "true" | "True" | "TRUE" => return Some(true.into()),
        "false" | "False" | "FALSE" => return Some(false.into()),
        _ => {}
    }
    let is_number = text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b))
        && text.bytes().any(|b| b.is_ascii_digit());
    let number = text.trim_start_matches('+');
    let integer = number.parse::<u64>().map(Value::from).ok();
    is_number.then(|| integer.or_else(|| number.parse::<f64>().ok().map(Value::from))).flatten()
}

#[test]
fn every_example_config_names_the_schema_and_is_valid_by_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = ["config/tollgate.yaml", "config/minimal.yaml", "src/cli/init/config.yaml"];
    for file in files {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        assert!(text.contains("# yaml-language-server: $schema="), "{file}");
        let text = text.replace("FIRST_KEY_SHA256", &"0".repeat(64));
        assert_eq!(refusal(&value_of(&text).unwrap(), &SCHEMA, &SCHEMA), None, "{file}");
    }
}

#[test]
fn the_schema_refuses_values_of_the_wrong_form() {
    for text in [
        with_quota("{ limit: 1.5, per: minute }"),
        with_quota("{ limit: 0, per: minute }"),
        with_quota("{ limit: 2x, per: minute }"),
        with_quota("{ limit: 5, per: 30 }"),
        with_quota("{ limit: 5, per: minutes }"),
        with_quota("{ limit: 5 }"),
        with_quota("{ limit: 5, per: day, window: fixed }"),
        with_quota("[]"),
        with_quota(""),
        with("enforce: maybe"),
        with("models:"),
        with("keys: [{ name: a b, secret: sixteen-letters-1 }]"),
        with("keys: [{ name: a, sha256: abc }]"),
        MINIMAL.replace("prod:", "Prod:"),
        MINIMAL.replace("  up: { base_url: 'http://u/v1' }", "  {}"),
        with_upstream("base_url: ftp://u"),
        with_upstream("base_url: 'http://u', api: opnai"),
        format!("{MINIMAL}server: {{ listen: here }}\n"),
        format!("{MINIMAL}server: {{ max_request_body: 5 parsecs }}\n"),
        format!("{MINIMAL}server: {{ flood_guard: 5 }}\n"),
        "x: 1".to_owned(),
    ] {
        assert!(refusal(&value_of(&text).unwrap(), &SCHEMA, &SCHEMA).is_some(), "{text}");
    }
}

/// Calls `visit` with every section and key of the config.
pub(super) fn for_each_key(
    spec: &'static SectionSpec,
    visit: &mut dyn FnMut(&'static SectionSpec, &'static KeySpec),
) {
    for key in spec.keys {
        visit(spec, key);
        for_each_section(&key.value, visit);
    }
}

fn for_each_section(
    value: &'static ValueSpec,
    visit: &mut dyn FnMut(&'static SectionSpec, &'static KeySpec),
) {
    match value {
        ValueSpec::Section(spec) => for_each_key(spec, visit),
        ValueSpec::List(value) | ValueSpec::OneOrMore(value) | ValueSpec::Names(_, value) => {
            for_each_section(value, visit);
        }
        ValueSpec::Either(values) => values.iter().for_each(|value| for_each_section(value, visit)),
        _ => {}
    }
}

#[test]
fn every_default_has_the_form_of_its_type() {
    let mut keys = 0;
    for_each_key(&TOP, &mut |section, key| {
        keys += 1;
        assert!(!key.about.is_empty() && !key.about.ends_with('.'), "{}.{}", section.name, key.name);
        let DefaultSpec::Value(text) = key.default else { return };
        let is_valid = match &key.value {
            ValueSpec::Duration => units::duration(text).is_some(),
            ValueSpec::Size => units::size(text).is_some(),
            ValueSpec::Amount { min, max } => units::amount(text).is_some_and(|n| (*min..=*max).contains(&n)),
            ValueSpec::Boolean => matches!(text, "true" | "false"),
            ValueSpec::Words(words) => words.iter().any(|word| word.0 == text),
            _ => true,
        };
        assert!(is_valid, "{}.{}: {text}", section.name, key.name);
    });
    assert!(keys > 50, "only {keys} keys");
}

/// An invalid copy of a config for each of its sections: with one more key.
fn with_an_unknown_key(config: &Value, spec: &ValueSpec) -> Vec<Value> {
    let mut copies = Vec::new();
    match (config, spec) {
        (Value::Object(entries), ValueSpec::Section(spec)) => {
            let mut copy = config.clone();
            copy["unknwon"] = 1.into();
            copies.push(copy);
            for (name, value) in entries {
                let key = spec.key(name).unwrap();
                copies.extend(with_an_unknown_key(value, &key.value).into_iter().map(|inner| {
                    let mut copy = config.clone();
                    copy[name] = inner;
                    copy
                }));
            }
        }
        (Value::Object(entries), ValueSpec::Names(_, spec)) => {
            for (name, value) in entries {
                copies.extend(with_an_unknown_key(value, spec).into_iter().map(|inner| {
                    let mut copy = config.clone();
                    copy[name] = inner;
                    copy
                }));
            }
        }
        (Value::Array(items), ValueSpec::List(spec) | ValueSpec::OneOrMore(spec)) => {
            for (at, item) in items.iter().enumerate() {
                copies.extend(with_an_unknown_key(item, spec).into_iter().map(|inner| {
                    let mut copy = config.clone();
                    copy[at] = inner;
                    copy
                }));
            }
        }
        (_, ValueSpec::OneOrMore(spec)) => copies.extend(with_an_unknown_key(config, spec)),
        (Value::Object(_), ValueSpec::Either(specs)) => {
            copies.extend(specs.iter().flat_map(|spec| with_an_unknown_key(config, spec)));
        }
        _ => {}
    }
    copies
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn the_schema_accepts_random_valid_configs_and_both_refuse_an_unknown_key_in_any_section(seed: u64) {
        let valid = Generator::new(seed).config();
        // `read` compares the reader and the schema.
        let loaded = read(&valid.to_string());
        prop_assert!(loaded.is_ok(), "{}\n{valid:#}", loaded.unwrap_err());
        for invalid in with_an_unknown_key(&valid, &ValueSpec::Section(&TOP)) {
            let faults = faults(&invalid.to_string());
            prop_assert!(faults.contains("unknown key \"unknwon\""), "{faults}");
        }
    }
}
