//! Warnings about settings of an environment that are valid alone but have no effect together.

use super::UpstreamSettings;
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

/// Warns about limits of an environment that are above those of its only upstream.
pub(super) fn warn_of_upstream(environment: &Section<'_>, upstream: &UpstreamSettings) {
    let name = &upstream.name;
    if let Some(section) = environment.get("quotas").and_then(|s| s.as_map()) {
        for (kind, setting) in section.entries() {
            for setting in setting.one_or_more() {
                let is_whole = |scope: &Scope| matches!(scope, Scope::Upstream(_));
                if let Some((limit, own)) = lower_limit(&setting, &kind.name, &upstream.quotas, is_whole) {
                    setting.warn(format!(
                        "this limit of {limit} is above the limit of {own} that upstream \"{name}\" has for all environments together, so the environment never reaches it; lower it, or raise the limit of the upstream"
                    ));
                }
            }
        }
    }
    let setting = environment.get("max_in_flight");
    let own = setting.as_ref().and_then(|setting| units::amount(setting.text()?));
    if let (Some(setting), Some(limit), Some(max)) = (setting, own, upstream.max_in_flight)
        && limit > max
    {
        setting.warn(format!(
            "this maximum of {limit} is above the maximum of {max} that upstream \"{name}\" has for all environments together, so the environment never reaches it; lower it, or raise that of the upstream"
        ));
    }
}

/// `setting`: one quota of a caller.
fn warn_of_unreachable(setting: &Setting<'_>, kind: &str, quotas: &[Quota]) {
    let is_whole = |scope: &Scope| *scope == Scope::Environment;
    if let Some((limit, own)) = lower_limit(setting, kind, quotas, is_whole) {
        setting.warn(format!(
            "this limit of {limit} is above the limit of {own} that the whole environment has, so the caller never reaches it; lower it, or raise the limit of the environment"
        ));
    }
}

/// The limit of a quota and that of a lower one of the same kind and period, which applies to it as well.
fn lower_limit(
    setting: &Setting<'_>,
    kind: &str,
    quotas: &[Quota],
    applies: impl Fn(&Scope) -> bool,
) -> Option<(u64, u64)> {
    let section = setting.as_map()?;
    let text = |name: &str| section.get(name).and_then(|s| s.text());
    let (limit, per) = (text("limit").and_then(units::amount)?, text("per").and_then(units::duration)?);
    let is_same = |quota: &&Quota| {
        applies(&quota.scope) && quota.kind.as_str() == kind && u128::from(quota.per.ms) == per.as_millis()
    };
    let own = quotas.iter().find(is_same)?.limit;
    (limit > own).then_some((limit, own))
}
