//! The rolling window: a token bucket in which held tokens do not refill.
//!
//! If held tokens refilled, a late refund would add to a full bucket: with slow answers the limit would
//! be exceeded by up to the whole burst. Therefore `level + held <= burst` at every moment, whatever the
//! order of calls.

use super::{CounterState, PersistedCounter, Wait};
use crate::clock::Timestamp;

/// Minimum retry delay for a request that needs tokens which other requests hold (ms).
const MIN_WAIT_FOR_HELD_MS: u64 = 1_000;

/// A token bucket. Its level is counted in units of 1/`period_ms` token: one millisecond adds exactly
/// `limit` units, and nothing is ever rounded. Whole tokens and the rest are separate, so that a reservation neither
/// multiplies nor divides.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// Units per millisecond. Equals the limit in tokens per period.
    rate: u64,
    /// Units per token. Equals the period in milliseconds.
    scale: u64,
    /// Capacity in tokens.
    burst: u64,
    /// In whole tokens, rounded down; below zero: debt.
    level: i64,
    /// The rest of the level in units, less than `scale`.
    fraction: u64,
    /// In tokens.
    held: u64,
    /// Time of the last refill.
    refilled_at: Timestamp,
}

impl TokenBucket {
    /// Creates a full bucket of `burst` tokens that refills by `limit` tokens per `period_ms`. All three must be at
    /// least 1.
    pub fn full(limit: u64, burst: u64, period_ms: u64, now: Timestamp) -> Self {
        Self {
            rate: limit.max(1),
            scale: period_ms.max(1),
            burst,
            level: signed(burst),
            fraction: 0,
            held: 0,
            refilled_at: now,
        }
    }

    /// Adds the units since the last refill. If the clock was stepped back, this adds nothing, and the next
    /// refill counts from the new time: the bucket does not wait until the old time is reached again.
    pub fn refill(&mut self, now: Timestamp) {
        let top = self.top();
        let elapsed = now.ms_since(self.refilled_at);
        if elapsed > 0 && self.level < top {
            let units = u128::from(self.rate) * u128::from(elapsed) + u128::from(self.fraction);
            let (tokens, fraction) = divide(units, self.scale);
            if tokens < u128::from(top.abs_diff(self.level)) {
                self.level = self.level.saturating_add_unsigned(u64::try_from(tokens).unwrap_or(u64::MAX));
                self.fraction = fraction;
            } else {
                (self.level, self.fraction) = (top, 0);
            }
        }
        self.refilled_at = now;
    }

    /// Whether `amount` tokens fit now. Requires a preceding `refill`.
    ///
    /// # Errors
    /// The time until the same request fits.
    pub(super) fn fits(&self, amount: u64) -> Result<(), Wait> {
        if amount > self.burst {
            return Err(Wait::Never);
        }
        // A request for 0 tokens needs one token too: an exhausted bucket admits nothing.
        let needed = amount.max(1);
        if self.level >= signed(needed) {
            return Ok(());
        }
        let ms = self.ms_to_refill(signed(needed).abs_diff(self.level));
        // If other requests hold the tokens, refilling alone is not enough. The wait then assumes that
        // they settle as reserved.
        let waits_for_held = needed > self.burst.saturating_sub(self.held);
        Err(Wait::Ms(if waits_for_held { ms.max(MIN_WAIT_FOR_HELD_MS) } else { ms }))
    }

    /// If less than one token is left: when there is one, unless a change of the held tokens comes first.
    pub(super) fn empty_until(&self) -> Option<Timestamp> {
        if self.level >= 1 {
            return None;
        }
        if self.held >= self.burst {
            return Some(Timestamp(i64::MAX));
        }
        Some(self.refilled_at.plus_ms(self.ms_to_refill(1_i64.abs_diff(self.level))))
    }

    /// Moves `amount` tokens from the level to held.
    pub fn reserve(&mut self, amount: u64) {
        self.level = self.level.saturating_sub_unsigned(amount);
        self.held += amount;
    }

    /// Moves `amount` tokens of a reservation from held to spent, so that they refill from now on.
    pub(super) fn mark_spent(&mut self, amount: u64) {
        self.held = self.held.saturating_sub(amount);
    }

    /// Releases the `held` tokens of a reservation and charges `owed` tokens: the amount spent beyond what
    /// `mark_spent` has moved. A difference is refunded, or becomes debt. `owed` is negative if
    /// `mark_spent` has moved too much.
    pub fn settle(&mut self, held: u64, owed: i64) {
        self.held = self.held.saturating_sub(held);
        self.level = self.level.saturating_add_unsigned(held).saturating_sub(owed);
        // The level is within this bound by construction. The bound ensures that a fault elsewhere cannot create
        // tokens.
        self.limit_level();
    }

    /// Changes the limit and the burst. Spent and held amounts stay.
    pub(super) fn set_limit(&mut self, limit: u64, burst: u64, now: Timestamp) {
        self.refill(now);
        self.level = self.level.saturating_add_unsigned(burst).saturating_sub_unsigned(self.burst);
        self.rate = limit.max(1);
        self.burst = burst;
    }

    /// Charges tokens that an earlier quota has counted.
    pub(super) fn carry_over(&mut self, used: u64) {
        self.level = self.level.saturating_sub_unsigned(used);
    }

    /// Limits the spent amount: debt beyond it is forgiven.
    pub(super) fn limit_used(&mut self, max: u64) {
        let lowest = self.top().saturating_sub_unsigned(max);
        if self.level < lowest {
            (self.level, self.fraction) = (lowest, 0);
        }
    }

    /// Sets the used and the held amount.
    pub(super) fn begin_with(&mut self, used: u64, held: u64) {
        self.held = held;
        (self.level, self.fraction) = (self.top().saturating_sub_unsigned(used), 0);
    }

    /// Sets the held amount of a bucket that decides nothing, because its quota is unlimited.
    pub(super) fn set_held(&mut self, held: u64) {
        self.held = held;
    }

    /// Fills the bucket, except for the held tokens.
    pub(super) fn reset(&mut self) {
        (self.level, self.fraction) = (self.top(), 0);
    }

    /// The counter for the store.
    pub(super) fn to_persisted(&self) -> PersistedCounter {
        PersistedCounter {
            level_fraction: self.fraction,
            used: i64::try_from(self.missing(self.held)).unwrap_or(i64::MAX),
            held: self.held,
            at: self.refilled_at,
            ..PersistedCounter::default()
        }
    }

    /// Continues from the counter that another process has persisted. Tokens that it held count as spent, or stay held
    /// with `keeps_held`.
    pub(super) fn restore(&mut self, persisted: &PersistedCounter, keeps_held: bool, now: Timestamp) {
        let spent = persisted.used.saturating_add_unsigned(persisted.held);
        self.held = if keeps_held { persisted.held } else { 0 };
        self.set_level(signed(self.burst).saturating_sub(spent), persisted.level_fraction);
        self.limit_level();
        self.refilled_at = persisted.at;
        self.refill(now);
    }

    /// Replaces the whole state by the one in Redis. `level` is in whole tokens and units of 1/`period_ms`.
    pub(super) fn load(&mut self, limit: u64, burst: u64, level: (i64, u64), held: u64, at: Timestamp) {
        self.rate = limit.max(1);
        self.burst = burst;
        self.set_level(level.0, level.1);
        self.held = held;
        self.refilled_at = at;
    }

    /// The whole state, which `load` accepts.
    pub(super) fn state(&self) -> CounterState {
        CounterState::Rolling {
            limit: self.rate,
            burst: self.burst,
            level: (self.level, self.fraction),
            held: self.held,
            at: self.refilled_at,
        }
    }

    /// Available whole tokens, rounded down; below zero: debt.
    pub fn level(&self) -> i64 {
        self.level
    }

    /// Tokens held by requests in flight.
    pub(super) fn held(&self) -> u64 {
        self.held
    }

    /// Tokens spent and not yet refilled, rounded up.
    pub(super) fn used(&self) -> u64 {
        u64::try_from(self.missing(self.held)).unwrap_or(0)
    }

    /// Milliseconds until the spent tokens have refilled; with `includes_held`, until the held ones have too.
    pub(super) fn refill_ms(&self, includes_held: bool) -> u64 {
        let held = if includes_held { 0 } else { self.held };
        self.ms_to_refill(u64::try_from(self.missing(held)).unwrap_or(0))
    }

    /// The tokens that a full bucket of which this amount is held would have more, rounded up.
    fn missing(&self, held: u64) -> i128 {
        i128::from(self.burst) - i128::from(held) - i128::from(self.level)
    }

    /// Milliseconds until the level is higher by this many tokens, less its fraction.
    fn ms_to_refill(&self, tokens: u64) -> u64 {
        let units = u128::from(tokens) * u128::from(self.scale);
        let (ms, rest) = divide(units.saturating_sub(u128::from(self.fraction)), self.rate);
        u64::try_from(ms).unwrap_or(u64::MAX).saturating_add(u64::from(rest > 0))
    }

    /// The highest possible level; below zero if the burst was lowered below the held tokens.
    fn top(&self) -> i64 {
        signed(self.burst).saturating_sub_unsigned(self.held)
    }

    /// Limits the level to the highest possible one.
    fn limit_level(&mut self) {
        let top = self.top();
        if self.level >= top {
            (self.level, self.fraction) = (top, 0);
        }
    }

    /// Sets the level. `units` may be a token or more.
    fn set_level(&mut self, tokens: i64, units: u64) {
        self.level = tokens.saturating_add_unsigned(units / self.scale);
        self.fraction = units % self.scale;
    }
}

/// An amount of tokens as a signed number. Amounts are far smaller than its maximum.
fn signed(tokens: u64) -> i64 {
    i64::try_from(tokens).unwrap_or(i64::MAX)
}

/// Quotient and remainder. Most amounts fit in 64 bits, where division is far cheaper.
fn divide(dividend: u128, divisor: u64) -> (u128, u64) {
    if let Ok(dividend) = u64::try_from(dividend) {
        return (u128::from(dividend / divisor), dividend % divisor);
    }
    let divisor = u128::from(divisor);
    (dividend / divisor, u64::try_from(dividend % divisor).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp(ms)
    }

    #[test]
    fn a_bucket_refills_to_the_millisecond() {
        let mut b = TokenBucket::full(60, 60, 60_000, at(0));
        b.reserve(60);
        b.settle(60, 60);
        b.refill(at(999));
        assert_eq!((b.level(), b.fits(1)), (0, Err(Wait::Ms(1))));
        b.refill(at(1_000));
        assert_eq!((b.level(), b.fits(1)), (1, Ok(())));
        b.refill(at(10_000_000));
        assert_eq!(b.level(), 60);
    }

    #[test]
    fn held_tokens_do_not_refill() {
        let mut b = TokenBucket::full(100, 100, 1_000, at(0));
        b.reserve(80);
        b.refill(at(60_000));
        assert_eq!((b.level(), b.held()), (20, 80));
        b.settle(80, 30);
        assert_eq!((b.level(), b.used()), (70, 30));
    }

    #[test]
    fn tokens_marked_spent_refill_and_are_settled_once() {
        let mut b = TokenBucket::full(100, 100, 1_000, at(0));
        b.reserve(80);
        b.mark_spent(50);
        assert_eq!((b.level(), b.held(), b.used()), (20, 30, 50));
        b.refill(at(300));
        assert_eq!((b.level(), b.used()), (50, 20));
        b.settle(30, 40 - 50);
        assert_eq!((b.level(), b.held(), b.used()), (90, 0, 10));
    }

    #[test]
    fn a_changed_limit_keeps_used_tokens() {
        let mut b = TokenBucket::full(100, 100, 1_000, at(0));
        b.reserve(70);
        b.settle(60, 60);
        b.set_limit(50, 50, at(0));
        assert_eq!((b.level(), b.held(), b.used()), (-20, 10, 60));
        b.set_limit(200, 200, at(0));
        assert_eq!((b.level(), b.held(), b.used()), (130, 10, 60));
    }

    #[test]
    fn a_restored_bucket_counts_held_tokens_as_spent() {
        let mut b = TokenBucket::full(100, 100, 60_000, at(0));
        b.reserve(70);
        b.settle(60, 60);
        b.refill(at(1));
        let persisted = b.to_persisted();
        let mut after = TokenBucket::full(100, 100, 60_000, at(700));
        after.restore(&persisted, false, at(601));
        assert_eq!((after.level(), after.held(), after.used()), (31, 0, 69));
        let mut raised = TokenBucket::full(200, 200, 60_000, at(700));
        raised.restore(&persisted, false, at(1));
        assert_eq!((raised.level(), raised.used()), (130, 70));
        let mut stepped_back = TokenBucket::full(100, 100, 60_000, at(0));
        stepped_back.restore(&persisted, false, at(-5));
        assert_eq!(stepped_back.level(), 30);
    }

    #[test]
    fn a_bucket_that_is_taken_over_keeps_what_is_held_out_of_the_refill() {
        let mut b = TokenBucket::full(100, 100, 1_000, at(0));
        b.reserve(80);
        let persisted = b.to_persisted();
        let mut after = TokenBucket::full(100, 100, 1_000, at(0));
        after.restore(&persisted, true, at(60_000));
        assert_eq!((after.level(), after.held(), after.used()), (20, 80, 0));
        after.settle(80, 30);
        assert_eq!((after.level(), after.held(), after.used()), (70, 0, 30));
    }

    #[test]
    fn an_overrun_becomes_debt_that_refills() {
        let mut b = TokenBucket::full(100, 100, 1_000, at(0));
        b.reserve(10);
        b.settle(10, 150);
        assert_eq!((b.level(), b.fits(0)), (-50, Err(Wait::Ms(510))));
        b.refill(at(510));
        assert_eq!(b.fits(0), Ok(()));
    }

    #[test]
    fn a_request_waits_at_least_a_second_for_held_tokens() {
        let mut b = TokenBucket::full(1_000_000, 100, 1_000, at(0));
        b.reserve(60);
        assert_eq!(b.fits(50), Err(Wait::Ms(1_000)));
        assert_eq!(b.fits(101), Err(Wait::Never));
    }

    #[test]
    fn a_clock_stepped_back_grants_no_tokens_and_blocks_no_refill() {
        let mut b = TokenBucket::full(60, 60, 60_000, at(3_600_000));
        b.reserve(60);
        b.settle(60, 60);
        b.refill(at(0));
        assert_eq!(b.level(), 0);
        b.refill(at(60_000));
        assert_eq!(b.level(), 60);
    }
}
