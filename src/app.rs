//! The composition root: builds all parts from a config, starts them, and stops them in order.

mod file_watch;
mod reloader;

use crate::admin;
use crate::clock::Stopwatch;
use crate::config::Config;
use crate::estimate;
use crate::ledger::{Account, NamedAccount};
use crate::proxy::{State, WorkerProxy};
use crate::reload::ReloadHandle;
use crate::server::{self, DrainTimes, Peer, RunState};
use crate::store::{Store, StoreWriter};
use crate::upstream;
use anyhow::Context as _;
use hyper::service::service_fn;
use reloader::Reloader;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZero;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub use crate::server::CallerTimeouts;

/// Size of each runtime's blocking pool, which counts large prompts and resolves host names.
const MAX_BLOCKING_THREADS: usize = 8;
/// How long the start waits until Redis is connected.
const MAX_REDIS_WAIT: Duration = Duration::from_secs(1);
/// How the admin listener drains at shutdown, after the listener for callers.
const ADMIN_DRAIN: DrainTimes = DrainTimes { answers: Duration::from_millis(100), endings: Duration::ZERO };
/// How long callers may take to read how their interrupted answers end, after `server.drain_timeout`.
const MAX_ENDING_TIME: Duration = Duration::from_secs(1);
/// How long a thread waits for tasks of its blocking pool when it ends.
const MAX_BLOCKING_WAIT: Duration = Duration::from_secs(5);

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
    admin_address: SocketAddr,
    state: Arc<State>,
    workers: Vec<ServerThread>,
    admin: ServerThread,
    reload: ReloadHandle,
    /// Reloads the config.
    reloads: ServerThread,
    /// Communicates with Redis. `None` without `store.redis`.
    redis: Option<ServerThread>,
    /// Dropped last, so that it also writes the settlements of the other threads.
    store: Option<StoreWriter>,
}

/// A thread that runs one server or task on its own runtime.
struct ServerThread {
    run_state: watch::Sender<RunState>,
    handle: Option<JoinHandle<usize>>,
}

/// The result of a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownReport {
    /// Number of requests in flight when the shutdown began.
    pub in_flight: u64,
    /// Number of connections whose requests had not ended after `server.drain_timeout`.
    pub cut_off: usize,
    /// How long the shutdown took.
    pub took: Duration,
}

/// The sockets of both listeners, with their addresses.
struct Sockets {
    /// One for each worker.
    workers: Vec<TcpListener>,
    address: SocketAddr,
    admin: TcpListener,
    admin_address: SocketAddr,
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
        let vocabularies = thread::spawn(estimate::warm);
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let config = Arc::new(config);
        let sockets = bind(&config, if workers == Workers::PerCore { cores } else { 1 })?;
        let Sockets { address, admin_address, .. } = sockets;

        let tls = upstream::client_config()?;
        let store = if config.store.memory { None } else { Some(Store::open(&config.store)?) };
        let state = Arc::new(State::new(config, store.as_ref())?);
        let store = store
            .map(|store| store.start(state.accounts().clone(), state.calibrations().clone()))
            .transpose()?;
        // Requests are served only after the vocabularies are loaded, so that none has to wait for them.
        if vocabularies.join().is_err() {
            anyhow::bail!("the tokenizers' vocabularies cannot be loaded");
        }
        let (redis, new_accounts) = if state.current().config.store.redis.is_some() {
            let (sender, receiver) = mpsc::unbounded_channel();
            (Some(start_redis_thread(&state, receiver)?), Some(sender))
        } else {
            (None, None)
        };
        let (mut threads, mut proxies) = (Vec::new(), Vec::new());
        for listener in sockets.workers {
            let proxy = Arc::new(WorkerProxy::new(state.clone(), &tls)?);
            let runtime = if workers == Workers::PerCore {
                single_thread_runtime()?
            } else {
                multi_thread_runtime(cores)?
            };
            threads.push(start_worker(listener, proxy.clone(), runtime, timeouts)?);
            proxies.push(proxy);
        }
        let (reload, requests) = ReloadHandle::new();
        let reloader = Reloader {
            state: state.clone(),
            workers: proxies,
            tls,
            redis: new_accounts,
            handle: reload.clone(),
        };
        let reloads = ServerThread::spawn("config", single_thread_runtime()?, move |run_state| async move {
            reloader.run(requests, run_state).await;
            Ok(0)
        })?;
        let service_for = admin::service(state.clone(), reload.clone(), admin_address, address);
        let admin = ServerThread::spawn("admin", single_thread_runtime()?, move |run_state| {
            server::serve(sockets.admin, service_for, timeouts, run_state)
        })?;
        Ok(Self { address, admin_address, state, workers: threads, admin, reload, reloads, redis, store })
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

    /// Shuts down in order: it stops accepting connections, drains requests in flight for `server.drain_timeout`, ends
    /// the others with the error `shutting_down`, and settles all. It blocks until that is done.
    pub fn shutdown(mut self) -> ShutdownReport {
        let clock = Stopwatch::start();
        let in_flight = self.state.in_flight();
        self.reloads.stop(RunState::Stopped);
        self.reloads.join();
        let drain_timeout = self.state.current().config.server.drain_timeout;
        self.state.drain(drain_timeout);
        for worker in &self.workers {
            let times = DrainTimes { answers: drain_timeout, endings: MAX_ENDING_TIME };
            worker.stop(RunState::Draining(times));
        }
        let cut_off = self.workers.iter_mut().map(ServerThread::join).sum();
        self.admin.stop(RunState::Draining(ADMIN_DRAIN));
        self.admin.join();
        self.stop_redis_thread();
        drop(self.store.take());
        ShutdownReport { in_flight, cut_off, took: clock.elapsed() }
    }

    /// Ends the thread that communicates with Redis. All reservations are settled by now, so it sends the last of them.
    fn stop_redis_thread(&mut self) {
        if let Some(mut redis) = self.redis.take() {
            redis.stop(RunState::Stopped);
            redis.join();
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        for thread in self.workers.iter_mut().chain([&mut self.admin, &mut self.reloads]) {
            thread.stop(RunState::Stopped);
        }
        for thread in self.workers.iter_mut().chain([&mut self.admin, &mut self.reloads]) {
            thread.join();
        }
        self.stop_redis_thread();
    }
}

/// Binds one socket for each worker and one for the admin listener.
fn bind(config: &Config, workers: usize) -> anyhow::Result<Sockets> {
    let listen = |address: SocketAddr, sockets: usize, setting: &str| {
        let listeners = server::listen(address, sockets).with_context(|| {
            format!("cannot listen at {address}; set {setting} to a free address of this machine")
        })?;
        let address = listeners.first().context("no socket")?.local_addr()?;
        anyhow::Ok((listeners, address))
    };
    let (workers, address) = listen(config.server.listen, workers, "server.listen")?;
    let (mut admin, admin_address) = listen(config.admin.listen, 1, "admin.listen")?;
    Ok(Sockets { workers, address, admin: admin.pop().context("no admin socket")?, admin_address })
}

fn start_worker(
    listener: TcpListener,
    proxy: Arc<WorkerProxy>,
    runtime: Runtime,
    timeouts: CallerTimeouts,
) -> anyhow::Result<ServerThread> {
    ServerThread::spawn("worker", runtime, move |run_state| {
        let service_for = move |peer: Arc<Peer>| {
            let proxy = proxy.clone();
            service_fn(move |request| {
                let (proxy, peer) = (proxy.current(), peer.clone());
                // The future of the request is created in its place. A captured one would be copied, which is 7 KiB.
                async move { Ok::<_, Infallible>(proxy.serve(request, peer).await) }
            })
        };
        server::serve(listener, service_for, timeouts, run_state)
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
                _ = run_state.wait_for(|state| *state != RunState::Running) => break,
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

impl ServerThread {
    fn spawn<F>(
        thread: &'static str,
        runtime: Runtime,
        serve: impl FnOnce(watch::Receiver<RunState>) -> F + Send + 'static,
    ) -> anyhow::Result<Self>
    where
        F: Future<Output = io::Result<usize>>,
    {
        let (run_state, receiver) = watch::channel(RunState::Running);
        let run = move || {
            let cut_off = runtime.block_on(serve(receiver)).unwrap_or_else(|error| {
                tracing::error!(%error, thread, "a listener failed and no longer serves requests: restart the gateway");
                0
            });
            // This drops the remaining tasks, which settles their reservations, and waits for the blocking pool.
            runtime.shutdown_timeout(MAX_BLOCKING_WAIT);
            cut_off
        };
        let handle = thread::Builder::new().name(thread.into()).spawn(run)?;
        Ok(Self { run_state, handle: Some(handle) })
    }

    /// Makes the server drain or stop.
    fn stop(&self, state: RunState) {
        // An error means that the thread has ended already.
        let _ = self.run_state.send(state);
    }

    /// Waits until the thread ends. Returns the number of connections that it cut off.
    fn join(&mut self) -> usize {
        self.handle.take().and_then(|handle| handle.join().ok()).unwrap_or(0)
    }
}

fn single_thread_runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().max_blocking_threads(MAX_BLOCKING_THREADS).build()
}

fn multi_thread_runtime(cores: usize) -> io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(cores)
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build()
}
