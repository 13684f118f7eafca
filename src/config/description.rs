//! The form of the descriptions of the config's keys.
//!
//! Each section of the file has one description, in the file that reads the section. The reader accepts the keys that it
//! lists, with the defaults and the words that it contains. `tollgate schema`, `tollgate check --print` and the tables in
//! `docs/configuration.md` are made from the same descriptions.

/// A mapping whose keys are settings.
#[derive(Debug)]
pub(super) struct SectionSpec {
    /// The name of the section in the schema and in the documentation.
    pub(super) name: &'static str,
    pub(super) keys: &'static [KeySpec],
}

impl SectionSpec {
    pub(super) fn key(&self, name: &str) -> Option<&'static KeySpec> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// A mapping with the required keys; without such keys one with the first default.
    pub(super) fn example(&self) -> String {
        let entry = |key: &KeySpec| match (&key.default, &key.value) {
            (DefaultSpec::Required(_), ValueSpec::Names(..)) => Some(format!("{}: {{ ... }}", key.name)),
            // Some examples contain the key already.
            (DefaultSpec::Required(example), _) if example.starts_with(&format!("{}: ", key.name)) => {
                Some((*example).to_owned())
            }
            (DefaultSpec::Required(example), _) => Some(format!("{}: {example}", key.name)),
            _ => None,
        };
        let required: Vec<String> = self.keys.iter().filter_map(entry).collect();
        let with_default = |key: &KeySpec| match key.default {
            DefaultSpec::Value(text) => Some(format!("{}: {text}", key.name)),
            _ => None,
        };
        match (required.is_empty(), self.keys.iter().find_map(with_default)) {
            (false, _) => format!("{{ {} }}", required.join(", ")),
            (true, Some(default)) => format!("{{ {default} }}"),
            (true, None) => format!("{{ {}: ... }}", self.keys.first().map_or("", |key| key.name)),
        }
    }
}

/// One setting.
#[derive(Debug)]
pub(super) struct KeySpec {
    pub(super) name: &'static str,
    pub(super) value: ValueSpec,
    pub(super) default: DefaultSpec,
    /// A value, if the type and the default do not suggest one.
    own_example: Option<&'static str>,
    pub(super) reload: Reload,
    /// The setting restricts callers, so the key must not be without a value.
    pub(super) is_restriction: bool,
    /// The effect, in Markdown. References to other documents are in parentheses: `([quotas.md](quotas.md))`.
    pub(super) about: &'static str,
}

impl KeySpec {
    pub(super) const fn new(
        name: &'static str,
        value: ValueSpec,
        default: DefaultSpec,
        about: &'static str,
    ) -> Self {
        Self {
            name,
            value,
            default,
            own_example: None,
            reload: Reload::Applies,
            is_restriction: false,
            about,
        }
    }

    pub(super) const fn restriction(
        name: &'static str,
        value: ValueSpec,
        default: DefaultSpec,
        about: &'static str,
    ) -> Self {
        Self { is_restriction: true, ..Self::new(name, value, default, about) }
    }

    /// The same key with this example, as the file could contain it.
    pub(super) const fn example(self, example: &'static str) -> Self {
        Self { own_example: Some(example), ..self }
    }

    /// The same key. A running gateway refuses a file with another value.
    pub(super) const fn fixed(self) -> Self {
        Self { reload: Reload::Refused, ..self }
    }

    /// The same key. A running gateway accepts another value and uses it from its next start on.
    pub(super) const fn changes_at_next_start(self) -> Self {
        Self { reload: Reload::NextStart, ..self }
    }

    /// A value as the file could contain it, other than the default where the type suggests one.
    pub(super) fn example_text(&self) -> Option<String> {
        let default = match (self.own_example, &self.default) {
            (Some(example), _) => return Some(example.to_owned()),
            (None, DefaultSpec::Required(example)) => {
                let prefix = format!("{}: ", self.name);
                return Some(example.strip_prefix(&prefix).unwrap_or(example).to_owned());
            }
            (None, DefaultSpec::Value(text)) => Some(*text),
            (None, _) => None,
        };
        let of_type = self.value.example(default);
        of_type.or_else(|| default.map(str::to_owned))
    }
}

/// What a running gateway does with a new value of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reload {
    /// The value applies to requests that begin afterwards.
    Applies,
    /// The value applies from the next start on.
    NextStart,
    /// The gateway refuses the file.
    Refused,
}

/// The value or behaviour that applies if a key is absent.
#[derive(Debug)]
pub(super) enum DefaultSpec {
    /// The key must be set, for example like this.
    Required(&'static str),
    /// This value, in a form that the file may contain.
    Value(&'static str),
    /// The defaults of the section's own keys.
    Section,
    /// No value. The text describes what applies then, such as `none`.
    Absent(&'static str),
    /// A value that depends on other keys of the same section. The text describes it.
    Derived(&'static str, fn(&Siblings<'_>) -> Option<String>),
}

/// Returns the text of another key of the same section.
pub(super) type Siblings<'a> = dyn Fn(&str) -> Option<&'a str> + 'a;

/// The type of a value.
#[derive(Debug)]
pub(super) enum ValueSpec {
    Text(TextSpec),
    /// Text that must not be printed.
    Secret(TextSpec),
    /// A URL whose password must not be printed.
    SecretUrl(TextSpec),
    Boolean,
    /// A whole number from `min` to `max`, with a decimal unit.
    Amount {
        min: u64,
        max: u64,
    },
    Decimal(TextSpec),
    Duration,
    Size,
    /// One of several words, each with its meaning.
    Words(&'static [Word]),
    List(&'static ValueSpec),
    /// A value or a list of such values.
    OneOrMore(&'static ValueSpec),
    Section(&'static SectionSpec),
    /// A mapping whose keys are names that the file declares.
    Names(TextSpec, &'static ValueSpec),
    Either(&'static [ValueSpec]),
}

impl ValueSpec {
    /// The type, for the documentation.
    pub(super) fn label(&self) -> String {
        match self {
            Self::Text(text) | Self::Secret(text) | Self::SecretUrl(text) | Self::Decimal(text) => {
                text.label.to_owned()
            }
            Self::Names(names, _) => names.label.to_owned(),
            Self::Boolean => "boolean".to_owned(),
            Self::Duration => "duration".to_owned(),
            Self::Size => "size".to_owned(),
            Self::Section(_) => "section".to_owned(),
            Self::Amount { min: 0, max: u64::MAX } => "amount".to_owned(),
            Self::Amount { min, max: u64::MAX } => format!("amount from {min}"),
            Self::Amount { min, max } if max.is_power_of_two() => {
                format!("amount from {min} to 2^{}", max.ilog2())
            }
            Self::Amount { min, max } => format!("amount from {min} to {max}"),
            Self::Words(words) => {
                words.iter().map(|word| format!("`{}`", word.0)).collect::<Vec<_>>().join(", ")
            }
            Self::List(element) => match element {
                Self::Section(_) => "list".to_owned(),
                Self::Words(_) => format!("list of {}", element.label()),
                element => format!("list of {}s", element.label()),
            },
            Self::OneOrMore(element) => match element {
                Self::Section(_) => "one section or a list of them".to_owned(),
                element => format!("{}, or a list of them", element.label()),
            },
            Self::Either(specs) => specs.iter().map(Self::label).collect::<Vec<_>>().join(", or "),
        }
    }
}

impl ValueSpec {
    /// A value of this type other than the default, if the type suggests one.
    fn example(&self, default: Option<&str>) -> Option<String> {
        match self {
            Self::Boolean => Some(if default == Some("true") { "false" } else { "true" }.to_owned()),
            Self::Words(words) => {
                words.iter().find(|word| Some(word.0) != default).map(|word| word.0.to_owned())
            }
            Self::Section(spec) => Some(spec.example()),
            Self::List(element) => element.example(None).map(|element| format!("[{element}]")),
            Self::OneOrMore(element) => element.example(None),
            Self::Either(specs) => specs.iter().find_map(|spec| spec.example(default)),
            _ => None,
        }
    }
}

/// A word and its meaning. The meaning is empty if the description of the key contains it.
#[derive(Debug)]
pub(super) struct Word(pub(super) &'static str, pub(super) &'static str);

/// A kind of text.
#[derive(Debug)]
pub(super) struct TextSpec {
    /// The type, for the documentation.
    pub(super) label: &'static str,
    /// A regular expression that all valid texts match. Empty: any text. The reader has the exact rule.
    pub(super) pattern: &'static str,
}

pub(super) const fn text(label: &'static str) -> TextSpec {
    TextSpec { label, pattern: "" }
}

pub(super) const PATH: ValueSpec = ValueSpec::Text(text("path"));
pub(super) const PATTERN: ValueSpec = ValueSpec::Text(text("pattern"));
pub(super) const SECRET: ValueSpec = ValueSpec::Secret(text("secret"));
pub(super) const ADDRESS: ValueSpec =
    ValueSpec::Text(TextSpec { label: "address", pattern: r"^([0-9.]+|\[[0-9A-Fa-f:.%]+\]):[0-9]+$" });
pub(super) const NONE: DefaultSpec = DefaultSpec::Absent("none");

pub(super) const AMOUNT_PATTERN: &str = r"^[0-9][0-9_]*(\.[0-9][0-9_]*)?[kKMG]?$";
pub(super) const DURATION_PATTERN: &str =
    r"^([0-9][0-9_]*(\.[0-9][0-9_]*)?(ms|s|m|h|d)|second|minute|hour|day|week|month|0)$";
pub(super) const SIZE_PATTERN: &str = r"^[0-9][0-9_]*(\.[0-9][0-9_]*)?\s*(B|KiB|MiB|GiB|kB|KB|MB|GB)?$";
