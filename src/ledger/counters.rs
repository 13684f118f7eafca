//! The counters of one environment and the decisions made on them. Pure: `now` is an argument, so that
//! `simulate` and the tests run hours in a second.

use super::Left;
use super::history::History;
use super::learned::Learned;
use super::limits::{Limits, QuotaKey};
use crate::clock::Timestamp;
use crate::config::{CompletionReserve, Environment, Reserve, WhenShort};
use crate::quota::{Amounts, Ask, Asker, Denied, Level, Quotas, Receipt, Shortfall, Standing, Wait};

/// A completion is not clamped to fewer tokens than this: some backends refuse less, and nobody is
/// served by it.
const SMALLEST_CLAMP: u64 = 16;
/// A reservation is extended by at least so many tokens.
const SMALLEST_STEP: u64 = 64;

/// How an environment decides.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How much is reserved.
    pub reserve: Reserve,
    /// `false`: what does not fit is admitted all the same, and only reported.
    pub enforce: bool,
    /// Requests under way at once.
    pub max_in_flight: Option<u64>,
}

impl Rules {
    /// Those of an environment of the config.
    pub fn of(environment: &Environment) -> Self {
        Self {
            reserve: environment.reserve,
            enforce: environment.enforce,
            max_in_flight: environment.max_in_flight,
        }
    }
}

/// What a request wants.
#[derive(Clone, Copy, Debug)]
pub struct Want<'a> {
    /// Who asks, and for which model.
    pub asker: Asker<'a>,
    /// Its prompt as estimated.
    pub prompt: u64,
    /// Whether the model generates tokens for it.
    pub generates: bool,
    /// Its own bound on all its completions together.
    pub cap: Option<u64>,
    /// How many completions it asks for; at least 1.
    pub completions: u64,
}

/// Sums since the store began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests charged.
    pub requests: u64,
    /// Requests denied.
    pub rejected: u64,
    /// Prompt tokens charged.
    pub prompt: u64,
    /// Completion tokens charged.
    pub completion: u64,
    /// Total tokens charged.
    pub total: u64,
}

impl Totals {
    pub(super) fn add(&mut self, spent: Amounts) {
        self.requests += spent.requests;
        self.prompt += spent.prompt;
        self.completion += spent.completion;
        self.total += spent.total;
    }
}

/// Why there is no reservation.
#[derive(Clone, Debug, PartialEq)]
pub enum NoRoom {
    /// Quotas that cannot hold it.
    Quota(Denied),
    /// So many requests are under way already.
    InFlight {
        /// The environment's bound.
        limit: u64,
    },
}

impl NoRoom {
    /// The quota that takes longest.
    pub fn worst(&self) -> Option<&Shortfall> {
        match self {
            Self::Quota(denied) => denied.shortfalls().first(),
            Self::InFlight { .. } => None,
        }
    }

    /// When the same request would fit; `None`: when another one ends.
    pub fn wait(&self) -> Option<Wait> {
        self.worst().map(|worst| worst.wait)
    }

    /// Whether something under way may make room by its end, sooner than time does.
    pub fn may_end_sooner(&self) -> bool {
        match self {
            Self::Quota(denied) => denied.shortfalls().iter().all(|s| s.held > 0),
            Self::InFlight { .. } => true,
        }
    }
}

/// What a request holds until it is settled.
#[derive(Debug)]
#[must_use = "a grant that is not settled holds its room for ever"]
pub struct Grant {
    /// What was reserved at first, and what was added on the way.
    receipts: smallvec::SmallVec<[Receipt; 1]>,
    reserved: Amounts,
    step: u64,
    completions: u64,
    /// What was learned of the answer before its end: it is longer than this.
    longer_than: Option<u64>,
}

impl Grant {
    /// All that was reserved.
    pub fn reserved(&self) -> Amounts {
        self.reserved
    }
}

/// A request that may go on.
#[derive(Debug)]
pub struct Admission {
    /// What it holds.
    pub grant: Grant,
    /// To how many tokens each of its completions was bounded so that it fits.
    pub clamped_to: Option<u64>,
    /// Why it would have been denied if the quotas were enforced.
    pub would_deny: Option<NoRoom>,
    /// The quotas of each kind right after it, in the order of `Kind::ALL`.
    pub standing: [Option<Standing>; 4],
}

/// How a request ended, for its settlement.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ended {
    /// What it is charged.
    pub spent: Amounts,
    /// The answer came to its end: its length tells what to expect of the next.
    pub is_whole: bool,
}

/// Whether a stream may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It is within what is reserved for it.
    Within,
    /// It has outgrown that, and nothing more could be reserved: what it goes on to use is debt.
    Overrun,
}

/// The counters of one environment.
#[derive(Debug)]
pub struct Counters {
    pub(super) quotas: Quotas,
    rules: Rules,
    quantile_ppm: u32,
    learned: Learned,
    pub(super) in_flight: u64,
    /// What all grants that are not settled have reserved.
    pub(super) held: Amounts,
    pub(super) totals: Totals,
    pub(super) history: History,
    pub(super) limits: Limits,
}

impl Counters {
    /// Full quotas, nothing learned.
    pub fn new(rules: Rules, quotas: &[crate::quota::Quota], now: Timestamp) -> Self {
        // The one fraction of the config, made a whole number before anything is decided by it.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let quantile_ppm = (rules.reserve.quantile * 1e6) as u32;
        Self {
            quotas: Quotas::new(quotas, now),
            rules,
            quantile_ppm,
            learned: Learned::default(),
            in_flight: 0,
            held: Amounts::default(),
            totals: Totals::default(),
            history: History::default(),
            limits: Limits::of(quotas),
        }
    }

    /// Sets a limit in place of the config's, or with `None` back to it: what was used stays used. Returns
    /// whether there is such a quota.
    pub fn set_limit(&mut self, now: Timestamp, key: QuotaKey<'_>, limit: Option<(u64, u64)>) -> bool {
        let is_known = self.limits.set(now, key, limit);
        if is_known {
            self.quotas.set_quotas(&self.limits.quotas(), now);
        }
        is_known
    }

    /// Makes every quota whole again, but for what is held.
    pub fn reset(&mut self, now: Timestamp) {
        self.quotas.reset(now);
        self.limits.note(now, "all quotas reset".to_owned());
    }

    /// Goes on from what another process has left, and gathers usage for the store from now on.
    pub(super) fn take_over(&mut self, now: Timestamp, left: &Left) {
        self.limits.take_over(&left.overrides);
        self.quotas.set_quotas(&self.limits.quotas(), now);
        self.quotas.restore(now, |quota| {
            left.quotas.iter().find(|(kept, _)| kept.is_same_as(quota)).map(|(_, saved)| *saved)
        });
        self.totals = left.totals;
        self.totals.add(left.held);
        self.history.is_kept = true;
        self.history.recovered(now, left.held);
    }

    /// Holds room for one request in every quota it touches, or in none.
    ///
    /// # Errors
    /// What is in the way. A denied request changes nothing but the count of denials.
    pub fn admit(&mut self, now: Timestamp, want: &Want<'_>) -> Result<Admission, NoRoom> {
        match self.try_admit(now, want) {
            Err(no_room) if self.rules.enforce => {
                self.totals.rejected += 1;
                self.history.rejected(now, want.asker);
                Err(no_room)
            }
            other => other,
        }
    }

    /// The same for a request that may try again: a denial is not counted as one.
    ///
    /// # Errors
    /// What is in the way.
    pub fn try_admit(&mut self, now: Timestamp, want: &Want<'_>) -> Result<Admission, NoRoom> {
        let allowance = self.allowance(want);
        let ask = self.ask(want, allowance);
        let full = self.rules.max_in_flight.filter(|&limit| self.in_flight >= limit);
        let reserved = match full {
            Some(limit) => Err(NoRoom::InFlight { limit }),
            None => self.quotas.reserve(now, want.asker, &ask).map_err(NoRoom::Quota),
        };
        let (receipt, clamped_to, would_deny) = match reserved {
            Ok(receipt) => (receipt, None, None),
            Err(no_room) => match self.clamp(now, want, allowance, &no_room) {
                Some((receipt, each)) => (receipt, Some(each), None),
                None if self.rules.enforce => return Err(no_room),
                None => (self.quotas.reserve_regardless(now, want.asker, &ask), None, Some(no_room)),
            },
        };
        Ok(self.admitted(now, want, receipt, clamped_to, would_deny))
    }

    fn admitted(
        &mut self,
        now: Timestamp,
        want: &Want<'_>,
        receipt: Receipt,
        clamped_to: Option<u64>,
        would_deny: Option<NoRoom>,
    ) -> Admission {
        let reserved = receipt.reserved();
        self.in_flight += 1;
        self.held = self.held.plus(reserved);
        let step = (reserved.completion / 2).max(SMALLEST_STEP);
        let grant = Grant {
            receipts: smallvec::smallvec![receipt],
            reserved,
            step,
            completions: want.completions.max(1),
            longer_than: None,
        };
        let standing = self.quotas.standing(now, want.asker);
        Admission { grant, clamped_to, would_deny, standing }
    }

    fn ask(&self, want: &Want<'_>, completion: u64) -> Ask {
        let prompt = if self.rules.reserve.prompt { want.prompt } else { 0 };
        Ask { amounts: Amounts::of_request(prompt, completion), generates: want.generates }
    }

    /// How many completion tokens to reserve.
    fn allowance(&self, want: &Want<'_>) -> u64 {
        let reserve = &self.rules.reserve;
        let completions = want.completions.max(1);
        if !want.generates {
            return 0;
        }
        match reserve.completion {
            CompletionReserve::None => 0,
            CompletionReserve::Fixed(tokens) => tokens,
            CompletionReserve::MaxTokens => {
                want.cap.unwrap_or_else(|| reserve.default_max_tokens.saturating_mul(completions))
            }
            CompletionReserve::Adaptive => {
                let each = self.learned.expected(want.asker.model, self.quantile_ppm);
                let prompt = if reserve.prompt { want.prompt } else { 0 };
                // More than a quota could ever hold would deny its first request for ever.
                let largest = self.quotas.largest_completion(want.asker, prompt) / 2;
                each.saturating_mul(completions).min(want.cap.unwrap_or(u64::MAX)).min(largest).max(1)
            }
        }
    }

    /// Takes what is left instead of what was asked, if that is how the environment wants it.
    fn clamp(
        &mut self,
        now: Timestamp,
        want: &Want<'_>,
        allowance: u64,
        no_room: &NoRoom,
    ) -> Option<(Receipt, u64)> {
        let NoRoom::Quota(_) = no_room else { return None };
        if self.rules.reserve.when_short != WhenShort::Clamp || allowance == 0 {
            return None;
        }
        let prompt = if self.rules.reserve.prompt { want.prompt } else { 0 };
        let completions = want.completions.max(1);
        let each = self.quotas.completion_that_fits(now, want.asker, prompt) / completions;
        let ask = self.ask(want, each.saturating_mul(completions));
        if each < SMALLEST_CLAMP || ask.amounts.completion >= allowance {
            return None;
        }
        let receipt = self.quotas.reserve(now, want.asker, &ask).ok()?;
        Some((receipt, each))
    }

    /// Takes note of what a request has certainly used so far: that is held no longer. A stream that
    /// outgrows its reservation gets more of it while there is room.
    pub fn progress(&mut self, now: Timestamp, model: &str, grant: &mut Grant, spent: Amounts) -> Progress {
        let mut outcome = Progress::Within;
        if spent.completion > grant.reserved.completion
            && self.rules.reserve.completion != CompletionReserve::None
        {
            self.expect_longer(model, grant, spent.completion);
            let missing = spent.completion - grant.reserved.completion;
            let tokens = missing.max(grant.step);
            let more = Amounts { completion: tokens, total: tokens, ..Amounts::default() };
            match grant.receipts.first().and_then(|first| self.quotas.extend(now, first, more)) {
                Some(receipt) => {
                    grant.receipts.push(receipt);
                    grant.reserved = grant.reserved.plus(more);
                    self.held = self.held.plus(more);
                }
                None => outcome = Progress::Overrun,
            }
        }
        let mut left = spent;
        for receipt in &mut grant.receipts {
            self.quotas.progress(now, receipt, left);
            left = left.less(receipt.reserved());
        }
        outcome
    }

    fn expect_longer(&mut self, model: &str, grant: &mut Grant, tokens: u64) {
        let each = tokens.div_ceil(grant.completions);
        if let Some(before) = grant.longer_than.replace(each) {
            self.learned.forget(model, before);
        }
        self.learned.expect_longer(model, each);
    }

    /// Replaces what a grant holds by what was spent.
    pub fn settle(&mut self, now: Timestamp, asker: Asker<'_>, grant: Grant, ended: Ended) {
        let Grant { receipts, reserved, completions, longer_than, .. } = grant;
        let mut left = ended.spent;
        let last = receipts.len().saturating_sub(1);
        for (at, receipt) in receipts.into_iter().enumerate() {
            // Each receipt pays for what it holds; the last one for all that is beyond.
            let part = if at == last { left } else { left.at_most(receipt.reserved()) };
            left = left.less(part);
            self.quotas.settle(now, receipt, part);
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        self.held = self.held.less(reserved);
        self.totals.add(ended.spent);
        if let Some(before) = longer_than {
            self.learned.forget(asker.model, before);
        }
        if ended.is_whole && ended.spent.completion > 0 {
            self.learned.learn(asker.model, ended.spent.completion.div_ceil(completions));
        }
        self.history.settled(now, asker, ended);
    }

    /// Every quota with its counters, in the config's order.
    pub fn levels(&mut self, now: Timestamp) -> Vec<Level> {
        self.quotas.levels(now)
    }

    /// Whether what this asker reserves has to outlive the process.
    pub fn are_durable(&self, asker: Asker<'_>) -> bool {
        self.quotas.are_durable(asker)
    }
}

#[cfg(test)]
mod tests;
