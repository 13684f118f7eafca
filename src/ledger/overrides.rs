//! Limits that an administrator has set in place of the config's.

use crate::clock::Timestamp;
use crate::quota::{Kind, Quota};

/// Names one quota of an environment, as the admin API does.
#[derive(Clone, Copy, Debug)]
pub struct QuotaKey<'a> {
    /// `environment`, `caller` or `model`.
    pub scope: &'a str,
    /// The caller's name or the models' pattern; empty for the environment.
    pub name: &'a str,
    /// What it counts.
    pub kind: Kind,
    /// As written in the config.
    pub per: &'a str,
}

impl QuotaKey<'_> {
    pub(super) fn names(&self, quota: &Quota) -> bool {
        (self.scope, self.name, self.kind, self.per)
            == (quota.scope.as_str(), quota.scope.name(), quota.kind, quota.per.text.as_str())
    }
}

/// Something an administrator has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEntry {
    /// When.
    pub at: Timestamp,
    /// What, in words.
    pub action: String,
}

/// The quotas of the config, and those of them that have another limit for now.
#[derive(Debug, Default)]
pub(super) struct Limits {
    configured: Vec<Quota>,
    overrides: Vec<Quota>,
    /// The overrides have changed since they were last kept.
    has_changed: bool,
    audit: Vec<AuditEntry>,
}

impl Limits {
    pub(super) fn of(configured: &[Quota]) -> Self {
        Self { configured: configured.to_vec(), ..Self::default() }
    }

    /// Takes over the overrides that another process has left, as far as there still are such quotas.
    pub(super) fn take_over(&mut self, overrides: &[Quota]) {
        let is_known = |quota: &&Quota| self.configured.iter().any(|known| known.is_same_as(quota));
        self.overrides = overrides.iter().filter(is_known).cloned().collect();
    }

    pub(super) fn configured(&self) -> &[Quota] {
        &self.configured
    }

    pub(super) fn is_overridden(&self, quota: &Quota) -> bool {
        self.overrides.iter().any(|other| other.is_same_as(quota))
    }

    /// Takes over what an administrator has set at another node, by place in the config's order; `None`: nothing.
    pub(super) fn follow(&mut self, index: usize, limit: Option<(u64, u64)>) {
        let Some(quota) = self.configured.get(index) else { return };
        let known = self.overrides.iter().position(|other| other.is_same_as(quota));
        let there = limit.map(|(limit, burst)| quota.with_limit(limit, burst));
        match (known, there) {
            (Some(at), Some(there)) if self.overrides[at] != there => self.overrides[at] = there,
            (Some(at), None) => drop(self.overrides.swap_remove(at)),
            (None, Some(there)) => self.overrides.push(there),
            (Some(_), Some(_)) | (None, None) => return,
        }
        self.has_changed = true;
    }

    pub(super) fn overrides(&self) -> &[Quota] {
        &self.overrides
    }

    /// Every quota with the limit that it has now.
    pub(super) fn quotas(&self) -> Vec<Quota> {
        let in_force = |quota: &Quota| {
            let other = self.overrides.iter().find(|other| other.is_same_as(quota));
            other.unwrap_or(quota).clone()
        };
        self.configured.iter().map(in_force).collect()
    }

    /// Sets limit and burst of the quotas so named, or with `None` back to the config's. Returns
    /// whether there is one.
    pub(super) fn set(&mut self, now: Timestamp, key: QuotaKey<'_>, limit: Option<(u64, u64)>) -> bool {
        let named: Vec<Quota> = self.configured.iter().filter(|quota| key.names(quota)).cloned().collect();
        for quota in &named {
            self.overrides.retain(|other| !other.is_same_as(quota));
            if let Some((limit, burst)) = limit {
                self.overrides.push(quota.with_limit(limit, burst));
            }
        }
        if named.is_empty() {
            return false;
        }
        let QuotaKey { scope, name, kind, per } = key;
        let what = if name.is_empty() {
            format!("{kind} per {per}")
        } else {
            format!("{kind} per {per} of {scope} {name}")
        };
        self.note(
            now,
            match limit {
                Some((limit, burst)) => format!("limit of {what} set to {limit}, burst {burst}"),
                None => format!("limit of {what} set back to the config's"),
            },
        );
        self.has_changed = true;
        true
    }

    pub(super) fn note(&mut self, at: Timestamp, action: String) {
        self.audit.push(AuditEntry { at, action });
    }

    /// What has to be kept: all overrides if they have changed, and what was done.
    pub(super) fn take_changes(&mut self) -> (Option<Vec<Quota>>, Vec<AuditEntry>) {
        let overrides = std::mem::take(&mut self.has_changed).then(|| self.overrides.clone());
        (overrides, std::mem::take(&mut self.audit))
    }
}
