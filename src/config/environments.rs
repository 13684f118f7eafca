//! `environments`: callers, quotas and how much is reserved.

use super::fault::nearest;
use super::item::{Item, Section};
use super::units::{self, WORDS};
use super::{Caller, CompletionReserve, Environment, OnDisconnect, OnOverrun, Reserve, Upstream, WhenShort};
use crate::glob::Glob;
use crate::quota::{ClockUnit, Kind, MAX_LIMIT, Per, Quota, Scope, Window};
use jiff::tz::TimeZone;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Path segments that mean something else.
const RESERVED_NAMES: [&str; 3] = ["v1", "v1beta", "openai"];
/// Shorter keys can be guessed.
const SHORT_SECRET: usize = 16;

const DAY_MS: u64 = 86_400_000;

/// Reads every environment; what is wrong is noted.
pub(super) fn read(top: &Section<'_>, upstreams: &[Arc<Upstream>]) -> Vec<Arc<Environment>> {
    let example = "environments: { production: { upstream: openai, quotas: { total_tokens: { limit: 200k, per: minute } } } }";
    let Some(section) =
        top.require("environments", example).and_then(|i| i.map("a mapping of names to environments"))
    else {
        return Vec::new();
    };
    let mut digests = HashMap::new();
    let mut all = Vec::new();
    for (key, item) in section.items() {
        if !is_name(&key.name) {
            item.findings.fault(
                &key.place,
                &section.path,
                format!("\"{}\" cannot be an environment's name: it is the first segment of a path, so it takes [a-z0-9][a-z0-9_-]* and not v1, v1beta or openai", key.name),
            );
        }
        all.extend(environment(&key.name, &item, upstreams, &mut digests).map(Arc::new));
    }
    if section.items().next().is_none() {
        section.findings.fault(
            section.place,
            &section.path,
            format!("there has to be one; for example: {example}"),
        );
    }
    all
}

fn is_name(name: &str) -> bool {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    first
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'))
        && !RESERVED_NAMES.contains(&name)
}

fn environment(
    name: &str,
    item: &Item<'_>,
    upstreams: &[Arc<Upstream>],
    digests: &mut HashMap<[u8; 32], String>,
) -> Option<Environment> {
    let section = item.section(&[
        "upstream",
        "keys",
        "models",
        "max_in_flight",
        "quotas",
        "model_quotas",
        "enforce",
        "reserve",
        "on_disconnect",
        "other_paths",
        "unseen_prompt_tokens",
        "cached_prompt_tokens",
        "calibrate",
        "retry_patience",
    ])?;
    let get = |key: &str| section.get(key);
    let upstream = section.require("upstream", "openai").and_then(|i| named_upstream(&i, upstreams));
    let mut quotas = Vec::new();
    if let Some(item) = get("quotas") {
        read_quotas(&item, &Scope::Environment, &mut quotas);
    }
    let callers = callers(&section, digests, &mut quotas);
    if let Some(models) = get("model_quotas").and_then(|i| i.map("a mapping of model patterns to quotas")) {
        for (key, item) in models.items() {
            read_quotas(&item, &Scope::Model(Glob::new(&key.name)), &mut quotas);
        }
    }
    if quotas.is_empty() {
        item.warn("this environment has no quota: it may spend without bound");
    }
    if let Some(upstream) = upstream.as_ref().filter(|u| u.api_key.is_some() && callers.is_empty()) {
        item.warn(format!(
            "this environment is open: whoever reaches the gateway spends on the key of upstream \"{}\"; give it keys",
            upstream.name
        ));
    }
    Some(Environment {
        name: name.to_owned(),
        callers,
        models: get("models")
            .and_then(|i| i.list())
            .unwrap_or_default()
            .iter()
            .filter_map(|i| i.text().map(Glob::new))
            .collect(),
        max_in_flight: get("max_in_flight").and_then(|i| at_least_one(&i)),
        quotas,
        enforce: get("enforce").and_then(|i| i.boolean()).unwrap_or(true),
        reserve: reserve(get("reserve").as_ref()),
        on_disconnect: get("on_disconnect")
            .and_then(|i| i.choice(&[("cancel", OnDisconnect::Cancel), ("drain", OnDisconnect::Drain)]))
            .unwrap_or(OnDisconnect::Cancel),
        forward_other_paths: get("other_paths")
            .and_then(|i| i.choice(&[("deny", false), ("forward", true)]))
            .unwrap_or(false),
        unseen_prompt_tokens: get("unseen_prompt_tokens").and_then(|i| i.amount()).unwrap_or(2_000),
        count_cached_prompt_tokens: get("cached_prompt_tokens")
            .and_then(|i| i.choice(&[("count", true), ("skip", false)]))
            .unwrap_or(true),
        calibrate: get("calibrate").and_then(|i| i.boolean()).unwrap_or(true),
        retry_patience: get("retry_patience").and_then(|i| i.duration()).unwrap_or(Duration::from_secs(30)),
        // A missing or unknown one was noted: the config is refused.
        upstream: upstream?,
    })
}

fn named_upstream(item: &Item<'_>, upstreams: &[Arc<Upstream>]) -> Option<Arc<Upstream>> {
    let name = item.text()?;
    let found = upstreams.iter().find(|u| u.name == name).cloned();
    if found.is_none() {
        let hint = nearest(name, upstreams.iter().map(|u| u.name.as_str()));
        let hint = hint.map(|near| format!("; did you mean \"{near}\"?")).unwrap_or_default();
        item.fault(format!("there is no upstream {}{hint}", item.shown()));
    }
    found
}

fn at_least_one(item: &Item<'_>) -> Option<u64> {
    let amount = item.amount()?;
    if amount == 0 {
        item.fault("0 would refuse every request; leave it out for no bound");
    }
    Some(amount)
}

fn callers(
    section: &Section<'_>,
    digests: &mut HashMap<[u8; 32], String>,
    quotas: &mut Vec<Quota>,
) -> Vec<Caller> {
    let mut callers: Vec<Caller> = Vec::new();
    for item in section.get("keys").and_then(|i| i.list()).unwrap_or_default() {
        let Some(key) = item.section(&["name", "secret", "sha256", "quotas"]) else { continue };
        let name = key.require("name", "web-app").and_then(|i| caller_name(&i, &callers));
        let sha256 = match (key.get("secret"), key.get("sha256")) {
            (Some(secret), None) => digest_of_secret(&secret),
            (None, Some(sha256)) => {
                sha256.parsed(digest, "64 hexadecimal digits, as `tollgate hash-key` prints them")
            }
            _ => {
                item.fault("give the key as secret: ${VARIABLE}, or its digest as sha256: (see `tollgate hash-key`), not both");
                None
            }
        };
        let (Some(name), Some(sha256)) = (name, sha256) else { continue };
        if let Some(other) = digests.insert(sha256, item.path.clone()) {
            item.fault(format!("this key stands at {other} too; every caller has a key of its own"));
        }
        if let Some(own) = key.get("quotas") {
            read_quotas(&own, &Scope::Caller(callers.len(), name.clone()), quotas);
        }
        callers.push(Caller { name, sha256 });
    }
    callers
}

fn caller_name(item: &Item<'_>, callers: &[Caller]) -> Option<String> {
    let is_name = |t: &str| {
        (1..=64).contains(&t.len())
            && t.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    };
    let name =
        item.parsed(|t| is_name(t).then(|| t.to_owned()), "a caller's name: 1 to 64 of A-Z a-z 0-9 . _ -")?;
    if callers.iter().any(|c| c.name == name) {
        item.fault(format!("the caller \"{name}\" stands here twice"));
    }
    Some(name)
}

fn digest_of_secret(item: &Item<'_>) -> Option<[u8; 32]> {
    let secret = item.text()?;
    if secret.is_empty() {
        item.fault("the key is empty: anybody would have it");
        return None;
    }
    if secret.trim() != secret || !secret.bytes().all(|b| b.is_ascii_graphic()) {
        item.fault("the key has characters that no header can carry, or spaces around it");
        return None;
    }
    if secret.len() < SHORT_SECRET {
        item.warn(format!("this key is shorter than {SHORT_SECRET} characters: it can be guessed"));
    }
    Some(Sha256::digest(secret).into())
}

fn digest(hex: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (at, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(digest)
}

fn reserve(item: Option<&Item<'_>>) -> Reserve {
    let section = item.and_then(|i| {
        i.section(&[
            "prompt",
            "completion",
            "quantile",
            "default_max_tokens",
            "when_short",
            "on_overrun",
            "max_wait",
        ])
    });
    let get = |key: &str| section.as_ref().and_then(|s| s.get(key));
    let completion = |text: &str| match text {
        "adaptive" => Some(CompletionReserve::Adaptive),
        "max_tokens" => Some(CompletionReserve::MaxTokens),
        "none" => Some(CompletionReserve::None),
        _ => units::amount(text).filter(|&n| n <= crate::quota::MAX_AMOUNT).map(CompletionReserve::Fixed),
    };
    let quantile = |text: &str| text.parse::<f64>().ok().filter(|q| *q > 0.0 && *q < 1.0);
    Reserve {
        prompt: get("prompt").and_then(|i| i.choice(&[("estimate", true), ("none", false)])).unwrap_or(true),
        completion: get("completion")
            .and_then(|i| i.parsed(completion, "adaptive, max_tokens, none or a number of tokens"))
            .unwrap_or(CompletionReserve::Adaptive),
        quantile: get("quantile")
            .and_then(|i| i.parsed(quantile, "a number between 0 and 1, such as 0.9"))
            .unwrap_or(0.9),
        default_max_tokens: get("default_max_tokens").and_then(|i| at_least_one(&i)).unwrap_or(4_096),
        when_short: get("when_short")
            .and_then(|i| i.choice(&[("reject", WhenShort::Reject), ("clamp", WhenShort::Clamp)]))
            .unwrap_or(WhenShort::Reject),
        on_overrun: get("on_overrun")
            .and_then(|i| i.choice(&[("finish", OnOverrun::Finish), ("cut", OnOverrun::Cut)]))
            .unwrap_or(OnOverrun::Finish),
        max_wait: get("max_wait").and_then(|i| i.duration()).unwrap_or(Duration::ZERO),
    }
}

const KINDS: [(&str, Kind); 4] = [
    ("total_tokens", Kind::TotalTokens),
    ("prompt_tokens", Kind::PromptTokens),
    ("completion_tokens", Kind::CompletionTokens),
    ("requests", Kind::Requests),
];

fn read_quotas(item: &Item<'_>, scope: &Scope, quotas: &mut Vec<Quota>) {
    let Some(section) = item.section(&KINDS.map(|(name, _)| name)) else { return };
    for (name, kind) in KINDS {
        for item in section.get(name).map(|i| i.one_or_more()).unwrap_or_default() {
            let Some(quota) = quota(&item, scope, kind) else { continue };
            if quotas.iter().any(|q| q.scope == quota.scope && q.kind == kind && q.per.ms == quota.per.ms) {
                item.fault(format!("there is a quota on {name} per {} already", quota.per.written));
            }
            quotas.push(quota);
        }
    }
}

fn quota(item: &Item<'_>, scope: &Scope, kind: Kind) -> Option<Quota> {
    let section = item.section(&["limit", "per", "window", "burst", "timezone"])?;
    let limit = section.require("limit", "200k").and_then(|i| limit(&i));
    let per = section.require("per", "minute").and_then(|i| per(&i));
    let burst = section.get("burst").and_then(|i| limit_of_burst(&i));
    let zone = section.get("timezone").map(|i| timezone(&i));
    let (limit, per) = (limit?, per?);
    let windows = [("rolling", false), ("calendar", true)];
    let default = per.ms >= DAY_MS;
    let is_calendar = section.get("window").and_then(|i| i.choice(&windows)).unwrap_or(default);
    let window = if is_calendar {
        if let Some(item) = section.get("burst") {
            item.fault("a calendar window has no burst: its whole limit is there from the start");
        }
        let Some(unit) = clock_unit(&per) else {
            item.fault(format!(
                "\"{}\" is no period of the clock: write second, minute, hour, day, week or month, or window: rolling",
                per.written
            ));
            return None;
        };
        Window::Calendar { unit, zone: zone.unwrap_or(Some(TimeZone::UTC))? }
    } else {
        if let Some(item) = section.get("timezone") {
            item.fault(
                "a rolling window has no time zone; for one that follows the clock write window: calendar",
            );
        }
        Window::Rolling { burst: burst.unwrap_or(limit) }
    };
    Some(Quota { scope: scope.clone(), kind, limit, per, window })
}

fn limit(item: &Item<'_>) -> Option<u64> {
    let limit = item.amount()?;
    if limit == 0 {
        item.fault("a limit of 0 would refuse everything; to forbid models list the others under models, to forbid a caller remove its key");
        return None;
    }
    bounded(item, limit)
}

fn limit_of_burst(item: &Item<'_>) -> Option<u64> {
    let burst = item.amount()?;
    if burst == 0 {
        item.fault("a burst of 0 would refuse everything; leave it out for a burst of the limit's size");
        return None;
    }
    bounded(item, burst)
}

fn bounded(item: &Item<'_>, amount: u64) -> Option<u64> {
    if amount > MAX_LIMIT {
        item.fault(format!("{} is more than the most that can be counted, 2^50 ({MAX_LIMIT})", item.shown()));
        return None;
    }
    Some(amount)
}

fn per(item: &Item<'_>) -> Option<Per> {
    let ms = u64::try_from(item.duration()?.as_millis()).unwrap_or(u64::MAX);
    if ms == 0 || ms > 366 * DAY_MS {
        item.fault("a period has to be longer than nothing and no longer than a year");
        return None;
    }
    Some(Per { written: item.text()?.to_owned(), ms })
}

/// Odd durations below a day roll; `1h` is an hour of the clock as well as any.
fn clock_unit(per: &Per) -> Option<ClockUnit> {
    let unit = |word: &str| match word {
        "second" => ClockUnit::Second,
        "minute" => ClockUnit::Minute,
        "hour" => ClockUnit::Hour,
        "day" => ClockUnit::Day,
        "week" => ClockUnit::Week,
        _ => ClockUnit::Month,
    };
    if per.written != "month" && per.ms == 30 * DAY_MS {
        return None; // thirty days are no month of the clock
    }
    WORDS.iter().find(|(_, ms)| *ms == per.ms).map(|(word, _)| unit(word))
}

fn timezone(item: &Item<'_>) -> Option<TimeZone> {
    let name = item.text()?;
    if let Ok(zone) = TimeZone::get(name) {
        return Some(zone);
    }
    let known: Vec<String> = jiff::tz::db().available().map(|n| n.as_str().to_owned()).collect();
    let hint = nearest(name, known.iter().map(String::as_str));
    let hint = hint
        .map_or("it is a name such as Europe/Berlin".to_owned(), |near| format!("did you mean \"{near}\"?"));
    item.fault(format!("there is no time zone {}; {hint}", item.shown()));
    None
}
