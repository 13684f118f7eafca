//! The old process: it hands its sockets, its store and its counters over to a new one.

use super::socket::{self, ControlListener};
use super::{FromIncumbent, PROTOCOL, STEP_TIMEOUT, TAKEOVER_TIMEOUT, ToIncumbent, frame, store_identity};
use crate::clock::Stopwatch;
use crate::config::Config;
use crate::ledger::{Accounts, LeftAccount, NamedAccount, SuccessorLine, ToSuccessor};
use crate::provider_limits::LeftLimits;
use crate::server::{self, RunState};
use crate::store::WriterControl;
use anyhow::Context as _;
use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, spawn_blocking};

/// The pause after an error of `accept`.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long the store may take for its last commit.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(1);

/// A running gateway, with the sockets, the store and the accounts that it hands over.
pub(crate) struct Incumbent {
    control: ControlListener,
    listeners: Vec<TcpListener>,
    /// Whether the service manager has passed the listeners for callers.
    is_passed: bool,
    admin: TcpListener,
    admin_address: SocketAddr,
    lock: Option<File>,
    store: String,
    accounts: Arc<Accounts>,
    leave_limits: LeaveLimits,
    /// The store's thread. `None`: there is no store, and counters do not survive a restart.
    writer: Option<Arc<WriterControl>>,
}

/// Returns what this process has learned of the providers' limits.
type LeaveLimits = Box<dyn Fn() -> Vec<LeftLimits> + Send + Sync>;

/// The `SuccessorLine`, the messages to send on it, and how long requests had to wait.
type Handed = (Arc<SuccessorLine>, mpsc::UnboundedReceiver<ToSuccessor>, Duration);

/// The result of a successful hand-over.
#[derive(Debug)]
pub(crate) struct HandoverOutcome {
    pub(crate) stream: UnixStream,
    pub(crate) line: Arc<SuccessorLine>,
    pub(crate) messages: mpsc::UnboundedReceiver<ToSuccessor>,
    /// The new process's id.
    pub(crate) pid: i32,
    /// How long requests had to wait.
    pub(crate) pause: Duration,
}

impl Incumbent {
    /// Prepares a hand-over. `listeners`: those for callers, and whether the service manager has passed them. `store`: the
    /// lock of the store, and its thread.
    ///
    /// # Errors
    /// A listener cannot be duplicated: the process has too many open files.
    pub(crate) fn new(
        control: ControlListener,
        config: &Config,
        (listeners, is_passed): (&[TcpListener], bool),
        admin: (&TcpListener, SocketAddr),
        (accounts, leave_limits): (Arc<Accounts>, LeaveLimits),
        store: Option<(File, Arc<WriterControl>)>,
    ) -> io::Result<Self> {
        let (lock, writer) = store.unzip();
        Ok(Self {
            control,
            listeners: listeners.iter().map(TcpListener::try_clone).collect::<io::Result<_>>()?,
            is_passed,
            admin: admin.0.try_clone()?,
            admin_address: admin.1,
            lock,
            store: store_identity(config),
            accounts,
            leave_limits,
            writer,
        })
    }

    /// Waits for a new process and hands over to it. `None`: the gateway closes, and no process has taken over before.
    ///
    /// # Errors
    /// The control socket fails.
    pub(crate) async fn run(
        self,
        mut run_state: watch::Receiver<RunState>,
    ) -> io::Result<Option<HandoverOutcome>> {
        let this = Arc::new(self);
        let control = this.control.0.try_clone()?;
        control.set_nonblocking(true)?;
        let control = UnixListener::from_std(control)?;
        let mut current: Option<JoinHandle<Option<HandoverOutcome>>> = None;
        loop {
            let done = async {
                match &mut current {
                    Some(handover) => handover.await.ok().flatten(),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = server::closing(&mut run_state) => return match current {
                    // It may have let go of its counters already.
                    Some(handover) => Ok(handover.await.ok().flatten()),
                    None => Ok(None),
                },
                outcome = done => match outcome {
                    Some(outcome) => return Ok(Some(outcome)),
                    None => current = None,
                },
                accepted = control.accept() => match accepted.and_then(|(stream, _)| stream.into_std()) {
                    Ok(stream) if current.is_none() => {
                        let this = this.clone();
                        current = Some(spawn_blocking(move || this.hand_over(stream)));
                    }
                    // `refuse` reads the first message of the new process before it replies.
                    Ok(stream) => drop(spawn_blocking(move || refuse(&stream, "another process is replacing it now"))),
                    Err(error) => {
                        tracing::warn!(%error, "the connection of a new process could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    /// Hands over to the process at the other end. `None`: this process continues.
    fn hand_over(&self, stream: UnixStream) -> Option<HandoverOutcome> {
        let peer = socket::peer(&stream).inspect_err(|error| {
            tracing::warn!(%error, "a process that tried to replace this one was refused");
        });
        let pid = peer.ok()?.pid;
        match self.try_hand_over(&stream) {
            Ok((line, messages, pause)) => Some(HandoverOutcome { stream, line, messages, pid, pause }),
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    pid,
                    "a new process did not replace this one, which continues"
                );
                None
            }
        }
    }

    fn try_hand_over(&self, stream: &UnixStream) -> anyhow::Result<Handed> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(STEP_TIMEOUT))?;
        stream.set_write_timeout(Some(STEP_TIMEOUT))?;
        let ToIncumbent::Hello { protocol, store, admin } = frame::read(stream)? else {
            anyhow::bail!("its first message is wrong");
        };
        if let Some(reason) = self.objection(protocol, &store) {
            frame::write(stream, &FromIncumbent::Refused { reason: reason.to_owned() })?;
            anyhow::bail!(reason);
        }
        self.send_files(stream, admin == self.admin_address).context("the sockets could not be sent")?;
        let ToIncumbent::Begin = frame::read(stream).context("it did not request the counters")? else {
            anyhow::bail!("its second message is wrong");
        };
        let handed = self.hand_counters_over(stream);
        if handed.is_err() {
            self.writer.iter().for_each(|writer| writer.resume());
            // A request uses the counters of its upstream only while those of its environment are here.
            let accounts = in_order_of_leaving(&self.accounts);
            accounts.iter().rev().for_each(|(_, account)| account.stay());
        }
        handed
    }

    fn objection(&self, protocol: u32, store: &str) -> Option<&'static str> {
        if protocol != PROTOCOL {
            return Some("the versions of the two processes cannot hand over to each other");
        }
        (store != self.store)
            .then_some("the two processes use different stores (store.path, store.memory or store.redis)")
    }

    fn send_files(&self, stream: &UnixStream, has_admin: bool) -> io::Result<()> {
        let (listeners, has_lock, is_passed) = (self.listeners.len(), self.lock.is_some(), self.is_passed);
        frame::write(stream, &FromIncumbent::Welcome { listeners, has_admin, has_lock, is_passed })?;
        self.listeners.iter().try_for_each(|listener| socket::send_file(stream, listener))?;
        if has_admin {
            socket::send_file(stream, &self.admin)?;
        }
        socket::send_file(stream, &self.control.0)?;
        self.lock.iter().try_for_each(|lock| socket::send_file(stream, lock))
    }

    /// Stops the accounts, sends them, and waits until the new process is ready. After an error the caller calls
    /// `Account::stay`.
    fn hand_counters_over(&self, stream: &UnixStream) -> anyhow::Result<Handed> {
        stream.set_read_timeout(Some(TAKEOVER_TIMEOUT))?;
        let clock = Stopwatch::start();
        let accounts = in_order_of_leaving(&self.accounts);
        if let Some(writer) = &self.writer {
            let left: Vec<LeftAccount> = accounts.iter().map(|(_, account)| account.leave()).collect();
            // The last commit contains all changes up to here.
            if let Err(error) = writer.pause(COMMIT_TIMEOUT) {
                frame::write(stream, &FromIncumbent::Refused { reason: error.to_string() })?;
                return Err(error);
            }
            for ((environment, _), left) in accounts.iter().zip(left) {
                frame::write(stream, &FromIncumbent::Account { environment: environment.to_string(), left })?;
            }
        }
        frame::write(stream, &FromIncumbent::ProviderLimits((self.leave_limits)()))?;
        frame::write(stream, &FromIncumbent::Accounts)?;
        let ToIncumbent::Ready = frame::read(stream).context("it did not become ready")? else {
            anyhow::bail!("its third message is wrong");
        };
        frame::write(stream, &FromIncumbent::Go)?;
        let (line, messages) = SuccessorLine::new();
        if let Some(writer) = &self.writer {
            accounts.iter().for_each(|(environment, account)| account.move_to(&line, environment));
            writer.move_to(&line);
        }
        Ok((line, messages, clock.elapsed()))
    }
}

fn refuse(stream: &UnixStream, reason: &str) {
    let refused = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(STEP_TIMEOUT)))
        .and_then(|()| frame::read::<ToIncumbent>(stream))
        .and_then(|_| frame::write(stream, &FromIncumbent::Refused { reason: reason.to_owned() }));
    drop(refused);
}

/// All accounts, those of upstreams last: the requests that use them leave with their environments, so before them.
fn in_order_of_leaving(accounts: &Accounts) -> Vec<NamedAccount> {
    let mut all = accounts.all().to_vec();
    all.sort_by_key(|(_, account)| account.upstream().is_some());
    all
}
