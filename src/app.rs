//! The composition root: builds every part from a config, starts them, and stops them in order.

use crate::admin;
use crate::clock::Stopwatch;
use crate::config::Config;
use crate::estimate;
use crate::ledger::Account;
use crate::proxy::{Proxy, State};
use crate::server::{self, Order, Peer};
use crate::store::{Store, Writer};
use crate::upstream;
use anyhow::Context as _;
use hyper::service::service_fn;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZero;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use crate::server::Patience;

/// Threads for what must not hold up others: counting large prompts, looking up host names.
const BLOCKING_THREADS: usize = 8;
/// For so long a start waits for Redis.
const LONGEST_START: Duration = Duration::from_secs(1);
/// What the admin listener may take to end its answers.
const ADMIN_DRAIN: Duration = Duration::from_secs(1);

/// How requests are spread over the machine's cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Workers {
    /// One event loop a core, each with its own listening socket and upstream connections. Measured
    /// to cost less CPU per request than the other.
    #[default]
    PerCore,
    /// One work-stealing runtime over all cores.
    WorkStealing,
}

/// A running gateway. Dropping it stops it at once: what is under way is cut off, and settled.
pub struct App {
    address: SocketAddr,
    admin_address: SocketAddr,
    state: Arc<State>,
    workers: Vec<Thread>,
    admin: Thread,
    /// Speaks to Redis, where counters are state.
    cluster: Option<Thread>,
    drain_timeout: Duration,
    /// Dropped last: it writes what the others have settled.
    store: Option<Writer>,
}

/// A server on threads of its own.
struct Thread {
    orders: watch::Sender<Order>,
    handle: Option<JoinHandle<usize>>,
}

/// How a shutdown went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownReport {
    /// Requests that were under way when it began.
    pub under_way: u64,
    /// Connections that had to be cut off because the time was over.
    pub cut_off: usize,
    /// How long it took.
    pub took: Duration,
}

impl App {
    /// Starts a gateway, one worker for each core.
    ///
    /// # Errors
    /// An address cannot be listened at, or a thread or socket cannot be made.
    pub fn start(config: Config) -> anyhow::Result<Self> {
        Self::start_with(config, Workers::default())
    }

    /// Starts a gateway.
    ///
    /// # Errors
    /// An address cannot be listened at, or a thread or socket cannot be made.
    pub fn start_with(config: Config, workers: Workers) -> anyhow::Result<Self> {
        Self::start_waiting(config, workers, Patience::default())
    }

    /// Starts a gateway that waits so long for its callers.
    ///
    /// # Errors
    /// An address cannot be listened at, or a thread or socket cannot be made.
    pub fn start_waiting(config: Config, workers: Workers, patience: Patience) -> anyhow::Result<Self> {
        let warm = thread::spawn(estimate::warm);
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let config = Arc::new(config);
        let (listen, admin_listen) = (config.server.listen, config.admin.listen);
        let sockets = if workers == Workers::PerCore { cores } else { 1 };
        let at = |address: SocketAddr, setting: &str| format!("cannot listen at {address} ({setting})");
        let listeners = server::listen(listen, sockets).with_context(|| at(listen, "server.listen"))?;
        let address = first_address(&listeners)?;
        let admin_listeners =
            server::listen(admin_listen, 1).with_context(|| at(admin_listen, "admin.listen"))?;
        let admin_address = first_address(&admin_listeners)?;

        let drain_timeout = config.server.drain_timeout;
        let tls = upstream::client_config()?;
        let store = if config.store.memory { None } else { Some(Store::open(&config.store)?) };
        let state = Arc::new(State::new(config, store.as_ref())?);
        let store =
            store.map(|store| store.start(state.environments(), state.calibrations().clone())).transpose()?;
        // The vocabularies are loaded off the request path, and nobody is served before they are.
        if warm.join().is_err() {
            anyhow::bail!("the tokenizers' vocabularies cannot be loaded");
        }
        let cluster = if state.config.store.redis.is_some() { Some(take_part(&state)?) } else { None };
        let mut threads = Vec::new();
        for listener in listeners {
            let proxy = Arc::new(Proxy::new(state.clone(), &tls)?);
            let runtime = if workers == Workers::PerCore { one_core()? } else { all_cores(cores)? };
            threads.push(Thread::spawn("worker", runtime, move |orders| {
                let service_for = move |peer: Arc<Peer>| {
                    let proxy = proxy.clone();
                    service_fn(move |request| {
                        let (proxy, peer) = (proxy.clone(), peer.clone());
                        async move { Ok::<_, Infallible>(proxy.serve(request, &peer).await) }
                    })
                };
                server::serve(listener, service_for, patience, orders)
            })?);
        }
        let router = admin::service(state.clone(), admin_address);
        let mut admin_listeners = admin_listeners;
        let admin_listener = admin_listeners.pop().context("no admin socket")?;
        let admin = Thread::spawn("admin", one_core()?, move |orders| {
            server::serve(admin_listener, move |_| router.clone(), patience, orders)
        })?;
        Ok(Self { address, admin_address, state, workers: threads, admin, cluster, drain_timeout, store })
    }

    /// Where callers are served.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where health, metrics and the admin API are.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// Stops in order: accepts nothing more, lets answers end within `server.drain_timeout`, cuts off
    /// the others, and settles everything. Blocks until that is done.
    pub fn shutdown(mut self) -> ShutdownReport {
        let clock = Stopwatch::start();
        let under_way = self.state.in_flight();
        self.state.drain();
        for worker in &self.workers {
            worker.order(self.drain_timeout);
        }
        let cut_off = self.workers.iter_mut().map(Thread::join).sum();
        self.admin.order(ADMIN_DRAIN);
        self.admin.join();
        self.leave_cluster();
        drop(self.store.take());
        ShutdownReport { under_way, cut_off, took: clock.elapsed() }
    }
}

impl App {
    /// Everything has been settled: the last of it is told to Redis.
    fn leave_cluster(&mut self) {
        if let Some(mut cluster) = self.cluster.take() {
            cluster.order(Duration::ZERO);
            cluster.join();
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        for thread in self.workers.iter_mut().chain([&mut self.admin]) {
            thread.order(Duration::ZERO);
        }
        for thread in self.workers.iter_mut().chain([&mut self.admin]) {
            thread.join();
        }
        self.leave_cluster();
    }
}

/// Joins the cluster. Returns when every environment has, or when Redis lets it wait: nobody is to be admitted by
/// counters of this node's own just because it was faster than its first connection.
fn take_part(state: &State) -> anyhow::Result<Thread> {
    let accounts = state.accounts.clone();
    let thread = Thread::spawn("cluster", one_core()?, move |mut orders| async move {
        let (stop, stops) = watch::channel(false);
        let mut parts = JoinSet::new();
        for account in accounts {
            if let Some(connection) = account.connection() {
                tokio::spawn(connection.clone().run());
                parts.spawn(account.clone().take_part(stops.clone()));
            }
        }
        // An error says that nobody is left to give orders.
        drop(orders.wait_for(|order| *order != Order::Run).await);
        stop.send_replace(true);
        parts.join_all().await;
        Ok(0)
    })?;
    let clock = Stopwatch::start();
    let is_missing =
        |account: &Arc<Account>| account.sharing().is_some_and(|sharing| sharing.trouble.is_some());
    while clock.elapsed() < LONGEST_START && state.accounts.iter().any(is_missing) {
        thread::sleep(Duration::from_millis(5));
    }
    Ok(thread)
}

impl Thread {
    fn spawn<F>(
        name: &str,
        runtime: Runtime,
        serve: impl FnOnce(watch::Receiver<Order>) -> F + Send + 'static,
    ) -> anyhow::Result<Self>
    where
        F: Future<Output = io::Result<usize>>,
    {
        let (orders, receiver) = watch::channel(Order::Run);
        let run = move || {
            let cut_off = runtime.block_on(serve(receiver)).unwrap_or_else(|error| {
                tracing::error!(%error, "a listener has failed");
                0
            });
            // Drops what is left of tasks, which settles it, and waits for counts that have begun.
            runtime.shutdown_timeout(Duration::from_secs(5));
            cut_off
        };
        let handle = thread::Builder::new().name(name.into()).spawn(run)?;
        Ok(Self { orders, handle: Some(handle) })
    }

    fn order(&self, drain: Duration) {
        // Nobody listens any more if it has stopped already.
        let _ = self.orders.send(Order::Drain(drain));
    }

    fn join(&mut self) -> usize {
        self.handle.take().and_then(|handle| handle.join().ok()).unwrap_or(0)
    }
}

fn first_address(listeners: &[TcpListener]) -> anyhow::Result<SocketAddr> {
    Ok(listeners.first().context("no socket")?.local_addr()?)
}

fn one_core() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().max_blocking_threads(BLOCKING_THREADS).build()
}

fn all_cores(cores: usize) -> io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(cores)
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
}
