//! Quotas: of an environment, of a caller, of models.

use super::item::{Item, Section};
use super::units::WORDS;
use crate::glob::Glob;
use crate::quota::{ClockUnit, Kind, MAX_LIMIT, Period, Quota, Scope, Window};
use jiff::tz::TimeZone;

const DAY_MS: u64 = 86_400_000;
const LONGEST_PERIOD_MS: u64 = 366 * DAY_MS;

/// `environments.*.quotas`
pub(super) fn of_environment(item: &Item<'_>, quotas: &mut Vec<Quota>) {
    read(item, &Scope::Environment, quotas);
}

/// `environments.*.keys[].quotas`
pub(super) fn of_caller(item: &Item<'_>, index: usize, name: &str, quotas: &mut Vec<Quota>) {
    read(item, &Scope::Caller(index, name.to_owned()), quotas);
}

/// `environments.*.model_quotas`
pub(super) fn of_models(item: &Item<'_>, quotas: &mut Vec<Quota>) {
    let Some(section) = item.map("a mapping of model patterns to quotas") else { return };
    for (key, item) in section.items() {
        read(&item, &Scope::Model(Glob::new(&key.name)), quotas);
    }
}

fn read(item: &Item<'_>, scope: &Scope, quotas: &mut Vec<Quota>) {
    let Some(section) = item.section(&Kind::ALL.map(Kind::as_str)) else { return };
    for kind in Kind::ALL {
        let Some(item) = section.bound(kind.as_str()) else { continue };
        let items = item.one_or_more();
        if items.is_empty() {
            item.fault("there is no quota in this list; give one, or leave the key out");
        }
        let first = quotas.len();
        for item in items {
            let Some(quota) = quota(&item, scope, kind) else { continue };
            if quotas[first..].iter().any(|other| is_given_twice(other, &quota)) {
                item.fault(format!("{kind} has another quota over the same period: keep one of the two"));
            }
            quotas.push(quota);
        }
    }
}

/// A month of the calendar and 30 days that roll are as long in milliseconds, but not the same; where both
/// roll, they are.
fn is_given_twice(one: &Quota, other: &Quota) -> bool {
    let is_month = |quota: &Quota| matches!(quota.window, Window::Calendar { unit: ClockUnit::Month, .. });
    one.per.ms == other.per.ms && (one.per.text == other.per.text || is_month(one) == is_month(other))
}

fn quota(item: &Item<'_>, scope: &Scope, kind: Kind) -> Option<Quota> {
    const ZERO: &str =
        "a limit of 0 would refuse everything: to forbid it, remove the caller, or the model from models:";
    let section = item.section(&["limit", "per", "window", "burst", "timezone"])?;
    let limit = section.require("limit", "limit: 200k").and_then(|i| i.positive(MAX_LIMIT, ZERO));
    let per = section.require("per", "per: minute").and_then(|i| period(&i));
    let per = per?;
    let windows = [("rolling", false), ("calendar", true)];
    let is_calendar = section.get("window").map_or(Some(per.ms >= DAY_MS), |i| i.choice(&windows))?;
    let window = if is_calendar { calendar(&section, &per) } else { rolling(&section, limit) };
    Some(Quota { scope: scope.clone(), kind, limit: limit?, per, window: window? })
}

fn rolling(section: &Section<'_>, limit: Option<u64>) -> Option<Window> {
    const ZERO: &str =
        "a burst of 0 would refuse everything; leave the key out for a burst of the limit's size";
    if let Some(item) = section.get("timezone") {
        item.fault("a rolling window has no time zone; remove the key, or write window: calendar");
    }
    let burst = section.get("burst").map_or(limit, |i| i.positive(MAX_LIMIT, ZERO))?;
    Some(Window::Rolling { burst })
}

fn calendar(section: &Section<'_>, per: &Period) -> Option<Window> {
    if let Some(item) = section.get("burst") {
        item.fault("a calendar window has no burst: its whole limit is there from the start; remove the key");
    }
    let unit = clock_unit(per);
    if unit.is_none() {
        section.fault(
            "a calendar window follows the clock: its period is second, minute, hour, day, week or month; \
             for any other write window: rolling",
        );
    }
    let zone = section.get("timezone").map_or(Some(TimeZone::UTC), |i| zone(&i));
    Some(Window::Calendar { unit: unit?, zone: zone? })
}

fn period(item: &Item<'_>) -> Option<Period> {
    let ms = u64::try_from(item.duration()?.as_millis()).unwrap_or(u64::MAX);
    if ms == 0 || ms > LONGEST_PERIOD_MS {
        item.fault("a period is at least 1ms and at most a year");
        return None;
    }
    Some(Period { text: item.text()?.to_owned(), ms })
}

/// `24h` is a day of the clock; `7d` and `30d` say nothing of Mondays and firsts.
fn clock_unit(per: &Period) -> Option<ClockUnit> {
    let is_meant = |word: &str, ms: u64| per.text == word || (per.ms == ms && ms <= DAY_MS);
    let (word, _) = WORDS.iter().find(|(word, ms)| is_meant(word, *ms))?;
    match *word {
        "second" => Some(ClockUnit::Second),
        "minute" => Some(ClockUnit::Minute),
        "hour" => Some(ClockUnit::Hour),
        "day" => Some(ClockUnit::Day),
        "week" => Some(ClockUnit::Week),
        _ => Some(ClockUnit::Month),
    }
}

fn zone(item: &Item<'_>) -> Option<TimeZone> {
    let name = item.text()?;
    let database = jiff::tz::db();
    // jiff has a zone named "Etc/Unknown", which stands for having none.
    if let Some(zone) = database.get(name).ok().filter(|zone| !zone.is_unknown()) {
        return Some(zone);
    }
    let known: Vec<String> = database.available().map(|n| n.as_str().to_owned()).collect();
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    item.name_among("time zone", &known);
    None
}
