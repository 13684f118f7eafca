//! The new process: it asks the gateway that runs for its sockets, its store and its counters.

use super::socket::{self, ControlListener, PeerProcess};
use super::{FromIncumbent, PROTOCOL, STEP_TIMEOUT, ToIncumbent, frame, store_identity};
use crate::config::Config;
use crate::ledger::LeftAccount;
use anyhow::Context as _;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long the process of a closed control connection may take to end.
const EXIT_TIME: Duration = Duration::from_millis(500);

/// A gateway that runs, and what it hands over.
#[derive(Debug)]
pub(crate) struct Claim {
    stream: UnixStream,
    incumbent: PeerProcess,
    /// The listeners for callers.
    pub(crate) listeners: Vec<TcpListener>,
    /// The admin listener; `None` if the old process has another address.
    pub(crate) admin: Option<TcpListener>,
    /// The lock of the store.
    pub(crate) lock: Option<File>,
    control: ControlListener,
}

/// A gateway that was taken over.
#[derive(Debug)]
pub(crate) struct Claimed {
    /// The control socket, which is this process's now.
    pub(crate) control: ControlListener,
    /// The line to the old process. `None`: it has ended.
    pub(crate) predecessor: Option<UnixStream>,
    /// The old process's id.
    pub(crate) pid: i32,
}

impl Claim {
    /// Asks the gateway at `server.listen`. `None`: there is none that this process may replace.
    ///
    /// # Errors
    /// The gateway refuses.
    pub(crate) fn find(config: &Config) -> anyhow::Result<Option<Self>> {
        let address = config.server.listen;
        let Some(stream) = (address.port() != 0).then(|| socket::connect(address)).flatten() else {
            return Ok(None);
        };
        // A process of another user is none that this process may replace.
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
        let (listeners, has_admin, has_lock) = match frame::read(&stream)? {
            FromIncumbent::Welcome { listeners, has_admin, has_lock } => (listeners, has_admin, has_lock),
            FromIncumbent::Refused { reason } => anyhow::bail!(reason),
            other => anyhow::bail!("it answered {other:?}"),
        };
        let file = || socket::receive_file(&stream);
        let listeners = (0..listeners).map(|_| file().map(TcpListener::from)).collect::<io::Result<_>>()?;
        let admin = has_admin.then(file).transpose()?.map(TcpListener::from);
        let control = ControlListener(file()?.into());
        let lock = has_lock.then(file).transpose()?.map(File::from);
        Ok(Self { stream, incumbent, listeners, admin, lock, control })
    }

    /// Makes the old process hand its counters over: from now on its requests wait. Returns what they hold, by environment.
    ///
    /// # Errors
    /// The old process refuses or has ended.
    pub(crate) fn begin(&mut self) -> anyhow::Result<HashMap<String, LeftAccount>> {
        self.receive_accounts().with_context(|| format!("{} does not hand its counters over", self.incumbent))
    }

    fn receive_accounts(&mut self) -> anyhow::Result<HashMap<String, LeftAccount>> {
        frame::write(&self.stream, &ToIncumbent::Begin)?;
        let mut accounts = HashMap::new();
        loop {
            match frame::read(&self.stream)? {
                FromIncumbent::Account { environment, left } => drop(accounts.insert(environment, left)),
                FromIncumbent::Accounts => return Ok(accounts),
                FromIncumbent::Refused { reason } => anyhow::bail!(reason),
                other => anyhow::bail!("it answered {other:?}"),
            }
        }
    }

    /// Becomes the gateway. If the old process has ended in the meantime, its requests have too.
    ///
    /// # Errors
    /// The old process continues.
    pub(crate) fn finish(self) -> anyhow::Result<Claimed> {
        let Self { stream, incumbent, control, .. } = self;
        let pid = incumbent.pid;
        let replied = frame::write(&stream, &ToIncumbent::Ready).and_then(|()| frame::read(&stream));
        match replied {
            Ok(FromIncumbent::Go) => Ok(Claimed { control, predecessor: Some(stream), pid }),
            Ok(other) => anyhow::bail!("{incumbent} was not replaced: it answered {other:?}"),
            Err(_) if incumbent.ends_within(EXIT_TIME) => Ok(Claimed { control, predecessor: None, pid }),
            Err(error) => Err(error).with_context(|| {
                format!("{incumbent} was not replaced: this process took too long to start, and the old one continues")
            }),
        }
    }
}
