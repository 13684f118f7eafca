//! Typed access to the YAML tree. A wrong value is recorded as a fault, and reading continues.

use super::fault::{Findings, Location};
use super::tree::{YamlKey, YamlNode, YamlScalar, YamlValue, join};
use super::{Secret, units};
use http::HeaderValue;
use std::path::PathBuf;
use std::time::Duration;

/// A node of the tree together with its path, such as `environments.staging.quotas`.
#[derive(Clone)]
pub(super) struct Setting<'n> {
    pub(super) node: &'n YamlNode,
    pub(super) path: String,
    pub(super) findings: &'n Findings,
}

/// A mapping. Its keys are either the names of settings or names that the file declares.
pub(super) struct Section<'n> {
    entries: &'n [(YamlKey, YamlNode)],
    pub(super) location: &'n Location,
    pub(super) path: String,
    pub(super) findings: &'n Findings,
}

impl<'n> Setting<'n> {
    pub(super) fn fault(&self, message: impl Into<String>) {
        self.findings.fault(&self.node.location, &self.path, message);
    }

    pub(super) fn warn(&self, message: impl Into<String>) {
        self.findings.warn(&self.node.location, &self.path, message);
    }

    /// Records that the value has the wrong YAML type, unless it has a fault already.
    fn fault_wrong_type(&self, expected: &str) {
        if !matches!(self.node.value, YamlValue::Unknown) {
            self.fault(format!("this must be {expected}, not {}", self.type_name()));
        }
    }

    fn type_name(&self) -> &'static str {
        match &self.node.value {
            _ if self.node.is_null() => "an empty value",
            YamlValue::Scalar(_) | YamlValue::Unknown => "a single value",
            YamlValue::List(_) => "a list",
            YamlValue::Map(_) => "a mapping",
        }
    }

    /// A mapping whose keys are settings. Each key that is not in `known` is a fault.
    pub(super) fn section(&self, known: &[&str]) -> Option<Section<'n>> {
        let section = self.map("a mapping")?;
        for (key, _) in section.entries.iter().filter(|(key, _)| !known.contains(&key.name.as_str())) {
            let suggestion = self.findings.suggestion(&key.name, known);
            section.findings.fault(
                &key.location,
                &self.path,
                format!("unknown key \"{}\"; {suggestion}", key.name),
            );
        }
        Some(section)
    }

    /// A mapping whose keys are declared names.
    pub(super) fn map(&self, expected: &str) -> Option<Section<'n>> {
        let YamlValue::Map(entries) = &self.node.value else {
            self.fault_wrong_type(expected);
            return None;
        };
        Some(Section {
            entries,
            location: &self.node.location,
            path: self.path.clone(),
            findings: self.findings,
        })
    }

    pub(super) fn list(&self) -> Option<Vec<Setting<'n>>> {
        let YamlValue::List(items) = &self.node.value else {
            self.fault_wrong_type("a list");
            return None;
        };
        let element = |(index, node)| Setting {
            node,
            path: format!("{}[{index}]", self.path),
            findings: self.findings,
        };
        Some(items.iter().enumerate().map(element).collect())
    }

    /// The elements of a list. A value that is not a list counts as a list of one.
    pub(super) fn one_or_more(&self) -> Vec<Setting<'n>> {
        match &self.node.value {
            YamlValue::List(_) => self.list().unwrap_or_default(),
            _ => vec![self.clone()],
        }
    }

    /// The text of a single value.
    pub(super) fn text(&self) -> Option<&'n str> {
        let YamlValue::Scalar(scalar) = &self.node.value else {
            self.fault_wrong_type("a single value");
            return None;
        };
        Some(&scalar.text)
    }

    pub(super) fn boolean(&self) -> Option<bool> {
        self.choice(&[("true", true), ("false", false)])
    }

    pub(super) fn amount(&self) -> Option<u64> {
        self.parsed(units::amount, "an amount; write a whole number such as 1500, 1_500, 200k, 1.5M or 2G")
    }

    /// An amount from 1 to `max`. `zero` is the message for 0.
    pub(super) fn positive(&self, max: u64, zero: &str) -> Option<u64> {
        let amount = self.amount()?;
        if amount == 0 {
            self.fault(zero);
        } else if amount > max {
            self.fault(format!("{} is too large; the maximum is {max}", self.quoted()));
        }
        (1..=max).contains(&amount).then_some(amount)
    }

    pub(super) fn duration(&self) -> Option<Duration> {
        const FORMS: &str = "500ms, 30s, 5m, 1h or 1d, or one of second, minute, hour, day, week, month";
        let text = self.text()?;
        let duration = units::duration(text);
        if duration.is_none() {
            let lacks_unit = units::amount(text).is_some();
            let fault = if lacks_unit { "has no unit" } else { "is not a duration" };
            self.fault(format!("{} {fault}; write {FORMS}", self.quoted()));
        }
        duration
    }

    pub(super) fn size(&self) -> Option<usize> {
        self.parsed(units::size, "a size; write 512KiB, 32MiB, 1GiB or a number of bytes")
    }

    /// The value that belongs to one of several words.
    pub(super) fn choice<T: Clone>(&self, words: &[(&str, T)]) -> Option<T> {
        let text = self.text()?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| value.clone());
        if found.is_none() {
            let all: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.fault(format!("{} is not valid here; write one of {}", self.quoted(), all.join(", ")));
        }
        found
    }

    /// The index in `names` of the name that this setting contains. `what` is the kind of name, for the message.
    pub(super) fn index_of_name(&self, what: &str, names: &[&str]) -> Option<usize> {
        let name = self.text()?;
        let index = names.iter().position(|n| *n == name);
        if index.is_none() {
            // A suggestion would reveal part of a value from a variable.
            let suggestion = if self.is_external() {
                self.findings.suggestion("", names)
            } else {
                self.findings.suggestion(name, names)
            };
            self.fault(format!("there is no {what} {}; {suggestion}", self.quoted()));
        }
        index
    }

    /// The result of `parse`. `expected` describes a valid value for the message.
    pub(super) fn parsed<T>(&self, parse: impl FnOnce(&str) -> Option<T>, expected: &str) -> Option<T> {
        let parsed = parse(self.text()?);
        if parsed.is_none() {
            self.fault(format!("{} is not {expected}", self.quoted()));
        }
        parsed
    }

    /// The value for a message: in quotes, or "this value" if it is long or comes from outside the file.
    pub(super) fn quoted(&self) -> String {
        match &self.node.value {
            YamlValue::Scalar(YamlScalar { text, is_external: false, .. }) if text.len() <= 80 => {
                format!("\"{text}\"")
            }
            _ => "this value".to_owned(),
        }
    }

    /// A path of a file.
    pub(super) fn path(&self) -> Option<PathBuf> {
        self.parsed(|text| (!text.is_empty()).then(|| text.into()), "a path")
    }

    /// A secret that the gateway sends or receives in a header. An empty one counts as absent.
    pub(super) fn secret(&self) -> Option<Secret> {
        let text = self.text()?;
        if text.trim() != text || HeaderValue::from_str(text).is_err() {
            self.fault(
                "this key has a space at its beginning or end, or a character that a header must not contain; remove it",
            );
        }
        (!text.is_empty()).then(|| Secret::new(text))
    }

    fn is_external(&self) -> bool {
        matches!(&self.node.value, YamlValue::Scalar(YamlScalar { is_external: true, .. }))
    }
}

impl<'n> Section<'n> {
    /// The setting with this name, unless it is absent or null.
    pub(super) fn get(&self, name: &str) -> Option<Setting<'n>> {
        self.find(name).filter(|setting| !setting.node.is_null())
    }

    fn find(&self, name: &str) -> Option<Setting<'n>> {
        self.entries.iter().find(|(key, _)| key.name == name).map(|(_, node)| self.setting(name, node))
    }

    /// Like `get`, for a setting that restricts callers. A null is a fault, because it would silently remove the
    /// restriction.
    pub(super) fn restriction(&self, name: &str) -> Option<Setting<'n>> {
        let setting = self.find(name)?;
        if setting.node.is_null() {
            setting.fault("the value is missing; add a value or remove the key");
            return None;
        }
        Some(setting)
    }

    /// The setting with this name. Its absence is a fault.
    pub(super) fn require(&self, name: &str, example: &str) -> Option<Setting<'n>> {
        let setting = self.get(name);
        if setting.is_none() {
            self.fault(format!("\"{name}\" is missing; for example: {example}"));
        }
        setting
    }

    /// The section with this name, or an empty one if it is absent or not a mapping.
    pub(super) fn section(&self, name: &str, known: &[&str]) -> Section<'n> {
        let path = join(&self.path, name);
        let absent = Section { entries: &[], location: self.location, path, findings: self.findings };
        self.get(name).and_then(|setting| setting.section(known)).unwrap_or(absent)
    }

    /// All entries with their keys.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'n YamlKey, Setting<'n>)> {
        self.entries.iter().map(|(key, node)| (key, self.setting(&key.name, node)))
    }

    /// The names of all keys.
    pub(super) fn names(&self) -> Vec<&'n str> {
        self.entries.iter().map(|(key, _)| key.name.as_str()).collect()
    }

    pub(super) fn fault(&self, message: impl Into<String>) {
        self.findings.fault(self.location, &self.path, message);
    }

    fn setting(&self, name: &str, node: &'n YamlNode) -> Setting<'n> {
        Setting { node, path: join(&self.path, name), findings: self.findings }
    }
}
