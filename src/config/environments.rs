//! `environments`: upstream, callers, quotas and policies of each environment.

use super::callers::{self, Digests};
use super::setting::{Section, Setting};
use super::{
    CompletionReserve, Environment, OnDisconnect, OnOverrun, ReserveSettings, UpstreamSettings, WhenShort,
};
use super::{contradictions, quotas, units};
use crate::glob::Glob;
use crate::quota::{Kind, MAX_AMOUNT, Quota};
use std::sync::Arc;
use std::time::Duration;

const EXAMPLE: &str = "environments: { production: { upstream: openai, quotas: { total_tokens: { limit: 200k, per: minute } } } }";

/// Names that an environment must not have, because they are the first segments of API paths.
const RESERVED_NAMES: [&str; 3] = ["v1", "v1beta", "openai"];

const SETTINGS: &[&str] = &[
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
];

/// Reads every environment and records its faults.
pub(super) fn read(top: &Section<'_>, upstreams: &[Arc<UpstreamSettings>]) -> Vec<Arc<Environment>> {
    let setting = top.require("environments", EXAMPLE);
    let Some(section) = setting.and_then(|s| s.map("a mapping of names to environments")) else {
        return Vec::new();
    };
    if section.names().is_empty() {
        section.fault(format!("at least one environment is required; for example: {EXAMPLE}"));
    }
    let declared = top.get("upstreams").and_then(|s| s.map("a mapping of names to upstreams"));
    let upstreams = DeclaredUpstreams { names: declared.map_or(Vec::new(), |s| s.names()), valid: upstreams };
    let mut digests = Digests::default();
    let mut environments = Vec::new();
    for (key, setting) in section.entries() {
        if !is_name(&key.name) {
            let message = format!(
                "\"{}\" cannot be the name of an environment, which is the first segment of a path; use small \
                 letters, digits, _ and -, and not v1, v1beta or openai",
                key.name
            );
            setting.findings.fault(&key.location, &section.path, message);
        }
        environments.extend(environment(&key.name, &setting, &upstreams, &mut digests).map(Arc::new));
    }
    environments
}

fn is_name(name: &str) -> bool {
    let is_alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.bytes().next().is_some_and(is_alphanumeric)
        && name.bytes().all(|b| is_alphanumeric(b) || matches!(b, b'_' | b'-'))
        && !RESERVED_NAMES.contains(&name)
}

struct DeclaredUpstreams<'a> {
    /// The names of all upstreams in the file, also of those that have faults.
    names: Vec<&'a str>,
    /// The upstreams that have no faults.
    valid: &'a [Arc<UpstreamSettings>],
}

fn environment(
    name: &str,
    setting: &Setting<'_>,
    upstreams: &DeclaredUpstreams<'_>,
    digests: &mut Digests,
) -> Option<Environment> {
    let section = setting.section(SETTINGS)?;
    let get = |key: &str| section.get(key);
    let upstream = section.require("upstream", upstreams.names.first().unwrap_or(&"openai"));
    let upstream = upstream.and_then(|s| s.index_of_name("upstream", &upstreams.names)).and_then(|at| {
        let name = upstreams.names[at];
        upstreams.valid.iter().find(|u| u.name == name).cloned()
    });
    let (callers, quotas) = callers_and_quotas(&section, digests);
    check_exposure(setting, upstream.as_deref(), callers.is_empty(), quotas.is_empty());
    let reserve = reserve(&section, &quotas);
    let models = section.restriction("models").map(|s| allowed_models(&s)).unwrap_or_default();
    contradictions::warn(&section, &models, &quotas);
    Some(Environment {
        name: name.to_owned(),
        callers,
        models,
        max_in_flight: section.restriction("max_in_flight").and_then(|s| {
            s.positive(u64::MAX, "0 would refuse every request; leave the key out for no limit")
        }),
        quotas,
        enforce: get("enforce").and_then(|s| s.boolean()).unwrap_or(true),
        reserve,
        on_disconnect: get("on_disconnect")
            .and_then(|s| s.choice(&[("cancel", OnDisconnect::Cancel), ("drain", OnDisconnect::Drain)]))
            .unwrap_or(OnDisconnect::Cancel),
        forward_other_paths: get("other_paths")
            .and_then(|s| s.choice(&[("deny", false), ("forward", true)]))
            .unwrap_or(false),
        unseen_prompt_tokens: get("unseen_prompt_tokens").and_then(|s| reservable(&s)).unwrap_or(2_000),
        count_cached_prompt_tokens: get("cached_prompt_tokens")
            .and_then(|s| s.choice(&[("count", true), ("skip", false)]))
            .unwrap_or(true),
        calibrate: get("calibrate").and_then(|s| s.boolean()).unwrap_or(true),
        retry_patience: get("retry_patience").and_then(|s| s.duration()).unwrap_or(Duration::from_secs(30)),
        upstream: upstream?,
    })
}

fn callers_and_quotas(
    section: &Section<'_>,
    digests: &mut Digests,
) -> (Vec<super::CallerSettings>, Vec<Quota>) {
    let mut quotas = Vec::new();
    if let Some(setting) = section.restriction("quotas") {
        quotas::of_environment(&setting, &mut quotas);
    }
    let callers =
        section.restriction("keys").map(|s| callers::read(&s, digests, &mut quotas)).unwrap_or_default();
    if let Some(setting) = section.restriction("model_quotas") {
        quotas::of_models(&setting, &mut quotas);
    }
    (callers, quotas)
}

/// Warns about settings that are allowed but may let callers spend without limit.
fn check_exposure(
    setting: &Setting<'_>,
    upstream: Option<&UpstreamSettings>,
    is_open: bool,
    is_unbounded: bool,
) {
    if is_unbounded {
        setting.warn("this environment has no quota, so its callers can spend without limit; add a quota");
    }
    if let Some(upstream) = upstream.filter(|u| is_open && u.api_key.is_some()) {
        setting.warn(format!(
            "this environment is open, so anyone who reaches the gateway can spend on the api_key of upstream \"{}\"; \
             add keys to the environment",
            upstream.name
        ));
    }
    if let Some(upstream) = upstream.filter(|u| !is_open && u.api_key.is_none()) {
        setting.warn(format!(
            "the keys of this environment are never sent upstream, and upstream \"{}\" has no api_key, so \
             callers must also send the upstream's key in another header; set api_key",
            upstream.name
        ));
    }
}

fn allowed_models(setting: &Setting<'_>) -> Vec<Glob> {
    let list = setting.list();
    if list.as_ref().is_some_and(Vec::is_empty) {
        setting.fault("an empty list would allow no model; leave the key out to allow all models");
    }
    list.unwrap_or_default().iter().filter_map(|s| s.text().map(Glob::new)).collect()
}

/// An amount of tokens that one request can reserve.
fn reservable(setting: &Setting<'_>) -> Option<u64> {
    let amount = setting.amount()?;
    if amount > MAX_AMOUNT {
        setting.fault(format!(
            "{} is more than a request can reserve; the maximum is {MAX_AMOUNT}",
            setting.quoted()
        ));
    }
    Some(amount)
}

fn reserve(environment: &Section<'_>, quotas: &[Quota]) -> ReserveSettings {
    let known =
        ["prompt", "completion", "quantile", "default_max_tokens", "when_short", "on_overrun", "max_wait"];
    let section = environment.section("reserve", &known);
    let get = |key: &str| section.get(key);
    let quantile = |text: &str| text.parse::<f64>().ok().filter(|q| *q > 0.0 && *q < 1.0);
    let reserve = ReserveSettings {
        prompt: get("prompt").and_then(|s| s.choice(&[("estimate", true), ("none", false)])).unwrap_or(true),
        completion: get("completion")
            .and_then(|s| s.parsed(completion, "adaptive, max_tokens, none or a number of tokens"))
            .unwrap_or(CompletionReserve::Adaptive),
        quantile: get("quantile")
            .and_then(|s| s.parsed(quantile, "a number between 0 and 1, such as 0.9"))
            .unwrap_or(0.9),
        default_max_tokens: get("default_max_tokens")
            .and_then(|s| {
                s.positive(MAX_AMOUNT, "0 would reserve nothing; to reserve nothing, write completion: none")
            })
            .unwrap_or(4_096),
        when_short: get("when_short")
            .and_then(|s| s.choice(&[("reject", WhenShort::Reject), ("clamp", WhenShort::Clamp)]))
            .unwrap_or(WhenShort::Reject),
        on_overrun: get("on_overrun")
            .and_then(|s| s.choice(&[("finish", OnOverrun::Finish), ("cut", OnOverrun::Cut)]))
            .unwrap_or(OnOverrun::Finish),
        max_wait: get("max_wait").and_then(|s| s.duration()).unwrap_or(Duration::ZERO),
    };
    let checked = get("default_max_tokens").filter(|_| reserve.completion == CompletionReserve::MaxTokens);
    if let Some(setting) = checked.or_else(|| get("completion")) {
        check_reserve_fits(&setting, &reserve, quotas);
    }
    reserve
}

/// Warns if the fixed part of the reservation exceeds the smallest quota. Such a request could never be admitted.
fn check_reserve_fits(setting: &Setting<'_>, reserve: &ReserveSettings, quotas: &[Quota]) {
    let (tokens, which) = match reserve.completion {
        CompletionReserve::Fixed(tokens) => (tokens, "every request"),
        CompletionReserve::MaxTokens => (reserve.default_max_tokens, "a request without max_tokens"),
        CompletionReserve::Adaptive | CompletionReserve::None => return,
    };
    let of_completions =
        quotas.iter().filter(|q| matches!(q.kind, Kind::TotalTokens | Kind::CompletionTokens));
    let Some(smallest) = of_completions.min_by_key(|quota| quota.capacity()) else { return };
    if reserve.when_short == WhenShort::Reject && tokens > smallest.capacity() {
        let Quota { kind, per, .. } = smallest;
        setting.warn(format!(
            "{which} reserves {tokens} completion tokens, but {kind} per {} holds at most {}, so the request is always \
             refused; reserve less, raise the quota, or write when_short: clamp",
            per.text,
            smallest.capacity()
        ));
    }
}

fn completion(text: &str) -> Option<CompletionReserve> {
    match text {
        "adaptive" => Some(CompletionReserve::Adaptive),
        "max_tokens" => Some(CompletionReserve::MaxTokens),
        "none" => Some(CompletionReserve::None),
        _ => units::amount(text).filter(|&n| n <= MAX_AMOUNT).map(CompletionReserve::Fixed),
    }
}
