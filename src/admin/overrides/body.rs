//! The bodies of requests that set an override.

use super::{BodyResult, invalid};
use crate::admin::answers::refusal;
use crate::admin::json_body::read_object;
use crate::config;
use crate::quota::{MAX_LIMIT, UNLIMITED};
use axum::response::Response;
use http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The shortest and the longest time of an override (ms): a second and 366 days.
const MIN_DURATION_MS: u64 = 1_000;
const MAX_DURATION_MS: u64 = 366 * 86_400_000;
/// Maximum length of a reason in characters.
const MAX_REASON_CHARS: usize = 500;

/// The duration of an override, and the reason for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Terms {
    /// `None`: until it is deleted.
    pub(super) duration_ms: Option<u64>,
    pub(super) reason: Option<String>,
}

/// The body of `PUT .../quotas/{kind}/{per}`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LimitBody {
    /// [`UNLIMITED`] if it is.
    pub(super) limit: u64,
    pub(super) burst: Option<u64>,
    pub(super) terms: Terms,
}

/// The body of `PATCH /api/environments/{environment}`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct EnforceBody {
    /// `None`: by the config.
    pub(super) enforce: Option<bool>,
    pub(super) terms: Terms,
}

/// The fields of the bodies. Their types are checked one by one, so that a message can name the field.
#[derive(serde::Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitFields {
    limit: Value,
    #[serde(default)]
    burst: Value,
    #[serde(default, rename = "for")]
    duration: Value,
    #[serde(default)]
    reason: Value,
}

#[derive(serde::Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EnforceFields {
    enforce: Value,
    #[serde(default, rename = "for")]
    duration: Value,
    #[serde(default)]
    reason: Value,
}

impl LimitBody {
    pub(super) fn read(body: BodyResult) -> Result<Self, Box<Response>> {
        const SHAPE: &str = r#"{"limit": 400000, "burst": 400000, "for": "2h", "reason": "..."}"#;
        let LimitFields { limit, burst, duration, reason } = parse(body, SHAPE)?;
        let limit =
            if limit == "unlimited" { UNLIMITED } else { amount("limit", &limit, ", or \"unlimited\"")? };
        let burst = if burst.is_null() { None } else { Some(amount("burst", &burst, "")?) };
        Ok(Self { limit, burst, terms: Terms::read(&duration, reason)? })
    }
}

impl EnforceBody {
    pub(super) fn read(body: BodyResult) -> Result<Self, Box<Response>> {
        const SHAPE: &str = r#"{"enforce": false, "for": "2h", "reason": "..."}"#;
        let EnforceFields { enforce, duration, reason } = parse(body, SHAPE)?;
        let enforce = match enforce {
            Value::Null => None,
            Value::Bool(enforce) => Some(enforce),
            _ => return Err(invalid("enforce must be true, false, or null for the value of the file.")),
        };
        Ok(Self { enforce, terms: Terms::read(&duration, reason)? })
    }
}

impl Terms {
    fn read(duration: &Value, reason: Value) -> Result<Self, Box<Response>> {
        let duration_ms = match duration {
            Value::Null => None,
            Value::String(text) => Some(duration_ms(text)?),
            _ => return Err(invalid("for must be a duration in quotes, such as \"2h\".")),
        };
        let reason = match reason {
            Value::Null => None,
            Value::String(text) => Some(checked_reason(text)?),
            _ => return Err(invalid("reason must be a text.")),
        };
        Ok(Self { duration_ms, reason: reason.filter(|text| !text.is_empty()) })
    }
}

fn parse<T: DeserializeOwned>(body: BodyResult, shape: &str) -> Result<T, Box<Response>> {
    let bad = |message: &str| Box::new(refusal(StatusCode::BAD_REQUEST, "invalid_json", message));
    let body = body.map_err(|error| bad(&format!("The body cannot be read: {}.", error.body_text())))?;
    read_object(&body).map_err(|error| bad(&format!("The body is not {shape}: {error}.")))
}

fn amount(field: &str, value: &Value, or: &str) -> Result<u64, Box<Response>> {
    let amount = match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => config::amount(text),
        _ => None,
    };
    amount.filter(|amount| (1..=MAX_LIMIT).contains(amount)).ok_or_else(|| {
        let message = format!(
            "{field} must be a whole number from 1 to 2^50 ({MAX_LIMIT}), an amount such as \"400k\"{or}."
        );
        invalid(&message)
    })
}

fn duration_ms(text: &str) -> Result<u64, Box<Response>> {
    let ms = config::duration(text).map(|duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
    let in_range = ms.filter(|ms| (MIN_DURATION_MS..=MAX_DURATION_MS).contains(ms));
    in_range.ok_or_else(|| invalid("for must be a duration such as \"2h\", from 1s to 366d."))
}

fn checked_reason(text: String) -> Result<String, Box<Response>> {
    if text.chars().count() > MAX_REASON_CHARS {
        return Err(invalid(&format!("reason may have at most {MAX_REASON_CHARS} characters.")));
    }
    if text.chars().any(char::is_control) {
        return Err(invalid("reason must be one line of text, without control characters."));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn read(body: &str) -> Option<LimitBody> {
        LimitBody::read(Ok(Bytes::copy_from_slice(body.as_bytes()))).ok()
    }

    #[test]
    fn limits_are_amounts_or_unlimited() {
        for (body, limit) in [
            (r#"{"limit": 400000}"#, Some(400_000)),
            (r#"{"limit": "400k"}"#, Some(400_000)),
            (r#"{"limit": "unlimited"}"#, Some(UNLIMITED)),
            (r#"{"limit": 1125899906842624}"#, Some(MAX_LIMIT)),
            (r#"{"limit": 1125899906842625}"#, None),
            (r#"{"limit": 0}"#, None),
            (r#"{"limit": -1}"#, None),
            (r#"{"limit": 1e300}"#, None),
            (r#"{"limit": 1.5}"#, None),
            (r#"{"limit": "400x"}"#, None),
            (r#"{"limit": null}"#, None),
            (r#"{"limit": [1]}"#, None),
            (r#"{"limit": 1, "limit": 2}"#, None),
            (r#"{"limit": 1, "bursts": 2}"#, None),
            (r#"{"limit": 1, "burst": 0}"#, None),
            ("{}", None),
            ("[400000]", None),
            ("", None),
        ] {
            assert_eq!(read(body).map(|body| body.limit), limit, "{body}");
        }
        let bomb = format!("{{\"limit\": {}1{}}}", "[".repeat(20_000), "]".repeat(20_000));
        assert_eq!(read(&bomb), None);
    }

    #[test]
    fn durations_and_reasons_are_bounded() {
        let body = |rest: &str| read(&format!(r#"{{"limit": 1, {rest}}}"#)).map(|body| body.terms);
        let terms = |duration_ms, reason: Option<&str>| {
            Some(Terms { duration_ms, reason: reason.map(str::to_owned) })
        };
        assert_eq!(body(r#""for": "2h", "reason": "load test""#), terms(Some(7_200_000), Some("load test")));
        assert_eq!(body(r#""for": null, "reason": """#), terms(None, None));
        for bad in [r#""for": "0s""#, r#""for": "3660d""#, r#""for": 5"#, r#""for": "2 h""#, r#""reason": 5"#]
        {
            assert_eq!(body(bad), None, "{bad}");
        }
        assert!(body(&format!(r#""reason": "{}""#, "x".repeat(500))).is_some());
        assert_eq!(body(&format!(r#""reason": "{}""#, "x".repeat(501))), None);
        assert_eq!(body(r#""reason": "two\nlines""#), None);
    }
}
