//! Reads the gateway's own request log as a trace, in either form.

mod human;

use super::{Pace, TraceCall, TraceFault};
use crate::clock::Timestamp;
use crate::config::api_of_routes;
use crate::quota::MAX_AMOUNT;
use memchr::memchr;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{BufRead, Read as _};
use std::sync::Arc;
use std::time::Duration;

/// Longer lines are no request lines.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// The target of the log lines of requests.
const REQUEST_TARGET: &str = "tollgate::request";
/// APIs whose models generate tokens.
const GENERATING: [&str; 5] = ["chat", "completions", "responses", "messages", "gemini"];
/// Kinds of paths that are not charged.
const UNCHARGED: [&str; 3] = ["none", "models", "root"];

/// The requests of a log.
#[derive(Clone, Debug, Default)]
pub struct RequestLog {
    /// The requests that a quota admitted or denied, sorted by time.
    pub calls: Vec<TraceCall>,
    /// Number of lines that are no requests, or requests that no quota decided on.
    pub skipped: u64,
    /// Number of calls that a quota denied.
    pub denied: u64,
}

/// The fields of a request line that a replay needs. Fields without a value are absent.
#[derive(Deserialize)]
struct RequestLine<'a> {
    timestamp: &'a str,
    #[serde(borrow, default)]
    environment: Cow<'a, str>,
    #[serde(borrow)]
    caller: Option<Cow<'a, str>>,
    #[serde(default = "no_api")]
    api: &'a str,
    #[serde(borrow, default)]
    model: Cow<'a, str>,
    outcome: &'a str,
    #[serde(default)]
    estimated_prompt_tokens: u64,
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    first_byte_us: Option<u64>,
    duration_us: u64,
    /// The denying quota's kind, and what the request would have reserved in it.
    kind: Option<&'a str>,
    requested: Option<u64>,
}

fn no_api() -> &'static str {
    "none"
}

/// A line's target. Other lines may have other fields.
#[derive(Deserialize)]
struct LineTarget<'a> {
    target: Option<&'a str>,
}

/// Reads the log lines of requests, which `tollgate serve` writes to standard error. Text before the first `{` of a line
/// is ignored, because collectors of logs add times and names there.
///
/// A denied request has the completion tokens that answered requests of its environment and model have on average, or,
/// without such requests, what it would have reserved.
///
/// # Errors
/// There is no request line, or one lacks a field.
pub fn read_request_log(mut input: impl BufRead) -> Result<RequestLog, TraceFault> {
    let mut log = RequestLog::default();
    let mut lengths = MeanLengths::default();
    let mut denied: Vec<(usize, Option<u64>)> = Vec::new();
    let mut line = Vec::new();
    let mut number = 0;
    loop {
        let fault = |message| TraceFault { line: number + 1, message };
        line.clear();
        let read = input.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
        if read.map_err(|error| fault(error.to_string()))? == 0 {
            break;
        }
        if line.last() != Some(&b'\n') && line.len() as u64 >= MAX_LINE_BYTES {
            skip_line(&mut input).map_err(|error| fault(error.to_string()))?;
        }
        number += 1;
        let request = request(&line).map_err(|message| TraceFault { line: number, message })?;
        let Some(request) = request.filter(is_decided) else {
            log.skipped += 1;
            continue;
        };
        let call = call(&request).map_err(|message| TraceFault { line: number, message })?;
        if request.outcome == "rejected" {
            denied.push((log.calls.len(), request.reserved_completion()));
        } else if call.generates && request.outcome == "answered" {
            lengths.add(&call);
        }
        log.calls.push(call);
    }
    if log.calls.is_empty() {
        return Err(no_requests(number));
    }
    log.denied = denied.len() as u64;
    for (at, reserved) in denied {
        let call = &mut log.calls[at];
        call.completion = lengths.of(call).or(reserved).unwrap_or(0).min(MAX_AMOUNT);
    }
    log.calls.sort_by_key(|call| call.at);
    Ok(log)
}

fn skip_line(input: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let buffer = input.fill_buf()?;
        let end = memchr(b'\n', buffer);
        let length = end.map_or(buffer.len(), |end| end + 1);
        input.consume(length);
        if end.is_some() || length == 0 {
            return Ok(());
        }
    }
}

fn no_requests(lines: u64) -> TraceFault {
    let message = format!(
        "none of the {lines} lines is a request that a quota decided on; the lines of requests have \"target\":\"{REQUEST_TARGET}\", or for people \"INFO  request\", as 'tollgate serve' writes them to standard error; a CSV file is read with --trace"
    );
    TraceFault { line: 1, message }
}

/// `None`: another line.
fn request(line: &[u8]) -> Result<Option<RequestLine<'_>>, String> {
    if let Some(fields) = human::fields(line) {
        return human::request(fields).map(Some);
    }
    let Some(json) = memchr(b'{', line).and_then(|begin| line.get(begin..)) else { return Ok(None) };
    let is_request =
        serde_json::from_slice::<LineTarget<'_>>(json).is_ok_and(|line| line.target == Some(REQUEST_TARGET));
    if !is_request {
        return Ok(None);
    }
    let read = serde_json::from_slice(json);
    read.map(Some).map_err(|error| {
        format!(
            "this request line cannot be read ({error}); was it written by another version of the gateway?"
        )
    })
}

/// Whether a quota admitted or denied the request.
fn is_decided(request: &RequestLine<'_>) -> bool {
    let is_charged = request.prompt_tokens > 0 || request.completion_tokens > 0;
    let reached_upstream = match request.outcome {
        "refused" => false,
        "answered" | "upstream_error" | "rejected" => true,
        _ => is_charged,
    };
    reached_upstream && !request.environment.is_empty() && !UNCHARGED.contains(&request.api)
}

fn call(request: &RequestLine<'_>) -> Result<TraceCall, String> {
    let end = request.timestamp.parse::<jiff::Timestamp>();
    let end =
        end.map_err(|_| format!("timestamp is \"{}\", which is no date and time", request.timestamp))?;
    let arrival = end.as_millisecond().saturating_sub_unsigned(request.duration_us / 1_000);
    let is_denied = request.outcome == "rejected";
    let prompt = if is_denied { request.estimated_prompt_tokens } else { request.prompt_tokens };
    Ok(TraceCall {
        at: Timestamp(arrival),
        prompt: prompt.min(MAX_AMOUNT),
        completion: request.completion_tokens.min(MAX_AMOUNT),
        environment: Some(request.environment.to_string()),
        max_tokens: None,
        api: api_of_routes(request.api),
        model: request.model.to_string(),
        caller: request.caller.as_deref().map(Arc::from),
        generates: GENERATING.contains(&request.api),
        pace: if is_denied { None } else { request.pace() },
    })
}

impl RequestLine<'_> {
    /// The speed of the answer.
    fn pace(&self) -> Option<Pace> {
        let first_byte = self.first_byte_us?;
        let streamed = Duration::from_micros(self.duration_us.saturating_sub(first_byte).max(1));
        #[allow(clippy::cast_precision_loss)]
        let tokens_per_second = self.completion_tokens.max(1) as f64 / streamed.as_secs_f64();
        Some(Pace { first_token: Duration::from_micros(first_byte), tokens_per_second })
    }

    /// What a denied request would have reserved for its answer, if the line reveals it.
    fn reserved_completion(&self) -> Option<u64> {
        match self.kind? {
            "completion_tokens" => self.requested,
            "total_tokens" => Some(self.requested?.saturating_sub(self.estimated_prompt_tokens)),
            _ => None,
        }
    }
}

/// The mean completion tokens of answered requests by environment and model.
#[derive(Default)]
struct MeanLengths(HashMap<(String, String), (u64, u64)>);

impl MeanLengths {
    fn key(call: &TraceCall) -> (String, String) {
        (call.environment.clone().unwrap_or_default(), call.model.clone())
    }

    fn add(&mut self, call: &TraceCall) {
        let (count, sum) = self.0.entry(Self::key(call)).or_default();
        *count += 1;
        *sum = sum.saturating_add(call.completion);
    }

    fn of(&self, call: &TraceCall) -> Option<u64> {
        if !call.generates {
            return Some(0);
        }
        self.0.get(&Self::key(call)).map(|(count, sum)| sum / count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWERED: &str = r#"{"timestamp":"2026-03-04T09:00:10.500Z","level":"INFO","target":"tollgate::request","request_id":"r","environment":"production","caller":"web","api":"chat","model":"gpt-4o","outcome":"answered","status":200,"stream":true,"estimated_prompt_tokens":90,"estimate_source":"counted","prompt_tokens":100,"completion_tokens":40,"total_tokens":140,"usage_reported":true,"first_byte_us":500000,"overhead_us":90,"duration_us":2500000}"#;

    fn read(lines: &[String]) -> Result<RequestLog, TraceFault> {
        read_request_log(lines.join("\n").as_bytes())
    }

    fn denied(kind: &str, requested: u64, model: &str) -> String {
        ANSWERED
            .replace("answered", "rejected")
            .replace("gpt-4o", model)
            .replace(
                "\"status\":200",
                &format!("\"status\":429,\"kind\":\"{kind}\",\"requested\":{requested}"),
            )
            .replace("\"prompt_tokens\":100", "\"prompt_tokens\":0")
            .replace("\"completion_tokens\":40", "\"completion_tokens\":0")
    }

    #[test]
    fn an_answered_request_arrives_before_its_line_was_written() {
        let log = read(&[ANSWERED.to_owned()]).unwrap();
        let [call] = &log.calls[..] else { panic!("{log:?}") };
        assert_eq!(super::super::words::utc(call.at, "%FT%T"), "2026-03-04T09:00:08");
        assert_eq!((call.prompt, call.completion, call.generates), (100, 40, true));
        assert_eq!(
            (call.environment.as_deref(), call.caller.as_deref(), &*call.model),
            (Some("production"), Some("web"), "gpt-4o")
        );
        let pace = Pace { first_token: Duration::from_millis(500), tokens_per_second: 20.0 };
        assert_eq!(call.pace, Some(pace));
    }

    #[test]
    fn a_denied_request_counts_with_its_estimate() {
        let lines = [
            ANSWERED.to_owned(),
            ANSWERED.replace("\"completion_tokens\":40", "\"completion_tokens\":80"),
            denied("total_tokens", 700, "gpt-4o"),
            denied("total_tokens", 700, "o3"),
            denied("requests", 1, "o3"),
            denied("completion_tokens", 512, "o3"),
        ];
        let log = read(&lines).unwrap();
        let mut lengths: Vec<_> = log.calls.iter().map(|call| (call.prompt, call.completion)).collect();
        lengths.sort_unstable();
        // The mean of gpt-4o, and what the other model reserved.
        assert_eq!(lengths, [(90, 0), (90, 60), (90, 512), (90, 610), (100, 40), (100, 80)]);
        assert_eq!((log.denied, log.skipped), (4, 0));
    }

    #[test]
    fn other_lines_are_skipped_and_counted() {
        let lines = [
            "not JSON".to_owned(),
            String::new(),
            r#"{"timestamp":"2026-03-04T09:00:10Z","level":"INFO","target":"tollgate::app","message":"ready"}"#.to_owned(),
            ANSWERED.replace("answered", "refused"),
            ANSWERED.replace("\"production\"", "\"\""),
            ANSWERED.replace("\"chat\"", "\"models\""),
            "x".repeat(3 << 20),
            format!("Mar 04 09:00:10 host tollgate[7]: {ANSWERED}"),
        ];
        let log = read(&lines).unwrap();
        assert_eq!((log.calls.len(), log.skipped), (1, 7));
    }

    #[test]
    fn lines_for_people_have_the_same_requests() {
        let human = "2026-03-04T09:00:10.500Z INFO  request  outcome=answered status=200 request_id=r environment=production caller=\"w \\\"eb\" api=chat model=gpt-4o stream=true estimated_prompt_tokens=90 estimate_source=rules reserved_tokens=512 prompt_tokens=100 completion_tokens=40 charged_tokens=140 usage_reported=true overhead=90us first_byte=500.000ms duration=2.500s";
        let json = ANSWERED.replace("\"web\"", "\"w \\\"eb\"");
        for prefix in ["", "gateway-1  | ", "Mar 04 09:00:10 host tollgate[7]: "] {
            let lines = [
                format!("{prefix}{human}"),
                json.clone(),
                "2026-03-04T09:00:10.500Z INFO  the config was reloaded  changes=1".to_owned(),
            ];
            let log = read(&lines).unwrap();
            assert_eq!((log.calls.len(), log.skipped), (2, 1));
            assert_eq!(format!("{:?}", log.calls[0]), format!("{:?}", log.calls[1]));
        }
        let denied = human.replace("answered", "rejected kind=total_tokens requested=700");
        assert_eq!(read(&[denied]).unwrap().calls[0].completion, 610);
        for broken in [
            human.replace("2.500s", "2.5 s"),
            human.replace("duration=2.500s", ""),
            human.replace("prompt_tokens=100", "prompt_tokens=1e3"),
            human.replace("outcome=answered", "outcome=\"x"),
        ] {
            assert!(read(std::slice::from_ref(&broken)).is_err(), "{broken}");
        }
    }

    #[test]
    fn a_file_of_another_form_is_refused() {
        for text in
            ["", "timestamp,prompt_tokens,completion_tokens\n1,2,3\n", "{\"target\":\"x\"}\n", "\0\u{1}{{{"]
        {
            let fault = read_request_log(text.as_bytes()).unwrap_err();
            assert!(
                fault.message.contains("tollgate::request") && fault.message.contains("--trace"),
                "{fault}"
            );
        }
        let fault =
            read(&[ANSWERED.to_owned(), ANSWERED.replace("\"duration_us\":2500000", "\"x\":1")]).unwrap_err();
        assert!(fault.line == 2 && fault.message.contains("duration_us"), "{fault}");
        let fault = read(&[ANSWERED.replace("2026-03-04T09:00:10.500Z", "now")]).unwrap_err();
        assert!(fault.message.contains("\"now\""), "{fault}");
    }

    #[test]
    fn embeddings_generate_nothing() {
        let log = read(&[ANSWERED.replace("\"chat\"", "\"embeddings\"")]).unwrap();
        assert!(!log.calls[0].generates && log.calls[0].api == Some("embeddings"));
        let log = read(&[ANSWERED.replace("\"chat\"", "\"other\"")]).unwrap();
        assert_eq!(log.calls[0].api, None, "no route takes an unknown path");
    }
}
