//! The amounts of one quota over the time of a trace.

use crate::clock::Timestamp;

/// Number of parts of the trace's duration. A chart has at most as many columns.
pub(super) const PARTS: usize = 600;

/// What happened to a quota in a part of the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TimePart {
    /// Used and held amount when both together were largest.
    pub(super) used: u64,
    pub(super) held: u64,
    /// Calls that the quota denied.
    pub(super) denials: u64,
}

/// The parts of a trace's duration, in equal lengths.
#[derive(Clone, Debug)]
pub(super) struct Timeline {
    pub(super) first: Timestamp,
    pub(super) last: Timestamp,
    parts: Vec<TimePart>,
}

impl Timeline {
    pub(super) fn new(first: Timestamp, last: Timestamp) -> Self {
        Self { first, last, parts: Vec::new() }
    }

    /// When a part begins.
    pub(super) fn begin_of(first: Timestamp, last: Timestamp, part: usize) -> Timestamp {
        let span = u128::from(last.ms_since(first)) + 1;
        first.plus_ms(u64::try_from(span * part as u128 / PARTS as u128).unwrap_or(u64::MAX))
    }

    fn part(&mut self, at: Timestamp) -> Option<&mut TimePart> {
        let (since, span) = (at.ms_since(self.first), u128::from(self.last.ms_since(self.first)) + 1);
        let index = usize::try_from(u128::from(since) * PARTS as u128 / span).ok()?;
        self.parts.resize(PARTS, TimePart::default());
        self.parts.get_mut(index)
    }

    pub(super) fn record_level(&mut self, at: Timestamp, used: u64, held: u64) {
        let Some(part) = self.part(at) else { return };
        if used.saturating_add(held) >= part.used.saturating_add(part.held) {
            (part.used, part.held) = (used, held);
        }
    }

    pub(super) fn record_denial(&mut self, at: Timestamp) {
        if let Some(part) = self.part(at) {
            part.denials += 1;
        }
    }

    /// The parts joined to `columns` columns, at least 1 and at most [`PARTS`].
    pub(super) fn columns(&self, columns: usize) -> Vec<TimePart> {
        let columns = columns.clamp(1, PARTS);
        let join = |column: usize| {
            let range = column * PARTS / columns..(column + 1) * PARTS / columns;
            let parts = self.parts.get(range).unwrap_or_default();
            let largest = parts.iter().max_by_key(|part| part.used.saturating_add(part.held));
            TimePart {
                denials: parts.iter().map(|part| part.denials).sum(),
                ..largest.copied().unwrap_or_default()
            }
        };
        (0..columns).map(join).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_have_the_largest_amount_and_all_denials_of_their_time() {
        let (first, last) = (Timestamp(1_000), Timestamp(1_000 + 59_999));
        let mut timeline = Timeline::new(first, last);
        assert_eq!(timeline.columns(3), [TimePart::default(); 3]);
        for (ms, used, held) in [(0, 10, 0), (19_999, 5, 7), (20_000, 3, 0), (59_999, 4, 4), (60_000, 99, 0)]
        {
            timeline.record_level(first.plus_ms(ms), used, held);
            timeline.record_denial(first.plus_ms(ms));
        }
        let part = |used, held, denials| TimePart { used, held, denials };
        assert_eq!(timeline.columns(3), [part(5, 7, 2), part(3, 0, 1), part(4, 4, 1)]);
        assert_eq!(timeline.columns(0), [part(5, 7, 4)]);
        assert_eq!(timeline.columns(10_000).len(), PARTS);
        assert_eq!(
            (0..2).map(|part| Timeline::begin_of(first, last, part).0).collect::<Vec<_>>(),
            [1_000, 1_100]
        );
    }
}
