//! The message of a denial by a quota.

use super::go_duration;
use crate::clock::Timestamp;
use crate::quota::{Amounts, Denied, Kind, Quota, Shortfall, Wait, Window};
use jiff::ToSpan as _;
use jiff::tz::TimeZone;
use std::fmt;

/// A longer wait is also shown as a moment: an hour, in milliseconds.
const LONG_WAIT_MS: u64 = 3_600_000;

/// Writes the owner of the quota, the requested amount, and the moment when the request fits.
pub(super) fn write_message(f: &mut fmt::Formatter<'_>, denied: &Denied, environment: &str) -> fmt::Result {
    let Some(shortfall) = denied.shortfalls().first() else { return Ok(()) };
    let Shortfall { quota, used, held, wait, .. } = shortfall;
    let (kind, per) = (quota.kind.as_str(), &quota.per.text);
    let owner = quota.scope.describe(environment);
    let requested = requested(quota.kind, denied.requested());
    match wait {
        Wait::Never => write!(
            f,
            "This request can never fit: it needs {requested} {kind}, and {owner} allows at most {} per {per}.",
            quota.capacity()
        ),
        Wait::Ms(ms) => {
            write!(
                f,
                "Rate limit reached for {owner} on {kind} per {per}: limit {}, used {used}, held by requests in flight {held}, requested {requested}. Try again in {}",
                quota.limit,
                go_duration((*ms).max(1))
            )?;
            if *ms > LONG_WAIT_MS
                && let Some(moment) = moment(denied.at(), *ms, quota)
            {
                write!(f, ", at {moment}")?;
            }
            f.write_str(".")
        }
    }?;
    if lower_limit_helps(shortfall, denied.requested()) {
        f.write_str(" A lower token limit in the request (max_tokens or its equivalent) reserves less.")?;
    }
    Ok(())
}

/// Whether the same request with a lower token limit could fit earlier.
fn lower_limit_helps(Shortfall { quota, remaining, wait, .. }: &Shortfall, requested: Amounts) -> bool {
    let least = match quota.kind {
        Kind::TotalTokens => requested.prompt,
        Kind::CompletionTokens => 0,
        Kind::PromptTokens | Kind::Requests => return false,
    };
    requested.completion > 0
        && match (wait, &quota.window) {
            (Wait::Never, _) => quota.capacity() > least,
            (Wait::Ms(_), Window::Rolling { .. }) => true,
            // Nothing comes back before the next period.
            (Wait::Ms(_), Window::Calendar { .. }) => *remaining > least,
        }
}

/// The requested amount of a kind. A total is broken down.
fn requested(kind: Kind, amounts: Amounts) -> String {
    let amount = amounts.of(kind);
    if kind != Kind::TotalTokens {
        return amount.to_string();
    }
    let answer = amount.saturating_sub(amounts.prompt);
    format!("{amount} ({} for the prompt and {answer} reserved for the answer)", amounts.prompt)
}

/// The moment when a wait ends, rounded up to a second, in the time zone of the quota.
fn moment(at: Timestamp, wait_ms: u64, quota: &Quota) -> Option<String> {
    let zone = match &quota.window {
        Window::Calendar { zone, .. } => zone.clone(),
        Window::Rolling { .. } => TimeZone::UTC,
    };
    let end = jiff::Timestamp::from_second(at.plus_ms(wait_ms).0.div_euclid(1_000)).ok()?;
    let is_whole = at.plus_ms(wait_ms).0.rem_euclid(1_000) == 0;
    let end = if is_whole { end } else { end.checked_add(1.second()).ok()? };
    let end = end.to_zoned_datetime(zone);
    Some(format!("{}{}", end.datetime(), offset(end.offset().seconds())))
}

/// An offset from UTC as in RFC 3339: `+01:00`.
fn offset(seconds: i32) -> String {
    let (sign, minutes) = (if seconds < 0 { '-' } else { '+' }, seconds.unsigned_abs() / 60);
    format!("{sign}{:02}:{:02}", minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;
    use crate::quota::{Quotas, Required, Subject};

    struct DenialMessage<'d>(&'d Denied);

    impl fmt::Display for DenialMessage<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write_message(f, self.0, "production")
        }
    }

    /// The message of the first denial, if every request needs 75 prompt tokens and 512 for the answer. The clock
    /// stands at 2026-11-28 19:30:00.250 UTC.
    fn message(quotas: &str, served: u64) -> String {
        let text = format!(
            "upstreams: {{ u: {{ base_url: 'http://127.0.0.1:1/v1' }} }}\nenvironments:\n  production:\n    upstream: u\n{quotas}"
        );
        let loaded = parse(&text, "test.yaml", &|_| None, &[]).unwrap();
        let now = Timestamp(1_795_894_200_250);
        let mut quotas = Quotas::new(&loaded.config.environments[0].quotas, now);
        let required = Required { amounts: Amounts::of_request(75, 512), generates: true };
        let caller = "batch".into();
        let applicable = quotas.applicable(Subject { caller: Some(&caller), model: "gpt-4.1-mini" });
        for _ in 0..served {
            let receipt = quotas.reserve(now, &applicable, &required).unwrap();
            quotas.settle(now, receipt, required.amounts);
        }
        let denied = quotas.denial(now, &applicable, &required).unwrap();
        DenialMessage(&denied).to_string()
    }

    #[test]
    fn a_denial_names_the_owner_of_the_quota_and_what_was_requested() {
        for (quotas, served, want) in [
            (
                "    quotas: { total_tokens: { limit: 1000, per: minute } }",
                1,
                "Rate limit reached for environment 'production' on total_tokens per minute: limit 1000, used 587, held by requests in flight 0, requested 587 (75 for the prompt and 512 reserved for the answer). Try again in 10.44s. A lower token limit in the request (max_tokens or its equivalent) reserves less.",
            ),
            (
                "    keys: [{ name: batch, secret: sk-batch-0123456789, quotas: { requests: { limit: 1, per: hour } } }]",
                1,
                "Rate limit reached for caller 'batch' of environment 'production' on requests per hour: limit 1, used 1, held by requests in flight 0, requested 1. Try again in 1h0m0s.",
            ),
            (
                "    model_quotas: { 'gpt-4.1*': { completion_tokens: { limit: 600, per: day, timezone: Europe/Berlin } } }",
                1,
                "Rate limit reached for model 'gpt-4.1*' in environment 'production' on completion_tokens per day: limit 600, used 512, held by requests in flight 0, requested 512. Try again in 3h29m59.75s, at 2026-11-29T00:00:00+01:00. A lower token limit in the request (max_tokens or its equivalent) reserves less.",
            ),
            (
                "    quotas: { total_tokens: { limit: 600, per: day } }",
                1,
                "Rate limit reached for environment 'production' on total_tokens per day: limit 600, used 587, held by requests in flight 0, requested 587 (75 for the prompt and 512 reserved for the answer). Try again in 4h29m59.75s, at 2026-11-29T00:00:00+00:00.",
            ),
            (
                "    quotas: { total_tokens: { limit: 70, per: minute } }",
                0,
                "This request can never fit: it needs 587 (75 for the prompt and 512 reserved for the answer) total_tokens, and environment 'production' allows at most 70 per minute.",
            ),
            (
                "    quotas: { prompt_tokens: { limit: 50, per: minute } }",
                0,
                "This request can never fit: it needs 75 prompt_tokens, and environment 'production' allows at most 50 per minute.",
            ),
        ] {
            assert_eq!(message(quotas, served), want);
        }
    }

    #[test]
    fn a_moment_is_rounded_up_to_a_second() {
        let quota = |zone: &str| Quota {
            scope: crate::quota::Scope::Environment,
            kind: Kind::Requests,
            limit: 1,
            per: crate::quota::Period { text: "day".into(), ms: 86_400_000 },
            window: Window::Calendar {
                unit: crate::quota::ClockUnit::Day,
                zone: TimeZone::get(zone).unwrap(),
            },
        };
        for (zone, want) in [
            ("America/St_Johns", "1969-12-31T20:30:02-03:30"),
            ("Asia/Kolkata", "1970-01-01T05:30:02+05:30"),
            ("UTC", "1970-01-01T00:00:02+00:00"),
        ] {
            assert_eq!(moment(Timestamp(500), 501, &quota(zone)).unwrap(), want);
        }
    }
}
