//! What an account counts for: an environment, or an upstream with limits.

use super::local::{Local, Rules};
use crate::clock::Timestamp;
use crate::config::{Environment, UpstreamSettings};
use crate::glob::Glob;
use crate::quota::Quota;
use std::borrow::Cow;
use std::sync::Arc;

/// With this prefix the name of an upstream is the name of its account. No environment has a name with a colon.
pub(crate) const UPSTREAM_PREFIX: &str = "upstream:";

/// What an account counts for.
#[derive(Clone, Copy, Debug)]
pub enum Owner<'a> {
    /// An environment of the config.
    Environment(&'a Environment),
    /// An upstream of the config, for all environments together.
    Upstream(&'a UpstreamSettings),
}

impl<'a> From<&'a Environment> for Owner<'a> {
    fn from(environment: &'a Environment) -> Self {
        Self::Environment(environment)
    }
}

impl<'a> From<&'a Arc<Environment>> for Owner<'a> {
    fn from(environment: &'a Arc<Environment>) -> Self {
        Self::Environment(environment)
    }
}

impl<'a> From<&'a UpstreamSettings> for Owner<'a> {
    fn from(upstream: &'a UpstreamSettings) -> Self {
        Self::Upstream(upstream)
    }
}

impl<'a> From<&'a Arc<UpstreamSettings>> for Owner<'a> {
    fn from(upstream: &'a Arc<UpstreamSettings>) -> Self {
        Self::Upstream(upstream)
    }
}

impl<'a> Owner<'a> {
    /// The name of the account, in the store and in Redis.
    pub fn key(self) -> Cow<'a, str> {
        match self {
            Self::Environment(environment) => Cow::Borrowed(&environment.name),
            Self::Upstream(upstream) => Cow::Owned(format!("{UPSTREAM_PREFIX}{}", upstream.name)),
        }
    }

    /// The quotas of the config.
    pub fn quotas(self) -> &'a [Quota] {
        match self {
            Self::Environment(environment) => &environment.quotas,
            Self::Upstream(upstream) => &upstream.quotas,
        }
    }

    /// The quotas of the config, and those that the account counts besides.
    pub fn counted_quotas(self) -> Vec<Quota> {
        match self {
            Self::Environment(environment) => environment.counted_quotas(),
            Self::Upstream(upstream) => upstream.quotas.clone(),
        }
    }

    pub(super) fn rules(self) -> Rules {
        match self {
            Self::Environment(environment) => Rules::of(environment),
            Self::Upstream(upstream) => Rules::of_upstream(upstream),
        }
    }

    /// Patterns of models that the config has, apart from those of quotas.
    pub(super) fn models(self) -> &'a [Glob] {
        match self {
            Self::Environment(environment) => &environment.models,
            Self::Upstream(_) => &[],
        }
    }

    /// Full quotas.
    pub(super) fn new_counters(self, now: Timestamp) -> Local {
        let mut local = match self {
            Self::Environment(_) => Local::new(self.rules(), &self.counted_quotas(), now),
            Self::Upstream(upstream) => Local::of_upstream(upstream, now),
        };
        local.set_model_patterns(self.models());
        local
    }
}
