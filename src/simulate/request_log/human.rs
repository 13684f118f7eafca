//! Reads the lines of requests that are written for people: `TIME INFO  request  key=value key="text"`.

use super::{RequestLine, no_api};
use memchr::memmem;
use std::borrow::Cow;

/// What precedes the fields of a request.
const REQUEST: &[u8] = b" INFO  request  ";

/// The time of a request's line, and the text of its fields. `None`: another line.
pub(super) fn fields(line: &[u8]) -> Option<(&str, &str)> {
    let at = memmem::find(line, REQUEST)?;
    let (before, fields) = (line.get(..at)?, line.get(at + REQUEST.len()..)?);
    let before = std::str::from_utf8(before).ok()?;
    let time = before.rsplit(' ').next()?;
    // Without a time, the words are part of a field of another line.
    if !time.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    Some((time, std::str::from_utf8(fields).ok()?.trim_end()))
}

pub(super) fn request<'a>((timestamp, mut rest): (&'a str, &'a str)) -> Result<RequestLine<'a>, String> {
    let mut line = RequestLine {
        timestamp,
        environment: "".into(),
        caller: None,
        api: no_api(),
        model: "".into(),
        outcome: "",
        estimated_prompt_tokens: 0,
        prompt_tokens: 0,
        completion_tokens: 0,
        first_byte_us: None,
        duration_us: 0,
        kind: None,
        requested: None,
    };
    let mut has_duration = false;
    while !rest.is_empty() {
        let fault = |key: &str| format!("this request line cannot be read: the field {key} is not valid");
        let (key, after) = rest.split_once('=').ok_or_else(|| fault(rest))?;
        let (value, after) = value(after).ok_or_else(|| fault(key))?;
        rest = after;
        let number = || value.parse::<u64>().map_err(|_| fault(key));
        let duration = || microseconds(&value).ok_or_else(|| fault(key));
        match key {
            "environment" => line.environment = value,
            "caller" => line.caller = Some(value),
            "api" => line.api = word(&value).ok_or_else(|| fault(key))?,
            "model" => line.model = value,
            "outcome" => line.outcome = word(&value).ok_or_else(|| fault(key))?,
            "kind" => line.kind = Some(word(&value).ok_or_else(|| fault(key))?),
            "estimated_prompt_tokens" => line.estimated_prompt_tokens = number()?,
            "prompt_tokens" => line.prompt_tokens = number()?,
            "completion_tokens" => line.completion_tokens = number()?,
            "requested" => line.requested = Some(number()?),
            "first_byte" => line.first_byte_us = Some(duration()?),
            "duration" => {
                line.duration_us = duration()?;
                has_duration = true;
            }
            _ => {}
        }
    }
    if line.outcome.is_empty() || !has_duration {
        return Err("this request line cannot be read: it has no outcome or no duration".to_owned());
    }
    Ok(line)
}

/// The value at the beginning of a text, and the text after it.
fn value(text: &str) -> Option<(Cow<'_, str>, &str)> {
    if !text.starts_with('"') {
        let (value, rest) = text.split_once(' ').unwrap_or((text, ""));
        return Some((value.into(), rest));
    }
    let mut strings = serde_json::Deserializer::from_str(text).into_iter::<String>();
    let value = strings.next()?.ok()?;
    let rest = text.get(strings.byte_offset()..)?;
    Some((value.into(), rest.strip_prefix(' ').unwrap_or(rest)))
}

/// A value that is written without quotes.
fn word<'t>(value: &Cow<'t, str>) -> Option<&'t str> {
    match value {
        Cow::Borrowed(word) => Some(word),
        Cow::Owned(_) => None,
    }
}

/// A duration with its unit: `90us`, `1.250ms` or `2.500s`.
fn microseconds(text: &str) -> Option<u64> {
    let units = [("us", 1), ("ms", 1_000), ("s", 1_000_000)];
    let (number, unit) = units.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)))?;
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    if part.is_empty() || part.len() > 6 {
        return None;
    }
    let digits = u32::try_from(part.len()).ok()?;
    let part = part.parse::<u64>().ok()?.checked_mul(unit)? / 10_u64.pow(digits);
    whole.parse::<u64>().ok()?.checked_mul(unit)?.checked_add(part)
}
