//! Reads the quotas of an environment, of its callers and of its models, and those of an upstream.

use super::description::{DefaultSpec, KeySpec, NONE, SectionSpec, Siblings, ValueSpec, Word, text};
use super::setting::{Section, Setting};
use super::units::{self, PERIOD_WORDS};
use crate::glob::Glob;
use crate::quota::{ClockUnit, Kind, MAX_LIMIT, Period, Quota, Scope, UNLIMITED, UpstreamModels, Window};
use jiff::tz::TimeZone;

const DAY_MS: u64 = 86_400_000;
const MAX_PERIOD_MS: u64 = 366 * DAY_MS;

/// `environments.*.quotas`, `environments.*.keys[].quotas`, `environments.*.model_quotas.*`, `upstreams.*.quotas` and
/// `upstreams.*.model_quotas.*`.
pub(super) const QUOTAS: SectionSpec = SectionSpec {
    name: "quotas",
    keys: &[
        quotas_of_kind("total_tokens", "quotas for the sum of prompt and completion tokens"),
        quotas_of_kind("prompt_tokens", "quotas for prompt tokens"),
        quotas_of_kind("completion_tokens", "quotas for completion tokens"),
        quotas_of_kind("requests", "quotas for requests"),
    ],
};

const fn quotas_of_kind(kind: &'static str, about: &'static str) -> KeySpec {
    KeySpec::restriction(kind, ValueSpec::OneOrMore(&ValueSpec::Section(&QUOTA)), NONE, about)
}

/// One quota.
pub(super) const QUOTA: SectionSpec = SectionSpec {
    name: "quota",
    keys: &[
        KeySpec::new(
            "limit",
            ValueSpec::Either(&[
                ValueSpec::Amount { min: 1, max: MAX_LIMIT },
                ValueSpec::Words(&[Word("unlimited", "counts and never refuses a request")]),
            ]),
            DefaultSpec::Required("limit: 200k"),
            "the amount per period",
        ),
        KeySpec::new(
            "per",
            ValueSpec::Duration,
            DefaultSpec::Required("per: minute"),
            "length of the period, from 1 ms to 366 days",
        ),
        KeySpec::new(
            "window",
            ValueSpec::Words(WINDOWS),
            DefaultSpec::Derived("`rolling` below a day, else `calendar`", default_window),
            "how the amount comes back",
        ),
        KeySpec::new(
            "burst",
            ValueSpec::Amount { min: 1, max: MAX_LIMIT },
            DefaultSpec::Derived("the limit", default_burst),
            "rolling windows only: the maximum level of the quota",
        )
        .example("400k"),
        KeySpec::new(
            "timezone",
            ValueSpec::Text(text("name such as `Europe/Berlin`")),
            DefaultSpec::Derived("`UTC`", default_zone),
            "calendar windows only: the time zone of the clock",
        )
        .example("Europe/Berlin"),
    ],
};

const WINDOWS: &[Word] = &[
    Word("rolling", "the quota refills continuously"),
    Word("calendar", "the whole limit is available again when the next period of the clock begins"),
];

/// The window of a quota without the key: `calendar` from a day on.
fn default_window(siblings: &Siblings<'_>) -> Option<String> {
    let is_calendar = units::duration(siblings("per")?)?.as_millis() >= u128::from(DAY_MS);
    Some(if is_calendar { "calendar" } else { "rolling" }.to_owned())
}

fn window_of(siblings: &Siblings<'_>) -> Option<String> {
    siblings("window").map(str::to_owned).or_else(|| default_window(siblings))
}

fn default_burst(siblings: &Siblings<'_>) -> Option<String> {
    let is_rolling = window_of(siblings)? == "rolling";
    siblings("limit").filter(|limit| is_rolling && *limit != "unlimited").map(str::to_owned)
}

fn default_zone(siblings: &Siblings<'_>) -> Option<String> {
    (window_of(siblings)? == "calendar").then(|| "UTC".to_owned())
}

/// Reads `environments.*.quotas`.
pub(super) fn of_environment(setting: &Setting<'_>, quotas: &mut Vec<Quota>) {
    read(setting, &Scope::Environment, quotas);
}

/// Reads `environments.*.keys[].quotas`.
pub(super) fn of_caller(setting: &Setting<'_>, name: &str, quotas: &mut Vec<Quota>) {
    read(setting, &Scope::Caller(name.into()), quotas);
}

/// Reads `environments.*.model_quotas`.
pub(super) fn of_models(setting: &Setting<'_>, quotas: &mut Vec<Quota>) {
    by_pattern(setting, &Scope::Model, quotas);
}

/// Reads `upstreams.*.quotas`.
pub(super) fn of_upstream(setting: &Setting<'_>, upstream: &str, quotas: &mut Vec<Quota>) {
    read(setting, &Scope::Upstream(upstream.into()), quotas);
}

/// Reads `upstreams.*.model_quotas`.
pub(super) fn of_upstream_models(setting: &Setting<'_>, upstream: &str, quotas: &mut Vec<Quota>) {
    by_pattern(setting, &|pattern| Scope::UpstreamModel(UpstreamModels::new(upstream, pattern)), quotas);
}

fn by_pattern(setting: &Setting<'_>, scope: &dyn Fn(Glob) -> Scope, quotas: &mut Vec<Quota>) {
    let Some(section) = setting.map("a mapping of model patterns to quotas") else { return };
    for (key, setting) in section.entries() {
        read(&setting, &scope(Glob::new(&key.name)), quotas);
    }
}

fn read(setting: &Setting<'_>, scope: &Scope, quotas: &mut Vec<Quota>) {
    let Some(section) = setting.section(&QUOTAS) else { return };
    for kind in Kind::ALL {
        let Some(setting) = section.get(kind.as_str()) else { continue };
        let items = setting.one_or_more();
        if items.is_empty() {
            setting.fault("this list is empty; add a quota or remove the key");
        }
        let first = quotas.len();
        for setting in items {
            let Some(quota) = quota(&setting, scope, kind) else { continue };
            if quotas[first..].iter().any(|other| is_duplicate(other, &quota)) {
                setting.fault(format!("{kind} has two quotas with the same period; remove one of them"));
            }
            quotas.push(quota);
        }
    }
}

/// Whether two quotas of one kind have the same period. A calendar month and a rolling window of 30 days have the same
/// length in milliseconds but are different periods. Two rolling windows of that length are the same period.
fn is_duplicate(one: &Quota, other: &Quota) -> bool {
    let is_month = |quota: &Quota| matches!(quota.window, Window::Calendar { unit: ClockUnit::Month, .. });
    one.per.ms == other.per.ms && (one.per.text == other.per.text || is_month(one) == is_month(other))
}

fn quota(setting: &Setting<'_>, scope: &Scope, kind: Kind) -> Option<Quota> {
    let section = setting.section(&QUOTA)?;
    let limit = section.require("limit").and_then(|s| limit(&s));
    let per = section.require("per").and_then(|s| period(&s))?;
    let is_calendar = match section.get("window") {
        None => per.ms >= DAY_MS,
        Some(setting) => setting.word(WINDOWS)? == "calendar",
    };
    let window = if is_calendar { calendar(&section, &per) } else { rolling(&section, limit) };
    Some(Quota { scope: scope.clone(), kind, limit: limit?, per, window: window? })
}

/// A number, or `unlimited`.
fn limit(setting: &Setting<'_>) -> Option<u64> {
    const ZERO: &str = "a limit of 0 would refuse every request; to block a caller, remove it; to block a model, remove it from models; to only count, write unlimited";
    if setting.text() == Some("unlimited") { Some(UNLIMITED) } else { setting.positive(MAX_LIMIT, ZERO) }
}

fn rolling(section: &Section<'_>, limit: Option<u64>) -> Option<Window> {
    const ZERO: &str = "a burst of 0 would refuse every request; without the key the burst equals the limit";
    if let Some(setting) = section.get("timezone") {
        setting.fault("a rolling window has no time zone; remove the key or write window: calendar");
    }
    if limit == Some(UNLIMITED) {
        if let Some(setting) = section.get("burst") {
            setting.warn("this key has no effect, because the quota is unlimited; remove it, or set a limit");
        }
        return Some(Window::Rolling { burst: UNLIMITED });
    }
    let burst = section.get("burst").map_or(limit, |s| s.positive(MAX_LIMIT, ZERO))?;
    Some(Window::Rolling { burst })
}

fn calendar(section: &Section<'_>, per: &Period) -> Option<Window> {
    if let Some(setting) = section.get("burst") {
        setting.fault("a calendar window has no burst, because its whole limit is available from the start; remove the key");
    }
    let unit = clock_unit(per);
    if unit.is_none() {
        section.fault(
            "a calendar window must have the period second, minute, hour, day, week or month; \
             for another period write window: rolling",
        );
    }
    let zone = section.get("timezone").map_or(Some(TimeZone::UTC), |s| zone(&s));
    Some(Window::Calendar { unit: unit?, zone: zone? })
}

fn period(setting: &Setting<'_>) -> Option<Period> {
    let ms = u64::try_from(setting.duration()?.as_millis()).unwrap_or(u64::MAX);
    if ms == 0 || ms > MAX_PERIOD_MS {
        setting.fault("a period must be at least 1ms and at most a year (366d)");
        return None;
    }
    Some(Period { text: setting.text()?.to_owned(), ms })
}

/// The unit of a calendar window. `24h` counts as a day, but `7d` and `30d` do not count as a week and a month, because
/// they do not define where the period begins.
fn clock_unit(per: &Period) -> Option<ClockUnit> {
    let matches = |word: &str, ms: u64| per.text == word || (per.ms == ms && ms <= DAY_MS);
    let (word, _) = PERIOD_WORDS.iter().find(|(word, ms)| matches(word, *ms))?;
    match *word {
        "second" => Some(ClockUnit::Second),
        "minute" => Some(ClockUnit::Minute),
        "hour" => Some(ClockUnit::Hour),
        "day" => Some(ClockUnit::Day),
        "week" => Some(ClockUnit::Week),
        _ => Some(ClockUnit::Month),
    }
}

fn zone(setting: &Setting<'_>) -> Option<TimeZone> {
    let name = setting.text()?;
    let database = jiff::tz::db();
    // jiff's zone "Etc/Unknown" means that the time zone is not known.
    if let Some(zone) = database.get(name).ok().filter(|zone| !zone.is_unknown()) {
        return Some(zone);
    }
    let known: Vec<String> = database.available().map(|n| n.as_str().to_owned()).collect();
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    setting.index_of_name("time zone", &known);
    None
}
