//! The effective config: the settings of the file with variables resolved, overrides applied, defaults filled in and secrets
//! masked. `tollgate check --print` and `GET /api/config` show it.

mod yaml;

use super::description::{DefaultSpec, KeySpec, SectionSpec, ValueSpec};
use super::top::TOP;
use super::tree::{YamlNode, YamlValue};
use super::units;
use serde::ser::{Serialize, SerializeMap as _, Serializer};

/// The text that replaces a secret.
const MASK: &str = "***";

/// The effective config. It contains no secret. Its `Serialize` keeps the order of the sections.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct EffectiveConfig(Node);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Text(String),
    Boolean(bool),
    /// A whole number, or a decimal one as the file has it.
    Number(String),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

impl Default for Node {
    fn default() -> Self {
        Self::Map(Vec::new())
    }
}

impl EffectiveConfig {
    /// The config as YAML, which is valid as a config file apart from the masked secrets.
    pub(crate) fn to_yaml(&self) -> String {
        yaml::document(&self.0)
    }
}

impl Serialize for EffectiveConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl Serialize for Node {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Boolean(boolean) => serializer.serialize_bool(*boolean),
            Self::Number(text) => match (text.parse::<u64>(), text.parse::<f64>()) {
                (Ok(number), _) => serializer.serialize_u64(number),
                (_, Ok(number)) => serializer.serialize_f64(number),
                _ => serializer.serialize_str(text),
            },
            Self::List(items) => serializer.collect_seq(items),
            Self::Map(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (name, node) in entries {
                    map.serialize_entry(name, node)?;
                }
                map.end()
            }
        }
    }
}

/// Whether secrets are masked. Only tests compare unmasked configs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Secrets {
    Masked,
    #[cfg(test)]
    Shown,
}

/// The effective config of a tree whose variables are resolved.
pub(super) fn of(root: &YamlNode, secrets: Secrets) -> EffectiveConfig {
    EffectiveConfig(section(Some(root), &TOP, secrets))
}

/// A section with all keys that have a value or a default.
fn section(node: Option<&YamlNode>, spec: &SectionSpec, secrets: Secrets) -> Node {
    let entries = match node.map(|node| &node.value) {
        Some(YamlValue::Map(entries)) => entries.as_slice(),
        _ => &[],
    };
    let find = |name: &str| entries.iter().find(|(key, _)| key.name == name).map(|(_, node)| node);
    let text = |name: &str| match &find(name)?.value {
        YamlValue::Scalar(scalar) => Some(scalar.text.as_str()),
        _ => None,
    };
    let with_value = |key: &KeySpec| {
        let node = find(key.name).filter(|node| !node.is_null());
        let node = match (node, &key.default, &key.value) {
            (Some(node), ..) => value(node, &key.value, secrets),
            (None, DefaultSpec::Value(text), _) => scalar(text, &key.value, secrets),
            (None, DefaultSpec::Derived(_, derive), _) => scalar(&derive(&text)?, &key.value, secrets),
            (None, DefaultSpec::Section, ValueSpec::Section(spec)) => section(None, spec, secrets),
            (None, ..) => return None,
        };
        Some((key.name.to_owned(), node))
    };
    Node::Map(spec.keys.iter().filter_map(with_value).collect())
}

fn value(node: &YamlNode, spec: &ValueSpec, secrets: Secrets) -> Node {
    match (&node.value, spec) {
        (YamlValue::Map(_), ValueSpec::Section(spec)) => section(Some(node), spec, secrets),
        (YamlValue::Map(entries), ValueSpec::Names(_, spec)) => {
            let entry = |(key, node): &(super::tree::YamlKey, YamlNode)| {
                (key.name.clone(), value(node, spec, secrets))
            };
            Node::Map(entries.iter().map(entry).collect())
        }
        (YamlValue::List(items), ValueSpec::List(spec) | ValueSpec::OneOrMore(spec)) => {
            Node::List(items.iter().map(|item| value(item, spec, secrets)).collect())
        }
        (_, ValueSpec::OneOrMore(spec)) => value(node, spec, secrets),
        (YamlValue::Map(_), ValueSpec::Either(specs)) => {
            let is_section = |spec: &&ValueSpec| matches!(spec, ValueSpec::Section(_));
            specs.iter().find(is_section).map_or_else(Node::default, |spec| value(node, spec, secrets))
        }
        (YamlValue::Scalar(text), _) => scalar(&text.text, spec, secrets),
        // A valid config has no other combination.
        _ => Node::default(),
    }
}

fn scalar(text: &str, spec: &ValueSpec, secrets: Secrets) -> Node {
    let is_masked = secrets == Secrets::Masked && !text.is_empty();
    match spec {
        ValueSpec::Secret(_) if is_masked => Node::Text(MASK.to_owned()),
        ValueSpec::SecretUrl(_) if is_masked => Node::Text(without_password(text)),
        ValueSpec::Boolean => Node::Boolean(text == "true"),
        ValueSpec::Amount { .. } => number(units::amount(text).map(|amount| amount.to_string()), text),
        ValueSpec::Decimal(_) => number(text.parse::<f64>().ok().map(|_| text.to_owned()), text),
        ValueSpec::Words(_) => number(text.parse::<u64>().ok().map(|number| number.to_string()), text),
        ValueSpec::Either(specs) => {
            let is_amount = |spec: &&ValueSpec| matches!(spec, ValueSpec::Amount { .. });
            let amount = specs.iter().find(is_amount).and_then(|_| units::amount(text));
            number(amount.map(|amount| amount.to_string()), text)
        }
        _ => Node::Text(text.to_owned()),
    }
}

fn number(number: Option<String>, text: &str) -> Node {
    number.map_or_else(|| Node::Text(text.to_owned()), Node::Number)
}

/// A Redis URL without its password. As in the reader, a password ends at the last `@`.
fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return MASK.to_owned() };
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, format!("?{query}")),
        None => (rest, String::new()),
    };
    match rest.rsplit_once('@') {
        Some((login, rest)) if !login.starts_with('/') => {
            let user = login.split_once(':').map_or("", |(user, _)| user);
            format!("{scheme}://{user}:{MASK}@{rest}{query}")
        }
        _ => url.to_owned(),
    }
}
