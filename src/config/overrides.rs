//! Overrides: the variable `TOLLGATE__A__B=value` replaces the setting `a.b` of the file.

use super::fault::{Findings, Location};
use super::tree::{YamlKey, YamlNode, YamlScalar, YamlValue};

/// The prefix of the names of all overrides.
pub(super) const PREFIX: &str = "TOLLGATE__";

/// Replaces a setting of the tree by the value of a variable. If no such setting exists, reading the tree reports it.
pub(super) fn apply(root: &mut YamlNode, variable: &str, value: &str, findings: &Findings) {
    let location = Location::Variable(variable.into());
    let segments: Vec<&str> = variable.strip_prefix(PREFIX).unwrap_or_default().split("__").collect();
    if segments.iter().any(|s| s.is_empty()) || segments.len() > 8 {
        findings.fault(
            &location,
            "",
            "this name is not the path of a setting; write it like TOLLGATE__SERVER__LISTEN",
        );
        return;
    }
    let mut node = root;
    for segment in segments {
        node = match child(node, segment, &location) {
            Ok(next) => next,
            Err(message) => return findings.fault(&location, "", message),
        };
    }
    // `null` removes the file's setting. Any other value is text from outside the file.
    let is_null = matches!(value, "null" | "~");
    let scalar = YamlScalar { text: value.to_owned(), is_plain: true, is_external: !is_null };
    *node = YamlNode { value: YamlValue::Scalar(scalar), location };
}

/// Returns the child of `node` with this name. A mapping without such a child gets a new one.
fn child<'n>(node: &'n mut YamlNode, segment: &str, location: &Location) -> Result<&'n mut YamlNode, String> {
    if node.is_null() {
        *node = YamlNode::empty_map(location.clone());
    }
    match &mut node.value {
        YamlValue::List(items) => {
            let index = segment.parse::<usize>().ok().and_then(|index| items.get_mut(index));
            index.ok_or_else(|| format!("the list here has no element \"{segment}\"; the first element is 0"))
        }
        YamlValue::Map(entries) => {
            let at = position(entries, segment).unwrap_or_else(|| {
                let name = segment.to_ascii_lowercase();
                let empty = YamlNode::scalar(String::new(), true, location.clone());
                entries.push((YamlKey { name, location: location.clone(), is_merged: false }, empty));
                entries.len() - 1
            });
            Ok(&mut entries[at].1)
        }
        YamlValue::Scalar(_) | YamlValue::Unknown => Err(format!(
            "the setting here is a single value, so it has no setting \"{segment}\"; shorten the name"
        )),
    }
}

/// The index of the entry with this name. The comparison ignores case, because variable names are often upper case. If
/// no entry matches, `-` and `_` count as equal, because variable names cannot contain `-`.
fn position(entries: &[(YamlKey, YamlNode)], segment: &str) -> Option<usize> {
    let same = |name: &str| name.eq_ignore_ascii_case(segment);
    let similar = |name: &str| name.replace('-', "_").eq_ignore_ascii_case(&segment.replace('-', "_"));
    let find = |matches: &dyn Fn(&str) -> bool| entries.iter().position(|(key, _)| matches(&key.name));
    find(&same).or_else(|| find(&similar))
}
