//! `GET /api/overrides`: everything that differs from the config file, as JSON or as YAML for the file.

use crate::admin::Admin;
use crate::admin::answers::{AccessErrors, ErrorBody, QueryResult, read_query, refusal};
use crate::admin::origins::{OriginView, limit};
use crate::config::{Environment, UpstreamSettings};
use crate::ledger::{EnforceOverride, LimitOverride, OverrideSet};
use crate::quota::{Kind, Quota, Scope, Window};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use futures_util::future::join_all;
use http::{StatusCode, header};
use serde::Serialize;
use std::fmt::Write as _;
use std::sync::Arc;
use utoipa::ToSchema;

/// The answer of `GET /api/overrides`.
#[derive(Serialize, ToSchema)]
pub(in crate::admin) struct OverrideList {
    /// The limits, by environment; then those of upstreams.
    overrides: Vec<LimitOverrideView>,
    /// The environments whose `enforce` is not that of the file.
    enforce: Vec<EnforceOverrideView>,
}

/// A limit that an administrator has set.
#[derive(Serialize, ToSchema)]
struct LimitOverrideView {
    /// `null`: the quota belongs to an upstream.
    environment: Option<String>,
    /// `environment`, `caller`, `model`, `upstream` or `upstream_model`.
    scope: &'static str,
    name: Option<String>,
    kind: &'static str,
    per: String,
    /// `null`: unlimited.
    limit: Option<u64>,
    burst: Option<u64>,
    unlimited: bool,
    /// The limit of the file. `null`: unlimited, or the file has no such quota now.
    file_limit: Option<u64>,
    /// Whether the file has the quota, or it is one of the unlimited quotas that each environment has.
    in_file: bool,
    #[serde(flatten)]
    origin: OriginView,
}

/// Whether quotas are enforced, where an administrator has set it.
#[derive(Serialize, ToSchema)]
struct EnforceOverrideView {
    environment: String,
    enforce: bool,
    /// The value of the file.
    file_enforce: bool,
    #[serde(flatten)]
    origin: OriginView,
}

/// The query parameters.
#[derive(Default, serde::Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(in crate::admin) struct ListParameters {
    /// `json` or `yaml`. Default: `json`.
    format: String,
}

/// Everything that differs from the config file. With `format=yaml`: the patch that would put it into the file.
#[utoipa::path(get, path = "/api/overrides", tag = "quotas", params(ListParameters), responses(
    (status = 200, description = "The overrides.", body = OverrideList),
    (status = 400, description = "`invalid_value`: a parameter is not valid.", body = ErrorBody),
    AccessErrors,
))]
pub(in crate::admin) async fn list(
    State(admin): State<Admin>,
    query: QueryResult<ListParameters>,
) -> Response {
    let ListParameters { format } = match read_query(query) {
        Ok(parameters) => parameters,
        Err(refusal) => return *refusal,
    };
    let snapshot = admin.state.current();
    let accounts = snapshot.accounts.iter().chain(snapshot.upstream_accounts.iter().flatten());
    join_all(accounts.map(|account| account.refresh())).await;
    let environments = snapshot.environments();
    let all: Vec<_> =
        environments.iter().map(|(settings, account)| (settings.clone(), account.overrides())).collect();
    let upstreams = snapshot.config.upstreams.iter().zip(&snapshot.upstream_accounts);
    let upstreams: Vec<_> = upstreams
        .filter_map(|(settings, account)| Some((settings.clone(), account.as_ref()?.overrides())))
        .collect();
    match format.as_str() {
        "" | "json" => Json(to_json(&all, &upstreams)).into_response(),
        "yaml" => ([(header::CONTENT_TYPE, "application/yaml")], to_yaml(&all, &upstreams)).into_response(),
        _ => refusal(StatusCode::BAD_REQUEST, "invalid_value", "format must be json or yaml."),
    }
}

impl LimitOverrideView {
    /// `configured`: the quotas of the config.
    fn new(
        environment: Option<&str>,
        configured: &[Quota],
        LimitOverride { quota, origin }: &LimitOverride,
    ) -> Self {
        let file = configured.iter().find(|known| known.is_same_as(quota));
        Self {
            environment: environment.map(str::to_owned),
            scope: quota.scope.as_str(),
            name: Some(quota.scope.name().to_owned()).filter(|name| !name.is_empty()),
            kind: quota.kind.as_str(),
            per: quota.per.text.clone(),
            limit: limit(quota),
            burst: limit(quota).map(|_| quota.capacity()),
            unlimited: quota.is_unlimited(),
            file_limit: file.and_then(limit),
            in_file: file.is_some(),
            origin: OriginView::new(origin),
        }
    }
}

fn to_json(
    all: &[(Arc<Environment>, OverrideSet)],
    upstreams: &[(Arc<UpstreamSettings>, OverrideSet)],
) -> OverrideList {
    let mut list = OverrideList { overrides: Vec::new(), enforce: Vec::new() };
    for (settings, set) in all {
        let configured = settings.counted_quotas();
        let view = |set| LimitOverrideView::new(Some(&settings.name), &configured, set);
        list.overrides.extend(set.limits.iter().map(view));
        list.enforce.extend(set.enforce.iter().map(|EnforceOverride { enforce, origin }| {
            EnforceOverrideView {
                environment: settings.name.clone(),
                enforce: *enforce,
                file_enforce: settings.enforce,
                origin: OriginView::new(origin),
            }
        }));
    }
    for (settings, set) in upstreams {
        let view = |set| LimitOverrideView::new(None, &settings.quotas, set);
        list.overrides.extend(set.limits.iter().map(view));
    }
    list
}

/// The part of the config file that the overrides change. A kind is listed with all its quotas, because a list in the file
/// is replaced as a whole.
fn to_yaml(
    all: &[(Arc<Environment>, OverrideSet)],
    upstreams: &[(Arc<UpstreamSettings>, OverrideSet)],
) -> String {
    let mut text = String::from(
        "# The overrides in force. Merge this into the config file: mappings by key, lists of quotas as a whole.\n\
         # Below keys, copy the quotas into the caller with the same name. Do not replace the list: it has the keys.\n",
    );
    let has_part = |quotas: &[Quota], set: &OverrideSet| {
        set.enforce.is_some() || quotas.iter().any(|quota| set.of(quota).is_some())
    };
    for (settings, set) in all {
        write_removed(&mut text, &settings.name, &settings.counted_quotas(), set);
    }
    for (settings, set) in upstreams {
        write_removed(&mut text, &settings.name, &settings.quotas, set);
    }
    let changed: Vec<_> =
        all.iter().filter(|(settings, set)| has_part(&settings.counted_quotas(), set)).collect();
    text += if changed.is_empty() { "environments: {}\n" } else { "environments:\n" };
    for (settings, set) in changed {
        let _ = writeln!(text, "  {}:", quoted(&settings.name));
        if let Some(EnforceOverride { enforce, .. }) = &set.enforce {
            let _ = writeln!(text, "    enforce: {enforce}");
        }
        write_quotas(&mut text, &settings.counted_quotas(), set);
    }
    let changed: Vec<_> =
        upstreams.iter().filter(|(settings, set)| has_part(&settings.quotas, set)).collect();
    text += if changed.is_empty() { "" } else { "upstreams:\n" };
    for (settings, set) in changed {
        let _ = writeln!(text, "  {}:", quoted(&settings.name));
        write_quotas(&mut text, &settings.quotas, set);
    }
    text
}

/// Names the overrides of quotas that the config does not have now, as comments.
fn write_removed(text: &mut String, owner: &str, all: &[Quota], set: &OverrideSet) {
    let is_removed = |quota: &&Quota| !all.iter().any(|known| known.is_same_as(quota));
    for quota in set.limits.iter().map(|known| &known.quota).filter(is_removed) {
        let Quota { scope, kind, per, .. } = quota;
        // A name in quotation marks cannot end the comment.
        let whose = quoted(&scope.describe(owner));
        let _ = writeln!(
            text,
            "# Left out, because the file does not have this quota now: {whose}, {kind} per {}, limit {}",
            per.text,
            quota.limit_text()
        );
    }
}

/// `all`: the quotas of the environment or upstream in the config.
fn write_quotas(text: &mut String, all: &[Quota], set: &OverrideSet) {
    let overridden: Vec<&Quota> = all.iter().filter(|quota| set.of(quota).is_some()).collect();
    let mut scopes: Vec<&Scope> = Vec::new();
    for quota in &overridden {
        if !scopes.contains(&&quota.scope) {
            scopes.push(&quota.scope);
        }
    }
    let changes_of = |scope: &Scope, kind: Kind| -> Vec<Quota> {
        let is_changed = overridden.iter().any(|quota| quota.scope == *scope && quota.kind == kind);
        let of_kind = all.iter().filter(|quota| is_changed && quota.scope == *scope && quota.kind == kind);
        of_kind.map(|quota| set.apply_to(quota)).collect()
    };
    let mut last = "";
    for scope in ["environment", "caller", "model", "upstream", "upstream_model"]
        .iter()
        .flat_map(|word| scopes.iter().filter(move |scope| scope.as_str() == *word))
    {
        let (section, indent) = match scope {
            Scope::Environment | Scope::Upstream(_) => ("quotas", 6),
            Scope::Caller(_) => ("keys", 10),
            Scope::Model(_) | Scope::UpstreamModel(_) => ("model_quotas", 8),
        };
        if section != last {
            let _ = writeln!(text, "    {section}:");
            last = section;
        }
        match scope {
            Scope::Environment | Scope::Upstream(_) => {}
            Scope::Caller(name) => {
                let _ = writeln!(text, "      - name: {}\n        quotas:", quoted(name));
            }
            Scope::Model(pattern) => {
                let _ = writeln!(text, "      {}:", quoted(pattern.as_str()));
            }
            Scope::UpstreamModel(models) => {
                let _ = writeln!(text, "      {}:", quoted(models.pattern().as_str()));
            }
        }
        for kind in Kind::ALL {
            let quotas = changes_of(scope, kind);
            if !quotas.is_empty() {
                let _ = writeln!(text, "{:indent$}{kind}:", "");
            }
            for quota in quotas {
                let _ = writeln!(text, "{:indent$}  - {}", "", quota_yaml(&quota));
            }
        }
    }
}

fn quota_yaml(quota: &Quota) -> String {
    let Quota { per, window, .. } = quota;
    let mut text = format!("{{ limit: {}, per: {}", quota.limit_text(), quoted(&per.text));
    match window {
        Window::Rolling { burst } => {
            text += ", window: rolling";
            if *burst != quota.limit {
                let _ = write!(text, ", burst: {burst}");
            }
        }
        Window::Calendar { zone, .. } => {
            let _ =
                write!(text, ", window: calendar, timezone: {}", quoted(zone.iana_name().unwrap_or("UTC")));
        }
    }
    text + " }"
}

/// A text in double quotes, as JSON and YAML write it.
fn quoted(text: &str) -> String {
    // JSON leaves the character DEL and those after it as they are, which YAML does not allow.
    let escaped = |c: char| {
        if (0x7f..0xa0).contains(&u32::from(c)) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() }
    };
    serde_json::Value::from(text).to_string().chars().map(escaped).collect()
}

#[cfg(test)]
mod tests;
