//! `?dry_run=true`: reports the effect of a new limit without setting it.

use super::target::Target;
use crate::admin::Admin;
use crate::quota::Quota;
use crate::{simulate, store};
use axum::Json;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// The effect that a new limit would have.
#[derive(Serialize, ToSchema)]
pub(super) struct DryRunView {
    /// Always `true`.
    dry_run: bool,
    /// `null`: unlimited.
    limit: Option<u64>,
    burst: Option<u64>,
    /// The amount that would remain now; negative: debt; `null`: unlimited.
    level: Option<i64>,
    /// The moment at which nothing would be left at the present rate (RFC 3339). `null`: not before the quota resets.
    exhausts_at: Option<String>,
    /// Estimate of the requests of the last hour that the limit would have refused. `null`: there is no usage
    /// history.
    refused_last_hour: Option<u64>,
}

pub(super) async fn answer(
    admin: &Admin,
    target: &Target,
    limit: u64,
    burst: u64,
) -> Result<Response, Box<Response>> {
    let quota = target.quota.with_limit(limit, burst);
    target.account.refresh().await;
    let preview = target.account.preview(&quota);
    let is_limited = !quota.is_unlimited();
    let at = preview.at;
    let view = DryRunView {
        dry_run: true,
        limit: is_limited.then_some(quota.limit),
        burst: is_limited.then(|| quota.capacity()),
        level: preview.level.as_ref().filter(|_| is_limited).map(|level| level.level),
        exhausts_at: preview
            .level
            .and_then(|level| level.exhausted_in_ms())
            .map(|ms| at.plus_ms(ms).to_rfc3339()),
        refused_last_hour: refused_last_hour(admin, target, quota).await,
    };
    Ok(Json(view).into_response())
}

async fn refused_last_hour(admin: &Admin, target: &Target, quota: Quota) -> Option<u64> {
    if quota.is_unlimited() {
        return Some(0);
    }
    let settings = admin.state.current().config.store.clone();
    if settings.memory {
        return None;
    }
    let account = target.owner.ledger_owner().key().into_owned();
    let now = crate::clock::now();
    let replay = move || -> anyhow::Result<Option<u64>> {
        let from = simulate::history_start(&quota, now);
        let history = store::read_usage_intervals(&settings.path, &account, &quota.scope, from, now)?;
        Ok(simulate::refused_in_history(&quota, &history, now))
    };
    match tokio::task::spawn_blocking(replay).await.map_err(anyhow::Error::from).flatten() {
        Ok(refused) => refused,
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), "a dry run cannot read the usage history");
            None
        }
    }
}
