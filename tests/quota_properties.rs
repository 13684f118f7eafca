//! The quota arithmetic against a recount that shares nothing with it, over random steps.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_wrap,
    clippy::cast_possible_truncation
)]

use proptest::prelude::*;
use tollgate::clock::Timestamp;
use tollgate::quota::{
    Amounts, ClockUnit, Kind, Period, Quota, Quotas, Receipt, Required, Scope, Subject, Wait, Window,
};

#[derive(Clone, Debug)]
enum Step {
    Reserve {
        prompt: u64,
        completion: u64,
    },
    /// Settles the n-th open reservation with so much of each.
    Settle {
        which: usize,
        prompt: u64,
        completion: u64,
    },
    /// The clock moves, now and then backwards.
    Clock(i64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..400, 0u64..400).prop_map(|(prompt, completion)| Step::Reserve { prompt, completion }),
        3 => (any::<usize>(), 0u64..500, 0u64..900)
            .prop_map(|(which, prompt, completion)| Step::Settle { which, prompt, completion }),
        3 => prop_oneof![8 => 0i64..20_000, 1 => 0i64..200_000_000, 1 => -90_000_000i64..0].prop_map(Step::Clock),
    ]
}

fn quota(kind: Kind, limit: u64, ms: u64, window: Window) -> Quota {
    let per = Period { text: format!("{ms}ms"), ms };
    Quota { scope: Scope::Environment, kind, limit, per, window }
}

fn quotas() -> Vec<Quota> {
    let day =
        Window::Calendar { unit: ClockUnit::Day, zone: jiff::tz::TimeZone::get("Europe/Berlin").unwrap() };
    vec![
        quota(Kind::TotalTokens, 1_000, 60_000, Window::Rolling { burst: 1_500 }),
        quota(Kind::PromptTokens, 700, 1_000, Window::Rolling { burst: 700 }),
        quota(Kind::CompletionTokens, 60_000, 3_600_000, Window::Rolling { burst: 2_000 }),
        quota(Kind::TotalTokens, 20_000, 86_400_000, day),
        quota(Kind::Requests, 50, 60_000, Window::Rolling { burst: 50 }),
    ]
}

/// One quota that is used up all the time while its clock is stepped: what it lets through, and the
/// longest that it lets nothing through before or after the step, in real time.
fn through_a_step(quota: &Quota, begin: i64, step_ms: i64, step_at: i64) -> (u64, i64) {
    let period = quota.per.ms.cast_signed();
    let mut engine = Quotas::new(std::slice::from_ref(quota), Timestamp(begin));
    let subject = Subject { caller: None, model: "m" };
    let required = Required { amounts: Amounts::of_request(0, 1), generates: true };
    let (mut admitted, mut last, mut longest) = (0, 0, 0);
    for tick in 0..=80 {
        let real = period * tick / 20;
        let clock = begin + real + if tick >= step_at { step_ms } else { 0 };
        if tick == step_at {
            longest = longest.max(real - last);
            last = real;
        }
        let before = admitted;
        while let Ok(receipt) = engine.reserve(Timestamp(clock), subject, &required) {
            engine.settle(Timestamp(clock), receipt, required.amounts);
            admitted += 1;
        }
        if admitted > before {
            longest = longest.max(real - last);
            last = real;
        }
    }
    (admitted, longest.max(period * 4 - last))
}

#[test]
fn a_step_of_the_clock_grants_one_period_at_most_and_nothing_sticks_for_longer_than_one() {
    let calendar = |unit, zone: &str| Window::Calendar { unit, zone: jiff::tz::TimeZone::get(zone).unwrap() };
    let rolling = Window::Rolling { burst: 10 };
    let (hour, day) = (3_600_000, 86_400_000);
    let windows = [
        (1_000, rolling.clone()),
        (60_000, rolling.clone()),
        (hour, rolling.clone()),
        (day, rolling),
        (60_000, calendar(ClockUnit::Minute, "UTC")),
        (hour, calendar(ClockUnit::Hour, "Asia/Kolkata")),
        (day, calendar(ClockUnit::Day, "UTC")),
        (day, calendar(ClockUnit::Day, "Europe/Berlin")),
    ];
    for (ms, window) in windows {
        let quota = quota(Kind::TotalTokens, 10, ms, window);
        // Off the boundaries of any period, in a week when no clock is put forward or back.
        for phase in [1, 7_019, 1_234_567, 40_000_001] {
            let begin = 1_773_000_000_000 + phase;
            for step_ms in [1_000, 3_600_000, 86_400_000].into_iter().flat_map(|step| [step, -step]) {
                for step_at in [3, 17, 20, 41] {
                    let (admitted, longest) = through_a_step(&quota, begin, step_ms, step_at);
                    let what =
                        format!("{:?} {phase} {step_ms} {step_at}: {admitted}, {longest}", quota.window);
                    // Five periods of a calendar are touched in the time of four; a bucket starts full.
                    assert!((30..=60).contains(&admitted), "{what}");
                    // Looked at twenty times a period.
                    assert!(longest <= quota.per.ms.cast_signed() * 21 / 20, "{what}");
                }
            }
        }
    }
}

/// An account of one rolling quota kept in exact fractions: what is held is a list, what was spent is
/// a number that refilling lowers.
struct Recount {
    burst: i128,
    rate: i128,
    scale: i128,
    /// In 1/scale tokens: burst - level - held.
    spent: i128,
    held: Vec<i128>,
    at: i64,
}

impl Recount {
    fn held(&self) -> i128 {
        self.held.iter().sum()
    }

    fn advance(&mut self, now: i64) {
        // What is spent comes back at the rate; room that is held does not refill beyond the burst.
        self.spent =
            (self.spent - self.rate * i128::from((now - self.at).max(0))).max(0).min(self.spent.max(0));
        self.at = now;
    }

    fn fits(&self, amount: i128) -> bool {
        amount <= self.burst
            && self.burst * self.scale - self.spent - self.held() * self.scale >= amount.max(1) * self.scale
    }
}

const ASKER: Subject<'_> = Subject { caller: None, model: "m" };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_steps_give_what_a_recount_gives(steps in prop::collection::vec(step(), 1..250)) {
        let mut now = Timestamp(1_774_700_000_000);
        let all = quotas();
        let mut engine = Quotas::new(&all, now);
        let mut recounts: Vec<(usize, Recount)> = all
            .iter()
            .enumerate()
            .filter_map(|(at, q)| match q.window {
                Window::Rolling { burst } => Some((at, Recount {
                    burst: i128::from(burst), rate: i128::from(q.limit), scale: i128::from(q.per.ms), spent: 0, held: vec![], at: now.0,
                })),
                Window::Calendar { .. } => None,
            })
            .collect();
        let mut open: Vec<(Receipt, Amounts)> = Vec::new();
        for step in steps {
            match step {
                Step::Clock(ms) => now = Timestamp(now.0 + ms),
                Step::Reserve { prompt, completion } => {
                    let required = Required { amounts: Amounts::of_request(prompt, completion), generates: true };
                    let fit = recounts.iter_mut().all(|(at, r)| {
                        r.advance(now.0);
                        r.fits(i128::from(required.amounts.of(all[*at].kind)))
                    });
                    match engine.reserve(now, ASKER, &required) {
                        Ok(receipt) => {
                            prop_assert!(fit, "admitted against the recount");
                            for (at, r) in &mut recounts {
                                r.advance(now.0);
                                r.held.push(i128::from(required.amounts.of(all[*at].kind)));
                            }
                            open.push((receipt, required.amounts));
                        }
                        Err(denied) => {
                            let rolling = denied.shortfalls().iter().any(|s| matches!(s.quota.window, Window::Rolling { .. }));
                            prop_assert_eq!(rolling, !fit, "denied against the recount");
                            prop_assert!(denied.shortfalls().windows(2).all(|w| w[0].wait >= w[1].wait));
                        }
                    }
                }
                Step::Settle { which, prompt, completion } if !open.is_empty() => {
                    let which = which % open.len();
                    let (receipt, reserved) = open.remove(which);
                    let spent = Amounts::of_request(prompt, completion);
                    engine.settle(now, receipt, spent);
                    for (at, r) in &mut recounts {
                        r.advance(now.0);
                        r.held.remove(which);
                        r.spent += i128::from(spent.of(all[*at].kind)) * r.scale;
                        let _ = reserved;
                    }
                }
                Step::Settle { .. } => {}
            }
            let levels = engine.levels(now);
            for (at, r) in &mut recounts {
                r.advance(now.0);
                let level = &levels[*at];
                prop_assert_eq!(i128::from(level.held), r.held());
                let exact = r.burst * r.scale - r.spent - r.held() * r.scale;
                prop_assert_eq!(i128::from(level.level), exact.div_euclid(r.scale), "level of {:?}", level.quota);
                prop_assert!(level.level + level.held as i64 <= r.burst as i64);
            }
        }
        for (receipt, amounts) in open {
            engine.settle(now, receipt, amounts);
        }
        prop_assert!(engine.levels(now).iter().all(|l| l.held == 0), "nothing is held in the end");
    }

    #[test]
    fn who_waits_as_long_as_told_is_admitted_and_not_a_millisecond_sooner(
        spent in 0u64..3_000, amount in 0u64..1_500,
    ) {
        let now = Timestamp(1_774_700_000_000);
        let all = [quota(Kind::TotalTokens, 1_000, 60_000, Window::Rolling { burst: 1_500 })];
        let mut engine = Quotas::new(&all, now);
        let required = |tokens| Required { amounts: Amounts::of_request(tokens, 0), generates: true };
        let receipt = engine.reserve(now, ASKER, &required(1)).unwrap();
        engine.settle(now, receipt, Amounts::of_request(spent, 0));
        if let Err(denied) = engine.reserve(now, ASKER, &required(amount)) {
            let Wait::Ms(ms) = denied.shortfalls()[0].wait else { panic!("it fits some day") };
            prop_assert!(engine.clone().reserve(now.plus_ms(ms - 1), ASKER, &required(amount)).is_err());
            prop_assert!(engine.reserve(now.plus_ms(ms), ASKER, &required(amount)).is_ok());
        }
    }

    #[test]
    fn a_denied_request_changes_nothing(prompt in 0u64..5_000, completion in 0u64..5_000) {
        let now = Timestamp(1_774_700_000_000);
        let mut engine = Quotas::new(&quotas(), now);
        let before: Vec<_> = engine.levels(now).iter().map(|l| (l.level, l.held, l.used)).collect();
        let required = Required { amounts: Amounts::of_request(prompt, completion), generates: true };
        if engine.reserve(now, ASKER, &required).is_err() {
            let after: Vec<_> = engine.levels(now).iter().map(|l| (l.level, l.held, l.used)).collect();
            prop_assert_eq!(before, after);
        }
    }
}
