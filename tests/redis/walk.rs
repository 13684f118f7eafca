//! Random steps, applied to the script and to the engine without Redis: both must agree after every step.

use super::node::Node;
use super::server::Server;
use jiff::tz::TimeZone;
use std::sync::Arc;
use tollgate::clock::Timestamp;
use tollgate::glob::Glob;
use tollgate::quota::{
    Amounts, ClockUnit, Kind, MAX_AMOUNT, MAX_LIMIT, Period, Quota, Quotas, Receipt, Required, Scope,
    Subject, UNLIMITED, Window,
};
use tollgate::redis::{NewLimit, OnShortage, OverrideMark, ReserveRequest, Step, StepKind, Verdict};

const DAY_MS: u64 = 86_400_000;
const MODELS: [&str; 3] = ["m-1", "m-2", "other"];
/// The day before clocks go forward in Europe.
const START: i64 = 1_774_700_000_000;

/// The name of a caller.
fn name_of(caller: usize) -> Arc<str> {
    format!("caller-{caller}").into()
}

/// The generator SplitMix64. The walk is the same on every machine.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    pub(super) fn pick(&mut self, of: usize) -> usize {
        usize::try_from(self.below(of as u64)).unwrap()
    }
}

pub(super) fn quota(scope: Scope, kind: Kind, limit: u64, ms: u64, window: Window) -> Quota {
    Quota { scope, kind, limit, per: Period { text: format!("{ms}ms"), ms }, window }
}

/// Quotas of ordinary sizes.
fn ordinary_quotas() -> Vec<Quota> {
    let rolling = |burst| Window::Rolling { burst };
    let calendar = |unit, zone: &str| Window::Calendar { unit, zone: TimeZone::get(zone).unwrap() };
    let caller = |n: usize| Scope::Caller(name_of(n));
    let model = |pattern: &str| Scope::Model(Glob::new(pattern));
    vec![
        quota(Scope::Environment, Kind::TotalTokens, 60_000, 60_000, rolling(4_000)),
        quota(Scope::Environment, Kind::PromptTokens, 701, 1_009, rolling(900)),
        quota(Scope::Environment, Kind::CompletionTokens, 100_003, 3_600_000, rolling(100_000)),
        quota(Scope::Environment, Kind::Requests, 97, 60_000, rolling(50)),
        quota(
            Scope::Environment,
            Kind::TotalTokens,
            900_000,
            DAY_MS,
            calendar(ClockUnit::Day, "Europe/Berlin"),
        ),
        quota(Scope::Environment, Kind::Requests, 300, 60_000, calendar(ClockUnit::Minute, "UTC")),
        quota(caller(0), Kind::TotalTokens, 30_000, 60_000, rolling(2_000)),
        quota(caller(1), Kind::Requests, 7, 1_000, rolling(7)),
        quota(model("m-*"), Kind::CompletionTokens, 50_000, 60_000, rolling(3_000)),
        quota(
            model("m-1"),
            Kind::TotalTokens,
            2_000_000,
            30 * DAY_MS,
            calendar(ClockUnit::Month, "America/New_York"),
        ),
    ]
}

/// Quotas of the maximum size, with the longest and the shortest periods.
fn extreme_quotas() -> Vec<Quota> {
    let rolling = |burst| Window::Rolling { burst };
    let utc = Window::Calendar { unit: ClockUnit::Month, zone: TimeZone::UTC };
    vec![
        quota(Scope::Environment, Kind::TotalTokens, MAX_LIMIT - 1, 366 * DAY_MS - 1, rolling(MAX_LIMIT)),
        quota(Scope::Environment, Kind::PromptTokens, MAX_LIMIT, 1, rolling(MAX_LIMIT - 7)),
        quota(
            Scope::Environment,
            Kind::CompletionTokens,
            31_622_399_998,
            366 * DAY_MS - 1,
            rolling(MAX_LIMIT),
        ),
        quota(Scope::Environment, Kind::CompletionTokens, 1, 366 * DAY_MS, rolling(4 * MAX_AMOUNT)),
        quota(Scope::Environment, Kind::TotalTokens, MAX_LIMIT, 30 * DAY_MS, utc),
        quota(Scope::Environment, Kind::Requests, 999_983, DAY_MS, rolling(1_000)),
    ]
}

/// A request in flight, with one receipt for each piece as in the ledger.
struct Open {
    id: String,
    receipts: Vec<Receipt>,
}

/// How often each outcome occurred.
#[derive(Debug, Default)]
struct Counts {
    admitted: u64,
    clamped: u64,
    denied: u64,
    /// Extensions in a later period than the reservation. Each adds a piece.
    split: u64,
    progressed: u64,
    settled: u64,
}

struct Walk<'a> {
    dice: Dice,
    now: Timestamp,
    max_amount: u64,
    node: &'a mut Node,
    local: Quotas,
    /// The node's copy of the server's quotas.
    mirror: Quotas,
    open: Vec<Open>,
    next_id: u64,
    steps_applied: u64,
    /// The steps of the last call and the number of the last step, to repeat the call.
    last_steps: Option<(u64, Vec<Step>)>,
    counts: Counts,
}

impl Walk<'_> {
    fn reserve(&mut self) {
        let subject = Subject { caller: Some(&name_of(self.dice.pick(3))), model: MODELS[self.dice.pick(3)] };
        let amounts = Amounts::of_request(self.dice.below(self.max_amount), self.dice.below(self.max_amount));
        let generates = self.dice.below(5) > 0;
        let required = Required { amounts, generates };
        let on_shortage =
            [OnShortage::Reject, OnShortage::Reject, OnShortage::AdmitAnyway, OnShortage::Clamp]
                [self.dice.pick(4)];
        let completions = 1 + self.dice.below(3);
        let applicable = self.local.applicable(subject);
        let id = self.next_id.to_string();
        self.next_id += 1;
        let reserve =
            ReserveRequest { id: &id, max_in_flight: 0, on_shortage, generates, amounts, completions };
        let command = self.node.commands.reserve(&reserve, applicable.limited());
        let reply = self.node.call(&command);
        tollgate::redis::load_states(&mut self.mirror, applicable.limited(), &reply);
        let decide = |quotas: &mut Quotas, now| {
            let applicable = quotas.applicable(subject);
            quotas.reserve(now, &applicable, &required).or_else(|denied| match on_shortage {
                OnShortage::AdmitAnyway => Ok(quotas.reserve_unchecked(now, &applicable, &required)),
                OnShortage::Clamp => {
                    let each = quotas.completion_that_fits(now, &applicable, amounts.prompt) / completions;
                    let lower = Amounts::of_request(amounts.prompt, each.saturating_mul(completions));
                    let is_lower = each >= 16 && lower.completion < amounts.completion;
                    let lowered = Required { amounts: lower, generates: true };
                    if is_lower { quotas.reserve(now, &applicable, &lowered) } else { Err(denied) }
                }
                OnShortage::Reject => Err(denied),
            })
        };
        let local = decide(&mut self.local, self.now);
        let mirrored = decide(&mut self.mirror, reply.now);
        let status = |quotas: &Quotas| quotas.status_by_kind(self.now, &quotas.applicable(subject));
        assert_eq!(status(&self.local), status(&self.mirror));
        match (local, mirrored, reply.verdict) {
            (Ok(receipt), Ok(mirrored), Verdict::Admitted) => {
                assert_eq!(receipt.reserved(), mirrored.reserved());
                let is_clamped = receipt.reserved() != amounts;
                *(if is_clamped { &mut self.counts.clamped } else { &mut self.counts.admitted }) += 1;
                self.open.push(Open { id, receipts: vec![receipt] });
            }
            (Err(denied), Err(mirrored), Verdict::Denied) => {
                assert_eq!(denied, mirrored, "both report the same denial");
                self.counts.denied += 1;
            }
            (local, mirrored, verdict) => panic!("{local:?}, {mirrored:?}, {verdict:?}"),
        }
    }

    /// Sends steps. Some calls are repeated, as after a lost connection.
    fn apply(&mut self, steps: Vec<Step>) {
        let command = self.node.commands.apply(self.steps_applied + 1, &steps, &[]);
        assert_eq!(self.node.call(&command).values, [steps.len() as i64]);
        if self.dice.below(10) == 0 {
            assert_eq!(self.node.call(&command).values, [0], "a repeated call applies nothing");
        }
        self.steps_applied += steps.len() as u64;
        if let Some((first, steps)) =
            self.last_steps.replace((self.steps_applied, steps)).filter(|(_, s)| s.len() == 1)
        {
            let again = self.node.commands.apply(first, &steps, &[]);
            assert_eq!(self.node.call(&again).values, [0], "a call repeated later applies nothing");
        }
    }

    fn step(&mut self, index: usize, kind: StepKind, amounts: Amounts) -> Step {
        Step::new(kind, self.open[index].id.clone(), amounts)
    }

    fn extend(&mut self, index: usize) -> Step {
        let tokens = 1 + self.dice.below(self.max_amount);
        let more = Amounts { completion: tokens, total: tokens, ..Amounts::default() };
        let receipts = &mut self.open[index].receipts;
        let piece = self.local.extend_unchecked(self.now, &receipts[0], more);
        let split_piece = receipts.last_mut().unwrap().merge(piece);
        self.counts.split += u64::from(split_piece.is_some());
        receipts.extend(split_piece);
        self.step(index, StepKind::Extend, more)
    }

    fn progress(&mut self, index: usize) -> Step {
        let spent = Amounts::of_request(self.dice.below(self.max_amount), self.dice.below(self.max_amount));
        let mut left = spent;
        for receipt in &mut self.open[index].receipts {
            self.local.progress(self.now, receipt, left);
            left = left.saturating_sub(receipt.reserved());
        }
        self.counts.progressed += 1;
        self.step(index, StepKind::Progress, spent)
    }

    fn settle(&mut self, index: usize) -> Vec<Step> {
        let spent =
            Amounts::of_request(self.dice.below(self.max_amount), self.dice.below(self.max_amount * 2));
        let mut steps = vec![self.step(index, StepKind::Settle, spent)];
        let receipts = self.open.swap_remove(index).receipts;
        let (mut left, last) = (spent, receipts.len() - 1);
        for (n, receipt) in receipts.into_iter().enumerate() {
            let part = if n == last { left } else { left.min(receipt.reserved()) };
            left = left.saturating_sub(part);
            steps.extend(self.counted(&receipt, part));
            self.local.settle(self.now, receipt, part);
        }
        self.counts.settled += 1;
        steps
    }

    /// The steps that report the counts of unlimited quotas.
    fn counted(&mut self, receipt: &Receipt, spent: Amounts) -> Vec<Step> {
        let counted = self.local.counted(self.now, receipt, spent);
        let step = |(cell, period, amount)| self.node.commands.offline_usage_step(cell, amount, period);
        counted.into_iter().map(step).collect()
    }

    /// Applies one to four steps of requests in flight in one call.
    fn batch(&mut self) {
        let mut steps = Vec::new();
        for _ in 0..=self.dice.below(4) {
            if self.open.is_empty() {
                break;
            }
            let index = self.dice.pick(self.open.len());
            match self.dice.below(4) {
                0 => steps.push(self.extend(index)),
                1 => steps.push(self.progress(index)),
                _ => steps.extend(self.settle(index)),
            }
        }
        if !steps.is_empty() {
            self.apply(steps);
        }
    }

    fn step_clock(&mut self) {
        let by = match self.dice.below(60) {
            0 => -1_000,
            1 => -3_600_000,
            2 => -(DAY_MS as i64),
            3 => 3_600_000,
            4 => 40 * (DAY_MS as i64),
            5 => self.dice.below(500 * DAY_MS) as i64,
            _ => self.dice.below(1_500) as i64,
        };
        self.now = Timestamp(self.now.0 + by);
        self.node.commands.set_clock(self.now);
    }

    fn change_limit(&mut self) {
        let mut all: Vec<Quota> =
            self.local.clone().levels(self.now).into_iter().map(|level| level.quota).collect();
        let index = self.dice.pick(all.len());
        let capacity = self.node.quotas[index].capacity();
        let is_unlimited = self.dice.below(5) == 0;
        let mut change = || (capacity / 2 + self.dice.below(capacity) + 1).min(MAX_LIMIT);
        let limit = if is_unlimited { UNLIMITED } else { change() };
        let is_rolling = matches!(all[index].window, Window::Rolling { .. });
        let burst = if is_rolling && limit != UNLIMITED { change() } else { limit };
        all[index] = all[index].with_limit(limit, burst);
        // Like the script, the engine advances all quotas to the current time when one changes.
        self.local.set_limits(&all, self.now);
        let command =
            self.node.commands.limit(OverrideMark::Endless, "", &[(index, NewLimit { limit, burst })]);
        assert_eq!(self.node.call(&command).verdict, Verdict::Done);
        // As after the next heartbeat: a request names the quotas that have a limit.
        self.mirror = self.node.mirror(self.now);
    }

    fn reset(&mut self) {
        self.local.reset(self.now);
        let command = self.node.commands.reset(None);
        assert_eq!(self.node.call(&command).verdict, Verdict::Done);
    }

    fn compare(&mut self) {
        let summary = |quotas: &mut Quotas, now| {
            let levels = quotas.levels(now).into_iter();
            levels.map(|l| (l.quota, l.level, l.held, l.used, l.reset_ms)).collect::<Vec<_>>()
        };
        let mut there = self.node.mirror(self.now);
        let (there, here) = (summary(&mut there, self.now), summary(&mut self.local.clone(), self.now));
        assert_eq!(there, here);
    }

    fn walk(&mut self, steps: u64) {
        for _ in 0..steps {
            match self.dice.below(1_000) {
                0..400 => self.reserve(),
                400..700 => self.batch(),
                700..990 => self.step_clock(),
                990..998 => self.change_limit(),
                _ => self.reset(),
            }
            if self.open.len() > 30 {
                self.batch();
            }
            self.compare();
        }
        while !self.open.is_empty() {
            self.batch();
        }
        self.compare();
        assert!(self.local.levels(self.now).iter().all(|level| level.held == 0));
    }
}

fn walk(quotas: &[Quota], max_amount: u64, seed: u64) {
    let server = Server::start();
    let now = Timestamp(START);
    let mut node = server.node("one", quotas, now);
    node.commands.set_clock(now);
    node.join(now);
    let steps = std::env::var("TOLLGATE_SHARED_STEPS").map_or(30_000, |n| n.parse().unwrap());
    let mut walk = Walk {
        dice: Dice(seed),
        now,
        max_amount,
        node: &mut node,
        local: Quotas::new(quotas, now),
        mirror: Quotas::new(quotas, now),
        open: Vec::new(),
        next_id: 0,
        steps_applied: 0,
        last_steps: None,
        counts: Counts::default(),
    };
    walk.walk(steps);
    let counts = walk.counts;
    println!("{steps} steps, 0 mismatches: {counts:?}");
    let Counts { admitted, clamped, denied, split, progressed, settled } = counts;
    assert!([admitted, denied, progressed, settled].iter().all(|&count| count >= steps / 100), "{counts:?}");
    assert!(clamped >= steps / 10_000 && split >= steps / 1_000, "{counts:?}");
}

#[test]
fn the_script_and_the_engine_agree() {
    walk(&ordinary_quotas(), 400, 0x7011_9a7e);
}

#[test]
fn the_script_is_exact_at_the_largest_amounts_and_the_longest_periods() {
    walk(&extreme_quotas(), MAX_AMOUNT, 0x5eed);
}
