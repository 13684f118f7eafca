//! For how long a quota was exhausted: nothing was left of it, or it had no room for a request that it had refused.

use crate::clock::Timestamp;

/// The time for which a quota was exhausted since its counter began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Exhaustion {
    total_ms: u64,
    /// The sum is complete up to this time.
    counted_to: Timestamp,
    /// When the last refused request would fit. The quota is exhausted until then, or until it admits a request.
    refused_until: Timestamp,
}

impl Exhaustion {
    pub(super) fn new(now: Timestamp) -> Self {
        Self { total_ms: 0, counted_to: now, refused_until: Timestamp(i64::MIN) }
    }

    /// Whether the sum is complete up to `now`, so that `advance` would add nothing.
    pub(super) fn is_counted_to(&self, now: Timestamp) -> bool {
        self.counted_to == now
    }

    /// Adds the time since the last call. `empty_until`: nothing is left of the quota before that time.
    pub(super) fn advance(&mut self, now: Timestamp, empty_until: Option<Timestamp>) {
        let until = empty_until.unwrap_or(self.refused_until).max(self.refused_until).min(now);
        self.total_ms = self.total_ms.saturating_add(until.ms_since(self.counted_to));
        self.counted_to = now;
    }

    /// A request was refused that would fit after this time.
    pub(super) fn on_refusal(&mut self, now: Timestamp, wait_ms: u64) {
        self.refused_until = self.refused_until.max(now.plus_ms(wait_ms));
    }

    /// A request was admitted, or the quota was changed or reset.
    pub(super) fn on_room(&mut self) {
        self.refused_until = Timestamp(i64::MIN);
    }

    pub(super) fn total_ms(&self) -> u64 {
        self.total_ms
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Amounts, ClockUnit, Denied, Kind, Period, Quota, Quotas, Required, Scope, Subject, Window,
    };
    use super::*;
    use jiff::tz::TimeZone;

    const ANYONE: Subject<'_> = Subject { caller: None, model: "" };

    /// 60 tokens per minute: one per second.
    fn quotas(window: Window) -> Quotas {
        let per = Period { text: "minute".into(), ms: 60_000 };
        let quota = Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit: 60, per, window };
        Quotas::new(&[quota], Timestamp(0))
    }

    fn required(tokens: u64) -> Required {
        Required { amounts: Amounts::of_request(tokens, 0), generates: false }
    }

    fn exhausted(quotas: &mut Quotas, seconds: i64) -> u64 {
        quotas.levels(Timestamp(seconds * 1_000))[0].exhausted_ms
    }

    fn spend(quotas: &mut Quotas, seconds: i64, tokens: u64) -> Option<Denied> {
        let now = Timestamp(seconds * 1_000);
        let receipt = match quotas.reserve(now, &quotas.applicable(ANYONE), &required(tokens)) {
            Ok(receipt) => receipt,
            Err(denied) => return Some(denied),
        };
        quotas.settle(now, receipt, Amounts::of_request(tokens, 0));
        None
    }

    #[test]
    fn a_rolling_quota_is_exhausted_until_it_has_a_token_again() {
        let mut quotas = quotas(Window::Rolling { burst: 60 });
        assert!(spend(&mut quotas, 10, 60).is_none());
        assert_eq!(exhausted(&mut quotas, 10), 0);
        assert_eq!(exhausted(&mut quotas, 40), 1_000);
        assert_eq!(exhausted(&mut quotas, 100), 1_000);
    }

    #[test]
    fn debt_and_held_tokens_exhaust_a_quota() {
        let mut quotas = quotas(Window::Rolling { burst: 60 });
        let receipt = quotas.reserve(Timestamp(0), &quotas.applicable(ANYONE), &required(60)).unwrap();
        assert_eq!(exhausted(&mut quotas, 5), 5_000);
        // 30 tokens of debt last for 30 s, and the first token needs one more.
        quotas.settle(Timestamp(5_000), receipt, Amounts::of_request(90, 0));
        assert_eq!(exhausted(&mut quotas, 6), 6_000);
        assert_eq!(exhausted(&mut quotas, 600), 36_000);
    }

    #[test]
    fn a_calendar_quota_is_exhausted_until_its_period_ends() {
        let mut quotas = quotas(Window::Calendar { unit: ClockUnit::Minute, zone: TimeZone::UTC });
        assert!(spend(&mut quotas, 10, 60).is_none());
        assert_eq!(exhausted(&mut quotas, 30), 20_000);
        assert_eq!(exhausted(&mut quotas, 300), 50_000);
    }

    #[test]
    fn a_refusal_exhausts_a_quota_until_the_request_fits_or_another_is_admitted() {
        let mut quotas = quotas(Window::Rolling { burst: 60 });
        assert!(spend(&mut quotas, 0, 40).is_none());
        // 20 are left. A request for 50 fits in 30 s.
        let denied = spend(&mut quotas, 0, 50).unwrap();
        quotas.record_refusal(Timestamp(0), ANYONE, &denied);
        assert_eq!(exhausted(&mut quotas, 10), 10_000);
        assert_eq!(exhausted(&mut quotas, 100), 30_000);
        let denied = spend(&mut quotas, 100, 61);
        quotas.record_refusal(Timestamp(100_000), ANYONE, &denied.unwrap());
        assert_eq!(exhausted(&mut quotas, 200), 30_000, "it can never fit");
        assert!(spend(&mut quotas, 200, 50).is_none());
        let denied = spend(&mut quotas, 200, 50).unwrap();
        quotas.record_refusal(Timestamp(200_000), ANYONE, &denied);
        assert!(spend(&mut quotas, 205, 5).is_none());
        assert_eq!(exhausted(&mut quotas, 300), 35_000);
    }

    #[test]
    fn a_reset_and_a_step_back_of_the_clock_end_it() {
        let mut quotas = quotas(Window::Rolling { burst: 60 });
        assert!(spend(&mut quotas, 100, 60).is_none());
        let denied = spend(&mut quotas, 100, 50).unwrap();
        quotas.record_refusal(Timestamp(100_000), ANYONE, &denied);
        quotas.reset(Timestamp(110_000));
        assert_eq!(exhausted(&mut quotas, 200), 10_000);
        assert_eq!(exhausted(&mut quotas, 0), 10_000);
        assert_eq!(exhausted(&mut quotas, 500), 10_000);
    }
}
