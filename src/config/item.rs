//! Reading the tree with types: every wrong value is noted and reading goes on.

use super::fault::{Findings, Place, nearest};
use super::node::{Key, Node, Scalar, Value};
use super::units;
use std::time::Duration;

/// A setting: its node and its path.
#[derive(Clone)]
pub(super) struct Item<'n> {
    pub(super) node: &'n Node,
    pub(super) path: String,
    pub(super) findings: &'n Findings,
}

/// A mapping of settings.
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

    /// A mapping whose keys are settings: others are faults.
    pub(super) fn section(&self, known: &[&str]) -> Option<Section<'n>> {
        let section = self.map("a mapping")?;
        for (key, _) in section.entries.iter().filter(|(key, _)| !known.contains(&key.name.as_str())) {
            let hint = match nearest(&key.name, known.iter().copied()) {
                Some(near) => format!("did you mean \"{near}\"?"),
                None => format!("known here: {}", known.join(", ")),
            };
            section.findings.fault(&key.place, &self.path, format!("unknown key \"{}\"; {hint}", key.name));
        }
        Some(section)
    }

    /// A mapping whose keys are names.
    pub(super) fn map(&self, what: &str) -> Option<Section<'n>> {
        let Value::Map(entries) = &self.node.value else {
            self.fault(format!("this has to be {what}, not {}", self.shape()));
            return None;
        };
        Some(Section { entries, place: &self.node.place, path: self.path.clone(), findings: self.findings })
    }

    /// The items of a list; a single item stands for a list of one.
    pub(super) fn one_or_more(&self) -> Vec<Item<'n>> {
        match &self.node.value {
            Value::List(_) => self.list().unwrap_or_default(),
            _ => vec![self.clone()],
        }
    }

    pub(super) fn list(&self) -> Option<Vec<Item<'n>>> {
        let Value::List(items) = &self.node.value else {
            self.fault(format!("this has to be a list, not {}", self.shape()));
            return None;
        };
        let item = |(index, node): (usize, &'n Node)| Item {
            node,
            path: format!("{}[{index}]", self.path),
            findings: self.findings,
        };
        Some(items.iter().enumerate().map(item).collect())
    }

    /// A word, as it is written.
    pub(super) fn text(&self) -> Option<&'n str> {
        self.scalar().map(|s| s.text.as_str())
    }

    fn scalar(&self) -> Option<&'n Scalar> {
        if let Value::Scalar(scalar) = &self.node.value {
            Some(scalar)
        } else {
            self.fault(format!("this has to be a single value, not {}", self.shape()));
            None
        }
    }

    pub(super) fn boolean(&self) -> Option<bool> {
        self.choice(&[("true", true), ("false", false)])
    }

    pub(super) fn amount(&self) -> Option<u64> {
        self.parsed(units::amount, "an amount: a whole number such as 1500, 1_500, 200k, 1.5M or 2G")
    }

    pub(super) fn duration(&self) -> Option<Duration> {
        self.parsed(
            units::duration,
            "a duration: 500ms, 30s, 5m, 1h, 1d, or second, minute, hour, day, week, month",
        )
    }

    pub(super) fn size(&self) -> Option<usize> {
        self.parsed(units::size, "a size: 512KiB, 32MiB, 1GiB or a number of bytes")
    }

    /// One of several words.
    pub(super) fn choice<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        let text = self.text()?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let all: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let hint = nearest(text, all.iter().copied()).map(|near| format!("; did you mean \"{near}\"?"));
        let foreign = self.is_foreign();
        let hint = hint.filter(|_| !foreign).unwrap_or_default();
        self.fault(format!("{} has to be one of {}{hint}", self.shown(), all.join(", ")));
        None
    }

    /// A value that a function understands; `expected` says what it takes.
    pub(super) fn parsed<T>(&self, parse: impl FnOnce(&str) -> Option<T>, expected: &str) -> Option<T> {
        let parsed = parse(self.text()?);
        if parsed.is_none() {
            self.fault(format!("{} is not {expected}", self.shown()));
        }
        parsed
    }

    /// The value, for a message; what came from outside the file is not repeated.
    pub(super) fn shown(&self) -> String {
        match &self.node.value {
            Value::Scalar(Scalar { is_foreign: true, .. }) => "this value".to_owned(),
            Value::Scalar(scalar) => format!("\"{}\"", scalar.text),
            _ => self.shape().to_owned(),
        }
    }

    fn is_foreign(&self) -> bool {
        matches!(&self.node.value, Value::Scalar(Scalar { is_foreign: true, .. }))
    }

    fn shape(&self) -> &'static str {
        match &self.node.value {
            _ if self.node.is_null() => "nothing",
            Value::Scalar(_) => "a single value",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }
}

impl<'n> Section<'n> {
    /// The setting of that name, unless it is absent or `null`.
    pub(super) fn get(&self, name: &str) -> Option<Item<'n>> {
        self.items()
            .find(|(key, _)| key.name == name)
            .map(|(_, item)| item)
            .filter(|item| !item.node.is_null())
    }

    /// The setting of that name, which must be there.
    pub(super) fn require(&self, name: &str, example: &str) -> Option<Item<'n>> {
        let item = self.get(name);
        if item.is_none() {
            self.findings.fault(
                self.place,
                &self.path,
                format!("\"{name}\" is missing; for example: {example}"),
            );
        }
        item
    }

    /// All entries, with their keys.
    pub(super) fn items(&self) -> impl Iterator<Item = (&'n Key, Item<'n>)> {
        self.entries.iter().map(|(key, node)| {
            let path =
                if self.path.is_empty() { key.name.clone() } else { format!("{}.{}", self.path, key.name) };
            (key, Item { node, path, findings: self.findings })
        })
    }
}
