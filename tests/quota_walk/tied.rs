//! The walk through environments that share upstreams with quotas.

use crate::random::{BEGIN, DAY, Random, clock_step};
use crate::recount::{MODELS, Origin, Recount, compare, quota, quotas};
use std::collections::HashMap;
use std::time::Duration;
use tollgate::clock::Timestamp;
use tollgate::config::{
    CompletionReserve, Config, OnOverrun, ReserveSettings, UpstreamSettings, WhenShort, parse,
};
use tollgate::glob::Glob;
use tollgate::ledger::{
    Backing, Demand, Grant, LimitChange, Local, OverrideOrigin, Progress, QuotaKey, Rules, Settlement,
};
use tollgate::quota::{Amounts, Kind, Quota, Scope, UNLIMITED, UpstreamModels, Window};

/// A request in flight.
struct Stream {
    environment: usize,
    upstream: usize,
    origin: Origin,
    grant: Box<Grant>,
    at_upstream: Box<Grant>,
    /// Its reservations, by number: the first one and its extensions.
    reservations: Vec<(u64, Amounts)>,
    /// Amounts spent so far.
    spent: Amounts,
}

/// The counters of an environment or of an upstream, and their recount.
struct Member {
    local: Local,
    recounts: Vec<Recount>,
    settled: Amounts,
}

impl Member {
    fn new(local: Local, quotas: Vec<Quota>) -> Self {
        let recounts = quotas.into_iter().map(|quota| Recount::new(quota, BEGIN)).collect();
        Self { local, recounts, settled: Amounts::default() }
    }

    fn fits(&self, origin: Origin, amounts: Amounts) -> bool {
        let mut applicable = self.recounts.iter().filter(|recount| recount.applies_to(origin));
        applicable.all(|recount| recount.fits(i128::from(amounts.of(recount.quota.kind))))
    }

    fn fits_more(&self, first: u64, more: Amounts) -> bool {
        let fits = |recount: &Recount| recount.fits_more(first, i128::from(more.of(recount.quota.kind)));
        self.recounts.iter().all(fits)
    }

    fn settle(&mut self, reservations: &[(u64, Amounts)], spent: Amounts) {
        let mut left = spent;
        for (n, &(id, reserved)) in (1..).zip(reservations) {
            let part = if n == reservations.len() { left } else { left.min(reserved) };
            left = left.saturating_sub(part);
            self.recounts.iter_mut().for_each(|r| r.settle(id, i128::from(part.of(r.quota.kind))));
        }
        self.settled = self.settled.saturating_add(spent);
    }

    fn progress(&mut self, reservations: &[(u64, Amounts)], spent: Amounts) {
        let mut left = spent;
        for &(id, reserved) in reservations {
            self.recounts.iter_mut().for_each(|r| r.progress(id, i128::from(left.of(r.quota.kind))));
            left = left.saturating_sub(reserved);
        }
    }
}

/// Three environments, of which the last is in shadow mode, and two upstreams.
pub(crate) struct TiedWalk {
    random: Random,
    now: i64,
    environments: Vec<Member>,
    upstreams: Vec<Member>,
    completion: CompletionReserve,
    when_short: WhenShort,
    open: Vec<Stream>,
    /// Number of the next reservation.
    next: u64,
    /// Statistics: how often each kind of step happened.
    pub(crate) counts: HashMap<&'static str, u64>,
}

const SHADOW: usize = 2;

/// The quotas of an upstream.
fn upstream_quotas(name: &str) -> Vec<Quota> {
    let rolling = |burst| Window::Rolling { burst };
    let models = |pattern: &str| Scope::UpstreamModel(UpstreamModels::new(name, Glob::new(pattern)));
    let all = || Scope::Upstream(name.into());
    vec![
        quota(all(), Kind::TotalTokens, 90_000, 60_000, rolling(6_000)),
        quota(all(), Kind::Requests, 150, 60_000, rolling(60)),
        quota(all(), Kind::CompletionTokens, 800_000, DAY.cast_unsigned(), rolling(800_000)),
        quota(models("m-*"), Kind::TotalTokens, 50_000, 60_000, rolling(4_000)),
    ]
}

fn upstream_settings(name: &str) -> UpstreamSettings {
    let text = format!(
        "upstreams: {{ {name}: {{ base_url: http://u/v1 }} }}\nenvironments: {{ e: {{ upstream: {name} }} }}\nstore: {{ memory: true }}\n"
    );
    let loaded = parse(&text, "walk.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    let Config { upstreams, .. } = loaded.config;
    UpstreamSettings { quotas: upstream_quotas(name), ..(*upstreams[0]).clone() }
}

impl TiedWalk {
    pub(crate) fn new(seed: u64, completion: CompletionReserve, when_short: WhenShort) -> Self {
        let reserve = ReserveSettings {
            prompt: true,
            completion,
            quantile: 0.9,
            default_max_tokens: 300,
            when_short,
            on_overrun: OnOverrun::Finish,
            max_wait: Duration::ZERO,
        };
        let now = Timestamp(BEGIN);
        let environment = |index| {
            let rules = Rules { reserve, enforce: index != SHADOW, max_in_flight: None };
            Member::new(Local::new(rules, &quotas(), now), quotas())
        };
        let upstream = |name| {
            let settings = upstream_settings(name);
            Member::new(Local::of_upstream(&settings, now), settings.quotas)
        };
        Self {
            random: Random(seed),
            now: BEGIN,
            environments: (0..3).map(environment).collect(),
            upstreams: ["one", "two"].map(upstream).into(),
            completion,
            when_short,
            open: Vec::new(),
            next: 0,
            counts: HashMap::new(),
        }
    }

    fn note(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn advance(&mut self) {
        let all = self.environments.iter_mut().chain(&mut self.upstreams);
        all.for_each(|member| member.recounts.iter_mut().for_each(|recount| recount.advance(self.now)));
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.random.below(n as u64)).unwrap()
    }

    fn admit(&mut self) {
        let origin = Origin::random(&mut self.random);
        let (environment, upstream) = (self.below(3), self.below(2));
        let cap = (self.random.below(3) > 0).then(|| 1 + self.random.below(500));
        let demand = Demand {
            subject: origin.subject(),
            prompt: self.random.below(300),
            generates: true,
            cap,
            completions: 1,
            backends: &[],
            may_clamp: true,
        };
        self.advance();
        let (own, other) = (&mut self.environments[environment], &mut self.upstreams[upstream]);
        let requested = match self.completion {
            CompletionReserve::MaxTokens => Some(cap.unwrap_or(300)),
            CompletionReserve::Fixed(tokens) => Some(tokens),
            CompletionReserve::None => Some(0),
            CompletionReserve::Adaptive => None,
        };
        let is_shadow = environment == SHADOW;
        // Whether the amounts fit in the environment, and in the upstream.
        let fit =
            |own: &Member, other: &Member, amounts| (own.fits(origin, amounts), other.fits(origin, amounts));
        let requested_fits =
            requested.map(|tokens| fit(own, other, Amounts::of_request(demand.prompt, tokens)));
        let admits = |(own, other): (bool, bool)| other && (own || is_shadow);
        let mut backing = Backing::new(&mut other.local, MODELS[origin.model]);
        let admitted = own.local.try_admit_at(Timestamp(self.now), &demand, Some(&mut backing));
        let Ok(admission) = admitted else {
            assert!(
                requested_fits.is_none_or(|fits| !admits(fits)),
                "the engine denied it, the recount admits it"
            );
            let is_due_to_upstream = requested_fits == Some((true, false));
            self.note(if is_due_to_upstream { "denied by the upstream alone" } else { "denied" });
            return;
        };
        let reserved = admission.grant.reserved();
        assert_eq!(reserved, Amounts::of_request(demand.prompt, reserved.completion));
        let fits = fit(own, other, reserved);
        assert!(admits(fits), "the engine admitted it, the recount denies it");
        // With clamping, a request that could be clamped would not be denied.
        let would_deny = admission.would_deny.is_some();
        assert!(!would_deny || is_shadow && !fits.0);
        assert!(would_deny || !is_shadow || fits.0 || self.when_short == WhenShort::Clamp);
        let clamped = admission.clamped_to;
        if let Some(each) = clamped {
            assert!(!is_shadow && each == reserved.completion && each >= 16);
            assert!(requested_fits.is_none_or(|fits| !admits(fits)));
        } else if let Some(tokens) = requested {
            assert_eq!(reserved.completion, tokens);
        }
        let at_upstream = admission.upstream.expect("the upstream has quotas");
        assert_eq!(at_upstream.reserved(), reserved);
        let id = self.next;
        self.next += 1;
        for member in [own, other] {
            member.recounts.iter_mut().filter(|r| r.applies_to(origin)).for_each(|r| r.hold(id, reserved));
        }
        let spent = Amounts::of_request(self.random.below(300), 0);
        self.open.push(Stream {
            environment,
            upstream,
            origin,
            grant: admission.grant,
            at_upstream,
            reservations: vec![(id, reserved)],
            spent,
        });
        self.note(if clamped.is_some() { "clamped" } else { "admitted" });
    }

    /// Continues a stream: its spent amounts grow.
    fn progress(&mut self) {
        let Some(at) = self.pick() else { return };
        let tokens = self.random.below(120);
        self.advance();
        let stream = &mut self.open[at];
        let (own, other) = (&mut self.environments[stream.environment], &mut self.upstreams[stream.upstream]);
        stream.spent = Amounts::of_request(stream.spent.prompt, stream.spent.completion + tokens);
        let before = stream.grant.reserved();
        let missing = stream.spent.completion.saturating_sub(before.completion);
        let more = |tokens| Amounts { completion: tokens, total: tokens, ..Amounts::default() };
        let first = stream.reservations[0].0;
        let missing_fits = own.fits_more(first, more(missing)) && other.fits_more(first, more(missing));
        let model = MODELS[stream.origin.model];
        let backing = Some((&mut other.local, &mut *stream.at_upstream));
        let outcome =
            own.local.progress_at(Timestamp(self.now), model, &mut stream.grant, stream.spent, backing);
        let grown = stream.grant.reserved().saturating_sub(before);
        assert_eq!(stream.at_upstream.reserved(), stream.grant.reserved(), "both parts are the same");
        if missing == 0 || self.completion == CompletionReserve::None {
            assert_eq!((outcome, grown), (Progress::Within, Amounts::default()));
        } else {
            let is_bound = stream.environment != SHADOW || !other.fits_more(first, more(missing));
            let expected = match (missing_fits, is_bound) {
                (true, _) => Progress::Within,
                (false, true) => Progress::Overrun,
                (false, false) => Progress::OverrunInShadow,
            };
            assert_eq!(outcome, expected, "about an extension");
            let fits = own.fits_more(first, grown) && other.fits_more(first, grown);
            assert!(grown.completion >= missing && (fits || !missing_fits));
            let id = self.next;
            self.next += 1;
            for member in [&mut *own, &mut *other] {
                member.recounts.iter_mut().for_each(|r| r.hold_more(first, id, grown));
            }
            stream.reservations.push((id, grown));
        }
        own.progress(&stream.reservations, stream.spent);
        other.progress(&stream.reservations, stream.spent);
        if grown.completion > 0 {
            self.note(if outcome == Progress::Within { "extended" } else { "overrun" });
        }
    }

    fn pick(&mut self) -> Option<usize> {
        let open = self.open.len();
        (open > 0).then(|| self.below(open))
    }

    fn settle(&mut self) {
        let Some(at) = self.pick() else { return };
        let stream = self.open.swap_remove(at);
        let spent = match self.random.below(4) {
            0 => Amounts::default(),
            1 => Amounts::of_request(self.random.below(350), self.random.below(600)),
            _ => stream.spent,
        };
        self.advance();
        let (own, other) = (&mut self.environments[stream.environment], &mut self.upstreams[stream.upstream]);
        let (now, settlement) = (Timestamp(self.now), Settlement { spent, is_complete: true });
        own.local.settle(now, stream.origin.subject(), stream.grant, settlement);
        other.local.settle_backing(now, stream.at_upstream, spent);
        own.settle(&stream.reservations, spent);
        other.settle(&stream.reservations, spent);
        self.note("settled");
    }

    pub(crate) fn settle_all(&mut self) {
        while !self.open.is_empty() {
            self.settle();
        }
    }

    /// Changes a limit of an upstream.
    fn change_limit(&mut self) {
        let (at, quota) = (self.below(2), self.below(4));
        let original = upstream_quotas(["one", "two"][at])[quota].clone();
        let mut change = |n: u64| n / 2 + self.random.below(n) + 1;
        let (limit, burst) = (change(original.limit), change(original.capacity()));
        let is_unlimited = self.random.below(5) == 0;
        let (limit, burst) = if is_unlimited { (UNLIMITED, UNLIMITED) } else { (limit, burst) };
        self.advance();
        let upstream = &mut self.upstreams[at];
        upstream.recounts[quota].change(original.with_limit(limit, burst));
        let (scope, name) = (original.scope.as_str(), original.scope.name());
        let key = QuotaKey { scope, name, kind: original.kind, per: &original.per.text };
        let change = LimitChange { limit, burst, origin: OverrideOrigin::default() };
        assert!(upstream.local.set_limit(Timestamp(self.now), key, Some(&change)));
        self.note("limit changed");
    }

    pub(crate) fn step(&mut self) {
        match self.random.below(1_000) {
            0..220 => self.admit(),
            220..420 => self.settle(),
            420..640 => self.progress(),
            640..998 => self.now += clock_step(&mut self.random).0,
            _ => self.change_limit(),
        }
        if self.open.len() > 60 {
            self.settle();
        }
        self.compare();
    }

    pub(crate) fn compare(&mut self) {
        let open = &self.open;
        let of_environment = |stream: &&Stream, at| stream.environment == at;
        let of_upstream = |stream: &&Stream, at| stream.upstream == at;
        let now = self.now;
        let check = |members: &mut Vec<Member>, belongs: &dyn Fn(&&Stream, usize) -> bool| {
            for (at, member) in members.iter_mut().enumerate() {
                compare(&member.local.levels(Timestamp(now)), &mut member.recounts, now);
                let reserved = open.iter().filter(|s| belongs(s, at)).map(|s| s.grant.reserved());
                let held = reserved.fold(Amounts::default(), Amounts::saturating_add);
                assert_eq!(member.local.held(), held, "sum of held amounts");
                let totals = member.local.totals();
                let charged = [totals.requests, totals.prompt, totals.completion, totals.total];
                let Amounts { requests, prompt, completion, total } = member.settled;
                assert_eq!(charged, [requests, prompt, completion, total], "sum of settled amounts");
            }
        };
        check(&mut self.environments, &of_environment);
        check(&mut self.upstreams, &of_upstream);
    }

    pub(crate) fn holds_nothing(&self) -> bool {
        let all = self.environments.iter().chain(&self.upstreams);
        all.flat_map(|member| &member.recounts).all(|recount| recount.held() == 0)
    }
}
