//! The log: form, fields, level, and what it never contains.

use crate::support::http2::*;
use crate::support::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const KEY: &str = "authorization: Bearer CANARY-callers-key-1\r\n";
const PATIENT_KEY: &str = "authorization: Bearer CANARY-callers-key-2\r\n";
const TRACE: &str = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n";

/// A gateway in front of this upstream, with this content of `telemetry`.
async fn gateway(upstream: &Upstream, telemetry: &str) -> Process {
    Process::of_config(&config(upstream, telemetry)).await
}

fn config(upstream: &Upstream, telemetry: &str) -> String {
    format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ backend: {{ base_urls: ['http://{}/v1', 'http://{}/v1'], api_key: CANARY-upstream-key }}, gone: {{ base_url: 'http://{}', api_key: CANARY-upstream-key }} }}\n\
         environments:\n\
         \x20 prod:\n    upstream: backend\n    keys: [{{ name: web-app, secret: CANARY-callers-key-1 }}]\n\
         \x20   reserve: {{ completion: max_tokens, when_short: clamp }}\n\
         \x20   quotas: {{ completion_tokens: {{ limit: 600, per: second }}, requests: {{ limit: 100, per: hour }} }}\n\
         \x20   model_quotas: {{ 'gpt-4.1*': {{ requests: {{ limit: 1, per: day }} }} }}\n\
         \x20 queued:\n    upstream: backend\n    keys: [{{ name: patient, secret: CANARY-callers-key-2 }}]\n    routes: [{{ models: [gpt-4o], upstream: [gone, backend] }}]\n\
         \x20   reserve: {{ max_wait: 30s }}\n    quotas: {{ requests: {{ limit: 1, per: 2s }} }}\n\
         store: {{ memory: true }}\ntelemetry: {telemetry}\n",
        upstream.address,
        gone(),
        gone()
    )
}

/// An address that refuses connections.
fn gone() -> String {
    format!("127.0.0.1:{}", port::free_port())
}

async fn upstream() -> Upstream {
    Upstream::answering(|request| {
        if request.text().contains("\"stream\":true") {
            Answer::stream().event(&delta("Hi")).event(&usage_event(8, 2)).event(DONE).end()
        } else {
            Answer::chat(8, 2)
        }
    })
    .await
}

/// Sends requests that have every field between them.
async fn send_requests(gateway: &Process) {
    let body = HELLO.replace("hello", "CANARY-prompt");
    let with = |fields: &str| body.replacen('{', &format!("{{{fields},"), 1);
    let model = body.replace("gpt-4o", "gpt-4.1");
    let headers = format!("{KEY}{TRACE}");
    for (headers, body, status) in [
        (KEY, with(r#""stream":true,"max_tokens":50"#), 200),
        (headers.as_str(), with(r#""max_tokens":50"#), 200),
        ("authorization: Bearer CANARY-wrong\r\n", body.clone(), 401),
        (KEY, "CANARY-no-json".to_owned(), 400),
        (KEY, model.replacen('{', r#"{"max_tokens":20,"#, 1), 200),
        (KEY, model.replacen('{', r#"{"max_tokens":20,"#, 1), 429),
        (KEY, with(r#""max_tokens":5000"#), 200),
        (PATIENT_KEY, body.clone(), 200),
        (PATIENT_KEY, body.clone(), 200),
        (KEY, r#"{"model":"gpt-4o","messages":"CANARY-shape"}"#.to_owned(), 400),
    ] {
        let reply = gateway.chat_with(headers, &body).await;
        assert_eq!(reply.status, status, "{body} {}", reply.text());
    }
    let mut caller = gateway.caller().await;
    caller.request("POST", "/v1/CANARY?key=CANARY", "", b"{}").await;
    assert_eq!(caller.reply().await.status, 404);
}

/// The first column of the table of fields.
fn documented_fields() -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/logs.md");
    let text = fs::read_to_string(path).unwrap();
    let table = text.split("<!-- fields of a request -->").nth(1).unwrap();
    let rows = table.split("<!-- end of fields -->").next().unwrap().lines();
    let cells = rows.filter_map(|row| row.strip_prefix("| `")?.split(" | ").next());
    cells
        .flat_map(|cell| {
            cell.split('`')
                .filter(|part| !part.is_empty() && *part != ", ")
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect()
}

#[tokio::test]
async fn json_lines_have_exactly_the_documented_fields() {
    let upstream = upstream().await;
    let gateway = gateway(&upstream, "{ log: json }").await;
    send_requests(&gateway).await;
    gateway.settled_charges().await;
    soon("the last line", gateway.log_line("error", "unknown_path")).await;
    let environment = "/api/environments/prod";
    let limit = format!("{environment}/quotas/requests/hour");
    for (method, target, body) in [
        ("PUT", limit.as_str(), r#"{"limit": 90}"#),
        ("DELETE", &limit, ""),
        ("PATCH", environment, r#"{"enforce": false}"#),
        ("PATCH", environment, r#"{"enforce": null}"#),
    ] {
        assert_eq!(gateway.admin_send(method, target, body).await.status, 200, "{method} {target}");
    }
    let lines = gateway.stop().await;
    let all: Vec<Map<String, Value>> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let requests: Vec<_> = all.iter().filter(|line| line["target"] == "tollgate::request").collect();
    assert_eq!(requests.len(), 11, "{lines:#?}");
    let used: BTreeSet<String> = requests.iter().flat_map(|line| line.keys().cloned()).collect();
    assert_eq!(used, documented_fields());
    for line in &all {
        let time = line["timestamp"].as_str().unwrap();
        assert!(time.len() == 24 && time.ends_with('Z') && time.parse::<jiff::Timestamp>().is_ok(), "{time}");
        for (field, value) in line {
            assert!(!value.is_null() && value != "" && value != "-", "{field} has no value: {line:?}");
        }
    }
    let changes = all.iter().filter(|line| line["target"] == "tollgate::admin::overrides");
    let changes: Vec<_> =
        changes.map(|line| ["limit", "enforce", "source"].map(|field| line.get(field).cloned())).collect();
    let (file, set) = (Some(json!("file")), Some(json!("override")));
    assert_eq!(
        changes,
        [
            [Some(json!("90")), None, set.clone()],
            [Some(json!("100")), None, file.clone()],
            [None, Some(json!(false)), set],
            [None, Some(json!(true)), file],
        ]
    );
    let line = |n: usize| Value::Object(requests[n].clone());
    for (n, message) in [
        (2, "The API key is not valid for this gateway. "),
        (3, "The request body is not a valid JSON object"),
        (9, "The request body has a field 'messages' of a shape that the API does not accept"),
    ] {
        let logged = line(n)["error_message"].as_str().unwrap().to_owned();
        assert!(logged.starts_with(message) && (n == 2 || logged == message), "{logged}");
    }
    for (field, value) in [
        ("outcome", json!("answered")),
        ("status", json!(200)),
        ("address", json!("127.0.0.1")),
        ("environment", json!("prod")),
        ("caller", json!("web-app")),
        ("upstream", json!("backend")),
        ("api", json!("chat")),
        ("model", json!("gpt-4o")),
        ("stream", json!(false)),
        ("reserved_tokens", json!(8 + 50)),
        ("prompt_tokens", json!(8)),
        ("completion_tokens", json!(2)),
        ("charged_tokens", json!(10)),
        ("usage_reported", json!(true)),
        ("trace_id", json!("4bf92f3577b34da6a3ce929d0e0e4736")),
    ] {
        assert_eq!(line(1)[field], value, "{field}: {}", line(1));
    }
    assert!(line(0)["first_token_us"].as_u64() >= line(0)["first_byte_us"].as_u64(), "{}", line(0));
    for absent in ["caller", "model", "upstream", "reserved_tokens", "charged_tokens", "stream"] {
        assert!(!requests[2].contains_key(absent), "{absent}: {}", line(2));
    }
    for (field, value) in [
        ("outcome", json!("rejected")),
        ("error", json!("insufficient_quota")),
        ("scope", json!("model")),
        ("name", json!("gpt-4.1*")),
        ("kind", json!("requests")),
        ("per", json!("day")),
        ("limit", json!(1)),
        ("requested", json!(1)),
        ("remaining", json!(0)),
    ] {
        assert_eq!(line(5)[field], value, "{field}: {}", line(5));
    }
    let attempts = json!([{"upstream": "gone", "outcome": "unreachable"}, {"upstream": "backend", "outcome": "answered"}]);
    assert_eq!((&line(7)["attempts"], &line(7)["upstream"]), (&attempts, &json!("backend")));
    assert!(line(5)["retry_after_ms"].as_u64() > Some(0));
    assert!(line(6)["clamped_to"].as_u64() <= Some(600), "{}", line(6));
    assert!(!lines.concat().contains("CANARY"), "{lines:#?}");
}

#[tokio::test]
async fn lines_for_people_are_readable_and_follow_a_banner() {
    let upstream = upstream().await;
    let gateway = gateway(&upstream, "{ log: human }").await;
    send_requests(&gateway).await;
    soon("the last line", gateway.line_with("unknown_path")).await;
    let version = format!("Tollgate {}", env!("CARGO_PKG_VERSION"));
    let (address, admin) = (gateway.address, gateway.admin);
    let lines = gateway.stop().await;
    let banner: Vec<&str> =
        lines.iter().map(|line| line.trim()).take_while(|line| !line.contains(" INFO ")).collect();
    for expected in [
        version.as_str(),
        &format!("base_url      http://{address}/v1"),
        "environments  prod (1 key) to backend",
        "queued (1 key, 1 route) to backend",
        "store         memory",
        &format!("admin         http://{admin}/"),
        "overrides     none",
    ] {
        assert!(banner.contains(&expected), "{expected}: {banner:#?}");
    }
    let replicas = format!("upstreams     backend: http://{}/v1, http://", upstream.address);
    assert!(banner.iter().any(|line| line.starts_with(&replicas)), "{replicas}: {banner:#?}");
    let requests: Vec<&String> = lines.iter().filter(|line| line.contains(" INFO  request  ")).collect();
    assert_eq!(requests.len(), 11, "{lines:#?}");
    for part in [
        " INFO  request  outcome=answered status=200 request_id=req_",
        " trace_id=4bf92f3577b34da6a3ce929d0e0e4736 address=127.0.0.1 environment=prod caller=web-app upstream=backend replica=127.0.0.1:",
        " api=chat model=gpt-4o stream=false ",
        " reserved_tokens=58 prompt_tokens=8 completion_tokens=2 charged_tokens=10 usage_reported=true ",
        " duration=",
    ] {
        assert!(requests[1].contains(part), "{part}: {}", requests[1]);
    }
    assert!(
        requests[5].contains(
            " scope=model name=gpt-4.1* kind=requests per=day limit=1 requested=1 remaining=0 retry_after_ms="
        ),
        "{}",
        requests[5]
    );
    let attempts = " attempts=\"gone unreachable, backend answered\" api=chat ";
    assert!(requests[7].contains(attempts), "{}", requests[7]);
    assert!(lines.iter().any(|line| line.contains(" INFO  shutting down: ")), "{lines:#?}");
    assert!(!lines.concat().contains("CANARY"), "{lines:#?}");
}

#[tokio::test]
async fn the_refusal_of_an_upstreams_key_is_logged_once_a_minute() {
    let body = r#"{"error":{"code":"invalid_api_key"}}"#;
    let upstream = Upstream::always(Answer::json(401, body)).await;
    let gateway = gateway(&upstream, "{ log: json }").await;
    for _ in 0..3 {
        assert_eq!(gateway.chat_with(KEY, &hello(r#""max_tokens":20"#)).await.status, 401);
    }
    gateway.settled_charges().await;
    let lines = gateway.stop().await;
    let refusals = lines.iter().filter(|line| line.contains("it refuses the key of the config")).count();
    assert_eq!(refusals, 1, "{lines:#?}");
}

#[tokio::test]
async fn refused_heads_and_floods_are_logged_at_most_once_a_second_with_their_number() {
    let upstream = upstream().await;
    let gateway = gateway(&upstream, "{ log: json }").await;
    for head in ["GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "GET / HTTP/1.1\nHost: a\n\n"] {
        let mut caller = gateway.caller().await;
        caller.send(head.as_bytes()).await;
        assert_eq!(caller.reply().await.status, 400);
    }
    let line = gateway.log_line("message", "requests were refused because of their head").await;
    assert_eq!((&line["requests"], &line["address"]), (&json!(1), &json!("127.0.0.1")), "{line}");
    assert!(line["error"].as_str().unwrap().contains("more than one Host"), "{line}");
    let mut raw = RawHttp2::connect(gateway.address, &[]).await;
    let pings = frame(6, 0, 0, &[7; 8]).repeat(100);
    while raw.send(&pings).await {}
    let line = gateway.line_with("their callers sent too many").await;
    assert!(line.contains(r#""connections":1,"address":"127.0.0.1""#), "{line}");
    let refused = gateway.stop().await;
    assert_eq!(
        refused.iter().filter(|line| line.contains("because of their head")).count(),
        1,
        "{refused:#?}"
    );
}

#[tokio::test]
async fn the_level_changes_at_run_time() {
    let upstream = Upstream::always(Answer::stream().event(&delta("Hi")).then(Step::Cut)).await;
    let gateway = gateway(&upstream, "{ level: warn }").await;
    let get = async || gateway.admin_get("/api/log-level").await.json();
    assert_eq!(get().await, json!({"level": "warn", "source": "config", "config": "warn"}));
    let set = gateway.admin_send("PUT", "/api/log-level", r#"{"level":"debug"}"#).await;
    assert_eq!((set.status, set.json()), (200, json!({"level": "debug", "source": "api", "config": "warn"})));
    gateway.chat_with(KEY, &hello(r#""stream":true,"max_tokens":20"#)).await;
    soon("a line of level debug", gateway.log_line("message", "the upstream broke off its answer")).await;
    soon("the request's line", gateway.log_line("outcome", "upstream_cut")).await;
    for body in ["", "{}", r#"{"level":"loud"}"#, r#"{"level":1}"#, r#"{"level":"info","x":1}"#] {
        let refused = gateway.admin_send("PUT", "/api/log-level", body).await;
        assert_eq!(
            (refused.status, &refused.json()["error"]["code"]),
            (400, &json!("invalid_value")),
            "{body}"
        );
    }
    assert_eq!(get().await["level"], "debug");
    let reset = gateway.admin_send("PUT", "/api/log-level", r#"{"level":null}"#).await;
    assert_eq!(reset.json()["source"], "config");
    let audit = gateway.admin_get("/api/audit").await.json();
    let entry = &audit["entries"][1];
    assert_eq!((&entry["action"], &entry["target"]), (&json!("log_level_set"), &json!("log")), "{audit}");
    assert_eq!((&entry["before"]["level"], &entry["after"]["level"]), (&json!("warn"), &json!("debug")));
    gateway.chat_with(KEY, &hello(r#""stream":true,"max_tokens":20"#)).await;
    let lines = gateway.stop().await;
    assert_eq!(lines.iter().filter(|line| line.contains("upstream_cut")).count(), 1, "{lines:#?}");
}

#[tokio::test]
async fn rust_log_takes_precedence_at_the_start() {
    let upstream = upstream().await;
    let sections = format!(
        "upstreams: {{ u: {{ base_url: 'http://{}' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\ndefault_environment: e",
        upstream.address
    );
    let filter = "info,tollgate::request=off";
    let gateway = Process::start(&sections, &[("RUST_LOG", filter)]).await;
    let level = gateway.admin_get("/api/log-level").await.json();
    assert_eq!(level, json!({"level": filter, "source": "RUST_LOG", "config": "info"}));
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    let lines = gateway.stop().await;
    assert!(!lines.concat().contains("tollgate::request"), "{lines:#?}");
    let faulty = Process::start(&sections, &[("RUST_LOG", "tollgate=loud")]).await;
    soon("the warning", faulty.line_with("RUST_LOG is not valid")).await;
    assert_eq!(faulty.admin_get("/api/log-level").await.json()["source"], "config");
}

#[tokio::test]
async fn a_reload_applies_form_level_and_requests() {
    let upstream = upstream().await;
    let gateway = gateway(&upstream, "{ log: json, requests: errors }").await;
    assert_eq!(gateway.chat_with(KEY, &hello(r#""max_tokens":20"#)).await.status, 200);
    assert_eq!(gateway.chat(HELLO).await.status, 401);
    soon("the refusal's line", gateway.log_line("error", "invalid_api_key")).await;
    assert!(!gateway.log_text().contains("answered"), "{}", gateway.log_text());
    gateway.admin_send("PUT", "/api/log-level", r#"{"level":"error"}"#).await;
    let reload = async |telemetry: &str| {
        gateway.write_config(&config(&upstream, telemetry));
        // The file's own change may have been noticed first.
        assert_eq!(gateway.admin_send("POST", "/api/config/reload", "").await.status, 200);
    };
    reload("{ log: human, level: debug }").await;
    let level = gateway.admin_get("/api/log-level").await.json();
    assert_eq!(level, json!({"level": "debug", "source": "config", "config": "debug"}));
    assert_eq!(gateway.chat_with(KEY, &hello(r#""max_tokens":20"#)).await.status, 200);
    soon("the line for people", gateway.line_with(" INFO  request  outcome=answered")).await;
    reload("{ log: json, level: debug, requests: none }").await;
    assert_eq!(gateway.chat(HELLO).await.status, 401);
    let lines = gateway.stop().await;
    assert_eq!(lines.concat().matches("invalid_api_key").count(), 1, "{lines:#?}");
}

/// The line of the only request with this value in a field.
async fn line_of(gateway: &Process, field: &str, value: &str) -> Value {
    soon("a line", gateway.log_line(field, value)).await
}

#[tokio::test]
async fn a_line_names_the_replica_that_the_request_was_sent_to() {
    let (one, two, only) = (upstream().await, upstream().await, upstream().await);
    let urls = |addresses: [String; 2]| addresses.map(|address| format!("'http://{address}/v1'")).join(", ");
    let both = urls([one.address.to_string(), two.address.to_string()]);
    let sections = format!(
        "upstreams:\n  both: {{ base_urls: [{both}] }}\n  dead: {{ base_urls: [{}] }}\n  only: {{ base_url: 'http://{}/v1' }}\n\
         environments:\n  both: {{ upstream: both }}\n  dead: {{ upstream: dead }}\n  only: {{ upstream: only }}\n\
         telemetry: {{ log: json }}",
        urls([gone(), gone()]),
        only.address
    );
    let gateway = Process::start(&sections, &[]).await;
    let send = async |environment: &str| {
        let mut caller = gateway.caller().await;
        let path = format!("/{environment}{CHAT}");
        caller.request("POST", &path, "", HELLO.as_bytes()).await;
        let reply = caller.reply().await;
        let id = reply.header("x-request-id").unwrap().to_owned();
        line_of(&gateway, "request_id", &id).await["replica"].clone()
    };
    for n in 0..20 {
        let before = one.seen().len();
        let replica = send("both").await;
        let used = if one.seen().len() > before { &one } else { &two };
        assert_eq!(replica, used.address.to_string(), "{n}");
    }
    assert!(!one.seen().is_empty() && !two.seen().is_empty());
    assert_eq!((send("dead").await, send("only").await), (Value::Null, Value::Null));
}

#[tokio::test]
async fn a_denial_without_a_quota_has_its_scope_too() {
    let silent = Upstream::always(Answer::silence()).await;
    let refusing = Upstream::always(Answer::with_headers(429, "retry-after: 30\r\n", "{}")).await;
    let sections = format!(
        "upstreams:\n  full: {{ base_url: 'http://{0}/v1', max_in_flight: 1 }}\n  free: {{ base_url: 'http://{0}/v1' }}\n  \
         refusing: {{ base_url: 'http://{1}/v1', api_key: sk-upstream, provider_limits: follow }}\n\
         environments:\n  a: {{ upstream: full }}\n  b: {{ upstream: free, max_in_flight: 1 }}\n  c: {{ upstream: refusing }}\n\
         telemetry: {{ log: json }}",
        silent.address, refusing.address
    );
    let listeners = "server: { listen: '127.0.0.1:0', flood_guard: { requests: 6, per: hour } }\nadmin: { listen: '127.0.0.1:0' }";
    let gateway = Process::of_config(&format!("{listeners}\n{sections}\nstore: {{ memory: true }}\n")).await;
    let mut callers = Vec::new();
    let mut send = async |environment: &str, code: &str| {
        let mut caller = gateway.caller().await;
        caller.request("POST", &format!("/{environment}{CHAT}"), "", HELLO.as_bytes()).await;
        if code.is_empty() {
            callers.push(caller);
            return Value::Null;
        }
        let reply = caller.reply().await;
        assert_eq!(reply.status, 429, "{}", reply.text());
        let line = line_of(&gateway, "error", code).await;
        json!([line["scope"], line["name"], line["limit"], line["kind"], line["retry_after_ms"].is_u64()])
    };
    send("a", "").await;
    silent.wait_until_seen(1).await;
    assert_eq!(send("a", "too_many_in_flight").await, json!(["upstream", "full", 1, null, false]));
    assert_eq!(gateway.chat_with("", HELLO).await.status, 401);
    send("c", "").await;
    refusing.wait_until_seen(1).await;
    soon("the refusal", gateway.log_line("outcome", "upstream_error")).await;
    assert_eq!(send("c", "upstream_rate_limited").await, json!(["upstream", "refusing", null, null, true]));
    send("b", "").await;
    silent.wait_until_seen(2).await;
    assert_eq!(send("b", "flood_guard").await, json!(["address", null, null, null, true]));
    // The metric has the same scope.
    let metrics = gateway.admin_get("/metrics").await;
    for (environment, code) in [("a", "too_many_in_flight"), ("c", "upstream_rate_limited")] {
        let series = format!(
            r#"tollgate_rejections_total{{code="{code}",environment="{environment}",kind="",per="",scope="upstream"}} 1"#
        );
        assert!(metrics.text().contains(&series), "{series}\n{}", metrics.text());
    }
}

#[tokio::test]
async fn the_maximum_in_flight_of_an_environment_has_its_scope() {
    let silent = Upstream::always(Answer::silence()).await;
    let sections = format!(
        "upstreams: {{ u: {{ base_url: 'http://{}/v1' }} }}\nenvironments: {{ a: {{ upstream: u, max_in_flight: 1 }} }}\n\
         default_environment: a\ntelemetry: {{ log: json }}",
        silent.address
    );
    let gateway = Process::start(&sections, &[]).await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
    silent.wait_until_seen(1).await;
    assert_eq!(gateway.chat(HELLO).await.status, 429);
    let line = line_of(&gateway, "error", "too_many_in_flight").await;
    assert_eq!(
        (&line["scope"], &line["name"], &line["limit"]),
        (&json!("environment"), &Value::Null, &json!(1))
    );
}
