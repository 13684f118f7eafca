//! The state of quotas, environments and connections, as `/metrics` shows it. It is read when it is requested.

use super::catalogue::{
    BUILD_INFO, IN_FLIGHT, LAST_RELOAD_SUCCESSFUL, NODES, OVERRIDE_ACTIVE, OVERRIDE_SINCE, QUEUE_LENGTH,
    QUOTA_BURST, QUOTA_EXHAUSTED, QUOTA_HELD, QUOTA_LEVEL, QUOTA_LIMIT, QUOTA_RESET, QUOTA_USED,
    REDIS_FAULTS, REDIS_LOSSES, REDIS_UP, STORE_UP, UPSTREAM_ATTEMPTS,
};
use super::exposition::{Family, labels, seconds};
use super::series::CallerLabels;
use super::summaries::Summaries;
use super::{providers, replicas};
use crate::clock::Timestamp;
use crate::config::Config;
use crate::ledger::{Account, OverrideOrigin, RedisStatus, Snapshot};
use crate::provider_limits::ProviderLimits;
use crate::quota::{Quota, QuotaLevel, Scope};
use crate::upstream::Replicas;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the state is read from.
#[derive(Clone, Copy)]
pub(crate) struct StateSources<'s> {
    /// The config in force.
    pub(crate) config: &'s Config,
    /// The account of each environment, in the order of the config.
    pub(crate) accounts: &'s [Arc<Account>],
    /// The account of each upstream, in the order of the config. `None`: it has no limits.
    pub(crate) upstream_accounts: &'s [Option<Arc<Account>>],
    /// What the provider of each upstream states, in the order of the config.
    pub(crate) provider_limits: &'s [Arc<ProviderLimits>],
    /// The replicas of each upstream, in the order of the config.
    pub(crate) replicas: &'s [Replicas],
    /// Whether the store can be written.
    pub(crate) store_is_up: bool,
    /// Whether the last reload of the config succeeded, or there was none.
    pub(crate) reload_succeeded: bool,
}

/// Appends the state to the text.
pub(super) fn append(text: &mut String, sources: StateSources<'_>, summaries: &Summaries) {
    let mut families = Families::new();
    let callers = CallerLabels::of(sources.config);
    for ((environment, account), callers) in
        sources.config.environments.iter().zip(sources.accounts).zip(&callers)
    {
        families.add_environment(&environment.name, account, callers);
    }
    for upstream in &sources.config.upstreams {
        for (outcome, count) in summaries.upstream(&upstream.name).attempts() {
            let names = labels(UPSTREAM_ATTEMPTS.labels, &[&upstream.name, outcome.as_str()]);
            families.attempts.add(&names, count);
        }
    }
    for account in sources.upstream_accounts.iter().flatten() {
        families.add_upstream(account);
    }
    families.process.push(one(&BUILD_INFO, &labels(BUILD_INFO.labels, &[env!("CARGO_PKG_VERSION")]), 1));
    families.process.push(one(&LAST_RELOAD_SUCCESSFUL, "", u64::from(sources.reload_succeeded)));
    families.process.push(one(&STORE_UP, "", u64::from(sources.store_is_up)));
    families.process.push(one(&NODES, "", families.nodes.max(1)));
    if let Some(is_up) = families.redis_is_up {
        families.process.push(one(&REDIS_UP, "", u64::from(is_up)));
    }
    families.append_to(text);
    replicas::append(text, sources.config, sources.replicas);
    providers::append(text, sources.config, sources.provider_limits);
}

fn one(metric: &'static super::catalogue::Metric, labels: &str, value: u64) -> Family {
    let mut family = Family::new(metric);
    family.add(labels, value);
    family
}

/// The metrics of the state.
struct Families {
    in_flight: Family,
    queue_length: Family,
    quotas: QuotaFamilies,
    override_active: Family,
    override_since: Family,
    redis_losses: Family,
    redis_faults: Family,
    attempts: Family,
    /// Metrics with one sample.
    process: Vec<Family>,
    /// The largest number of nodes that an environment has.
    nodes: u64,
    /// Whether Redis is available to all environments. `None`: no environment uses it.
    redis_is_up: Option<bool>,
}

struct QuotaFamilies {
    limit: Family,
    burst: Family,
    level: Family,
    used: Family,
    held: Family,
    reset: Family,
    exhausted: Family,
}

impl Families {
    fn new() -> Self {
        Self {
            in_flight: Family::new(&IN_FLIGHT),
            queue_length: Family::new(&QUEUE_LENGTH),
            quotas: QuotaFamilies {
                limit: Family::new(&QUOTA_LIMIT),
                burst: Family::new(&QUOTA_BURST),
                level: Family::new(&QUOTA_LEVEL),
                used: Family::new(&QUOTA_USED),
                held: Family::new(&QUOTA_HELD),
                reset: Family::new(&QUOTA_RESET),
                exhausted: Family::new(&QUOTA_EXHAUSTED),
            },
            override_active: Family::new(&OVERRIDE_ACTIVE),
            override_since: Family::new(&OVERRIDE_SINCE),
            redis_losses: Family::new(&REDIS_LOSSES),
            redis_faults: Family::new(&REDIS_FAULTS),
            attempts: Family::new(&UPSTREAM_ATTEMPTS),
            process: Vec::new(),
            nodes: 0,
            redis_is_up: None,
        }
    }

    fn add_environment(&mut self, name: &str, account: &Account, callers: &CallerLabels) {
        let snapshot = account.snapshot();
        let environment = labels(IN_FLIGHT.labels, &[name]);
        self.in_flight.add(&environment, snapshot.in_flight_here);
        self.queue_length.add(&environment, account.queue_length());
        if let Some(redis) = &snapshot.redis {
            let RedisStatus { unavailable_reason, nodes, losses, server_faults } = redis;
            self.nodes = self.nodes.max(*nodes);
            self.redis_is_up = Some(self.redis_is_up.unwrap_or(true) && unavailable_reason.is_none());
            self.redis_losses.add(&environment, losses);
            self.redis_faults.add(&environment, server_faults.len());
        }
        for level in &snapshot.levels {
            let has_series = match &level.quota.scope {
                Scope::Caller(caller) => callers.has_name(caller),
                _ => true,
            };
            if has_series {
                self.quotas.add(&quota_labels(name, &level.quota), snapshot.at, level);
            }
        }
        self.add_overrides(name, &snapshot, Some(callers));
    }

    /// The series of upstreams have no environment: their quotas hold for all environments together.
    fn add_upstream(&mut self, account: &Account) {
        let snapshot = account.snapshot();
        for level in &snapshot.levels {
            self.quotas.add(&quota_labels("", &level.quota), snapshot.at, level);
        }
        self.add_overrides("", &snapshot, None);
    }

    /// Callers without a label of their own share one: the oldest of their overrides counts.
    fn add_overrides(&mut self, name: &str, snapshot: &Snapshot, callers: Option<&CallerLabels>) {
        let overrides = &snapshot.overrides;
        let mut since: BTreeMap<String, Timestamp> = BTreeMap::new();
        let mut add = |labels: String, origin: &OverrideOrigin| {
            let oldest = since.entry(labels).or_insert(origin.since);
            *oldest = origin.since.min(*oldest);
        };
        // An override of a quota that the config does not have has no effect.
        let is_in_force = |quota: &Quota| snapshot.levels.iter().any(|level| level.quota.is_same_as(quota));
        for limit in overrides.limits.iter().filter(|limit| is_in_force(&limit.quota)) {
            let has_name = match &limit.quota.scope {
                Scope::Caller(caller) => callers.is_none_or(|callers| callers.has_name(caller)),
                _ => true,
            };
            if has_name {
                add(quota_labels(name, &limit.quota), &limit.origin);
            } else {
                let quota = &limit.quota;
                let values = [name, quota.kind.as_str(), "other", &quota.per.text, quota.scope.as_str()];
                add(labels(OVERRIDE_ACTIVE.labels, &values), &limit.origin);
            }
        }
        if let Some(enforce) = &overrides.enforce {
            add(labels(OVERRIDE_ACTIVE.labels, &[name, "", "", "", "environment"]), &enforce.origin);
        }
        for (labels, since) in since {
            self.override_active.add(&labels, 1);
            self.override_since.add(&labels, seconds(since.0));
        }
    }

    fn append_to(&self, text: &mut String) {
        let QuotaFamilies { limit, burst, level, used, held, reset, exhausted } = &self.quotas;
        let quotas = [limit, burst, level, used, held, reset, exhausted];
        let others = [
            &self.in_flight,
            &self.queue_length,
            &self.override_active,
            &self.override_since,
            &self.redis_losses,
            &self.redis_faults,
            &self.attempts,
        ];
        let all = quotas.into_iter().chain(others).chain(&self.process);
        all.for_each(|family| family.append_to(text));
    }
}

fn quota_labels(environment: &str, quota: &Quota) -> String {
    let (scope, name) = (quota.scope.as_str(), quota.scope.name());
    labels(QUOTA_LEVEL.labels, &[environment, quota.kind.as_str(), name, &quota.per.text, scope])
}

impl QuotaFamilies {
    /// Adds a quota. An unlimited one has no limit and is never exhausted.
    fn add(&mut self, labels: &str, at: Timestamp, level: &QuotaLevel) {
        if !level.quota.is_unlimited() {
            self.limit.add(labels, level.quota.limit);
            self.burst.add(labels, level.quota.capacity());
            self.level.add(labels, level.level);
            let exhausted_ms = i64::try_from(level.exhausted_ms).unwrap_or(i64::MAX);
            self.exhausted.add(labels, seconds(exhausted_ms));
        }
        self.used.add(labels, level.used);
        self.held.add(labels, level.held);
        self.reset.add(labels, seconds(at.plus_ms(level.reset_ms).0));
    }
}
