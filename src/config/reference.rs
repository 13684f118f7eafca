//! The reference of the config's keys as Markdown, made from the descriptions that the reader uses.

use super::description::{DefaultSpec, KeySpec, Reload, SectionSpec, ValueSpec};
use super::top::TOP;

/// The tables of all sections, each under its path: the output of `tollgate schema --format markdown`.
pub(crate) fn reference() -> String {
    let mut sections = Vec::new();
    collect(&TOP, "", true, &mut sections);
    let own: Vec<&str> = sections.iter().map(|(_, section)| section.name).collect();
    let part = |(path, section): &(String, &SectionSpec)| {
        let heading = if path.is_empty() { "Top level".to_owned() } else { format!("`{path}`") };
        format!("## {heading}\n\n{}", table(section, &own))
    };
    let parts: Vec<String> = sections.iter().map(part).collect();
    parts.join("\n")
}

/// Adds the sections that get a table: those of the top level, and those that a file may contain several times. Each
/// is added once, with the first path at which a file may contain it.
fn collect(
    spec: &'static SectionSpec,
    path: &str,
    is_own: bool,
    sections: &mut Vec<(String, &'static SectionSpec)>,
) {
    if is_own {
        if sections.iter().any(|(_, known)| known.name == spec.name) {
            return;
        }
        sections.push((path.to_owned(), spec));
    }
    for key in spec.keys {
        let dot = if path.is_empty() { "" } else { "." };
        collect_of_value(&key.value, &format!("{path}{dot}{}", key.name), path.is_empty(), sections);
    }
}

fn collect_of_value(
    value: &'static ValueSpec,
    path: &str,
    is_own: bool,
    sections: &mut Vec<(String, &'static SectionSpec)>,
) {
    match value {
        ValueSpec::Section(spec) => collect(spec, path, is_own, sections),
        ValueSpec::Names(_, element) => collect_of_value(element, &format!("{path}.*"), true, sections),
        ValueSpec::List(element) => collect_of_value(element, &format!("{path}[]"), true, sections),
        ValueSpec::OneOrMore(element) => collect_of_value(element, path, true, sections),
        ValueSpec::Either(specs) => {
            specs.iter().for_each(|spec| collect_of_value(spec, path, is_own, sections));
        }
        _ => {}
    }
}

/// The table of a section. Sections that are not in `own` are part of it, with dotted names.
pub(super) fn table(spec: &SectionSpec, own: &[&str]) -> String {
    let mut text = "| key | type | default | example | while running | effect |\n\
                    | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    add_rows(spec, "", own, &mut text);
    text
}

fn add_rows(spec: &SectionSpec, prefix: &str, own: &[&str], text: &mut String) {
    for key in spec.keys {
        let name = format!("{prefix}{}", key.name);
        let example = key.example_text().map_or_else(String::new, |example| format!("`{example}`"));
        let cells = [
            format!("`{name}`"),
            key.value.label(),
            default(key),
            example,
            reload(key).to_owned(),
            effect(key),
        ];
        *text += &format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
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

/// Whether the key can change while the gateway runs. The keys of a section have their own answers.
fn reload(key: &KeySpec) -> &'static str {
    match (key.reload, &key.value) {
        (Reload::Applies, ValueSpec::Section(_)) => "",
        (Reload::Applies, _) => "changes",
        (Reload::NextStart, _) => "from the next start on",
        (Reload::Refused, _) => "fixed",
    }
}

fn effect(key: &KeySpec) -> String {
    let lists: &[ValueSpec] = match &key.value {
        ValueSpec::Either(specs) => specs,
        value => std::slice::from_ref(value),
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
