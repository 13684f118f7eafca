//! The counters of one environment and the decisions made on them. Pure: `now` is an argument, so that
//! `simulate` and the tests run hours in a second.

use super::RestoredState;
use super::allowance::{Learned, Longer};
use super::cluster::Cluster;
use super::overrides::{Limits, QuotaKey};
use super::usage_history::History;
use crate::clock::Timestamp;
use crate::config::{CompletionReserve, Environment, ReserveSettings, WhenShort};
use crate::quota::{
    Amounts, Denied, QuotaLevel, QuotaStatus, Quotas, Receipt, Required, Shortfall, Subject, Wait,
};

/// A completion is not clamped to fewer tokens than this: some backends refuse less, and nobody is
/// served by it.
const SMALLEST_CLAMP: u64 = 16;
/// A reservation is extended by at least so many tokens.
const SMALLEST_STEP: u64 = 64;

/// How an environment decides.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How much is reserved.
    pub reserve: ReserveSettings,
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
pub struct Demand<'a> {
    /// Who asks, and for which model.
    pub subject: Subject<'a>,
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
    /// The counters are shared, and cannot be asked.
    Unavailable,
}

impl NoRoom {
    /// The quota that takes longest.
    pub fn worst(&self) -> Option<&Shortfall> {
        match self {
            Self::Quota(denied) => denied.shortfalls().first(),
            Self::InFlight { .. } | Self::Unavailable => None,
        }
    }

    /// When the same request would fit; `None`: when another one ends.
    pub fn wait(&self) -> Option<Wait> {
        self.worst().map(|worst| worst.wait)
    }

    /// The soonest that it could fit, if all that is under way ended now and gave back what it holds.
    pub fn soonest(&self) -> Wait {
        match self {
            Self::Quota(denied) => {
                denied.shortfalls().iter().map(Shortfall::min_wait).max().unwrap_or(Wait::Never)
            }
            Self::InFlight { .. } => Wait::Ms(0),
            Self::Unavailable => Wait::Never,
        }
    }
}

/// What a request holds until it is settled.
#[derive(Debug)]
#[must_use = "a grant that is not settled holds its room for ever"]
pub struct Grant {
    /// What was reserved at first, and what was added on the way.
    pub(super) receipts: smallvec::SmallVec<[Receipt; 1]>,
    /// Its name in a cluster.
    pub(super) id: Option<u64>,
    reserved: Amounts,
    step: u64,
    completions: u64,
    /// The request's own bound on its completions together, or the one it was clamped to.
    cap: u64,
    was_clamped: bool,
    /// Beyond so many completion tokens the answer's progress is to be told at once.
    tell_beyond: u64,
    /// What was learned of the answer before its end: it is longer than this.
    longer_than: Option<Longer>,
    /// It is counted among the answers of its model that are under way.
    under_way: Option<u64>,
}

impl Grant {
    /// All that was reserved.
    pub fn reserved(&self) -> Amounts {
        self.reserved
    }

    /// The most completion tokens that the request allows its answer.
    pub fn cap(&self) -> u64 {
        self.cap
    }

    /// Beyond so many completion tokens `progress` has something to do at once; below, now and then.
    pub fn tell_beyond(&self) -> u64 {
        self.tell_beyond
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
    pub standing: [Option<QuotaStatus>; 4],
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
    pub(super) rules: Rules,
    quantile_ppm: u32,
    learned: Learned,
    pub(super) in_flight: u64,
    /// What all grants that are not settled have reserved.
    pub(super) held: Amounts,
    pub(super) totals: Totals,
    pub(super) history: History,
    pub(super) limits: Limits,
    /// This node's part in counters that are shared.
    pub(super) cluster: Option<Box<Cluster>>,
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
            cluster: None,
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
    pub(super) fn take_over(&mut self, now: Timestamp, left: &RestoredState) {
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
    pub fn admit(&mut self, now: Timestamp, demand: &Demand<'_>) -> Result<Admission, NoRoom> {
        self.try_admit(now, demand).inspect_err(|_| self.count_denial(now, demand.subject))
    }

    /// Denies a request that must not overtake those who wait, or has waited in vain: with what is in its
    /// way now, or else with what those before it wait for.
    pub fn deny(&mut self, now: Timestamp, demand: &Demand<'_>) -> NoRoom {
        self.count_denial(now, demand.subject);
        if self.is_closed() {
            return NoRoom::Unavailable;
        }
        let in_flight = NoRoom::InFlight { limit: self.rules.max_in_flight.unwrap_or(self.in_flight) };
        if self.is_full() {
            return in_flight;
        }
        let required = self.least(demand);
        self.quotas.denial_behind_queue(now, demand.subject, &required).map_or(in_flight, NoRoom::Quota)
    }

    /// What is in the way of a request now; `None`: it fits. Takes nothing.
    pub fn in_the_way(&mut self, now: Timestamp, demand: &Demand<'_>) -> Option<NoRoom> {
        if self.is_closed() {
            return Some(NoRoom::Unavailable);
        }
        if let Some(limit) = self.rules.max_in_flight.filter(|_| self.is_full()) {
            return Some(NoRoom::InFlight { limit });
        }
        let required = self.least(demand);
        self.quotas.denial(now, demand.subject, &required).map(NoRoom::Quota)
    }

    fn is_full(&self) -> bool {
        self.rules.max_in_flight.is_some_and(|limit| self.in_flight >= limit)
    }

    pub(super) fn count_denial(&mut self, now: Timestamp, subject: Subject<'_>) {
        self.totals.rejected += 1;
        self.history.rejected(now, subject);
    }

    /// The same for a request that may try again: a denial is not counted as one.
    ///
    /// # Errors
    /// What is in the way.
    pub fn try_admit(&mut self, now: Timestamp, demand: &Demand<'_>) -> Result<Admission, NoRoom> {
        let allowance = self.allowance(demand);
        self.decide(now, demand, allowance, self.is_full())
    }

    /// The same with what is to be reserved for the completion.
    pub(super) fn decide(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        allowance: u64,
        is_full: bool,
    ) -> Result<Admission, NoRoom> {
        let required = self.required(demand, allowance);
        let full = self.rules.max_in_flight.filter(|_| is_full);
        let reserved = match full {
            Some(limit) => Err(NoRoom::InFlight { limit }),
            None => self.quotas.reserve(now, demand.subject, &required).map_err(NoRoom::Quota),
        };
        let (receipt, clamped_to, would_deny) = match reserved {
            Ok(receipt) => (receipt, None, None),
            Err(no_room) => {
                let clamped = self.clamp(now, demand, allowance, &no_room);
                if self.rules.enforce {
                    let Some((required, each)) = clamped else {
                        return Err(self.in_the_way(now, demand).unwrap_or(no_room));
                    };
                    let reserved = self.quotas.reserve(now, demand.subject, &required);
                    (reserved.map_err(NoRoom::Quota)?, Some(each), None)
                } else {
                    // Quotas that only watch alter nothing: neither is it denied nor clamped.
                    let would_deny = clamped.is_none().then_some(no_room);
                    (self.quotas.reserve_unchecked(now, demand.subject, &required), None, would_deny)
                }
            }
        };
        Ok(self.admitted(now, demand, receipt, clamped_to, would_deny))
    }

    fn admitted(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        receipt: Receipt,
        clamped_to: Option<u64>,
        would_deny: Option<NoRoom>,
    ) -> Admission {
        let reserved = receipt.reserved();
        self.in_flight += 1;
        self.held = self.held.saturating_add(reserved);
        let completions = demand.completions.max(1);
        let bound = clamped_to.map(|each| each.saturating_mul(completions)).or(demand.cap);
        let grant = Grant {
            receipts: smallvec::smallvec![receipt],
            id: None,
            reserved,
            step: (reserved.completion / 2).max(SMALLEST_STEP),
            completions,
            cap: bound.unwrap_or(u64::MAX),
            was_clamped: clamped_to.is_some(),
            tell_beyond: if self.is_reserving() { reserved.completion } else { u64::MAX },
            longer_than: None,
            under_way: self.learned.began(demand.subject.model).filter(|_| demand.generates),
        };
        let standing = self.quotas.status_by_kind(now, demand.subject);
        Admission { grant, clamped_to, would_deny, standing }
    }

    pub(super) fn required(&self, demand: &Demand<'_>, completion: u64) -> Required {
        let prompt = if self.rules.reserve.prompt { demand.prompt } else { 0 };
        Required { amounts: Amounts::of_request(prompt, completion), generates: demand.generates }
    }

    /// How many completion tokens to reserve.
    pub(super) fn allowance(&self, demand: &Demand<'_>) -> u64 {
        let reserve = &self.rules.reserve;
        let completions = demand.completions.max(1);
        if !demand.generates {
            return 0;
        }
        match reserve.completion {
            CompletionReserve::None => 0,
            CompletionReserve::Fixed(tokens) => tokens,
            CompletionReserve::MaxTokens => {
                demand.cap.unwrap_or_else(|| reserve.default_max_tokens.saturating_mul(completions))
            }
            CompletionReserve::Adaptive => {
                let each = self.learned.expected(demand.subject.model, self.quantile_ppm);
                let prompt = if reserve.prompt { demand.prompt } else { 0 };
                // More than a quota could ever hold would deny its first request for ever.
                let largest = self.quotas.largest_completion(demand.subject, prompt) / 2;
                each.saturating_mul(completions).min(demand.cap.unwrap_or(u64::MAX)).min(largest).max(1)
            }
        }
    }

    /// What is left instead of what was asked, if that is how the environment wants it.
    fn clamp(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        allowance: u64,
        no_room: &NoRoom,
    ) -> Option<(Required, u64)> {
        let NoRoom::Quota(_) = no_room else { return None };
        if !self.clamps() || allowance == 0 {
            return None;
        }
        let prompt = if self.rules.reserve.prompt { demand.prompt } else { 0 };
        let completions = demand.completions.max(1);
        let each = self.quotas.completion_that_fits(now, demand.subject, prompt) / completions;
        let required = self.required(demand, each.saturating_mul(completions));
        let is_less = each >= SMALLEST_CLAMP && required.amounts.completion < allowance;
        (is_less && self.quotas.denial(now, demand.subject, &required).is_none()).then_some((required, each))
    }

    pub(super) fn clamps(&self) -> bool {
        self.rules.reserve.when_short == WhenShort::Clamp
    }

    /// The least that has to fit for a request to be admitted.
    fn least(&self, demand: &Demand<'_>) -> Required {
        let allowance = self.allowance(demand);
        let smallest = SMALLEST_CLAMP.saturating_mul(demand.completions.max(1));
        self.required(demand, if self.clamps() { allowance.min(smallest) } else { allowance })
    }

    /// Whether completions are reserved at all, or charged afterwards only.
    fn is_reserving(&self) -> bool {
        self.rules.reserve.completion != CompletionReserve::None
    }

    /// Takes note of what a request has certainly used so far: that is held no longer. A stream that
    /// outgrows its reservation gets more of it while there is room; what it uses beyond that is debt at
    /// once, and not only when it ends: others see it, and it outlives the process.
    pub fn progress(&mut self, now: Timestamp, model: &str, grant: &mut Grant, spent: Amounts) -> Progress {
        let mut outcome = Progress::Within;
        if spent.completion > grant.reserved.completion && self.is_reserving() {
            self.expect_longer(model, grant, spent.completion);
            outcome = self.extend(now, grant, spent.completion - grant.reserved.completion);
            // Debt grows in steps too, so that not every event of a stream is looked at.
            let step = if outcome == Progress::Overrun { SMALLEST_STEP } else { 0 };
            grant.tell_beyond = grant.reserved.completion.saturating_add(step);
        }
        let mut left = spent;
        for receipt in &mut grant.receipts {
            self.quotas.progress(now, receipt, left);
            left = left.saturating_sub(receipt.reserved());
        }
        if let (Some(cluster), Some(id)) = (&mut self.cluster, grant.id) {
            cluster.progressed(id, &grant.receipts, spent);
        }
        outcome
    }

    /// Reserves a step more, or just what is missing, or takes that as debt.
    fn extend(&mut self, now: Timestamp, grant: &mut Grant, missing: u64) -> Progress {
        let Some(first) = grant.receipts.first() else { return Progress::Within };
        let more = |tokens| Amounts { completion: tokens, total: tokens, ..Amounts::default() };
        // No answer is expected to be longer than its request allows.
        let step = grant.step.min(grant.cap.saturating_sub(grant.reserved.completion)).max(missing);
        let steps = if step > missing { &[step, missing][..] } else { &[missing][..] };
        let fitting =
            steps.iter().find_map(|&tokens| Some((tokens, self.quotas.extend(now, first, more(tokens))?)));
        let outcome = if fitting.is_some() { Progress::Within } else { Progress::Overrun };
        let (tokens, receipt) =
            fitting.unwrap_or_else(|| (missing, self.quotas.extend_unchecked(now, first, more(missing))));
        grant.reserved = grant.reserved.saturating_add(more(tokens));
        self.held = self.held.saturating_add(more(tokens));
        let apart = match grant.receipts.last_mut() {
            Some(last) => last.merge(receipt),
            None => Some(receipt),
        };
        grant.receipts.extend(apart);
        outcome
    }

    fn expect_longer(&mut self, model: &str, grant: &mut Grant, tokens: u64) {
        if let Some(before) = grant.longer_than.take() {
            self.learned.forget(model, before);
        }
        grant.longer_than = self.learned.expect_longer(model, tokens.div_ceil(grant.completions));
    }

    /// Replaces what a grant holds by what was spent.
    pub fn settle(&mut self, now: Timestamp, subject: Subject<'_>, grant: Grant, ended: Ended) {
        let Grant { receipts, id, reserved, completions, cap, was_clamped, longer_than, under_way, .. } =
            grant;
        let mut left = ended.spent;
        let last = receipts.len().saturating_sub(1);
        for (at, receipt) in receipts.into_iter().enumerate() {
            // Each receipt pays for what it holds; the last one for all that is beyond.
            let part = if at == last { left } else { left.min(receipt.reserved()) };
            left = left.saturating_sub(part);
            if let (Some(cluster), Some(id)) = (&mut self.cluster, id) {
                cluster.owe(now, id, &receipt, part);
            }
            // Shared ones are known by what Redis says: until it has been told this is known by the journal, and by that alone.
            if self.cluster.as_ref().is_none_or(|cluster| cluster.is_alone()) {
                self.quotas.settle(now, receipt, part);
            }
        }
        if let (Some(cluster), Some(id)) = (&mut self.cluster, id) {
            cluster.settled(id, ended.spent);
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        self.held = self.held.saturating_sub(reserved);
        self.totals.add(ended.spent);
        if let Some(before) = longer_than {
            self.learned.forget(subject.model, before);
        }
        if let Some(since) = under_way {
            self.learned.ended(subject.model, since);
        }
        let tokens = ended.spent.completion;
        // An answer that ended where it was clamped to says nothing of how long it would have been.
        let was_shortened = was_clamped && tokens >= cap;
        if ended.is_whole && tokens > 0 && !was_shortened {
            self.learned.learn(subject.model, tokens.div_ceil(completions));
        }
        self.history.settled(now, subject, ended);
    }

    /// Takes what another engine has admitted already.
    pub(super) fn admit_regardless(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        allowance: u64,
    ) -> Admission {
        let required = self.required(demand, allowance);
        let receipt = self.quotas.reserve_unchecked(now, demand.subject, &required);
        self.admitted(now, demand, receipt, None, None)
    }

    /// Gives back what another engine has denied.
    pub(super) fn undo(&mut self, now: Timestamp, model: &str, grant: Grant) {
        for receipt in grant.receipts {
            self.quotas.settle(now, receipt, Amounts::default());
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        self.held = self.held.saturating_sub(grant.reserved);
        if let Some(since) = grant.under_way {
            self.learned.ended(model, since);
        }
    }

    /// Every quota with its counters, in the config's order.
    pub fn levels(&mut self, now: Timestamp) -> Vec<QuotaLevel> {
        self.quotas.levels(now)
    }

    /// What all requests under way have reserved.
    pub fn held(&self) -> Amounts {
        self.held
    }

    /// Sums since the store began.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Whether what this subject reserves has to outlive the process.
    pub fn are_durable(&self, subject: Subject<'_>) -> bool {
        self.quotas.need_durability(subject)
    }
}

#[cfg(test)]
mod tests;
