//! The line of those who wait for room: first come, first served, bounded in number and in time.

use super::{NoRoom, Reservation};
use crate::clock::Stopwatch;
use crate::quota::Wait;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

/// More than this do not wait in one environment: the next is denied at once.
const LONGEST: usize = 1_000;

/// The line before one environment's quotas.
#[derive(Debug)]
pub(super) struct WaitQueue {
    /// Who holds the permit stands in front. Tokio's semaphore serves in the order of asking, and
    /// whoever gives up leaves its place.
    front: Semaphore,
    waiting: AtomicUsize,
    ended: Notify,
}

impl Default for WaitQueue {
    fn default() -> Self {
        Self { front: Semaphore::new(1), waiting: AtomicUsize::new(0), ended: Notify::new() }
    }
}

impl WaitQueue {
    /// A request has given room back: whoever stands in front may look again.
    pub(super) fn somebody_has_ended(&self) {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.ended.notify_one();
        }
    }
}

/// One who waits; leaves the line when dropped.
struct Place<'a>(&'a WaitQueue);

impl<'a> Place<'a> {
    fn take(wait_queue: &'a WaitQueue) -> Option<Self> {
        let before = wait_queue.waiting.fetch_add(1, Ordering::Relaxed);
        let place = Self(wait_queue);
        (before < LONGEST).then_some(place)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tries at once if nobody waits, else in turn, for at most `longest`. `None`: no wait would help, or
/// all of it was in vain, or the line is full. `in_the_way` looks without taking anything.
pub(super) async fn wait<R: Future<Output = Result<Reservation, NoRoom>>>(
    wait_queue: &WaitQueue,
    longest: Duration,
    reserve: impl Fn() -> R,
    in_the_way: impl FnOnce() -> Option<NoRoom>,
) -> Option<Reservation> {
    let no_room = if wait_queue.waiting.load(Ordering::Relaxed) == 0 {
        match reserve().await {
            Ok(reservation) => return Some(reservation),
            Err(no_room) => Some(no_room),
        }
    } else {
        in_the_way()
    };
    // Behind others too: what cannot come in time for the first in line does not for the last.
    if no_room.is_some_and(|no_room| !is_worth_waiting(&no_room, longest)) {
        return None;
    }
    let _place = Place::take(wait_queue)?;
    let clock = Stopwatch::start();
    let in_turn = async {
        // The semaphore is never closed.
        let _front = wait_queue.front.acquire().await.ok()?;
        loop {
            let ended = wait_queue.ended.notified();
            let left = longest.saturating_sub(clock.elapsed());
            let wait = match reserve().await {
                Ok(reservation) => return Some(reservation),
                Err(no_room) if !is_worth_waiting(&no_room, left) => return None,
                Err(no_room) => until(&no_room),
            };
            // Either way it looks again: what ended may not have been enough.
            drop(timeout(wait, ended).await);
        }
    };
    timeout(longest, in_turn).await.ok().flatten()
}

fn is_worth_waiting(no_room: &NoRoom, left: Duration) -> bool {
    match no_room.soonest() {
        Wait::Never => false,
        Wait::Ms(ms) => Duration::from_millis(ms) <= left,
    }
}

/// How long nothing can change but by the end of another request.
fn until(no_room: &NoRoom) -> Duration {
    match no_room.wait() {
        Some(Wait::Ms(ms)) => Duration::from_millis(ms.max(1)),
        Some(Wait::Never) | None => Duration::from_secs(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_a_thousand_wait() {
        let wait_queue = WaitQueue::default();
        let mut places: Vec<Place<'_>> = (0..LONGEST).map_while(|_| Place::take(&wait_queue)).collect();
        assert_eq!(places.len(), LONGEST);
        assert!(Place::take(&wait_queue).is_none());
        places.pop();
        assert!(Place::take(&wait_queue).is_some(), "who leaves makes room");
        drop(places);
        assert_eq!(wait_queue.waiting.load(Ordering::Relaxed), 0);
    }
}
