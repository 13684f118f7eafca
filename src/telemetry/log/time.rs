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
        self.at(clock::now())
    }

    fn at(&mut self, now: Timestamp) -> &str {
        if now != self.at || self.text.is_empty() {
            // Of most lines only the milliseconds differ from those of the line before.
            let is_same_second = now.0.div_euclid(1_000) == self.at.0.div_euclid(1_000);
            match self.text.strip_suffix('Z') {
                Some(text) if is_same_second => {
                    self.text.truncate(text.len() - 3);
                    let millis = now.0.rem_euclid(1_000);
                    for digit in [millis / 100, millis / 10 % 10, millis % 10] {
                        self.text
                            .push(char::from_digit(u32::try_from(digit).unwrap_or(0), 10).unwrap_or('0'));
                    }
                    self.text.push('Z');
                }
                _ => {
                    self.text = jiff::Timestamp::from_millisecond(now.0)
                        .map_or_else(|_| now.0.to_string(), |t| format!("{t:.3}"));
                }
            }
            self.at = now;
        }
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_a_time_does_not_depend_on_the_time_before() {
        let times =
            [0, 1, 999, 1_000, 1_009, 1_010, 999, -1, -1_000, i64::MAX, i64::MAX - 1, 1_764_406_800_250];
        for before in times {
            for now in times {
                let (mut text, mut fresh) = (TimeText::default(), TimeText::default());
                text.at(Timestamp(before));
                assert_eq!(text.at(Timestamp(now)), fresh.at(Timestamp(now)), "{now} after {before}");
            }
        }
        assert_eq!(TimeText::default().at(Timestamp(1_764_406_800_250)), "2025-11-29T09:00:00.250Z");
    }
}
