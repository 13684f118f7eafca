//! Lines of the log about events that a caller or an upstream can cause as often as it likes.

use crate::clock::Stopwatch;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Lines about events of one kind are logged at most this often.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Counts events of one kind, which are logged with their number at most once a second.
#[derive(Debug)]
pub(crate) struct EventCount(Mutex<Count>);

#[derive(Debug)]
struct Count {
    /// Events since the last line.
    events: u64,
    logged: Option<Stopwatch>,
}

impl EventCount {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Count { events: 0, logged: None }))
    }

    /// Counts one. Returns the number to log, if a line is due.
    pub(crate) fn add(&self) -> Option<u64> {
        let mut count = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        count.events += 1;
        if count.logged.is_some_and(|logged| logged.elapsed() < LOG_INTERVAL) {
            return None;
        }
        count.logged = Some(Stopwatch::start());
        Some(std::mem::take(&mut count.events))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_logged_at_most_once_a_second_with_their_number() {
        let events = EventCount::new();
        assert_eq!(events.add(), Some(1));
        let began = Stopwatch::start();
        let (mut logged, mut added) = (0, 0u64);
        while began.elapsed() < LOG_INTERVAL + Duration::from_millis(200) {
            added += 1;
            if let Some(count) = events.add() {
                assert_eq!(count, added);
                logged += 1;
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(logged, 1);
        assert!(began.elapsed() + Duration::from_millis(20) >= LOG_INTERVAL);
    }
}
