//! The rolling window: a token bucket whose held room does not refill.
//!
//! A bucket that refills while tokens are held lets a late refund pile on top of a full bucket: with
//! slow answers that overshoots the limit by its whole size. So `level + held <= burst` at every
//! moment, whatever the order of calls.

use super::{CounterState, PersistedCounter, Wait};
use crate::clock::Timestamp;

/// Where a request waits for room that others hold, no sooner than this (ms).
const MIN_WAIT_FOR_HELD_MS: u64 = 1_000;

/// A token bucket. Its level is kept in units of 1/`period_ms` token, so that one millisecond adds
/// exactly `limit` units and nothing is ever rounded.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// Units per millisecond: the limit, in tokens per period.
    rate: i128,
    /// Units per token: the period in milliseconds.
    scale: i128,
    /// Capacity in tokens.
    burst: u64,
    /// In units; below zero: debt.
    level: i128,
    /// In tokens.
    held: u64,
    at: Timestamp,
}

impl TokenBucket {
    /// A full bucket that holds `burst` tokens and refills at `limit` per `period_ms`; all at least 1.
    pub fn full(limit: u64, burst: u64, period_ms: u64, now: Timestamp) -> Self {
        let scale = i128::from(period_ms.max(1));
        Self {
            rate: i128::from(limit.max(1)),
            scale,
            burst,
            level: i128::from(burst) * scale,
            held: 0,
            at: now,
        }
    }

    /// Adds what has come back since the last call. A clock stepped backwards adds nothing, and the
    /// bucket counts on from there: it is never stuck until the old time comes round again.
    pub fn refill(&mut self, now: Timestamp) {
        let top = self.top();
        if self.level < top {
            let elapsed = i128::from(now.ms_since(self.at));
            self.level = top.min(self.level + self.rate * elapsed);
        }
        self.at = now;
    }

    /// Whether `amount` fits now (call `refill` first); if not, when it does.
    ///
    /// # Errors
    /// How long the same request has to wait, or that it never fits.
    pub fn fits(&self, amount: u64) -> Result<(), Wait> {
        if amount > self.burst {
            return Err(Wait::Never);
        }
        // Also a request for 0 tokens needs something left: an exhausted bucket admits nothing.
        let needed = amount.max(1);
        let short = self.units(needed) - self.level;
        if short <= 0 {
            return Ok(());
        }
        let ms = u64::try_from((short + self.rate - 1) / self.rate).unwrap_or(u64::MAX);
        // Where others hold the room, refilling alone never makes it fit: what is in flight is taken
        // to settle as reserved by then.
        let waits_for_held = needed > self.burst.saturating_sub(self.held);
        Err(Wait::Ms(if waits_for_held { ms.max(MIN_WAIT_FOR_HELD_MS) } else { ms }))
    }

    /// Takes `amount` out and holds it.
    pub fn reserve(&mut self, amount: u64) {
        self.level -= self.units(amount);
        self.held += amount;
    }

    /// What is certainly spent of a reservation does not stay held: the room it took refills from now on.
    pub fn mark_spent(&mut self, amount: u64) {
        self.held = self.held.saturating_sub(amount);
    }

    /// Replaces what is still held of a reservation by what is owed for it beyond what `spend` has
    /// moved: gives back the rest, or becomes debt. `owed` is below zero where too much was moved.
    pub fn settle(&mut self, held: u64, owed: i64) {
        self.held = self.held.saturating_sub(held);
        self.level += self.units(held) - i128::from(owed) * self.scale;
        // Holds by construction; stated so that a slip elsewhere could never mint tokens.
        self.level = self.level.min(self.top());
    }

    /// Another limit from now on: what was used stays used, what is held stays held.
    pub fn set_limit(&mut self, limit: u64, burst: u64, now: Timestamp) {
        self.refill(now);
        self.level += self.units(burst) - self.units(self.burst);
        self.rate = i128::from(limit.max(1));
        self.burst = burst;
    }

    /// Full at once, but for what is held.
    pub fn reset(&mut self) {
        self.level = self.top();
    }

    /// What has to be kept so that the bucket outlives the process.
    pub fn saved(&self) -> PersistedCounter {
        let whole = divide_down(self.level, self.scale);
        PersistedCounter {
            level_fraction: u64::try_from(self.level - whole * self.scale).unwrap_or(0),
            used: i64::try_from(i128::from(self.burst) - whole - i128::from(self.held)).unwrap_or(i64::MAX),
            held: self.held,
            at: self.at,
            until: Timestamp::default(),
        }
    }

    /// Takes over what another process has left: what it used, and, in full, what it held.
    pub fn restore(&mut self, saved: &PersistedCounter, now: Timestamp) {
        let spent = i128::from(saved.used) + i128::from(saved.held);
        let level = (i128::from(self.burst) - spent) * self.scale + i128::from(saved.level_fraction);
        self.level = level.min(self.units(self.burst));
        self.held = 0;
        self.at = saved.at;
        self.refill(now);
    }

    /// Goes on from a state that another engine has reached: its level in whole tokens and 1/`period_ms` of one.
    pub fn load(&mut self, limit: u64, burst: u64, level: (i64, u64), held: u64, at: Timestamp) {
        self.rate = i128::from(limit.max(1));
        self.burst = burst;
        self.level = i128::from(level.0) * self.scale + i128::from(level.1);
        self.held = held;
        self.at = at;
    }

    /// The state that `load` goes on from.
    pub fn state(&self) -> CounterState {
        let whole = divide_down(self.level, self.scale);
        CounterState::Rolling {
            limit: u64::try_from(self.rate).unwrap_or(u64::MAX),
            burst: self.burst,
            level: (self.level(), u64::try_from(self.level - whole * self.scale).unwrap_or(0)),
            held: self.held,
            at: self.at,
        }
    }

    /// Whole tokens that are left, rounded down; below zero: debt.
    pub fn level(&self) -> i64 {
        i64::try_from(divide_down(self.level, self.scale)).unwrap_or(i64::MIN)
    }

    /// Tokens held by requests in flight.
    pub fn held(&self) -> u64 {
        self.held
    }

    /// Capacity in tokens.
    pub fn burst(&self) -> u64 {
        self.burst
    }

    /// Tokens spent and not yet refilled, rounded up.
    pub fn used(&self) -> u64 {
        let used = self.units(self.burst) - self.level - self.units(self.held);
        u64::try_from(divide_down(used + self.scale - 1, self.scale)).unwrap_or(0)
    }

    /// Milliseconds until what is spent has refilled; with `and_held`, what is held too.
    pub fn refill_ms(&self, and_held: bool) -> u64 {
        let held = if and_held { 0 } else { self.held };
        let missing = self.units(self.burst) - self.level - self.units(held);
        u64::try_from(divide_down(missing + self.rate - 1, self.rate)).unwrap_or(0)
    }

    /// The highest level there can be now; below zero where the burst was lowered under what is held.
    fn top(&self) -> i128 {
        self.units(self.burst) - self.units(self.held)
    }

    fn units(&self, tokens: u64) -> i128 {
        i128::from(tokens) * self.scale
    }
}

/// Divides, rounding down, by a positive divisor. Most amounts fit 64 bits, where that is far cheaper.
fn divide_down(dividend: i128, divisor: i128) -> i128 {
    match (i64::try_from(dividend), i64::try_from(divisor)) {
        (Ok(dividend), Ok(divisor)) => i128::from(dividend.div_euclid(divisor)),
        _ => dividend.div_euclid(divisor),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp(ms)
    }

    #[test]
    fn refills_at_its_rate_to_the_millisecond() {
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
    fn held_room_does_not_refill() {
        let mut b = TokenBucket::full(100, 100, 1_000, at(0));
        b.reserve(80);
        b.refill(at(60_000));
        assert_eq!((b.level(), b.held()), (20, 80));
        b.settle(80, 30);
        assert_eq!((b.level(), b.used()), (70, 30));
    }

    #[test]
    fn what_is_spent_on_the_way_refills_and_is_settled_once() {
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
    fn another_limit_keeps_what_was_used() {
        let mut b = TokenBucket::full(100, 100, 1_000, at(0));
        b.reserve(70);
        b.settle(60, 60);
        b.set_limit(50, 50, at(0));
        assert_eq!((b.level(), b.held(), b.used()), (-20, 10, 60));
        b.set_limit(200, 200, at(0));
        assert_eq!((b.level(), b.held(), b.used()), (130, 10, 60));
    }

    #[test]
    fn a_bucket_outlives_its_process_and_what_was_held_is_spent() {
        let mut b = TokenBucket::full(100, 100, 60_000, at(0));
        b.reserve(70);
        b.settle(60, 60);
        b.refill(at(1));
        let saved = b.saved();
        let mut after = TokenBucket::full(100, 100, 60_000, at(700));
        after.restore(&saved, at(601));
        assert_eq!((after.level(), after.held(), after.used()), (31, 0, 69));
        let mut raised = TokenBucket::full(200, 200, 60_000, at(700));
        raised.restore(&saved, at(1));
        assert_eq!((raised.level(), raised.used()), (130, 70));
        let mut stepped_back = TokenBucket::full(100, 100, 60_000, at(0));
        stepped_back.restore(&saved, at(-5));
        assert_eq!(stepped_back.level(), 30);
    }

    #[test]
    fn an_overrun_is_debt_and_debt_refills() {
        let mut b = TokenBucket::full(100, 100, 1_000, at(0));
        b.reserve(10);
        b.settle(10, 150);
        assert_eq!((b.level(), b.fits(0)), (-50, Err(Wait::Ms(510))));
        b.refill(at(510));
        assert_eq!(b.fits(0), Ok(()));
    }

    #[test]
    fn what_waits_for_held_room_waits_a_second_at_least() {
        let mut b = TokenBucket::full(1_000_000, 100, 1_000, at(0));
        b.reserve(60);
        assert_eq!(b.fits(50), Err(Wait::Ms(1_000)));
        assert_eq!(b.fits(101), Err(Wait::Never));
    }

    #[test]
    fn a_clock_stepped_back_neither_grants_nor_sticks() {
        let mut b = TokenBucket::full(60, 60, 60_000, at(3_600_000));
        b.reserve(60);
        b.settle(60, 60);
        b.refill(at(0));
        assert_eq!(b.level(), 0);
        b.refill(at(60_000));
        assert_eq!(b.level(), 60);
    }
}
