//! Threads that each run one server or task on their own runtime.

use crate::server::RunState;
use crate::service_manager::EventLoop;
use std::io;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::time::sleep;

/// Size of each runtime's blocking pool, which counts large prompts and resolves host names.
const MAX_BLOCKING_THREADS: usize = 8;
/// The longest time without a timer of an event loop. Shorter than the timeouts that a request sets.
const TICK: Duration = Duration::from_secs(2);
/// How long a thread waits for tasks of its blocking pool when it ends.
const MAX_BLOCKING_WAIT: Duration = Duration::from_secs(5);

/// A thread that runs one server or task on its own runtime.
pub(super) struct ServerThread {
    run_state: watch::Sender<RunState>,
    pub(super) event_loop: EventLoop,
    handle: Option<JoinHandle<usize>>,
}

impl ServerThread {
    pub(super) fn spawn<F>(
        thread: &'static str,
        runtime: Runtime,
        serve: impl FnOnce(watch::Receiver<RunState>) -> F + Send + 'static,
    ) -> anyhow::Result<Self>
    where
        F: Future<Output = io::Result<usize>>,
    {
        Self::spawn_with(thread, runtime, watch::Sender::new(RunState::Waiting), serve)
    }

    /// Threads with the same `run_state` change their state together.
    pub(super) fn spawn_with<F>(
        thread: &'static str,
        runtime: Runtime,
        run_state: watch::Sender<RunState>,
        serve: impl FnOnce(watch::Receiver<RunState>) -> F + Send + 'static,
    ) -> anyhow::Result<Self>
    where
        F: Future<Output = io::Result<usize>>,
    {
        let receiver = run_state.subscribe();
        let event_loop = EventLoop { thread, runtime: runtime.handle().clone() };
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
        Ok(Self { run_state, event_loop, handle: Some(handle) })
    }

    /// Changes the state of the server.
    pub(super) fn set(&self, state: RunState) {
        // An error means that the thread has ended already.
        let _ = self.run_state.send(state);
    }

    pub(super) fn has_ended(&self) -> bool {
        self.handle.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until the thread ends. Returns the number of connections that it cut off.
    pub(super) fn join(&mut self) -> usize {
        self.handle.take().and_then(|handle| handle.join().ok()).unwrap_or(0)
    }
}

pub(super) fn single_thread_runtime() -> io::Result<Runtime> {
    let runtime =
        Builder::new_current_thread().enable_all().max_blocking_threads(MAX_BLOCKING_THREADS).build()?;
    // If a request sets a timer that is earlier than all others, tokio wakes its own event loop by a system call. With
    // few connections that happened after every answer. This timer is always earlier.
    runtime.spawn(async {
        loop {
            sleep(TICK).await;
        }
    });
    Ok(runtime)
}

pub(super) fn multi_thread_runtime(cores: usize) -> io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(cores)
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build()
}
