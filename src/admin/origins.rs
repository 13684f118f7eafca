//! The origin of an override, as answers show it: the administrator, the time and the reason.

use crate::clock::Timestamp;
use crate::ledger::{LimitOverride, OverrideOrigin};
use crate::quota::Quota;
use serde::Serialize;
use utoipa::ToSchema;

/// The origin of a limit, and the limit of the file that it replaces.
#[derive(Serialize, ToSchema)]
pub(super) struct OverrideView {
    /// `null`: not known.
    by: Option<String>,
    /// RFC 3339; `null`: not known.
    since: Option<String>,
    /// RFC 3339; `null`: until it is deleted.
    until: Option<String>,
    reason: Option<String>,
    /// The limit of the file. `null`: unlimited.
    file_limit: Option<u64>,
}

impl OverrideView {
    /// `configured`: the quotas of the config.
    pub(super) fn new(set: &LimitOverride, configured: &[Quota]) -> Self {
        let file = configured.iter().find(|quota| quota.is_same_as(&set.quota));
        let OriginView { by, since, until, reason } = OriginView::new(&set.origin);
        Self { by, since, until, reason, file_limit: file.and_then(limit) }
    }
}

/// The origin of an override: how its administrator was identified, when it was set, when it ends, and the reason.
#[derive(Serialize, ToSchema)]
pub(super) struct OriginView {
    /// `null`: not known.
    by: Option<String>,
    /// RFC 3339; `null`: not known.
    since: Option<String>,
    /// RFC 3339; `null`: until it is deleted.
    until: Option<String>,
    reason: Option<String>,
}

impl OriginView {
    pub(super) fn new(origin: &OverrideOrigin) -> Self {
        let OverrideOrigin { by, since, until, reason } = origin;
        Self {
            by: Some(by.clone()).filter(|by| !by.is_empty()),
            since: (since.0 > 0).then(|| since.to_rfc3339()),
            until: until.map(Timestamp::to_rfc3339),
            reason: reason.clone(),
        }
    }
}

/// The limit of a quota. `None`: unlimited.
pub(super) fn limit(quota: &Quota) -> Option<u64> {
    (!quota.is_unlimited()).then_some(quota.limit)
}
