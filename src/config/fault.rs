//! What is wrong with a config, and where.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

/// Where a setting stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// In the file: line and column, both from 1.
    File(usize, usize),
    /// In this environment variable.
    Variable(Arc<str>),
}

/// One thing that is wrong, or worth a warning.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    file: Arc<str>,
    place: Place,
    /// The setting: `environments.staging.quotas`; empty for the file as a whole.
    path: String,
    /// What is wrong with it and what would mend it. Never a key, never a value from outside the file.
    message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::File(line, column) => write!(f, "{}:{line}:{column}: ", self.file)?,
            Place::Variable(name) => write!(f, "${name}: ")?,
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// Everything that is wrong with a config, in the file's order; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// The file as a whole is at fault.
    pub(super) fn of_file(file: &str, message: String) -> Self {
        Self(vec![Fault { file: file.into(), place: Place::File(1, 1), path: String::new(), message }])
    }

    /// One by one.
    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.0.iter()
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, fault) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            fault.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// Nobody mends more in one go; a hostile file could have millions.
const MOST_FINDINGS: usize = 1_000;
/// A list of names is compared with the wrong one for this many faults at most.
const MOST_HINTS: usize = 100;
/// Longer names are not compared.
const LONGEST_TYPO: usize = 64;

/// Collects faults and warnings while a config is read: reading goes on, so that all are told at once.
pub(super) struct Findings {
    file: Arc<str>,
    faults: RefCell<Vec<Fault>>,
    warnings: RefCell<Vec<Fault>>,
}

impl Findings {
    pub(super) fn of(file: &str) -> Self {
        Self { file: file.into(), faults: RefCell::default(), warnings: RefCell::default() }
    }

    pub(super) fn fault(&self, place: &Place, path: &str, message: impl Into<String>) {
        self.note(&self.faults, place, path, message.into());
    }

    pub(super) fn warn(&self, place: &Place, path: &str, message: impl Into<String>) {
        self.note(&self.warnings, place, path, message.into());
    }

    fn note(&self, findings: &RefCell<Vec<Fault>>, place: &Place, path: &str, message: String) {
        let mut findings = findings.borrow_mut();
        if findings.len() < MOST_FINDINGS {
            let (file, place, path) = (self.file.clone(), place.clone(), path.to_owned());
            findings.push(Fault { file, place, path, message });
        }
    }

    /// What to write in place of `name`: the nearest of the known names, else all of them.
    pub(super) fn hint(&self, name: &str, known: &[&str]) -> String {
        const ENOUGH: usize = 20;
        let is_busy = self.faults.borrow().len() >= MOST_HINTS;
        match nearest(name, known).filter(|_| !is_busy) {
            Some(near) => format!("did you mean \"{near}\"?"),
            None if known.is_empty() => "there is none".to_owned(),
            None if known.len() > ENOUGH => format!("known here: {}, ...", known[..ENOUGH].join(", ")),
            None => format!("known here: {}", known.join(", ")),
        }
    }

    /// The warnings, if there is no fault.
    pub(super) fn end(self) -> Result<Vec<Fault>, Faults> {
        let (mut faults, mut warnings) = (self.faults.into_inner(), self.warnings.into_inner());
        for findings in [&mut faults, &mut warnings] {
            findings.sort();
            findings.dedup();
        }
        if faults.is_empty() { Ok(warnings) } else { Err(Faults(faults)) }
    }
}

/// The name that somebody may have meant, if one is near enough.
fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    if name.len() > LONGEST_TYPO {
        return None;
    }
    let distance =
        |candidate: &str| strsim::damerau_levenshtein(&name.to_lowercase(), &candidate.to_lowercase());
    let worst = |candidate: &str| 1 + candidate.len().max(name.len()) / 4;
    let near = known.iter().filter(|c| c.len().abs_diff(name.len()) <= worst(c)).map(|c| (distance(c), *c));
    near.filter(|(distance, candidate)| *distance <= worst(candidate)).min().map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_suggested_if_it_is_near() {
        let known = ["total_tokens", "prompt_tokens", "requests"];
        for (name, want) in [
            ("total_token", Some("total_tokens")),
            ("TOTAL_TOKENS", Some("total_tokens")),
            ("request", Some("requests")),
            ("promt_tokens", Some("prompt_tokens")),
            ("colour", None),
            ("", None),
            (&"x".repeat(1_000_000), None),
        ] {
            assert_eq!(nearest(name, &known), want);
        }
    }

    #[test]
    fn faults_are_printed_one_a_line_in_the_files_order() {
        let findings = Findings::of("a.yaml");
        findings.fault(&Place::Variable("TOLLGATE__X".into()), "", "third");
        findings.fault(&Place::File(10, 1), "store", "second");
        findings.fault(&Place::File(9, 80), "", "first");
        findings.fault(&Place::File(9, 80), "", "first");
        let faults = findings.end().unwrap_err();
        assert_eq!(faults.to_string(), "a.yaml:9:80: first\na.yaml:10:1: store: second\n$TOLLGATE__X: third");
        assert_eq!(faults.iter().count(), 3);
    }

    #[test]
    fn faults_can_be_sent_between_threads() {
        fn is_shared<T: Send + Sync + 'static>() {}
        is_shared::<Faults>();
    }
}
