//! What the providers of upstreams state about their own limits, as `/metrics` shows it.

use super::catalogue::{PROVIDER_IGNORED, PROVIDER_LIMIT, PROVIDER_REFUSALS, PROVIDER_REMAINING};
use super::exposition::{Family, labels};
use crate::config::Config;
use crate::estimate::{KnownModels, ModelRank};
use crate::provider_limits::{ModelView, ProviderLimits};
use std::sync::Arc;

/// Appends the limits to the text. Models whose name neither the built-in table nor the config contains have the label
/// `other` together, and show only their refusals.
pub(super) fn append(text: &mut String, config: &Config, provider_limits: &[Arc<ProviderLimits>]) {
    let patterns = config.environments.iter().flat_map(|environment| environment.models.iter());
    let known = KnownModels::with(patterns.cloned());
    let mut limit = Family::new(&PROVIDER_LIMIT);
    let mut remaining = Family::new(&PROVIDER_REMAINING);
    let mut refusals = Family::new(&PROVIDER_REFUSALS);
    let mut ignored = Family::new(&PROVIDER_IGNORED);
    for (upstream, limits) in config.upstreams.iter().zip(provider_limits) {
        let name = upstream.name.as_str();
        let mut other_refusals = 0;
        for ModelView { model, kinds, refusals: refused, .. } in limits.view() {
            if known.rank(&model) != ModelRank::Named {
                other_refusals += refused;
                continue;
            }
            refusals.add(&labels(PROVIDER_REFUSALS.labels, &[name, &model]), refused);
            for kind in kinds {
                let names = labels(PROVIDER_LIMIT.labels, &[kind.kind.as_str(), &model, name]);
                kind.limit.iter().for_each(|value| limit.add(&names, value));
                kind.remaining.iter().for_each(|value| remaining.add(&names, value));
            }
        }
        if other_refusals > 0 {
            refusals.add(&labels(PROVIDER_REFUSALS.labels, &[name, "other"]), other_refusals);
        }
        ignored.add(&labels(PROVIDER_IGNORED.labels, &[name]), limits.ignored());
    }
    for family in [limit, remaining, refusals, ignored] {
        family.append_to(text);
    }
}
