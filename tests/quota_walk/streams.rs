//! The walk through the counters of an environment.

use crate::random::{BEGIN, Random, clock_step};
use crate::recount::{MODELS, Origin, Recount, compare, quotas};
use std::collections::HashMap;
use std::time::Duration;
use tollgate::clock::Timestamp;
use tollgate::config::{CompletionReserve, OnOverrun, ReserveSettings, WhenShort};
use tollgate::ledger::{
    Demand, Grant, LimitChange, Local, OverrideOrigin, Progress, QuotaKey, Rules, Settlement,
};
use tollgate::quota::{Amounts, UNLIMITED};

/// A request in flight.
struct Stream {
    origin: Origin,
    grant: Box<Grant>,
    /// Its reservations, by number: the first one and its extensions.
    reservations: Vec<(u64, Amounts)>,
    /// Amounts spent so far.
    spent: Amounts,
}

/// A walk through the counters of one environment.
pub(crate) struct StreamWalk {
    random: Random,
    now: i64,
    rules: Rules,
    local: Local,
    pub(crate) recounts: Vec<Recount>,
    open: Vec<Stream>,
    /// Number of the next reservation.
    next: u64,
    /// Sum of the settled amounts.
    settled: Amounts,
    /// Statistics: how often each kind of step happened.
    pub(crate) counts: HashMap<&'static str, u64>,
}

impl StreamWalk {
    pub(crate) fn new(
        seed: u64,
        completion: CompletionReserve,
        when_short: WhenShort,
        enforce: bool,
    ) -> Self {
        let (quantile, on_overrun, max_wait) = (0.9, OnOverrun::Finish, Duration::ZERO);
        let default_max_tokens = 300;
        let reserve = ReserveSettings {
            prompt: true,
            completion,
            quantile,
            default_max_tokens,
            when_short,
            on_overrun,
            max_wait,
        };
        let rules = Rules { reserve, enforce, max_in_flight: None };
        Self {
            random: Random(seed),
            now: BEGIN,
            local: Local::new(rules.clone(), &quotas(), Timestamp(BEGIN)),
            rules,
            recounts: quotas().into_iter().map(|q| Recount::new(q, BEGIN)).collect(),
            open: Vec::new(),
            next: 0,
            settled: Amounts::default(),
            counts: HashMap::new(),
        }
    }

    fn note(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn advance(&mut self) {
        self.recounts.iter_mut().for_each(|r| r.advance(self.now));
    }

    fn admit(&mut self) {
        let origin = Origin::random(&mut self.random);
        let cap = (self.random.below(3) > 0).then(|| 1 + self.random.below(500));
        let completions = 1 + self.random.below(4) / 3;
        let demand = Demand {
            subject: origin.subject(),
            prompt: self.random.below(300),
            generates: true,
            cap,
            completions,
            backends: &[],
            may_clamp: true,
        };
        self.advance();
        let fits = |recounts: &[Recount], amounts: Amounts| {
            let mut applicable = recounts.iter().filter(|r| r.applies_to(origin));
            applicable.all(|r| r.fits(i128::from(amounts.of(r.quota.kind))))
        };
        let requested = match self.rules.reserve.completion {
            CompletionReserve::MaxTokens => Some(cap.unwrap_or(300 * completions)),
            CompletionReserve::Fixed(tokens) => Some(tokens),
            CompletionReserve::None => Some(0),
            CompletionReserve::Adaptive => None,
        };
        let requested_fits =
            requested.map(|tokens| fits(&self.recounts, Amounts::of_request(demand.prompt, tokens)));
        let Ok(admission) = self.local.admit(Timestamp(self.now), &demand) else {
            assert!(
                self.rules.enforce && requested_fits != Some(true),
                "the engine denied the request, the recount admits it"
            );
            self.note("denied");
            return;
        };
        let reserved = admission.grant.reserved();
        assert_eq!(reserved, Amounts::of_request(demand.prompt, reserved.completion));
        assert!(
            fits(&self.recounts, reserved) || !self.rules.enforce,
            "the engine admitted the request, the recount denies it"
        );
        if let Some(each) = admission.clamped_to {
            assert_eq!(reserved.completion, each * completions);
            assert!(self.rules.enforce && requested_fits != Some(true) && each >= 16);
            self.note("clamped");
        } else if let Some(tokens) = requested {
            assert_eq!(reserved.completion, tokens);
        }
        if admission.would_deny.is_some() {
            assert!(!self.rules.enforce && requested_fits != Some(true));
            self.note("would be denied");
        }
        let id = self.next;
        self.next += 1;
        self.recounts.iter_mut().filter(|r| r.applies_to(origin)).for_each(|r| r.hold(id, reserved));
        let spent = Amounts::of_request(self.random.below(300), 0);
        self.open.push(Stream { origin, grant: admission.grant, reservations: vec![(id, reserved)], spent });
        self.note("admitted");
    }

    /// Continues a stream: its spent amounts grow.
    fn progress(&mut self) {
        let Some(at) = self.pick() else { return };
        let tokens = self.random.below(120);
        let is_reserving = self.rules.reserve.completion != CompletionReserve::None;
        self.advance();
        let stream = &mut self.open[at];
        let origin = stream.origin;
        stream.spent = Amounts::of_request(stream.spent.prompt, stream.spent.completion + tokens);
        let before = stream.grant.reserved();
        let missing = stream.spent.completion.saturating_sub(before.completion);
        let more = |tokens| Amounts { completion: tokens, total: tokens, ..Amounts::default() };
        let first = stream.reservations[0].0;
        let fits = |tokens: u64| {
            self.recounts.iter().all(|r| r.fits_more(first, i128::from(more(tokens).of(r.quota.kind))))
        };
        let missing_fits = fits(missing);
        let (now, model) = (Timestamp(self.now), MODELS[origin.model]);
        let outcome = self.local.progress(now, model, &mut stream.grant, stream.spent);
        let grown = stream.grant.reserved().saturating_sub(before);
        assert_eq!(grown, more(grown.completion));
        if missing == 0 || !is_reserving {
            assert_eq!((outcome, grown), (Progress::Within, Amounts::default()));
        } else {
            let expected = match (missing_fits, self.rules.enforce) {
                (true, _) => Progress::Within,
                (false, true) => Progress::Overrun,
                (false, false) => Progress::OverrunInShadow,
            };
            assert_eq!(outcome, expected, "the engine and the recount differ about an extension");
            assert!(grown.completion >= missing && (fits(grown.completion) || !missing_fits));
            assert!(grown.completion == missing || stream.grant.reserved().completion <= stream.grant.cap());
            let id = self.next;
            self.next += 1;
            self.recounts.iter_mut().for_each(|r| r.hold_more(first, id, grown));
            stream.reservations.push((id, grown));
        }
        let mut left = stream.spent;
        for &(id, reserved) in &stream.reservations {
            self.recounts.iter_mut().for_each(|r| r.progress(id, i128::from(left.of(r.quota.kind))));
            left = left.saturating_sub(reserved);
        }
        if grown.completion > 0 {
            self.note(if outcome == Progress::Within { "extended" } else { "overrun" });
        }
        self.note("progressed");
    }

    pub(crate) fn settle_all(&mut self) {
        while !self.open.is_empty() {
            self.settle();
        }
    }

    fn pick(&mut self) -> Option<usize> {
        let open = self.open.len() as u64;
        (open > 0).then(|| usize::try_from(self.random.below(open)).unwrap())
    }

    fn settle(&mut self) {
        let Some(at) = self.pick() else { return };
        let Stream { origin, grant, reservations, spent } = self.open.swap_remove(at);
        let spent = match self.random.below(4) {
            0 => Amounts::default(),
            1 => Amounts::of_request(self.random.below(350), self.random.below(600)),
            _ => spent,
        };
        let is_complete = self.random.below(2) == 0;
        self.advance();
        self.local.settle(Timestamp(self.now), origin.subject(), grant, Settlement { spent, is_complete });
        let mut left = spent;
        for (n, &(id, reserved)) in (1..).zip(&reservations) {
            let part = if n == reservations.len() { left } else { left.min(reserved) };
            left = left.saturating_sub(part);
            self.recounts.iter_mut().for_each(|r| r.settle(id, i128::from(part.of(r.quota.kind))));
        }
        self.settled = self.settled.saturating_add(spent);
        self.note("settled");
    }

    fn change_limit(&mut self) {
        let at = usize::try_from(self.random.below(self.recounts.len() as u64)).unwrap();
        let original = quotas()[at].clone();
        let mut change = |n: u64| n / 2 + self.random.below(n) + 1;
        let (limit, burst) = (change(original.limit), change(original.capacity()));
        let is_unlimited = self.random.below(5) == 0;
        let (limit, burst) = if is_unlimited { (UNLIMITED, UNLIMITED) } else { (limit, burst) };
        self.advance();
        self.recounts[at].change(original.with_limit(limit, burst));
        let (scope, name) = (original.scope.as_str(), original.scope.name());
        let key = QuotaKey { scope, name, kind: original.kind, per: &original.per.text };
        let change = LimitChange { limit, burst, origin: OverrideOrigin::default() };
        assert!(self.local.set_limit(Timestamp(self.now), key, Some(&change)));
        self.note("limit changed");
    }

    fn reset(&mut self) {
        self.advance();
        self.recounts.iter_mut().for_each(Recount::reset);
        assert!(self.local.reset(Timestamp(self.now), None));
    }

    pub(crate) fn step(&mut self) {
        match self.random.below(1_000) {
            0..200 => self.admit(),
            200..390 => self.settle(),
            390..640 => self.progress(),
            640..997 => {
                let (by, what) = clock_step(&mut self.random);
                self.now += by;
                self.note(what);
            }
            997..999 => self.change_limit(),
            _ => self.reset(),
        }
        if self.open.len() > 40 {
            self.settle();
        }
        self.compare();
    }

    pub(crate) fn compare(&mut self) {
        compare(&self.local.levels(Timestamp(self.now)), &mut self.recounts, self.now);
        let reserved = self.open.iter().map(|stream| stream.grant.reserved());
        assert_eq!(
            self.local.held(),
            reserved.fold(Amounts::default(), Amounts::saturating_add),
            "sum of held amounts"
        );
        let totals = self.local.totals();
        let charged = [totals.requests, totals.prompt, totals.completion, totals.total];
        let Amounts { requests, prompt, completion, total } = self.settled;
        assert_eq!(charged, [requests, prompt, completion, total], "sum of settled amounts");
    }
}
