//! The values and labels of metrics: docs/metrics.md.

use crate::support::redis::has_shared_counters;
use crate::support::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

type Labels = BTreeMap<String, String>;

/// The samples of one scrape.
pub struct Samples(Vec<(String, Labels, f64)>);

impl Samples {
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self(lines.map(sample).collect())
    }

    /// The sum of the samples of a metric that have these labels. `None`: there are none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let found: Vec<f64> = self.of(name, labels).map(|(_, value)| value).collect();
        (!found.is_empty()).then(|| found.iter().sum())
    }

    fn of(&self, name: &str, labels: &[(&str, &str)]) -> impl Iterator<Item = (&Labels, f64)> {
        let matches = move |found: &Labels| {
            labels.iter().all(|(name, value)| found.get(*name).map_or("", String::as_str) == *value)
        };
        let all = self.0.iter().filter(move |(found, ..)| found == name);
        all.filter(move |(_, found, _)| matches(found)).map(|(_, labels, value)| (labels, *value))
    }

    /// All values of a label of a metric.
    fn values(&self, name: &str, label: &str) -> BTreeSet<String> {
        self.of(name, &[]).filter_map(|(labels, _)| labels.get(label).cloned()).collect()
    }
}

/// Reads a line without escapes in its labels.
fn sample(line: &str) -> (String, Labels, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let labels = labels.strip_suffix('}').unwrap().split("\",").filter(|label| !label.is_empty());
    let pair = |label: &str| {
        let (name, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
        (name.to_owned(), value.trim_end_matches('"').to_owned())
    };
    (name.to_owned(), labels.map(pair).collect(), value.parse().unwrap())
}

async fn scrape(gateway: &Gateway) -> Samples {
    let reply = gateway.admin_get("/metrics").await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    Samples::parse(reply.text())
}

/// Waits until the sum of a metric with these labels is `expected`: a request counts shortly after its last byte.
async fn wait_for(gateway: &Gateway, name: &str, labels: &[(&str, &str)], expected: f64) -> Samples {
    let mut last = None;
    let found = tokio::time::timeout(EVENT_TIMEOUT, async {
        loop {
            let samples = scrape(gateway).await;
            last = samples.sum(name, labels);
            if last.is_some_and(|sum| (sum - expected).abs() < 1e-9) {
                return samples;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    found.unwrap_or_else(|_| panic!("{name} {labels:?} is {last:?}, not {expected}"))
}

const WEB: &str = "authorization: Bearer key-of-web-1234567890\r\n";
const BATCH: &str = "authorization: Bearer key-of-batch-1234567890\r\n";

/// Environments `production`, with two callers, and `open`; with this section `telemetry`.
async fn gateway_with(upstream: &Upstream, telemetry: &str) -> Gateway {
    let text = format!(
        "server: {{ listen: '127.0.0.1:0', drain_timeout: 5s }}\nadmin: {{ listen: '127.0.0.1:0' }}\ntelemetry: {telemetry}\n\
         upstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\nenvironments:\n  production:\n    upstream: backend\n    reserve: {{ completion: max_tokens }}\n    \
         models: ['gpt-4o', 'team-*']\n    \
         quotas: {{ total_tokens: {{ limit: 100k, per: day }}, requests: {{ limit: 600, per: minute, burst: 700 }} }}\n    \
         model_quotas: {{ 'team-*': {{ requests: {{ limit: 50, per: hour }} }} }}\n    \
         keys:\n    - {{ name: web, secret: key-of-web-1234567890 }}\n    \
         - {{ name: batch, secret: key-of-batch-1234567890, quotas: {{ total_tokens: {{ limit: 90, per: hour }} }} }}\n  \
         open: {{ upstream: backend }}\nstore: {{ memory: true }}\n",
        upstream.address
    );
    Gateway::from_config(&text).await
}

async fn send(gateway: &Gateway, path: &str, key: &str, body: &str) -> Reply {
    gateway.send("POST", path, key, body).await
}

const PRODUCTION: &str = "/production/v1/chat/completions";
const OPEN: &str = "/open/v1/chat/completions";
const STREAM: &str =
    r#"{"model":"team-b","stream":true,"max_tokens":20,"messages":[{"role":"user","content":"hello"}]}"#;

/// Answers streams with four tokens in two events, and other chats with 3 tokens besides the prompt and the completion.
async fn upstream() -> Upstream {
    Upstream::answering(|request| {
        if request.text().contains("stream") {
            let events = [delta("Hello there"), usage_event(8, 4), DONE.to_owned()];
            return Answer::stream()
                .event(&events[0])
                .then(Step::Wait(Duration::from_millis(30)))
                .events(&events[1..])
                .end();
        }
        Answer::json(200, &chat_answer(r#"{"prompt_tokens":8,"completion_tokens":2,"total_tokens":13}"#))
    })
    .await
}

#[tokio::test]
async fn the_tokens_of_all_series_add_up_to_those_charged() {
    let upstream = upstream().await;
    let gateway = gateway_with(&upstream, "{}").await;
    for (path, key, body) in [
        (PRODUCTION, WEB, hello(r#""max_tokens":9"#)),
        (PRODUCTION, BATCH, STREAM.to_owned()),
        (OPEN, "", hello(r#""max_tokens":9"#).replace("gpt-4o", "invented-model")),
    ] {
        let reply = send(&gateway, path, key, &body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    let samples = wait_for(&gateway, "tollgate_tokens_total", &[], 38.0).await;
    let sum = |labels: &[(&str, &str)]| samples.sum("tollgate_tokens_total", labels);
    for (labels, expected) in [
        // Tokens that only the total has count as completion tokens.
        (vec![("caller", "web"), ("kind", "prompt_tokens"), ("model", "gpt-4o")], 8.0),
        (vec![("caller", "web"), ("kind", "completion_tokens")], 5.0),
        (vec![("caller", "batch"), ("kind", "completion_tokens"), ("model", "team-*")], 4.0),
        (vec![("environment", "open"), ("model", "other"), ("caller", "")], 13.0),
    ] {
        assert_eq!(sum(&labels), Some(expected), "{labels:?}");
    }
    let kinds = samples.values("tollgate_tokens_total", "kind");
    assert_eq!(kinds, ["completion_tokens", "prompt_tokens"].map(str::to_owned).into());
    let state = gateway.admin_get("/api/environments").await.json();
    let charged = |at: usize| state["environments"][at]["totals"]["total_tokens"].as_f64().unwrap();
    assert!((charged(0) + charged(1) - 38.0).abs() < 1e-9, "{state}");
}

#[tokio::test]
async fn without_caller_label_no_metric_names_a_caller() {
    let upstream = upstream().await;
    let gateway = gateway_with(&upstream, "{ caller_label: false }").await;
    send(&gateway, PRODUCTION, BATCH, STREAM).await;
    wait_for(&gateway, "tollgate_tokens_total", &[], 12.0).await;
    let text = gateway.admin_get("/metrics").await.text().to_owned();
    assert!(!text.contains("batch") && !text.contains("caller="), "{text}");
    assert!(!text.contains("scope=\"caller\",") && !text.contains("gen_ai"), "{text}");
}

#[tokio::test]
async fn the_code_distinguishes_answers_of_the_upstream_and_of_the_gateway() {
    let upstream = Upstream::answering(|request| match request.text() {
        text if text.contains("missing") => Answer::json(404, "{}"),
        text if text.contains("broken") => Answer::json(500, "{}"),
        _ => Answer::chat(8, 2),
    })
    .await;
    let gateway = gateway_with(&upstream, "{}").await;
    let with = |word: &str| hello(r#""max_tokens":9"#).replace("hello", word);
    for word in ["fine", "missing", "broken"] {
        send(&gateway, PRODUCTION, WEB, &with(word)).await;
    }
    send(&gateway, PRODUCTION, "authorization: Bearer unknown\r\n", HELLO).await;
    send(&gateway, PRODUCTION, WEB, &HELLO.replace("gpt-4o", "gpt-9")).await;
    send(&gateway, PRODUCTION, BATCH, &hello(r#""max_tokens":85"#)).await;
    send(&gateway, "/nowhere/v1/chat/completions", "", HELLO).await;
    let samples = wait_for(&gateway, "tollgate_requests_total", &[], 7.0).await;
    for (environment, outcome, code) in [
        ("production", "answered", "2xx"),
        ("production", "upstream_error", "4xx"),
        ("production", "upstream_error", "5xx"),
        ("production", "refused", "invalid_api_key"),
        ("production", "refused", "model_not_found"),
        ("production", "rejected", "request_exceeds_quota"),
        ("", "refused", "unknown_path"),
    ] {
        let labels = [("environment", environment), ("outcome", outcome), ("code", code)];
        assert_eq!(samples.sum("tollgate_requests_total", &labels), Some(1.0), "{labels:?}");
    }
    let labels = [
        ("environment", "production"),
        ("scope", "caller"),
        ("kind", "total_tokens"),
        ("per", "hour"),
        ("code", "request_exceeds_quota"),
    ];
    assert_eq!(samples.sum("tollgate_rejections_total", &labels), Some(1.0));
    assert_eq!(samples.sum("tollgate_rejections_total", &[]), Some(1.0));
}

#[tokio::test]
async fn every_quota_has_its_gauges_and_the_time_for_which_it_was_exhausted() {
    let upstream = upstream().await;
    let gateway = gateway_with(&upstream, "{}").await;
    send(&gateway, PRODUCTION, BATCH, STREAM).await;
    let requests = [("scope", "environment"), ("kind", "requests"), ("environment", "production")];
    wait_for(&gateway, "tollgate_in_flight", &[], 0.0).await;
    // Shared counters learn later what unlimited quotas have counted.
    let unlimited = [("environment", "production"), ("kind", "completion_tokens")];
    let samples = wait_for(&gateway, "tollgate_quota_used", &unlimited, 4.0).await;
    for (metric, labels, expected) in [
        ("limit", &requests[..], Some(600.0)),
        ("burst", &requests[..], Some(700.0)),
        ("limit", &[("scope", "caller"), ("name", "batch"), ("per", "hour")], Some(90.0)),
        ("limit", &[("scope", "model"), ("name", "team-*"), ("kind", "requests")], Some(50.0)),
        ("level", &[("scope", "environment"), ("per", "day")], Some(99_988.0)),
        ("used", &[("scope", "environment"), ("per", "day")], Some(12.0)),
        ("held", &[("scope", "environment"), ("per", "day")], Some(0.0)),
        // Unlimited quotas count, and have no limit.
        ("used", &[("environment", "production"), ("kind", "completion_tokens")], Some(4.0)),
        ("limit", &[("environment", "open")], None),
        ("level", &[("environment", "open")], None),
        ("exhausted_seconds_total", &[("environment", "open")], None),
        ("exhausted_seconds_total", &[("name", "batch")], Some(0.0)),
    ] {
        let name = format!("tollgate_quota_{metric}");
        assert_eq!(samples.sum(&name, labels), expected, "{name} {labels:?}");
    }
    let reset = samples.sum("tollgate_quota_reset_timestamp_seconds", &[("per", "day")]).unwrap();
    assert!(reset > 1.7e9 && reset % 86_400.0 < 1.0, "{reset}");
    // 12 of 90 tokens are used. A request for 88 has to wait.
    let denied = send(&gateway, PRODUCTION, BATCH, &hello(r#""max_tokens":80"#)).await;
    assert_eq!(denied.status, 429, "{}", denied.text());
    soon("the time to grow", async {
        loop {
            let samples = scrape(&gateway).await;
            if samples.sum("tollgate_quota_exhausted_seconds_total", &[("name", "batch")]) >= Some(0.2) {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn an_override_is_active_until_it_is_deleted() {
    let upstream = upstream().await;
    let gateway = gateway_with(&upstream, "{}").await;
    assert_eq!(scrape(&gateway).await.sum("tollgate_override_active", &[]), None);
    let quota = "/api/environments/production/quotas/total_tokens/hour?scope=caller&name=batch";
    for (method, path, body) in
        [("PUT", quota, r#"{"limit": 500}"#), ("PATCH", "/api/environments/open", r#"{"enforce": false}"#)]
    {
        change(&gateway, method, path, body).await;
    }
    let samples = scrape(&gateway).await;
    let of_batch = [("scope", "caller"), ("name", "batch"), ("kind", "total_tokens"), ("per", "hour")];
    let of_enforce = [("environment", "open"), ("scope", "environment"), ("kind", "")];
    for labels in [&of_batch[..], &of_enforce[..]] {
        assert_eq!(samples.sum("tollgate_override_active", labels), Some(1.0), "{labels:?}");
        let since = samples.sum("tollgate_override_since_timestamp_seconds", labels);
        assert!(since > Some(1.7e9), "{labels:?}");
    }
    assert_eq!(samples.sum("tollgate_quota_limit", &of_batch), Some(500.0));
    change(&gateway, "DELETE", quota, "").await;
    let samples = scrape(&gateway).await;
    assert_eq!(samples.sum("tollgate_override_active", &of_batch), None);
    assert_eq!(samples.sum("tollgate_quota_limit", &of_batch), Some(90.0));
}

#[tokio::test]
async fn requests_and_streams_have_their_times_by_model_and_upstream() {
    let upstream = upstream().await;
    let gateway = gateway_with(&upstream, "{ gen_ai_metrics: true }").await;
    send(&gateway, PRODUCTION, WEB, &hello(r#""max_tokens":9"#)).await;
    send(&gateway, PRODUCTION, WEB, STREAM).await;
    let samples = wait_for(&gateway, "tollgate_request_duration_seconds_count", &[], 2.0).await;
    for (metric, model, count) in [
        ("request_duration", "gpt-4o", Some(1.0)),
        ("request_duration", "team-*", Some(1.0)),
        ("upstream_first_byte", "gpt-4o", Some(1.0)),
        ("time_to_first_token", "gpt-4o", None),
        ("time_to_first_token", "team-*", Some(1.0)),
        ("time_per_output_token", "team-*", Some(1.0)),
    ] {
        let name = format!("tollgate_{metric}_seconds_count");
        let labels = [("environment", "production"), ("model", model), ("upstream", "backend")];
        assert_eq!(samples.sum(&name, &labels), count, "{name} {model}");
    }
    // The upstream pauses for 30 ms after the first of four tokens.
    let per_token = samples.sum("tollgate_time_per_output_token_seconds_sum", &[]).unwrap();
    assert!((0.009..5.0).contains(&per_token), "{per_token}");
    assert_eq!(samples.sum("tollgate_overhead_seconds_count", &[]), Some(2.0));
    let labels = [("gen_ai_operation_name", "chat"), ("gen_ai_provider_name", "openai")];
    for (metric, count) in [
        ("gen_ai_client_token_usage", 4.0),
        ("gen_ai_server_request_duration_seconds", 2.0),
        ("gen_ai_server_time_to_first_token_seconds", 1.0),
        ("gen_ai_server_time_per_output_token_seconds", 1.0),
    ] {
        assert_eq!(samples.sum(&format!("{metric}_count"), &labels), Some(count), "{metric}");
    }
    let input = [("gen_ai_token_type", "input"), ("gen_ai_request_model", "team-*")];
    assert_eq!(samples.sum("gen_ai_client_token_usage_sum", &input), Some(8.0));
}

#[tokio::test]
async fn waiting_clamped_and_drained_requests_are_counted() {
    let answer = Answer::chat(8, 92);
    let upstream = Upstream::always(Answer::of([vec![Step::Gate], answer.steps()].concat())).await;
    let environments = "  staging:\n    upstream: backend\n    on_disconnect: drain\n    max_in_flight: 1\n    \
                        reserve: { completion: max_tokens, max_wait: 9s, when_short: clamp }\n    \
                        quotas: { total_tokens: { limit: 300, per: day } }\ndefault_environment: staging";
    let gateway = Gateway::with(&upstream, "", environments).await;
    let body = hello(r#""max_tokens":200"#);
    let mut first = gateway.caller().await;
    first.request("POST", CHAT, "", body.as_bytes()).await;
    upstream.wait_until_seen(1).await;
    let mut second = gateway.caller().await;
    second.request("POST", CHAT, "", hello(r#""max_tokens":400"#).as_bytes()).await;
    wait_for(&gateway, "tollgate_queue_length", &[], 1.0).await;
    let samples = wait_for(&gateway, "tollgate_upstream_connections", &[("state", "active")], 1.0).await;
    assert_eq!(samples.sum("tollgate_in_flight", &[("environment", "staging")]), Some(1.0));
    // The first caller disconnects before its answer, which is drained.
    drop(first);
    upstream.open_gate();
    upstream.wait_until_seen(2).await;
    upstream.open_gate();
    assert_eq!(second.reply().await.status, 200);
    let samples = wait_for(&gateway, "tollgate_request_duration_seconds_count", &[], 2.0).await;
    for (metric, expected) in [
        ("tollgate_queue_wait_seconds_count", 1.0),
        ("tollgate_clamped_total", 1.0),
        ("tollgate_drained_total", 1.0),
        ("tollgate_queue_length", 0.0),
    ] {
        assert_eq!(samples.sum(metric, &[("environment", "staging")]), Some(expected), "{metric}");
    }
    let connections = |state| samples.sum("tollgate_upstream_connections", &[("state", state)]);
    assert_eq!(connections("active"), Some(0.0));
    assert!(connections("idle") >= Some(1.0));
}

#[tokio::test]
async fn the_process_its_store_and_its_nodes_are_described() {
    let upstream = upstream().await;
    let gateway = gateway_with(&upstream, "{}").await;
    let samples = wait_for(&gateway, "tollgate_nodes", &[], 1.0).await;
    let version = [("version", env!("CARGO_PKG_VERSION"))];
    assert_eq!(samples.sum("tollgate_build_info", &version), Some(1.0));
    assert_eq!(samples.sum("tollgate_store_up", &[]), Some(1.0));
    let redis_up = samples.sum("tollgate_redis_up", &[]);
    assert_eq!(redis_up, has_shared_counters().then_some(1.0));
    for name in ["process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"] {
        assert!(samples.sum(name, &[]) > Some(0.0), "{name}");
    }
}
