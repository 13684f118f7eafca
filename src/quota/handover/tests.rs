//! Counters that change hands while requests hold amounts behave as if they had stayed.

use super::*;
use crate::quota::{ClockUnit, Kind, Period, PersistedCounter, Required, Scope, Subject};
use proptest::prelude::*;
use std::sync::Arc;

const MINUTE: i64 = 60_000;
/// The beginning of a day in UTC.
const DAY: i64 = 20_000 * 86_400_000;

fn quotas() -> Vec<Quota> {
    let minute = Period { text: "minute".into(), ms: 60_000 };
    let calendar = Window::Calendar { unit: ClockUnit::Minute, zone: jiff::tz::TimeZone::UTC };
    let caller = Scope::Caller("web".into());
    [
        (Scope::Environment, Kind::TotalTokens, Window::Rolling { burst: 900 }),
        (Scope::Environment, Kind::CompletionTokens, calendar.clone()),
        (caller, Kind::Requests, calendar),
    ]
    .map(|(scope, kind, window)| Quota { scope, kind, limit: 1_000, per: minute.clone(), window })
    .into()
}

fn reserve(quotas: &mut Quotas, now: Timestamp, caller: &Arc<str>, prompt: u64, completion: u64) -> Receipt {
    let required = Required { amounts: Amounts::of_request(prompt, completion), generates: true };
    let applicable = quotas.applicable(Subject { caller: Some(caller), model: "m" });
    quotas.reserve_unchecked(now, &applicable, &required)
}

/// Hands the counters over as two processes do. The config of the new one lists its quotas in another order.
fn hand_over(quotas: &mut Quotas, now: Timestamp) -> (Quotas, HeldElsewhere) {
    let mut persisted: Vec<(Quota, PersistedCounter)> = Vec::new();
    quotas.take_changes(|quota, counter| persisted.push((quota.clone(), counter)));
    let mut reversed = self::quotas();
    reversed.reverse();
    let mut new = Quotas::new(&reversed, now);
    new.restore(now, &persisted, |_| true);
    let elsewhere = new.held_elsewhere(&quotas.left_cells());
    (new, elsewhere)
}

/// Level, held and used of each quota, in one order.
fn levels(quotas: &mut Quotas, now: Timestamp) -> Vec<(String, i64, u64, u64)> {
    let shown = |level: crate::quota::QuotaLevel| {
        (format!("{:?}", QuotaIdentity::of(&level.quota)), level.level, level.held, level.used)
    };
    let mut all: Vec<_> = quotas.levels(now).into_iter().map(shown).collect();
    all.sort();
    all
}

proptest! {
    #[test]
    fn counters_that_a_new_process_takes_over_settle_as_before(
        requests in prop::collection::vec((0..60_u64, 0..60_u64, 0..90_u64, any::<bool>()), 1..9),
        hand_over_at in 0..2 * MINUTE,
        step in 0..MINUTE,
    ) {
        let caller: Arc<str> = "web".into();
        let mut now = Timestamp(DAY);
        let mut stays = Quotas::new(&quotas(), now);
        let mut moves = Quotas::new(&quotas(), now);
        let mut in_flight = Vec::new();
        for (prompt, completion, spent, is_marked) in &requests {
            now = now.plus_ms(100);
            let mut pair = [&mut stays, &mut moves].map(|all| reserve(all, now, &caller, *prompt, *completion));
            if *is_marked {
                let [first, second] = &mut pair;
                let marked = Amounts::of_request(*prompt, *completion / 2);
                stays.progress(now, first, marked);
                moves.progress(now, second, marked);
            }
            in_flight.push((pair, Amounts::of_request(*prompt, *spent)));
        }
        now = now.plus_ms(hand_over_at.unsigned_abs());
        let (mut moved, mut elsewhere) = hand_over(&mut moves, now);
        prop_assert_eq!(levels(&mut stays, now), levels(&mut moved, now));
        for ([stayed, left], spent) in in_flight {
            now = now.plus_ms(step.unsigned_abs() / 4);
            stays.settle(now, stayed, spent);
            let adopted = elsewhere.adopt(&left.to_left());
            moved.settle(now, adopted, spent);
            prop_assert_eq!(levels(&mut stays, now), levels(&mut moved, now));
        }
        elsewhere.charge(now, &mut moved);
        prop_assert_eq!(levels(&mut stays, now), levels(&mut moved, now));
    }

    #[test]
    fn unsettled_amounts_of_an_ended_process_are_charged_in_full(
        requests in prop::collection::vec((0..60_u64, 0..60_u64, any::<bool>()), 1..9),
    ) {
        let caller: Arc<str> = "web".into();
        let now = Timestamp(DAY);
        let mut old = Quotas::new(&quotas(), now);
        let receipts: Vec<_> = requests.iter().map(|&(p, c, _)| reserve(&mut old, now, &caller, p, c)).collect();
        let (mut moved, mut elsewhere) = hand_over(&mut old, now);
        let mut sum = Amounts::default();
        for (receipt, (prompt, completion, is_settled)) in receipts.iter().zip(&requests) {
            if *is_settled {
                let adopted = elsewhere.adopt(&receipt.to_left());
                moved.settle(now, adopted, Amounts::default());
            } else {
                sum = sum.saturating_add(Amounts::of_request(*prompt, *completion));
            }
        }
        elsewhere.charge(now, &mut moved);
        for level in moved.levels(now) {
            prop_assert_eq!((level.held, level.used), (0, sum.of(level.quota.kind)));
        }
    }
}
