//! The files that are made from the descriptions of the keys: the tables of `docs/configuration.md` and the schema.
//!
//! `UPDATE_DOCS=1 cargo test --lib config::` writes them.

use super::schema::{for_each_key, value_of};
use super::*;
use crate::config::description::{KeySpec, Reload, SectionSpec, ValueSpec};
use crate::config::reference::{reference, table};
use crate::config::schema::schema;
use crate::config::top::TOP;
use serde_json::{Value, json};

const BEGIN: &str = "<!-- keys of ";
const END: &str = "<!-- end of keys -->";

/// Fails if the file has another content, or writes it if `UPDATE_DOCS` is set.
fn assert_current(file: &str, content: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let shipped = std::fs::read_to_string(&path).unwrap_or_default();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, content).unwrap();
        return;
    }
    let differing = shipped.lines().zip(content.lines()).find(|(old, new)| old != new);
    assert!(
        shipped == content,
        "{file} is not current: write it with `UPDATE_DOCS=1 cargo test --lib config::`. The first difference: {differing:#?}"
    );
}

#[test]
fn the_shipped_schema_is_current() {
    assert_current("config/tollgate.schema.json", &format!("{:#}\n", schema()));
}

#[test]
fn the_tables_of_the_reference_are_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let mut sections: Vec<(&str, String)> = Vec::new();
    let own: Vec<&str> = document.split(BEGIN).skip(1).map(|rest| rest.split(' ').next().unwrap()).collect();
    for_each_key(&TOP, &mut |section, _| {
        if own.contains(&section.name) && !sections.iter().any(|(name, _)| *name == section.name) {
            sections.push((section.name, table(section, &own)));
        }
    });
    assert!(own.len() >= 10 && own.len() == sections.len(), "{own:?}");
    let mut current = String::new();
    for part in document.split_inclusive(END) {
        match part.split_once(BEGIN) {
            Some((before, rest)) => {
                let name = rest.split(' ').next().unwrap();
                let table = &sections.iter().find(|(section, _)| *section == name).unwrap().1;
                current += &format!("{before}{BEGIN}{name} -->\n\n{table}\n{END}");
            }
            None => current += part,
        }
    }
    for_each_key(&TOP, &mut |section, key| {
        let row = format!("{}` | {} |", key.name, key.value.label());
        assert!(current.contains(&row), "{}.{} has no row: give its section a table", section.name, key.name);
    });
    assert_current("docs/configuration.md", &current);
}

#[test]
fn the_reference_of_the_command_has_every_key_once_in_each_section() {
    let reference = reference();
    let mut sections: Vec<&str> = Vec::new();
    for_each_key(&TOP, &mut |section, key| {
        let is_new = sections.last() != Some(&section.name) && !sections.contains(&section.name);
        if is_new {
            sections.push(section.name);
        }
        let row = format!("{}` | {} |", key.name, key.value.label());
        assert!(reference.contains(&row), "{}.{}", section.name, key.name);
    });
    for heading in ["Top level", "`server`", "`upstreams.*`", "`environments.*.keys[]`", "`models[]`"] {
        assert_eq!(reference.matches(&format!("## {heading}\n")).count(), 1, "{heading}");
    }
}

/// Every key with its path in a config that has an upstream `openai` and an environment `production`.
fn for_each_path(
    spec: &'static SectionSpec,
    path: &[&'static str],
    visit: &mut dyn FnMut(&[&'static str], &'static SectionSpec, &'static KeySpec),
) {
    for key in spec.keys {
        let path = [path, &[key.name]].concat();
        visit(&path, spec, key);
        for_each_nested(&key.value, &path, visit);
    }
}

fn for_each_nested(
    value: &'static ValueSpec,
    path: &[&'static str],
    visit: &mut dyn FnMut(&[&'static str], &'static SectionSpec, &'static KeySpec),
) {
    match value {
        ValueSpec::Section(spec) => for_each_path(spec, path, visit),
        ValueSpec::OneOrMore(value) => for_each_nested(value, path, visit),
        ValueSpec::List(value) => for_each_nested(value, &[path, &["0"]].concat(), visit),
        ValueSpec::Names(_, value) => {
            let name = if path == ["upstreams"] { "openai" } else { "production" };
            for_each_nested(value, &[path, &[name]].concat(), visit);
        }
        ValueSpec::Either(values) => values.iter().for_each(|value| for_each_nested(value, path, visit)),
        _ => {}
    }
}

/// Keys that a section needs beside the one of an example.
fn companions(section: &str, key: &str) -> Value {
    match (section, key) {
        ("caller", "secret" | "sha256") => json!({"name": "web"}),
        ("caller", _) => json!({"name": "web", "secret": "a-secret-of-a-caller"}),
        ("model", "match" | "overhead") => json!({"match": "a*", "tool_factor": 2}),
        ("model", _) => json!({"match": "a*", "overhead": 5}),
        ("route", "models") => json!({"upstream": "openai"}),
        ("route", "upstream") => json!({"models": ["a*"]}),
        ("route", _) => json!({"models": ["a*"], "upstream": "openai"}),
        ("quota", "timezone") => json!({"limit": 5, "per": "day"}),
        ("quota", _) => json!({"limit": 5, "per": "minute"}),
        ("tls", _) => json!({"cert": "cert.pem", "key": "key.pem"}),
        ("health", _) => json!({"path": "/health"}),
        ("redis", _) => json!({"url": "redis://r"}),
        _ => json!({}),
    }
}

/// Sets a value of a config. Sections on the way are created.
fn set(config: &mut Value, path: &[&str], section: &str, value: Value) {
    let [way @ .., last] = path else { return };
    let mut place = config;
    for (depth, name) in way.iter().enumerate() {
        place = match name.parse::<usize>() {
            Ok(_) => {
                if !place.is_array() {
                    // A caller whose quotas are set needs a name and a key too.
                    let is_caller = depth + 1 < way.len() && way.get(depth - 1) == Some(&"keys");
                    *place = json!([if is_caller { companions("caller", "quotas") } else { json!({}) }]);
                }
                &mut place[0]
            }
            Err(_) => &mut place[*name],
        };
        if place.is_null() {
            *place = json!({});
        }
    }
    if !place.is_object() {
        *place = json!({});
    }
    for (name, companion) in companions(section, last).as_object().unwrap() {
        place[name] = companion.clone();
    }
    if *last == "base_urls" {
        place.as_object_mut().unwrap().remove("base_url");
    }
    place[*last] = value;
}

#[test]
fn every_example_of_the_reference_is_accepted() {
    let variable = |name: &str| Some(format!("a-value-of-{name}"));
    let mut examples = 0;
    let mut refused = Vec::new();
    for_each_path(&TOP, &[], &mut |path, section, key| {
        let name = path.join(".");
        let Some(example) = key.example_text() else {
            return refused.push(format!("{name} needs an `.example(...)`"));
        };
        let mut config = json!({
            "upstreams": {"openai": {"base_url": "http://u/v1"}},
            "environments": {"production": {"upstream": "openai"}},
        });
        // The reader requires that this file exists.
        let example = if key.name == "tokenizer" { "fixtures/tokenizer.json" } else { &example };
        let document = value_of(&format!("key: {example}")).unwrap_or_else(|| panic!("{name}: {example}"));
        set(&mut config, path, section.name, document["key"].clone());
        let loaded = parse(&config.to_string(), "t.yaml", &variable, &[]);
        if let Err(faults) = loaded {
            refused.push(format!("{name}: {example}: {faults}"));
        }
        examples += 1;
    });
    assert!(refused.is_empty(), "{}", refused.join("\n"));
    assert!(examples > 60, "only {examples} examples");
}

/// The keys that a running gateway refuses to change are those that the description calls fixed.
#[test]
fn the_fixed_keys_are_those_that_a_reload_refuses() {
    let config = |store: &str, port: u16| {
        let listeners = format!(
            "server: {{ listen: '127.0.0.1:{port}' }}\nadmin: {{ listen: '127.0.0.1:{}' }}\n",
            port + 1
        );
        config(&format!("{MINIMAL}{listeners}store: {{ {store} }}\n"))
    };
    let pairs = [
        (config("path: a.db", 1), config("path: b.db", 3)),
        (config("memory: true", 1), config("memory: false", 1)),
        (config("redis: { url: 'redis://a' }", 1), config("redis: { url: 'redis://b' }", 1)),
        (
            config("redis: { url: 'redis://a', timeout: 1s, prefix: x }", 1),
            config("redis: { url: 'redis://a' }", 1),
        ),
    ];
    let faults = pairs.iter().flat_map(|(old, new)| restart_faults(old, new));
    let mut refused: Vec<String> = faults.map(|fault| fault.split(' ').next().unwrap().to_owned()).collect();
    refused.sort_unstable();
    let mut fixed = Vec::new();
    for_each_path(&TOP, &[], &mut |path, _, key| {
        if key.reload == Reload::Refused {
            fixed.push(path.join("."));
        }
    });
    fixed.sort_unstable();
    assert_eq!(fixed, refused);
}
