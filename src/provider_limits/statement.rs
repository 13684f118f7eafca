//! What one answer of a provider states about its rate limits: the headers of OpenAI, Azure and Anthropic.
//!
//! Sources: the rate limit pages of the three providers' API references. OpenAI and Azure write a reset as a duration (`6m0s`,
//! `120ms`, or a number of seconds), Anthropic as a time (RFC 3339). All three write `retry-after` in seconds; some add
//! `retry-after-ms`.

use crate::clock::Timestamp;
use crate::quota::{Kind, MAX_LIMIT};
use http::{HeaderMap, HeaderName, HeaderValue};

/// A longer reset is not credible (ms): 32 days.
const MAX_RESET_MS: u64 = 32 * 86_400_000;

/// What an answer states about one kind of limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KindStatement {
    /// Tokens or requests per period.
    pub(super) limit: Option<u64>,
    /// The unused part of the limit.
    pub(super) remaining: Option<u64>,
    /// Milliseconds until all of the limit is left again.
    pub(super) reset_ms: Option<u64>,
}

/// What an answer states about the provider's limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Statement {
    /// In the order of `Kind::ALL`.
    pub(super) kinds: [KindStatement; 4],
    /// The time after which the provider accepts a refused request (ms).
    pub(super) retry_after_ms: Option<u64>,
    /// Values that cannot be true: negative, not a number, or too large.
    pub(super) ignored: u64,
}

enum Field {
    Limit,
    Remaining,
    Reset,
}

impl Statement {
    /// Reads the headers of an answer. `now` returns the time of the wall clock: most answers need none.
    pub(super) fn read(headers: &HeaderMap, now: impl Fn() -> Timestamp) -> Self {
        let mut statement = Self::default();
        for (name, value) in headers {
            statement.read_header(name, value, &now);
        }
        for kind in &mut statement.kinds {
            if let (Some(limit), Some(remaining)) = (kind.limit, kind.remaining)
                && remaining > limit
            {
                (kind.remaining, statement.ignored) = (None, statement.ignored + 1);
            }
        }
        statement
    }

    /// Whether the answer states nothing about limits.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn read_header(&mut self, name: &HeaderName, value: &HeaderValue, now: impl Fn() -> Timestamp) {
        let name = name.as_str();
        let field = if let Some(rest) = name.strip_prefix("x-ratelimit-") {
            openai_field(rest)
        } else if let Some(rest) = name.strip_prefix("anthropic-ratelimit-") {
            anthropic_field(rest)
        } else {
            return self.read_retry_after(name, value, now);
        };
        let Some((kind, field)) = field else { return };
        let text = value.to_str().unwrap_or_default().trim();
        let stated = &mut self.kinds[kind as usize];
        let is_read = match field {
            Field::Limit => set(&mut stated.limit, amount(text).filter(|&limit| limit > 0)),
            Field::Remaining => set(&mut stated.remaining, amount(text)),
            Field::Reset => set(&mut stated.reset_ms, reset_ms(text, now())),
        };
        self.ignored += u64::from(!is_read);
    }

    fn read_retry_after(&mut self, name: &str, value: &HeaderValue, now: impl Fn() -> Timestamp) {
        let text = || value.to_str().unwrap_or_default().trim();
        let read = match name {
            // The more exact header has precedence, whatever the order.
            "retry-after-ms" => decimal_ms(text(), 1),
            "retry-after" if self.retry_after_ms.is_none() => {
                decimal_ms(text(), 1_000).or_else(|| ms_until_http_date(text(), now()))
            }
            _ => return,
        };
        match read.filter(|&ms| ms <= MAX_RESET_MS) {
            Some(ms) => self.retry_after_ms = Some(ms),
            None => self.ignored += 1,
        }
    }
}

/// Stores a value that was read. Returns whether there is one.
fn set(slot: &mut Option<u64>, value: Option<u64>) -> bool {
    *slot = value.or(*slot);
    value.is_some()
}

/// The field of `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`.
fn openai_field(rest: &str) -> Option<(Kind, Field)> {
    let (field, kind) = rest.split_once('-')?;
    let field = match field {
        "limit" => Field::Limit,
        "remaining" => Field::Remaining,
        "reset" => Field::Reset,
        _ => return None,
    };
    let kind = match kind {
        "requests" => Kind::Requests,
        "tokens" => Kind::TotalTokens,
        _ => return None,
    };
    Some((kind, field))
}

/// The field of `anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}`.
fn anthropic_field(rest: &str) -> Option<(Kind, Field)> {
    let (kind, field) = rest.rsplit_once('-')?;
    let kind = match kind {
        "requests" => Kind::Requests,
        "tokens" => Kind::TotalTokens,
        "input-tokens" => Kind::PromptTokens,
        "output-tokens" => Kind::CompletionTokens,
        _ => return None,
    };
    let field = match field {
        "limit" => Field::Limit,
        "remaining" => Field::Remaining,
        "reset" => Field::Reset,
        _ => return None,
    };
    Some((kind, field))
}

fn amount(text: &str) -> Option<u64> {
    text.parse::<u64>().ok().filter(|&amount| amount <= MAX_LIMIT)
}

/// Milliseconds until a reset: a Go duration, a number of seconds, or a time.
fn reset_ms(text: &str, now: Timestamp) -> Option<u64> {
    let ms = go_duration_ms(text).or_else(|| decimal_ms(text, 1_000)).or_else(|| ms_until(text, now))?;
    (ms <= MAX_RESET_MS).then_some(ms)
}

/// A decimal number of units of `unit_ms`, rounded up to milliseconds: `1.5` seconds are 1,500.
fn decimal_ms(text: &str, unit_ms: u64) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_number(whole) || !is_number(fraction) || fraction.len() > 12 {
        return None;
    }
    let scale = 10_u64.pow(u32::try_from(fraction.len()).ok()?);
    let part = fraction.parse::<u64>().unwrap_or(0).checked_mul(unit_ms)?.div_ceil(scale);
    whole.parse::<u64>().ok()?.checked_mul(unit_ms)?.checked_add(part)
}

/// A duration as Go writes it: `6m0s`, `1h2m3.5s`, `120ms`.
fn go_duration_ms(text: &str) -> Option<u64> {
    let (mut left, mut total) = (text, 0_u64);
    while !left.is_empty() {
        let digits = left.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, rest) = left.split_at(digits);
        let unit_length = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (unit, rest) = rest.split_at(unit_length);
        let unit_ms = match unit {
            "d" => 86_400_000,
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1_000,
            "ms" => 1,
            _ => return None,
        };
        total = total.checked_add(decimal_ms(number, unit_ms)?)?;
        left = rest;
    }
    (!text.is_empty()).then_some(total)
}

/// Milliseconds until a time in RFC 3339; 0 if it is over.
fn ms_until(text: &str, now: Timestamp) -> Option<u64> {
    let moment = text.parse::<jiff::Timestamp>().ok()?;
    Some(Timestamp(moment.as_millisecond()).ms_since(now))
}

/// Milliseconds until a date of HTTP (RFC 9110, section 5.6.7); 0 if it is over.
fn ms_until_http_date(text: &str, now: Timestamp) -> Option<u64> {
    let moment = jiff::fmt::rfc2822::parse(text).ok()?;
    Some(Timestamp(moment.timestamp().as_millisecond()).ms_since(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn read(headers: &[(&str, &str)]) -> Statement {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        Statement::read(&map, || NOW)
    }

    fn kind(statement: &Statement, kind: Kind) -> (Option<u64>, Option<u64>, Option<u64>) {
        let KindStatement { limit, remaining, reset_ms } = statement.kinds[kind as usize];
        (limit, remaining, reset_ms)
    }

    #[test]
    fn headers_of_openai_and_azure_are_read() {
        let statement = read(&[
            ("x-ratelimit-limit-requests", "500"),
            ("x-ratelimit-remaining-requests", "499"),
            ("x-ratelimit-reset-requests", "120ms"),
            ("x-ratelimit-limit-tokens", "30000"),
            ("x-ratelimit-remaining-tokens", "29975"),
            ("x-ratelimit-reset-tokens", "6m0.25s"),
            ("x-request-id", "req_1"),
        ]);
        assert_eq!(kind(&statement, Kind::Requests), (Some(500), Some(499), Some(120)));
        assert_eq!(kind(&statement, Kind::TotalTokens), (Some(30_000), Some(29_975), Some(360_250)));
        assert_eq!((statement.ignored, statement.retry_after_ms), (0, None));
    }

    #[test]
    fn headers_of_anthropic_are_read() {
        let statement = read(&[
            ("anthropic-ratelimit-input-tokens-limit", "40000"),
            ("anthropic-ratelimit-input-tokens-remaining", "0"),
            ("anthropic-ratelimit-input-tokens-reset", "2027-01-15T08:00:12Z"),
            ("anthropic-ratelimit-output-tokens-remaining", "8000"),
            ("anthropic-ratelimit-unified-status", "allowed"),
            ("retry-after", "12"),
        ]);
        assert_eq!(kind(&statement, Kind::PromptTokens), (Some(40_000), Some(0), Some(12_000)));
        assert_eq!(kind(&statement, Kind::CompletionTokens), (None, Some(8_000), None));
        assert_eq!((statement.ignored, statement.retry_after_ms), (0, Some(12_000)));
    }

    #[test]
    fn the_time_to_wait_is_read_in_every_form() {
        assert_eq!(read(&[("retry-after", "1.5")]).retry_after_ms, Some(1_500));
        assert_eq!(read(&[("retry-after", "20"), ("retry-after-ms", "19500")]).retry_after_ms, Some(19_500));
        assert_eq!(
            read(&[("retry-after-ms", "19500.2"), ("retry-after", "20")]).retry_after_ms,
            Some(19_501)
        );
        let date = read(&[("retry-after", "Fri, 15 Jan 2027 08:00:30 GMT")]);
        assert_eq!((date.retry_after_ms, date.ignored), (Some(30_000), 0));
    }

    #[test]
    fn what_cannot_be_true_is_ignored_and_counted() {
        for (name, value) in [
            ("x-ratelimit-remaining-tokens", "-5"),
            ("x-ratelimit-limit-tokens", "0"),
            ("x-ratelimit-limit-requests", "99999999999999999999"),
            ("x-ratelimit-reset-tokens", "soon"),
            ("x-ratelimit-reset-tokens", "-1s"),
            ("x-ratelimit-reset-tokens", "99999999h"),
            ("x-ratelimit-remaining-requests", "1e3"),
            ("anthropic-ratelimit-tokens-reset", "yesterday"),
            ("retry-after", "-1"),
            ("retry-after", "99999999999999999999999"),
            ("retry-after-ms", ""),
        ] {
            let statement = read(&[(name, value)]);
            assert_eq!(statement.ignored, 1, "{name}: {value}");
            assert_eq!(statement.kinds, [KindStatement::default(); 4], "{name}: {value}");
            assert_eq!(statement.retry_after_ms, None, "{name}: {value}");
        }
        let more_than_the_limit =
            read(&[("x-ratelimit-limit-tokens", "10"), ("x-ratelimit-remaining-tokens", "11")]);
        assert_eq!(kind(&more_than_the_limit, Kind::TotalTokens), (Some(10), None, None));
        assert_eq!(more_than_the_limit.ignored, 1);
        assert!(read(&[("x-ratelimit-remaining", "5"), ("content-type", "text/plain")]).is_empty());
    }
}
