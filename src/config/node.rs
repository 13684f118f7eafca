//! The file as a tree whose every node knows where it stands.
//!
//! YAML is parsed by `granit-parser`, the parser beneath serde-saphyr: strict, with positions, without
//! recursion. A tree of our own is built from its events because a config's faults are to be told all
//! at once, each with its place, which no deserializer does.

use super::fault::{Findings, Place};
use granit_parser::{Event, Parser, ScalarStyle};
use std::collections::HashMap;
use std::rc::Rc;

const DEEPEST: usize = 32;
/// Aliases copy what they stand for: this bounds the whole tree.
const MOST_NODES: usize = 100_000;
/// `${...}` is hidden from the YAML parser behind characters of a private use plane, so that it may
/// stand anywhere a plain word may, also within `{ }`.
const HIDDEN: u32 = 0xF_0000;

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) place: Place,
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    Scalar(Scalar),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) place: Place,
}

#[derive(Clone, Debug)]
pub(super) struct Scalar {
    pub(super) text: String,
    /// Written without quotes: may stand for nothing, a number, a truth value.
    pub(super) is_plain: bool,
    /// Comes from a variable or a file, so that no message may repeat it.
    pub(super) is_foreign: bool,
}

impl Node {
    pub(super) fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar(s) if s.is_plain && !s.is_foreign && matches!(s.text.as_str(), "" | "~" | "null"))
    }

    /// How many nodes it is made of.
    fn size(&self) -> usize {
        match &self.value {
            Value::Scalar(_) => 1,
            Value::List(items) => 1 + items.iter().map(Node::size).sum::<usize>(),
            Value::Map(entries) => 1 + entries.iter().map(|(_, node)| node.size()).sum::<usize>(),
        }
    }

    fn empty_map(place: Place) -> Self {
        Self { value: Value::Map(Vec::new()), place }
    }
}

/// Where variables and files come from.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Parses a file and fills in its `${...}`. `None` if there is nothing to go on with.
pub(super) fn parse(text: &str, variables: Lookup<'_>, findings: &Findings) -> Option<Node> {
    let whole = Place::File(1, 1);
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.chars().any(|c| (HIDDEN..HIDDEN + 128).contains(&(c as u32))) {
        findings.fault(
            &whole,
            "",
            "the file has characters of a private use plane (U+F0000 ..), which stand for nothing",
        );
        return None;
    }
    let hidden = hide(text);
    let mut builder = Builder { findings, open: Vec::new(), anchors: HashMap::new(), root: None, nodes: 0 };
    for next in Parser::new_from_str(&hidden) {
        let proceed = match next {
            Ok((event, span)) => builder.take(event, Place::File(span.start.line(), span.start.col() + 1)),
            Err(error) => {
                let place = Place::File(error.marker().line(), error.marker().col() + 1);
                findings.fault(&place, "", format!("this is not YAML: {}", error.info()));
                return None;
            }
        };
        if !proceed {
            return None;
        }
    }
    let mut root = builder.root.unwrap_or_else(|| Node::empty_map(whole));
    if root.is_null() {
        root = Node::empty_map(root.place);
    }
    fill_in(&mut root, "", variables, findings);
    Some(root)
}

struct Builder<'a> {
    findings: &'a Findings,
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    root: Option<Node>,
    nodes: usize,
}

/// A list or mapping whose end has not come.
struct Open {
    node: Node,
    key: Option<Key>,
    anchor: usize,
}

impl Builder<'_> {
    /// Takes one event; false: there is no going on.
    fn take(&mut self, event: Event<'_>, place: Place) -> bool {
        self.nodes += 1;
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let scalar = Scalar {
                    text: text.into_owned(),
                    is_plain: style == ScalarStyle::Plain,
                    is_foreign: false,
                };
                self.add(Node { value: Value::Scalar(scalar), place }, anchor)
            }
            Event::SequenceStart(_, anchor, _) => {
                self.begin(Node { value: Value::List(Vec::new()), place }, anchor)
            }
            Event::MappingStart(_, anchor, _) => self.begin(Node::empty_map(place), anchor),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open { node, anchor, .. }) => self.add(node, anchor),
                None => true,
            },
            _ if self.nodes > MOST_NODES => {
                self.stop(&place, "the config is too large, or its aliases stand for too much")
            }
            Event::Alias(anchor) => match self.anchors.get(&anchor).cloned() {
                Some(node) => {
                    self.nodes += node.size();
                    self.add(Node { place, ..node }, 0)
                }
                None => self.stop(&place, "this alias stands within what it stands for"),
            },
            Event::DocumentStart(..) if self.root.is_some() => {
                self.stop(&place, "a config is one YAML document; a second one begins here")
            }
            _ => true,
        }
    }

    fn stop(&self, place: &Place, message: &str) -> bool {
        self.findings.fault(place, "", message);
        false
    }

    fn begin(&mut self, node: Node, anchor: usize) -> bool {
        if self.open.len() >= DEEPEST {
            return self.stop(&node.place, &format!("nested more than {DEEPEST} levels deep"));
        }
        self.open.push(Open { node, key: None, anchor });
        true
    }

    fn add(&mut self, node: Node, anchor: usize) -> bool {
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(parent) = self.open.last_mut() else {
            self.root = Some(node);
            return true;
        };
        let entries = match &mut parent.node.value {
            Value::List(items) => {
                items.push(node);
                return true;
            }
            Value::Map(entries) => entries,
            Value::Scalar(_) => return true,
        };
        match parent.key.take() {
            None => {
                let Value::Scalar(scalar) = node.value else {
                    return self.stop(&node.place, "a key has to be a word");
                };
                parent.key = Some(Key { name: reveal(&scalar.text), place: node.place });
                true
            }
            Some(key) if key.name == "<<" => merge(entries, node, self.findings),
            Some(key) => {
                if let Some(at) = entries.iter().position(|(known, _)| known.name == key.name) {
                    // What a merge brought gives way to what is written.
                    if entries[at].0.place == Place::File(0, 0) {
                        entries.remove(at);
                    } else {
                        self.findings.fault(
                            &key.place,
                            "",
                            format!("the key \"{}\" stands here twice", key.name),
                        );
                        return true;
                    }
                }
                entries.push((key, node));
                true
            }
        }
    }
}

/// `<<`: takes over the entries of a mapping, or of several, that are not written here.
fn merge(entries: &mut Vec<(Key, Node)>, node: Node, findings: &Findings) -> bool {
    let sources = match node.value {
        Value::List(items) => items,
        value => vec![Node { value, place: node.place.clone() }],
    };
    for source in sources {
        let Value::Map(merged) = source.value else {
            findings.fault(&source.place, "", "<< takes a mapping, or a list of mappings");
            return false;
        };
        for (key, value) in merged {
            if !entries.iter().any(|(known, _)| known.name == key.name) {
                entries.push((Key { name: key.name, place: Place::File(0, 0) }, value));
            }
        }
    }
    true
}

/// Puts every `${...}` out of the YAML parser's sight, character by character: places stay right.
fn hide(text: &str) -> String {
    let mut hidden = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let (before, reference) = rest.split_at(start);
        hidden.push_str(before);
        let line = reference.lines().next().unwrap_or_default();
        let end = line.find('}').map_or(2, |at| at + 1);
        let (reference, after) = reference.split_at(end);
        let is_whole = reference.len() > 2;
        let hide =
            |c: char| char::from_u32(HIDDEN + c as u32).filter(|_| is_whole && c.is_ascii()).unwrap_or(c);
        hidden.extend(reference.chars().map(hide));
        rest = after;
    }
    hidden.push_str(rest);
    hidden
}

fn reveal(text: &str) -> String {
    let show = |c: char| match c as u32 {
        code @ HIDDEN.. if code < HIDDEN + 128 => char::from_u32(code - HIDDEN).unwrap_or(c),
        _ => c,
    };
    text.chars().map(show).collect()
}

/// Replaces every `${...}` in the scalars of a tree.
fn fill_in(node: &mut Node, path: &str, variables: Lookup<'_>, findings: &Findings) {
    match &mut node.value {
        Value::List(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                fill_in(item, &format!("{path}[{index}]"), variables, findings);
            }
        }
        Value::Map(entries) => {
            for (key, value) in entries {
                let path = if path.is_empty() { key.name.clone() } else { format!("{path}.{}", key.name) };
                fill_in(value, &path, variables, findings);
            }
        }
        Value::Scalar(scalar) => {
            let shown = reveal(&scalar.text);
            if shown != scalar.text {
                scalar.is_foreign = true;
                scalar.text = resolve(&shown, variables).unwrap_or_else(|message| {
                    findings.fault(&node.place, path, message);
                    String::new()
                });
            }
        }
    }
}

fn resolve(text: &str, variables: Lookup<'_>) -> Result<String, String> {
    let mut resolved = String::new();
    let mut rest = text;
    while let Some((before, reference)) = rest.split_once("${") {
        resolved.push_str(before);
        let Some((reference, after)) = reference.split_once('}') else {
            resolved.push_str("${");
            rest = reference;
            continue;
        };
        resolved.push_str(&look_up(reference, variables)?);
        rest = after;
    }
    resolved.push_str(rest);
    Ok(resolved)
}

fn look_up(reference: &str, variables: Lookup<'_>) -> Result<String, String> {
    if let Some(path) = reference.strip_prefix("file:") {
        let read = std::fs::read_to_string(path);
        return read
            .map(|content| content.trim().to_owned())
            .map_err(|e| format!("the file {path} cannot be read: {e}"));
    }
    let (name, default) = match reference.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (reference, None),
    };
    let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !is_name {
        return Err(format!(
            "\"${{{reference}}}\" names no variable: write ${{NAME}}, ${{NAME:-default}} or ${{file:/path}}"
        ));
    }
    // As in a shell, an empty variable takes the default too.
    match (variables(name).filter(|value| default.is_none() || !value.is_empty()), default) {
        (Some(value), _) => Ok(value),
        (None, Some(default)) => Ok(default.to_owned()),
        (None, None) => {
            Err(format!("the variable {name} is not set; set it, or give a default: ${{{name}:-value}}"))
        }
    }
}

/// Puts `TOLLGATE__A__B=value` into the tree.
pub(super) fn override_with(root: &mut Node, variable: &str, value: &str, findings: &Findings) {
    let name: Rc<str> = variable.into();
    let place = Place::Variable(name);
    let segments: Vec<&str> = variable.split("__").skip(1).collect();
    if segments.is_empty() || segments.iter().any(|s| s.is_empty()) {
        findings.fault(&place, "", "an override is named TOLLGATE__SECTION__SETTING");
        return;
    }
    let mut node = root;
    for segment in segments {
        let Some(next) = step(node, segment, &place) else {
            findings.fault(&place, "", format!("there is no setting at the step \"{segment}\""));
            return;
        };
        node = next;
    }
    let scalar = Scalar { text: value.to_owned(), is_plain: true, is_foreign: true };
    *node = Node { value: Value::Scalar(scalar), place };
}

/// One step down; a mapping gets an entry that it lacks.
fn step<'n>(node: &'n mut Node, segment: &str, place: &Place) -> Option<&'n mut Node> {
    let matches = |name: &str| name.replace('-', "_").eq_ignore_ascii_case(&segment.replace('-', "_"));
    if node.is_null() {
        *node = Node::empty_map(place.clone());
    }
    match &mut node.value {
        Value::List(items) => items.get_mut(segment.parse::<usize>().ok()?),
        Value::Map(entries) => {
            let at = entries.iter().position(|(key, _)| matches(&key.name)).unwrap_or_else(|| {
                let key = Key { name: segment.to_ascii_lowercase(), place: place.clone() };
                let nothing = Scalar { text: String::new(), is_plain: true, is_foreign: false };
                entries.push((key, Node { value: Value::Scalar(nothing), place: place.clone() }));
                entries.len() - 1
            });
            Some(&mut entries[at].1)
        }
        Value::Scalar(_) => None,
    }
}
