//! The quota of a row.

use super::database::{signed, unsigned};
use crate::glob::Glob;
use crate::ledger::UPSTREAM_PREFIX;
use crate::quota::{ClockUnit, Kind, MAX_LIMIT, Period, Quota, Scope, UNLIMITED, UpstreamModels, Window};
use jiff::tz::TimeZone;

/// The quota of a row; `None`: this version of the gateway does not know it.
pub(super) fn stored_quota(row: &rusqlite::Row<'_>, owner: &str) -> rusqlite::Result<Option<Quota>> {
    let (scope, name, kind): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
    let (ms, window): (u64, String) = (unsigned(row.get(3)?), row.get(4)?);
    let limit = limit_of(row.get(6)?);
    let scope = match scope.as_str() {
        "environment" => Some(Scope::Environment),
        "caller" => Some(Scope::Caller(name.into())),
        "model" => Some(Scope::Model(Glob::new(name))),
        "upstream" => Some(Scope::Upstream(name.into())),
        "upstream_model" => upstream_models(owner, &name),
        _ => None,
    };
    let window = match window.as_str() {
        "rolling" => Some(Window::Rolling { burst: limit }),
        _ => ClockUnit::of_length(ms).map(|unit| Window::Calendar { unit, zone: TimeZone::UTC }),
    };
    let kind = Kind::ALL.into_iter().find(|known| known.as_str() == kind);
    let per = Period { text: row.get(5)?, ms };
    let quota = |((scope, kind), window)| Quota { scope, kind, limit, per, window };
    Ok(scope.zip(kind).zip(window).map(quota))
}

/// `owner`: the upstream's account, `upstream:openai`. `name`: `openai/gpt-4.1*`.
fn upstream_models(owner: &str, name: &str) -> Option<Scope> {
    let upstream = owner.strip_prefix(UPSTREAM_PREFIX)?;
    let pattern = name.strip_prefix(upstream)?.strip_prefix('/')?;
    Some(Scope::UpstreamModel(UpstreamModels::new(upstream, Glob::new(pattern))))
}

/// A limit in the store: 0 is unlimited.
pub(super) fn stored_limit(limit: u64) -> i64 {
    if limit == UNLIMITED { 0 } else { signed(limit) }
}

pub(super) fn limit_of(stored: i64) -> u64 {
    match unsigned(stored) {
        0 => UNLIMITED,
        limit => limit.min(MAX_LIMIT),
    }
}
