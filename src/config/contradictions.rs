//! Warnings about settings of an environment that are valid alone but have no effect together.

use super::setting::{Section, Setting};
use super::units;
use crate::glob::Glob;
use crate::quota::{Quota, Scope};

/// Warns about quotas of models that the allow-list forbids, and about quotas of callers that the environment's own
/// quota makes unreachable.
pub(super) fn warn(environment: &Section<'_>, models: &[Glob], quotas: &[Quota]) {
    if let Some(section) = environment.get("model_quotas").and_then(|s| s.as_map()) {
        for (key, setting) in section.entries().filter(|(key, _)| !models.is_empty() && !key.name.is_empty())
        {
            warn_of_forbidden(&setting, &Glob::new(&key.name), models);
        }
    }
    for caller in environment.get("keys").and_then(|s| s.list()).unwrap_or_default() {
        let Some(section) = caller.as_map().and_then(|s| s.get("quotas")).and_then(|s| s.as_map()) else {
            continue;
        };
        for (kind, setting) in section.entries() {
            for setting in setting.one_or_more() {
                warn_of_unreachable(&setting, &kind.name, quotas);
            }
        }
    }
}

fn warn_of_forbidden(setting: &Setting<'_>, pattern: &Glob, models: &[Glob]) {
    if !models.iter().any(|allowed| allowed.overlaps(pattern)) {
        setting.warn("this quota never applies, because models allows no model with such a name; add the model there, or remove the quota");
    }
}

/// `setting`: one quota of a caller.
fn warn_of_unreachable(setting: &Setting<'_>, kind: &str, quotas: &[Quota]) {
    let Some(section) = setting.as_map() else { return };
    let text = |name: &str| section.get(name).and_then(|s| s.text());
    let (Some(limit), Some(per)) =
        (text("limit").and_then(units::amount), text("per").and_then(units::duration))
    else {
        return;
    };
    let is_same = |quota: &&Quota| {
        quota.scope == Scope::Environment
            && quota.kind.as_str() == kind
            && u128::from(quota.per.ms) == per.as_millis()
    };
    if let Some(own) = quotas.iter().find(is_same).filter(|own| limit > own.limit) {
        setting.warn(format!(
            "this limit of {limit} is above the limit of {} that the whole environment has, so the caller never reaches it; lower it, or raise the limit of the environment",
            own.limit
        ));
    }
}
