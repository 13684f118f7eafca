//! The time of lines.

use crate::clock::{self, Timestamp};

/// The current time as text, in UTC with milliseconds, formatted at most once per millisecond.
#[derive(Default)]
pub(super) struct TimeText {
    at: Timestamp,
    text: String,
}

impl TimeText {
    pub(super) fn current(&mut self) -> &str {
        let now = clock::now();
        if now != self.at || self.text.is_empty() {
            self.at = now;
            self.text = jiff::Timestamp::from_millisecond(now.0)
                .map_or_else(|_| now.0.to_string(), |t| format!("{t:.3}"));
        }
        &self.text
    }
}
