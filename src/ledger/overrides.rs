//! Limits set by an administrator, which override those of the config.

use crate::quota::{Kind, Quota};

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

impl QuotaKey<'_> {
    /// Whether this is the quota's key.
    pub fn matches(&self, quota: &Quota) -> bool {
        (self.scope, self.name, self.kind, self.per)
            == (quota.scope.as_str(), quota.scope.name(), quota.kind, quota.per.text.as_str())
    }
}

/// The quotas of the config, and the overridden limits.
#[derive(Debug, Default)]
pub(super) struct Overrides {
    /// The quota of each cell with the limit of the config, and whether the config has it.
    configured: Vec<Quota>,
    is_active: Vec<bool>,
    overridden: Vec<Quota>,
    /// The overrides have changed since the store last took them.
    has_changed: bool,
}

impl Overrides {
    pub(super) fn new(configured: &[Quota]) -> Self {
        let is_active = vec![true; configured.len()];
        Self { configured: configured.to_vec(), is_active, ..Self::default() }
    }

    /// Adopts the quotas of another config. `cells`: the quota of each cell, and whether the config has it. `restored`:
    /// the overrides in the store, for quotas that were unknown so far.
    pub(super) fn reconfigure(&mut self, cells: Vec<(Quota, bool)>, restored: &[Quota]) {
        for stored in restored {
            let was_known = self.configured.iter().any(|known| known.is_same_as(stored));
            let is_listed = cells.iter().any(|(quota, is_active)| *is_active && quota.is_same_as(stored));
            if is_listed && !was_known && !self.is_overridden(stored) {
                self.overridden.push(stored.clone());
            }
        }
        (self.configured, self.is_active) = cells.into_iter().unzip();
    }

    /// Adopts the overrides of the restored state, except those of quotas that no longer exist.
    pub(super) fn restore(&mut self, overridden: &[Quota]) {
        let exists = |quota: &&Quota| self.configured.iter().any(|known| known.is_same_as(quota));
        self.overridden = overridden.iter().filter(exists).cloned().collect();
    }

    pub(super) fn configured(&self) -> &[Quota] {
        &self.configured
    }

    /// The quotas of the config, with their cells.
    pub(super) fn active(&self) -> impl Iterator<Item = (usize, &Quota)> {
        self.configured.iter().enumerate().filter(|(cell, _)| self.is_active[*cell])
    }

    /// The quotas of the config that match the key, with their cells.
    pub(super) fn matching<'q>(&'q self, key: QuotaKey<'q>) -> impl Iterator<Item = (usize, &'q Quota)> {
        self.active().filter(move |(_, quota)| key.matches(quota))
    }

    pub(super) fn is_overridden(&self, quota: &Quota) -> bool {
        self.overridden.iter().any(|other| other.is_same_as(quota))
    }

    /// Adopts the limit and burst that Redis has for the quota at this index of the config. `None`: it has no override.
    pub(super) fn follow(&mut self, index: usize, limit: Option<(u64, u64)>) {
        let Some(quota) = self.configured.get(index) else { return };
        let known = self.overridden.iter().position(|other| other.is_same_as(quota));
        let in_redis = limit.map(|(limit, burst)| quota.with_limit(limit, burst));
        match (known, in_redis) {
            (Some(at), Some(in_redis)) if self.overridden[at] != in_redis => self.overridden[at] = in_redis,
            (Some(at), None) => drop(self.overridden.swap_remove(at)),
            (None, Some(in_redis)) => self.overridden.push(in_redis),
            (Some(_), Some(_)) | (None, None) => return,
        }
        self.has_changed = true;
    }

    /// The quotas whose limit is overridden, with that limit.
    pub(super) fn overridden(&self) -> &[Quota] {
        &self.overridden
    }

    /// Every quota with the limit that is in force.
    pub(super) fn in_force(&self) -> Vec<Quota> {
        let in_force = |quota: &Quota| {
            let other = self.overridden.iter().find(|other| other.is_same_as(quota));
            other.unwrap_or(quota).clone()
        };
        self.configured.iter().map(in_force).collect()
    }

    /// Sets limit and burst of the quotas that match the key. `None`: restores the limits of the config. Returns
    /// whether a quota matches.
    pub(super) fn set(&mut self, key: QuotaKey<'_>, limit: Option<(u64, u64)>) -> bool {
        let named: Vec<Quota> = self.matching(key).map(|(_, quota)| quota.clone()).collect();
        for quota in &named {
            self.overridden.retain(|other| !other.is_same_as(quota));
            if let Some((limit, burst)) = limit {
                self.overridden.push(quota.with_limit(limit, burst));
            }
        }
        if named.is_empty() {
            return false;
        }
        self.has_changed = true;
        true
    }

    /// Takes the overrides for the store, if one has changed.
    pub(super) fn take_changes(&mut self) -> Option<Vec<Quota>> {
        std::mem::take(&mut self.has_changed).then(|| self.overridden.clone())
    }
}
