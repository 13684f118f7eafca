//! `environments`: who may spend how much, and where it goes.

use super::callers::{self, Digests};
use super::item::{Item, Section};
use super::{CompletionReserve, Environment, OnDisconnect, OnOverrun, Reserve, Upstream, WhenShort};
use super::{quotas, units};
use crate::glob::Glob;
use crate::quota::{Kind, MAX_AMOUNT, Quota};
use std::sync::Arc;
use std::time::Duration;

const EXAMPLE: &str = "environments: { production: { upstream: openai, quotas: { total_tokens: { limit: 200k, per: minute } } } }";

/// Path segments that mean something else.
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

/// Reads every environment; what is wrong is noted.
pub(super) fn read(top: &Section<'_>, upstreams: &[Arc<Upstream>]) -> Vec<Arc<Environment>> {
    let item = top.require("environments", EXAMPLE);
    let Some(section) = item.and_then(|i| i.map("a mapping of names to environments")) else {
        return Vec::new();
    };
    if section.names().is_empty() {
        section.fault(format!("there has to be one; for example: {EXAMPLE}"));
    }
    let known = top.get("upstreams").and_then(|i| i.map("a mapping of names to upstreams"));
    let context = Context { known: known.map_or(Vec::new(), |s| s.names()), upstreams };
    let mut digests = Digests::default();
    let mut environments = Vec::new();
    for (key, item) in section.items() {
        if !is_name(&key.name) {
            let message = format!(
                "\"{}\" cannot be the name of an environment, which is the first segment of a path: \
                 small letters, digits, _ and - are allowed, and not v1, v1beta or openai",
                key.name
            );
            item.findings.fault(&key.place, &section.path, message);
        }
        environments.extend(environment(&key.name, &item, &context, &mut digests).map(Arc::new));
    }
    environments
}

fn is_name(name: &str) -> bool {
    let is_alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.bytes().next().is_some_and(is_alphanumeric)
        && name.bytes().all(|b| is_alphanumeric(b) || matches!(b, b'_' | b'-'))
        && !RESERVED_NAMES.contains(&name)
}

struct Context<'a> {
    /// The names of all upstreams in the file, also of those that are at fault.
    known: Vec<&'a str>,
    upstreams: &'a [Arc<Upstream>],
}

fn environment(
    name: &str,
    item: &Item<'_>,
    context: &Context<'_>,
    digests: &mut Digests,
) -> Option<Environment> {
    let section = item.section(SETTINGS)?;
    let get = |key: &str| section.get(key);
    let upstream = section.require("upstream", context.known.first().unwrap_or(&"openai"));
    let upstream = upstream.and_then(|i| i.name_among("upstream", &context.known)).and_then(|at| {
        let name = context.known[at];
        context.upstreams.iter().find(|u| u.name == name).cloned()
    });
    let (callers, quotas) = callers_and_quotas(&section, digests);
    check_exposure(item, upstream.as_deref(), callers.is_empty(), quotas.is_empty());
    let reserve = reserve(&section, &quotas);
    Some(Environment {
        name: name.to_owned(),
        callers,
        models: section.bound("models").map(|i| allowed_models(&i)).unwrap_or_default(),
        max_in_flight: section.bound("max_in_flight").and_then(|i| {
            i.positive(u64::MAX, "0 would refuse every request; leave the key out for no bound")
        }),
        quotas,
        enforce: get("enforce").and_then(|i| i.boolean()).unwrap_or(true),
        reserve,
        on_disconnect: get("on_disconnect")
            .and_then(|i| i.choice(&[("cancel", OnDisconnect::Cancel), ("drain", OnDisconnect::Drain)]))
            .unwrap_or(OnDisconnect::Cancel),
        forward_other_paths: get("other_paths")
            .and_then(|i| i.choice(&[("deny", false), ("forward", true)]))
            .unwrap_or(false),
        unseen_prompt_tokens: get("unseen_prompt_tokens").and_then(|i| reservable(&i)).unwrap_or(2_000),
        count_cached_prompt_tokens: get("cached_prompt_tokens")
            .and_then(|i| i.choice(&[("count", true), ("skip", false)]))
            .unwrap_or(true),
        calibrate: get("calibrate").and_then(|i| i.boolean()).unwrap_or(true),
        retry_patience: get("retry_patience").and_then(|i| i.duration()).unwrap_or(Duration::from_secs(30)),
        upstream: upstream?,
    })
}

fn callers_and_quotas(section: &Section<'_>, digests: &mut Digests) -> (Vec<super::Caller>, Vec<Quota>) {
    let mut quotas = Vec::new();
    if let Some(item) = section.bound("quotas") {
        quotas::of_environment(&item, &mut quotas);
    }
    let callers = section.bound("keys").map(|i| callers::read(&i, digests, &mut quotas)).unwrap_or_default();
    if let Some(item) = section.bound("model_quotas") {
        quotas::of_models(&item, &mut quotas);
    }
    (callers, quotas)
}

/// What is allowed, but may cost somebody money who did not mean it.
fn check_exposure(item: &Item<'_>, upstream: Option<&Upstream>, is_open: bool, is_unbounded: bool) {
    if is_unbounded {
        item.warn("this environment has no quota: its callers may spend without bound");
    }
    if let Some(upstream) = upstream.filter(|u| is_open && u.api_key.is_some()) {
        item.warn(format!(
            "this environment is open: whoever reaches the gateway spends on the api_key of upstream \"{}\"; \
             give the environment keys",
            upstream.name
        ));
    }
    if let Some(upstream) = upstream.filter(|u| !is_open && u.api_key.is_none()) {
        item.warn(format!(
            "the keys of this environment are never sent upstream, and upstream \"{}\" has no api_key: \
             callers have to send the upstream's own key too, in another header; set api_key",
            upstream.name
        ));
    }
}

fn allowed_models(item: &Item<'_>) -> Vec<Glob> {
    let list = item.list();
    if list.as_ref().is_some_and(Vec::is_empty) {
        item.fault("an empty list would allow no model; leave the key out to allow all");
    }
    list.unwrap_or_default().iter().filter_map(|i| i.text().map(Glob::new)).collect()
}

/// An amount that a request can reserve.
fn reservable(item: &Item<'_>) -> Option<u64> {
    let amount = item.amount()?;
    if amount > MAX_AMOUNT {
        item.fault(format!("{} is more than a request can reserve, at most {MAX_AMOUNT}", item.shown()));
    }
    Some(amount)
}

fn reserve(environment: &Section<'_>, quotas: &[Quota]) -> Reserve {
    let known =
        ["prompt", "completion", "quantile", "default_max_tokens", "when_short", "on_overrun", "max_wait"];
    let section = environment.section("reserve", &known);
    let get = |key: &str| section.get(key);
    let quantile = |text: &str| text.parse::<f64>().ok().filter(|q| *q > 0.0 && *q < 1.0);
    let reserve = Reserve {
        prompt: get("prompt").and_then(|i| i.choice(&[("estimate", true), ("none", false)])).unwrap_or(true),
        completion: get("completion")
            .and_then(|i| i.parsed(completion, "adaptive, max_tokens, none or a number of tokens"))
            .unwrap_or(CompletionReserve::Adaptive),
        quantile: get("quantile")
            .and_then(|i| i.parsed(quantile, "a number between 0 and 1, such as 0.9"))
            .unwrap_or(0.9),
        default_max_tokens: get("default_max_tokens")
            .and_then(|i| i.positive(MAX_AMOUNT, "0 would reserve nothing; completion: none does that"))
            .unwrap_or(4_096),
        when_short: get("when_short")
            .and_then(|i| i.choice(&[("reject", WhenShort::Reject), ("clamp", WhenShort::Clamp)]))
            .unwrap_or(WhenShort::Reject),
        on_overrun: get("on_overrun")
            .and_then(|i| i.choice(&[("finish", OnOverrun::Finish), ("cut", OnOverrun::Cut)]))
            .unwrap_or(OnOverrun::Finish),
        max_wait: get("max_wait").and_then(|i| i.duration()).unwrap_or(Duration::ZERO),
    };
    let told_at = get("default_max_tokens").filter(|_| reserve.completion == CompletionReserve::MaxTokens);
    if let Some(item) = told_at.or_else(|| get("completion")) {
        check_room(&item, &reserve, quotas);
    }
    reserve
}

/// What is reserved whatever the request has to fit the smallest quota, or it is refused for ever.
fn check_room(item: &Item<'_>, reserve: &Reserve, quotas: &[Quota]) {
    let (tokens, whose) = match reserve.completion {
        CompletionReserve::Fixed(tokens) => (tokens, "every request"),
        CompletionReserve::MaxTokens => (reserve.default_max_tokens, "a request that names no max_tokens"),
        CompletionReserve::Adaptive | CompletionReserve::None => return,
    };
    let of_completions =
        quotas.iter().filter(|q| matches!(q.kind, Kind::TotalTokens | Kind::CompletionTokens));
    let Some(smallest) = of_completions.min_by_key(|quota| quota.capacity()) else { return };
    if reserve.when_short == WhenShort::Reject && tokens > smallest.capacity() {
        let Quota { kind, per, .. } = smallest;
        item.warn(format!(
            "{whose} reserves {tokens} completion tokens, more than {kind} per {} can ever hold, {}: it will be \
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
