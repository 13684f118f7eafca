//! `store`: where counters are stored.

use super::description::{DefaultSpec, KeySpec, NONE, PATH, SectionSpec, TextSpec, ValueSpec, Word};
use super::setting::{Section, Setting};
use super::{OnStoreFailure, RedisSettings, Secret, StoreSettings};
use crate::redis;
use std::ops::RangeInclusive;
use std::time::Duration;

/// A node is back in its session before this expires, even with the largest timeout.
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_secs(5);

pub(super) const STORE: SectionSpec = SectionSpec {
    name: "store",
    keys: &[
        KeySpec::new(
            "path",
            PATH,
            DefaultSpec::Value("data/tollgate.db"),
            "the SQLite file, relative to the working directory of the gateway. The gateway creates its folder if necessary. Only one process can use a file",
        )
        .example("/var/lib/tollgate/tollgate.db")
        .fixed(),
        KeySpec::new(
            "history",
            ValueSpec::Duration,
            DefaultSpec::Value("35d"),
            "how long the store has usage per minute; older usage is merged into one row per day",
        )
        .example("90d")
        .changes_at_next_start(),
        KeySpec::new(
            "memory",
            ValueSpec::Boolean,
            DefaultSpec::Value("false"),
            "`true`: nothing is stored, and quotas are full after a restart. Not together with `redis`",
        )
        .fixed(),
        KeySpec::new(
            "redis",
            ValueSpec::Section(&REDIS),
            NONE,
            "counters that several gateways share ([cluster.md](cluster.md)). Usage history and totals stay in the SQLite file",
        )
        .example("{ url: \"redis://:${REDIS_PASSWORD}@redis:6379/0\" }"),
    ],
};

const REDIS: SectionSpec = SectionSpec {
    name: "redis",
    keys: &[
        KeySpec::new(
            "url",
            ValueSpec::SecretUrl(TextSpec { label: "URL", pattern: "^(redis|unix)[a-z+]*://" }),
            DefaultSpec::Required("redis://127.0.0.1:6379/0"),
            "`redis://`, `rediss://`, `redis+sentinel://` or `redis+cluster://`, see [cluster.md](cluster.md#connect-to-redis)",
        )
        .fixed(),
        KeySpec::new(
            "prefix",
            ValueSpec::Text(TextSpec { label: "text without { and }", pattern: "^[^{}]*$" }),
            DefaultSpec::Value("tollgate"),
            "prefix of every Redis key",
        )
        .example("tollgate-test")
        .fixed(),
        KeySpec::new(
            "timeout",
            ValueSpec::Duration,
            DefaultSpec::Value("250ms"),
            "a server that sends no reply for this time is unavailable; a shorter stall only delays requests. From `20ms` to `5s` ([cluster.md](cluster.md#without-redis))",
        )
        .example("100ms")
        .fixed(),
        KeySpec::new(
            "on_failure",
            ValueSpec::Words(&[
                Word("local", "admits from its share of the last known levels"),
                Word("closed", "answers 503"),
                Word("open", "admits up to the whole limits"),
            ]),
            DefaultSpec::Value("local"),
            "what a node does while Redis is unavailable ([cluster.md](cluster.md#without-redis))",
        ),
        KeySpec::new(
            "lease",
            ValueSpec::Boolean,
            DefaultSpec::Value("false"),
            "`true`: nodes lease parts of the quotas in advance, so that most requests do not wait for Redis",
        ),
    ],
};

/// Reads the settings of the store.
pub(super) fn read(top: &Section<'_>) -> StoreSettings {
    let section = top.section("store");
    let redis = section.get("redis");
    let memory = section.boolean("memory");
    if let Some(setting) = section.get("memory").filter(|_| memory && redis.is_some()) {
        setting.fault("store.memory and store.redis exclude each other; remove one of the two keys");
    }
    StoreSettings {
        path: section.path("path"),
        history: section.duration("history"),
        memory,
        redis: redis.and_then(|s| redis_settings(&s)),
    }
}

/// Braces would change the hash tag of the keys, by which a cluster finds their server.
fn prefix(section: &Section<'_>) -> String {
    let prefix = section.text("prefix");
    if prefix.contains(['{', '}'])
        && let Some(setting) = section.get("prefix")
    {
        setting.fault("it must not contain { or }; remove them");
    }
    prefix.to_owned()
}

fn redis_settings(setting: &Setting<'_>) -> Option<RedisSettings> {
    let section = setting.section(&REDIS)?;
    let url = section.require("url");
    Some(RedisSettings {
        prefix: prefix(&section),
        timeout: redis_timeout(&section),
        on_failure: match section.word("on_failure") {
            "closed" => OnStoreFailure::Closed,
            "open" => OnStoreFailure::Open,
            _ => OnStoreFailure::Local,
        },
        lease: section.boolean("lease"),
        url: Secret::new(url.and_then(|s| redis_url(&s))?),
    })
}

/// A timeout in the permitted range.
fn redis_timeout(section: &Section<'_>) -> Duration {
    let timeout = section.duration("timeout");
    if let Some(setting) = section.get("timeout").filter(|_| !TIMEOUTS.contains(&timeout)) {
        setting.fault(format!("{} is not between 20ms and 5s", setting.quoted()));
    }
    timeout
}

/// A valid Redis URL. It may contain a password, so no message contains it.
fn redis_url<'n>(setting: &Setting<'n>) -> Option<&'n str> {
    let url = setting.text()?;
    if let Err(message) = redis::check_url(url) {
        setting.fault(message);
    }
    Some(url)
}
