//! Parses YAML into a tree with places.
//!
//! `granit-parser` is the parser beneath serde-saphyr: strict, with positions, without recursion. The
//! tree is built from its events here because a config's faults are to be told all at once, each with
//! its place, which no deserializer does.

use super::fault::{Findings, Place};
use super::node::{Key, Node, Value, WEIGHT, join};
use super::variables::{self, hide};
use granit_parser::{Event, Parser, ScalarStyle};
use std::collections::HashMap;

/// The deepest setting stands at level 7.
const DEEPEST: usize = 32;
/// Of the whole tree, with what its aliases stand for; a node weighs about its memory.
const HEAVIEST: usize = 16 << 20;
const LONGEST_KEY: usize = 256;

/// The root of a file's tree; `None` if there is nothing to go on with. `${...}` is not filled in.
pub(super) fn parse(text: &str, findings: &Findings) -> Option<Node> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some((before, after)) =
        text.find(|c| c == '\0' || variables::is_hidden(c)).map(|at| text.split_at(at))
    {
        let place = Place::File(1 + before.matches('\n').count(), 1);
        let c: String = after.chars().take(1).flat_map(char::escape_unicode).collect();
        findings.fault(&place, "", format!("this line holds {c}, which stands for nothing here"));
        return None;
    }
    let hidden = hide(text);
    let mut tree = Tree { findings, open: Vec::new(), anchors: HashMap::new(), root: None, weight: 0 };
    for next in Parser::new_from_str(&hidden) {
        match next {
            Ok((event, span)) => tree.take(event, Place::File(span.start.line(), span.start.col() + 1))?,
            Err(error) => {
                let place = Place::File(error.marker().line(), error.marker().col() + 1);
                findings.fault(&place, &tree.path(), format!("this is not YAML: {}", error.info()));
                return None;
            }
        }
    }
    match tree.root {
        Some(root) if root.is_null() => Some(Node::empty_map(root.place)),
        None => Some(Node::empty_map(Place::File(1, 1))),
        root => root,
    }
}

struct Tree<'a> {
    findings: &'a Findings,
    /// What has begun and not ended, from the root on.
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    root: Option<Node>,
    weight: usize,
}

struct Open {
    node: Node,
    anchor: usize,
    /// In a mapping: the key whose value comes next, where each key stands, and whether `<<` was seen.
    key: Option<Key>,
    index: HashMap<String, usize>,
    has_merge: bool,
}

impl Tree<'_> {
    /// Takes one event; `None`: there is no going on.
    fn take(&mut self, event: Event<'_>, place: Place) -> Option<()> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                self.refuse_tag(tag.is_some(), &place);
                self.charge(WEIGHT + text.len(), &place)?;
                self.add(Node::scalar(text.into_owned(), style == ScalarStyle::Plain, place), anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.refuse_tag(tag.is_some(), &place);
                self.begin(Node { value: Value::List(Vec::new()), place }, anchor)
            }
            Event::MappingStart(_, anchor, tag) => {
                self.refuse_tag(tag.is_some(), &place);
                self.begin(Node::empty_map(place), anchor)
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open { node, anchor, .. }) => self.add(node, anchor),
                None => Some(()),
            },
            Event::Alias(anchor) => self.copy(anchor, place),
            Event::DocumentStart(..) if self.root.is_some() => {
                self.stop(&place, "a config is one YAML document; a second one begins here")
            }
            _ => Some(()),
        }
    }

    fn stop(&self, place: &Place, message: &str) -> Option<()> {
        self.findings.fault(place, &self.path(), message);
        None
    }

    fn refuse_tag(&self, has_tag: bool, place: &Place) {
        if has_tag {
            self.findings.fault(
                place,
                &self.path(),
                "tags (!...) mean nothing here; write the value without one",
            );
        }
    }

    /// Notes that memory is needed.
    fn charge(&mut self, weight: usize, place: &Place) -> Option<()> {
        self.weight += weight;
        if self.weight > HEAVIEST {
            return self.stop(place, "the config is too large, or its aliases stand for too much");
        }
        Some(())
    }

    fn begin(&mut self, node: Node, anchor: usize) -> Option<()> {
        self.charge(WEIGHT, &node.place)?;
        self.check_depth(1, &node.place)?;
        self.open.push(Open { node, anchor, key: None, index: HashMap::new(), has_merge: false });
        Some(())
    }

    fn check_depth(&self, more: usize, place: &Place) -> Option<()> {
        if self.open.len() + more > DEEPEST {
            return self.stop(place, &format!("nested more than {DEEPEST} levels deep"));
        }
        Some(())
    }

    /// Puts in what an alias stands for.
    fn copy(&mut self, anchor: usize, place: Place) -> Option<()> {
        let Some(original) = self.anchors.get(&anchor) else {
            return self.stop(&place, "this alias stands within what it stands for");
        };
        let (weight, height) = original.extent();
        self.charge(weight, &place)?;
        self.check_depth(height, &place)?;
        let value = self.anchors.get(&anchor)?.value.clone();
        self.add(Node { value, place }, 0)
    }

    /// Adds a whole node to what is open: an item, a key or a value.
    fn add(&mut self, node: Node, anchor: usize) -> Option<()> {
        if anchor > 0 {
            self.charge(node.extent().0, &node.place)?;
            self.anchors.insert(anchor, node.clone());
        }
        let Some(parent) = self.open.last_mut() else {
            self.root = Some(node);
            return Some(());
        };
        match (&mut parent.node.value, parent.key.take()) {
            (Value::List(items), _) => items.push(node),
            (_, None) => return self.add_key(node),
            (_, Some(key)) => self.add_entry(key, node),
        }
        Some(())
    }

    fn add_key(&mut self, node: Node) -> Option<()> {
        let Value::Scalar(scalar) = node.value else {
            return self.stop(&node.place, "a key has to be a word");
        };
        let name = variables::reveal(&scalar.text);
        if name.len() > LONGEST_KEY {
            return self.stop(&node.place, &format!("this key is longer than {LONGEST_KEY} characters"));
        }
        if name.contains("${") {
            self.findings.fault(&node.place, &self.path(), "variables stand in values, not in keys");
        }
        if let Some(parent) = self.open.last_mut() {
            parent.key = Some(Key { name, place: node.place, is_merged: false });
        }
        Some(())
    }

    fn add_entry(&mut self, key: Key, node: Node) {
        let path = self.path();
        let Some(Open { node: parent, index, has_merge, .. }) = self.open.last_mut() else { return };
        let Value::Map(entries) = &mut parent.value else { return };
        let is_merge = key.name == "<<";
        match index.get(&key.name).and_then(|at| entries.get_mut(*at)) {
            _ if is_merge && !*has_merge => {
                *has_merge = true;
                merge(entries, index, node, &join(&path, "<<"), self.findings);
            }
            // What a merge brought gives way to what is written.
            Some(entry) if entry.0.is_merged => *entry = (key, node),
            None if !is_merge => {
                index.insert(key.name.clone(), entries.len());
                entries.push((key, node));
            }
            _ => {
                let message = format!("the key \"{}\" stands here twice; keep one of the two", key.name);
                self.findings.fault(&key.place, &path, message);
            }
        }
    }

    /// Of the setting that is being read.
    fn path(&self) -> String {
        self.open.iter().fold(String::new(), |path, open| match (&open.key, &open.node.value) {
            (Some(key), _) => join(&path, &key.name),
            (None, Value::List(items)) => format!("{path}[{}]", items.len()),
            _ => path,
        })
    }
}

/// `<<`: takes over the entries of a mapping, or of several, that are not written here.
fn merge(
    entries: &mut Vec<(Key, Node)>,
    index: &mut HashMap<String, usize>,
    node: Node,
    path: &str,
    findings: &Findings,
) {
    let sources = match node.value {
        Value::List(items) => items,
        value => vec![Node { value, place: node.place }],
    };
    for source in sources {
        let Value::Map(merged) = source.value else {
            findings.fault(&source.place, path, "<< takes a mapping, or a list of mappings");
            continue;
        };
        for (key, value) in merged {
            if !index.contains_key(&key.name) {
                index.insert(key.name.clone(), entries.len());
                entries.push((Key { is_merged: true, ..key }, value));
            }
        }
    }
}
