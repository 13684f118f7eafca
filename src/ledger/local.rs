//! The counters of one node: the quotas of one environment, or of one upstream, and the decisions made on them. Pure:
//! `now` is an argument, so that `simulate` and the tests run hours in a second. Nothing here depends on Redis.

mod backing;
mod residence;
mod rules;
mod stream;

use super::allowance::LearnedLengths;
use super::demand::{Admission, Demand, Grant, NoRoom, Settlement};
use super::durability::RestoredState;
use super::overrides::{EnforceOverride, LimitChange, Overrides, QuotaKey};
use super::usage_history::{Totals, UsageHistory};
use crate::clock::Timestamp;
use crate::config::{CompletionReserve, UpstreamSettings, WhenShort};
use crate::estimate::KnownModels;
use crate::glob::Glob;
use crate::quota::{
    Amounts, Applicable, CarriedAmount, Quota, QuotaLevel, QuotaStatus, Quotas, Receipt, Required, Restored,
    Subject, Takeover,
};
use residence::Elsewhere;
use std::sync::Arc;

pub use backing::Backing;
pub(super) use residence::Residence;
pub use rules::Rules;

/// A completion is not clamped to fewer tokens than this: some backends refuse a smaller limit, and an answer that
/// short would be useless.
const MIN_CLAMP: u64 = 16;
/// A reservation is extended by at least this many tokens, unless the request allows fewer or the quotas have fewer
/// left.
const MIN_EXTENSION: u64 = 64;

/// The counters of one environment, or of one upstream, on one node.
#[derive(Debug)]
pub struct Local {
    /// The name of the upstream. `None`: these are the counters of an environment.
    pub(super) upstream: Option<Arc<str>>,
    pub(super) quotas: Quotas,
    pub(super) rules: Rules,
    /// `enforce` of the config. That of `rules` is in force.
    enforce_of_config: bool,
    quantile_ppm: u32,
    lengths: LearnedLengths,
    pub(super) in_flight: u64,
    /// The amounts that all unsettled grants have reserved.
    pub(super) held: Amounts,
    pub(super) totals: Totals,
    pub(super) history: UsageHistory,
    pub(super) overrides: Overrides,
    /// What the store must change, because it is of another config.
    pub(super) restored: Restored,
    /// Where these counters are, while a new process takes them over and after that.
    pub(super) residence: Residence,
    /// What the requests of an old process hold in these counters.
    elsewhere: Elsewhere,
}

impl Local {
    /// Full quotas, no learned lengths of answers.
    pub fn new(rules: Rules, quotas: &[Quota], now: Timestamp) -> Self {
        Self {
            upstream: None,
            quotas: Quotas::new(quotas, now),
            quantile_ppm: rules.quantile_ppm(),
            enforce_of_config: rules.enforce,
            rules,
            lengths: LearnedLengths::default(),
            in_flight: 0,
            held: Amounts::default(),
            totals: Totals::default(),
            history: UsageHistory::default(),
            overrides: Overrides::new(quotas),
            restored: Restored::default(),
            residence: Residence::default(),
            elsewhere: Elsewhere::default(),
        }
    }

    /// Full quotas of an upstream. Requests use them beside those of their environment, as [`Backing`].
    pub fn of_upstream(upstream: &UpstreamSettings, now: Timestamp) -> Self {
        let counters = Self::new(Rules::of_upstream(upstream), &upstream.quotas, now);
        Self { upstream: Some(upstream.name.as_str().into()), ..counters }
    }

    /// Sets the patterns of models that the config has, apart from those of quotas. In full tables the names that match
    /// come first.
    pub(super) fn set_model_patterns(&mut self, patterns: &[Glob]) {
        let of_quota = |quota: &Quota| quota.scope.models().cloned();
        let of_quotas = self.overrides.configured().iter().filter_map(of_quota);
        let known = KnownModels::with(patterns.iter().cloned().chain(of_quotas));
        self.lengths.known_models = known.clone();
        self.history.known_models = known;
    }

    /// Overrides a limit of the config. `None`: restores the limit of the config. Earlier usage still counts. Returns
    /// whether the quota exists.
    pub fn set_limit(&mut self, now: Timestamp, key: QuotaKey<'_>, change: Option<&LimitChange>) -> bool {
        let exists = self.overrides.set_limit(key, change);
        if exists {
            self.quotas.set_limits(&self.overrides.in_force(), now);
        }
        exists
    }

    /// Sets whether quotas are enforced. `None`: by the config.
    pub(super) fn set_enforce(&mut self, change: Option<EnforceOverride>) {
        self.overrides.set_enforce(change);
        self.apply_enforce();
    }

    /// The level that a quota would have with the limit of `quota`.
    pub(super) fn preview(&self, now: Timestamp, quota: &Quota) -> Option<QuotaLevel> {
        let mut quotas = self.quotas.clone();
        let mut in_force = self.overrides.in_force();
        for other in in_force.iter_mut().filter(|other| other.is_same_as(quota)) {
            *other = other.with_limit(quota.limit, quota.capacity());
        }
        quotas.set_limits(&in_force, now);
        quotas.levels(now).into_iter().find(|level| level.quota.is_same_as(quota))
    }

    /// Puts the override of `enforce` in force, or else the value of the config.
    pub(super) fn apply_enforce(&mut self) {
        let other = self.overrides.set().enforce.as_ref();
        self.rules.enforce = other.map_or(self.enforce_of_config, |other| other.enforce);
    }

    /// Puts the config in force again where an override has ended.
    pub(super) fn end_overrides(&mut self, now: Timestamp) {
        if self.overrides.end_due(now) {
            self.quotas.set_limits(&self.overrides.in_force(), now);
            self.apply_enforce();
        }
    }

    /// Adopts the rules of another config.
    pub(super) fn set_rules(&mut self, rules: Rules) {
        self.quantile_ppm = rules.quantile_ppm();
        self.enforce_of_config = rules.enforce;
        self.rules = rules;
        self.apply_enforce();
    }

    /// Adopts the quotas of another config. Used amounts carry over. `restored`: the state in the store, for quotas that
    /// were unknown so far.
    pub(super) fn reconfigure(
        &mut self,
        now: Timestamp,
        quotas: &[Quota],
        takeover: Takeover,
        restored: &RestoredState,
    ) -> Vec<CarriedAmount> {
        let in_force = self.overrides.apply_to(quotas);
        let carried = self.quotas.reconfigure(&in_force, now, takeover, |quota| restored.counter(quota));
        let cells = self.cells_of_config(&self.quotas, quotas);
        self.overrides.reconfigure(cells);
        carried
    }

    /// The quota of each cell with the limit of the config, and whether the config has it. `configured`: the quotas of
    /// the config.
    pub(super) fn cells_of_config(&self, cells: &Quotas, configured: &[Quota]) -> Vec<(Quota, bool)> {
        let known = self.overrides.configured();
        let of_config = |(at, (quota, is_active)): (usize, (&Quota, bool))| {
            let listed = || configured.iter().find(|other| other.is_same_as(quota));
            let found = if is_active { listed() } else { known.get(at) };
            (found.unwrap_or(quota).clone(), is_active)
        };
        cells.cells().enumerate().map(of_config).collect()
    }

    /// Resets the quotas that match the key to full, or all of them. Held amounts stay held. Returns whether a quota
    /// matches.
    pub fn reset(&mut self, now: Timestamp, key: Option<QuotaKey<'_>>) -> bool {
        let Some(key) = key else {
            self.quotas.reset(now);
            return true;
        };
        let cells: Vec<usize> = self.overrides.matching(key).map(|(cell, _)| cell).collect();
        for &cell in &cells {
            self.quotas.reset_one(cell, now);
        }
        !cells.is_empty()
    }

    /// Continues from the restored state, and collects usage for the store from now on.
    pub(super) fn restore(&mut self, now: Timestamp, restored: &RestoredState) {
        self.overrides.restore(now, &restored.overrides);
        self.apply_enforce();
        self.quotas.set_limits(&self.overrides.in_force(), now);
        // Only what the old process counts is settled by its requests.
        let keeps_held = |quota: &Quota| restored.left.as_ref().is_some_and(|left| left.has(quota));
        self.restored = self.quotas.restore(now, &restored.quotas, keeps_held);
        if restored.left.is_none() {
            self.quotas.count_interrupted(now, &restored.quotas, restored.held);
        }
        self.totals = restored.totals;
        self.history.is_enabled = true;
        if let Some(left) = &restored.left {
            self.begin_takeover(left);
        } else {
            self.totals.add(restored.held);
            self.history.record_recovered(now, restored.held);
        }
    }

    /// Reserves room for one request in every quota that it touches, or in none.
    ///
    /// # Errors
    /// The reason why the request does not fit. A denied request changes only the count of denials.
    pub fn admit(&mut self, now: Timestamp, demand: &Demand<'_>) -> Result<Admission, NoRoom> {
        self.try_admit(now, demand).inspect_err(|_| self.count_denial(now, demand.subject))
    }

    /// Like `admit`, but does not count a denial: the request may try again.
    ///
    /// # Errors
    /// The reason why the request does not fit.
    pub fn try_admit(&mut self, now: Timestamp, demand: &Demand<'_>) -> Result<Admission, NoRoom> {
        self.try_admit_at(now, demand, None)
    }

    /// Like `try_admit`, in the quotas of the environment and of the upstream together.
    ///
    /// # Errors
    /// The reason why the request does not fit.
    pub fn try_admit_at(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        upstream: Option<&mut Backing<'_>>,
    ) -> Result<Admission, NoRoom> {
        let own = self.quotas.applicable(demand.subject);
        let allowance = self.allowance(demand, &own, upstream.as_deref());
        self.try_admit_with(now, demand, &own, allowance, self.is_full(), upstream)
    }

    /// Why the requests ahead of a request wait, which must not overtake them, or why its own wait has failed.
    pub(super) fn reason_to_deny(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        mut upstream: Option<&mut Backing<'_>>,
    ) -> NoRoom {
        if let Some(obstacle) = self.binding_obstacle(now, demand, upstream.as_deref_mut()) {
            return obstacle;
        }
        let own = self.quotas.applicable(demand.subject);
        let required = self.min_required(demand, &own, upstream.as_deref());
        let own = self.quotas.denial_behind_queue(now, &own, &required);
        let denied = own.or_else(|| upstream?.denial_behind_queue(now, &required));
        let limit = self.rules.max_in_flight.unwrap_or(self.in_flight);
        denied.map_or(NoRoom::InFlight { limit, upstream: None }, NoRoom::Quota)
    }

    /// The reason why the request does not fit now. `None`: it fits. Reserves nothing.
    pub(super) fn obstacle(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        upstream: Option<&mut Backing<'_>>,
    ) -> Option<NoRoom> {
        let own = self.quotas.applicable(demand.subject);
        let required = self.min_required(demand, &own, upstream.as_deref());
        let own = match self.rules.max_in_flight.filter(|_| self.is_full()) {
            Some(limit) => Some(NoRoom::InFlight { limit, upstream: None }),
            None => self.quotas.denial(now, &own, &required).map(NoRoom::Quota),
        };
        NoRoom::of_both(own, upstream.and_then(|upstream| upstream.obstacle(now, &required)))
    }

    /// Like `obstacle`, without the environment's own quotas if they are not enforced.
    pub(super) fn binding_obstacle(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        upstream: Option<&mut Backing<'_>>,
    ) -> Option<NoRoom> {
        if self.rules.enforce {
            return self.obstacle(now, demand, upstream);
        }
        let own = self.quotas.applicable(demand.subject);
        let required = self.min_required(demand, &own, upstream.as_deref());
        upstream.and_then(|upstream| upstream.obstacle(now, &required))
    }

    /// The amounts that the request would reserve, and the quotas that apply to it. Reserves nothing.
    pub(super) fn forecast(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        upstream: Option<&mut Backing<'_>>,
    ) -> (Amounts, Vec<QuotaLevel>) {
        let own = self.quotas.applicable(demand.subject);
        let allowance = self.allowance(demand, &own, upstream.as_deref());
        let required = self.required(demand, allowance);
        let mut levels = self.quotas.levels_of(now, &own);
        levels.extend(upstream.into_iter().flat_map(|upstream| upstream.levels(now)));
        (required.amounts, levels)
    }

    pub(super) fn is_full(&self) -> bool {
        self.rules.max_in_flight.is_some_and(|limit| self.in_flight >= limit)
    }

    pub(super) fn count_denial(&mut self, now: Timestamp, subject: Subject<'_>) {
        self.totals.rejected += 1;
        self.history.record_denial(now, subject);
    }

    /// Records a refusal in the quotas that had no room, so that they count as exhausted.
    pub(super) fn record_refusal(&mut self, now: Timestamp, subject: Subject<'_>, no_room: &NoRoom) {
        if let NoRoom::Quota(denied) = no_room {
            self.quotas.record_refusal(now, subject, denied);
        }
    }

    /// Like `try_admit_at`, but with a given allowance. `own`: the quotas of the environment that apply to the request.
    /// `is_full`: the maximum number of requests is in flight.
    pub(super) fn try_admit_with(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        own: &Applicable,
        allowance: u64,
        is_full: bool,
        mut upstream: Option<&mut Backing<'_>>,
    ) -> Result<Admission, NoRoom> {
        let mut required = self.required(demand, allowance);
        let shortage = upstream.as_deref_mut().and_then(|upstream| upstream.obstacle(now, &required));
        let is_short = shortage.is_some();
        let reserved = match (shortage, self.rules.max_in_flight.filter(|_| is_full)) {
            (Some(shortage), _) => Err(shortage),
            (None, Some(limit)) => Err(NoRoom::InFlight { limit, upstream: None }),
            (None, None) => self.quotas.reserve(now, own, &required).map_err(NoRoom::Quota),
        };
        let (receipt, clamped_to, would_deny) = match reserved {
            Ok(receipt) => (receipt, None, None),
            Err(no_room) if self.rules.enforce => {
                let clamped = self.clamp(now, demand, own, allowance, &no_room, upstream.as_deref_mut());
                let Some((lowered, each)) = clamped else {
                    return Err(self.obstacle(now, demand, upstream).unwrap_or(no_room));
                };
                required = lowered;
                let reserved = self.quotas.reserve(now, own, &required);
                (reserved.map_err(NoRoom::Quota)?, Some(each), None)
            }
            // The quotas of the upstream hold in shadow mode too.
            Err(no_room) if is_short => return Err(no_room),
            Err(no_room) => {
                // Shadow mode changes nothing: the request is neither denied nor clamped.
                let clamped = self.clamp(now, demand, own, allowance, &no_room, upstream.as_deref_mut());
                let would_deny = clamped.is_none().then(|| Box::new(no_room));
                (self.quotas.reserve_unchecked(now, own, &required), None, would_deny)
            }
        };
        let mut admission = self.admitted(now, demand, own, receipt, clamped_to);
        admission.would_deny = would_deny;
        if let Some(upstream) = upstream {
            admission.back(now, upstream, &required);
        }
        Ok(admission)
    }

    /// Reserves amounts for a request that Redis has already admitted, even if it does not fit.
    pub(super) fn admit_regardless(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        own: &Applicable,
        allowance: u64,
    ) -> Admission {
        let required = self.required(demand, allowance);
        let receipt = self.quotas.reserve_unchecked(now, own, &required);
        self.admitted(now, demand, own, receipt, None)
    }

    fn admitted(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        own: &Applicable,
        receipt: Receipt,
        clamped_to: Option<u64>,
    ) -> Admission {
        let reserved = receipt.reserved();
        self.in_flight += 1;
        self.held = self.held.saturating_add(reserved);
        let completions = demand.completions.max(1);
        let bound = clamped_to.map(|each| each.saturating_mul(completions)).or(demand.cap);
        // A request that generates nothing has no length, so it is not counted among the answers in flight.
        let in_flight_generation =
            if demand.generates { self.lengths.begin(demand.subject.model) } else { None };
        let grant = Box::new(Grant {
            receipts: smallvec::smallvec![receipt],
            id: None,
            reserved,
            extension: (reserved.completion / 2).max(MIN_EXTENSION),
            completions,
            cap: bound.unwrap_or(u64::MAX),
            was_clamped: clamped_to.is_some(),
            progress_threshold: if self.is_reserving() { reserved.completion } else { u64::MAX },
            partial_length: None,
            in_flight_generation,
        });
        let standing = self.quotas.status_by_kind(now, own);
        let is_durable = self.quotas.need_durability(own);
        Admission { grant, upstream: None, clamped_to, would_deny: None, standing, is_durable }
    }

    /// Reverts an admission that Redis has denied.
    pub(super) fn revert(&mut self, now: Timestamp, model: &str, mut grant: Box<Grant>) {
        grant.settle_receipts(Amounts::default(), |receipt, part| self.quotas.settle(now, receipt, part));
        self.release(model, &grant);
    }

    pub(super) fn required(&self, demand: &Demand<'_>, completion: u64) -> Required {
        let prompt = if self.rules.reserve.prompt { demand.prompt } else { 0 };
        Required { amounts: Amounts::of_request(prompt, completion), generates: demand.generates }
    }

    /// How many completion tokens to reserve. `own`: the quotas of the environment that apply to the request.
    pub(super) fn allowance(
        &self,
        demand: &Demand<'_>,
        own: &Applicable,
        upstream: Option<&Backing<'_>>,
    ) -> u64 {
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
                let each = self.lengths.allowance(demand.subject.model, self.quantile_ppm);
                let prompt = if reserve.prompt { demand.prompt } else { 0 };
                // Without this bound, an allowance above a quota's capacity would never fit, and no answer would ever
                // be learned.
                let own = self.quotas.largest_completion(own, prompt);
                let max = upstream.map_or(own, |upstream| own.min(upstream.largest_completion(prompt))) / 2;
                each.saturating_mul(completions).min(demand.cap.unwrap_or(u64::MAX)).min(max).max(1)
            }
        }
    }

    /// If the environment clamps: a lowered requirement that fits, and its completion tokens per completion.
    fn clamp(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
        own: &Applicable,
        allowance: u64,
        no_room: &NoRoom,
        mut upstream: Option<&mut Backing<'_>>,
    ) -> Option<(Required, u64)> {
        let NoRoom::Quota(_) = no_room else { return None };
        if !self.clamps(demand) || allowance == 0 {
            return None;
        }
        let prompt = if self.rules.reserve.prompt { demand.prompt } else { 0 };
        let completions = demand.completions.max(1);
        let room = self.quotas.completion_that_fits(now, own, prompt);
        let of_upstream = upstream.as_deref_mut().map(|upstream| upstream.completion_that_fits(now, prompt));
        let each = of_upstream.map_or(room, |other| room.min(other)) / completions;
        let required = self.required(demand, each.saturating_mul(completions));
        let is_less = each >= MIN_CLAMP && required.amounts.completion < allowance;
        let fits = is_less && self.quotas.denial(now, own, &required).is_none();
        let is_short = |upstream: &mut Backing<'_>| upstream.obstacle(now, &required).is_some();
        (fits && !upstream.is_some_and(is_short)).then_some((required, each))
    }

    pub(super) fn clamps(&self, demand: &Demand<'_>) -> bool {
        demand.may_clamp && self.rules.reserve.when_short == WhenShort::Clamp
    }

    /// The smallest amounts with which the request would be admitted.
    fn min_required(
        &self,
        demand: &Demand<'_>,
        own: &Applicable,
        upstream: Option<&Backing<'_>>,
    ) -> Required {
        let allowance = self.allowance(demand, own, upstream);
        let min_clamp = MIN_CLAMP.saturating_mul(demand.completions.max(1));
        self.required(demand, if self.clamps(demand) { allowance.min(min_clamp) } else { allowance })
    }

    /// Whether completions are reserved, rather than only charged afterwards.
    fn is_reserving(&self) -> bool {
        self.rules.reserve.completion != CompletionReserve::None
    }

    /// Releases the held amounts of a grant and charges the spent amounts.
    pub fn settle(
        &mut self,
        now: Timestamp,
        subject: Subject<'_>,
        mut grant: Box<Grant>,
        settlement: Settlement,
    ) {
        grant.settle_receipts(settlement.spent, |receipt, part| self.quotas.settle(now, receipt, part));
        self.close(now, subject, &grant, settlement);
    }

    /// The part of settling that does not change the quotas: totals, learned lengths and usage history.
    pub(super) fn close(
        &mut self,
        now: Timestamp,
        subject: Subject<'_>,
        grant: &Grant,
        settlement: Settlement,
    ) {
        self.release(subject.model, grant);
        self.totals.add(settlement.spent);
        let tokens = settlement.spent.completion;
        // An answer that ended at its clamped limit does not show how long it would have been.
        let was_shortened = grant.was_clamped && tokens >= grant.cap;
        // An upstream reserves what its environments demand, so it learns no lengths.
        let is_learned = settlement.is_complete && self.upstream.is_none();
        if is_learned && tokens > 0 && !was_shortened {
            self.lengths.learn(subject.model, tokens.div_ceil(grant.completions));
        }
        self.history.record_settlement(now, subject, settlement);
    }

    /// Removes a grant from all counts of requests in flight. Decreases every count that `admitted` and `progress`
    /// increase.
    fn release(&mut self, model: &str, grant: &Grant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.held = self.held.saturating_sub(grant.reserved);
        if let Some(partial) = grant.partial_length {
            self.lengths.forget_partial(model, partial);
        }
        if let Some(generation) = grant.in_flight_generation {
            self.lengths.end(model, generation);
        }
    }

    /// Every quota with its counters, in the config's order.
    pub fn levels(&mut self, now: Timestamp) -> Vec<QuotaLevel> {
        self.quotas.levels(now)
    }

    /// The amounts that all requests in flight have reserved.
    pub fn held(&self) -> Amounts {
        self.held
    }

    /// Sums since the store was created.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The quotas of the subject by kind, in the order of `Kind::ALL`.
    pub(super) fn standing(&self, now: Timestamp, subject: Subject<'_>) -> [Option<QuotaStatus>; 4] {
        self.quotas.status_by_kind(now, &self.quotas.applicable(subject))
    }
}

#[cfg(test)]
mod tests;
