//! Parses YAML into a tree with locations.
//!
//! `granit-parser` is the parser of serde-saphyr: strict, with positions, without recursion. This module builds the
//! tree from its events, because the config reports all faults at once, each with its location. No deserializer does
//! that.

use super::fault::{Findings, Location};
use super::tree::{NODE_WEIGHT, YamlKey, YamlNode, YamlValue, join};
use super::variables::{self, mask};
use granit_parser::{Event, Parser, ScalarStyle};
use std::collections::HashMap;

/// Maximum nesting depth. The deepest setting is at level 7.
const MAX_DEPTH: usize = 32;
/// Maximum weight of the tree with all aliases expanded. The weight of a node is about its memory in bytes.
const MAX_WEIGHT: usize = 16 << 20;
/// Maximum length of a mapping key in bytes.
const MAX_KEY_BYTES: usize = 256;

/// Returns the root of the tree, or `None` if the text is not usable YAML. References such as `${NAME}` are not resolved.
pub(super) fn parse(text: &str, findings: &Findings) -> Option<YamlNode> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some((before, after)) =
        text.find(|c| c == '\0' || variables::is_masked(c)).map(|at| text.split_at(at))
    {
        let location = Location::File(1 + before.matches('\n').count(), 1);
        let c: String = after.chars().take(1).flat_map(char::escape_unicode).collect();
        findings.fault(
            &location,
            "",
            format!("this line contains the character {c}, which is not allowed; remove it"),
        );
        return None;
    }
    let masked = mask(text);
    let mut tree = TreeBuilder { findings, open: Vec::new(), anchors: HashMap::new(), root: None, weight: 0 };
    for next in Parser::new_from_str(&masked) {
        match next {
            Ok((event, span)) => {
                tree.on_event(event, Location::File(span.start.line(), span.start.col() + 1))?;
            }
            Err(error) => {
                let (line, column) = (error.marker().line(), error.marker().col() + 1);
                if let Some(line) = tab_of_indentation(text, line) {
                    let message = "this line is indented with a tab, which YAML does not permit; use spaces";
                    findings.fault(&Location::File(line, 1), "", message);
                } else {
                    let message = format!("this is not YAML: {}", error.info());
                    findings.fault(&Location::File(line, column), &tree.path(), message);
                }
                return None;
            }
        }
    }
    match tree.root {
        Some(root) if root.is_null() => Some(YamlNode::empty_map(root.location)),
        None => Some(YamlNode::empty_map(Location::File(1, 1))),
        root => root,
    }
}

/// The line with an error, or the line after it, if a tab indents it. The parser reports the line before.
fn tab_of_indentation(text: &str, line: usize) -> Option<usize> {
    let indentation = |line: &str| line.len() - line.trim_start_matches([' ', '\t']).len();
    let lines = text.lines().enumerate().skip(line.saturating_sub(1)).take(2);
    let mut with_tab = lines.filter(|(_, line)| line[..indentation(line)].contains('\t'));
    with_tab.next().map(|(at, _)| at + 1)
}

struct TreeBuilder<'a> {
    findings: &'a Findings,
    /// The lists and mappings that have begun and not ended, from the root on.
    open: Vec<OpenCollection>,
    anchors: HashMap<usize, YamlNode>,
    root: Option<YamlNode>,
    weight: usize,
}

struct OpenCollection {
    node: YamlNode,
    anchor: usize,
    /// In a mapping: the key whose value comes next.
    key: Option<YamlKey>,
    /// In a mapping: the index of each key in its entries.
    index: HashMap<String, usize>,
    /// In a mapping: whether it had a `<<` already.
    has_merge: bool,
}

impl TreeBuilder<'_> {
    /// Adds one event to the tree. `None` means that reading must stop.
    fn on_event(&mut self, event: Event<'_>, location: Location) -> Option<()> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                self.refuse_tag(tag.is_some(), &location);
                self.add_weight(NODE_WEIGHT + text.len(), &location)?;
                self.add(YamlNode::scalar(text.into_owned(), style == ScalarStyle::Plain, location), anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.refuse_tag(tag.is_some(), &location);
                self.begin(YamlNode { value: YamlValue::List(Vec::new()), location }, anchor)
            }
            Event::MappingStart(_, anchor, tag) => {
                self.refuse_tag(tag.is_some(), &location);
                self.begin(YamlNode::empty_map(location), anchor)
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(OpenCollection { node, anchor, .. }) => self.add(node, anchor),
                None => Some(()),
            },
            Event::Alias(anchor) => self.copy(anchor, location),
            Event::DocumentStart(..) if self.root.is_some() => {
                self.stop(&location, "a second YAML document begins here; a config is one document")
            }
            _ => Some(()),
        }
    }

    fn stop(&self, location: &Location, message: &str) -> Option<()> {
        self.findings.fault(location, &self.path(), message);
        None
    }

    fn refuse_tag(&self, has_tag: bool, location: &Location) {
        if has_tag {
            self.findings.fault(location, &self.path(), "tags (!...) are not supported; remove the tag");
        }
    }

    /// Adds to the weight of the tree.
    fn add_weight(&mut self, weight: usize, location: &Location) -> Option<()> {
        self.weight += weight;
        if self.weight > MAX_WEIGHT {
            return self.stop(location, "the config is too large, or its aliases expand to too much");
        }
        Some(())
    }

    fn begin(&mut self, node: YamlNode, anchor: usize) -> Option<()> {
        self.add_weight(NODE_WEIGHT, &node.location)?;
        self.check_depth(1, &node.location)?;
        self.open.push(OpenCollection { node, anchor, key: None, index: HashMap::new(), has_merge: false });
        Some(())
    }

    fn check_depth(&self, more: usize, location: &Location) -> Option<()> {
        if self.open.len() + more > MAX_DEPTH {
            return self.stop(location, &format!("the config is nested more than {MAX_DEPTH} levels deep"));
        }
        Some(())
    }

    /// Adds a copy of the node that an alias refers to.
    fn copy(&mut self, anchor: usize, location: Location) -> Option<()> {
        let Some(original) = self.anchors.get(&anchor) else {
            return self.stop(&location, "this alias refers to a node that contains it");
        };
        let (weight, height) = original.weight_and_height();
        self.add_weight(weight, &location)?;
        self.check_depth(height, &location)?;
        let value = self.anchors.get(&anchor)?.value.clone();
        self.add(YamlNode { value, location }, 0)
    }

    /// Adds a complete node to the innermost open collection: an element, a key or a value.
    fn add(&mut self, node: YamlNode, anchor: usize) -> Option<()> {
        if anchor > 0 {
            self.add_weight(node.weight_and_height().0, &node.location)?;
            self.anchors.insert(anchor, node.clone());
        }
        let Some(parent) = self.open.last_mut() else {
            self.root = Some(node);
            return Some(());
        };
        match (&mut parent.node.value, parent.key.take()) {
            (YamlValue::List(items), _) => items.push(node),
            (_, None) => return self.add_key(node),
            (_, Some(key)) => self.add_entry(key, node),
        }
        Some(())
    }

    fn add_key(&mut self, node: YamlNode) -> Option<()> {
        let YamlValue::Scalar(scalar) = node.value else {
            return self.stop(&node.location, "a key must be a single word");
        };
        let name = variables::unmask(&scalar.text);
        if name.len() > MAX_KEY_BYTES {
            return self.stop(&node.location, &format!("this key is longer than {MAX_KEY_BYTES} bytes"));
        }
        if name.contains("${") {
            self.findings.fault(
                &node.location,
                &self.path(),
                "a key must not contain a variable; only values can",
            );
        }
        if let Some(parent) = self.open.last_mut() {
            parent.key = Some(YamlKey { name, location: node.location, is_merged: false });
        }
        Some(())
    }

    fn add_entry(&mut self, key: YamlKey, node: YamlNode) {
        let path = self.path();
        let Some(OpenCollection { node: parent, index, has_merge, .. }) = self.open.last_mut() else {
            return;
        };
        let YamlValue::Map(entries) = &mut parent.value else { return };
        let is_merge = key.name == "<<";
        match index.get(&key.name).and_then(|at| entries.get_mut(*at)) {
            _ if is_merge && !*has_merge => {
                *has_merge = true;
                merge(entries, index, node, &join(&path, "<<"), self.findings);
            }
            // A key of the mapping itself replaces a merged one.
            Some(entry) if entry.0.is_merged => *entry = (key, node),
            None if !is_merge => {
                index.insert(key.name.clone(), entries.len());
                entries.push((key, node));
            }
            _ => {
                let message = format!("the key \"{}\" is set twice; remove one of them", key.name);
                self.findings.fault(&key.location, &path, message);
            }
        }
    }

    /// The path of the setting that is being read.
    fn path(&self) -> String {
        self.open.iter().fold(String::new(), |path, open| match (&open.key, &open.node.value) {
            (Some(key), _) => join(&path, &key.name),
            (None, YamlValue::List(items)) => format!("{path}[{}]", items.len()),
            _ => path,
        })
    }
}

/// Merges the entries of one or several mappings (`<<`), except for keys that the target has already.
fn merge(
    entries: &mut Vec<(YamlKey, YamlNode)>,
    index: &mut HashMap<String, usize>,
    node: YamlNode,
    path: &str,
    findings: &Findings,
) {
    let sources = match node.value {
        YamlValue::List(items) => items,
        value => vec![YamlNode { value, location: node.location }],
    };
    for source in sources {
        let YamlValue::Map(merged) = source.value else {
            findings.fault(&source.location, path, "the value of << must be a mapping or a list of mappings");
            continue;
        };
        for (key, value) in merged {
            if !index.contains_key(&key.name) {
                index.insert(key.name.clone(), entries.len());
                entries.push((YamlKey { is_merged: true, ..key }, value));
            }
        }
    }
}
