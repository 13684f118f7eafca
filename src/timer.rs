//! A timer that is used again for one deadline after the other.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::time::{Instant, Sleep, sleep_until};

/// A timer for deadlines that mostly pass unused, such as the timeout of each request on a connection.
///
/// It stays registered with the runtime between its uses. A later deadline than before moves it only when it fires, so
/// that most uses neither add a timer to the runtime nor remove one. Between its uses it may wake its last task once.
#[derive(Debug, Default)]
pub(crate) struct ReusedTimer(Option<Pin<Box<Sleep>>>);

impl ReusedTimer {
    /// Ready when `due` has passed.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, due: Instant) -> Poll<()> {
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if due < timer.deadline() {
            timer.as_mut().reset(due);
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= due {
                return Poll::Ready(());
            }
            timer.as_mut().reset(due);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::time::Duration;
    use tokio::time::timeout;

    const MAX_TIME: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn each_deadline_is_met_whatever_the_one_before() {
        let (mut timer, start) = (ReusedTimer::default(), Instant::now());
        // In milliseconds since the start: later, earlier, the same again, and passed already.
        for due in [10, 30, 20, 45, 45, 44, 60] {
            let due = start + Duration::from_millis(due);
            timeout(MAX_TIME, poll_fn(|cx| timer.poll(cx, due))).await.unwrap();
            assert!(Instant::now() >= due);
        }
    }

    #[tokio::test]
    async fn a_deadline_that_is_not_awaited_neither_ends_nor_delays_the_next_one() {
        let (mut timer, start) = (ReusedTimer::default(), Instant::now());
        let begin = async |timer: &mut ReusedTimer, due| {
            poll_fn(|cx| Poll::Ready(timer.poll(cx, due))).await.is_ready()
        };
        let due = start + Duration::from_millis(60);
        assert!(!begin(&mut timer, start + Duration::from_hours(1)).await);
        assert!(!begin(&mut timer, start + Duration::from_mins(1)).await);
        timeout(MAX_TIME, poll_fn(|cx| timer.poll(cx, start + Duration::from_millis(5)))).await.unwrap();
        timeout(MAX_TIME, poll_fn(|cx| timer.poll(cx, due))).await.unwrap();
        assert!(Instant::now() >= due);
    }
}
