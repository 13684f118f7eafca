//! The limit that denied a request, as the log, traces, metrics and the causes of refusals show it.

use crate::error::ProxyError;
use crate::quota::{Shortfall, Wait};
use std::time::Duration;

/// The limit that denied a request: a quota, `max_in_flight`, a limit of an upstream's provider, or the flood guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Denial {
    /// As [`crate::quota::Scope::as_str`].
    pub(super) scope: &'static str,
    /// The name within the scope; empty for the environment and for an address.
    pub(super) name: String,
    /// Only of a quota.
    pub(super) quota: Option<DeniedQuota>,
    /// `None`: the provider's limit, or the flood guard.
    pub(super) limit: Option<u64>,
    /// Milliseconds until the request fits. `None`: it can never fit, or the time is not known.
    pub(super) retry_after_ms: Option<u64>,
}

/// The part of a denial that only quotas have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeniedQuota {
    pub(super) kind: &'static str,
    pub(super) per: String,
    /// The amount that the request needs.
    pub(super) requested: u64,
    /// The available amount.
    pub(super) remaining: u64,
}

impl Denial {
    /// The limit that caused this error. `None`: none did.
    pub(crate) fn of_error(error: &ProxyError) -> Option<Self> {
        match error {
            ProxyError::QuotaExceeded { .. } => error.shortfalls().first().map(Self::of_quota),
            ProxyError::TooManyInFlight { limit, upstream, .. } => {
                Some(Self::of_requests_in_flight(*limit, upstream.as_deref()))
            }
            ProxyError::UpstreamRateLimited { upstream, wait, .. } => {
                Some(Self::of_upstream(upstream, None, Some(*wait)))
            }
            ProxyError::FloodGuard { wait } => {
                let retry_after_ms = Some(milliseconds(*wait));
                Some(Self { scope: "address", name: String::new(), quota: None, limit: None, retry_after_ms })
            }
            _ => None,
        }
    }

    /// A denial by a quota.
    pub(crate) fn of_quota(shortfall: &Shortfall) -> Self {
        let Shortfall { quota, remaining, requested, wait, .. } = shortfall;
        Self {
            scope: quota.scope.as_str(),
            name: quota.scope.name().to_owned(),
            quota: Some(DeniedQuota {
                kind: quota.kind.as_str(),
                per: quota.per.text.clone(),
                requested: *requested,
                remaining: *remaining,
            }),
            limit: Some(quota.limit),
            retry_after_ms: match wait {
                Wait::Ms(ms) => Some((*ms).max(1)),
                Wait::Never => None,
            },
        }
    }

    /// A denial by `max_in_flight` of an upstream, or of the environment if none is named.
    pub(crate) fn of_requests_in_flight(limit: u64, upstream: Option<&str>) -> Self {
        if let Some(upstream) = upstream {
            return Self::of_upstream(upstream, Some(limit), None);
        }
        let (scope, name, limit) = ("environment", String::new(), Some(limit));
        Self { scope, name, quota: None, limit, retry_after_ms: None }
    }

    fn of_upstream(name: &str, limit: Option<u64>, wait: Option<Duration>) -> Self {
        let (name, retry_after_ms) = (name.to_owned(), wait.map(milliseconds));
        Self { scope: "upstream", name, quota: None, limit, retry_after_ms }
    }
}

fn milliseconds(wait: Duration) -> u64 {
    u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_without_a_quota_names_the_owner_of_the_limit() {
        let in_flight = |upstream: Option<&str>| {
            let upstream = upstream.map(Into::into);
            ProxyError::TooManyInFlight { limit: 5, environment: "production".into(), upstream }
        };
        let (upstream, wait) = ("openai".to_owned(), Duration::from_millis(2_758));
        let held = ProxyError::UpstreamRateLimited { upstream, wait, retry_patience: Duration::ZERO };
        for (error, want) in [
            (in_flight(None), ("environment", "", Some(5), None)),
            (in_flight(Some("openai")), ("upstream", "openai", Some(5), None)),
            (held, ("upstream", "openai", None, Some(2_758))),
            (ProxyError::FloodGuard { wait }, ("address", "", None, Some(2_758))),
        ] {
            let Denial { scope, name, quota, limit, retry_after_ms } = Denial::of_error(&error).unwrap();
            assert_eq!((scope, &*name, limit, retry_after_ms), want);
            assert_eq!(quota, None);
        }
        assert_eq!(Denial::of_error(&ProxyError::ShuttingDown), None);
    }
}
