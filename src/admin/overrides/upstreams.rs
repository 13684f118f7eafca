//! Limits of upstreams: an administrator changes or resets them as those of environments.

use super::description::{BodyErrors, UpstreamQuotaErrors, UpstreamQuotaPath};
use super::target::{Named, Target};
use super::{
    BodyResult, UpstreamLimitParameters, UpstreamQuotaParameters, body, delete_limit, dry_run, put_limit,
    reset_quota,
};
use crate::admin::Admin;
use crate::admin::answers::{AccessErrors, QueryResult, read_query};
use crate::admin::audit::Actor;
use crate::admin::upstreams::UpstreamLimitsView;
use axum::extract::{Extension, Path, State};
use axum::response::Response;

/// The answer to a new limit.
#[derive(utoipa::ToSchema)]
#[serde(untagged)]
#[allow(dead_code)] // describes answers, and is never made
enum UpstreamLimitAnswer {
    /// The upstream with the new limit.
    Changed(UpstreamLimitsView),
    /// With `dry_run`: the effect that the limit would have.
    DryRun(dry_run::DryRunView),
}

/// Sets the limit of a quota of an upstream.
#[utoipa::path(
    put,
    path = "/api/upstreams/{upstream}/quotas/{kind}/{per}",
    tag = "quotas",
    params(UpstreamQuotaPath, UpstreamLimitParameters),
    request_body = body::LimitFields,
    responses(
        (status = 200, description = "The new state.", body = UpstreamLimitAnswer),
        UpstreamQuotaErrors,
        BodyErrors,
        AccessErrors,
    )
)]
pub(in crate::admin) async fn set_upstream_limit(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    Path(path): Path<UpstreamQuotaPath>,
    query: QueryResult<UpstreamLimitParameters>,
    body: BodyResult,
) -> Response {
    let UpstreamLimitParameters { model, dry_run } = match read_query(query) {
        Ok(parameters) => parameters,
        Err(refusal) => return *refusal,
    };
    let target = Target::of_upstream(&admin, &path, &UpstreamQuotaParameters { model }, Named::Configured);
    put_limit(&admin, actor, target, dry_run, body).await.unwrap_or_else(|refusal| *refusal)
}

/// Returns to the limit of the config. Also removes the limit of a quota that the config does not have now.
#[utoipa::path(
    delete,
    path = "/api/upstreams/{upstream}/quotas/{kind}/{per}",
    tag = "quotas",
    params(UpstreamQuotaPath, UpstreamQuotaParameters),
    responses(
        (status = 200, description = "The upstream with the limit of the config.", body = UpstreamLimitsView),
        UpstreamQuotaErrors,
        AccessErrors,
    )
)]
pub(in crate::admin) async fn unset_upstream_limit(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    Path(path): Path<UpstreamQuotaPath>,
    query: QueryResult<UpstreamQuotaParameters>,
) -> Response {
    let target = read_query(query)
        .and_then(|parameters| Target::of_upstream(&admin, &path, &parameters, Named::Overridden));
    delete_limit(&admin, actor, target).await
}

/// Sets the used amount of a quota of an upstream to zero.
#[utoipa::path(
    post,
    path = "/api/upstreams/{upstream}/quotas/{kind}/{per}/reset",
    tag = "quotas",
    params(UpstreamQuotaPath, UpstreamQuotaParameters),
    responses(
        (status = 200, description = "The upstream after the reset.", body = UpstreamLimitsView),
        UpstreamQuotaErrors,
        AccessErrors,
    )
)]
pub(in crate::admin) async fn reset_upstream_quota(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    Path(path): Path<UpstreamQuotaPath>,
    query: QueryResult<UpstreamQuotaParameters>,
) -> Response {
    let target = read_query(query)
        .and_then(|parameters| Target::of_upstream(&admin, &path, &parameters, Named::Configured));
    reset_quota(&admin, actor, target).await
}
