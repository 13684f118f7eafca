//! Typed access to the YAML tree. A wrong value is recorded as a fault, and reading continues.

use super::description::{DefaultSpec, KeySpec, SectionSpec, ValueSpec, Word};
use super::fault::{Findings, Location};
use super::tree::{YamlKey, YamlNode, YamlScalar, YamlValue, join};
use super::{Secret, units};
use crate::similar::most_similar;
use http::HeaderValue;
use std::path::PathBuf;
use std::time::Duration;

/// Maximum length of a secret that is sent in a header. Servers accept about as much in all headers together.
const MAX_SECRET_BYTES: usize = 8 * 1024;

/// Maximum number of unknown keys of a section that are compared with a missing one.
const MAX_COMPARED_KEYS: usize = 100;

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
    /// The keys that are settings. `None`: the keys are declared names.
    spec: Option<&'static SectionSpec>,
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

    /// A mapping whose keys are settings. Each key that the description does not contain is a fault.
    pub(super) fn section(&self, spec: &'static SectionSpec) -> Option<Section<'n>> {
        let Some(section) = self.as_map() else {
            self.fault_wrong_type(&format!("a mapping such as {}", spec.example()));
            return None;
        };
        for (key, _) in section.entries.iter().filter(|(key, _)| spec.key(&key.name).is_none()) {
            let known: Vec<&str> = spec.keys.iter().map(|key| key.name).collect();
            let suggestion = self.findings.suggestion(&key.name, &known);
            section.findings.fault(
                &key.location,
                &self.path,
                format!("unknown key \"{}\"; {suggestion}", key.name),
            );
        }
        Some(Section { spec: Some(spec), ..section })
    }

    /// A mapping whose keys are declared names.
    pub(super) fn map(&self, expected: &str) -> Option<Section<'n>> {
        let section = self.as_map();
        if section.is_none() {
            self.fault_wrong_type(expected);
        }
        section
    }

    /// A mapping. `None`: the value is not a mapping, and the fault is recorded elsewhere.
    pub(super) fn as_map(&self) -> Option<Section<'n>> {
        let YamlValue::Map(entries) = &self.node.value else { return None };
        Some(Section {
            entries,
            spec: None,
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
        const WORDS: &[Word] = &[Word("true", ""), Word("false", "")];
        self.word(WORDS).map(|word| word == "true")
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

    /// One of several words.
    pub(super) fn word(&self, words: &'static [Word]) -> Option<&'static str> {
        let text = self.text()?;
        let found = words.iter().find(|word| word.0 == text).map(|word| word.0);
        if found.is_none() {
            let all: Vec<&str> = words.iter().map(|word| word.0).collect();
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

    /// The location of the setting, for a fault that is found after the config was read.
    pub(super) fn location(&self) -> String {
        self.findings.describe(&self.node.location)
    }

    /// A path of a file that the gateway reads. A running gateway watches the file.
    pub(super) fn file(&self) -> Option<PathBuf> {
        let path = self.path()?;
        self.findings.add_named_file(&path);
        Some(path)
    }

    /// A secret that the gateway sends or receives in a header. An empty one counts as absent.
    pub(super) fn secret(&self) -> Option<Secret> {
        let text = self.text()?;
        if text.len() > MAX_SECRET_BYTES {
            self.fault(format!("this key is longer than {MAX_SECRET_BYTES} characters; use a shorter one"));
            return None;
        }
        if text.trim() != text || HeaderValue::from_str(text).is_err() {
            self.fault(
                "this key has a space at its beginning or end, or a character that a header must not contain; remove it",
            );
        }
        self.warn_of_literal_reference(text);
        (!text.is_empty()).then(|| Secret::new(text))
    }

    /// Warns of a key that looks like the name of a variable or of a file. A value that came from one may be anything.
    pub(super) fn warn_of_literal_reference(&self, key: &str) {
        let looks_so = ["$", "file:", "env:"].iter().any(|begin| key.starts_with(begin));
        if looks_so && !self.is_external() {
            self.warn(
                "this text itself is the key; write ${NAME} for the value of a variable, or ${file:/path} for the content of a file",
            );
        }
    }

    fn is_external(&self) -> bool {
        matches!(&self.node.value, YamlValue::Scalar(YamlScalar { is_external: true, .. }))
    }
}

impl<'n> Section<'n> {
    /// The setting with this name, unless it is absent or null. If it restricts callers, a null is a fault, because it
    /// would silently remove the restriction.
    pub(super) fn get(&self, name: &str) -> Option<Setting<'n>> {
        debug_assert!(
            self.spec.is_none_or(|spec| spec.key(name).is_some()),
            "no description of {}.{name}",
            self.path
        );
        let (_, node) = self.entries.iter().find(|(key, _)| key.name == name)?;
        let setting = self.setting(name, node);
        if node.is_null() {
            if self.key(name).is_some_and(|key| key.is_restriction) {
                setting.fault("the value is missing; add a value or remove the key");
            }
            return None;
        }
        Some(setting)
    }

    /// The setting with this name. Its absence is a fault.
    pub(super) fn require(&self, name: &str) -> Option<Setting<'n>> {
        let example = match self.key(name).map(|key| &key.default) {
            Some(DefaultSpec::Required(example)) => example,
            _ => "",
        };
        self.require_as(name, example)
    }

    /// Like `require`, with an example that depends on the file.
    pub(super) fn require_as(&self, name: &str, example: &str) -> Option<Setting<'n>> {
        let setting = self.get(name);
        if setting.is_none() && !self.has_misspelt(name) {
            self.fault(format!("\"{name}\" is missing; for example: {example}"));
        }
        setting
    }

    /// Whether an unknown key of this section is most similar to `name`. Its fault suggests that name already.
    fn has_misspelt(&self, name: &str) -> bool {
        let Some(spec) = self.spec else { return false };
        let known: Vec<&str> = spec.keys.iter().map(|key| key.name).collect();
        let unknown = self.entries.iter().filter(|(key, _)| spec.key(&key.name).is_none());
        unknown.take(MAX_COMPARED_KEYS).any(|(key, _)| most_similar(&key.name, &known) == Some(name))
    }

    /// The description of a key.
    fn key(&self, name: &str) -> Option<&'static KeySpec> {
        self.spec.and_then(|spec| spec.key(name))
    }

    /// The default of a key, in the form of the file.
    fn default_text(&self, name: &str) -> &'static str {
        match self.key(name).map(|key| &key.default) {
            Some(DefaultSpec::Value(text)) => text,
            _ => "",
        }
    }

    /// The section with this name, or an empty one if it is absent or not a mapping.
    pub(super) fn section(&self, name: &str) -> Section<'n> {
        let path = join(&self.path, name);
        let spec = self.key(name).and_then(|key| match key.value {
            ValueSpec::Section(spec) => Some(spec),
            _ => None,
        });
        let absent = Section { entries: &[], spec, location: self.location, path, findings: self.findings };
        let setting = self.get(name).zip(spec);
        setting.and_then(|(setting, spec)| setting.section(spec)).unwrap_or(absent)
    }

    /// A duration. If the key is absent, its default.
    pub(super) fn duration(&self, name: &str) -> Duration {
        let duration = self.get(name).and_then(|setting| setting.duration());
        duration.or_else(|| units::duration(self.default_text(name))).unwrap_or_default()
    }

    /// A boolean. If the key is absent, its default.
    pub(super) fn boolean(&self, name: &str) -> bool {
        let boolean = self.get(name).and_then(|setting| setting.boolean());
        boolean.unwrap_or_else(|| self.default_text(name) == "true")
    }

    /// A text. If the key is absent, its default.
    pub(super) fn text(&self, name: &str) -> &'n str {
        let text = self.get(name).and_then(|setting| setting.text());
        text.unwrap_or_else(|| self.default_text(name))
    }

    /// A path. If the key is absent, its default.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        let path = self.get(name).and_then(|setting| setting.path());
        path.unwrap_or_else(|| self.default_text(name).into())
    }

    /// A size that `read` accepts. If the key is absent, its default.
    pub(super) fn size(&self, name: &str, read: impl FnOnce(&Setting<'n>) -> Option<usize>) -> usize {
        let size = self.get(name).and_then(|setting| read(&setting));
        size.or_else(|| units::size(self.default_text(name))).unwrap_or_default()
    }

    /// One of the words of the key's description. If the key is absent, its default.
    pub(super) fn word(&self, name: &str) -> &'static str {
        let word = match self.key(name).map(|key| &key.value) {
            Some(ValueSpec::Words(words)) => self.get(name).and_then(|setting| setting.word(words)),
            _ => None,
        };
        word.unwrap_or_else(|| self.default_text(name))
    }

    /// The result of `parse`, also for the default. `expected` describes a valid value for the message.
    pub(super) fn parsed<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> Option<T>,
        expected: &str,
    ) -> Option<T> {
        let parsed = self.get(name).and_then(|setting| setting.parsed(&parse, expected));
        parsed.or_else(|| parse(self.default_text(name)))
    }

    /// An amount that `read` accepts. If the key is absent, its default.
    pub(super) fn amount(&self, name: &str, read: impl FnOnce(&Setting<'n>) -> Option<u64>) -> u64 {
        let amount = self.get(name).and_then(|setting| read(&setting));
        amount.or_else(|| units::amount(self.default_text(name))).unwrap_or_default()
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
