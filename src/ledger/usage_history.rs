//! What was used when, by whom and of which model, until the store takes it.

use super::counters::Ended;
use crate::clock::Timestamp;
use crate::quota::{Amounts, Subject};
use std::collections::HashMap;
use std::sync::Arc;

/// More models than this are not told apart: callers can make names up.
const MOST_MODELS: usize = 500;
/// Longer names are cut.
const LONGEST_NAME: usize = 128;
const MINUTE_MS: i64 = 60_000;

/// What names stand for models of which nothing is known.
pub(crate) const OTHER: &str = "other";

/// Usage not yet taken by the store; nothing is gathered before there is one.
#[derive(Debug, Default)]
pub(super) struct History {
    pub(super) is_kept: bool,
    /// Models that have answered, by number from 1 on; 0 stands for all others.
    models: HashMap<Arc<str>, usize>,
    names: Vec<Arc<str>>,
    rows: Vec<Row>,
}

/// Usage of one caller and model in one minute.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Minutes since the Unix epoch.
    pub minute: i64,
    model: usize,
    /// Index of the caller; `None` in an open environment.
    pub caller: Option<usize>,
    /// Requests denied.
    pub rejections: u64,
    /// What was charged.
    pub spent: Amounts,
}

impl History {
    pub(super) fn rejected(&mut self, now: Timestamp, subject: Subject<'_>) {
        if self.is_kept {
            let model = self.models.get(subject.model).copied().unwrap_or(0);
            self.row(now, model, subject.caller).rejections += 1;
        }
    }

    pub(super) fn settled(&mut self, now: Timestamp, subject: Subject<'_>, ended: Ended) {
        if self.is_kept && ended.spent != Amounts::default() {
            let model = self.model(subject.model, ended.is_whole);
            let row = self.row(now, model, subject.caller);
            row.spent = row.spent.saturating_add(ended.spent);
        }
    }

    /// What was in flight when the last process died: nobody knows whose it was.
    pub(super) fn recovered(&mut self, now: Timestamp, held: Amounts) {
        if held != Amounts::default() {
            self.row(now, 0, None).spent = held;
        }
    }

    /// The number of a model: a new one only for a name under which an answer came.
    fn model(&mut self, name: &str, answered: bool) -> usize {
        let name = &name[..name.floor_char_boundary(LONGEST_NAME)];
        match self.models.get(name) {
            Some(&number) => number,
            None if answered && !name.is_empty() && self.names.len() < MOST_MODELS => {
                let name: Arc<str> = name.into();
                self.names.push(name.clone());
                self.models.insert(name, self.names.len());
                self.names.len()
            }
            None => 0,
        }
    }

    fn row(&mut self, now: Timestamp, model: usize, caller: Option<usize>) -> &mut Row {
        let minute = now.0.div_euclid(MINUTE_MS);
        // The store takes the rows every few milliseconds: there are never many.
        let is_it = |row: &Row| (row.minute, row.model, row.caller) == (minute, model, caller);
        let at = self.rows.iter().position(is_it).unwrap_or_else(|| {
            self.rows.push(Row { minute, model, caller, ..Row::default() });
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    /// Hands over what was gathered, each row with the name of its model.
    pub(super) fn take(&mut self) -> Vec<(Row, Arc<str>)> {
        let named = |row: Row| {
            let name = row.model.checked_sub(1).and_then(|at| self.names.get(at));
            let name = name.map_or_else(|| OTHER.into(), Arc::clone);
            (row, name)
        };
        std::mem::take(&mut self.rows).into_iter().map(named).collect()
    }
}
