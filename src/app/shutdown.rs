//! Ends a gateway in order: at a stop, or after another process has replaced it.

use super::App;
use super::server_thread::ServerThread;
use crate::clock::Stopwatch;
use crate::server::{DrainRules, RunState};
use std::thread;
use std::time::Duration;

/// How the admin listener drains at shutdown, after the listener for callers.
const ADMIN_DRAIN: DrainRules =
    DrainRules { answers: Duration::from_millis(100), endings: Duration::ZERO, empties_queue: false };
/// How long callers may take to read how their interrupted answers end, after `server.drain_timeout`.
const MAX_ENDING_TIME: Duration = Duration::from_secs(1);
/// Added to the longest shutdown that the config allows: for the last settlements and commits.
const SHUTDOWN_MARGIN: Duration = Duration::from_secs(10);
/// How long a process that stops waits for the process that it has replaced. The old process ends by itself, at the latest
/// after its own `server.drain_timeout`.
const MAX_PREDECESSOR_WAIT: Duration = Duration::from_hours(1);
/// Interval at which a replaced process checks whether its connections have ended.
const END_POLL_INTERVAL: Duration = Duration::from_millis(10);

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

impl App {
    /// The longest time that a shutdown takes.
    pub(crate) fn max_shutdown_time(&self) -> Duration {
        let server = &self.state.current().config.server;
        server.drain_delay + server.drain_timeout + MAX_ENDING_TIME + SHUTDOWN_MARGIN
    }

    /// Shuts down in order: it accepts connections and serves requests for `server.drain_delay`. Then it stops accepting
    /// connections, drains requests in flight for `server.drain_timeout`, ends the others with the error `shutting_down`, and
    /// settles all. It blocks until that is done.
    pub fn shutdown(mut self) -> ShutdownReport {
        // The other process is the gateway already.
        if self.replaced.borrow().is_some() {
            return self.finish_handover();
        }
        let clock = Stopwatch::start();
        self.stop_watchdog();
        self.state.begin_closing();
        let in_flight = self.state.in_flight();
        let config = self.state.current().config.clone();
        if !config.server.drain_delay.is_zero() {
            self.set_workers(RunState::Closing { accepts: true });
            thread::sleep(config.server.drain_delay);
        }
        if self.end_handovers() {
            return self.finish_handover();
        }
        self.reloads.set(RunState::Stopped);
        self.reloads.join();
        // Its handles of the listening sockets would keep them open.
        self.stop_handover();
        let cut_off = self.drain(config.server.drain_timeout, !self.has_passed_socket);
        self.wait_for_predecessor();
        self.admin.set(RunState::Draining(ADMIN_DRAIN));
        self.admin.join();
        self.stop_last_threads();
        ShutdownReport { in_flight, cut_off, took: clock.elapsed() }
    }

    /// Serves the open connections to their end, at most for `server.drain_timeout`, after another process has replaced this
    /// one. Each connection closes after its next answer. It blocks until that is done.
    pub fn finish_handover(mut self) -> ShutdownReport {
        let clock = Stopwatch::start();
        self.stop_watchdog();
        let in_flight = self.state.in_flight();
        self.state.begin_closing();
        self.reloads.set(RunState::Stopped);
        self.health_checks.set(RunState::Stopped);
        self.admin.set(RunState::Draining(ADMIN_DRAIN));
        self.set_workers(RunState::Closing { accepts: false });
        self.reloads.join();
        self.admin.join();
        let drain_timeout = self.state.current().config.server.drain_timeout;
        let is_serving = |app: &Self| app.workers.iter().any(|thread| !thread.has_ended());
        while clock.elapsed() < drain_timeout && is_serving(&self) {
            thread::sleep(END_POLL_INTERVAL);
        }
        // The other process accepts the connections that wait.
        let cut_off = self.drain(Duration::ZERO, false);
        self.wait_for_predecessor();
        self.stop_last_threads();
        ShutdownReport { in_flight, cut_off, took: clock.elapsed() }
    }

    /// Ends the watchdog. A process that drains or was replaced sends no notifications.
    fn stop_watchdog(&mut self) {
        if let Some(mut watchdog) = self.watchdog.take() {
            watchdog.set(RunState::Stopped);
            watchdog.join();
        }
    }

    /// Drains the workers. Returns the number of connections that they cut off.
    fn drain(&mut self, drain_timeout: Duration, empties_queue: bool) -> usize {
        self.state.drain(drain_timeout);
        self.health_checks.set(RunState::Stopped);
        let rules = DrainRules { answers: drain_timeout, endings: MAX_ENDING_TIME, empties_queue };
        self.set_workers(RunState::Draining(rules));
        self.workers.iter_mut().map(ServerThread::join).sum()
    }

    /// Ends the threads that carry the last settlements, and the store.
    fn stop_last_threads(&mut self) {
        self.health_checks.set(RunState::Stopped);
        self.health_checks.join();
        if let Some(tracing) = &self.state.current().tracing {
            tracing.shut_down();
        }
        self.stop_redis_thread();
        if let Some(thread) = &mut self.predecessor {
            thread.set(RunState::Stopped);
            thread.join();
        }
        // The store's thread sends its last usage to a process that has replaced this one.
        drop(self.store.take());
        self.stop_handover();
    }

    /// Lets no other process replace this one from now on. Returns whether one has replaced it before.
    fn end_handovers(&self) -> bool {
        if let Some(thread) = &self.successor {
            thread.set(RunState::Closing { accepts: false });
            while !thread.has_ended() && self.replaced.borrow().is_none() {
                thread::sleep(END_POLL_INTERVAL);
            }
        }
        self.replaced.borrow().is_some()
    }

    /// Waits until the process that this one has replaced has ended. Until then the old process charges its requests here.
    fn wait_for_predecessor(&self) {
        let clock = Stopwatch::start();
        let Some(thread) = self.predecessor.as_ref().filter(|thread| !thread.has_ended()) else { return };
        tracing::info!("waiting until the old process has ended, because its requests are charged here");
        while !thread.has_ended() && clock.elapsed() < MAX_PREDECESSOR_WAIT {
            thread::sleep(END_POLL_INTERVAL);
        }
    }

    fn stop_handover(&mut self) {
        if let Some(thread) = &mut self.successor {
            thread.set(RunState::Stopped);
            thread.join();
        }
    }

    /// Ends the thread that communicates with Redis. All reservations are settled by now, so it sends the last of them.
    fn stop_redis_thread(&mut self) {
        if let Some(mut redis) = self.redis.take() {
            redis.set(RunState::Stopped);
            redis.join();
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.stop_watchdog();
        self.set_workers(RunState::Stopped);
        self.admin.set(RunState::Stopped);
        self.reloads.set(RunState::Stopped);
        for thread in self.workers.iter_mut().chain([&mut self.admin, &mut self.reloads]) {
            thread.join();
        }
        self.stop_last_threads();
    }
}
