//! The spans of one request.

use super::Tracing;
use crate::clock;
use crate::telemetry::gen_ai::{operation_name, provider};
use crate::telemetry::{Record, RequestOutcome};
use http::Method;
use opentelemetry::trace::{Span as _, SpanContext, SpanKind, Status, TraceContextExt as _, Tracer as _};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_sdk::trace::Span;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The server span of a request, and the spans below it. Times are offsets from the begin of the request.
#[derive(Debug)]
pub(crate) struct RequestTrace {
    tracing: Arc<Tracing>,
    started_at: SystemTime,
    method: &'static str,
    server: Span,
    /// The context of the server span, as the parent of others.
    context: Context,
    upstream: Option<UpstreamSpan>,
    /// The model that the answer names.
    answer_model: Option<String>,
}

/// The span of the call of the upstream.
#[derive(Debug)]
struct UpstreamSpan {
    span: Span,
    begin: Duration,
}

impl RequestTrace {
    /// Begins the trace of a request, or the request's part of its caller's trace. `age`: time since the request arrived.
    /// `None`: the gateway has stopped to send traces.
    pub(in crate::telemetry) fn begin(
        tracing: &Arc<Tracing>,
        parent: Option<SpanContext>,
        method: &Method,
        age: Duration,
    ) -> Option<Self> {
        let now = clock::system_time();
        let started_at = now.checked_sub(age).unwrap_or(now);
        let parent = parent.map_or_else(Context::new, |span| Context::new().with_remote_span_context(span));
        let method = known(method);
        let builder = tracing.tracer.span_builder(method).with_kind(SpanKind::Server);
        let builder = builder.with_start_time(started_at);
        let server = tracing.tracer.build_with_context(builder, &parent);
        if !server.span_context().is_valid() {
            return None;
        }
        let context = Context::new().with_remote_span_context(server.span_context().clone());
        Some(Self {
            tracing: tracing.clone(),
            started_at,
            method,
            server,
            context,
            upstream: None,
            answer_model: None,
        })
    }

    /// The id of the trace.
    pub(in crate::telemetry) fn id(&self) -> String {
        self.server.span_context().trace_id().to_string()
    }

    /// Adds the span of a wait for room, which has just ended.
    pub(crate) fn waited(&self, wait: Duration, age: Duration) {
        let builder = self.tracing.tracer.span_builder("wait for room").with_kind(SpanKind::Internal);
        let builder = builder.with_start_time(self.at(age.saturating_sub(wait)));
        let mut span = self.tracing.tracer.build_with_context(builder, &self.context);
        span.end_with_timestamp(self.at(age));
    }

    /// Begins the span of the call of the upstream. Returns the `traceparent` for the upstream.
    pub(crate) fn call_upstream(&mut self, age: Duration) -> String {
        let builder = self.tracing.tracer.span_builder("upstream").with_kind(SpanKind::Client);
        let builder = builder.with_start_time(self.at(age));
        let span = self.tracing.tracer.build_with_context(builder, &self.context);
        let parent = span.span_context();
        let header =
            format!("00-{}-{}-{:02x}", parent.trace_id(), parent.span_id(), u8::from(parent.is_sampled()));
        self.upstream = Some(UpstreamSpan { span, begin: age });
        header
    }

    /// Records the model that the answer names, if the trace is sampled.
    pub(in crate::telemetry) fn answered_by(&mut self, model: impl FnOnce() -> Option<String>) {
        if self.server.is_recording() {
            self.answer_model = model();
        }
    }

    fn at(&self, age: Duration) -> SystemTime {
        self.started_at.checked_add(age).unwrap_or(self.started_at)
    }

    /// Ends all spans.
    pub(in crate::telemetry) fn end(mut self, record: &Record, age: Duration) {
        let end = self.at(age);
        if let Some(UpstreamSpan { span, begin }) = &mut self.upstream {
            if span.is_recording() {
                let sent_at = self.started_at.checked_add(*begin).unwrap_or(end);
                describe_call(span, record, sent_at, self.started_at);
                set(span, "gen_ai.response.model", self.answer_model.take());
            }
            span.end_with_timestamp(end);
        }
        if self.server.is_recording() {
            describe_request(&mut self.server, record, self.method);
        }
        self.server.end_with_timestamp(end);
    }
}

/// The name of a method; callers choose others.
fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "_OTHER",
    }
}

/// The path of an API, as a template.
fn route(api: &str) -> Option<&'static str> {
    Some(match api {
        "chat" => "/v1/chat/completions",
        "completions" => "/v1/completions",
        "responses" => "/v1/responses",
        "embeddings" => "/v1/embeddings",
        "messages" => "/v1/messages",
        "gemini" => "/v1beta/models/{model}",
        "rerank" => "/v1/rerank",
        "moderations" => "/v1/moderations",
        "models" => "/v1/models",
        _ => return None,
    })
}

/// Sets an attribute, if there is a value.
fn set(span: &mut Span, key: &'static str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        span.set_attribute(KeyValue::new(key, value));
    }
}

fn signed(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

/// A text that is not empty.
fn text(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// The attributes that both spans have.
fn describe_both(span: &mut Span, record: &Record) {
    set(span, "gen_ai.operation.name", operation_name(record.api));
    set(span, "gen_ai.request.model", text(&record.model));
    if let Some(error) = error_type(record) {
        span.set_attribute(KeyValue::new("error.type", error));
    }
}

fn set_status(span: &mut Span, record: &Record) {
    set(span, "http.response.status_code", Some(i64::from(record.status)).filter(|status| *status > 0));
}

/// The class of the error of a request. `None`: it was answered.
fn error_type(record: &Record) -> Option<String> {
    match record.outcome {
        RequestOutcome::Answered => None,
        _ if !record.error.is_empty() => Some(record.error.to_owned()),
        RequestOutcome::UpstreamError => Some(record.status.to_string()),
        outcome => Some(outcome.as_str().to_owned()),
    }
}

fn describe_request(span: &mut Span, record: &Record, method: &'static str) {
    let route = route(record.api);
    let place = route.unwrap_or(record.api);
    span.update_name(if record.api == "none" { method.to_owned() } else { format!("{method} {place}") });
    span.set_attribute(KeyValue::new("http.request.method", method));
    set(span, "http.route", route);
    set(span, "client.address", record.address.map(|address| address.to_string()));
    describe_both(span, record);
    set_status(span, record);
    set(span, "tollgate.request_id", text(&record.request_id));
    set(span, "tollgate.environment", text(&record.environment));
    set(span, "tollgate.caller", record.caller.as_deref().map(str::to_owned));
    set(span, "tollgate.upstream", record.upstream.as_ref().map(|upstream| upstream.name.clone()));
    span.set_attribute(KeyValue::new("tollgate.outcome", record.outcome.as_str()));
    if let Some(denied_by) = record.denied_by.as_deref() {
        span.set_attribute(KeyValue::new("tollgate.quota.scope", denied_by.scope));
        set(span, "tollgate.quota.name", text(&denied_by.name));
        if let Some(quota) = &denied_by.quota {
            span.set_attribute(KeyValue::new("tollgate.quota.kind", quota.kind));
            span.set_attribute(KeyValue::new("tollgate.quota.per", quota.per.clone()));
        }
    }
    if let Some(reserved) = record.reserved_tokens {
        span.set_attribute(KeyValue::new("tollgate.reserved_tokens", signed(reserved)));
        span.set_attribute(KeyValue::new("tollgate.charged_tokens", signed(record.charged.total)));
    }
    // An error of the caller is none of the server.
    if record.status >= 500 || matches!(record.outcome, RequestOutcome::UpstreamCut) {
        span.set_status(Status::error(""));
    }
}

fn describe_call(span: &mut Span, record: &Record, sent_at: SystemTime, started_at: SystemTime) {
    let Some(upstream) = &record.upstream else { return };
    if let Some(operation) = operation_name(record.api) {
        span.update_name(format!("{operation} {}", record.model).trim_end().to_owned());
    }
    describe_both(span, record);
    // Without an answer, the status is that of the gateway's own error.
    if record.first_byte.is_some() {
        set_status(span, record);
    }
    span.set_attribute(KeyValue::new("gen_ai.provider.name", provider(upstream.api)));
    if let Some(uri) = record.server() {
        set(span, "server.address", uri.host().map(str::to_owned));
        let default = if uri.scheme_str() == Some("https") { 443 } else { 80 };
        span.set_attribute(KeyValue::new("server.port", i64::from(uri.port_u16().unwrap_or(default))));
    }
    if record.charged.prompt > 0 || record.charged.completion > 0 {
        span.set_attribute(KeyValue::new("gen_ai.usage.input_tokens", signed(record.charged.prompt)));
        span.set_attribute(KeyValue::new("gen_ai.usage.output_tokens", signed(record.charged.completion)));
        span.set_attribute(KeyValue::new("tollgate.usage_reported", record.is_usage_reported));
    }
    let first_byte = record.first_byte.and_then(|after| sent_at.checked_add(after));
    let first_token = record.first_token.and_then(|after| started_at.checked_add(after));
    for (name, at) in [("first byte", first_byte), ("first token", first_token)] {
        at.into_iter().for_each(|at| span.add_event_with_timestamp(name, at, Vec::new()));
    }
    if error_type(record).is_some() {
        span.set_status(Status::error(""));
    }
}
