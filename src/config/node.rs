//! The file as a tree whose every node knows where it stands.

use super::fault::Place;

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
    /// Could not be told; the fault is noted already.
    Unknown,
}

#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) place: Place,
    /// Comes from a `<<`, and so gives way to what is written.
    pub(super) is_merged: bool,
}

/// A single value, as text: it gets its type from the setting that it is for, so that a key of digits
/// is no number and a variable's text can be any type.
#[derive(Clone, Debug)]
pub(super) struct Scalar {
    pub(super) text: String,
    /// Written without quotes.
    pub(super) is_plain: bool,
    /// Comes from a variable or a file, so that no message may repeat it.
    pub(super) is_foreign: bool,
}

impl Node {
    pub(super) fn scalar(text: String, is_plain: bool, place: Place) -> Self {
        Self { value: Value::Scalar(Scalar { text, is_plain, is_foreign: false }), place }
    }

    pub(super) fn empty_map(place: Place) -> Self {
        Self { value: Value::Map(Vec::new()), place }
    }

    /// Whether it says "no value". Text from a variable never does: it is empty text.
    pub(super) fn is_null(&self) -> bool {
        match &self.value {
            Value::Scalar(Scalar { text, is_plain: true, is_foreign: false }) => {
                matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL")
            }
            _ => false,
        }
    }

    /// How much memory it takes, about, and how many levels it has.
    pub(super) fn extent(&self) -> (usize, usize) {
        let sum = |(weight, height): (usize, usize), (more, high): (usize, usize)| {
            (weight + more, height.max(high + 1))
        };
        match &self.value {
            Value::Scalar(scalar) => (WEIGHT + scalar.text.len(), 0),
            Value::Unknown => (WEIGHT, 0),
            Value::List(items) => items.iter().map(Node::extent).fold((WEIGHT, 1), sum),
            Value::Map(entries) => {
                entries.iter().map(|(_, node)| node.extent()).fold((WEIGHT * (1 + entries.len()), 1), sum)
            }
        }
    }
}

/// Of a node without its text.
pub(super) const WEIGHT: usize = 64;

/// The path of a setting within the one at `parent`.
pub(super) fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
}
