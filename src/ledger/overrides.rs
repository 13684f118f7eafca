//! Overrides: limits and `enforce` that an administrator has set in place of those of the config.

use crate::clock::Timestamp;
use crate::quota::{Kind, Quota};

/// Why a change of an administrator has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeFault {
    /// Nothing was changed: Redis is unavailable, or a new process has the counters.
    Unavailable,
    /// Redis has sent no reply. It may have made the change, or may still make it.
    Unconfirmed,
}

/// Identifies a quota of an environment, as the admin API does.
#[derive(Clone, Copy, Debug)]
pub struct QuotaKey<'a> {
    /// `environment`, `caller` or `model`.
    pub scope: &'a str,
    /// The caller's name or the models' pattern; empty for the environment.
    pub name: &'a str,
    /// What the quota counts.
    pub kind: Kind,
    /// The period as written in the config.
    pub per: &'a str,
}

impl<'q> QuotaKey<'q> {
    /// The key of a quota.
    pub(super) fn of(quota: &'q Quota) -> Self {
        let (scope, name) = (quota.scope.as_str(), quota.scope.name());
        Self { scope, name, kind: quota.kind, per: &quota.per.text }
    }

    /// Whether this is the key of a quota.
    pub fn matches(&self, quota: &Quota) -> bool {
        (self.scope, self.name, self.kind, self.per)
            == (quota.scope.as_str(), quota.scope.name(), quota.kind, quota.per.text.as_str())
    }
}

/// How the administrator was identified who set an override, when it was set, when it ends, and the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OverrideOrigin {
    /// How the administrator was identified; empty: not known.
    pub by: String,
    /// When it was set.
    pub since: Timestamp,
    /// When it ends. `None`: when it is deleted.
    pub until: Option<Timestamp>,
    /// Why it was set.
    pub reason: Option<String>,
}

impl OverrideOrigin {
    fn has_ended(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

/// A limit to set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitChange {
    /// The limit, or [`UNLIMITED`](crate::quota::UNLIMITED).
    pub limit: u64,
    /// The capacity of a rolling quota.
    pub burst: u64,
    /// Who sets it, until when, and why.
    pub origin: OverrideOrigin,
}

/// A limit that is in force instead of the config's.
#[derive(Clone, Debug, PartialEq)]
pub struct LimitOverride {
    /// The quota with the limit that is in force.
    pub quota: Quota,
    /// Who set it, until when, and why.
    pub origin: OverrideOrigin,
}

/// Whether quotas are enforced, instead of the config's `enforce`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnforceOverride {
    /// `false`: shadow mode.
    pub enforce: bool,
    /// Who set it, until when, and why.
    pub origin: OverrideOrigin,
}

/// All overrides of an environment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OverrideSet {
    /// The limits, also those of quotas that the config does not have now.
    pub limits: Vec<LimitOverride>,
    /// Whether quotas are enforced. `None`: by the config.
    pub enforce: Option<EnforceOverride>,
}

impl OverrideSet {
    /// The override of a quota.
    pub fn of(&self, quota: &Quota) -> Option<&LimitOverride> {
        self.limits.iter().find(|other| other.quota.is_same_as(quota))
    }

    /// A quota of the config with the limit that is in force.
    pub fn apply_to(&self, quota: &Quota) -> Quota {
        let other = self.of(quota).map(|other| (other.quota.limit, other.quota.capacity()));
        other.map_or_else(|| quota.clone(), |(limit, burst)| quota.with_limit(limit, burst))
    }

    /// When the first override ends.
    fn next_end(&self) -> Timestamp {
        let of_limits = self.limits.iter().filter_map(|other| other.origin.until);
        let of_enforce = self.enforce.iter().filter_map(|other| other.origin.until);
        of_limits.chain(of_enforce).min().unwrap_or(Timestamp(i64::MAX))
    }
}

/// The quotas of the config, and the overrides.
#[derive(Debug)]
pub(super) struct Overrides {
    /// The quota of each cell with the limit of the config, and whether the config has it.
    configured: Vec<Quota>,
    is_active: Vec<bool>,
    set: OverrideSet,
    next_end: Timestamp,
    /// The overrides have changed since the store last took them.
    has_changed: bool,
}

impl Overrides {
    pub(super) fn new(configured: &[Quota]) -> Self {
        Self {
            configured: configured.to_vec(),
            is_active: vec![true; configured.len()],
            set: OverrideSet::default(),
            next_end: Timestamp(i64::MAX),
            has_changed: false,
        }
    }

    /// Adopts the quotas of another config. `cells`: the quota of each cell with the limit of the config, and whether
    /// the config has it.
    pub(super) fn reconfigure(&mut self, cells: Vec<(Quota, bool)>) {
        (self.configured, self.is_active) = cells.into_iter().unzip();
    }

    /// Adopts the overrides of the restored state that have not ended.
    pub(super) fn restore(&mut self, now: Timestamp, set: &OverrideSet) {
        self.set = set.clone();
        self.next_end = self.set.next_end();
        self.end_due(now);
    }

    /// Whether an override has ended.
    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        now >= self.next_end
    }

    /// The time until the first override ends. `None`: no override ends by itself, or Redis has not ended a due one yet.
    pub(super) fn ms_to_next_end(&self, now: Timestamp) -> Option<u64> {
        let ms = self.next_end.0.saturating_sub(now.0);
        u64::try_from(ms).ok().filter(|_| ms > 0 && self.next_end.0 < i64::MAX)
    }

    /// Removes the overrides that have ended. Returns whether there were any.
    pub(super) fn end_due(&mut self, now: Timestamp) -> bool {
        if !self.is_due(now) {
            return false;
        }
        self.set.limits.retain(|other| !other.origin.has_ended(now));
        self.set.enforce.take_if(|other| other.origin.has_ended(now));
        self.mark_changed();
        true
    }

    fn mark_changed(&mut self) {
        self.has_changed = true;
        self.next_end = self.set.next_end();
    }

    pub(super) fn configured(&self) -> &[Quota] {
        &self.configured
    }

    /// The quota of each cell, and whether the config has it.
    pub(super) fn cells(&self) -> impl Iterator<Item = (&Quota, bool)> {
        self.configured.iter().zip(self.is_active.iter().copied())
    }

    /// The quotas of the config, with their cells.
    pub(super) fn active(&self) -> impl Iterator<Item = (usize, &Quota)> {
        self.configured.iter().enumerate().filter(|(cell, _)| self.is_active[*cell])
    }

    /// The quotas of the config that match the key, with their cells.
    pub(super) fn matching<'q>(&'q self, key: QuotaKey<'q>) -> impl Iterator<Item = (usize, &'q Quota)> {
        self.active().filter(move |(_, quota)| key.matches(quota))
    }

    /// The quotas with an override that match the key, with their cells. The config need not have them now.
    pub(super) fn overridden<'q>(&'q self, key: QuotaKey<'q>) -> impl Iterator<Item = (usize, &'q Quota)> {
        let cells = self.configured.iter().enumerate();
        cells.filter(move |(_, quota)| key.matches(quota) && self.set.of(quota).is_some())
    }

    /// The overrides.
    pub(super) fn set(&self) -> &OverrideSet {
        &self.set
    }

    /// Every quota with the limit that is in force.
    pub(super) fn in_force(&self) -> Vec<Quota> {
        self.apply_to(&self.configured)
    }

    /// Quotas of a config with the limits that are in force.
    pub(super) fn apply_to(&self, configured: &[Quota]) -> Vec<Quota> {
        configured.iter().map(|quota| self.set.apply_to(quota)).collect()
    }

    /// Adopts the limit, the burst and the end that Redis has for the quota of this cell. `None`: it has no override.
    pub(super) fn follow(&mut self, cell: usize, in_redis: Option<(u64, u64, Option<Timestamp>)>) {
        let Some(quota) = self.configured.get(cell) else { return };
        let known = self.set.limits.iter().position(|other| other.quota.is_same_as(quota));
        let is_known = |other: &LimitOverride| {
            Some((other.quota.limit, other.quota.capacity(), other.origin.until)) == in_redis
        };
        if known.map_or(in_redis.is_none(), |at| is_known(&self.set.limits[at])) {
            return;
        }
        let quota = quota.clone();
        if let Some(at) = known {
            self.set.limits.swap_remove(at);
        }
        if let Some((limit, burst, until)) = in_redis {
            let origin = OverrideOrigin { until, ..OverrideOrigin::default() };
            self.set.limits.push(LimitOverride { quota: quota.with_limit(limit, burst), origin });
        }
        self.mark_changed();
    }

    /// Adopts the origin of an override from Redis.
    pub(super) fn follow_origin(&mut self, cell: usize, origin: OverrideOrigin) {
        let Some(quota) = self.configured.get(cell) else { return };
        let known = self.set.limits.iter_mut().find(|other| other.quota.is_same_as(quota));
        if let Some(known) = known.filter(|known| known.origin != origin) {
            known.origin = origin;
            self.mark_changed();
        }
    }

    /// Adopts the override of `enforce` that Redis has. Returns whether it differs from the known one.
    pub(super) fn follow_enforce(&mut self, in_redis: Option<EnforceOverride>) -> bool {
        let differs = self.set.enforce != in_redis;
        if differs {
            self.set.enforce = in_redis;
            self.mark_changed();
        }
        differs
    }

    /// Sets limit and burst of the quotas that match the key. `None`: restores the limits of the config, and removes the
    /// overrides of quotas that the config does not have now. Returns whether a quota matches.
    pub(super) fn set_limit(&mut self, key: QuotaKey<'_>, change: Option<&LimitChange>) -> bool {
        let named: Vec<Quota> = self.matching(key).map(|(_, quota)| quota.clone()).collect();
        let known = self.set.limits.len();
        self.set.limits.retain(|other| {
            let is_removed = change.is_none() && key.matches(&other.quota);
            !is_removed && !named.iter().any(|quota| other.quota.is_same_as(quota))
        });
        if named.is_empty() && self.set.limits.len() == known {
            return false;
        }
        if let Some(LimitChange { limit, burst, origin }) = change {
            let of_quota = |quota: &Quota| LimitOverride {
                quota: quota.with_limit(*limit, *burst),
                origin: origin.clone(),
            };
            self.set.limits.extend(named.iter().map(of_quota));
        }
        self.mark_changed();
        true
    }

    /// Sets whether quotas are enforced. `None`: by the config.
    pub(super) fn set_enforce(&mut self, change: Option<EnforceOverride>) {
        self.set.enforce = change;
        self.mark_changed();
    }

    /// Takes the overrides for the store, if one has changed.
    pub(super) fn take_changes(&mut self) -> Option<OverrideSet> {
        std::mem::take(&mut self.has_changed).then(|| self.set.clone())
    }
}
