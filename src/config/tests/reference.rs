//! The tables of `docs/configuration.md` are made from the descriptions of the keys.

use super::schema::for_each_key;
use super::*;
use crate::config::description::{DefaultSpec, KeySpec, SectionSpec, ValueSpec};
use crate::config::top::TOP;

const BEGIN: &str = "<!-- keys of ";
const END: &str = "<!-- end of keys -->";

/// The table of a section. Sections without a table of their own are part of it, with dotted names.
fn table(spec: &SectionSpec, own: &[&str]) -> String {
    let mut text = "| key | type | default | effect |\n| --- | --- | --- | --- |\n".to_owned();
    add_rows(spec, "", own, &mut text);
    text
}

fn add_rows(spec: &SectionSpec, prefix: &str, own: &[&str], text: &mut String) {
    for key in spec.keys {
        let name = format!("{prefix}{}", key.name);
        *text += &format!("| `{name}` | {} | {} | {} |\n", key.value.label(), default(key), effect(key));
        let (ValueSpec::Section(nested) | ValueSpec::Either([ValueSpec::Section(nested), ..])) = &key.value
        else {
            continue;
        };
        if !own.contains(&nested.name) {
            add_rows(nested, &format!("{name}."), own, text);
        }
    }
}

fn default(key: &KeySpec) -> String {
    match key.default {
        DefaultSpec::Required(_) => "required".to_owned(),
        DefaultSpec::Value(text) => format!("`{text}`"),
        DefaultSpec::Section => String::new(),
        DefaultSpec::Absent(text) | DefaultSpec::Derived(text, _) => text.to_owned(),
    }
}

fn effect(key: &KeySpec) -> String {
    let lists: &[&ValueSpec] = match &key.value {
        ValueSpec::Either([first, second]) => &[first, second],
        value => &[value],
    };
    let words = lists.iter().filter_map(|value| match value {
        ValueSpec::Words(words) => Some(*words),
        _ => None,
    });
    let meanings: Vec<String> = words
        .flatten()
        .filter(|word| !word.1.is_empty())
        .map(|word| format!("`{}`: {}", word.0, word.1))
        .collect();
    if meanings.is_empty() { key.about.to_owned() } else { format!("{}. {}", key.about, meanings.join("; ")) }
}

/// `UPDATE_DOCS=1 cargo test --lib config::tests::reference` writes the tables.
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
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &current).unwrap();
    }
    let differing = document.lines().zip(current.lines()).find(|(old, new)| old != new);
    assert!(
        document == current,
        "update the tables with UPDATE_DOCS=1; the first difference: {differing:#?}"
    );
}
