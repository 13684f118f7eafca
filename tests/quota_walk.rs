//! A long random walk through the quota engine beside a recount that shares nothing with it: reserve,
//! settle, extend, progress, clock steps either way, changed limits, restarts.
//!
//! A million steps; `TOLLGATE_WALK_STEPS` says otherwise.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_wrap)]

use std::collections::HashMap;
use tollgate::clock::Timestamp;
use tollgate::quota::{
    Amounts, Ask, Asker, ClockUnit, Kind, Per, Quota, Quotas, Receipt, Saved, Scope, Window,
};

const DAY: i64 = 86_400_000;
const CALLERS: u64 = 3;

/// SplitMix64: the walk is the same on every machine.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.roll() % n
    }
}

fn quota(scope: Scope, kind: Kind, limit: u64, ms: u64, window: Window) -> Quota {
    Quota { scope, kind, limit, per: Per { written: format!("{ms}ms"), ms }, window }
}

fn quotas() -> Vec<Quota> {
    let rolling = |burst| Window::Rolling { burst };
    let day = Window::Calendar { unit: ClockUnit::Day, zone: jiff::tz::TimeZone::UTC };
    let caller = |n: usize| Scope::Caller(n, format!("caller-{n}"));
    vec![
        quota(Scope::Environment, Kind::TotalTokens, 60_000, 60_000, rolling(4_000)),
        quota(Scope::Environment, Kind::PromptTokens, 700, 1_000, rolling(900)),
        quota(Scope::Environment, Kind::CompletionTokens, 100_000, 3_600_000, rolling(100_000)),
        quota(Scope::Environment, Kind::Requests, 97, 60_000, rolling(50)),
        quota(Scope::Environment, Kind::TotalTokens, 900_000, DAY.cast_unsigned(), day),
        quota(caller(0), Kind::TotalTokens, 30_000, 60_000, rolling(2_000)),
        quota(caller(1), Kind::Requests, 7, 1_000, rolling(7)),
    ]
}

/// One quota, recounted: what is held is added up from a list whenever it is asked for.
struct Recount {
    quota: Quota,
    /// Spent and not yet back; of a rolling quota in 1/period tokens.
    spent: i128,
    at: i64,
    turn: u64,
    day: i64,
    open: HashMap<u64, Hold>,
}

#[derive(Clone, Copy)]
struct Hold {
    reserved: i128,
    moved: i128,
    turn: u64,
}

impl Recount {
    fn new(quota: Quota, now: i64) -> Self {
        Self { quota, spent: 0, at: now, turn: 0, day: now.div_euclid(DAY), open: HashMap::new() }
    }

    fn is_rolling(&self) -> bool {
        matches!(self.quota.window, Window::Rolling { .. })
    }

    fn scale(&self) -> i128 {
        if self.is_rolling() { i128::from(self.quota.per.ms) } else { 1 }
    }

    fn held(&self) -> i128 {
        let now = self.open.values().filter(|hold| self.is_rolling() || hold.turn == self.turn);
        now.map(|hold| hold.reserved - hold.moved).sum()
    }

    /// What is left, in 1/scale.
    fn left(&self) -> i128 {
        (i128::from(self.quota.capacity()) - self.held()) * self.scale() - self.spent
    }

    fn advance(&mut self, now: i64) {
        if self.is_rolling() {
            let back = i128::from(self.quota.limit) * i128::from((now - self.at).max(0));
            self.spent = (self.spent - back).max(0).min(self.spent);
        } else if now.div_euclid(DAY) > self.day {
            self.day = now.div_euclid(DAY);
            self.turn += 1;
            self.spent = 0;
        } else {
            self.day = now.div_euclid(DAY);
        }
        self.at = now;
    }

    fn fits(&self, amount: i128) -> bool {
        amount <= i128::from(self.quota.capacity()) && self.left() >= amount.max(1) * self.scale()
    }

    fn settle(&mut self, id: u64, spent: i128) {
        let Some(hold) = self.open.remove(&id) else { return };
        if self.is_rolling() {
            // More room than there is nobody gets back.
            self.spent = (self.spent + (spent - hold.moved) * self.scale()).max(0);
        } else if hold.turn == self.turn {
            self.spent = (self.spent + spent - hold.moved).max(0);
        } else {
            self.spent += (spent - hold.reserved).max(0);
        }
    }

    fn progress(&mut self, id: u64, spent: i128) {
        let (turn, scale, rolling) = (self.turn, self.scale(), self.is_rolling());
        let Some(hold) = self.open.get_mut(&id) else { return };
        let more = (spent.min(hold.reserved) - hold.moved).max(0);
        hold.moved += more;
        if rolling || hold.turn == turn {
            self.spent += more * scale;
        }
    }

    /// The process dies: what is held is spent, and nobody will settle it.
    fn restart(&mut self) {
        self.spent += self.held() * self.scale();
        self.open.clear();
        self.turn = 0;
    }
}

struct Walk {
    dice: Dice,
    now: i64,
    engine: Quotas,
    recounts: Vec<Recount>,
    open: Vec<(u64, Receipt, u64)>,
    next: u64,
    counts: HashMap<&'static str, u64>,
}

impl Walk {
    fn new(seed: u64) -> Self {
        let now = 1_774_700_000_000;
        let recounts = quotas().into_iter().map(|q| Recount::new(q, now)).collect();
        let engine = Quotas::new(&quotas(), Timestamp(now));
        Self { dice: Dice(seed), now, engine, recounts, open: Vec::new(), next: 0, counts: HashMap::new() }
    }

    fn note(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn touches(recount: &Recount, caller: u64) -> bool {
        match recount.quota.scope {
            Scope::Caller(index, _) => index as u64 == caller,
            _ => true,
        }
    }

    fn advance(&mut self, caller: u64) {
        let now = self.now;
        self.recounts.iter_mut().filter(|r| Self::touches(r, caller)).for_each(|r| r.advance(now));
    }

    fn reserve(&mut self) {
        let caller = self.dice.below(CALLERS);
        let amounts = Amounts::of_request(self.dice.below(300), self.dice.below(400));
        let fits = {
            self.advance(caller);
            let mut touched = self.recounts.iter().filter(|r| Self::touches(r, caller));
            touched.all(|r| r.fits(i128::from(amounts.of(r.quota.kind))))
        };
        let asker = Asker { caller: usize::try_from(caller).ok(), model: "m" };
        let ask = Ask { amounts, generates: true };
        if let Ok(receipt) = self.engine.reserve(Timestamp(self.now), asker, &ask) {
            assert!(fits, "admitted against the recount");
            self.hold(receipt, caller, amounts);
            self.note("admitted");
        } else {
            assert!(!fits, "denied against the recount");
            self.note("denied");
        }
    }

    fn hold(&mut self, receipt: Receipt, caller: u64, amounts: Amounts) {
        let id = self.next;
        self.next += 1;
        for r in self.recounts.iter_mut().filter(|r| Self::touches(r, caller)) {
            let reserved = i128::from(amounts.of(r.quota.kind));
            r.open.insert(id, Hold { reserved, moved: 0, turn: r.turn });
        }
        self.open.push((id, receipt, caller));
    }

    fn pick(&mut self) -> Option<usize> {
        let open = self.open.len() as u64;
        (open > 0).then(|| usize::try_from(self.dice.below(open)).unwrap())
    }

    fn extend(&mut self) {
        let Some(at) = self.pick() else { return };
        let tokens = 1 + self.dice.below(200);
        let more = Amounts { completion: tokens, total: tokens, ..Amounts::default() };
        let caller = self.open[at].2;
        self.advance(caller);
        let mut touched = self.recounts.iter().filter(|r| Self::touches(r, caller));
        let fits = touched.all(|r| {
            let amount = i128::from(more.of(r.quota.kind));
            amount == 0 || r.fits(amount)
        });
        let extended = self.engine.extend(Timestamp(self.now), &self.open[at].1, more);
        assert_eq!(extended.is_some(), fits, "extended against the recount");
        if let Some(receipt) = extended {
            self.hold(receipt, caller, more);
            self.note("extended");
        }
    }

    fn progress(&mut self) {
        let Some(at) = self.pick() else { return };
        let spent = Amounts::of_request(self.dice.below(300), self.dice.below(500));
        let (id, receipt, caller) = &mut self.open[at];
        let (id, caller) = (*id, *caller);
        let moved_any = {
            let before: Vec<i64> = self.engine.levels(Timestamp(self.now)).iter().map(|l| l.level).collect();
            self.engine.progress(Timestamp(self.now), receipt, spent);
            before
        };
        let after: Vec<i64> = self.engine.levels(Timestamp(self.now)).iter().map(|l| l.level).collect();
        assert_eq!(moved_any, after, "progress gives no room by itself");
        self.advance(caller);
        for r in self.recounts.iter_mut().filter(|r| Self::touches(r, caller)) {
            r.progress(id, i128::from(spent.of(r.quota.kind)));
        }
        self.note("progressed");
    }

    fn settle(&mut self) {
        let Some(at) = self.pick() else { return };
        let (id, receipt, caller) = self.open.swap_remove(at);
        let spent = Amounts::of_request(self.dice.below(350), self.dice.below(600));
        self.engine.settle(Timestamp(self.now), receipt, spent);
        self.advance(caller);
        for r in self.recounts.iter_mut().filter(|r| Self::touches(r, caller)) {
            r.settle(id, i128::from(spent.of(r.quota.kind)));
        }
        self.note("settled");
    }

    fn step_clock(&mut self) {
        let (by, what) = match self.dice.below(400) {
            0 => (-1_000, "stepped back"),
            1 => (-3_600_000, "stepped back"),
            2 => (-DAY, "stepped back"),
            3 => (3_600_000, "stepped on"),
            4 => (DAY, "stepped on"),
            _ => (self.dice.below(1_500).cast_signed(), "went on"),
        };
        self.now += by;
        self.note(what);
    }

    /// Other limits, in another order: counters go on.
    fn change_limits(&mut self) {
        let original = quotas();
        let mut all: Vec<Quota> = self.recounts.iter().map(|r| r.quota.clone()).collect();
        for quota in &mut all {
            let before = original.iter().find(|q| q.is_same_as(quota)).unwrap();
            let mut change = |n: u64| n / 2 + self.dice.below(n) + 1;
            quota.limit = change(before.limit);
            if let Window::Rolling { burst } = &mut quota.window {
                *burst = change(before.capacity());
            }
        }
        let turn = usize::try_from(self.dice.below(all.len() as u64)).unwrap();
        self.recounts.iter_mut().for_each(|r| r.advance(self.now));
        self.recounts.iter_mut().zip(&all).for_each(|(r, quota)| r.quota = quota.clone());
        all.rotate_left(turn);
        self.recounts.rotate_left(turn);
        self.engine.set_quotas(&all, Timestamp(self.now));
        self.note("limits changed");
    }

    fn restart(&mut self) {
        self.engine.levels(Timestamp(self.now));
        let mut kept: Vec<(Quota, Saved)> = Vec::new();
        // All of them: as if each had been changed since it was kept.
        let all: Vec<Quota> = self.recounts.iter().map(|r| r.quota.clone()).collect();
        self.engine.set_quotas(&all, Timestamp(self.now));
        self.engine.take_changes(|quota, saved| kept.push((quota.clone(), saved)));
        assert_eq!(kept.len(), all.len());
        self.recounts.iter_mut().for_each(|r| r.advance(self.now));
        self.recounts.iter_mut().for_each(Recount::restart);
        self.open.clear();
        self.engine = Quotas::new(&all, Timestamp(self.now));
        self.engine.restore(Timestamp(self.now), |quota| {
            kept.iter().find(|(known, _)| known.is_same_as(quota)).map(|(_, saved)| *saved)
        });
        self.note("restarted");
    }

    fn compare(&mut self) {
        let levels = self.engine.levels(Timestamp(self.now));
        for (shown, r) in levels.iter().zip(&mut self.recounts) {
            r.advance(self.now);
            let what = &r.quota;
            assert_eq!(shown.quota, *what);
            assert_eq!(i128::from(shown.held), r.held(), "held of {what:?}");
            assert_eq!(i128::from(shown.level), r.left().div_euclid(r.scale()), "level of {what:?}");
            assert!(r.spent >= 0, "spent of {what:?}");
            assert!(shown.level.saturating_add_unsigned(shown.held) <= what.capacity() as i64);
        }
    }

    fn step(&mut self) {
        match self.dice.below(1_000) {
            0..300 => self.reserve(),
            300..500 => self.settle(),
            500..560 => self.extend(),
            560..680 => self.progress(),
            680..997 => self.step_clock(),
            997..999 => self.change_limits(),
            _ => self.restart(),
        }
        // Requests that never end would fill everything.
        if self.open.len() > 40 {
            self.settle();
        }
        self.compare();
    }
}

#[test]
fn a_million_random_steps_give_what_a_recount_gives() {
    let steps: u64 = std::env::var("TOLLGATE_WALK_STEPS").map_or(1_000_000, |n| n.parse().unwrap());
    let mut walk = Walk::new(0x7011_9a7e);
    for _ in 0..steps {
        walk.step();
    }
    while !walk.open.is_empty() {
        walk.settle();
    }
    walk.compare();
    assert!(walk.recounts.iter().all(|r| r.held() == 0), "nothing is held in the end");
    let mut counts: Vec<_> = walk.counts.into_iter().collect();
    counts.sort_unstable();
    println!("{steps} steps, 0 mismatches: {counts:?}");
    for what in ["admitted", "denied", "settled", "extended", "progressed", "limits changed", "restarted"] {
        assert!(counts.iter().any(|(name, n)| *name == what && *n > steps / 2_000), "{what}: {counts:?}");
    }
}
