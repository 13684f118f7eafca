//! Usage by minute, caller and model, collected until the store takes it, and sums over everything. The usage of an upstream
//! has no callers, and its models have the names that are sent to it.

use super::demand::Settlement;
use super::messages::LeftUsage;
use crate::clock::Timestamp;
use crate::estimate::{KnownModels, ModelRank};
use crate::quota::{Amounts, Subject};
use std::collections::HashMap;
use std::sync::Arc;

/// Maximum number of models with a separate entry in the history. Callers can send any name, so known names come first.
const MAX_MODELS: usize = 500;
/// Longer names of models are truncated.
const MAX_NAME_BYTES: usize = 128;
const MINUTE_MS: i64 = 60_000;

/// The name under which the history counts all models that have no separate entry.
pub(crate) const OTHER_MODELS: &str = "other";

/// Sums since the store was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests charged.
    pub requests: u64,
    /// Requests denied.
    pub rejected: u64,
    /// Prompt tokens charged.
    pub prompt: u64,
    /// Completion tokens charged.
    pub completion: u64,
    /// Total tokens charged.
    pub total: u64,
}

impl Totals {
    pub(super) fn add(&mut self, spent: Amounts) {
        self.requests += spent.requests;
        self.prompt += spent.prompt;
        self.completion += spent.completion;
        self.total += spent.total;
    }
}

/// Usage that the store has not taken yet. Collects nothing while there is no store.
#[derive(Debug, Default)]
pub(super) struct UsageHistory {
    pub(super) is_enabled: bool,
    pub(super) known_models: KnownModels,
    /// The models that have answered and have a separate entry.
    models: HashMap<Arc<str>, ModelRank>,
    rows: Vec<UsageRow>,
}

/// Usage of one caller and model in one minute.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageRow {
    /// Minutes since the Unix epoch.
    pub minute: i64,
    /// `None`: a model without a separate entry.
    model: Option<Arc<str>>,
    /// The caller's name; `None` in an open environment.
    pub caller: Option<Arc<str>>,
    /// Requests denied.
    pub rejections: u64,
    /// The charged amounts.
    pub spent: Amounts,
}

/// The usage of an interval, in which its requests are spread evenly. The store keeps it by the minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageInterval {
    /// Begin.
    pub start: Timestamp,
    /// End; later than the begin.
    pub end: Timestamp,
    /// Requests denied.
    pub rejections: u64,
    /// The charged amounts, of the requests that were not denied.
    pub spent: Amounts,
}

impl UsageHistory {
    pub(super) fn record_denial(&mut self, now: Timestamp, subject: Subject<'_>) {
        if self.is_enabled {
            let model = self.models.get_key_value(truncated(subject.model)).map(|(name, _)| name.clone());
            self.row(now, model, subject.caller).rejections += 1;
        }
    }

    pub(super) fn record_settlement(&mut self, now: Timestamp, subject: Subject<'_>, settlement: Settlement) {
        if self.is_enabled && settlement.spent != Amounts::default() {
            let model = self.entry(subject.model, settlement.is_complete);
            let row = self.row(now, model, subject.caller);
            row.spent = row.spent.saturating_add(settlement.spent);
        }
    }

    /// Records the amounts that were held when the last process died. Their callers and models are unknown.
    pub(super) fn record_recovered(&mut self, now: Timestamp, held: Amounts) {
        if held != Amounts::default() {
            let row = self.row(now, None, None);
            row.spent = row.spent.saturating_add(held);
        }
    }

    /// Adds a row of another process.
    pub(super) fn add(&mut self, left: &LeftUsage) {
        if self.is_enabled {
            let model = if left.model == OTHER_MODELS { None } else { self.entry(&left.model, true) };
            let caller = left.caller.as_deref().map(Arc::from);
            let at = Timestamp(left.minute.saturating_mul(MINUTE_MS));
            let row = self.row(at, model, caller.as_ref());
            row.rejections = row.rejections.saturating_add(left.rejections);
            row.spent = row.spent.saturating_add(left.spent);
        }
    }

    /// The entry of a model; `None`: it has none. A new name gets an entry only if the model has answered under it. In
    /// a full table it replaces a name that is less known.
    fn entry(&mut self, name: &str, has_answered: bool) -> Option<Arc<str>> {
        let name = truncated(name);
        if let Some((known, _)) = self.models.get_key_value(name) {
            return Some(known.clone());
        }
        if !has_answered || name.is_empty() {
            return None;
        }
        let rank = self.known_models.rank(name);
        if self.models.len() >= MAX_MODELS {
            let least = self.models.iter().min_by_key(|(_, rank)| **rank);
            let replaced = least.filter(|(_, least)| **least < rank).map(|(name, _)| name.clone())?;
            self.models.remove(&replaced);
        }
        let name: Arc<str> = name.into();
        self.models.insert(name.clone(), rank);
        Some(name)
    }

    fn row(&mut self, now: Timestamp, model: Option<Arc<str>>, caller: Option<&Arc<str>>) -> &mut UsageRow {
        let minute = now.0.div_euclid(MINUTE_MS);
        // The store takes the rows every few milliseconds, so there are never many.
        let is_it =
            |row: &UsageRow| (row.minute, &row.model, row.caller.as_ref()) == (minute, &model, caller);
        let at = self.rows.iter().position(is_it).unwrap_or_else(|| {
            self.rows.push(UsageRow { minute, model, caller: caller.cloned(), ..UsageRow::default() });
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    /// Takes the collected rows, each with the name of its model.
    pub(super) fn take(&mut self) -> Vec<(UsageRow, Arc<str>)> {
        let with_name = |mut row: UsageRow| {
            let name = row.model.take().unwrap_or_else(|| OTHER_MODELS.into());
            (row, name)
        };
        std::mem::take(&mut self.rows).into_iter().map(with_name).collect()
    }
}

/// The part of a model's name that is stored.
fn truncated(name: &str) -> &str {
    &name[..name.floor_char_boundary(MAX_NAME_BYTES)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::glob::Glob;

    const NOW: Timestamp = Timestamp(1_774_700_000_000);

    /// Records one answer of each of these models. Returns the names in the history.
    fn recorded(history: &mut UsageHistory, models: &[&str], is_complete: bool) -> Vec<String> {
        for model in models {
            let settlement = Settlement { spent: Amounts::of_request(1, 1), is_complete };
            history.record_settlement(NOW, Subject { caller: None, model }, settlement);
        }
        history.take().into_iter().map(|(_, name)| name.to_string()).collect()
    }

    fn history_after(names: impl Iterator<Item = String>) -> UsageHistory {
        let known_models = KnownModels::with(["team-*", "our-model"].map(Glob::new));
        let mut history = UsageHistory { is_enabled: true, known_models, ..UsageHistory::default() };
        for name in names {
            recorded(&mut history, &[&name], true);
        }
        history
    }

    #[test]
    fn invented_names_do_not_push_out_known_ones() {
        let mut history = history_after((0..600).map(|n| format!("invented-{n}")));
        assert_eq!(history.models.len(), MAX_MODELS);
        assert_eq!(recorded(&mut history, &["one-more"], true), ["other"]);
        for known in ["gpt-4o", "claude-sonnet-4-5", "team-a", "our-model"] {
            assert_eq!(recorded(&mut history, &[known], false), ["other"], "{known} has not answered");
            assert_eq!(recorded(&mut history, &[known], true), [known]);
            assert_eq!(recorded(&mut history, &[known], false), [known]);
        }
        assert_eq!(history.models.len(), MAX_MODELS);
        // Names of a known family are better than invented ones, and public names are better than those.
        let mut history = history_after((0..600).map(|n| format!("gpt-4o-invented-{n}")));
        assert_eq!(recorded(&mut history, &["gpt-4o-one-more"], true), ["other"]);
        assert_eq!(recorded(&mut history, &["gpt-4o", "our-model"], true), ["gpt-4o", "our-model"]);
    }

    #[test]
    fn a_name_that_loses_its_entry_keeps_the_rows_that_were_recorded() {
        let mut history = history_after((1..MAX_MODELS).map(|n| format!("invented-{n}")));
        let names = recorded(&mut history, &["invented-x", "gpt-4o", "gpt-4.1"], true);
        assert_eq!(names, ["invented-x", "gpt-4o", "gpt-4.1"]);
        let denied = Subject { caller: None, model: "gpt-4o" };
        history.record_denial(NOW, denied);
        assert_eq!(&*history.take()[0].1, "gpt-4o");
    }
}
