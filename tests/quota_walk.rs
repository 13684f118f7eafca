//! Long random walks through the quota engine beside a recount that shares nothing with it.
//!
//! The first drives the quotas: reserve, settle, extend, progress, clock steps either way, changed limits,
//! quotas that come and go, restarts. The second drives the counters of an environment, which decide what
//! is reserved: allowances, clamping, streams that are extended, overruns, quotas that only watch.
//!
//! A million steps each; `TOLLGATE_WALK_STEPS` says otherwise.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_wrap)]

use jiff::tz::TimeZone;
use std::collections::HashMap;
use std::time::Duration;
use tollgate::clock::Timestamp;
use tollgate::config::{CompletionReserve, OnOverrun, ReserveSettings, WhenShort};
use tollgate::glob::Glob;
use tollgate::ledger::{Demand, Grant, Local, Progress, QuotaKey, Rules, Settlement};
use tollgate::quota::{
    Amounts, ClockUnit, Kind, Period, PersistedCounter, Quota, QuotaLevel, Quotas, Receipt, Required, Scope,
    Subject, Window,
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
    Quota { scope, kind, limit, per: Period { text: format!("{ms}ms"), ms }, window }
}

fn quotas() -> Vec<Quota> {
    let rolling = |burst| Window::Rolling { burst };
    let calendar = |unit, zone: &str| Window::Calendar { unit, zone: TimeZone::get(zone).unwrap() };
    let day = calendar(ClockUnit::Day, "Europe/Berlin");
    let month = calendar(ClockUnit::Month, "America/New_York");
    let caller = |n: usize| Scope::Caller(n, format!("caller-{n}"));
    let model = |pattern: &str| Scope::Model(Glob::new(pattern));
    vec![
        quota(Scope::Environment, Kind::TotalTokens, 60_000, 60_000, rolling(4_000)),
        quota(Scope::Environment, Kind::PromptTokens, 700, 1_000, rolling(900)),
        quota(Scope::Environment, Kind::CompletionTokens, 100_000, 3_600_000, rolling(100_000)),
        quota(Scope::Environment, Kind::Requests, 97, 60_000, rolling(50)),
        quota(Scope::Environment, Kind::TotalTokens, 900_000, DAY.cast_unsigned(), day),
        quota(caller(0), Kind::TotalTokens, 30_000, 60_000, rolling(2_000)),
        quota(caller(1), Kind::Requests, 7, 1_000, rolling(7)),
        quota(model("m-*"), Kind::CompletionTokens, 50_000, 60_000, rolling(3_000)),
        quota(model("m-1"), Kind::TotalTokens, 2_000_000, 30 * DAY.cast_unsigned(), month),
    ]
}

/// One quota, recounted: what is held is added up from a list whenever it is asked for.
struct Recount {
    quota: Quota,
    /// Spent and not yet back; of a rolling quota in 1/period tokens.
    spent: i128,
    at: i64,
    turn: u64,
    /// Of a calendar quota: its period.
    period: (i64, i64),
    open: HashMap<u64, Hold>,
}

const MODELS: [&str; 3] = ["m-1", "m-2", "other"];

/// Who asks: a caller and a model, by number.
#[derive(Clone, Copy)]
struct Who(u64, usize);

impl Who {
    fn any(dice: &mut Dice) -> Self {
        Self(dice.below(CALLERS), usize::try_from(dice.below(MODELS.len() as u64)).unwrap())
    }

    fn subject(self) -> Subject<'static> {
        Subject { caller: usize::try_from(self.0).ok(), model: MODELS[self.1] }
    }
}

/// The day or month that a moment lies in, from midnight to midnight.
fn period_of(quota: &Quota, now: i64) -> (i64, i64) {
    let Window::Calendar { unit, zone } = &quota.window else { return (0, 0) };
    let day = jiff::Timestamp::from_millisecond(now)
        .unwrap()
        .to_zoned_datetime(zone.clone())
        .start_of_day()
        .unwrap();
    let (start, span) = match unit {
        ClockUnit::Day => (day, jiff::Span::new().days(1)),
        ClockUnit::Month => (day.first_of_month().unwrap(), jiff::Span::new().months(1)),
        _ => panic!("{unit:?}"),
    };
    let end = start.checked_add(span).unwrap();
    (start.timestamp().as_millisecond(), end.timestamp().as_millisecond())
}

#[derive(Clone, Copy)]
struct Hold {
    reserved: i128,
    moved: i128,
    turn: u64,
}

impl Recount {
    fn new(quota: Quota, now: i64) -> Self {
        let period = period_of(&quota, now);
        Self { quota, spent: 0, at: now, turn: 0, period, open: HashMap::new() }
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
        } else if !(self.period.0..self.period.1).contains(&now) {
            let before = std::mem::replace(&mut self.period, period_of(&self.quota, now));
            if self.period.0 > before.0 {
                self.turn += 1;
                self.spent = 0;
            }
        }
        self.at = now;
    }

    fn touches(&self, Who(caller, model): Who) -> bool {
        match &self.quota.scope {
            Scope::Caller(index, _) => *index as u64 == caller,
            Scope::Model(pattern) => {
                pattern.as_str() == MODELS[model] || model < 2 && pattern.as_str() == "m-*"
            }
            Scope::Environment => true,
        }
    }

    fn hold(&mut self, id: u64, amounts: Amounts) {
        let reserved = i128::from(amounts.of(self.quota.kind));
        self.open.insert(id, Hold { reserved, moved: 0, turn: self.turn });
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

/// The day before clocks go forward in Europe, and the last one but three of a month.
const BEGIN: i64 = 1_774_700_000_000;

fn clock_step(dice: &mut Dice) -> (i64, &'static str) {
    match dice.below(400) {
        0 => (-1_000, "stepped back"),
        1 => (-3_600_000, "stepped back"),
        2 => (-DAY, "stepped back"),
        3 => (3_600_000, "stepped on"),
        4 => (DAY, "stepped on"),
        _ => (dice.below(1_500).cast_signed(), "went on"),
    }
}

fn compare(levels: &[QuotaLevel], recounts: &mut [Recount], now: i64) {
    assert_eq!(levels.len(), recounts.len());
    for (shown, r) in levels.iter().zip(recounts) {
        r.advance(now);
        let what = &r.quota;
        assert_eq!(shown.quota, *what);
        assert_eq!(i128::from(shown.held), r.held(), "held of {what:?}");
        assert_eq!(i128::from(shown.level), r.left().div_euclid(r.scale()), "level of {what:?}");
        assert!(r.spent >= 0, "spent of {what:?}");
        assert!(shown.level.saturating_add_unsigned(shown.held) <= what.capacity() as i64);
    }
}

struct Walk {
    dice: Dice,
    now: i64,
    engine: Quotas,
    recounts: Vec<Recount>,
    /// Quotas that are gone for now.
    gone: Vec<Quota>,
    open: Vec<(u64, Receipt)>,
    next: u64,
    counts: HashMap<&'static str, u64>,
}

impl Walk {
    fn new(seed: u64) -> Self {
        let now = BEGIN;
        let recounts = quotas().into_iter().map(|q| Recount::new(q, now)).collect();
        let engine = Quotas::new(&quotas(), Timestamp(now));
        let (gone, open, counts) = (Vec::new(), Vec::new(), HashMap::new());
        Self { dice: Dice(seed), now, engine, recounts, gone, open, next: 0, counts }
    }

    fn note(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn reserve(&mut self) {
        let who = Who::any(&mut self.dice);
        let amounts = Amounts::of_request(self.dice.below(300), self.dice.below(400));
        let now = self.now;
        self.recounts.iter_mut().for_each(|r| r.advance(now));
        let mut touched = self.recounts.iter().filter(|r| r.touches(who));
        let fits = touched.all(|r| r.fits(i128::from(amounts.of(r.quota.kind))));
        let required = Required { amounts, generates: true };
        if let Ok(receipt) = self.engine.reserve(Timestamp(now), who.subject(), &required) {
            assert!(fits, "admitted against the recount");
            let id = self.next;
            self.recounts.iter_mut().filter(|r| r.touches(who)).for_each(|r| r.hold(id, amounts));
            self.hold(receipt);
            self.note("admitted");
        } else {
            assert!(!fits, "denied against the recount");
            self.note("denied");
        }
    }

    fn hold(&mut self, receipt: Receipt) {
        self.open.push((self.next, receipt));
        self.next += 1;
    }

    fn pick(&mut self) -> Option<usize> {
        let open = self.open.len() as u64;
        (open > 0).then(|| usize::try_from(self.dice.below(open)).unwrap())
    }

    fn extend(&mut self) {
        let Some(at) = self.pick() else { return };
        let tokens = 1 + self.dice.below(200);
        let more = Amounts { completion: tokens, total: tokens, ..Amounts::default() };
        let (now, first) = (self.now, self.open[at].0);
        self.recounts.iter_mut().for_each(|r| r.advance(now));
        let mut touched = self.recounts.iter().filter(|r| r.open.contains_key(&first));
        let fits = touched.all(|r| {
            let amount = i128::from(more.of(r.quota.kind));
            amount == 0 || r.fits(amount)
        });
        let extended = self.engine.extend(Timestamp(now), &self.open[at].1, more);
        assert_eq!(extended.is_some(), fits, "extended against the recount");
        let receipt = match extended {
            Some(receipt) => receipt,
            None if self.dice.below(2) == 0 => return,
            None => {
                self.note("overrun");
                self.engine.extend_unchecked(Timestamp(now), &self.open[at].1, more)
            }
        };
        let id = self.next;
        let touched = self.recounts.iter_mut().filter(|r| r.open.contains_key(&first));
        touched.for_each(|r| r.hold(id, more));
        self.hold(receipt);
        self.note("extended");
    }

    fn progress(&mut self) {
        let Some(at) = self.pick() else { return };
        let spent = Amounts::of_request(self.dice.below(300), self.dice.below(500));
        let now = Timestamp(self.now);
        let levels = |engine: &mut Quotas| engine.levels(now).iter().map(|l| l.level).collect::<Vec<_>>();
        let before = levels(&mut self.engine);
        let (id, receipt) = &mut self.open[at];
        self.engine.progress(now, receipt, spent);
        assert_eq!(before, levels(&mut self.engine), "progress gives no room by itself");
        for r in &mut self.recounts {
            r.advance(now.0);
            r.progress(*id, i128::from(spent.of(r.quota.kind)));
        }
        self.note("progressed");
    }

    fn settle(&mut self) {
        let Some(at) = self.pick() else { return };
        let (id, receipt) = self.open.swap_remove(at);
        let spent = Amounts::of_request(self.dice.below(350), self.dice.below(600));
        self.engine.settle(Timestamp(self.now), receipt, spent);
        for r in &mut self.recounts {
            r.advance(self.now);
            r.settle(id, i128::from(spent.of(r.quota.kind)));
        }
        self.note("settled");
    }

    fn step_clock(&mut self) {
        let (by, what) = clock_step(&mut self.dice);
        self.now += by;
        self.note(what);
    }

    /// A quota goes, with all that is held in it, or comes back, full.
    fn come_and_go(&mut self) {
        let pick = |dice: &mut Dice, of: usize| usize::try_from(dice.below(of as u64)).unwrap();
        if self.gone.is_empty() || self.dice.below(2) == 0 && self.recounts.len() > 3 {
            let at = pick(&mut self.dice, self.recounts.len());
            self.gone.push(self.recounts.remove(at).quota);
        } else {
            let at = pick(&mut self.dice, self.gone.len());
            let to = pick(&mut self.dice, self.recounts.len() + 1);
            self.recounts.insert(to, Recount::new(self.gone.swap_remove(at), self.now));
        }
        self.recounts.iter_mut().for_each(|r| r.advance(self.now));
        let all: Vec<Quota> = self.recounts.iter().map(|r| r.quota.clone()).collect();
        self.engine.set_quotas(&all, Timestamp(self.now));
        self.note("came and went");
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
        let mut kept: Vec<(Quota, PersistedCounter)> = Vec::new();
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
        compare(&self.engine.levels(Timestamp(self.now)), &mut self.recounts, self.now);
    }

    fn step(&mut self) {
        match self.dice.below(1_000) {
            0..300 => self.reserve(),
            300..500 => self.settle(),
            500..560 => self.extend(),
            560..680 => self.progress(),
            680..997 => self.step_clock(),
            997 => self.change_limits(),
            998 => self.come_and_go(),
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
    let steps = steps();
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
    for what in [
        "admitted",
        "denied",
        "settled",
        "extended",
        "overrun",
        "progressed",
        "limits changed",
        "came and went",
        "restarted",
    ] {
        assert!(counts.iter().any(|(name, n)| *name == what && *n > steps / 2_000), "{what}: {counts:?}");
    }
}

fn steps() -> u64 {
    std::env::var("TOLLGATE_WALK_STEPS").map_or(1_000_000, |n| n.parse().unwrap())
}

/// A request under way, and what was reserved for it piece by piece.
struct Stream {
    who: Who,
    grant: Grant,
    pieces: Vec<(u64, Amounts)>,
    spent: Amounts,
}

/// A walk through the counters of one environment.
struct Streams {
    dice: Dice,
    now: i64,
    rules: Rules,
    local: Local,
    recounts: Vec<Recount>,
    open: Vec<Stream>,
    next: u64,
    settled: Amounts,
    counts: HashMap<&'static str, u64>,
}

impl Streams {
    fn new(seed: u64, completion: CompletionReserve, when_short: WhenShort, enforce: bool) -> Self {
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
            dice: Dice(seed),
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
        let who = Who::any(&mut self.dice);
        let cap = (self.dice.below(3) > 0).then(|| 1 + self.dice.below(500));
        let completions = 1 + self.dice.below(4) / 3;
        let demand = Demand {
            subject: who.subject(),
            prompt: self.dice.below(300),
            generates: true,
            cap,
            completions,
        };
        self.advance();
        let fits = |recounts: &[Recount], amounts: Amounts| {
            let mut touched = recounts.iter().filter(|r| r.touches(who));
            touched.all(|r| r.fits(i128::from(amounts.of(r.quota.kind))))
        };
        let asked = match self.rules.reserve.completion {
            CompletionReserve::MaxTokens => Some(cap.unwrap_or(300 * completions)),
            CompletionReserve::Fixed(tokens) => Some(tokens),
            CompletionReserve::None => Some(0),
            CompletionReserve::Adaptive => None,
        };
        let asked_fits = asked.map(|tokens| fits(&self.recounts, Amounts::of_request(demand.prompt, tokens)));
        let Ok(admission) = self.local.admit(Timestamp(self.now), &demand) else {
            assert!(self.rules.enforce && asked_fits != Some(true), "denied against the recount");
            self.note("denied");
            return;
        };
        let reserved = admission.grant.reserved();
        assert_eq!(reserved, Amounts::of_request(demand.prompt, reserved.completion));
        assert!(fits(&self.recounts, reserved) || !self.rules.enforce, "admitted against the recount");
        if let Some(each) = admission.clamped_to {
            assert_eq!(reserved.completion, each * completions);
            assert!(self.rules.enforce && asked_fits != Some(true) && each >= 16);
            self.note("clamped");
        } else if let Some(tokens) = asked {
            assert_eq!(reserved.completion, tokens);
        }
        if admission.would_deny.is_some() {
            assert!(!self.rules.enforce && asked_fits != Some(true));
            self.note("only watched");
        }
        let id = self.next;
        self.next += 1;
        self.recounts.iter_mut().filter(|r| r.touches(who)).for_each(|r| r.hold(id, reserved));
        let spent = Amounts::of_request(self.dice.below(300), 0);
        self.open.push(Stream { who, grant: admission.grant, pieces: vec![(id, reserved)], spent });
        self.note("admitted");
    }

    /// A stream goes on: what it has used grows.
    fn progress(&mut self) {
        let Some(at) = self.pick() else { return };
        let tokens = self.dice.below(120);
        let is_reserving = self.rules.reserve.completion != CompletionReserve::None;
        self.advance();
        let stream = &mut self.open[at];
        let who = stream.who;
        stream.spent = Amounts::of_request(stream.spent.prompt, stream.spent.completion + tokens);
        let before = stream.grant.reserved();
        let missing = stream.spent.completion.saturating_sub(before.completion);
        let more = |tokens| Amounts { completion: tokens, total: tokens, ..Amounts::default() };
        let fits = |tokens: u64| {
            let mut touched = self.recounts.iter().filter(|r| r.touches(who));
            touched.all(|r| {
                let amount = i128::from(more(tokens).of(r.quota.kind));
                amount == 0 || r.fits(amount)
            })
        };
        let missing_fits = fits(missing);
        let (now, model) = (Timestamp(self.now), MODELS[who.1]);
        let outcome = self.local.progress(now, model, &mut stream.grant, stream.spent);
        let grown = stream.grant.reserved().saturating_sub(before);
        assert_eq!(grown, more(grown.completion));
        if missing == 0 || !is_reserving {
            assert_eq!((outcome, grown), (Progress::Within, Amounts::default()));
        } else {
            assert_eq!(outcome == Progress::Overrun, !missing_fits, "extended against the recount");
            assert!(grown.completion >= missing && (fits(grown.completion) || !missing_fits));
            assert!(grown.completion == missing || stream.grant.reserved().completion <= stream.grant.cap());
            let id = self.next;
            self.next += 1;
            self.recounts.iter_mut().filter(|r| r.touches(who)).for_each(|r| r.hold(id, grown));
            stream.pieces.push((id, grown));
        }
        let mut left = stream.spent;
        for &(id, reserved) in &stream.pieces {
            self.recounts.iter_mut().for_each(|r| r.progress(id, i128::from(left.of(r.quota.kind))));
            left = left.saturating_sub(reserved);
        }
        if grown.completion > 0 {
            self.note(if outcome == Progress::Overrun { "overrun" } else { "extended" });
        }
        self.note("progressed");
    }

    fn pick(&mut self) -> Option<usize> {
        let open = self.open.len() as u64;
        (open > 0).then(|| usize::try_from(self.dice.below(open)).unwrap())
    }

    fn settle(&mut self) {
        let Some(at) = self.pick() else { return };
        let Stream { who, grant, pieces, spent } = self.open.swap_remove(at);
        let spent = match self.dice.below(4) {
            0 => Amounts::default(),
            1 => Amounts::of_request(self.dice.below(350), self.dice.below(600)),
            _ => spent,
        };
        let is_complete = self.dice.below(2) == 0;
        self.advance();
        self.local.settle(Timestamp(self.now), who.subject(), grant, Settlement { spent, is_complete });
        let mut left = spent;
        for (n, &(id, reserved)) in (1..).zip(&pieces) {
            let part = if n == pieces.len() { left } else { left.min(reserved) };
            left = left.saturating_sub(part);
            self.recounts.iter_mut().for_each(|r| r.settle(id, i128::from(part.of(r.quota.kind))));
        }
        self.settled = self.settled.saturating_add(spent);
        self.note("settled");
    }

    fn change_limit(&mut self) {
        let at = usize::try_from(self.dice.below(self.recounts.len() as u64)).unwrap();
        let original = quotas()[at].clone();
        let mut change = |n: u64| n / 2 + self.dice.below(n) + 1;
        let (limit, burst) = (change(original.limit), change(original.capacity()));
        self.advance();
        self.recounts[at].quota = original.with_limit(limit, burst);
        let (scope, name) = (original.scope.as_str(), original.scope.name());
        let key = QuotaKey { scope, name, kind: original.kind, per: &original.per.text };
        assert!(self.local.set_limit(Timestamp(self.now), key, Some((limit, burst))));
        self.note("limit changed");
    }

    fn reset(&mut self) {
        self.advance();
        self.recounts.iter_mut().for_each(|r| r.spent = 0);
        self.local.reset(Timestamp(self.now));
    }

    fn step(&mut self) {
        match self.dice.below(1_000) {
            0..200 => self.admit(),
            200..390 => self.settle(),
            390..640 => self.progress(),
            640..997 => {
                let (by, what) = clock_step(&mut self.dice);
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

    fn compare(&mut self) {
        compare(&self.local.levels(Timestamp(self.now)), &mut self.recounts, self.now);
        let reserved = self.open.iter().map(|stream| stream.grant.reserved());
        assert_eq!(
            self.local.held(),
            reserved.fold(Amounts::default(), Amounts::saturating_add),
            "held in all"
        );
        let totals = self.local.totals();
        let charged = [totals.requests, totals.prompt, totals.completion, totals.total];
        let Amounts { requests, prompt, completion, total } = self.settled;
        assert_eq!(charged, [requests, prompt, completion, total], "settled in all");
    }
}

#[test]
fn a_million_steps_of_streams_settle_and_hold_all_that_was_reserved() {
    let adaptive = CompletionReserve::Adaptive;
    let ways = [
        (CompletionReserve::MaxTokens, WhenShort::Reject, true),
        (CompletionReserve::MaxTokens, WhenShort::Clamp, true),
        (CompletionReserve::Fixed(40), WhenShort::Reject, true),
        (CompletionReserve::None, WhenShort::Reject, true),
        (adaptive, WhenShort::Reject, true),
        (adaptive, WhenShort::Clamp, true),
        (adaptive, WhenShort::Clamp, false),
        (CompletionReserve::Fixed(40), WhenShort::Reject, false),
    ];
    let mut counts: HashMap<&str, u64> = HashMap::new();
    for (seed, (completion, when_short, enforce)) in (1..).zip(ways) {
        let mut walk = Streams::new(seed, completion, when_short, enforce);
        for _ in 0..steps() / ways.len() as u64 {
            walk.step();
        }
        while !walk.open.is_empty() {
            walk.settle();
        }
        walk.compare();
        assert!(walk.recounts.iter().all(|r| r.held() == 0), "nothing is held in the end");
        walk.counts.iter().for_each(|(what, n)| *counts.entry(what).or_default() += n);
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_unstable();
    println!("{} steps, 0 mismatches: {counts:?}", steps());
    for what in
        ["admitted", "denied", "clamped", "only watched", "settled", "extended", "overrun", "limit changed"]
    {
        assert!(counts.iter().any(|(name, n)| *name == what && *n > steps() / 2_000), "{what}: {counts:?}");
    }
}
