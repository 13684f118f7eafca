//! The YAML file as a tree in which every node has its location in the file.

use super::fault::Location;
use std::fmt;

#[derive(Clone, Debug)]
pub(super) struct YamlNode {
    pub(super) value: YamlValue,
    pub(super) location: Location,
}

#[derive(Clone, Debug)]
pub(super) enum YamlValue {
    Scalar(YamlScalar),
    List(Vec<YamlNode>),
    Map(Vec<(YamlKey, YamlNode)>),
    /// The value could not be resolved. Its fault is recorded already.
    Unknown,
}

#[derive(Clone, Debug)]
pub(super) struct YamlKey {
    pub(super) name: String,
    pub(super) location: Location,
    /// The key was merged in by `<<`. A key that the mapping itself contains replaces it.
    pub(super) is_merged: bool,
}

/// A single value, as text. The setting that reads it decides its type: a caller's key may consist of digits, and a
/// variable may contain a value of any type.
#[derive(Clone)]
pub(super) struct YamlScalar {
    pub(super) text: String,
    /// The value has no quotes.
    pub(super) is_plain: bool,
    /// The value comes from a variable or another file. It may be secret, so no message may contain it.
    pub(super) is_external: bool,
}

/// Leaves the text out: it can be a key.
impl fmt::Debug for YamlScalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("YamlScalar").field("is_plain", &self.is_plain).finish_non_exhaustive()
    }
}

impl YamlNode {
    pub(super) fn scalar(text: String, is_plain: bool, location: Location) -> Self {
        Self { value: YamlValue::Scalar(YamlScalar { text, is_plain, is_external: false }), location }
    }

    pub(super) fn empty_map(location: Location) -> Self {
        Self { value: YamlValue::Map(Vec::new()), location }
    }

    /// Whether the value is YAML's null. Text from a variable is never null: it is a string.
    pub(super) fn is_null(&self) -> bool {
        match &self.value {
            YamlValue::Scalar(YamlScalar { text, is_plain: true, is_external: false }) => {
                matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL")
            }
            _ => false,
        }
    }

    /// The approximate memory of the node with its children in bytes, and the number of levels below it.
    pub(super) fn weight_and_height(&self) -> (usize, usize) {
        let sum = |(weight, height): (usize, usize), (child_weight, child_height): (usize, usize)| {
            (weight + child_weight, height.max(child_height + 1))
        };
        match &self.value {
            YamlValue::Scalar(scalar) => (NODE_WEIGHT + scalar.text.len(), 0),
            YamlValue::Unknown => (NODE_WEIGHT, 0),
            YamlValue::List(items) => {
                items.iter().map(YamlNode::weight_and_height).fold((NODE_WEIGHT, 1), sum)
            }
            YamlValue::Map(entries) => {
                let children = entries.iter().map(|(_, node)| node.weight_and_height());
                children.fold((NODE_WEIGHT * (1 + entries.len()), 1), sum)
            }
        }
    }
}

/// The approximate memory of a node without its text, in bytes.
pub(super) const NODE_WEIGHT: usize = 64;

/// The path of the setting `name` within the setting at `parent`.
pub(super) fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_of_a_scalar_leaves_its_text_out() {
        let scalar = YamlScalar { text: "sk-canary".into(), is_plain: true, is_external: false };
        assert!(!format!("{scalar:?}").contains("canary"));
    }
}
