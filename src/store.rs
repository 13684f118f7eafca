//! The embedded store: what has to outlive the process, in one SQLite file.
//!
//! It keeps states, not events: a commit writes how every quota that has changed stands now, so that a
//! commit costs the same for one request as for a hundred. What requests in flight hold is left out of
//! the level that is kept: a process that dies has charged them in full. One thread writes, and commits
//! whatever has changed as soon as it is free; those that must not go on before their reservation is
//! kept wait for that commit.
//!
//! `synchronous=NORMAL` in WAL mode: a killed process loses nothing that was committed; a power failure
//! may lose the last commits.

mod database;
mod writer;

use crate::calibrations::{Calibrations, Kept};
use crate::clock;
use crate::config::{self, Environment};
use crate::ledger::{Account, Commits, OTHER, Persistence, RestoredState};
use crate::quota::{CalendarPeriod, PersistedCounter, Quota, Scope, Window};
use anyhow::Context as _;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use database::{Database, Used};

/// What the writer looks at for changes.
struct Watched<'a> {
    accounts: &'a [(Arc<Environment>, Arc<Account>)],
    calibrations: &'a Calibrations,
}

/// Looks up what was learned of estimates, also while a gateway runs on the file.
///
/// # Errors
/// The file cannot be read.
pub fn calibrations(path: &Path) -> anyhow::Result<Vec<Kept>> {
    let read = Database::open_to_read(path).and_then(|database| database.calibrations());
    read.with_context(|| format!("store.path, {}, cannot be read", path.display()))
}

/// An open store that nobody writes to yet.
#[derive(Debug)]
pub struct Store {
    database: Database,
    signal: Arc<Signal>,
    path: PathBuf,
    settings: config::Store,
    /// Held as long as the store is open: no second process may count with the same file.
    lock: File,
}

/// The thread that writes. Dropping it writes what is left.
#[derive(Debug)]
pub struct Writer {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

/// Tells the writer that there is something to write, and others how it does.
#[derive(Debug, Default)]
pub struct Signal {
    state: Mutex<State>,
    changed: Condvar,
    commits: Commits,
}

#[derive(Debug, Default)]
struct State {
    urgent: bool,
    dirty: bool,
    stops: bool,
    sleep: Sleep,
    /// Why the last commit failed.
    failed: Option<String>,
    /// A request has waited in vain: nobody waits until the next commit.
    late: bool,
}

/// What wakes the writer: waking it for every request would cost more than writing does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sleep {
    #[default]
    Awake,
    UntilUrgent,
    UntilChanged,
}

impl Signal {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What keeps the store from writing; `None`: nothing.
    pub fn trouble(&self) -> Option<String> {
        let state = self.lock();
        let late = || state.late.then(|| "a commit takes longer than a second".to_owned());
        state.failed.clone().or_else(late)
    }
}

impl Persistence for Signal {
    fn changed(&self, urgent: bool) {
        let mut state = self.lock();
        state.urgent |= urgent;
        state.dirty = true;
        let wakes = match state.sleep {
            Sleep::Awake => false,
            Sleep::UntilUrgent => urgent,
            Sleep::UntilChanged => true,
        };
        if wakes {
            state.sleep = Sleep::Awake;
            drop(state);
            self.changed.notify_one();
        }
    }

    fn is_writing(&self) -> bool {
        let state = self.lock();
        state.failed.is_none() && !state.late
    }

    fn commits(&self) -> &Commits {
        &self.commits
    }

    fn is_late(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.late, true) {
            tracing::error!(
                "the store takes longer than a second to commit: requests do not wait for it any more"
            );
        }
    }
}

impl Store {
    /// Opens the store, or makes a new one.
    ///
    /// # Errors
    /// The file cannot be opened or written, is no store, is of a newer version, or another process
    /// uses it. Each names the file and what would mend it.
    pub fn open(settings: &config::Store) -> anyhow::Result<Self> {
        let path = settings.path.clone();
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            fs::create_dir_all(folder)
                .with_context(|| format!("the folder of store.path, {}, cannot be made", folder.display()))?;
        }
        let file = real_path(&path);
        let lock = only_process(&file, &path)?;
        let database = Database::open(&file, &path)?;
        Ok(Self { database, signal: Arc::default(), path, settings: settings.clone(), lock })
    }

    /// Who is to be told of changes.
    pub fn keeper(&self) -> Arc<Signal> {
        self.signal.clone()
    }

    /// What another process has left of an environment.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn left(&self, environment: &Environment) -> anyhow::Result<RestoredState> {
        let read = || -> rusqlite::Result<RestoredState> {
            let (totals, held) = self.database.totals(&environment.name)?;
            let (mut quotas, mut overrides) = (Vec::new(), Vec::new());
            for quota in &environment.quotas {
                if let Some(mut saved) = self.database.quota(&environment.name, quota)? {
                    let missing = self.used_before(&environment.name, quota, &saved)?;
                    saved.used = saved.used.saturating_add(i64::try_from(missing).unwrap_or(i64::MAX));
                    quotas.push((quota.clone(), saved));
                }
                if let Some((limit, burst)) = self.database.limit_override(&environment.name, quota)? {
                    overrides.push(quota.with_limit(limit, burst));
                }
            }
            Ok(RestoredState { quotas, totals, held, overrides })
        };
        read().with_context(|| format!("store.path, {}, cannot be read", self.path.display()))
    }

    /// What the usage history has of a calendar quota's running period before the period that is kept of it
    /// began: there is such a time where the quota's time zone is another now. So what was used in the
    /// period that the clock shows by the new zone stays used; usage of the hours around its start may be
    /// counted in it too, and none is left out.
    fn used_before(
        &self,
        environment: &str,
        quota: &Quota,
        saved: &PersistedCounter,
    ) -> rusqlite::Result<u64> {
        let Window::Calendar { unit, zone } = &quota.window else { return Ok(0) };
        let start = CalendarPeriod::new(quota.limit, *unit, zone.clone(), clock::now()).start();
        if saved.at <= start {
            return Ok(0);
        }
        let rows = self.database.used_between(environment, start, saved.at)?;
        let binds = |row: &&Used| match &quota.scope {
            Scope::Environment => true,
            // Nobody knows whose it was that was in flight when a process died.
            Scope::Caller(_, name) => row.caller == *name || row.caller.is_empty(),
            Scope::Model(pattern) => pattern.matches(&row.model) || row.model == OTHER,
        };
        Ok(rows.iter().filter(binds).map(|row| row.amounts.of(quota.kind)).sum())
    }

    /// What another process has learned of estimates.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn calibrations(&self) -> anyhow::Result<Vec<Kept>> {
        let read = self.database.calibrations();
        read.with_context(|| format!("store.path, {}, cannot be read", self.path.display()))
    }

    /// Starts to write what changes in these accounts, and what is learned of estimates.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(
        self,
        accounts: Vec<(Arc<Environment>, Arc<Account>)>,
        calibrations: Arc<Calibrations>,
    ) -> anyhow::Result<Writer> {
        let signal = self.signal.clone();
        let Self { database, signal: own, settings, lock, .. } = self;
        let write = move || {
            writer::run(
                database,
                &own,
                &Watched { accounts: &accounts, calibrations: &calibrations },
                &settings,
            );
            drop(lock);
        };
        let thread = thread::Builder::new().name("store".into()).spawn(write)?;
        // What was in flight when the last process died is charged now, and kept as charged.
        signal.changed(true);
        Ok(Writer { signal, thread: Some(thread) })
    }
}

impl Writer {
    /// What keeps it from writing; `None`: nothing.
    pub fn signal(&self) -> &Arc<Signal> {
        &self.signal
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut state = self.signal.lock();
        state.stops = true;
        state.sleep = Sleep::Awake;
        drop(state);
        self.signal.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A writer that has panicked has said so.
            drop(thread.join());
        }
    }
}

/// Where the file is, whatever links lead there: whoever comes by another way has to find the same lock.
/// One that is not there yet is made, since a link may lead to it. Where that fails, so does what follows,
/// and says why.
fn real_path(path: &Path) -> PathBuf {
    let real = path.canonicalize().or_else(|_| {
        File::options().create(true).append(true).open(path)?;
        path.canonicalize()
    });
    real.unwrap_or_else(|_| path.to_owned())
}

/// A lock next to the file, not on it: whoever closes a file that SQLite has open, in the same process,
/// gives up SQLite's own locks.
fn only_process(file: &Path, path: &Path) -> anyhow::Result<File> {
    let mut name = file.as_os_str().to_owned();
    name.push(".lock");
    let lock = File::options().create(true).write(true).truncate(false).open(&name).with_context(|| {
        format!("store.path, {}, cannot be locked: its folder must be writable", path.display())
    })?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => anyhow::bail!(
            "store.path, {}, is in use by another process: two gateways on one file would lose counts; give each its own, \
             or share quotas by store.redis",
            path.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("store.path, {}, cannot be locked", path.display()))
        }
    }
}

/// How a quota is called in the store: what stays the same when its limit changes.
fn window(quota: &Quota) -> &'static str {
    match quota.window {
        Window::Rolling { .. } => "rolling",
        Window::Calendar { .. } => "calendar",
    }
}
