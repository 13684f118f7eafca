//! The thread that writes.

use super::database::Database;
use super::{Signal, Sleep, State, Watched};
use crate::calibrations::Kept;
use crate::clock::{self, Stopwatch};
use crate::config;
use crate::ledger::{AuditEntry, Changes, Row, Totals};
use crate::quota::{Amounts, PersistedCounter, Quota};
use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

/// What nobody waits for is written so much later at most: one commit for many settlements. Whoever waits is
/// not held up by it. Without it every settlement has nearly a commit of its own, of quotas of less than an
/// hour too: measured with a quota per minute, that is 10 us of CPU more a request at 6,000 a second, and 50 to 80
/// at 500.
const LAZY: Duration = Duration::from_millis(10);
/// After a commit that has failed the next one is tried so much later.
const RETRY: Duration = Duration::from_millis(500);
/// How often usage that has become old is looked for.
const FOLDING: Duration = Duration::from_mins(10);
/// How often what was learned of estimates is written: every answer changes it.
const LEARNED: Duration = Duration::from_secs(1);
const BETWEEN_FOLDS: Duration = Duration::from_millis(20);
/// Usage that cannot be written is kept up to so many rows; what comes then is counted as one model's.
const MOST_ROWS: usize = 100_000;

/// What has changed and is not yet written, of every environment.
#[derive(Default)]
struct Unwritten {
    of: Vec<OfEnvironment>,
    usage: HashMap<Key, Row>,
    calibrations: Vec<Kept>,
    has_any: bool,
}

#[derive(Default)]
struct OfEnvironment {
    quotas: Vec<(Quota, PersistedCounter)>,
    sums: Option<(Totals, Amounts)>,
    overrides: Option<Vec<Quota>>,
    audit: Vec<AuditEntry>,
}

/// Minute, index of the environment, model, index of the caller.
type Key = (i64, usize, Arc<str>, Option<usize>);

impl Unwritten {
    /// Takes over what has changed. The newest state of a quota replaces the one before.
    fn add(&mut self, at: usize, changes: Changes) {
        let of = &mut self.of[at];
        for (quota, saved) in changes.quotas {
            match of.quotas.iter_mut().find(|(known, _)| known.is_same_as(&quota)) {
                Some(known) => *known = (quota, saved),
                None => of.quotas.push((quota, saved)),
            }
        }
        of.sums = Some((changes.totals, changes.held));
        of.overrides = changes.overrides.or(of.overrides.take());
        of.audit.extend(changes.audit);
        for (row, model) in changes.usage {
            let model = if self.usage.len() < MOST_ROWS { model } else { "other".into() };
            let sum = self.usage.entry((row.minute, at, model, row.caller)).or_default();
            sum.minute = row.minute;
            sum.rejections += row.rejections;
            sum.spent = sum.spent.saturating_add(row.spent);
        }
        self.has_any = true;
    }

    fn write(&self, database: &mut Database, watched: &Watched<'_>) -> rusqlite::Result<()> {
        let accounts = watched.accounts;
        database.commit(|transaction| {
            for ((environment, _), changes) in accounts.iter().zip(&self.of) {
                for (quota, saved) in &changes.quotas {
                    transaction.quota(&environment.name, quota, saved)?;
                }
                if let Some(overrides) = &changes.overrides {
                    transaction.overrides(&environment.name, overrides)?;
                }
                for entry in &changes.audit {
                    transaction.audit(&environment.name, entry)?;
                }
                if let Some((totals, held)) = &changes.sums {
                    transaction.totals(&environment.name, totals, held)?;
                }
            }
            for ((_, at, model, caller), row) in &self.usage {
                let environment = &accounts[*at].0;
                let caller = caller.and_then(|index| environment.callers.get(index));
                transaction.usage(&environment.name, model, caller.map_or("", |c| &c.name), row)?;
            }
            for kept in &self.calibrations {
                transaction.calibration(kept)?;
            }
            Ok(())
        })
    }

    fn clear(&mut self) {
        for changes in &mut self.of {
            changes.quotas.clear();
            changes.sums = None;
            changes.overrides = None;
            changes.audit.clear();
        }
        self.usage.clear();
        self.calibrations.clear();
        self.has_any = false;
    }
}

/// Writes until it is told to stop, and once more then.
pub(super) fn run(mut database: Database, signal: &Signal, watched: &Watched<'_>, settings: &config::Store) {
    let of = watched.accounts.iter().map(|_| OfEnvironment::default()).collect();
    let mut unwritten = Unwritten { of, ..Unwritten::default() };
    let mut learned = Stopwatch::start();
    // Old usage is looked for at once, and then now and then.
    let mut folding = Folding { next: Duration::ZERO, since: Stopwatch::start() };
    loop {
        let stops = signal.wait(unwritten.has_any, folding.due_in());
        let commit = signal.commits.begin();
        for (at, (_, account)) in watched.accounts.iter().enumerate() {
            if let Some(changes) = account.take_changes() {
                unwritten.add(at, changes);
            }
        }
        // What could not be written yet is not added to: it is bounded, and the next answer tells it again.
        if unwritten.calibrations.is_empty() && (stops || learned.elapsed() >= LEARNED) {
            learned = Stopwatch::start();
            unwritten.calibrations = watched.calibrations.take_changes();
            unwritten.has_any |= !unwritten.calibrations.is_empty();
        }
        if unwritten.has_any {
            let written = unwritten.write(&mut database, watched);
            if written.is_ok() {
                unwritten.clear();
            }
            signal.report(written);
        }
        // Also where it has failed: requests go on from memory.
        signal.commits.finish(commit);
        if stops {
            return;
        }
        if !unwritten.has_any && folding.due_in().is_zero() {
            folding.fold(&mut database, settings);
        }
    }
}

/// Puts old usage together by days, a bounded piece at a time.
struct Folding {
    next: Duration,
    since: Stopwatch,
}

impl Folding {
    fn due_in(&self) -> Duration {
        self.next.saturating_sub(self.since.elapsed())
    }

    fn fold(&mut self, database: &mut Database, settings: &config::Store) {
        let history = i64::try_from(settings.history.as_secs() / 60).unwrap_or(i64::MAX);
        let before = clock::now().0.div_euclid(60_000).saturating_sub(history);
        let is_more = database.fold_oldest(before).unwrap_or_else(|error| {
            tracing::warn!(%error, "old usage cannot be put together by days");
            false
        });
        // Between two pieces requests get their turn.
        self.next = if is_more { BETWEEN_FOLDS } else { FOLDING };
        self.since = Stopwatch::start();
    }
}

impl Signal {
    /// Waits for something to write, at once if somebody waits for it, and at most so long. Returns whether
    /// to stop.
    fn wait(&self, is_behind: bool, longest: Duration) -> bool {
        let mut state = self.lock();
        if is_behind {
            // The last commit has failed; requests go on meanwhile.
            state = self.sleep(state, Sleep::UntilUrgent, RETRY, |state| state.stops);
        } else {
            if !state.dirty && !state.stops {
                state = self.sleep(state, Sleep::UntilChanged, longest, |state| state.sleep == Sleep::Awake);
            }
            if state.dirty && !state.urgent && !state.stops {
                state = self.sleep(state, Sleep::UntilUrgent, LAZY, |state| state.sleep == Sleep::Awake);
            }
        }
        state.urgent = false;
        state.dirty = false;
        state.stops
    }

    fn sleep<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        sleep: Sleep,
        longest: Duration,
        until: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        state.sleep = sleep;
        let waited = self.changed.wait_timeout_while(state, longest, |state| !until(state));
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.sleep = Sleep::Awake;
        state
    }

    fn report(&self, written: rusqlite::Result<()>) {
        let mut state = self.lock();
        match written {
            Ok(()) => {
                state.late = false;
                if state.failed.take().is_some() {
                    drop(state);
                    tracing::info!("the store can be written again: everything is kept");
                }
            }
            Err(error) => {
                let first = state.failed.replace(error.to_string()).is_none();
                drop(state);
                if first {
                    tracing::error!(%error, "the store cannot be written: counters go on in memory until it can");
                }
            }
        }
    }
}
