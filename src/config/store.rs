//! `store`: where counters are stored.

use super::setting::{Section, Setting};
use super::{OnStoreFailure, RedisSettings, Secret, StoreSettings};
use crate::redis;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Default of `store.redis.timeout`.
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(250);
/// A node is back in its session before this expires, even with the largest timeout.
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_secs(5);

/// Reads the settings of the store.
pub(super) fn read(top: &Section<'_>) -> StoreSettings {
    let section = top.section("store", &["path", "history", "redis", "memory"]);
    let memory = section.get("memory");
    let redis = section.get("redis");
    let is_in_memory = memory.as_ref().and_then(Setting::boolean).unwrap_or(false);
    if let Some(memory) = memory.filter(|_| is_in_memory && redis.is_some()) {
        memory.fault("store.memory and store.redis exclude each other; remove one of the two keys");
    }
    StoreSettings {
        path: section.get("path").and_then(|s| s.path()).unwrap_or_else(|| "data/tollgate.db".into()),
        history: section.get("history").and_then(|s| s.duration()).unwrap_or(Duration::from_hours(35 * 24)),
        memory: is_in_memory,
        redis: redis.and_then(|s| redis_settings(&s)),
    }
}

fn redis_settings(setting: &Setting<'_>) -> Option<RedisSettings> {
    let section = setting.section(&["url", "prefix", "timeout", "on_failure", "lease"])?;
    let policies = [
        ("local", OnStoreFailure::Local),
        ("closed", OnStoreFailure::Closed),
        ("open", OnStoreFailure::Open),
    ];
    let url = section.require("url", "redis://127.0.0.1:6379/0");
    Some(RedisSettings {
        prefix: section.get("prefix").and_then(|s| s.text()).unwrap_or("tollgate").to_owned(),
        timeout: section.get("timeout").and_then(|s| redis_timeout(&s)).unwrap_or(DEFAULT_TIMEOUT),
        on_failure: section
            .get("on_failure")
            .and_then(|s| s.choice(&policies))
            .unwrap_or(OnStoreFailure::Local),
        lease: section.get("lease").and_then(|s| s.boolean()).unwrap_or(false),
        url: Secret::new(url.and_then(|s| redis_url(&s))?),
    })
}

/// A timeout in the permitted range.
fn redis_timeout(setting: &Setting<'_>) -> Option<Duration> {
    let timeout = setting.duration()?;
    if !TIMEOUTS.contains(&timeout) {
        setting.fault(format!("{} is not between 20ms and 5s", setting.quoted()));
    }
    Some(timeout)
}

/// A valid Redis URL. It may contain a password, so no message contains it.
fn redis_url<'n>(setting: &Setting<'n>) -> Option<&'n str> {
    let url = setting.text()?;
    if let Err(message) = redis::check_url(url) {
        setting.fault(message);
    }
    Some(url)
}
