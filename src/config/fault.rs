//! What is wrong with a config, and where.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

/// Where a setting stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// In the file: line and column, both from 1.
    File(usize, usize),
    /// In this environment variable.
    Variable(Rc<str>),
}

/// One thing that is wrong, or worth a warning.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    file: Rc<str>,
    place: Place,
    /// The setting: `environments.staging.quotas`; empty for the file as a whole.
    path: String,
    /// What is wrong with it and what would mend it. Never a value that came from outside the file.
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

/// Collects faults and warnings while a config is read: reading goes on, so that all are told at once.
pub(super) struct Findings {
    file: Rc<str>,
    faults: RefCell<Vec<Fault>>,
    warnings: RefCell<Vec<Fault>>,
}

impl Findings {
    pub(super) fn of(file: &str) -> Self {
        Self { file: file.into(), faults: RefCell::default(), warnings: RefCell::default() }
    }

    pub(super) fn fault(&self, place: &Place, path: &str, message: impl Into<String>) {
        self.faults.borrow_mut().push(self.finding(place, path, message));
    }

    pub(super) fn warn(&self, place: &Place, path: &str, message: impl Into<String>) {
        self.warnings.borrow_mut().push(self.finding(place, path, message));
    }

    fn finding(&self, place: &Place, path: &str, message: impl Into<String>) -> Fault {
        Fault {
            file: self.file.clone(),
            place: place.clone(),
            path: path.to_owned(),
            message: message.into(),
        }
    }

    /// The warnings, if there is no fault.
    pub(super) fn end(self) -> Result<Vec<Fault>, Faults> {
        let (mut faults, mut warnings) = (self.faults.into_inner(), self.warnings.into_inner());
        faults.sort();
        faults.dedup();
        warnings.sort();
        if faults.is_empty() { Ok(warnings) } else { Err(Faults(faults)) }
    }
}

/// The name that somebody may have meant, if one is near enough.
pub(super) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near =
        |candidate: &&str| strsim::damerau_levenshtein(&name.to_lowercase(), &candidate.to_lowercase());
    let best = known.into_iter().min_by_key(near)?;
    let worst_typo = 1 + best.chars().count().max(name.chars().count()) / 4;
    (near(&best) <= worst_typo).then_some(best)
}
