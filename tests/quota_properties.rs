//! Properties of the quota arithmetic. An independent recount checks random steps.

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
    Amounts, ClockUnit, Kind, Period, Quota, Quotas, Receipt, Required, Scope, Shortfall, Subject, Wait,
    Window,
};

#[derive(Clone, Debug)]
enum Step {
    Reserve {
        prompt: u64,
        completion: u64,
    },
    /// Settles an open reservation (`which` modulo their number) with these amounts.
    Settle {
        which: usize,
        prompt: u64,
        completion: u64,
    },
    /// Steps the clock by milliseconds, sometimes backwards.
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

/// Spends one quota as fast as it admits, for four periods, while the clock is stepped by `step_ms`.
///
/// Returns the admitted amount, and the longest time without an admission before or after the step, in milliseconds
/// of real time (not of the stepped clock).
fn spend_through_clock_step(quota: &Quota, begin: i64, step_ms: i64, step_at: i64) -> (u64, i64) {
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
        while let Ok(receipt) = engine.reserve(Timestamp(clock), &engine.applicable(subject), &required) {
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
fn a_clock_step_grants_at_most_one_period_and_blocks_for_at_most_one() {
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
        // No period begins at this time, and daylight saving time does not change in this week.
        for phase in [1, 7_019, 1_234_567, 40_000_001] {
            let begin = 1_773_000_000_000 + phase;
            for step_ms in [1_000, 3_600_000, 86_400_000].into_iter().flat_map(|step| [step, -step]) {
                for step_at in [3, 17, 20, 41] {
                    let (admitted, longest) = spend_through_clock_step(&quota, begin, step_ms, step_at);
                    let what =
                        format!("{:?} {phase} {step_ms} {step_at}: {admitted}, {longest}", quota.window);
                    // Four periods overlap five calendar periods, and a bucket starts full.
                    assert!((30..=60).contains(&admitted), "{what}");
                    // The loop tries twenty times per period.
                    assert!(longest <= quota.per.ms.cast_signed() * 21 / 20, "{what}");
                }
            }
        }
    }
}

/// An independent count of one rolling quota in exact fractions.
struct RollingRecount {
    /// Index of the quota.
    index: usize,
    kind: Kind,
    burst: i128,
    rate: i128,
    scale: i128,
    /// `burst - level - held`, in units of 1/`scale` token. Refilling lowers it.
    spent: i128,
    /// The held amounts by reservation.
    held: Vec<i128>,
    /// Time of the last `advance`.
    at: i64,
}

impl RollingRecount {
    /// The recounts of all rolling quotas.
    fn of(quotas: &[Quota], now: Timestamp) -> Vec<Self> {
        let recount = |(index, quota): (usize, &Quota)| match quota.window {
            Window::Rolling { burst } => Some(Self {
                index,
                kind: quota.kind,
                burst: i128::from(burst),
                rate: i128::from(quota.limit),
                scale: i128::from(quota.per.ms),
                spent: 0,
                held: vec![],
                at: now.0,
            }),
            Window::Calendar { .. } => None,
        };
        quotas.iter().enumerate().filter_map(recount).collect()
    }

    fn held(&self) -> i128 {
        self.held.iter().sum()
    }

    fn advance(&mut self, now: i64) {
        self.spent =
            (self.spent - self.rate * i128::from((now - self.at).max(0))).max(0).min(self.spent.max(0));
        self.at = now;
    }

    fn fits(&self, amount: i128) -> bool {
        amount <= self.burst
            && self.burst * self.scale - self.spent - self.held() * self.scale >= amount.max(1) * self.scale
    }
}

const SUBJECT: Subject<'_> = Subject { caller: None, model: "m" };

/// The engine and the recounts of its rolling quotas.
struct Walk {
    now: Timestamp,
    engine: Quotas,
    recounts: Vec<RollingRecount>,
    /// Open reservations with their amounts, in the order of `RollingRecount::held`.
    open: Vec<(Receipt, Amounts)>,
}

impl Walk {
    fn new() -> Self {
        let (now, quotas) = (Timestamp(1_774_700_000_000), quotas());
        let engine = Quotas::new(&quotas, now);
        Self { now, engine, recounts: RollingRecount::of(&quotas, now), open: Vec::new() }
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Clock(ms) => self.now = Timestamp(self.now.0 + ms),
            Step::Reserve { prompt, completion } => self.reserve(Amounts::of_request(prompt, completion)),
            Step::Settle { which, prompt, completion } if !self.open.is_empty() => {
                let which = which % self.open.len();
                let (receipt, _) = self.open.remove(which);
                let spent = Amounts::of_request(prompt, completion);
                self.engine.settle(self.now, receipt, spent);
                for r in &mut self.recounts {
                    r.advance(self.now.0);
                    r.held.remove(which);
                    r.spent += i128::from(spent.of(r.kind)) * r.scale;
                }
            }
            Step::Settle { .. } => {}
        }
    }

    fn reserve(&mut self, amounts: Amounts) {
        self.recounts.iter_mut().for_each(|r| r.advance(self.now.0));
        let fits = self.recounts.iter().all(|r| r.fits(i128::from(amounts.of(r.kind))));
        match self.engine.reserve(
            self.now,
            &self.engine.applicable(SUBJECT),
            &Required { amounts, generates: true },
        ) {
            Ok(receipt) => {
                assert!(fits, "the engine admitted the request, the recount denies it");
                self.recounts.iter_mut().for_each(|r| r.held.push(i128::from(amounts.of(r.kind))));
                self.open.push((receipt, amounts));
            }
            Err(denied) => {
                let is_rolling = |s: &Shortfall| matches!(s.quota.window, Window::Rolling { .. });
                assert_eq!(
                    denied.shortfalls().iter().any(is_rolling),
                    !fits,
                    "the engine denied the request, the recount admits it"
                );
                assert!(denied.shortfalls().windows(2).all(|pair| pair[0].wait >= pair[1].wait));
            }
        }
    }

    fn compare(&mut self) {
        let levels = self.engine.levels(self.now);
        for r in &mut self.recounts {
            r.advance(self.now.0);
            let level = &levels[r.index];
            assert_eq!(i128::from(level.held), r.held());
            let exact = r.burst * r.scale - r.spent - r.held() * r.scale;
            assert_eq!(i128::from(level.level), exact.div_euclid(r.scale), "level of {:?}", level.quota);
            assert!(level.level + level.held as i64 <= r.burst as i64);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_steps_match_an_independent_recount(steps in prop::collection::vec(step(), 1..250)) {
        let mut walk = Walk::new();
        for step in steps {
            walk.apply(&step);
            walk.compare();
        }
        for (receipt, amounts) in walk.open {
            walk.engine.settle(walk.now, receipt, amounts);
        }
        prop_assert!(walk.engine.levels(walk.now).iter().all(|level| level.held == 0), "everything is settled");
    }

    #[test]
    fn a_request_fits_after_the_returned_wait_and_not_a_millisecond_earlier(
        spent in 0u64..3_000, amount in 0u64..1_500,
    ) {
        let now = Timestamp(1_774_700_000_000);
        let all = [quota(Kind::TotalTokens, 1_000, 60_000, Window::Rolling { burst: 1_500 })];
        let mut engine = Quotas::new(&all, now);
        let required = |tokens| Required { amounts: Amounts::of_request(tokens, 0), generates: true };
        let receipt = engine.reserve(now, &engine.applicable(SUBJECT), &required(1)).unwrap();
        engine.settle(now, receipt, Amounts::of_request(spent, 0));
        if let Err(denied) = engine.reserve(now, &engine.applicable(SUBJECT), &required(amount)) {
            let Wait::Ms(ms) = denied.shortfalls()[0].wait else { panic!("the request is not larger than the quota") };
            prop_assert!(engine.clone().reserve(now.plus_ms(ms - 1), &engine.applicable(SUBJECT), &required(amount)).is_err());
            prop_assert!(engine.reserve(now.plus_ms(ms), &engine.applicable(SUBJECT), &required(amount)).is_ok());
        }
    }

    #[test]
    fn a_denied_request_changes_nothing(prompt in 0u64..5_000, completion in 0u64..5_000) {
        let now = Timestamp(1_774_700_000_000);
        let mut engine = Quotas::new(&quotas(), now);
        let before: Vec<_> = engine.levels(now).iter().map(|l| (l.level, l.held, l.used)).collect();
        let required = Required { amounts: Amounts::of_request(prompt, completion), generates: true };
        if engine.reserve(now, &engine.applicable(SUBJECT), &required).is_err() {
            let after: Vec<_> = engine.levels(now).iter().map(|l| (l.level, l.held, l.used)).collect();
            prop_assert_eq!(before, after);
        }
    }
}
