//! Usage by minute, caller and model, collected until the store takes it, and sums over everything.

use super::demand::Settlement;
use crate::clock::Timestamp;
use crate::quota::{Amounts, Subject};
use std::collections::HashMap;
use std::sync::Arc;

/// Maximum number of models with a separate entry in the history. Callers can send any name.
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
    /// The numbers of the models that have answered, from 1 on. Number 0 stands for all others.
    models: HashMap<Arc<str>, usize>,
    names: Vec<Arc<str>>,
    rows: Vec<UsageRow>,
}

/// Usage of one caller and model in one minute.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageRow {
    /// Minutes since the Unix epoch.
    pub minute: i64,
    model: usize,
    /// The caller's name; `None` in an open environment.
    pub caller: Option<Arc<str>>,
    /// Requests denied.
    pub rejections: u64,
    /// The charged amounts.
    pub spent: Amounts,
}

impl UsageHistory {
    pub(super) fn record_denial(&mut self, now: Timestamp, subject: Subject<'_>) {
        if self.is_enabled {
            let model = self.models.get(subject.model).copied().unwrap_or(0);
            self.row(now, model, subject.caller).rejections += 1;
        }
    }

    pub(super) fn record_settlement(&mut self, now: Timestamp, subject: Subject<'_>, settlement: Settlement) {
        if self.is_enabled && settlement.spent != Amounts::default() {
            let model = self.model_number(subject.model, settlement.is_complete);
            let row = self.row(now, model, subject.caller);
            row.spent = row.spent.saturating_add(settlement.spent);
        }
    }

    /// Records the amounts that were held when the last process died. Their callers and models are unknown.
    pub(super) fn record_recovered(&mut self, now: Timestamp, held: Amounts) {
        if held != Amounts::default() {
            self.row(now, 0, None).spent = held;
        }
    }

    /// The number of a model. A new name gets a number only if the model has answered under it.
    fn model_number(&mut self, name: &str, has_answered: bool) -> usize {
        let name = &name[..name.floor_char_boundary(MAX_NAME_BYTES)];
        match self.models.get(name) {
            Some(&number) => number,
            None if has_answered && !name.is_empty() && self.names.len() < MAX_MODELS => {
                let name: Arc<str> = name.into();
                self.names.push(name.clone());
                self.models.insert(name, self.names.len());
                self.names.len()
            }
            None => 0,
        }
    }

    fn row(&mut self, now: Timestamp, model: usize, caller: Option<&Arc<str>>) -> &mut UsageRow {
        let minute = now.0.div_euclid(MINUTE_MS);
        // The store takes the rows every few milliseconds, so there are never many.
        let is_it = |row: &UsageRow| (row.minute, row.model, row.caller.as_ref()) == (minute, model, caller);
        let at = self.rows.iter().position(is_it).unwrap_or_else(|| {
            self.rows.push(UsageRow { minute, model, caller: caller.cloned(), ..UsageRow::default() });
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    /// Takes the collected rows, each with the name of its model.
    pub(super) fn take(&mut self) -> Vec<(UsageRow, Arc<str>)> {
        let with_name = |row: UsageRow| {
            let name = row.model.checked_sub(1).and_then(|at| self.names.get(at));
            let name = name.map_or_else(|| OTHER_MODELS.into(), Arc::clone);
            (row, name)
        };
        std::mem::take(&mut self.rows).into_iter().map(with_name).collect()
    }
}
