//! One recorded exchange to replay: the request, the upstream's answer and the expected result.

use crate::exchange::Exchange;
use crate::rules::charged;
use bytes::Bytes;
use serde_json::{Value, json};
use tollgate::api::Api;
use tollgate::body::{Body, BodyText};
use tollgate::estimate::{Models, Tokenizer};
use tollgate::usage::{Delivered, Discard, JsonReader, Reported, SseReader, TextToCount};

/// A request with its answer and the expected result.
pub(crate) struct Case<'a> {
    pub(crate) exchange: &'a Exchange,
    pub(crate) method: &'a str,
    /// The path without the environment.
    pub(crate) target: String,
    pub(crate) request: Bytes,
    pub(crate) status: u16,
    /// The answer that the upstream sends.
    pub(crate) answer: Bytes,
    pub(crate) is_compressed: bool,
    /// The body that the caller must receive.
    pub(crate) expected_body: Bytes,
    pub(crate) expected_charge: ExpectedCharge,
}

/// The expected charge.
#[derive(Clone, Copy)]
pub(crate) struct ExpectedCharge {
    pub(crate) requests: u64,
    /// Prompt, completion and total tokens; `None`: the answer reports no usage.
    reported: Option<(u64, u64, u64)>,
    /// Whether the usage lacks fields, which the estimate and the count replace. A 0 is lacking if the prompt or the
    /// answer was not empty.
    lacks_prompt: bool,
    lacks_completion: bool,
    /// Whether a report before the end is the only one, so that the completion is at least the count.
    lacks_final_report: bool,
    /// Whether the prompts of the API are estimated and the answer is not an error.
    is_estimated: bool,
    /// The count of the answer's text, for answers that do not report usage.
    counted: u64,
}

const GZIP: &[u8] = b"\x1f\x8b";
const GEMINI: &str = "gemini-2.0-flash";

impl<'a> Case<'a> {
    /// The cases of an exchange: the recorded request, and for a stream whose usage the gateway may request, one that
    /// requests usage itself and one that does not.
    pub(crate) fn all(exchange: &'a Exchange) -> Vec<Self> {
        let Some(answer) = exchange.body() else { return Vec::new() };
        let api = exchange.api();
        let (method, target) = replay_target(exchange);
        let recorded = exchange.request().filter(|body| is_servable(api, body));
        let request = if method == "GET" {
            Bytes::new()
        } else {
            recorded.unwrap_or_else(|| minimal(api, exchange.stream))
        };
        let (status, is_compressed) = (exchange.status.unwrap_or(200), answer.starts_with(GZIP));
        let tokenizer = Models::default().named(&model(&target, &request)).tokenizer;
        let whole = Self {
            exchange,
            method,
            expected_charge: ExpectedCharge::of(
                exchange,
                &answer,
                status,
                target.starts_with("/v1/models"),
                tokenizer,
            ),
            target,
            request,
            status,
            is_compressed,
            expected_body: answer.clone(),
            answer,
        };
        if !(exchange.stream && api.is_some_and(Api::reports_stream_usage_on_request)) {
            return vec![whole];
        }
        let withheld = if is_compressed { whole.answer.clone() } else { without_usage_chunk(&whole.answer) };
        let with_usage = |requests_usage: bool, expected_body: &Bytes| Self {
            request: stream_request(&whole.request, requests_usage),
            expected_body: expected_body.clone(),
            target: whole.target.clone(),
            answer: whole.answer.clone(),
            ..whole
        };
        vec![with_usage(true, &whole.answer), with_usage(false, &withheld)]
    }
}

/// The method and path to replay. The recorded path is used for a request to an uncounted path, if the path is
/// plain.
fn replay_target(exchange: &Exchange) -> (&str, String) {
    let (method, path) = exchange.method_and_path();
    let target = match exchange.api() {
        Some(Api::Chat) => "/v1/chat/completions".to_owned(),
        Some(Api::Completions) => "/v1/completions".to_owned(),
        Some(Api::Responses) => "/v1/responses".to_owned(),
        Some(Api::Embeddings) => "/v1/embeddings".to_owned(),
        Some(Api::Messages) => "/v1/messages".to_owned(),
        Some(Api::Gemini) => {
            let operation = path.rsplit(':').next().filter(|o| o.contains("enerateContent"));
            format!("/v1beta/models/{GEMINI}:{}", operation.unwrap_or("generateContent"))
        }
        None => {
            let is_model = path.starts_with("/v1/models") && method == "GET";
            let is_plain = !path.contains('%') && !path.starts_with("/v1/models");
            return if is_model || (is_plain && method == "POST") {
                (method, path.to_owned())
            } else {
                ("POST", "/v1/rerank".to_owned())
            };
        }
    };
    ("POST", target)
}

fn is_servable(api: Option<Api>, body: &[u8]) -> bool {
    match api {
        Some(api) => BodyText::of(body).is_ok_and(|text| Body::read(api, &text).is_ok()),
        None => serde_json::from_slice::<Value>(body).is_ok_and(|body| body.is_object()),
    }
}

fn minimal(api: Option<Api>, streams: bool) -> Bytes {
    let messages = json!([{"role": "user", "content": "hello"}]);
    let mut body = match api {
        Some(Api::Chat | Api::Messages) => json!({"messages": messages, "max_tokens": 100}),
        Some(Api::Completions) => json!({"prompt": "hello"}),
        Some(Api::Responses | Api::Embeddings) => json!({"input": "hello"}),
        Some(Api::Gemini) => json!({"contents": [{"parts": [{"text": "hello"}]}]}),
        None => json!({}),
    };
    if api != Some(Api::Gemini) {
        body["model"] = "gpt-4o".into();
    }
    if streams && !matches!(api, None | Some(Api::Gemini | Api::Embeddings)) {
        body["stream"] = true.into();
    }
    body.to_string().into()
}

/// The model in the path or body.
fn model(target: &str, request: &[u8]) -> String {
    if target.contains(GEMINI) {
        return GEMINI.to_owned();
    }
    let body: Value = serde_json::from_slice(request).unwrap_or_default();
    body["model"].as_str().unwrap_or_default().to_owned()
}

/// A request for a stream, with or without a request for usage.
fn stream_request(request: &[u8], requests_usage: bool) -> Bytes {
    let mut body: Value = serde_json::from_slice(request).unwrap();
    body["stream"] = true.into();
    if requests_usage {
        body["stream_options"] = json!({"include_usage": true});
    } else {
        body.as_object_mut().unwrap().remove("stream_options");
    }
    body.to_string().into()
}

/// Removes the events with a usage and no choices from a stream.
fn without_usage_chunk(stream: &[u8]) -> Bytes {
    let (mut forwarded, mut event, mut data) = (Vec::new(), Vec::new(), Vec::new());
    for line in lines(stream) {
        event.extend_from_slice(line);
        let text = line.trim_ascii_end();
        if let Some(rest) = text.strip_prefix(b"data:") {
            data.extend_from_slice(rest);
        }
        if text.is_empty() {
            let event = std::mem::take(&mut event);
            if !is_usage_chunk(&std::mem::take(&mut data)) {
                forwarded.extend(event);
            }
        }
    }
    if !is_usage_chunk(&data) {
        forwarded.extend(event);
    }
    forwarded.into()
}

/// Splits into lines with their ends: LF, CR or CRLF.
fn lines(mut text: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let end = text
            .iter()
            .position(|&b| b == b'\n' || b == b'\r')
            .map_or(text.len(), |at| at + if text[at..].starts_with(b"\r\n") { 2 } else { 1 });
        let line;
        (line, text) = text.split_at(end);
        (!line.is_empty()).then_some(line)
    })
}

fn is_usage_chunk(data: &[u8]) -> bool {
    let event: Value = serde_json::from_slice(data).unwrap_or_default();
    event["choices"].as_array().is_some_and(Vec::is_empty) && !event["usage"].is_null()
}

impl ExpectedCharge {
    fn of(exchange: &Exchange, answer: &Bytes, status: u16, is_free: bool, tokenizer: Tokenizer) -> Self {
        let plain = unzipped(answer);
        let (reported, texts) = read(&plain, exchange);
        let is_estimated = (200..300).contains(&status) && exchange.api().is_some();
        let generates = is_estimated && exchange.api().is_some_and(Api::generates);
        let counted = tokenizer.count_all(texts.texts.iter().map(String::as_str)) + texts.known_tokens;
        let counted = if generates { counted } else { 0 };
        let is_total_alone = exchange.usage.as_object().is_some_and(|usage| {
            !usage
                .keys()
                .any(|name| ["prompt", "input", "completion", "output"].iter().any(|k| name.starts_with(k)))
        });
        let has_zero_completion = reported.completion() == Some(0) && !is_total_alone;
        Self {
            requests: u64::from(!is_free),
            reported: charged(exchange),
            lacks_prompt: reported.prompt().is_none_or(|tokens| tokens == 0 && is_estimated),
            lacks_completion: reported.completion().is_none() || has_zero_completion,
            lacks_final_report: exchange.stream && !has_final_report(&plain),
            is_estimated,
            counted,
        }
    }

    /// Whether the charge (requests, prompt, completion, total) is the expected one. `estimate_header` is the estimate in
    /// the headers of the answer.
    pub(crate) fn matches(&self, charged: [u64; 4], estimate_header: u64) -> bool {
        let [requests, prompt, completion, total] = charged;
        let estimate = if self.is_estimated { estimate_header } else { 0 };
        let (wanted, least_total) = match self.reported {
            Some((p, c, t)) => ((p, c), t),
            None => ((0, 0), 0),
        };
        let is_prompt = prompt == if self.lacks_prompt { estimate } else { wanted.0 };
        let is_completion = completion
            == if self.lacks_completion {
                self.counted
            } else if self.lacks_final_report {
                wanted.1.max(self.counted)
            } else {
                wanted.1
            };
        requests == self.requests
            && is_prompt
            && is_completion
            && total == least_total.max(prompt + completion)
    }

    /// A description for the report.
    pub(crate) fn describe(&self) -> String {
        format!(
            "{} request, reported usage {:?}{}{}",
            self.requests,
            self.reported,
            if self.lacks_prompt { ", the prompt is the estimate" } else { "" },
            if self.lacks_completion {
                format!(", the completion is the count {}", self.counted)
            } else {
                String::new()
            }
        )
    }
}

/// Whether a stream has one of the events in which the APIs report their final usage.
fn has_final_report(stream: &[u8]) -> bool {
    let mut has_finish_reason = false;
    lines(stream).filter_map(|line| line.strip_prefix(b"data:")).any(|data| {
        let event: Value = serde_json::from_slice(data.trim_ascii()).unwrap_or_default();
        let kind = event["type"].as_str().unwrap_or_default();
        let finishes = |list: &str, name: &str| {
            event[list].as_array().is_some_and(|list| list.iter().any(|choice| choice[name].is_string()))
        };
        has_finish_reason |= finishes("choices", "finish_reason") || finishes("candidates", "finishReason");
        let has_usage = ["/usage", "/usageMetadata", "/x_groq/usage", "/choices/0/usage"]
            .iter()
            .any(|path| event.pointer(path).is_some_and(Value::is_object));
        match kind {
            "message_delta"
            | "message-end"
            | "response.completed"
            | "response.incomplete"
            | "response.failed" => true,
            _ => has_usage && (has_finish_reason || event["choices"].as_array().is_some_and(Vec::is_empty)),
        }
    })
}

/// The usage that an answer reports, and the text to count.
fn read(answer: &Bytes, exchange: &Exchange) -> (Reported, TextToCount) {
    if exchange.stream {
        let mut reader = SseReader::new(false);
        reader.feed(answer, &mut Discard);
        reader.finish(&mut Discard);
        return (reader.reported(), reader.take_text());
    }
    if !exchange.content_type().starts_with("application/json") {
        let tokens = answer.len().div_ceil(4) as u64;
        return (Reported::default(), TextToCount { texts: Vec::new(), known_tokens: tokens });
    }
    let (mut reader, mut received) = (JsonReader::default(), Delivered::default());
    reader.feed(answer);
    received.push_piece(answer);
    (reader.reported(), received.finish_document())
}

fn unzipped(answer: &Bytes) -> Bytes {
    if !answer.starts_with(GZIP) {
        return answer.clone();
    }
    let mut text = Vec::new();
    // A recording may be incomplete: the part before its end counts.
    let _ = std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(&answer[..]), &mut text);
    text.into()
}
