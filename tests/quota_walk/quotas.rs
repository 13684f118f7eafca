//! The walk through `Quotas`.

use crate::random::{BEGIN, Random, clock_step};
use crate::recount::{Origin, Recount, compare, quotas};
use std::collections::HashMap;
use tollgate::clock::Timestamp;
use tollgate::quota::{
    Amounts, PersistedCounter, Quota, Quotas, Receipt, Required, Takeover, UNLIMITED, Window,
};

/// A walk through the quotas of one environment.
pub(crate) struct QuotaWalk {
    random: Random,
    now: i64,
    engine: Quotas,
    pub(crate) recounts: Vec<Recount>,
    /// Quotas that are currently removed. Their counters continue.
    removed: Vec<Recount>,
    /// Reservations in flight.
    pub(crate) open: Vec<(u64, Receipt)>,
    /// Number of the next reservation.
    next: u64,
    /// Statistics: how often each kind of step happened.
    pub(crate) counts: HashMap<&'static str, u64>,
}

impl QuotaWalk {
    pub(crate) fn new(seed: u64) -> Self {
        let now = BEGIN;
        let recounts = quotas().into_iter().map(|q| Recount::new(q, now)).collect();
        let engine = Quotas::new(&quotas(), Timestamp(now));
        let (removed, open, counts) = (Vec::new(), Vec::new(), HashMap::new());
        Self { random: Random(seed), now, engine, recounts, removed, open, next: 0, counts }
    }

    fn note(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn reserve(&mut self) {
        let origin = Origin::random(&mut self.random);
        let amounts = Amounts::of_request(self.random.below(300), self.random.below(400));
        let now = self.now;
        self.recounts.iter_mut().for_each(|r| r.advance(now));
        let mut applicable = self.recounts.iter().filter(|r| r.applies_to(origin));
        let fits = applicable.all(|r| r.fits(i128::from(amounts.of(r.quota.kind))));
        let required = Required { amounts, generates: true };
        let applicable = self.engine.applicable(origin.subject());
        if let Ok(receipt) = self.engine.reserve(Timestamp(now), &applicable, &required) {
            assert!(fits, "the engine admitted the request, the recount denies it");
            let id = self.next;
            self.recounts.iter_mut().filter(|r| r.applies_to(origin)).for_each(|r| r.hold(id, amounts));
            self.hold(receipt);
            self.note("admitted");
        } else {
            assert!(!fits, "the engine denied the request, the recount admits it");
            self.note("denied");
        }
    }

    fn hold(&mut self, receipt: Receipt) {
        self.open.push((self.next, receipt));
        self.next += 1;
    }

    fn pick(&mut self) -> Option<usize> {
        let open = self.open.len() as u64;
        (open > 0).then(|| usize::try_from(self.random.below(open)).unwrap())
    }

    fn extend(&mut self) {
        let Some(at) = self.pick() else { return };
        let tokens = 1 + self.random.below(200);
        let more = Amounts { completion: tokens, total: tokens, ..Amounts::default() };
        let (now, first) = (self.now, self.open[at].0);
        self.recounts.iter_mut().for_each(|r| r.advance(now));
        let fits = self.recounts.iter().all(|r| r.fits_more(first, i128::from(more.of(r.quota.kind))));
        let extended = self.engine.extend(Timestamp(now), &self.open[at].1, more);
        assert_eq!(extended.is_some(), fits, "the engine and the recount differ about an extension");
        let receipt = match extended {
            Some(receipt) => receipt,
            None if self.random.below(2) == 0 => return,
            None => {
                self.note("overrun");
                self.engine.extend_unchecked(Timestamp(now), &self.open[at].1, more)
            }
        };
        let id = self.next;
        self.recounts.iter_mut().for_each(|r| r.hold_more(first, id, more));
        self.hold(receipt);
        self.note("extended");
    }

    fn progress(&mut self) {
        let Some(at) = self.pick() else { return };
        let spent = Amounts::of_request(self.random.below(300), self.random.below(500));
        let now = Timestamp(self.now);
        let levels = |engine: &mut Quotas| engine.levels(now).iter().map(|l| l.level).collect::<Vec<_>>();
        let before = levels(&mut self.engine);
        let (id, receipt) = &mut self.open[at];
        self.engine.progress(now, receipt, spent);
        assert_eq!(before, levels(&mut self.engine), "reported progress makes no tokens available");
        for r in self.recounts.iter_mut().chain(&mut self.removed) {
            r.advance(now.0);
            r.progress(*id, i128::from(spent.of(r.quota.kind)));
        }
        self.note("progressed");
    }

    pub(crate) fn settle(&mut self) {
        let Some(at) = self.pick() else { return };
        let (id, receipt) = self.open.swap_remove(at);
        let spent = Amounts::of_request(self.random.below(350), self.random.below(600));
        self.engine.settle(Timestamp(self.now), receipt, spent);
        for r in self.recounts.iter_mut().chain(&mut self.removed) {
            r.advance(self.now);
            r.settle(id, i128::from(spent.of(r.quota.kind)));
        }
        self.note("settled");
    }

    fn step_clock(&mut self) {
        let (by, what) = clock_step(&mut self.random);
        self.now += by;
        self.note(what);
    }

    /// Advances the counters on both sides, also those of removed quotas. After a step back of the clock, the amounts
    /// depend on when a counter was advanced.
    fn advance_all(&mut self) {
        self.engine.cell_levels(Timestamp(self.now));
        let now = self.now;
        self.recounts.iter_mut().chain(&mut self.removed).for_each(|r| r.advance(now));
    }

    fn reconfigure(&mut self, all: &[Quota]) {
        self.engine.reconfigure(all, Timestamp(self.now), Takeover::InPlace, |_| None);
    }

    /// Removes a quota, or adds a removed quota, whose counter continues.
    fn add_or_remove_quota(&mut self) {
        let pick = |random: &mut Random, of: usize| usize::try_from(random.below(of as u64)).unwrap();
        if self.removed.is_empty() || self.random.below(2) == 0 && self.recounts.len() > 3 {
            let at = pick(&mut self.random, self.recounts.len());
            // Between quotas of one scope and kind, amounts carry over. `quota/carry_over` has tests of that.
            let Quota { scope, kind, .. } = &self.recounts[at].quota;
            if quotas().iter().filter(|other| (&other.scope, &other.kind) == (scope, kind)).count() > 1 {
                return;
            }
            self.removed.push(self.recounts.remove(at));
        } else {
            let at = pick(&mut self.random, self.removed.len());
            let to = pick(&mut self.random, self.recounts.len() + 1);
            self.recounts.insert(to, self.removed.swap_remove(at));
        }
        self.recounts.iter_mut().for_each(|r| r.advance(self.now));
        let all: Vec<Quota> = self.recounts.iter().map(|r| r.quota.clone()).collect();
        self.reconfigure(&all);
        self.note("quotas changed");
    }

    /// Changes the limits and the order of the quotas, and makes some unlimited. The counters continue.
    fn change_limits(&mut self) {
        let original = quotas();
        let mut all: Vec<Quota> = self.recounts.iter().map(|r| r.quota.clone()).collect();
        for quota in &mut all {
            let before = original.iter().find(|q| q.is_same_as(quota)).unwrap();
            let mut change = |n: u64| n / 2 + self.random.below(n) + 1;
            let limit = change(before.limit);
            *quota = quota.with_limit(limit, limit);
            if let Window::Rolling { burst } = &mut quota.window {
                *burst = change(before.capacity());
            }
            if self.random.below(5) == 0 {
                *quota = quota.with_limit(UNLIMITED, UNLIMITED);
            }
        }
        let shift = usize::try_from(self.random.below(all.len() as u64)).unwrap();
        self.recounts.iter_mut().for_each(|r| r.advance(self.now));
        self.recounts.iter_mut().zip(&all).for_each(|(r, quota)| r.change(quota.clone()));
        all.rotate_left(shift);
        self.recounts.rotate_left(shift);
        self.reconfigure(&all);
        self.note("limits changed");
    }

    fn restart(&mut self) {
        self.engine.levels(Timestamp(self.now));
        let mut persisted: Vec<(Quota, PersistedCounter)> = Vec::new();
        // `reconfigure` marks all counters as changed, so that all are persisted.
        let all: Vec<Quota> = self.recounts.iter().map(|r| r.quota.clone()).collect();
        self.reconfigure(&all);
        self.engine.take_changes(|quota, counter| persisted.push((quota.clone(), counter)));
        assert!(all.iter().all(|quota| persisted.iter().any(|(known, _)| known.is_same_as(quota))));
        // A counter that the config does not have is not restored.
        self.removed.iter_mut().for_each(|r| *r = Recount::new(r.quota.clone(), self.now));
        self.recounts.iter_mut().for_each(|r| r.advance(self.now));
        self.recounts.iter_mut().for_each(Recount::restart);
        self.open.clear();
        self.engine = Quotas::new(&all, Timestamp(self.now));
        self.engine.restore(Timestamp(self.now), &persisted, |_| false);
        self.note("restarted");
    }

    pub(crate) fn compare(&mut self) {
        compare(&self.engine.levels(Timestamp(self.now)), &mut self.recounts, self.now);
    }

    pub(crate) fn step(&mut self) {
        match self.random.below(1_000) {
            0..300 => self.reserve(),
            300..500 => self.settle(),
            500..560 => self.extend(),
            560..680 => self.progress(),
            680..997 => self.step_clock(),
            997 => self.change_limits(),
            998 => self.add_or_remove_quota(),
            _ => self.restart(),
        }
        if !self.removed.is_empty() {
            self.advance_all();
        }
        // Too many requests in flight would exhaust all quotas.
        if self.open.len() > 40 {
            self.settle();
        }
        self.compare();
    }
}
