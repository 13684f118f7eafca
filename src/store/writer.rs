//! The thread that writes to the store.

use super::Sources;
use super::control::WriterControl;
use super::database::Database;
use crate::calibrations::SavedCalibration;
use crate::clock::{self, Stopwatch};
use crate::config::StoreSettings;
use crate::ledger::{
    AuditEntry, Changes, LeftUsage, NamedAccount, OverrideSet, SuccessorLine, Totals, UsageRow,
};
use crate::quota::{Amounts, PersistedCounter, Quota};
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

/// How often the thread looks for old usage rows to merge.
const MERGE_INTERVAL: Duration = Duration::from_mins(10);
/// Pause between two merges while there are more old rows, so that commits of requests come between.
const PAUSE_BETWEEN_MERGES: Duration = Duration::from_millis(20);
/// How often calibrations are written. Every answer changes one.
const CALIBRATION_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of usage rows in memory while the store is unavailable. Usage beyond it has the model `other`.
const MAX_UNWRITTEN_ROWS: usize = 100_000;

/// The changes of all environments that are not committed yet.
#[derive(Default)]
struct Unwritten {
    environments: Vec<UnwrittenEnvironment>,
    usage: HashMap<UsageKey, UsageRow>,
    calibrations: Vec<SavedCalibration>,
    audit: Vec<AuditEntry>,
    has_changes: bool,
}

#[derive(Default)]
struct UnwrittenEnvironment {
    quotas: Vec<(Quota, PersistedCounter)>,
    replaced: Vec<Quota>,
    totals_and_held: Option<(Totals, Amounts)>,
    overrides: Option<OverrideSet>,
}

/// Minute, index of the environment's account, model, and caller.
type UsageKey = (i64, usize, Arc<str>, Option<Arc<str>>);

impl Unwritten {
    /// Adds the changes of the account with this index. A newer state of a quota replaces the older one.
    fn add(&mut self, index: usize, changes: Changes) {
        if self.environments.len() <= index {
            self.environments.resize_with(index + 1, UnwrittenEnvironment::default);
        }
        let environment = &mut self.environments[index];
        for (quota, saved) in changes.quotas {
            match environment.quotas.iter_mut().find(|(known, _)| known.is_same_as(&quota)) {
                Some(known) => *known = (quota, saved),
                None => environment.quotas.push((quota, saved)),
            }
        }
        environment.replaced.extend(changes.replaced);
        environment.totals_and_held = Some((changes.totals, changes.held));
        environment.overrides = changes.overrides.or(environment.overrides.take());
        for (row, model) in changes.usage {
            let model = if self.usage.len() < MAX_UNWRITTEN_ROWS { model } else { "other".into() };
            let sum = self.usage.entry((row.minute, index, model, row.caller.clone())).or_default();
            sum.minute = row.minute;
            sum.rejections += row.rejections;
            sum.spent = sum.spent.saturating_add(row.spent);
        }
        self.has_changes = true;
    }

    fn write(&self, database: &mut Database, accounts: &[NamedAccount]) -> rusqlite::Result<()> {
        database.commit(|transaction| {
            for ((environment, _), changes) in accounts.iter().zip(&self.environments) {
                for quota in &changes.replaced {
                    transaction.remove_quota(environment, quota)?;
                }
                for (quota, saved) in &changes.quotas {
                    transaction.quota(environment, quota, saved)?;
                }
                if let Some(overrides) = &changes.overrides {
                    transaction.overrides(environment, overrides)?;
                }
                if let Some((totals, held)) = &changes.totals_and_held {
                    transaction.totals(environment, totals, held)?;
                }
            }
            for ((_, index, model, caller), row) in &self.usage {
                let Some((environment, _)) = accounts.get(*index) else { continue };
                transaction.usage(environment, model, caller.as_deref().unwrap_or_default(), row)?;
            }
            for entry in &self.audit {
                transaction.audit(entry)?;
            }
            for calibration in &self.calibrations {
                transaction.calibration(calibration)?;
            }
            Ok(())
        })
    }

    fn clear(&mut self) {
        for changes in &mut self.environments {
            changes.quotas.clear();
            changes.replaced.clear();
            changes.totals_and_held = None;
            changes.overrides = None;
        }
        self.usage.clear();
        self.calibrations.clear();
        self.audit.clear();
        self.has_changes = false;
    }
}

/// Writes changes until the control stops the thread, then writes the last changes. `lock`: the lock of the store.
pub(super) fn run(
    mut database: Database,
    control: &WriterControl,
    sources: &Sources,
    settings: &StoreSettings,
    lock: File,
) {
    let mut unwritten = Unwritten::default();
    let mut since_calibrations = Stopwatch::start();
    // The first merge is due at once.
    let mut merging = Merging { delay: Duration::ZERO, since: Stopwatch::start() };
    loop {
        let is_stopping = control.wait(unwritten.has_changes, merging.due_in());
        let is_pausing = control.must_pause();
        let commit = control.commits.begin();
        let accounts = sources.accounts.all();
        for (index, (_, account)) in accounts.iter().enumerate() {
            if let Some(changes) = account.take_changes() {
                unwritten.add(index, changes);
            }
        }
        // While calibrations are unwritten, no more are taken, so that their number is bounded. The others are taken after
        // the next successful commit.
        let is_due = is_stopping || is_pausing || since_calibrations.elapsed() >= CALIBRATION_INTERVAL;
        if unwritten.calibrations.is_empty() && is_due {
            since_calibrations = Stopwatch::start();
            unwritten.calibrations = sources.calibrations.take_changes();
            unwritten.has_changes |= !unwritten.calibrations.is_empty();
        }
        let audit = sources.accounts.audit();
        let (audit_end, entries) = audit.unwritten();
        unwritten.has_changes |= !entries.is_empty();
        unwritten.audit = entries;
        if unwritten.has_changes {
            let result = unwritten.write(&mut database, &accounts);
            if result.is_ok() {
                audit.remove_written(audit_end);
                unwritten.clear();
            }
            control.record_commit(result);
        }
        // Also after a failed commit: the requests that wait for it continue.
        control.commits.finish(commit);
        if is_pausing && let Some(line) = control.wait_for_new_process(!unwritten.has_changes) {
            drop((database, lock));
            return forward(control, sources, &line);
        }
        if is_stopping {
            return;
        }
        if !unwritten.has_changes && merging.due_in().is_zero() {
            merging.merge_oldest(&mut database, settings);
        }
    }
}

/// Sends the usage and the audit log of this process to the one that has the store, until the control stops the thread.
fn forward(control: &WriterControl, sources: &Sources, line: &SuccessorLine) {
    loop {
        let is_stopping = control.wait(false, MERGE_INTERVAL);
        // Requests do not wait for commits that this process does not make.
        let commit = control.commits.begin();
        for (environment, account) in sources.accounts.all().iter() {
            let rows: Vec<_> = account.take_changes().into_iter().flat_map(|changes| changes.usage).collect();
            if !rows.is_empty() {
                line.send_usage(environment, rows.into_iter().map(left_usage).collect());
            }
        }
        let audit = sources.accounts.audit();
        let (audit_end, entries) = audit.unwritten();
        if !entries.is_empty() {
            line.send_audit(entries);
            audit.remove_written(audit_end);
        }
        control.commits.finish(commit);
        if is_stopping {
            return;
        }
    }
}

fn left_usage((row, model): (UsageRow, Arc<str>)) -> LeftUsage {
    LeftUsage {
        minute: row.minute,
        model: model.to_string(),
        caller: row.caller.as_deref().map(str::to_owned),
        rejections: row.rejections,
        spent: row.spent,
    }
}

/// Merges old usage rows into one per day, a bounded number at a time.
struct Merging {
    /// Delay between the last merge and the next one.
    delay: Duration,
    since: Stopwatch,
}

impl Merging {
    fn due_in(&self) -> Duration {
        self.delay.saturating_sub(self.since.elapsed())
    }

    fn merge_oldest(&mut self, database: &mut Database, settings: &StoreSettings) {
        let history_minutes = i64::try_from(settings.history.as_secs() / 60).unwrap_or(i64::MAX);
        let before = clock::now().0.div_euclid(60_000).saturating_sub(history_minutes);
        let has_more = database.merge_oldest_usage(before).unwrap_or_else(|error| {
            tracing::warn!(
                %error,
                "old usage rows of the store cannot be merged into days: the file grows until they can"
            );
            false
        });
        self.delay = if has_more { PAUSE_BETWEEN_MERGES } else { MERGE_INTERVAL };
        self.since = Stopwatch::start();
    }
}
