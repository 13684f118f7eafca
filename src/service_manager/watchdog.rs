//! The watchdog: the service manager restarts the gateway if an event loop no longer runs.

use super::{Notification, notify};
use crate::server::{self, RunState};
use futures_util::future::join_all;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{interval, timeout as within};

/// The watchdog notifies this many times within its timeout.
const NOTIFICATIONS_PER_TIMEOUT: u32 = 3;

/// An event loop that must answer.
#[derive(Clone, Debug)]
pub(crate) struct EventLoop {
    /// The name of its thread.
    pub(crate) thread: &'static str,
    pub(crate) runtime: Handle,
}

impl EventLoop {
    /// Whether the loop runs a task within this time. A loop that has ended or is blocked does not.
    async fn answers(&self, time: Duration) -> bool {
        matches!(within(time, self.runtime.spawn(async {})).await, Ok(Ok(())))
    }
}

/// The time without notification after which the service manager kills this process. `None`: it never does.
pub(crate) fn timeout() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    // The variables may be those of the process that has started this one.
    let is_meant = number("WATCHDOG_PID").is_none_or(|id| id == u64::from(std::process::id()));
    number("WATCHDOG_USEC").filter(|us| *us > 0 && is_meant).map(Duration::from_micros)
}

/// Notifies the service manager as long as every event loop answers, until the state is `Stopped`.
pub(crate) async fn run(
    timeout: Duration,
    event_loops: Vec<EventLoop>,
    run_state: watch::Receiver<RunState>,
) {
    watch_loops(timeout, &event_loops, run_state, || notify(&Notification::Alive)).await;
}

async fn watch_loops(
    timeout: Duration,
    event_loops: &[EventLoop],
    mut run_state: watch::Receiver<RunState>,
    alive: impl Fn(),
) {
    let period = timeout / NOTIFICATIONS_PER_TIMEOUT;
    let mut ticks = interval(period);
    let check = async {
        loop {
            ticks.tick().await;
            let answers = join_all(event_loops.iter().map(|event_loop| event_loop.answers(period))).await;
            let silent = event_loops.iter().zip(&answers).find(|(_, answers)| !**answers);
            match silent {
                None => alive(),
                Some((event_loop, _)) => tracing::error!(
                    thread = event_loop.thread,
                    waited_ms = u64::try_from(period.as_millis()).unwrap_or(u64::MAX),
                    "an event loop does not answer: the watchdog restarts the gateway if this continues"
                ),
            }
        }
    };
    tokio::select! {
        () = server::stopped(&mut run_state) => {}
        () = check => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, mpsc};
    use std::thread;

    /// A thread with an event loop. Dropping it ends the loop.
    struct Loop {
        event_loop: EventLoop,
        _end: tokio::sync::oneshot::Sender<()>,
    }

    fn start_loop() -> Loop {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let event_loop = EventLoop { thread: "worker", runtime: runtime.handle().clone() };
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        thread::spawn(move || drop(runtime.block_on(ended)));
        Loop { event_loop, _end: end }
    }

    #[tokio::test]
    async fn the_watchdog_is_silent_while_one_event_loop_is_blocked() {
        let loops = [start_loop(), start_loop()];
        let event_loops: Vec<_> = loops.iter().map(|one| one.event_loop.clone()).collect();
        let (state, run_state) = watch::channel(RunState::Running);
        let notifications = Arc::new(AtomicUsize::new(0));
        let counter = notifications.clone();
        let watchdog = tokio::spawn(async move {
            watch_loops(Duration::from_millis(300), &event_loops, run_state, || {
                counter.fetch_add(1, Ordering::Relaxed);
            })
            .await;
        });
        let count = || notifications.load(Ordering::Relaxed);
        while count() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Block the second loop.
        let (unblock, blocked) = mpsc::channel::<()>();
        let (entered, has_entered) = tokio::sync::oneshot::channel();
        drop(loops[1].event_loop.runtime.spawn(async move {
            let _ = entered.send(());
            let _ = blocked.recv();
        }));
        has_entered.await.unwrap();
        // A check that began before may still end well.
        tokio::time::sleep(Duration::from_millis(150)).await;
        let before = count();
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(count(), before);
        drop(unblock);
        while count() == before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        state.send_replace(RunState::Stopped);
        watchdog.await.unwrap();
    }

    #[tokio::test]
    async fn an_event_loop_that_has_ended_does_not_answer() {
        let one = start_loop();
        let event_loop = one.event_loop.clone();
        assert!(event_loop.answers(Duration::from_secs(30)).await);
        drop(one);
        while event_loop.answers(Duration::from_millis(20)).await {}
    }
}
