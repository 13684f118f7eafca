//! All quotas of one environment: a request is admitted by every one that it touches, or by none.

use super::{Amounts, Ask, Bucket, Calendar, Kind, Quota, Scope, Window};
use crate::clock::Timestamp;
use smallvec::SmallVec;

/// When a request that does not fit now would fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wait {
    /// In so many milliseconds.
    Ms(u64),
    /// Not before its limit is raised: it is larger than the whole quota.
    Never,
}

/// Who asks: decides which scopes are touched.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// Index of the caller in its environment; `None` in an open one.
    pub caller: Option<usize>,
    /// The model's name; empty where the request names none.
    pub model: &'a str,
}

/// The quotas of one environment with their counters.
#[derive(Clone, Debug)]
pub struct Quotas {
    cells: Vec<Cell>,
}

#[derive(Clone, Debug)]
struct Cell {
    quota: Quota,
    counter: Counter,
}

#[derive(Clone, Debug)]
enum Counter {
    Rolling(Bucket),
    Calendar(Calendar),
}

/// What a request holds in each quota it touched. Handing it to `settle` is the only way back.
#[derive(Debug)]
#[must_use = "a receipt that is not settled holds its room for ever"]
pub struct Receipt {
    holds: SmallVec<[Hold; 8]>,
    reserved: Amounts,
}

#[derive(Clone, Copy, Debug)]
struct Hold {
    cell: u32,
    /// Of a calendar quota: the start of the period that admitted the request.
    period: Timestamp,
}

/// Why a request was denied: every quota that could not hold it, the one that takes longest first.
#[derive(Clone, Debug, PartialEq)]
pub struct Denied {
    shortfalls: Vec<Shortfall>,
}

/// One quota that could not hold a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Shortfall {
    /// The quota.
    pub quota: Quota,
    /// Whole tokens or requests left, never negative.
    pub remaining: u64,
    /// Spent and not yet back.
    pub used: u64,
    /// Held by requests in flight.
    pub held: u64,
    /// What was asked.
    pub requested: u64,
    /// When the same request would fit.
    pub wait: Wait,
}

/// A quota and its counters, as the admin API shows them.
#[derive(Clone, Debug)]
pub struct Level {
    /// The quota.
    pub quota: Quota,
    /// What is left; below zero: debt.
    pub level: i64,
    /// Held by requests in flight.
    pub held: u64,
    /// Spent and not yet back.
    pub used: u64,
    /// Milliseconds until what is spent is back.
    pub reset_ms: u64,
}

/// What a caller is told of its quotas of one kind: of several scopes and periods the tightest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The quota's limit.
    pub limit: u64,
    /// Whole tokens or requests left, never negative.
    pub remaining: u64,
    /// Milliseconds until the quota is whole again.
    pub reset_ms: u64,
}

impl Quotas {
    /// Full quotas.
    pub fn new(quotas: &[Quota], now: Timestamp) -> Self {
        let cells = quotas.iter().map(|quota| Cell::full(quota.clone(), now)).collect();
        Self { cells }
    }

    /// Takes what is asked out of every quota the asker touches and holds it, or changes nothing.
    ///
    /// # Errors
    /// Lists every quota that cannot hold it.
    pub fn reserve(&mut self, now: Timestamp, asker: Asker<'_>, ask: &Ask) -> Result<Receipt, Denied> {
        let mut shortfalls = Vec::new();
        for cell in self.cells.iter_mut().filter(|c| c.is_touched_by(asker)) {
            cell.advance(now);
            if let Err(wait) = cell.fits(now, ask) {
                shortfalls.push(cell.shortfall(ask.amounts.of(cell.quota.kind), wait));
            }
        }
        if !shortfalls.is_empty() {
            shortfalls.sort_by_key(|s| std::cmp::Reverse(s.wait));
            return Err(Denied { shortfalls });
        }
        let mut holds = SmallVec::new();
        for (index, cell) in (0..).zip(&mut self.cells).filter(|(_, c)| c.is_touched_by(asker)) {
            let period = cell.reserve(ask.amounts.of(cell.quota.kind));
            holds.push(Hold { cell: index, period });
        }
        Ok(Receipt { holds, reserved: ask.amounts })
    }

    /// Replaces what a receipt holds by what was spent, in every quota it touched.
    pub fn settle(&mut self, now: Timestamp, receipt: Receipt, spent: Amounts) {
        let Receipt { holds, reserved } = receipt;
        for hold in holds {
            let Some(cell) = self.cells.get_mut(hold.cell as usize) else { continue };
            cell.advance(now);
            let kind = cell.quota.kind;
            let (held, spent) = (reserved.of(kind), spent.of(kind));
            match &mut cell.counter {
                Counter::Rolling(bucket) => bucket.settle(held, spent),
                Counter::Calendar(calendar) => calendar.settle(hold.period, held, spent),
            }
        }
    }

    /// What the asker is told of its quotas of each kind, in the order of `Kind::ALL`.
    pub fn standing(&mut self, now: Timestamp, asker: Asker<'_>) -> [Option<Standing>; 4] {
        let mut tightest: [Option<(i64, &Cell)>; 4] = [None; 4];
        for cell in self.cells.iter_mut().filter(|c| c.is_touched_by(asker)) {
            cell.advance(now);
            let level = cell.level();
            let slot = &mut tightest[cell.quota.kind as usize];
            if slot.is_none_or(|(least, _)| level < least) {
                *slot = Some((level, cell));
            }
        }
        tightest.map(|found| found.map(|(level, cell)| cell.standing(now, level)))
    }

    /// The largest completion that the smallest quota could ever hold beside a prompt of this size.
    pub fn largest_completion(&self, asker: Asker<'_>, prompt: u64) -> u64 {
        let touched = self.cells.iter().filter(|c| c.is_touched_by(asker));
        touched
            .filter_map(|cell| match cell.quota.kind {
                Kind::TotalTokens => Some(cell.quota.capacity().saturating_sub(prompt)),
                Kind::CompletionTokens => Some(cell.quota.capacity()),
                Kind::PromptTokens | Kind::Requests => None,
            })
            .min()
            .unwrap_or(u64::MAX)
    }

    /// Every quota with its counters, in the config's order.
    pub fn levels(&mut self, now: Timestamp) -> Vec<Level> {
        self.cells.iter_mut().map(|cell| cell.shown(now)).collect()
    }
}

impl Receipt {
    /// What is held in each quota of its kind.
    pub fn reserved(&self) -> Amounts {
        self.reserved
    }
}

impl Denied {
    /// Every quota that could not hold the request, the one that takes longest first; never empty.
    pub fn shortfalls(&self) -> &[Shortfall] {
        &self.shortfalls
    }
}

impl Cell {
    fn full(quota: Quota, now: Timestamp) -> Self {
        let counter = match &quota.window {
            Window::Rolling { burst } => {
                Counter::Rolling(Bucket::full(quota.limit, *burst, quota.per.ms, now))
            }
            Window::Calendar { unit, zone } => {
                Counter::Calendar(Calendar::new(quota.limit, *unit, zone.clone(), now))
            }
        };
        Self { quota, counter }
    }

    fn is_touched_by(&self, asker: Asker<'_>) -> bool {
        match &self.quota.scope {
            Scope::Environment => true,
            Scope::Caller(index, _) => asker.caller == Some(*index),
            Scope::Model(pattern) => pattern.matches(asker.model),
        }
    }

    fn advance(&mut self, now: Timestamp) {
        match &mut self.counter {
            Counter::Rolling(bucket) => bucket.refill(now),
            Counter::Calendar(calendar) => calendar.roll(now),
        }
    }

    fn fits(&self, now: Timestamp, ask: &Ask) -> Result<(), Wait> {
        if self.quota.kind == Kind::CompletionTokens && !ask.generates {
            return Ok(());
        }
        let amount = ask.amounts.of(self.quota.kind);
        match &self.counter {
            Counter::Rolling(bucket) => bucket.fits(amount),
            Counter::Calendar(calendar) => calendar.fits(amount, now),
        }
    }

    fn reserve(&mut self, amount: u64) -> Timestamp {
        match &mut self.counter {
            Counter::Rolling(bucket) => {
                bucket.reserve(amount);
                Timestamp(0)
            }
            Counter::Calendar(calendar) => calendar.reserve(amount),
        }
    }

    fn level(&self) -> i64 {
        match &self.counter {
            Counter::Rolling(bucket) => bucket.level(),
            Counter::Calendar(calendar) => calendar.level(),
        }
    }

    fn held_and_used(&self) -> (u64, u64) {
        match &self.counter {
            Counter::Rolling(bucket) => (bucket.held(), bucket.used()),
            Counter::Calendar(calendar) => (calendar.held(), calendar.used()),
        }
    }

    fn standing(&self, now: Timestamp, level: i64) -> Standing {
        let reset_ms = match &self.counter {
            Counter::Rolling(bucket) => bucket.whole_again_ms(true),
            Counter::Calendar(calendar) => calendar.left_ms(now),
        };
        Standing { limit: self.quota.limit, remaining: u64::try_from(level).unwrap_or(0), reset_ms }
    }

    fn shortfall(&self, requested: u64, wait: Wait) -> Shortfall {
        let (held, used) = self.held_and_used();
        let remaining = u64::try_from(self.level()).unwrap_or(0);
        Shortfall { quota: self.quota.clone(), remaining, used, held, requested, wait }
    }

    fn shown(&mut self, now: Timestamp) -> Level {
        self.advance(now);
        let (held, used) = self.held_and_used();
        let reset_ms = match &self.counter {
            Counter::Rolling(bucket) => bucket.whole_again_ms(false),
            Counter::Calendar(calendar) => calendar.left_ms(now),
        };
        Level { quota: self.quota.clone(), level: self.level(), held, used, reset_ms }
    }
}
