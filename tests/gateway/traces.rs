//! Traces: what arrives at a collector, and what reaches the upstream.

use crate::support::*;
use crate::tls::server::Certificate;
use crate::tls::upstream::{Act, TlsUpstream};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT_ID: &str = "00f067aa0ba902b7";

fn context(sampled: bool) -> String {
    format!("traceparent: 00-{TRACE_ID}-{PARENT_ID}-0{}\r\ntracestate: vendor=a-state\r\n", u8::from(sampled))
}

/// A receiver of OTLP over HTTP.
struct Collector(Upstream);

impl Collector {
    async fn start() -> Self {
        Self(
            Upstream::always(Answer::with_headers(200, "content-type: application/x-protobuf\r\n", "")).await,
        )
    }

    fn url(&self) -> String {
        format!("http://{}", self.0.address)
    }

    /// The attributes of the process, and all spans so far.
    fn received(&self) -> (BTreeMap<String, String>, Vec<Span>) {
        let (mut resource, mut spans) = (BTreeMap::new(), Vec::new());
        for request in self.0.seen() {
            assert_eq!(request.target(), "/v1/traces");
            assert_eq!(request.header("content-type"), Some("application/x-protobuf"));
            let (of_request, more) = decoded(&request.body);
            resource.extend(of_request);
            spans.extend(more);
        }
        (resource, spans)
    }

    /// Waits until this many spans have arrived.
    async fn spans(&self, count: usize) -> Vec<Span> {
        soon("spans", async {
            while self.received().1.len() < count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        self.received().1
    }
}

/// The attributes of the process, and the spans of one request to a collector.
fn decoded(body: &[u8]) -> (BTreeMap<String, String>, Vec<Span>) {
    let (mut resource, mut spans) = (BTreeMap::new(), Vec::new());
    assert!(!String::from_utf8_lossy(body).contains("CANARY"), "a span has a key or a prompt");
    for group in ExportTraceServiceRequest::decode(body).unwrap().resource_spans {
        resource.extend(attributes(&group.resource.unwrap().attributes));
        spans.extend(group.scope_spans.into_iter().flat_map(|scope| scope.spans));
    }
    (resource, spans)
}

fn attributes(all: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &KeyValue| match value.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Any::StringValue(text)) => text.clone(),
        Some(Any::IntValue(number)) => number.to_string(),
        Some(Any::BoolValue(boolean)) => boolean.to_string(),
        other => format!("{other:?}"),
    };
    all.iter().map(|attribute| (attribute.key.clone(), text(attribute))).collect()
}

fn hex(id: &[u8]) -> String {
    id.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn of_kind(spans: &[Span], kind: SpanKind) -> Vec<&Span> {
    spans.iter().filter(|span| span.kind == kind as i32).collect()
}

#[track_caller]
fn assert_attributes(span: &Span, expected: &[(&str, &str)]) {
    let all = attributes(&span.attributes);
    for (name, value) in expected {
        assert_eq!(all.get(*name).map(String::as_str), Some(*value), "{name}: {all:#?}");
    }
}

/// The sections of a gateway in front of this upstream.
fn sections(upstream: &Upstream) -> String {
    format!(
        "upstreams: {{ backend: {{ base_url: 'http://{}/v1', api_key: CANARY-upstream-key }} }}\n\
         environments:\n  prod:\n    upstream: backend\n    keys: [{{ name: web, secret: CANARY-callers-key-1 }}]\n\
         \x20   reserve: {{ completion: max_tokens, max_wait: 30s }}\n\
         \x20   quotas: {{ requests: {{ limit: 1, per: 2s }}, total_tokens: {{ limit: 5k, per: day }} }}\n",
        upstream.address
    )
}

fn config(upstream: &Upstream, otlp: &str) -> String {
    format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n{}store: {{ memory: true }}\ntelemetry: {{ otlp: {otlp} }}\n",
        sections(upstream)
    )
}

async fn chat(gateway: &Gateway, headers: &str, fields: &str) -> Reply {
    let body = hello(fields).replace("hello", "CANARY-prompt");
    let headers = format!("authorization: Bearer CANARY-callers-key-1\r\n{headers}");
    gateway.send("POST", CHAT, &headers, &body).await
}

#[tokio::test]
async fn a_request_has_a_span_with_its_wait_and_its_call_below() {
    let (collector, upstream) = (Collector::start().await, Upstream::always(Answer::chat(8, 2)).await);
    let otlp = format!("{{ endpoint: '{}', headers: {{ x-collector-key: abc }} }}", collector.url());
    let gateway = Gateway::from_config(&config(&upstream, &otlp)).await;
    assert_eq!(chat(&gateway, "", r#""max_tokens":50"#).await.status, 200);
    assert_eq!(chat(&gateway, &context(true), r#""max_tokens":50"#).await.status, 200);
    gateway.shutdown().await;
    let (resource, spans) = collector.received();
    assert_eq!(resource["service.name"], "tollgate");
    assert_eq!(resource["service.version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(collector.0.seen()[0].header("x-collector-key"), Some("abc"));
    // The second request had to wait.
    let in_trace: Vec<Span> = spans.iter().filter(|span| hex(&span.trace_id) == TRACE_ID).cloned().collect();
    let (server, client) = (of_kind(&in_trace, SpanKind::Server), of_kind(&in_trace, SpanKind::Client));
    let wait = of_kind(&in_trace, SpanKind::Internal);
    assert_eq!((server.len(), client.len(), wait.len()), (1, 1, 1), "{spans:#?}");
    let (server, client, wait) = (server[0], client[0], wait[0]);
    assert_eq!(hex(&server.parent_span_id), PARENT_ID);
    assert!(client.parent_span_id == server.span_id && wait.parent_span_id == server.span_id);
    assert_eq!(
        (&*server.name, &*client.name, &*wait.name),
        ("POST /v1/chat/completions", "chat gpt-4o", "wait for room")
    );
    for span in [client, wait] {
        assert!(server.start_time_unix_nano <= span.start_time_unix_nano, "{in_trace:#?}");
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{in_trace:#?}");
        assert!(span.end_time_unix_nano <= server.end_time_unix_nano, "{in_trace:#?}");
    }
    assert!(wait.end_time_unix_nano <= client.start_time_unix_nano, "{in_trace:#?}");
    assert!(client.events.iter().any(|event| event.name == "first byte"), "{client:#?}");
    assert_attributes(
        server,
        &[
            ("http.request.method", "POST"),
            ("http.route", "/v1/chat/completions"),
            ("http.response.status_code", "200"),
            ("client.address", "127.0.0.1"),
            ("gen_ai.operation.name", "chat"),
            ("gen_ai.request.model", "gpt-4o"),
            ("tollgate.environment", "prod"),
            ("tollgate.caller", "web"),
            ("tollgate.upstream", "backend"),
            ("tollgate.outcome", "answered"),
            ("tollgate.reserved_tokens", "58"),
            ("tollgate.charged_tokens", "10"),
        ],
    );
    let port = upstream.address.port().to_string();
    assert_attributes(
        client,
        &[
            ("gen_ai.operation.name", "chat"),
            ("gen_ai.provider.name", "openai"),
            ("gen_ai.request.model", "gpt-4o"),
            ("gen_ai.usage.input_tokens", "8"),
            ("gen_ai.usage.output_tokens", "2"),
            ("server.address", "127.0.0.1"),
            ("server.port", &port),
            ("http.response.status_code", "200"),
        ],
    );
    // The span of the call is the parent of what the upstream does.
    let seen = &upstream.seen()[1];
    assert_eq!(seen.all("traceparent"), [format!("00-{TRACE_ID}-{}-01", hex(&client.span_id))]);
    assert_eq!(seen.all("tracestate"), ["vendor=a-state"]);
    // The first request began a trace of its own.
    let first =
        of_kind(&spans, SpanKind::Client).into_iter().find(|span| hex(&span.trace_id) != TRACE_ID).unwrap();
    let header = format!("00-{}-{}-01", hex(&first.trace_id), hex(&first.span_id));
    assert_eq!(upstream.seen()[0].all("traceparent"), [header]);
}

#[tokio::test]
async fn errors_are_marked_and_refusals_have_no_call() {
    let collector = Collector::start().await;
    let upstream = Upstream::always(Answer::json(500, r#"{"error":{"message":"CANARY"}}"#)).await;
    let gateway =
        Gateway::from_config(&config(&upstream, &format!("{{ endpoint: '{}' }}", collector.url()))).await;
    assert_eq!(chat(&gateway, "", r#""max_tokens":50"#).await.status, 500);
    assert_eq!(chat(&gateway, "", r#""max_tokens":50000"#).await.status, 400);
    assert_eq!(gateway.send("POST", "/v1/CANARY", "", "").await.status, 404);
    gateway.shutdown().await;
    let spans = collector.received().1;
    let servers = of_kind(&spans, SpanKind::Server);
    let with_error = |error: &str| {
        let is_it = |span: &&&Span| {
            attributes(&span.attributes).get("error.type").is_some_and(|found| found == error)
        };
        *servers.iter().find(is_it).unwrap_or_else(|| panic!("{error}: {spans:#?}"))
    };
    let is_error = |span: &Span| span.status.as_ref().is_some_and(|status| status.code == 2);
    assert!(
        is_error(with_error("500")) && of_kind(&spans, SpanKind::Client).iter().all(|span| is_error(span))
    );
    let refused = with_error("request_exceeds_quota");
    assert!(!is_error(refused), "an error of the caller is none of the server: {refused:#?}");
    let quota = [("scope", "environment"), ("kind", "total_tokens"), ("per", "day")];
    for (name, value) in quota {
        assert_attributes(refused, &[(&format!("tollgate.quota.{name}"), value)]);
    }
    assert_eq!(with_error("unknown_path").name, "POST");
    assert_eq!((servers.len(), spans.len()), (3, 4), "{spans:#?}");
}

#[tokio::test]
async fn the_decision_to_sample_is_followed_and_passed_on() {
    let (collector, upstream) = (Collector::start().await, Upstream::always(Answer::chat(8, 2)).await);
    for (sample, headers, is_sampled) in [
        ("0", String::new(), false),
        ("0", context(true), true),
        ("1", context(false), false),
        ("1", "traceparent: 00-nonsense-01\r\ntracestate: a=b\r\n".to_owned(), true),
    ] {
        let otlp = format!("{{ endpoint: '{}', sample: {sample} }}", collector.url());
        let gateway = Gateway::from_config(&config(&upstream, &otlp)).await;
        let (before, sent) = (collector.received().1.len(), upstream.seen().len());
        assert_eq!(chat(&gateway, &headers, r#""max_tokens":50"#).await.status, 200);
        gateway.shutdown().await;
        let new = collector.received().1.len() - before;
        assert_eq!(new, if is_sampled { 2 } else { 0 }, "{sample} {headers}");
        let seen = &upstream.seen()[sent];
        let [parent] = seen.all("traceparent")[..] else { panic!("{}", seen.head) };
        assert!(parent.len() == 55 && parent.ends_with(if is_sampled { "-01" } else { "-00" }), "{parent}");
        assert_eq!(parent.contains(TRACE_ID), headers.contains(TRACE_ID), "{parent}");
        assert!(!parent.contains(PARENT_ID), "the gateway's span is the parent: {parent}");
        let state = seen.header("tracestate");
        assert_eq!(state, headers.contains(TRACE_ID).then_some("vendor=a-state"), "{headers}");
    }
}

#[tokio::test]
async fn without_traces_the_callers_context_passes_unchanged() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::from_config(&config(&upstream, "").replace("telemetry: { otlp:  }\n", "")).await;
    assert_eq!(chat(&gateway, &context(true), r#""max_tokens":50"#).await.status, 200);
    let seen = upstream.only();
    assert_eq!(seen.all("traceparent"), [format!("00-{TRACE_ID}-{PARENT_ID}-01")]);
    assert_eq!(seen.all("tracestate"), ["vendor=a-state"]);
}

#[tokio::test]
async fn the_variables_of_opentelemetry_apply() {
    let (collector, upstream) = (Collector::start().await, Upstream::always(Answer::chat(8, 2)).await);
    let url = collector.url();
    let traces_url = format!("{url}/v1/traces");
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str());
    let quick = ("OTEL_BSP_SCHEDULE_DELAY", "20");
    for (variables, spans) in [
        (
            &[
                endpoint,
                quick,
                ("OTEL_EXPORTER_OTLP_HEADERS", "x-collector-key=abc%20d"),
                ("OTEL_SERVICE_NAME", "gateway-1"),
                ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.name=other"),
            ][..],
            2,
        ),
        (
            &[
                ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", traces_url.as_str()),
                quick,
                ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
                ("OTEL_TRACES_SAMPLER_ARG", "1"),
            ],
            2,
        ),
        (&[endpoint, quick, ("OTEL_TRACES_SAMPLER", "always_off")], 0),
        (&[endpoint, quick, ("OTEL_SDK_DISABLED", "true")], 0),
        (&[endpoint, quick, ("OTEL_TRACES_EXPORTER", "none")], 0),
    ] {
        let process = Process::start(&sections(&upstream), variables).await;
        let before = collector.received().1.len();
        let reply = process
            .chat_with("authorization: Bearer CANARY-callers-key-1\r\n", &hello(r#""max_tokens":50"#))
            .await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        if spans > 0 {
            collector.spans(before + spans).await;
        }
        let line = soon("the line", process.log_line("target", "tollgate::request")).await;
        let is_off =
            variables.iter().any(|(name, _)| name.contains("DISABLED") || name.ends_with("EXPORTER"));
        assert_eq!(line["trace_id"].is_null(), is_off, "{line}");
        process.stop().await;
        assert_eq!(collector.received().1.len(), before + spans, "{variables:?}");
    }
    let (resource, _) = collector.received();
    assert_eq!(resource["deployment.environment.name"], "test");
    assert_eq!(collector.0.seen()[0].header("x-collector-key"), Some("abc d"));
}

/// The number of spans with this outcome.
async fn count(process: &Process, outcome: &str) -> u64 {
    let metrics = process.admin_get("/metrics").await;
    let line = format!(r#"tollgate_trace_spans_total{{outcome="{outcome}"}} "#);
    metrics.text().lines().find_map(|text| text.strip_prefix(&line)).map_or(0, |count| count.parse().unwrap())
}

#[tokio::test]
async fn an_unreachable_or_slow_collector_delays_no_request() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let silent = Upstream::always(Answer::silence()).await;
    let closed = port::free_port();
    let open = sections(&upstream)
        .replace("{ limit: 1, per: 2s }", "{ limit: 10k, per: second }")
        .replace("limit: 5k, per: day", "limit: 5M, per: day");
    for (address, outcome) in [(closed, "failed"), (silent.address.port(), "dropped")] {
        let url = format!("http://127.0.0.1:{address}");
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "4"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2"),
        ];
        let process = Process::start(&open, &variables).await;
        let counted = async {
            while count(&process, outcome).await == 0 {
                let began = Instant::now();
                let headers = "authorization: Bearer CANARY-callers-key-1\r\n";
                let reply = process.chat_with(headers, &hello(r#""max_tokens":5"#)).await;
                assert_eq!(reply.status, 200, "{}", reply.text());
                // A request that waited for the collector would take its timeout, 10 s.
                assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
            }
        };
        soon("spans that are counted", counted).await;
        if outcome == "failed" {
            let warning = "the collector does not take traces, so they are lost";
            soon("the warning", process.line_with(warning)).await;
        }
        let began = Instant::now();
        process.stop().await;
        assert!(
            began.elapsed() < Duration::from_secs(8),
            "the end waits for the collector: {:?}",
            began.elapsed()
        );
    }
}

#[tokio::test]
async fn a_reload_begins_and_ends_traces() {
    let (collector, upstream) = (Collector::start().await, Upstream::always(Answer::chat(8, 2)).await);
    let off = config(&upstream, "").replace("telemetry: { otlp:  }\n", "");
    let on = config(&upstream, &format!("{{ endpoint: '{}/v1/traces' }}", collector.url()));
    let process = Process::of_config(&off).await;
    let reload = async |text: &str| {
        process.write_config(text);
        assert_eq!(process.admin_send("POST", "/api/config/reload", "").await.status, 200);
    };
    let headers = "authorization: Bearer CANARY-callers-key-1\r\n";
    reload(&on).await;
    assert_eq!(process.chat_with(headers, &hello(r#""max_tokens":50"#)).await.status, 200);
    process.settled_charges().await;
    // The settings that are replaced send their last spans.
    reload(&off).await;
    collector.spans(2).await;
    assert_eq!(process.chat_with(headers, &hello(r#""max_tokens":50"#)).await.status, 200);
    process.stop().await;
    assert_eq!(collector.received().1.len(), 2);
}

#[tokio::test]
async fn the_call_names_the_server_and_the_model_that_answered() {
    let collector = Collector::start().await;
    let document = chat_answer(&usage(8, 2)).replacen('{', r#"{"model":"gpt-4o-2024-11-20","#, 1);
    let answers = move |request: &SeenRequest| {
        if request.text().contains(r#""stream":true"#) {
            let event = delta("Hi").replace(r#""id":"c1""#, r#""id":"c1","model":"gpt-4o-2024-11-20""#);
            Answer::stream().event(&event).event(&usage_event(8, 2)).event(DONE).end()
        } else {
            Answer::json(200, &document)
        }
    };
    let live = Upstream::answering(answers).await;
    let text = config(&live, &format!("{{ endpoint: '{}' }}", collector.url()))
        .replace("{ limit: 1, per: 2s }", "{ limit: 10k, per: second }")
        .replace(
            &format!("base_url: 'http://{}/v1'", live.address),
            &format!(
                "base_urls: ['http://127.0.0.1:{}/v1', 'http://{}/v1']",
                port::free_port(),
                live.address
            ),
        );
    let gateway = Gateway::from_config(&text).await;
    for _ in 0..6 {
        assert_eq!(chat(&gateway, "", r#""max_tokens":50"#).await.status, 200);
        assert_eq!(chat(&gateway, "", r#""max_tokens":50,"stream":true"#).await.status, 200);
    }
    gateway.shutdown().await;
    let spans = collector.received().1;
    let calls = of_kind(&spans, SpanKind::Client);
    assert_eq!(calls.len(), 12);
    let port = live.address.port().to_string();
    for call in calls {
        assert_attributes(
            call,
            &[
                ("server.address", "127.0.0.1"),
                ("server.port", &port),
                ("gen_ai.request.model", "gpt-4o"),
                ("gen_ai.response.model", "gpt-4o-2024-11-20"),
            ],
        );
    }
}

#[tokio::test]
async fn traces_reach_a_collector_over_tls_by_either_protocol() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let certificate = Certificate::new();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &certificate.pem).unwrap();
    let trusted = ("SSL_CERT_FILE", file.path().to_str().unwrap());
    let headers = "authorization: Bearer CANARY-callers-key-1\r\n";
    for (protocol, version) in [(&b"http/1.1"[..], http::Version::HTTP_11), (b"h2", http::Version::HTTP_2)] {
        let collector = TlsUpstream::start(&certificate, protocol, |_| Act::answer(200, "")).await;
        let url = format!("https://localhost:{}", collector.port);
        let endpoint = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "20")];
        let process = Process::start(&sections(&upstream), &[endpoint[0], endpoint[1], trusted]).await;
        assert_eq!(process.chat_with(headers, &hello(r#""max_tokens":50"#)).await.status, 200);
        process.stop().await;
        let seen = collector.seen();
        assert!(!seen.is_empty());
        for request in &seen {
            assert_eq!((&*request.path, &*request.content_type), ("/v1/traces", "application/x-protobuf"));
            assert_eq!((request.version, &*request.authority), (version, &url["https://".len()..]));
        }
        assert_eq!(seen.iter().map(|request| decoded(&request.body).1.len()).sum::<usize>(), 2);
        // Without the certificate nothing is sent, and requests are served.
        let process = Process::start(&sections(&upstream), &endpoint).await;
        assert_eq!(process.chat_with(headers, &hello(r#""max_tokens":50"#)).await.status, 200);
        let warning = "the collector does not take traces, so they are lost";
        soon("the warning", process.line_with(warning)).await;
        assert_eq!(count(&process, "sent").await, 0);
        assert_eq!(collector.seen().len(), seen.len());
    }
}
