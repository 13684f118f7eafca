//! How far prompt estimates were off, of every upstream, model and kind of request: shared by all workers,
//! bounded for any number of names, and kept by the store.
//!
//! Nothing here is on trust: a correction moves an estimate within a quarter and four times of itself, and
//! the answer's own usage settles the charge in any case.

use crate::estimate::{Calibration, Correction, Kind, Pair};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// So many models and kinds of each upstream are told apart; the least recently learned gives way.
const MOST: usize = 1_024;
/// Longer names are not learned: callers can make them up.
const LONGEST_NAME: usize = 128;

/// All that was learned.
#[derive(Debug)]
pub struct Calibrations {
    upstreams: Vec<(String, Mutex<OfUpstream>)>,
}

#[derive(Debug, Default)]
struct OfUpstream {
    models: HashMap<Box<str>, [Option<Entry>; Kind::ALL.len()]>,
    /// How many there are, over all models and kinds.
    entries: usize,
    /// Counts the answers, to tell which entry was learned last.
    answers: u64,
    /// Given up since the last call of `take_changes`.
    forgotten: Vec<(Box<str>, Kind)>,
}

#[derive(Debug)]
struct Entry {
    calibration: Calibration,
    learned: u64,
    has_changed: bool,
}

/// What the store keeps of one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The upstream's name.
    pub upstream: String,
    /// As the requests name it.
    pub model: Box<str>,
    /// What its requests are like.
    pub kind: Kind,
    /// The last answers, oldest first; none: it was forgotten.
    pub answers: Vec<Pair>,
}

/// What an answer will teach once it has reported its prompt tokens.
#[derive(Debug)]
pub struct Lesson {
    /// Where it is learned.
    pub calibrations: Arc<Calibrations>,
    /// The upstream's index.
    pub upstream: usize,
    /// As the request names it.
    pub model: String,
    /// What the request is like.
    pub kind: Kind,
    /// Its prompt tokens as estimated, uncorrected.
    pub estimated: u64,
}

impl Lesson {
    /// Learns it.
    pub fn learn(self, reported: u64) {
        self.calibrations.learn(self.upstream, &self.model, self.kind, self.estimated, reported);
    }
}

impl Calibrations {
    /// Nothing learned of these upstreams, which are known by their index from now on.
    pub fn new<'n>(upstreams: impl IntoIterator<Item = &'n str>) -> Self {
        let of = |name: &str| (name.to_owned(), Mutex::default());
        Self { upstreams: upstreams.into_iter().map(of).collect() }
    }

    /// How an estimate is to be corrected.
    pub fn correction(&self, upstream: usize, model: &str, kind: Kind) -> Correction {
        let Some(of) = self.upstream(upstream) else { return Correction::default() };
        let entry = of.models.get(model).and_then(|kinds| kinds[kind as usize].as_ref());
        entry.map_or_else(Correction::default, |entry| entry.calibration.correction())
    }

    /// Learns from an answer that came to its end: what was estimated, uncorrected, and what was reported.
    pub fn learn(&self, upstream: usize, model: &str, kind: Kind, estimated: u64, reported: u64) {
        if model.len() > LONGEST_NAME {
            return;
        }
        let Some(mut of) = self.upstream(upstream) else { return };
        let entry = of.entry(model, kind);
        entry.calibration.learn(estimated, reported);
        entry.has_changed = true;
    }

    /// What has changed since the last call, for the store.
    pub fn take_changes(&self) -> Vec<Kept> {
        let mut changes = Vec::new();
        for (at, (name, _)) in self.upstreams.iter().enumerate() {
            let Some(mut of) = self.upstream(at) else { continue };
            let kept = |model: &str, kind, answers| Kept {
                upstream: name.clone(),
                model: model.into(),
                kind,
                answers,
            };
            for (model, kind) in std::mem::take(&mut of.forgotten) {
                changes.push(kept(&model, kind, Vec::new()));
            }
            for (model, kinds) in &mut of.models {
                for (kind, entry) in Kind::ALL.into_iter().zip(kinds) {
                    if let Some(entry) = entry.as_mut().filter(|entry| entry.has_changed) {
                        entry.has_changed = false;
                        changes.push(kept(model, kind, entry.calibration.pairs().collect()));
                    }
                }
            }
        }
        changes
    }

    /// Goes on from what another process has learned, as far as there still are such upstreams.
    pub fn restore(&self, kept: Vec<Kept>) {
        for Kept { upstream, model, kind, answers } in kept {
            let at = self.upstreams.iter().position(|(name, _)| *name == upstream);
            let Some(mut of) = at.and_then(|at| self.upstream(at)) else { continue };
            of.entry(&model, kind).calibration = Calibration::from_pairs(&answers);
        }
    }

    fn upstream(&self, at: usize) -> Option<MutexGuard<'_, OfUpstream>> {
        // A panic elsewhere cannot have left an entry half changed.
        Some(self.upstreams.get(at)?.1.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl OfUpstream {
    fn entry(&mut self, model: &str, kind: Kind) -> &mut Entry {
        self.answers += 1;
        let is_known = self.models.get(model).is_some_and(|kinds| kinds[kind as usize].is_some());
        if !is_known {
            if self.entries >= MOST {
                self.forget_oldest();
            }
            self.entries += 1;
            // Forgotten and learned anew before the store has heard of it.
            self.forgotten.retain(|(name, other)| (&**name, *other) != (model, kind));
            self.models.entry(model.into()).or_default();
        }
        let new = || Entry { calibration: Calibration::default(), learned: 0, has_changed: false };
        let kinds = self.models.entry(model.into()).or_default();
        let entry = kinds[kind as usize].get_or_insert_with(new);
        entry.learned = self.answers;
        entry
    }

    fn forget_oldest(&mut self) {
        let all = self.models.iter().flat_map(|(model, kinds)| {
            let entries = Kind::ALL.into_iter().zip(kinds);
            entries.filter_map(move |(kind, entry)| Some((entry.as_ref()?.learned, model, kind)))
        });
        let Some((_, model, kind)) = all.min_by_key(|(learned, ..)| *learned) else { return };
        let model = model.clone();
        if let Some(kinds) = self.models.get_mut(&model) {
            kinds[kind as usize] = None;
            if kinds.iter().all(Option::is_none) {
                self.models.remove(&model);
            }
        }
        self.entries -= 1;
        // Where nothing is kept nobody asks for these; a store that has missed one forgets it when it is read.
        if self.forgotten.len() < MOST {
            self.forgotten.push((model, kind));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(answers: u64) -> Calibrations {
        let all = Calibrations::new(["a", "b"]);
        (0..answers).for_each(|n| all.learn(0, "m", Kind::Tools, 100 + n, 200 + n));
        all
    }

    #[test]
    fn what_is_learned_counts_for_its_upstream_model_and_kind_alone() {
        let all = learned(5);
        assert_eq!(all.correction(0, "m", Kind::Tools).apply(100), 200);
        for (upstream, model, kind) in
            [(1, "m", Kind::Tools), (0, "n", Kind::Tools), (0, "m", Kind::Plain), (9, "m", Kind::Tools)]
        {
            assert_eq!(all.correction(upstream, model, kind).apply(100), 100);
        }
    }

    #[test]
    fn what_was_kept_is_what_was_learned_and_only_what_changed_is_kept_again() {
        let all = learned(5);
        let kept = all.take_changes();
        assert_eq!((kept.len(), kept[0].answers.len()), (1, 5));
        assert!(all.take_changes().is_empty());
        let again = Calibrations::new(["c", "a"]);
        again.restore(
            [
                kept,
                vec![Kept { upstream: "gone".into(), model: "m".into(), kind: Kind::Plain, answers: vec![] }],
            ]
            .concat(),
        );
        assert_eq!(again.correction(1, "m", Kind::Tools).apply(100), 200);
        assert!(again.take_changes().is_empty(), "it stands in the store already");
    }

    #[test]
    fn any_number_of_names_takes_bounded_memory_in_the_store_too() {
        let all = Calibrations::new(["a"]);
        let mut stored = std::collections::HashSet::new();
        for n in 0..4 * MOST {
            all.learn(0, "kept", Kind::Plain, 100, 150);
            all.learn(0, &format!("made-up-{n}"), Kind::ALL[n % 3], 100, 100);
            if n % 100 == 0 {
                for kept in all.take_changes() {
                    let key = (kept.model, kept.kind);
                    let _ = if kept.answers.is_empty() { stored.remove(&key) } else { stored.insert(key) };
                }
                assert!(stored.len() <= MOST, "{}", stored.len());
            }
        }
        assert_eq!(all.upstream(0).unwrap().entries, MOST);
        assert_eq!(all.correction(0, "kept", Kind::Plain).apply(100), 150);
        all.learn(0, &"x".repeat(LONGEST_NAME + 1), Kind::Plain, 100, 900);
        assert_eq!(all.upstream(0).unwrap().entries, MOST);
    }
}
