//! The same random steps through the script and through the engine without Redis.

use super::server::{Node, Server};
use jiff::tz::TimeZone;
use tollgate::clock::Timestamp;
use tollgate::glob::Glob;
use tollgate::quota::{
    Amounts, ClockUnit, Kind, MAX_AMOUNT, MAX_LIMIT, Period, Quota, Quotas, Receipt, Required, Scope,
    Subject, Window,
};
use tollgate::redis::{NewLimit, OnShortage, ReserveRequest, Step, StepKind, Verdict};

const DAY: u64 = 86_400_000;
const MODELS: [&str; 3] = ["m-1", "m-2", "other"];
/// The day before clocks go forward in Europe.
const BEGIN: i64 = 1_774_700_000_000;

/// SplitMix64: the walk is the same on every machine.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    fn pick(&mut self, of: usize) -> usize {
        usize::try_from(self.below(of as u64)).unwrap()
    }
}

fn quota(scope: Scope, kind: Kind, limit: u64, ms: u64, window: Window) -> Quota {
    Quota { scope, kind, limit, per: Period { text: format!("{ms}ms"), ms }, window }
}

/// Amounts as they are.
fn ordinary() -> Vec<Quota> {
    let rolling = |burst| Window::Rolling { burst };
    let calendar = |unit, zone: &str| Window::Calendar { unit, zone: TimeZone::get(zone).unwrap() };
    let caller = |n: usize| Scope::Caller(n, format!("caller-{n}"));
    let model = |pattern: &str| Scope::Model(Glob::new(pattern));
    vec![
        quota(Scope::Environment, Kind::TotalTokens, 60_000, 60_000, rolling(4_000)),
        quota(Scope::Environment, Kind::PromptTokens, 701, 1_009, rolling(900)),
        quota(Scope::Environment, Kind::CompletionTokens, 100_003, 3_600_000, rolling(100_000)),
        quota(Scope::Environment, Kind::Requests, 97, 60_000, rolling(50)),
        quota(Scope::Environment, Kind::TotalTokens, 900_000, DAY, calendar(ClockUnit::Day, "Europe/Berlin")),
        quota(Scope::Environment, Kind::Requests, 300, 60_000, calendar(ClockUnit::Minute, "UTC")),
        quota(caller(0), Kind::TotalTokens, 30_000, 60_000, rolling(2_000)),
        quota(caller(1), Kind::Requests, 7, 1_000, rolling(7)),
        quota(model("m-*"), Kind::CompletionTokens, 50_000, 60_000, rolling(3_000)),
        quota(
            model("m-1"),
            Kind::TotalTokens,
            2_000_000,
            30 * DAY,
            calendar(ClockUnit::Month, "America/New_York"),
        ),
    ]
}

/// Amounts as large as they may be, over the longest periods and the shortest.
fn extreme() -> Vec<Quota> {
    let rolling = |burst| Window::Rolling { burst };
    let utc = Window::Calendar { unit: ClockUnit::Month, zone: TimeZone::UTC };
    vec![
        quota(Scope::Environment, Kind::TotalTokens, MAX_LIMIT - 1, 366 * DAY - 1, rolling(MAX_LIMIT)),
        quota(Scope::Environment, Kind::PromptTokens, MAX_LIMIT, 1, rolling(MAX_LIMIT - 7)),
        quota(Scope::Environment, Kind::CompletionTokens, 31_622_399_998, 366 * DAY - 1, rolling(MAX_LIMIT)),
        quota(Scope::Environment, Kind::CompletionTokens, 1, 366 * DAY, rolling(4 * MAX_AMOUNT)),
        quota(Scope::Environment, Kind::TotalTokens, MAX_LIMIT, 30 * DAY, utc),
        quota(Scope::Environment, Kind::Requests, 999_983, DAY, rolling(1_000)),
    ]
}

/// A request under way: its pieces as the ledger keeps them.
struct Open {
    id: String,
    receipts: Vec<Receipt>,
}

struct Walk<'a> {
    dice: Dice,
    now: Timestamp,
    largest: u64,
    node: &'a mut Node,
    local: Quotas,
    /// What the node takes the server's quotas to be.
    mirror: Quotas,
    open: Vec<Open>,
    next: u64,
    applied: u64,
    /// Steps that may be sent again.
    last: Option<(u64, Vec<Step>)>,
    counts: [u64; 6],
}

impl Walk<'_> {
    fn reserve(&mut self) {
        let subject = Subject { caller: Some(self.dice.pick(3)), model: MODELS[self.dice.pick(3)] };
        let amounts = Amounts::of_request(self.dice.below(self.largest), self.dice.below(self.largest));
        let generates = self.dice.below(5) > 0;
        let required = Required { amounts, generates };
        let on_shortage =
            [OnShortage::Reject, OnShortage::Reject, OnShortage::AdmitAnyway, OnShortage::Clamp]
                [self.dice.pick(4)];
        let completions = 1 + self.dice.below(3);
        let touched = self.local.applicable(subject);
        let id = self.next.to_string();
        self.next += 1;
        let reserve =
            ReserveRequest { id: &id, max_in_flight: 0, on_shortage, generates, amounts, completions };
        let command = self.node.commands.reserve(&reserve, &touched);
        let answer = self.node.call(&command);
        tollgate::redis::load_states(&mut self.mirror, &touched, &answer);
        let decide = |quotas: &mut Quotas, now| {
            quotas.reserve(now, subject, &required).or_else(|denied| match on_shortage {
                OnShortage::AdmitAnyway => Ok(quotas.reserve_unchecked(now, subject, &required)),
                OnShortage::Clamp => {
                    let each = quotas.completion_that_fits(now, subject, amounts.prompt) / completions;
                    let less = Amounts::of_request(amounts.prompt, each.saturating_mul(completions));
                    let is_less = each >= 16 && less.completion < amounts.completion;
                    let lowered = Required { amounts: less, generates: true };
                    if is_less { quotas.reserve(now, subject, &lowered) } else { Err(denied) }
                }
                OnShortage::Reject => Err(denied),
            })
        };
        let local = decide(&mut self.local, self.now);
        let mirrored = decide(&mut self.mirror, answer.now);
        let standing = |quotas: &Quotas| quotas.status_by_kind(self.now, subject);
        assert_eq!(standing(&self.local), standing(&self.mirror));
        match (local, mirrored, answer.verdict) {
            (Ok(receipt), Ok(mirrored), Verdict::Admitted) => {
                assert_eq!(receipt.reserved(), mirrored.reserved());
                self.counts[usize::from(receipt.reserved() != amounts)] += 1;
                self.open.push(Open { id, receipts: vec![receipt] });
            }
            (Err(denied), Err(mirrored), Verdict::Denied) => {
                assert_eq!(denied, mirrored, "the same is told");
                self.counts[2] += 1;
            }
            (local, mirrored, verdict) => panic!("{local:?}, {mirrored:?}, {verdict:?}"),
        }
    }

    /// Sends steps, and now and then sends them once more, as after a broken connection.
    fn apply(&mut self, steps: Vec<Step>) {
        let command = self.node.commands.apply(self.applied + 1, &steps, &[]);
        assert_eq!(self.node.call(&command).values, [steps.len() as i64]);
        if self.dice.below(10) == 0 {
            assert_eq!(self.node.call(&command).values, [0], "nothing is applied twice");
        }
        self.applied += steps.len() as u64;
        if let Some((first, steps)) = self.last.replace((self.applied, steps)).filter(|(_, s)| s.len() == 1) {
            let again = self.node.commands.apply(first, &steps, &[]);
            assert_eq!(self.node.call(&again).values, [0], "nor later");
        }
    }

    fn step(&mut self, at: usize, kind: StepKind, amounts: Amounts) -> Step {
        Step::new(kind, self.open[at].id.clone(), amounts)
    }

    fn extend(&mut self, at: usize) -> Step {
        let tokens = 1 + self.dice.below(self.largest);
        let more = Amounts { completion: tokens, total: tokens, ..Amounts::default() };
        let receipts = &mut self.open[at].receipts;
        let piece = self.local.extend_unchecked(self.now, &receipts[0], more);
        let apart = receipts.last_mut().unwrap().merge(piece);
        self.counts[3] += u64::from(apart.is_some());
        receipts.extend(apart);
        self.step(at, StepKind::Extend, more)
    }

    fn progress(&mut self, at: usize) -> Step {
        let spent = Amounts::of_request(self.dice.below(self.largest), self.dice.below(self.largest));
        let mut left = spent;
        for receipt in &mut self.open[at].receipts {
            self.local.progress(self.now, receipt, left);
            left = left.saturating_sub(receipt.reserved());
        }
        self.counts[4] += 1;
        self.step(at, StepKind::Progress, spent)
    }

    fn settle(&mut self, at: usize) -> Step {
        let spent = Amounts::of_request(self.dice.below(self.largest), self.dice.below(self.largest * 2));
        let step = self.step(at, StepKind::Settle, spent);
        let receipts = self.open.swap_remove(at).receipts;
        let (mut left, last) = (spent, receipts.len() - 1);
        for (n, receipt) in receipts.into_iter().enumerate() {
            let part = if n == last { left } else { left.min(receipt.reserved()) };
            left = left.saturating_sub(part);
            self.local.settle(self.now, receipt, part);
        }
        self.counts[5] += 1;
        step
    }

    /// One to four steps of requests under way, in one call.
    fn batch(&mut self) {
        let mut steps = Vec::new();
        for _ in 0..=self.dice.below(4) {
            if self.open.is_empty() {
                break;
            }
            let at = self.dice.pick(self.open.len());
            steps.push(match self.dice.below(4) {
                0 => self.extend(at),
                1 => self.progress(at),
                _ => self.settle(at),
            });
        }
        if !steps.is_empty() {
            self.apply(steps);
        }
    }

    fn step_clock(&mut self) {
        let by = match self.dice.below(60) {
            0 => -1_000,
            1 => -3_600_000,
            2 => -(DAY as i64),
            3 => 3_600_000,
            4 => 40 * (DAY as i64),
            5 => self.dice.below(500 * DAY) as i64,
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
        let mut change = || (capacity / 2 + self.dice.below(capacity) + 1).min(MAX_LIMIT);
        let limit = change();
        let is_rolling = matches!(all[index].window, Window::Rolling { .. });
        let burst = if is_rolling { change() } else { limit };
        all[index] = all[index].with_limit(limit, burst);
        // The engine without Redis brings all quotas up to now where any is changed.
        self.local.set_quotas(&all, self.now);
        let command = self.node.commands.limit(true, &[(index, NewLimit { limit, burst })]);
        assert_eq!(self.node.call(&command).verdict, Verdict::Done);
    }

    fn reset(&mut self) {
        self.local.reset(self.now);
        let command = self.node.commands.reset();
        assert_eq!(self.node.call(&command).verdict, Verdict::Done);
    }

    fn compare(&mut self) {
        let shown = |quotas: &mut Quotas, now| {
            let levels = quotas.levels(now).into_iter();
            levels.map(|l| (l.quota, l.level, l.held, l.used, l.reset_ms)).collect::<Vec<_>>()
        };
        let mut there = self.node.mirror(self.now);
        let (there, here) = (shown(&mut there, self.now), shown(&mut self.local.clone(), self.now));
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

fn walk(quotas: &[Quota], largest: u64, seed: u64) {
    let server = Server::start();
    let now = Timestamp(BEGIN);
    let mut node = server.node("one", quotas, now);
    node.commands.set_clock(now);
    node.join(now);
    let steps = std::env::var("TOLLGATE_SHARED_STEPS").map_or(30_000, |n| n.parse().unwrap());
    let mut walk = Walk {
        dice: Dice(seed),
        now,
        largest,
        node: &mut node,
        local: Quotas::new(quotas, now),
        mirror: Quotas::new(quotas, now),
        open: Vec::new(),
        next: 0,
        applied: 0,
        last: None,
        counts: [0; 6],
    };
    walk.walk(steps);
    let counts = walk.counts;
    println!("{steps} steps, 0 mismatches: [whole, lowered, denied, apart, progressed, settled] {counts:?}");
    let least = [steps / 100, steps / 10_000, steps / 100, steps / 1_000, steps / 100, steps / 100];
    assert!(counts.iter().zip(least).all(|(count, least)| *count >= least), "{counts:?}");
}

#[test]
fn the_script_and_the_engine_come_to_the_same() {
    walk(&ordinary(), 400, 0x7011_9a7e);
}

#[test]
fn the_script_is_exact_at_the_largest_amounts_and_the_longest_periods() {
    walk(&extreme(), MAX_AMOUNT, 0x5eed);
}
