use super::*;
use crate::quota::{Amounts, Period, Receipt, Required, Restored, Scope, Subject};
use jiff::tz::TimeZone;
use proptest::prelude::*;

/// A Wednesday, in the middle of a day.
const BEGIN: i64 = 1_774_440_000_000;
const SUBJECT: Subject<'_> = Subject { caller: None, model: "m" };

fn quota(kind: Kind, limit: u64, ms: u64, unit: Option<ClockUnit>) -> Quota {
    let window = match unit {
        Some(unit) => Window::Calendar { unit, zone: TimeZone::UTC },
        None => Window::Rolling { burst: limit },
    };
    let per = Period { text: format!("{ms}ms"), ms };
    Quota { scope: Scope::Environment, kind, limit, per, window }
}

const MINUTE: u64 = 60_000;
const DAY: u64 = 86_400_000;

/// The quotas of total tokens between which configs choose. None has a limit above 100.
fn choices() -> [Vec<Quota>; 8] {
    let total = |limit, ms, unit| quota(Kind::TotalTokens, limit, ms, unit);
    [
        vec![total(100, MINUTE, None)],
        vec![total(40, MINUTE, None)],
        vec![total(100, 60 * MINUTE, None)],
        vec![total(60, DAY, Some(ClockUnit::Day))],
        vec![total(100, 7 * DAY, Some(ClockUnit::Week))],
        vec![total(80, DAY, None), total(100, DAY, Some(ClockUnit::Day))],
        Vec::new(),
        vec![Quota::implicit(&[]).swap_remove(0)],
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Reconfigure(usize),
    Reserve(u64),
    /// Settles an open reservation with this per cent of its amount.
    Settle(usize, u64),
    Clock(i64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..8_usize).prop_map(Step::Reconfigure),
        4 => (1..60_u64).prop_map(Step::Reserve),
        3 => (any::<usize>(), 0..=100_u64).prop_map(|(which, percent)| Step::Settle(which, percent)),
        1 => (0..300_i64).prop_map(Step::Clock),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    /// Within less than a period, no sequence of configs serves more than the highest limit and what refills.
    #[test]
    fn no_sequence_of_configs_serves_more_than_one_limit(
        steps in prop::collection::vec(step(), 1..80),
        in_place in any::<bool>(),
    ) {
        let takeover = if in_place { Takeover::InPlace } else { Takeover::Separate };
        let (choices, mut now) = (choices(), Timestamp(BEGIN));
        let mut engine = Quotas::new(&choices[0], now);
        let mut is_limited = true;
        let mut open: Vec<(Receipt, Amounts)> = Vec::new();
        let mut spent = 0;
        for step in steps {
            match step {
                Step::Reconfigure(choice) => {
                    engine.reconfigure(&choices[choice], now, takeover, |_| None);
                    is_limited = choices[choice].iter().any(|quota| !quota.is_unlimited());
                }
                Step::Reserve(tokens) if is_limited => {
                    let amounts = Amounts::of_request(tokens, 0);
                    let required = Required { amounts, generates: true };
                    if let Ok(receipt) = engine.reserve(now, &engine.applicable(SUBJECT), &required) {
                        open.push((receipt, amounts));
                    }
                }
                Step::Settle(which, percent) if !open.is_empty() => {
                    let (receipt, reserved) = open.swap_remove(which % open.len());
                    let part = Amounts::of_request(reserved.total * percent / 100, 0);
                    spent += part.total;
                    engine.settle(now, receipt, part);
                }
                Step::Clock(ms) => now = now.plus_ms(ms.unsigned_abs()),
                Step::Reserve(_) | Step::Settle(..) => {}
            }
            let held: u64 = open.iter().map(|(_, amounts)| amounts.total).sum();
            let refilled = 100 * (now.0 - BEGIN).unsigned_abs() / MINUTE + 1;
            prop_assert!(spent + held <= 100 + refilled, "{spent} spent and {held} held");
            for level in engine.levels(now).into_iter().filter(|level| !level.quota.is_unlimited()) {
                prop_assert!(level.level + level.held.cast_signed() <= level.quota.capacity().cast_signed());
            }
        }
        // Whatever the configs were, everything settles.
        for (receipt, _) in open {
            engine.settle(now, receipt, Amounts::default());
        }
        prop_assert!(engine.cell_levels(now).iter().all(|level| level.held == 0));
    }
}

/// Used, held and level of the only quota.
fn state(engine: &mut Quotas, now: Timestamp) -> (u64, u64, i64) {
    let levels = engine.levels(now);
    assert_eq!(levels.len(), 1);
    (levels[0].used, levels[0].held, levels[0].level)
}

#[test]
fn reservations_in_flight_settle_exactly_through_every_change_of_the_window() {
    let now = Timestamp(BEGIN);
    let choices = choices();
    for (from, to) in (0..5).flat_map(|from| (0..5).map(move |to| (from, to))) {
        let mut engine = Quotas::new(&choices[from], now);
        let take = |engine: &mut Quotas, tokens| {
            let required = Required { amounts: Amounts::of_request(tokens, 0), generates: true };
            engine.reserve(now, &engine.applicable(SUBJECT), &required).unwrap()
        };
        let first = take(&mut engine, 10);
        engine.settle(now, first, Amounts::of_request(10, 0));
        let running = take(&mut engine, 20);
        engine.reconfigure(&choices[to], now, Takeover::InPlace, |_| None);
        let limit = choices[to][0].limit.cast_signed();
        assert_eq!(state(&mut engine, now), (10, 20, limit - 30), "from {from} to {to}");
        engine.settle(now, running, Amounts::of_request(15, 0));
        assert_eq!(state(&mut engine, now), (25, 0, limit - 25), "from {from} to {to}");
    }
}

#[test]
fn a_quota_with_another_period_takes_over_up_to_its_burst() {
    let bursting = |limit, burst, ms| Quota {
        window: Window::Rolling { burst },
        ..quota(Kind::TotalTokens, limit, ms, None)
    };
    let now = Timestamp(BEGIN);
    for takeover in [Takeover::InPlace, Takeover::Separate] {
        let mut engine = Quotas::new(&[bursting(10, 30, 60 * MINUTE)], now);
        let required = Required { amounts: Amounts::of_request(25, 0), generates: true };
        let receipt = engine.reserve(now, &engine.applicable(SUBJECT), &required).unwrap();
        engine.settle(now, receipt, Amounts::of_request(25, 0));
        engine.reconfigure(&[bursting(10, 30, 120 * MINUTE)], now, takeover, |_| None);
        assert_eq!(state(&mut engine, now), (25, 0, 5), "{takeover:?}");
        engine.reconfigure(&[bursting(5, 15, 60 * MINUTE)], now, takeover, |_| None);
        assert_eq!(state(&mut engine, now), (15, 0, 0), "{takeover:?}");
    }
}

/// Restarts with these quotas, as the store does it.
fn restart(
    engine: &mut Quotas,
    stored: &mut Vec<(Quota, PersistedCounter)>,
    quotas: &[Quota],
    now: Timestamp,
) -> Quotas {
    let store = |stored: &mut Vec<(Quota, PersistedCounter)>, quota: &Quota, counter| {
        stored.retain(|(known, _)| !known.is_same_as(quota));
        stored.push((quota.clone(), counter));
    };
    engine.take_changes(|quota, counter| store(stored, quota, counter));
    let mut next = Quotas::new(quotas, now);
    let Restored { replaced, removed } = next.restore(now, stored, |_| false);
    stored.retain(|(known, _)| !replaced.iter().any(|quota| quota.is_same_as(known)));
    removed.iter().for_each(|(quota, counter)| store(stored, quota, *counter));
    next
}

/// Random sequences of reloads and restarts had made a quota full again.
#[test]
fn no_sequence_of_reloads_and_restarts_makes_a_quota_full_again() {
    let per = |ms| quota(Kind::TotalTokens, 100, ms, None);
    let [hour, two_hours, four_hours, day] = [1, 2, 4, 24].map(|hours| per(hours * 60 * MINUTE));
    let now = Timestamp(BEGIN);
    for (configs, last) in [
        // The quota per four hours is not in the last config, so nothing continues it.
        (
            vec![
                (false, vec![day.clone(), four_hours]),
                (false, vec![hour.clone()]),
                (true, vec![two_hours.clone()]),
            ],
            day.clone(),
        ),
        (vec![(true, vec![two_hours.clone()])], day.clone()),
        (vec![(true, vec![two_hours.clone()])], hour),
        (vec![(true, vec![two_hours.clone()]), (false, vec![two_hours])], day.clone()),
    ] {
        let (mut engine, mut stored) = (Quotas::new(std::slice::from_ref(&day), now), Vec::new());
        let required = Required { amounts: Amounts::of_request(100, 0), generates: true };
        let receipt = engine.reserve(now, &engine.applicable(SUBJECT), &required).unwrap();
        engine.settle(now, receipt, Amounts::of_request(100, 0));
        for (reloads, quotas) in &configs {
            if *reloads {
                engine.reconfigure(quotas, now, Takeover::InPlace, |_| None);
            } else {
                engine = restart(&mut engine, &mut stored, quotas, now);
            }
        }
        let mut engine = restart(&mut engine, &mut stored, std::slice::from_ref(&last), now);
        assert_eq!(state(&mut engine, now), (100, 0, 0), "{configs:?}");
    }
}

#[test]
fn a_reservation_of_an_ended_period_does_not_refill_the_bucket_that_replaces_it() {
    let choices = choices();
    let now = Timestamp(BEGIN);
    let mut engine = Quotas::new(&choices[3], now);
    let required = Required { amounts: Amounts::of_request(30, 0), generates: true };
    let late = engine.reserve(now, &engine.applicable(SUBJECT), &required).unwrap();
    let tomorrow = now.plus_ms(DAY);
    let running = engine.reserve(tomorrow, &engine.applicable(SUBJECT), &required).unwrap();
    engine.reconfigure(&choices[2], tomorrow, Takeover::InPlace, |_| None);
    assert_eq!(state(&mut engine, tomorrow), (0, 30, 70));
    engine.settle(tomorrow, late, Amounts::default());
    assert_eq!(state(&mut engine, tomorrow), (0, 30, 70));
    engine.settle(tomorrow, running, Amounts::default());
    assert_eq!(state(&mut engine, tomorrow), (0, 0, 100));
}
