//! The quota that a request to change a limit names, and what it belongs to.

use super::description::{QuotaPath, UpstreamQuotaPath};
use super::{QuotaParameters, UpstreamQuotaParameters, invalid};
use crate::admin::Admin;
use crate::admin::answers::refusal;
use crate::admin::environments::{environment_view, find, unknown_environment};
use crate::admin::upstreams::{self, unknown_upstream};
use crate::clock::Timestamp;
use crate::config::{Environment, UpstreamSettings};
use crate::ledger::{Account, Owner, QuotaKey};
use crate::quota::{Kind, Quota, QuotaLevel, Scope, UNLIMITED, Window};
use axum::Json;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;

/// An error lists at most this many quotas.
const MAX_LISTED_QUOTAS: usize = 20;

/// What a quota belongs to.
pub(super) enum QuotaOwner {
    Environment(Arc<Environment>),
    Upstream(Arc<UpstreamSettings>),
}

impl QuotaOwner {
    pub(super) fn ledger_owner(&self) -> Owner<'_> {
        match self {
            Self::Environment(environment) => environment.into(),
            Self::Upstream(upstream) => upstream.into(),
        }
    }
}

/// The quota that a request names.
pub(super) struct Target {
    pub(super) owner: QuotaOwner,
    pub(super) account: Arc<Account>,
    /// The quota with the limit of the config.
    pub(super) quota: Quota,
    /// The config does not have the quota now: `quota` is the override.
    pub(super) is_removed: bool,
}

/// Which quotas a request may name.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Named {
    /// Those of the config.
    Configured,
    /// Also those with an override that the config does not have now.
    Overridden,
}

impl Named {
    /// The override that a key names, if the config does not have the quota.
    fn removed(self, account: &Account, key: QuotaKey<'_>) -> Option<Quota> {
        let limits = (self == Self::Overridden).then(|| account.overrides().limits)?;
        limits.into_iter().map(|known| known.quota).find(|quota| key.matches(quota))
    }
}

impl Target {
    pub(super) fn of_environment(
        admin: &Admin,
        QuotaPath { environment, kind, per }: &QuotaPath,
        QuotaParameters { scope, name }: &QuotaParameters,
        named: Named,
    ) -> Result<Self, Box<Response>> {
        let (settings, account) = find(admin, environment).ok_or_else(|| Box::new(unknown_environment()))?;
        let key = known_kind(kind).map(|kind| QuotaKey { scope, name, kind, per });
        let quota = settings.counted_quotas().into_iter().find(|quota| key.is_some_and(|k| k.matches(quota)));
        let is_removed = quota.is_none();
        let quota = quota.or_else(|| named.removed(&account, key?));
        let quota = quota.ok_or_else(|| Box::new(unknown_quota(&settings, scope, name)))?;
        Ok(Self { owner: QuotaOwner::Environment(settings), account, quota, is_removed })
    }

    pub(super) fn of_upstream(
        admin: &Admin,
        UpstreamQuotaPath { upstream, kind, per }: &UpstreamQuotaPath,
        UpstreamQuotaParameters { model }: &UpstreamQuotaParameters,
        named: Named,
    ) -> Result<Self, Box<Response>> {
        let (settings, account) =
            upstreams::find(admin, upstream).ok_or_else(|| Box::new(unknown_upstream()))?;
        let unknown = || Box::new(unknown_quota_of_upstream());
        let kind = known_kind(kind).ok_or_else(unknown)?;
        let (scope, name) = if model.is_empty() {
            ("upstream", upstream.clone())
        } else {
            ("upstream_model", format!("{upstream}/{model}"))
        };
        let key = QuotaKey { scope, name: &name, kind, per };
        let account = account.ok_or_else(unknown)?;
        let quota = settings.quotas.iter().find(|quota| key.matches(quota)).cloned();
        let is_removed = quota.is_none();
        let quota = quota.or_else(|| named.removed(&account, key)).ok_or_else(unknown)?;
        Ok(Self { owner: QuotaOwner::Upstream(settings), account, quota, is_removed })
    }

    pub(super) fn key(&self) -> QuotaKey<'_> {
        let Quota { scope, kind, per, .. } = &self.quota;
        QuotaKey { scope: scope.as_str(), name: scope.name(), kind: *kind, per: &per.text }
    }

    /// The name of the environment; empty for an upstream.
    pub(super) fn environment(&self) -> &str {
        match &self.owner {
            QuotaOwner::Environment(environment) => &environment.name,
            QuotaOwner::Upstream(_) => "",
        }
    }

    /// The name of the target in the audit log.
    pub(super) fn audited(&self) -> String {
        let Quota { scope, kind, per, .. } = &self.quota;
        format!("{}: {kind} per {}", scope.describe(self.environment()), per.text)
    }

    /// The state of the owner.
    pub(super) fn view(&self, admin: &Admin) -> Response {
        match &self.owner {
            QuotaOwner::Environment(settings) => {
                Json(environment_view(admin, settings, &self.account)).into_response()
            }
            QuotaOwner::Upstream(settings) => Json(upstreams::view(admin, &settings.name)).into_response(),
        }
    }

    pub(super) fn unknown(&self) -> Response {
        match &self.owner {
            QuotaOwner::Environment(settings) => {
                let key = self.key();
                unknown_quota(settings, key.scope, key.name)
            }
            QuotaOwner::Upstream(_) => unknown_quota_of_upstream(),
        }
    }

    /// The burst for a limit. `Err`: the burst in the body cannot be set.
    pub(super) fn burst(&self, limit: u64, burst: Option<u64>) -> Result<u64, Box<Response>> {
        let Some(burst) = burst else { return Ok(limit) };
        let reason = match self.quota.window {
            _ if limit == UNLIMITED => "an unlimited quota has no burst",
            Window::Calendar { .. } if burst != limit => "a calendar quota has no burst",
            _ => return Ok(burst),
        };
        Err(invalid(&format!("{reason}: remove burst.")))
    }

    /// The limit and burst in force, for the audit log; those of the override if the config does not have the quota.
    pub(super) fn limit_in_force(&self) -> Value {
        let level = self.level().map(|QuotaLevel { quota, .. }| quota);
        level.or_else(|| self.overridden()).map_or(Value::Null, |quota| {
            if quota.is_unlimited() {
                json!({ "limit": "unlimited" })
            } else {
                json!({ "limit": quota.limit, "burst": quota.capacity() })
            }
        })
    }

    /// The override of a quota that the config does not have now.
    fn overridden(&self) -> Option<Quota> {
        Named::Overridden.removed(&self.account, self.key()).filter(|_| self.is_removed)
    }

    /// The limit in force for the audit log, with the time at which it ends.
    pub(super) fn limit_until(&self, until: Option<Timestamp>) -> Value {
        let mut limit = self.limit_in_force();
        if let (Some(until), Value::Object(fields)) = (until, &mut limit) {
            fields.insert("until".to_owned(), until.to_rfc3339().into());
        }
        limit
    }

    /// The used amount for the audit log.
    pub(super) fn used(&self) -> Value {
        self.level().map_or(Value::Null, |level| json!({ "used": level.used }))
    }

    fn level(&self) -> Option<QuotaLevel> {
        self.account.snapshot().levels.into_iter().find(|level| self.key().matches(&level.quota))
    }
}

fn known_kind(text: &str) -> Option<Kind> {
    Kind::ALL.into_iter().find(|known| known.as_str() == text)
}

/// `scope` and `name`: those of the request.
fn unknown_quota(environment: &Environment, scope: &str, name: &str) -> Response {
    refusal(StatusCode::NOT_FOUND, "unknown_quota", &unknown_quota_message(environment, scope, name))
}

fn unknown_quota_message(environment: &Environment, scope: &str, name: &str) -> String {
    let of = &environment.name;
    let mut quotas = environment.counted_quotas();
    let is_of_scope = |quota: &Quota| quota.scope.as_str() == scope && quota.scope.name() == name;
    let problem = if scope == "caller" && !environment.callers.iter().any(|caller| caller.name == name) {
        format!("Environment '{of}' has no caller of this name.")
    } else if scope == "caller" && !quotas.iter().any(is_of_scope) {
        format!("Caller '{name}' of environment '{of}' has no quotas of its own.")
    } else {
        format!("Environment '{of}' has no such quota.")
    };
    // The quotas of the scope in the request come first.
    quotas.sort_by_key(|quota| !is_of_scope(quota));
    let shown: Vec<String> = quotas.iter().take(MAX_LISTED_QUOTAS).map(listed).collect();
    let rest = match quotas.len().saturating_sub(MAX_LISTED_QUOTAS) {
        0 => String::new(),
        count => format!(" and {count} more, which GET /api/environments/{of} lists"),
    };
    format!(
        "{problem} The environment has: {}{rest}. Write kind and period as in the config, and scope and name as query parameters.",
        shown.join(", ")
    )
}

/// A quota with the query parameters that select it.
fn listed(quota: &Quota) -> String {
    let Quota { scope, kind, per, .. } = quota;
    match scope {
        Scope::Environment => format!("{kind} per {}", per.text),
        _ => format!("{kind} per {} (scope {}, name {})", per.text, scope.as_str(), scope.name()),
    }
}

fn unknown_quota_of_upstream() -> Response {
    let message = "The upstream has no such quota. Write kind and period as in the config, and the pattern of model_quotas as ?model=PATTERN. GET /api/upstreams lists all.";
    refusal(StatusCode::NOT_FOUND, "unknown_quota", message)
}
