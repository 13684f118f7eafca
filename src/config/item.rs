//! Reading the tree with types: every wrong value is noted and reading goes on.

use super::fault::{Findings, Place};
use super::node::{Key, Node, Scalar, Value, join};
use super::units;
use std::time::Duration;

/// A setting: its node and its path.
#[derive(Clone)]
pub(super) struct Item<'n> {
    pub(super) node: &'n Node,
    pub(super) path: String,
    pub(super) findings: &'n Findings,
}

/// A mapping: of settings or of names.
pub(super) struct Section<'n> {
    entries: &'n [(Key, Node)],
    pub(super) place: &'n Place,
    pub(super) path: String,
    pub(super) findings: &'n Findings,
}

impl<'n> Item<'n> {
    pub(super) fn fault(&self, message: impl Into<String>) {
        self.findings.fault(&self.node.place, &self.path, message);
    }

    pub(super) fn warn(&self, message: impl Into<String>) {
        self.findings.warn(&self.node.place, &self.path, message);
    }

    /// Notes that this should have been something else; says nothing of what is at fault already.
    fn misfit(&self, expected: &str) {
        if !matches!(self.node.value, Value::Unknown) {
            self.fault(format!("this has to be {expected}, not {}", self.shape()));
        }
    }

    fn shape(&self) -> &'static str {
        match &self.node.value {
            _ if self.node.is_null() => "nothing",
            Value::Scalar(_) | Value::Unknown => "a single value",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }

    /// A mapping whose keys are settings: others are faults.
    pub(super) fn section(&self, known: &[&str]) -> Option<Section<'n>> {
        let section = self.map("a mapping")?;
        for (key, _) in section.entries.iter().filter(|(key, _)| !known.contains(&key.name.as_str())) {
            let hint = self.findings.hint(&key.name, known);
            section.findings.fault(&key.place, &self.path, format!("unknown key \"{}\"; {hint}", key.name));
        }
        Some(section)
    }

    /// A mapping whose keys are names.
    pub(super) fn map(&self, expected: &str) -> Option<Section<'n>> {
        let Value::Map(entries) = &self.node.value else {
            self.misfit(expected);
            return None;
        };
        Some(Section { entries, place: &self.node.place, path: self.path.clone(), findings: self.findings })
    }

    pub(super) fn list(&self) -> Option<Vec<Item<'n>>> {
        let Value::List(items) = &self.node.value else {
            self.misfit("a list");
            return None;
        };
        let item =
            |(index, node)| Item { node, path: format!("{}[{index}]", self.path), findings: self.findings };
        Some(items.iter().enumerate().map(item).collect())
    }

    /// The items of a list; a single item stands for a list of one.
    pub(super) fn one_or_more(&self) -> Vec<Item<'n>> {
        match &self.node.value {
            Value::List(_) => self.list().unwrap_or_default(),
            _ => vec![self.clone()],
        }
    }

    /// A single value, as it is written.
    pub(super) fn text(&self) -> Option<&'n str> {
        let Value::Scalar(scalar) = &self.node.value else {
            self.misfit("a single value");
            return None;
        };
        Some(&scalar.text)
    }

    pub(super) fn boolean(&self) -> Option<bool> {
        self.choice(&[("true", true), ("false", false)])
    }

    pub(super) fn amount(&self) -> Option<u64> {
        self.parsed(units::amount, "an amount: a whole number such as 1500, 1_500, 200k, 1.5M or 2G")
    }

    /// An amount within bounds; `zero` says why it must not be 0.
    pub(super) fn positive(&self, most: u64, zero: &str) -> Option<u64> {
        let amount = self.amount()?;
        if amount == 0 {
            self.fault(zero);
        } else if amount > most {
            self.fault(format!("{} is more than the most that can be counted, {most}", self.shown()));
        }
        (1..=most).contains(&amount).then_some(amount)
    }

    pub(super) fn duration(&self) -> Option<Duration> {
        const FORMS: &str = "500ms, 30s, 5m, 1h, 1d, or second, minute, hour, day, week, month";
        let text = self.text()?;
        let duration = units::duration(text);
        if duration.is_none() {
            let lacks_unit = units::amount(text).is_some();
            let what = if lacks_unit { "has no unit; durations are" } else { "is not a duration:" };
            self.fault(format!("{} {what} {FORMS}", self.shown()));
        }
        duration
    }

    pub(super) fn size(&self) -> Option<usize> {
        self.parsed(units::size, "a size: 512KiB, 32MiB, 1GiB or a number of bytes")
    }

    /// One of several words.
    pub(super) fn choice<T: Clone>(&self, words: &[(&str, T)]) -> Option<T> {
        let text = self.text()?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| value.clone());
        if found.is_none() {
            let all: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.fault(format!("{} is not one of {}", self.shown(), all.join(", ")));
        }
        found
    }

    /// The index of the name that stands here.
    pub(super) fn name_among(&self, what: &str, names: &[&str]) -> Option<usize> {
        let name = self.text()?;
        let index = names.iter().position(|n| *n == name);
        if index.is_none() {
            // A near name would tell of a value from outside.
            let hint = if self.is_foreign() {
                self.findings.hint("", names)
            } else {
                self.findings.hint(name, names)
            };
            self.fault(format!("there is no {what} {}; {hint}", self.shown()));
        }
        index
    }

    /// A value that a function understands; `expected` says what it takes.
    pub(super) fn parsed<T>(&self, parse: impl FnOnce(&str) -> Option<T>, expected: &str) -> Option<T> {
        let parsed = parse(self.text()?);
        if parsed.is_none() {
            self.fault(format!("{} is not {expected}", self.shown()));
        }
        parsed
    }

    /// The value, for a message; what came from outside the file is not repeated, nor what is long.
    pub(super) fn shown(&self) -> String {
        match &self.node.value {
            Value::Scalar(Scalar { text, is_foreign: false, .. }) if text.len() <= 80 => {
                format!("\"{text}\"")
            }
            _ => "this value".to_owned(),
        }
    }

    fn is_foreign(&self) -> bool {
        matches!(&self.node.value, Value::Scalar(Scalar { is_foreign: true, .. }))
    }
}

impl<'n> Section<'n> {
    /// The setting of that name, unless it is absent or `null`.
    pub(super) fn get(&self, name: &str) -> Option<Item<'n>> {
        self.find(name).filter(|item| !item.node.is_null())
    }

    fn find(&self, name: &str) -> Option<Item<'n>> {
        self.entries.iter().find(|(key, _)| key.name == name).map(|(_, node)| self.item(name, node))
    }

    /// Like `get`, for a setting that binds callers: written without a value it would lift the bound in
    /// silence, and so is a fault.
    pub(super) fn bound(&self, name: &str) -> Option<Item<'n>> {
        let item = self.find(name)?;
        if item.node.is_null() {
            item.fault("there is no value here; give it one, or leave the key out");
            return None;
        }
        Some(item)
    }

    /// The setting of that name, which must be there.
    pub(super) fn require(&self, name: &str, example: &str) -> Option<Item<'n>> {
        let item = self.get(name);
        if item.is_none() {
            self.fault(format!("\"{name}\" is missing; for example: {example}"));
        }
        item
    }

    /// The section of that name; an empty one if it is absent or at fault.
    pub(super) fn section(&self, name: &str, known: &[&str]) -> Section<'n> {
        let path = join(&self.path, name);
        let absent = Section { entries: &[], place: self.place, path, findings: self.findings };
        self.get(name).and_then(|item| item.section(known)).unwrap_or(absent)
    }

    /// All entries, with their keys.
    pub(super) fn items(&self) -> impl Iterator<Item = (&'n Key, Item<'n>)> {
        self.entries.iter().map(|(key, node)| (key, self.item(&key.name, node)))
    }

    /// The keys.
    pub(super) fn names(&self) -> Vec<&'n str> {
        self.entries.iter().map(|(key, _)| key.name.as_str()).collect()
    }

    pub(super) fn fault(&self, message: impl Into<String>) {
        self.findings.fault(self.place, &self.path, message);
    }

    fn item(&self, name: &str, node: &'n Node) -> Item<'n> {
        Item { node, path: join(&self.path, name), findings: self.findings }
    }
}
