//! The embedded store: one SQLite file with everything that must survive a restart.
//!
//! The store contains states and no events. A commit writes the current state of every changed quota, so one commit
//! costs the same for one request as for a hundred. After a crash, the amounts that requests in flight held count as
//! used, so these requests are charged in full. One thread writes. It commits all changes as soon as the
//! previous commit is done. Requests that must not continue before their reservation is durable wait for that commit.
//!
//! SQLite runs in WAL mode with `synchronous=NORMAL`: a killed process loses no commit. A power failure may lose the
//! last commits.

mod audit;
mod backup;
mod control;
mod database;
mod stored_quota;
mod usage_intervals;
mod usage_report;
mod usage_tables;
mod writer;

use crate::calibrations::{Calibrations, SavedCalibration};
use crate::clock;
use crate::config::StoreSettings;
use crate::ledger::{Accounts, LeftAccount, OTHER_MODELS, Owner, Persistence, RestoredState};
use crate::quota::{CalendarPeriod, PersistedCounter, Quota, Scope, Window};
use anyhow::Context as _;
use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

pub(crate) use audit::{WRONG_TOKEN, read_audit};
pub(crate) use backup::back_up;
pub use control::WriterControl;
use database::Database;
pub(crate) use database::{StoredEnforce, StoredOverride, StoredOverrides};
pub use usage_intervals::read as read_usage_intervals;
pub(crate) use usage_report::{
    ReportColumn, ReportQuery, ReportRow, ReportStep, ReportSubject, TooManyRows, parse_columns,
    parse_moment, parse_step, read as read_usage, to_csv,
};
use usage_tables::Used;

/// The sources of the changes that the writer thread writes.
struct Sources {
    accounts: Arc<Accounts>,
    calibrations: Arc<Calibrations>,
}

/// Reads the calibrations from a store file, also while a gateway uses the file.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn read_calibrations(path: &Path) -> anyhow::Result<Vec<SavedCalibration>> {
    let read = Database::open_read_only(path).and_then(|database| database.calibrations());
    read.with_context(|| format!("store.path, {}, cannot be read", path.display()))
}

/// Reads what administrators have set from a store file, also while a gateway uses the file.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn read_overrides(path: &Path) -> anyhow::Result<StoredOverrides> {
    let read = Database::open_read_only(path).and_then(|database| database.stored_overrides());
    read.with_context(|| format!("store.path, {}, cannot be read", path.display()))
}

/// An open store whose writer thread has not started yet.
#[derive(Debug)]
pub struct Store {
    database: Database,
    control: Arc<WriterControl>,
    path: PathBuf,
    settings: StoreSettings,
    /// Locked as long as the store is open, so that no second process counts with the same file.
    lock: File,
    /// What requests of the process that hands the store over hold, by environment.
    left: HashMap<String, LeftAccount>,
}

/// The writer thread. Dropping it writes the last changes and ends the thread.
#[derive(Debug)]
pub struct StoreWriter {
    control: Arc<WriterControl>,
    thread: Option<JoinHandle<()>>,
}

impl Store {
    /// Opens the store file, or creates a new one.
    ///
    /// # Errors
    /// The file cannot be opened or written, is not a store, has a newer version, or is in use by another process. The
    /// error names the file and how to fix it.
    pub fn open(settings: &StoreSettings) -> anyhow::Result<Self> {
        let path = settings.path.clone();
        create_folder(&path)?;
        let file = resolve_links(&path);
        let lock = lock_file(&file, &path)?;
        Self::open_locked(settings, lock)
    }

    /// Opens the store file of a process that has handed its lock over. That process does not write to the file any more.
    ///
    /// # Errors
    /// As for `open`.
    pub(crate) fn take_over(
        settings: &StoreSettings,
        lock: File,
        left: HashMap<String, LeftAccount>,
    ) -> anyhow::Result<Self> {
        Ok(Self { left, ..Self::open_locked(settings, lock)? })
    }

    fn open_locked(settings: &StoreSettings, lock: File) -> anyhow::Result<Self> {
        let path = settings.path.clone();
        let file = resolve_links(&path);
        let database = Database::open(&file, &path)?;
        let left = HashMap::new();
        Ok(Self { database, control: Arc::default(), path, settings: settings.clone(), lock, left })
    }

    /// Another handle of the lock. The store stays locked until both are closed.
    ///
    /// # Errors
    /// The process has too many open files.
    pub(crate) fn lock_handle(&self) -> std::io::Result<File> {
        self.lock.try_clone()
    }

    /// Receives the notifications of changes from accounts.
    pub fn persistence(&self) -> Arc<WriterControl> {
        self.control.clone()
    }

    /// Reads the last state of an account.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn restored_state<'a>(&self, owner: impl Into<Owner<'a>>) -> anyhow::Result<RestoredState> {
        let owner = owner.into();
        let read = restored_state(&self.database, owner);
        let read = read.with_context(|| format!("store.path, {}, cannot be read", self.path.display()))?;
        Ok(RestoredState { left: self.left.get(&*owner.key()).cloned(), ..read })
    }

    /// Reads the saved calibrations.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn calibrations(&self) -> anyhow::Result<Vec<SavedCalibration>> {
        let read = self.database.calibrations();
        read.with_context(|| format!("store.path, {}, cannot be read", self.path.display()))
    }

    /// Starts the thread that writes the changes of these accounts and calibrations, also of accounts that are added later.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        self,
        accounts: Arc<Accounts>,
        calibrations: Arc<Calibrations>,
    ) -> anyhow::Result<StoreWriter> {
        let Self { database, control, settings, lock, .. } = self;
        let sources = Sources { accounts, calibrations };
        let of_thread = control.clone();
        let run = move || {
            writer::run(database, &of_thread, &sources, &settings, lock);
        };
        let thread = thread::Builder::new().name("store".into()).spawn(run)?;
        // The accounts have charged the requests that a crash interrupted. This commit makes the charge durable.
        control.changed(true);
        Ok(StoreWriter { control, thread: Some(thread) })
    }
}

/// Reads the last state of an account, also while a gateway uses the file.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn read_restored_state(path: &Path, owner: Owner<'_>) -> anyhow::Result<RestoredState> {
    let read = Database::open_read_only(path).and_then(|database| restored_state(&database, owner));
    read.with_context(|| format!("store.path, {}, cannot be read", path.display()))
}

fn restored_state(database: &Database, owner: Owner<'_>) -> rusqlite::Result<RestoredState> {
    let name = &owner.key();
    let (totals, held) = database.totals(name)?;
    let mut quotas = database.quotas(name)?;
    for quota in owner.quotas() {
        if let Some((_, saved)) = quotas.iter_mut().find(|(stored, _)| stored.is_same_as(quota)) {
            let missing = used_before(database, name, quota, saved)?;
            saved.used = saved.used.saturating_add(i64::try_from(missing).unwrap_or(i64::MAX));
        }
    }
    let overrides = database.overrides(name)?;
    Ok(RestoredState { quotas, totals, held, overrides, left: None })
}

/// The usage of a calendar quota's current period that its saved state does not contain, from the usage history.
///
/// This usage exists if the quota has a new time zone whose current period began earlier than the saved period.
/// The result may include usage shortly before the start of the period, but it omits no usage of the period.
fn used_before(
    database: &Database,
    account: &str,
    quota: &Quota,
    saved: &PersistedCounter,
) -> rusqlite::Result<u64> {
    let Window::Calendar { unit, zone } = &quota.window else { return Ok(0) };
    let start = CalendarPeriod::new(quota.limit, *unit, zone.clone(), clock::now()).start();
    if saved.at <= start {
        return Ok(0);
    }
    let rows = database.used_between(account, start, saved.at)?;
    let applies = |row: &&Used| match &quota.scope {
        Scope::Environment | Scope::Upstream(_) => true,
        // The caller is empty for requests that were in flight when a process crashed.
        Scope::Caller(name) => row.caller == **name || row.caller.is_empty(),
        scope @ (Scope::Model(_) | Scope::UpstreamModel(_)) => {
            row.model == OTHER_MODELS || scope.models().is_some_and(|pattern| pattern.matches(&row.model))
        }
    };
    Ok(rows.iter().filter(applies).map(|row| row.amounts.of(quota.kind)).sum())
}

impl Drop for StoreWriter {
    fn drop(&mut self) {
        self.control.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            drop(thread.join());
        }
    }
}

fn create_folder(path: &Path) -> anyhow::Result<()> {
    let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) else { return Ok(()) };
    fs::create_dir_all(folder)
        .with_context(|| format!("the folder of store.path, {}, cannot be created", folder.display()))
}

/// What identifies the store file, also for a process that reaches it by another path: device and inode of its lock file.
/// `None`: no process has used the store yet.
pub(crate) fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = lock_name(&path.canonicalize().ok()?).metadata().ok()?;
    Some((found.dev(), found.ino()))
}

fn lock_name(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

/// Resolves all links of the path, so that every process finds the same lock file. A missing file is created first,
/// because a link may point to it. If that fails, this function returns the path unchanged: opening the database fails
/// too and reports why.
fn resolve_links(path: &Path) -> PathBuf {
    let real = path.canonicalize().or_else(|_| {
        File::options().create(true).append(true).mode(0o600).open(path)?;
        path.canonicalize()
    });
    real.unwrap_or_else(|_| path.to_owned())
}

/// Locks a file next to the store file, so that only one process uses the store. The lock is not on the store file
/// itself: closing that file would release the locks that SQLite has on it in this process.
fn lock_file(file: &Path, path: &Path) -> anyhow::Result<File> {
    let lock = File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .mode(0o600)
        .open(lock_name(file))
        .with_context(|| {
            format!("store.path, {}, cannot be locked: make its folder writable", path.display())
        })?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => anyhow::bail!(
            "store.path, {}, is in use by another process: two gateways on one file would lose counts; set another path for \
             each gateway. store.redis shares their quotas, and each still needs a file of its own. To replace the other \
             process, start with its server.listen",
            path.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("store.path, {}, cannot be locked", path.display()))
        }
    }
}

/// The name of a quota's kind of window in the store.
fn window_name(quota: &Quota) -> &'static str {
    match quota.window {
        Window::Rolling { .. } => "rolling",
        Window::Calendar { .. } => "calendar",
    }
}
