//! `TOLLGATE__A__B=value` in place of the file's setting `a.b`.

use super::fault::{Findings, Place};
use super::node::{Key, Node, Scalar, Value};

/// What the name of an override begins with.
pub(super) const PREFIX: &str = "TOLLGATE__";

/// Puts an override into the tree. A setting that does not exist is told when the tree is read.
pub(super) fn apply(root: &mut Node, variable: &str, value: &str, findings: &Findings) {
    let place = Place::Variable(variable.into());
    let segments: Vec<&str> = variable.strip_prefix(PREFIX).unwrap_or_default().split("__").collect();
    if segments.iter().any(|s| s.is_empty()) || segments.len() > 8 {
        findings.fault(
            &place,
            "",
            "an override is named after its setting, such as TOLLGATE__SERVER__LISTEN",
        );
        return;
    }
    let mut node = root;
    for segment in segments {
        node = match step(node, segment, &place) {
            Ok(next) => next,
            Err(message) => return findings.fault(&place, "", message),
        };
    }
    // `null` takes the file's setting away; any other value is text from outside.
    let is_null = matches!(value, "null" | "~");
    let scalar = Scalar { text: value.to_owned(), is_plain: true, is_foreign: !is_null };
    *node = Node { value: Value::Scalar(scalar), place };
}

/// One step down; a mapping gets an entry that it lacks.
fn step<'n>(node: &'n mut Node, segment: &str, place: &Place) -> Result<&'n mut Node, String> {
    if node.is_null() {
        *node = Node::empty_map(place.clone());
    }
    match &mut node.value {
        Value::List(items) => {
            let index = segment.parse::<usize>().ok().and_then(|index| items.get_mut(index));
            index.ok_or_else(|| format!("\"{segment}\" is no item of the list here; the first is 0"))
        }
        Value::Map(entries) => {
            let at = position(entries, segment).unwrap_or_else(|| {
                let name = segment.to_ascii_lowercase();
                let nothing = Node::scalar(String::new(), true, place.clone());
                entries.push((Key { name, place: place.clone(), is_merged: false }, nothing));
                entries.len() - 1
            });
            Ok(&mut entries[at].1)
        }
        Value::Scalar(_) | Value::Unknown => {
            Err(format!("there is no setting \"{segment}\" within a single value"))
        }
    }
}

/// Names of variables have no `-` and often no small letters.
fn position(entries: &[(Key, Node)], segment: &str) -> Option<usize> {
    let same = |name: &str| name.eq_ignore_ascii_case(segment);
    let alike = |name: &str| name.replace('-', "_").eq_ignore_ascii_case(&segment.replace('-', "_"));
    let find = |matches: &dyn Fn(&str) -> bool| entries.iter().position(|(key, _)| matches(&key.name));
    find(&same).or_else(|| find(&alike))
}
