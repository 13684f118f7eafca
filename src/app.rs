//! The composition root: builds all parts from a config, starts them, and stops them in order.

mod banner;
mod file_watch;
mod health_checks;
mod listeners;
mod reloader;
mod server_thread;
mod shutdown;
mod sockets;

use crate::admin;
use crate::clock::Stopwatch;
use crate::config::Config;
use crate::estimate::{self, Models};
use crate::ledger::{Account, NamedAccount};
use crate::proxy::{State, WorkerProxy};
use crate::reload::ReloadHandle;
use crate::server::{self, Listener, Peer, RunState};
use crate::service_manager::{self, EventLoop, PassedListeners};
use crate::store::{Store, StoreWriter};
use crate::takeover::{self, Claim, Claimed, ControlListener, HandoverOutcome, Incumbent};
use crate::upstream;
use hyper::service::service_fn;
use listeners::Listeners;
use reloader::Reloader;
use server_thread::{ServerThread, multi_thread_runtime, single_thread_runtime};
use sockets::Sockets;
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZero;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::rustls::ClientConfig;

pub use crate::server::CallerTimeouts;
pub(crate) use listeners::load_certificate;
pub use shutdown::ShutdownReport;

/// How long the start waits until Redis is connected.
const MAX_REDIS_WAIT: Duration = Duration::from_secs(1);
/// How requests are distributed over the cores of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Workers {
    /// One event loop per core, each with its own listening socket and its own upstream connections. It uses less CPU
    /// per request than the other mode (measured).
    #[default]
    PerCore,
    /// One work-stealing runtime for all cores.
    WorkStealing,
}

/// A running gateway. Dropping it stops it at once: requests in flight are cut off and settled.
pub struct App {
    address: SocketAddr,
    /// Whether the service manager keeps the socket for callers open. It has passed the socket to this process.
    has_passed_socket: bool,
    admin_address: SocketAddr,
    state: Arc<State>,
    workers: Vec<ServerThread>,
    admin: ServerThread,
    reload: ReloadHandle,
    /// Reloads the config.
    reloads: ServerThread,
    /// Checks whether replicas of upstreams are healthy.
    health_checks: ServerThread,
    /// Communicates with Redis. `None` without `store.redis`.
    redis: Option<ServerThread>,
    /// Serves the process that this one has replaced, until that has ended.
    predecessor: Option<ServerThread>,
    /// Hands over to a process that replaces this one.
    successor: Option<ServerThread>,
    /// Notifies the service manager that the event loops run. `None`: it expects no such notification.
    watchdog: Option<ServerThread>,
    /// The id of the process that has replaced this one.
    replaced: watch::Sender<Option<i32>>,
    /// Dropped last, so that it also writes the settlements of the other threads.
    store: Option<StoreWriter>,
}

/// The parts from which the threads of a gateway start.
struct Parts {
    state: Arc<State>,
    tls: Arc<ClientConfig>,
    workers: Workers,
    cores: usize,
    listeners: Listeners,
}

impl App {
    /// Starts a gateway with one worker per core and the default timeouts.
    ///
    /// # Errors
    /// An address cannot be used, or a thread or socket cannot be created.
    pub fn start(config: Config) -> anyhow::Result<Self> {
        Self::start_with(config, Workers::default(), CallerTimeouts::default())
    }

    /// Starts a gateway with these workers and these timeouts for callers.
    ///
    /// # Errors
    /// An address cannot be used, or a thread or socket cannot be created.
    pub fn start_with(config: Config, workers: Workers, timeouts: CallerTimeouts) -> anyhow::Result<Self> {
        Self::start_as(config, PassedListeners::default(), workers, timeouts, false)
    }

    /// Like `start_with`, but replaces a gateway that runs at the same address with the same store. Another process can
    /// replace this one in the same way. `passed`: sockets to use instead of new ones, if no gateway is replaced.
    ///
    /// # Errors
    /// As for `start_with`, or the running gateway cannot be replaced. It continues then.
    pub(crate) fn start_or_take_over(
        config: Config,
        passed: PassedListeners,
        workers: Workers,
        timeouts: CallerTimeouts,
    ) -> anyhow::Result<Self> {
        Self::start_as(config, passed, workers, timeouts, true)
    }

    fn start_as(
        config: Config,
        passed: PassedListeners,
        workers: Workers,
        timeouts: CallerTimeouts,
        takes_over: bool,
    ) -> anyhow::Result<Self> {
        // All slow steps run before the hand-over. Requests are served only after the vocabularies are loaded, so that
        // none has to wait for them.
        let vocabularies = thread::spawn(estimate::warm);
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let config = Arc::new(config);
        let claim = || if takes_over { Claim::find(&config) } else { Ok(None) };
        let tls = upstream::client_config()?;
        let models = Models::load(&config.models).map_err(anyhow::Error::msg)?;
        if vocabularies.join().is_err() {
            anyhow::bail!("the tokenizers' vocabularies cannot be loaded");
        }
        let mut claim = claim()?;
        let sockets = if workers == Workers::PerCore { cores } else { 1 };
        let sockets = Sockets::open(&config, sockets, claim.as_mut(), passed)?;
        let store = open_store(&config, claim.as_mut())?;
        let state = Arc::new(State::new(config, models, store.as_ref())?);
        if let Some(claim) = &mut claim {
            state.take_over_provider_limits(std::mem::take(&mut claim.limits));
        }
        let listeners = Listeners::open(&state.current().config, timeouts, &state.metrics)?;
        let parts = Parts { state, tls, workers, cores, listeners };
        let mut app = parts.start(&sockets)?;
        let claimed = claim.map(|claim| claim.finish(sockets.workers.len())).transpose()?;
        // This process is the gateway from here on.
        app.begin(store, &sockets, claimed, takes_over)?;
        Ok(app)
    }

    /// Begins to serve.
    fn begin(
        &mut self,
        store: Option<Store>,
        sockets: &Sockets,
        claimed: Option<Claimed>,
        may_be_replaced: bool,
    ) -> anyhow::Result<()> {
        let lock = store
            .as_ref()
            .map(|store| anyhow::Ok((store.lock_handle()?, store.persistence())))
            .transpose()?;
        self.store = store
            .map(|store| store.start(self.state.accounts().clone(), self.state.calibrations().clone()))
            .transpose()?;
        self.set_workers(RunState::Running);
        self.admin.set(RunState::Running);
        let control = match claimed {
            Some(Claimed { control, predecessor, pid }) => {
                tracing::info!(pid, "replaced a running gateway, which serves its last connections");
                let accounts = self.state.accounts().clone();
                self.predecessor = Some(ServerThread::spawn(
                    "predecessor",
                    single_thread_runtime()?,
                    move |run_state| async move {
                        takeover::serve_predecessor(predecessor, accounts, run_state).await.map(|()| 0)
                    },
                )?);
                Some(control)
            }
            None if may_be_replaced => bind_control(self.state.current().config.server.listen),
            None => None,
        };
        if let Some(control) = control {
            let state = self.state.clone();
            let leave_limits = Box::new(move || state.left_provider_limits());
            let incumbent = Incumbent::new(
                control,
                &self.state.current().config,
                (&sockets.workers, sockets.is_passed),
                (&sockets.admin, sockets.admin_address),
                (self.state.accounts().clone(), leave_limits),
                lock,
            )?;
            self.successor = Some(start_handover(incumbent, self.replaced.clone())?);
        }
        Ok(())
    }

    /// Starts the watchdog, if the service manager expects notifications.
    ///
    /// # Errors
    /// The thread cannot be created.
    pub(crate) fn start_watchdog(&mut self) -> anyhow::Result<()> {
        let Some(timeout) = service_manager::watchdog_timeout() else { return Ok(()) };
        // A thread that may take long by design, such as that of the store, is not watched.
        let threads = self.workers.iter().chain([&self.admin]).chain(&self.redis);
        let event_loops: Vec<EventLoop> = threads.map(|thread| thread.event_loop.clone()).collect();
        self.watchdog =
            Some(ServerThread::spawn("watchdog", single_thread_runtime()?, move |run_state| async move {
                service_manager::run_watchdog(timeout, event_loops, run_state).await;
                Ok(0)
            })?);
        Ok(())
    }

    /// Returns when another process has replaced this one, with its id. Then call [`App::finish_handover`].
    pub(crate) fn replaced(&self) -> impl Future<Output = i32> + Send + use<> {
        let mut replaced = self.replaced.subscribe();
        async move {
            match replaced.wait_for(Option::is_some).await.map(|pid| *pid) {
                Ok(Some(pid)) => pid,
                _ => std::future::pending().await,
            }
        }
    }

    /// Requests reloads of the config.
    pub(crate) fn reload_handle(&self) -> ReloadHandle {
        self.reload.clone()
    }

    /// The address of the listener for callers.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address of the listener for health checks, metrics and the admin API.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// Changes the state of all workers, which share it. With a state of its own, a worker could accept a connection after
    /// another worker had begun to drain.
    fn set_workers(&self, state: RunState) {
        if let Some(worker) = self.workers.first() {
            worker.set(state);
        }
    }
}

impl Parts {
    /// Starts all threads. The listeners wait: they accept no connection yet.
    fn start(self, sockets: &Sockets) -> anyhow::Result<App> {
        let Self { state, tls, workers, cores, listeners } = self;
        let (redis, new_accounts) = if state.current().config.store.redis.is_some() {
            let (sender, receiver) = mpsc::unbounded_channel();
            (Some(start_redis_thread(&state, receiver)?), Some(sender))
        } else {
            (None, None)
        };
        let health_checks = health_checks::start(state.clone(), tls.clone())?;
        let (mut threads, mut proxies) = (Vec::new(), Vec::new());
        let run_state = watch::Sender::new(RunState::Waiting);
        for listener in &sockets.workers {
            let proxy = Arc::new(WorkerProxy::new(state.clone(), &tls)?);
            let runtime = if workers == Workers::PerCore {
                single_thread_runtime()?
            } else {
                multi_thread_runtime(cores)?
            };
            threads.push(start_worker(
                listener.try_clone()?,
                listeners.callers.clone(),
                proxy.clone(),
                runtime,
                run_state.clone(),
            )?);
            proxies.push(proxy);
        }
        let (reload, requests) = ReloadHandle::new();
        let admin_shared = listeners.admin.clone();
        let reloader = Reloader {
            state: state.clone(),
            workers: proxies,
            listeners,
            tls,
            redis: new_accounts,
            handle: reload.clone(),
            refused_files: Vec::new(),
        };
        // Before the thread starts, so that no change is missed.
        let files = reloader.file_watch();
        let reloads = ServerThread::spawn("config", single_thread_runtime()?, move |run_state| async move {
            reloader.run(files, requests, run_state).await;
            Ok(0)
        })?;
        let &Sockets { address, is_passed, admin_address, .. } = sockets;
        let service_for = admin::service(state.clone(), reload.clone(), admin_address, address);
        let admin_listener = sockets.admin.try_clone()?;
        let admin = ServerThread::spawn("admin", single_thread_runtime()?, move |run_state| {
            server::serve(admin_listener, admin_shared, service_for, run_state)
        })?;
        Ok(App {
            address,
            has_passed_socket: is_passed,
            admin_address,
            state,
            workers: threads,
            admin,
            reload,
            reloads,
            health_checks,
            redis,
            predecessor: None,
            successor: None,
            watchdog: None,
            replaced: watch::Sender::new(None),
            store: None,
        })
    }
}

/// Opens the store. If it is that of a replaced process, the requests of that process wait from then on.
fn open_store(config: &Config, claim: Option<&mut Claim>) -> anyhow::Result<Option<Store>> {
    let Some(claim) = claim else {
        return if config.store.memory { Ok(None) } else { Store::open(&config.store).map(Some) };
    };
    let left = claim.begin()?;
    let open = |lock| Store::take_over(&config.store, lock, left);
    claim.lock.take().map(open).transpose()
}

/// Listens at the control socket.
fn bind_control(address: SocketAddr) -> Option<ControlListener> {
    if address.port() == 0 {
        return None;
    }
    ControlListener::bind(address)
        .inspect_err(|error| {
            tracing::warn!(%error, "no process can replace this one without a gap: its control socket cannot be used");
        })
        .ok()
}

/// Starts the thread that hands over to a new process, and then carries messages to it.
fn start_handover(
    incumbent: Incumbent,
    replaced: watch::Sender<Option<i32>>,
) -> anyhow::Result<ServerThread> {
    ServerThread::spawn("handover", single_thread_runtime()?, move |run_state| async move {
        if let Some(outcome) = incumbent.run(run_state.clone()).await? {
            let HandoverOutcome { stream, line, messages, pid, pause } = outcome;
            let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            tracing::info!(pid, pause_ms, "another process has taken over");
            replaced.send_replace(Some(pid));
            takeover::run_line(stream, line, messages, run_state).await?;
        }
        Ok(0)
    })
}

/// `run_state`: the state of all workers.
fn start_worker(
    socket: TcpListener,
    listener: Arc<Listener>,
    proxy: Arc<WorkerProxy>,
    runtime: Runtime,
    run_state: watch::Sender<RunState>,
) -> anyhow::Result<ServerThread> {
    ServerThread::spawn_with("worker", runtime, run_state, move |run_state| {
        let service_for = move |peer: Arc<Peer>| {
            let proxy = proxy.clone();
            service_fn(move |request| {
                let (proxy, peer) = (proxy.current(), peer.clone());
                // The future of the request is created in its place. A captured one would be copied, which is 7 KiB.
                async move { Ok::<_, Infallible>(proxy.serve(request, peer).await) }
            })
        };
        server::serve(socket, listener, service_for, run_state)
    })
}

/// Starts the thread that shares the counters through Redis.
///
/// It returns when every environment is connected, at the latest after [`MAX_REDIS_WAIT`]. Without this wait the node
/// would admit its first requests by its own counters.
fn start_redis_thread(
    state: &State,
    mut added: mpsc::UnboundedReceiver<Arc<Account>>,
) -> anyhow::Result<ServerThread> {
    let accounts = state.accounts().all();
    let thread = ServerThread::spawn("redis", single_thread_runtime()?, move |mut run_state| async move {
        let (stop, stops) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let mut start = |account: &Arc<Account>| {
            if let Some(connection) = account.redis_connection() {
                tokio::spawn(connection.clone().run());
                tasks.spawn(account.clone().run_redis_sync(stops.clone()));
            }
        };
        accounts.iter().for_each(|(_, account)| start(account));
        loop {
            tokio::select! {
                // An error means that the sender was dropped, which also ends the thread.
                _ = run_state.wait_for(|state| *state == RunState::Stopped) => break,
                Some(account) = added.recv() => start(&account),
            }
        }
        stop.send_replace(true);
        tasks.join_all().await;
        Ok(0)
    })?;
    let clock = Stopwatch::start();
    let is_offline = |(_, account): &NamedAccount| {
        account.redis_status().is_some_and(|redis| redis.unavailable_reason.is_some())
    };
    while clock.elapsed() < MAX_REDIS_WAIT && state.accounts().all().iter().any(is_offline) {
        thread::sleep(Duration::from_millis(5));
    }
    Ok(thread)
}
