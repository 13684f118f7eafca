//! Faults and warnings of a config, each with its location.

use crate::similar::most_similar;
use std::cell::RefCell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The location of a setting.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Location {
    /// Line and column in the file, both from 1.
    File(usize, usize),
    /// The name of the environment variable that overrides the setting.
    Variable(Arc<str>),
}

impl Location {
    /// `tollgate.yaml:7:13`, or `$VARIABLE`.
    fn describe(&self, file: &str) -> String {
        match self {
            Self::File(line, column) => format!("{file}:{line}:{column}"),
            Self::Variable(name) => format!("${name}"),
        }
    }
}

/// One fault or warning.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    file: Arc<str>,
    location: Location,
    /// The path of the setting, such as `environments.staging.quotas`. Empty for the whole file.
    path: String,
    /// The problem and how to fix it. It never contains a key or a value from outside the file.
    message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.location.describe(&self.file))?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// All faults of a config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults {
    /// In the order of the file. There is at least one.
    faults: Vec<Fault>,
    /// The files that the config names, as far as it could be read. A change of one of them can correct a fault.
    pub(crate) named_files: Vec<PathBuf>,
}

impl Faults {
    /// A fault of the whole file.
    pub(super) fn of_file(file: &str, message: String) -> Self {
        let fault = Fault { file: file.into(), location: Location::File(1, 1), path: String::new(), message };
        Self { faults: vec![fault], named_files: Vec::new() }
    }

    /// The number of faults; at least 1. A config with very many faults has more than are recorded.
    pub fn count(&self) -> usize {
        self.faults.len()
    }

    /// Iterates over the faults.
    #[cfg(test)]
    fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.faults.iter()
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, fault) in self.faults.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            fault.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// Maximum number of faults, and of warnings. A hostile file could have millions.
const MAX_FINDINGS: usize = 1_000;
/// After this many faults, messages list the known names and suggest none: a suggestion compares all names.
const MAX_SUGGESTIONS: usize = 100;

/// Collects faults, warnings and the names of files while a config is read. Reading continues after a fault, so that one run reports all.
pub(super) struct Findings {
    file: Arc<str>,
    faults: RefCell<Vec<Fault>>,
    warnings: RefCell<Vec<Fault>>,
    named_files: RefCell<Vec<PathBuf>>,
}

impl Findings {
    pub(super) fn new(file: &str) -> Self {
        let (faults, warnings, named_files) = (RefCell::default(), RefCell::default(), RefCell::default());
        Self { file: file.into(), faults, warnings, named_files }
    }

    /// Records that the config names this file, whose content the gateway reads.
    pub(super) fn add_named_file(&self, path: &Path) {
        self.named_files.borrow_mut().push(path.to_owned());
    }

    pub(super) fn named_files(&self) -> Vec<PathBuf> {
        self.named_files.borrow().clone()
    }

    /// The location of a setting, for a fault that is found after the config was read.
    pub(super) fn describe(&self, location: &Location) -> String {
        location.describe(&self.file)
    }

    pub(super) fn fault(&self, location: &Location, path: &str, message: impl Into<String>) {
        self.record(&self.faults, location, path, message.into());
    }

    pub(super) fn warn(&self, location: &Location, path: &str, message: impl Into<String>) {
        self.record(&self.warnings, location, path, message.into());
    }

    fn record(&self, findings: &RefCell<Vec<Fault>>, location: &Location, path: &str, message: String) {
        let mut findings = findings.borrow_mut();
        if findings.len() < MAX_FINDINGS {
            let (file, location, path) = (self.file.clone(), location.clone(), path.to_owned());
            findings.push(Fault { file, location, path, message });
        }
    }

    /// The end of a message about an unknown name: a suggestion if a known name is similar, else the known names.
    pub(super) fn suggestion(&self, name: &str, known: &[&str]) -> String {
        const MAX_LISTED: usize = 20;
        let is_exhausted = self.faults.borrow().len() >= MAX_SUGGESTIONS;
        match most_similar(name, known).filter(|_| !is_exhausted) {
            Some(similar) => format!("did you mean \"{similar}\"?"),
            None if known.is_empty() => "none is declared".to_owned(),
            None if known.len() > MAX_LISTED => {
                format!("known names: {}, ...", known[..MAX_LISTED].join(", "))
            }
            None => format!("known names: {}", known.join(", ")),
        }
    }

    /// Returns the warnings, or the faults if there are any. Both are sorted and without duplicates.
    pub(super) fn into_warnings(self) -> Result<Vec<Fault>, Faults> {
        let (mut faults, mut warnings) = (self.faults.into_inner(), self.warnings.into_inner());
        for findings in [&mut faults, &mut warnings] {
            findings.sort();
            findings.dedup();
        }
        let named_files = self.named_files.into_inner();
        if faults.is_empty() { Ok(warnings) } else { Err(Faults { faults, named_files }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_printed_one_per_line_in_the_order_of_the_file() {
        let findings = Findings::new("a.yaml");
        findings.fault(&Location::Variable("TOLLGATE__X".into()), "", "third");
        findings.fault(&Location::File(10, 1), "store", "second");
        findings.fault(&Location::File(9, 80), "", "first");
        findings.fault(&Location::File(9, 80), "", "first");
        let faults = findings.into_warnings().unwrap_err();
        assert_eq!(faults.to_string(), "a.yaml:9:80: first\na.yaml:10:1: store: second\n$TOLLGATE__X: third");
        assert_eq!(faults.iter().count(), 3);
    }

    #[test]
    fn faults_can_be_sent_between_threads() {
        fn assert_shareable<T: Send + Sync + 'static>() {}
        assert_shareable::<Faults>();
    }
}
