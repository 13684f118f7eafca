//! The new process: it requests the sockets, the store and the counters of the running gateway.

use super::socket::{self, ControlListener, PeerProcess};
use super::{FromIncumbent, PROTOCOL, STEP_TIMEOUT, ToIncumbent, frame, store_identity};
use crate::config::Config;
use crate::ledger::LeftAccount;
use crate::provider_limits::LeftLimits;
use anyhow::Context as _;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long the old process may take to exit after its control connection has closed.
const EXIT_TIME: Duration = Duration::from_millis(500);

/// File descriptors that a process opens at most between the hand-over and its first request, besides a copy of each listener
/// for callers.
const LAST_DESCRIPTORS: usize = 32;

/// A running gateway, with the sockets and the lock that it has sent.
#[derive(Debug)]
pub(crate) struct Claim {
    stream: UnixStream,
    incumbent: PeerProcess,
    /// The listeners for callers.
    pub(crate) listeners: Vec<TcpListener>,
    /// Whether the service manager has passed them. It keeps them open.
    pub(crate) is_passed: bool,
    /// The admin listener; `None` if the old process has another address.
    pub(crate) admin: Option<TcpListener>,
    /// The lock of the store.
    pub(crate) lock: Option<File>,
    /// What the old process has learned of the providers' limits.
    pub(crate) limits: Vec<LeftLimits>,
    control: ControlListener,
}

/// A gateway that was taken over.
#[derive(Debug)]
pub(crate) struct Claimed {
    /// The control socket. It now belongs to this process.
    pub(crate) control: ControlListener,
    /// The connection to the old process. `None`: that process has ended.
    pub(crate) predecessor: Option<UnixStream>,
    /// The old process's id.
    pub(crate) pid: i32,
}

impl Claim {
    /// Connects to the gateway at `server.listen`. `None`: there is no gateway that this process may replace.
    ///
    /// # Errors
    /// The gateway refuses, or the connection fails.
    pub(crate) fn find(config: &Config) -> anyhow::Result<Option<Self>> {
        let address = config.server.listen;
        let Some(stream) = (address.port() != 0).then(|| socket::connect(address)).flatten() else {
            return Ok(None);
        };
        // This process may not replace a process of another user.
        let Ok(incumbent) = socket::peer(&stream) else { return Ok(None) };
        let pid = incumbent.pid;
        Self::open(stream, incumbent, config).map(Some).with_context(|| {
            format!(
                "process {pid} listens at {address} and was not replaced; stop it first, or set server.listen to another \
                 address"
            )
        })
    }

    fn open(stream: UnixStream, incumbent: PeerProcess, config: &Config) -> anyhow::Result<Self> {
        stream.set_read_timeout(Some(STEP_TIMEOUT))?;
        stream.set_write_timeout(Some(STEP_TIMEOUT))?;
        let hello = ToIncumbent::Hello {
            protocol: PROTOCOL,
            store: store_identity(config),
            admin: config.admin.listen,
        };
        frame::write(&stream, &hello)?;
        let (listeners, has_admin, has_lock, is_passed) = match frame::read(&stream)? {
            FromIncumbent::Welcome { listeners, has_admin, has_lock, is_passed } => {
                (listeners, has_admin, has_lock, is_passed)
            }
            FromIncumbent::Refused { reason } => anyhow::bail!(reason),
            other => anyhow::bail!("its reply is unexpected: {other:?}"),
        };
        let file = || socket::receive_file(&stream);
        let listeners = (0..listeners).map(|_| file().map(TcpListener::from)).collect::<io::Result<_>>()?;
        let admin = has_admin.then(file).transpose()?.map(TcpListener::from);
        let control = ControlListener(file()?.into());
        let lock = has_lock.then(file).transpose()?.map(File::from);
        let limits = Vec::new();
        Ok(Self { stream, incumbent, listeners, is_passed, admin, lock, limits, control })
    }

    /// Requests the counters. From now on the requests of the old process wait. Returns the amounts that they hold, by
    /// environment. Afterwards `limits` has what the old process has learned of the providers' limits.
    ///
    /// # Errors
    /// The old process refuses or has ended.
    pub(crate) fn begin(&mut self) -> anyhow::Result<HashMap<String, LeftAccount>> {
        self.receive_accounts().with_context(|| format!("{} did not hand its counters over", self.incumbent))
    }

    fn receive_accounts(&mut self) -> anyhow::Result<HashMap<String, LeftAccount>> {
        frame::write(&self.stream, &ToIncumbent::Begin)?;
        let mut accounts = HashMap::new();
        loop {
            match frame::read(&self.stream)? {
                FromIncumbent::Account { environment, left } => drop(accounts.insert(environment, left)),
                FromIncumbent::ProviderLimits(limits) => self.limits = limits,
                FromIncumbent::Accounts => return Ok(accounts),
                FromIncumbent::Refused { reason } => anyhow::bail!(reason),
                other => anyhow::bail!("its reply is unexpected: {other:?}"),
            }
        }
    }

    /// Becomes the gateway, also if the old process has ended in the meantime: its requests have ended with it. `listeners`:
    /// the number of listeners for callers.
    ///
    /// # Errors
    /// The old process continues.
    pub(crate) fn finish(self, listeners: usize) -> anyhow::Result<Claimed> {
        let Self { stream, incumbent, control, .. } = self;
        let pid = incumbent.pid;
        // This process needs them when the old one does not accept any more. If it failed then, no process would serve.
        let count = LAST_DESCRIPTORS + listeners;
        let reserved: io::Result<Vec<File>> = (0..count).map(|_| File::open("/dev/null")).collect();
        let reserved = reserved.with_context(|| {
            format!(
                "{incumbent} was not replaced: this process may open too few files (raise ulimit -n or LimitNOFILE)"
            )
        })?;
        let replied = frame::write(&stream, &ToIncumbent::Ready).and_then(|()| frame::read(&stream));
        let predecessor = match replied {
            Ok(FromIncumbent::Go) => Some(stream),
            Ok(other) => anyhow::bail!("{incumbent} was not replaced: its reply is unexpected: {other:?}"),
            Err(_) if incumbent.ends_within(EXIT_TIME) => None,
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("{incumbent} was not replaced: this process took too long to start, and the old one continues")
                });
            }
        };
        drop(reserved);
        if let Err(error) = control.adopt() {
            tracing::warn!(%error, "the next process that replaces this one cannot identify it");
        }
        Ok(Claimed { control, predecessor, pid })
    }
}
