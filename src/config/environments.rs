//! `environments`: upstream, callers, quotas and policies of each environment.

use super::callers::{self, CALLER, Digests};
use super::description::{DefaultSpec, KeySpec, NONE, PATTERN, SectionSpec, TextSpec, ValueSpec, Word, text};
use super::quotas::QUOTAS;
use super::setting::{Section, Setting};
use super::{
    CompletionReserve, Environment, OnDisconnect, OnOverrun, ReserveSettings, UpstreamSettings, WhenShort,
};
use super::{contradictions, quotas, routes, units};
use crate::glob::Glob;
use crate::quota::{Kind, MAX_AMOUNT, Quota};
use std::sync::Arc;

pub(super) const EXAMPLE: &str = "environments: { production: { upstream: openai, quotas: { total_tokens: { limit: 200k, per: minute } } } }";

/// Names that an environment must not have, because they are the first segments of API paths.
const RESERVED_NAMES: [&str; 3] = ["v1", "v1beta", "openai"];

/// The names of environments.
pub(super) const NAME_PATTERN: &str = "^[a-z0-9][a-z0-9_-]*$";

/// `environments.*`.
pub(super) const ENVIRONMENT: SectionSpec = SectionSpec {
    name: "environment",
    keys: &[
        KeySpec::new(
            "upstream",
            ValueSpec::Text(text("name of an upstream")),
            DefaultSpec::Required("openai"),
            "the upstream that receives the requests for which there is no route",
        ),
        KeySpec::restriction(
            "routes",
            ValueSpec::List(&ValueSpec::Section(&routes::ROUTE)),
            DefaultSpec::Absent("none"),
            "where requests for certain models go instead. The first match wins ([routes.md](routes.md))",
        )
        .example("[{ models: [\"claude-*\"], upstream: openai }]"),
        KeySpec::restriction(
            "keys",
            ValueSpec::List(&ValueSpec::Section(&CALLER)),
            DefaultSpec::Absent("none: the environment is open"),
            "the callers. If there are keys, the environment accepts only requests with one of them, and the key alone selects the environment",
        )
        .example("[{ name: web, secret: ${WEB_KEY} }]"),
        KeySpec::restriction(
            "models",
            ValueSpec::List(&PATTERN),
            DefaultSpec::Absent("all"),
            "models that may be requested; others get a 404. An empty list is a fault",
        )
        .example("[gpt-4o*, o4-mini]"),
        KeySpec::restriction(
            "max_in_flight",
            ValueSpec::Amount { min: 1, max: u64::MAX },
            DefaultSpec::Absent("no limit"),
            "maximum number of requests in flight, streams included; further requests get a 429",
        )
        .example("50"),
        KeySpec::restriction(
            "quotas",
            ValueSpec::Section(&QUOTAS),
            DefaultSpec::Absent("none, with a warning"),
            "quotas of the whole environment",
        )
        .example("{ total_tokens: { limit: 200k, per: minute } }"),
        KeySpec::restriction(
            "model_quotas",
            ValueSpec::Names(text("patterns and quotas"), &ValueSpec::Section(&QUOTAS)),
            NONE,
            "quotas of models; all models that match a pattern share its quotas",
        )
        .example("{ \"gpt-4.1*\": { requests: { limit: 60, per: minute } } }"),
        KeySpec::new(
            "reserve",
            ValueSpec::Section(&RESERVE),
            DefaultSpec::Section,
            "the reservation before a request is forwarded",
        )
        .example("{ when_short: clamp }"),
        KeySpec::new(
            "enforce",
            ValueSpec::Boolean,
            DefaultSpec::Value("true"),
            "`false`: shadow mode. Requests that do not fit are admitted, logged and counted separately",
        ),
        KeySpec::new(
            "on_disconnect",
            ValueSpec::Words(&[
                Word("cancel", "cancels the upstream request and charges the delivered text"),
                Word(
                    "drain",
                    "reads the answer to its end and charges the reported usage. At most 100 answers drain at once, each for at most 30 s",
                ),
            ]),
            DefaultSpec::Value("cancel"),
            "what happens to the answer when the caller disconnects",
        ),
        KeySpec::new(
            "other_paths",
            ValueSpec::Words(&[
                Word("deny", "answers 404"),
                Word(
                    "forward",
                    "forwards the request and charges one request plus the usage that the answer reports",
                ),
            ]),
            DefaultSpec::Value("deny"),
            "what happens to requests for unknown paths",
        ),
        KeySpec::new(
            "unseen_prompt_tokens",
            ValueSpec::Amount { min: 0, max: MAX_AMOUNT },
            DefaultSpec::Value("2000"),
            "prompt tokens reserved for each item that a request refers to but does not contain, such as a stored file",
        )
        .example("500"),
        KeySpec::new(
            "cached_prompt_tokens",
            ValueSpec::Words(&[
                Word("count", "they are charged like other prompt tokens"),
                Word("skip", "they are not charged"),
            ]),
            DefaultSpec::Value("count"),
            "whether prompt tokens that the provider read from its cache are charged. They are reserved in any case",
        ),
        KeySpec::new(
            "calibrate",
            ValueSpec::Boolean,
            DefaultSpec::Value("true"),
            "whether estimates are corrected by the usage that earlier answers reported ([counting.md](counting.md#learning-from-answers))",
        ),
        KeySpec::new(
            "retry_patience",
            ValueSpec::Duration,
            DefaultSpec::Value("30s"),
            "a 429 with a longer wait carries `x-should-retry: false`",
        )
        .example("10s"),
    ],
};

/// `environments.*.reserve`.
pub(super) const RESERVE: SectionSpec = SectionSpec {
    name: "reserve",
    keys: &[
        KeySpec::new(
            "prompt",
            ValueSpec::Words(&[
                Word("estimate", "the estimated prompt tokens are reserved"),
                Word("none", "nothing is reserved for the prompt"),
            ]),
            DefaultSpec::Value("estimate"),
            "the reservation for the prompt",
        ),
        KeySpec::new(
            "completion",
            ValueSpec::Either(&[
                ValueSpec::Words(&[
                    Word("adaptive", "a quantile of the completion tokens of recent answers"),
                    Word("max_tokens", "the request's own token limit"),
                    Word("none", "nothing: the tokens are charged when the answer ends"),
                ]),
                ValueSpec::Amount { min: 0, max: MAX_AMOUNT },
            ]),
            DefaultSpec::Value("adaptive"),
            "the reservation for the answer ([quotas.md](quotas.md#the-completion-allowance-reservecompletion))",
        ),
        KeySpec::new(
            "quantile",
            ValueSpec::Decimal(TextSpec { label: "number between 0 and 1", pattern: r"^[0-9.eE+-]+$" }),
            DefaultSpec::Value("0.9"),
            "for `adaptive`: the share of recent answers that used at most the allowance",
        )
        .example("0.95"),
        KeySpec::new(
            "default_max_tokens",
            ValueSpec::Amount { min: 1, max: MAX_AMOUNT },
            DefaultSpec::Value("4096"),
            "for `max_tokens`: the tokens reserved for a request without a token limit",
        )
        .example("1024"),
        KeySpec::new(
            "when_short",
            ValueSpec::Words(&[
                Word("reject", "it gets a 429"),
                Word("clamp", "its token limit is lowered to the remaining room, at least 16"),
            ]),
            DefaultSpec::Value("reject"),
            "what happens to a request that does not fit",
        ),
        KeySpec::new(
            "on_overrun",
            ValueSpec::Words(&[
                Word("finish", "it continues and leaves a debt"),
                Word("cut", "it ends as if it had reached its token limit"),
            ]),
            DefaultSpec::Value("finish"),
            "what happens to a stream that outgrows its reservation when no quota is left",
        ),
        KeySpec::new(
            "max_wait",
            ValueSpec::Duration,
            DefaultSpec::Value("0s"),
            "how long a request may wait for room. Requests wait in order of arrival, at most 1,000 per environment",
        )
        .example("2s"),
    ],
};

/// Reads every environment and records its faults.
pub(super) fn read(top: &Section<'_>, upstreams: &[Arc<UpstreamSettings>]) -> Vec<Arc<Environment>> {
    let setting = top.require("environments");
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

pub(super) struct DeclaredUpstreams<'a> {
    /// The names of all upstreams in the file, also of those that have faults.
    pub(super) names: Vec<&'a str>,
    /// The upstreams that have no faults.
    pub(super) valid: &'a [Arc<UpstreamSettings>],
}

fn environment(
    name: &str,
    setting: &Setting<'_>,
    upstreams: &DeclaredUpstreams<'_>,
    digests: &mut Digests,
) -> Option<Environment> {
    let section = setting.section(&ENVIRONMENT)?;
    let upstream = section.require_as("upstream", upstreams.names.first().unwrap_or(&"openai"));
    let upstream = upstream.and_then(|s| s.index_of_name("upstream", &upstreams.names)).and_then(|at| {
        let name = upstreams.names[at];
        upstreams.valid.iter().find(|u| u.name == name).cloned()
    });
    let (callers, quotas) = callers_and_quotas(&section, digests);
    let reserve = reserve(&section, &quotas);
    let models = section.get("models").map(|s| allowed_models(&s)).unwrap_or_default();
    contradictions::warn(&section, &models, &quotas);
    let routes = routes::read(&section, &models, upstreams);
    if let Some(upstream) = upstream.as_deref().filter(|_| routes.is_empty()) {
        contradictions::warn_of_upstream(&section, upstream);
    }
    let mut used: Vec<&UpstreamSettings> = upstream.as_deref().into_iter().collect();
    used.extend(routes.iter().flat_map(|route| &route.upstreams).map(|upstream| &**upstream));
    let is_bounded = |upstream: &&UpstreamSettings| !upstream.quotas.iter().all(Quota::is_unlimited);
    let is_unbounded = quotas.iter().all(Quota::is_unlimited) && !used.iter().all(is_bounded);
    check_exposure(setting, &used, callers.is_empty(), is_unbounded);
    Some(Environment {
        name: name.to_owned(),
        routes,
        callers,
        models,
        max_in_flight: section.get("max_in_flight").and_then(|s| {
            s.positive(u64::MAX, "0 would refuse every request; leave the key out for no limit")
        }),
        quotas,
        enforce: section.boolean("enforce"),
        reserve,
        on_disconnect: match section.word("on_disconnect") {
            "drain" => OnDisconnect::Drain,
            _ => OnDisconnect::Cancel,
        },
        forward_other_paths: section.word("other_paths") == "forward",
        unseen_prompt_tokens: section.amount("unseen_prompt_tokens", reservable),
        count_cached_prompt_tokens: section.word("cached_prompt_tokens") == "count",
        calibrate: section.boolean("calibrate"),
        retry_patience: section.duration("retry_patience"),
        upstream: upstream?,
    })
}

fn callers_and_quotas(
    section: &Section<'_>,
    digests: &mut Digests,
) -> (Vec<super::CallerSettings>, Vec<Quota>) {
    let mut quotas = Vec::new();
    if let Some(setting) = section.get("quotas") {
        quotas::of_environment(&setting, &mut quotas);
    }
    let callers = section.get("keys").map(|s| callers::read(&s, digests, &mut quotas)).unwrap_or_default();
    if let Some(setting) = section.get("model_quotas") {
        quotas::of_models(&setting, &mut quotas);
    }
    (callers, quotas)
}

/// Warns about settings that are allowed but may let callers spend without limit.
fn check_exposure(setting: &Setting<'_>, upstreams: &[&UpstreamSettings], is_open: bool, is_unbounded: bool) {
    if is_unbounded {
        setting.warn(
            "this environment has no quota with a limit, so its callers can spend without limit; add a quota",
        );
    }
    // Equal warnings are reported once.
    for upstream in upstreams {
        let name = &upstream.name;
        match &upstream.api_key {
            Some(_) if is_open => setting.warn(format!(
                "this environment is open, so anyone who reaches the gateway can spend on the api_key of upstream \"{name}\"; \
                 add keys to the environment"
            )),
            None if !is_open => setting.warn(format!(
                "the keys of this environment are never sent upstream, and upstream \"{name}\" has no api_key, so \
                 callers must also send the upstream's key in another header; set api_key"
            )),
            _ => {}
        }
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
    const ZERO: &str = "0 would reserve nothing; to reserve nothing, write completion: none";
    let section = environment.section("reserve");
    let quantile = |text: &str| text.parse::<f64>().ok().filter(|q| *q > 0.0 && *q < 1.0);
    let reserve = ReserveSettings {
        prompt: section.word("prompt") == "estimate",
        completion: section
            .parsed("completion", completion, "adaptive, max_tokens, none or a number of tokens")
            .unwrap_or(CompletionReserve::Adaptive),
        quantile: section
            .parsed("quantile", quantile, "a number between 0 and 1, such as 0.9")
            .unwrap_or_default(),
        default_max_tokens: section.amount("default_max_tokens", |s| s.positive(MAX_AMOUNT, ZERO)),
        when_short: match section.word("when_short") {
            "clamp" => WhenShort::Clamp,
            _ => WhenShort::Reject,
        },
        on_overrun: match section.word("on_overrun") {
            "cut" => OnOverrun::Cut,
            _ => OnOverrun::Finish,
        },
        max_wait: section.duration("max_wait"),
    };
    let get = |key: &str| section.get(key);
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
