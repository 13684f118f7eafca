//! The calibrations of prompt estimates, one for each upstream, model and kind of request.
//!
//! All workers share them, the store saves them, and their memory is bounded for any number of model names. A wrong
//! calibration does limited harm: a correction multiplies an estimate by a quarter to four, and the reported usage
//! settles the charge in any case.

use crate::estimate::{Calibration, CalibrationSample, Correction, KnownModels, ModelRank, RequestKind};
use foldhash::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

/// Maximum number of calibrations per upstream. A new one replaces one of an invented name if there is one, and of those
/// the one that was updated least recently.
const MAX_ENTRIES: usize = 1_024;
/// Maximum length of a model name with a calibration in bytes. Callers can invent names.
const MAX_NAME_BYTES: usize = 128;

/// The calibrations of all upstreams.
#[derive(Debug)]
pub struct Calibrations {
    /// By the upstream's name. Upstreams are only added, so that their indices never change.
    upstreams: RwLock<Vec<(String, Mutex<UpstreamCalibrations>)>>,
}

#[derive(Debug, Default)]
struct UpstreamCalibrations {
    models: HashMap<Box<str>, [Option<CalibrationEntry>; RequestKind::ALL.len()]>,
    /// Number of calibrations over all models and kinds.
    entries: usize,
    /// Number of answers so far. It orders the entries by their last update.
    answers: u64,
    /// Entries that were removed since the last call of `take_changes`.
    removed: Vec<(Box<str>, RequestKind)>,
}

#[derive(Debug)]
struct CalibrationEntry {
    calibration: Calibration,
    rank: ModelRank,
    /// The value of `answers` at the last update.
    updated: u64,
    has_changed: bool,
}

/// One calibration as the store saves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SavedCalibration {
    /// The upstream's name.
    pub(crate) upstream: String,
    /// The model name of the requests.
    pub(crate) model: Box<str>,
    /// The kind of its requests.
    pub(crate) kind: RequestKind,
    /// The last answers, oldest first. Empty: the calibration was removed.
    pub(crate) answers: Vec<CalibrationSample>,
}

impl Calibrations {
    /// Empty calibrations for these upstreams.
    pub fn new<'n>(upstreams: impl IntoIterator<Item = &'n str>) -> Self {
        let empty = |name: &str| (name.to_owned(), Mutex::default());
        Self { upstreams: RwLock::new(upstreams.into_iter().map(empty).collect()) }
    }

    /// The index of an upstream, which other methods take. An unknown upstream is added.
    pub(crate) fn index_of(&self, upstream: &str) -> usize {
        let mut all = self.upstreams.write().unwrap_or_else(PoisonError::into_inner);
        all.iter().position(|(name, _)| name == upstream).unwrap_or_else(|| {
            all.push((upstream.to_owned(), Mutex::default()));
            all.len() - 1
        })
    }

    /// The correction for estimates of a model.
    pub(crate) fn correction(&self, upstream: usize, model: &str, kind: RequestKind) -> Correction {
        let find = |entries: &mut UpstreamCalibrations| {
            let entry = entries.models.get(model).and_then(|kinds| kinds[kind as usize].as_ref());
            entry.map(|entry| entry.calibration.correction())
        };
        self.with(upstream, find).flatten().unwrap_or_default()
    }

    /// Updates a calibration after a complete answer. `estimated` is the estimate before any correction.
    pub(crate) fn learn(
        &self,
        upstream: usize,
        model: &str,
        kind: RequestKind,
        estimated: u64,
        reported: u64,
    ) {
        if model.len() > MAX_NAME_BYTES {
            return;
        }
        self.with(upstream, |entries| {
            if let Some(entry) = entries.known(model, kind) {
                entry.learn(estimated, reported);
            } else {
                entries.entry(model, kind).learn(estimated, reported);
            }
        });
    }

    /// The calibrations that have changed since the last call, for the store.
    pub(crate) fn take_changes(&self) -> Vec<SavedCalibration> {
        let mut changes = Vec::new();
        let all = self.upstreams.read().unwrap_or_else(PoisonError::into_inner);
        for (name, entries) in all.iter() {
            lock(entries).take_changes(name, &mut changes);
        }
        changes
    }

    /// Restores saved calibrations. It ignores those of upstreams that no longer exist.
    pub(crate) fn restore(&self, saved: Vec<SavedCalibration>) {
        for SavedCalibration { upstream, model, kind, answers } in saved {
            let all = self.upstreams.read().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, entries)) = all.iter().find(|(name, _)| *name == upstream) {
                lock(entries).entry(&model, kind).calibration = Calibration::from_samples(&answers);
            }
        }
    }

    /// Runs `access` with the calibrations of an upstream. `None`: there is no such upstream.
    fn with<T>(&self, at: usize, access: impl FnOnce(&mut UpstreamCalibrations) -> T) -> Option<T> {
        let all = self.upstreams.read().unwrap_or_else(PoisonError::into_inner);
        Some(access(&mut lock(&all.get(at)?.1)))
    }
}

fn lock(entries: &Mutex<UpstreamCalibrations>) -> MutexGuard<'_, UpstreamCalibrations> {
    // A poisoned lock is usable: no update of an entry can panic halfway.
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CalibrationEntry {
    fn learn(&mut self, estimated: u64, reported: u64) {
        self.calibration.learn(estimated, reported);
        self.has_changed = true;
    }
}

impl UpstreamCalibrations {
    /// Adds the calibrations that have changed since the last call to `changes`.
    fn take_changes(&mut self, upstream: &str, changes: &mut Vec<SavedCalibration>) {
        let saved = |model: &str, kind, answers| SavedCalibration {
            upstream: upstream.to_owned(),
            model: model.into(),
            kind,
            answers,
        };
        for (model, kind) in std::mem::take(&mut self.removed) {
            changes.push(saved(&model, kind, Vec::new()));
        }
        for (model, kinds) in &mut self.models {
            for (kind, entry) in RequestKind::ALL.into_iter().zip(kinds) {
                if let Some(entry) = entry.as_mut().filter(|entry| entry.has_changed) {
                    entry.has_changed = false;
                    changes.push(saved(model, kind, entry.calibration.samples().collect()));
                }
            }
        }
    }

    /// Updates the age of an entry that exists. Unlike `entry`, this does not copy the name.
    fn known(&mut self, model: &str, kind: RequestKind) -> Option<&mut CalibrationEntry> {
        let entry = self.models.get_mut(model)?[kind as usize].as_mut()?;
        self.answers += 1;
        entry.updated = self.answers;
        Some(entry)
    }

    fn entry(&mut self, model: &str, kind: RequestKind) -> &mut CalibrationEntry {
        self.answers += 1;
        let is_known = self.models.get(model).is_some_and(|kinds| kinds[kind as usize].is_some());
        if !is_known {
            if self.entries >= MAX_ENTRIES {
                self.remove_oldest();
            }
            self.entries += 1;
            // The entry was removed and is added again before the store has read the removal.
            self.removed.retain(|(name, other)| (&**name, *other) != (model, kind));
            self.models.entry(model.into()).or_default();
        }
        let new = || CalibrationEntry {
            calibration: Calibration::default(),
            rank: KnownModels::default().rank(model),
            updated: 0,
            has_changed: false,
        };
        let kinds = self.models.entry(model.into()).or_default();
        let entry = kinds[kind as usize].get_or_insert_with(new);
        entry.updated = self.answers;
        entry
    }

    fn remove_oldest(&mut self) {
        let all = self.models.iter().flat_map(|(model, kinds)| {
            let entries = RequestKind::ALL.into_iter().zip(kinds);
            entries.filter_map(move |(kind, entry)| {
                let entry = entry.as_ref()?;
                Some(((entry.rank, entry.updated), model, kind))
            })
        });
        let Some((_, model, kind)) = all.min_by_key(|(age, ..)| *age) else { return };
        let model = model.clone();
        if let Some(kinds) = self.models.get_mut(&model) {
            kinds[kind as usize] = None;
            if kinds.iter().all(Option::is_none) {
                self.models.remove(&model);
            }
        }
        self.entries -= 1;
        // Without a store no task takes the removals, so their number is bounded. If the store misses a removal, its
        // row is dropped after the next restart: `restore` enforces the maximum too.
        if self.removed.len() < MAX_ENTRIES {
            self.removed.push((model, kind));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(answers: u64) -> Calibrations {
        let all = Calibrations::new(["a", "b"]);
        (0..answers).for_each(|n| all.learn(0, "m", RequestKind::Tools, 100 + n, 200 + n));
        all
    }

    #[test]
    fn a_calibration_applies_only_to_its_upstream_model_and_kind() {
        let all = learned(5);
        assert_eq!(all.correction(0, "m", RequestKind::Tools).apply(100), 200);
        for (upstream, model, kind) in [
            (1, "m", RequestKind::Tools),
            (0, "n", RequestKind::Tools),
            (0, "m", RequestKind::Plain),
            (9, "m", RequestKind::Tools),
        ] {
            assert_eq!(all.correction(upstream, model, kind).apply(100), 100);
        }
    }

    #[test]
    fn restored_calibrations_equal_the_saved_ones_and_only_changes_are_saved() {
        let all = learned(5);
        let saved = all.take_changes();
        assert_eq!((saved.len(), saved[0].answers.len()), (1, 5));
        assert!(all.take_changes().is_empty());
        let again = Calibrations::new(["c", "a"]);
        again.restore(
            [
                saved,
                vec![SavedCalibration {
                    upstream: "gone".into(),
                    model: "m".into(),
                    kind: RequestKind::Plain,
                    answers: vec![],
                }],
            ]
            .concat(),
        );
        assert_eq!(again.correction(1, "m", RequestKind::Tools).apply(100), 200);
        assert!(again.take_changes().is_empty(), "the store has it already");
    }

    #[test]
    fn invented_names_do_not_push_out_known_ones() {
        let all = Calibrations::new(["a"]);
        for _ in 0..5 {
            all.learn(0, "gpt-4o", RequestKind::Plain, 100, 150);
        }
        for n in 0..2 * MAX_ENTRIES {
            all.learn(0, &format!("invented-{n}"), RequestKind::Plain, 100, 100);
        }
        assert_eq!(all.correction(0, "gpt-4o", RequestKind::Plain).apply(100), 150);
    }

    #[test]
    fn any_number_of_names_takes_bounded_memory_and_bounded_rows() {
        let all = Calibrations::new(["a"]);
        let mut stored = std::collections::HashSet::new();
        for n in 0..4 * MAX_ENTRIES {
            all.learn(0, "kept", RequestKind::Plain, 100, 150);
            all.learn(0, &format!("made-up-{n}"), RequestKind::ALL[n % 3], 100, 100);
            if n % 100 == 0 {
                for saved in all.take_changes() {
                    let key = (saved.model, saved.kind);
                    let _ = if saved.answers.is_empty() { stored.remove(&key) } else { stored.insert(key) };
                }
                assert!(stored.len() <= MAX_ENTRIES, "{}", stored.len());
            }
        }
        assert_eq!(all.with(0, |entries| entries.entries).unwrap(), MAX_ENTRIES);
        assert_eq!(all.correction(0, "kept", RequestKind::Plain).apply(100), 150);
        all.learn(0, &"x".repeat(MAX_NAME_BYTES + 1), RequestKind::Plain, 100, 900);
        assert_eq!(all.with(0, |entries| entries.entries).unwrap(), MAX_ENTRIES);
    }
}
