//! Every API: its paths, its charges and the shape of its errors.

use crate::support::*;
use serde_json::{Value, json};

const LARGE_QUOTAS: &str =
    "{ requests: { limit: 1000, per: minute }, total_tokens: { limit: 1M, per: minute } }";

/// A gateway with one environment `staging`. The base URL of its upstream has no path.
async fn gateway_at_root(upstream: &Upstream, settings: &str, environment: &str) -> Gateway {
    Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ backend: {{ base_url: 'http://{}', {settings} }} }}\n\
         environments: {{ staging: {{ upstream: backend, reserve: {{ completion: max_tokens }}, {environment} }} }}\n\
         default_environment: staging\nstore: {{ memory: true }}",
        upstream.address
    ))
    .await
}

/// A request of each counted API: path, body, answer, and the prompt, completion and total tokens of the answer.
fn counted() -> Vec<(&'static str, &'static str, String, [u64; 3])> {
    let fixture = |name: &str| {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let charged = std::fs::read_to_string(folder.join(name).with_extension("usage.json")).unwrap();
        let charged: Value = serde_json::from_str(&charged).unwrap();
        let charged = ["prompt", "completion", "total"].map(|kind| charged[kind].as_u64().unwrap());
        (std::fs::read_to_string(folder.join(name)).unwrap(), charged)
    };
    let responses = r#"{"model":"gpt-4o","input":"hello"}"#;
    let messages =
        r#"{"model":"claude-sonnet-4-5","max_tokens":64,"messages":[{"role":"user","content":"hello"}]}"#;
    let contents = r#"{"contents":[{"role":"user","parts":[{"text":"hello"}]}]}"#;
    let one = "/v1beta/models/gemini-2.5-flash:generateContent";
    let stream = "/v1beta/models/gemini-2.5-flash:streamGenerateContent";
    [
        ("/v1/responses", responses, "responses.json"),
        ("/responses", responses, "responses_stream.sse"),
        ("/openai/v1/responses", responses, "responses.json"),
        ("/openai/responses?api-version=2025-04-01-preview", responses, "responses.json"),
        ("/v1/messages", messages, "anthropic.json"),
        ("/messages", messages, "anthropic_stream.sse"),
        (one, contents, "gemini.json"),
        (stream, contents, "gemini_list.json"),
        ("/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse", contents, "gemini_stream.sse"),
        ("/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21", HELLO, "chat.json"),
        ("/openai/v1/chat/completions", HELLO, "chat_crlf_no_end.sse"),
    ]
    .into_iter()
    .map(|(path, body, name)| {
        let (answer, charged) = fixture(name);
        (path, body, answer, charged)
    })
    .collect()
}

fn answering(body: &str) -> Answer {
    let is_stream = !body.starts_with(['{', '[']);
    let kind = if is_stream { "text/event-stream" } else { "application/json" };
    Answer::with_headers(200, &format!("content-type: {kind}\r\n"), body)
}

#[tokio::test]
async fn every_counted_api_passes_unchanged_and_is_charged_its_reported_usage() {
    for (path, body, answer, [prompt, completion, total]) in counted() {
        let upstream = Upstream::always(answering(&answer)).await;
        let gateway =
            gateway_at_root(&upstream, "stream_usage: never", &format!("quotas: {LARGE_QUOTAS}")).await;
        let reply = gateway.post(path, body).await;
        assert_eq!((reply.status, reply.text()), (200, answer.as_str()), "{path}");
        let estimate: u64 = reply.header("x-tollgate-estimated-prompt-tokens").unwrap().parse().unwrap();
        assert!((1..30).contains(&estimate), "{path}: {estimate}");
        let seen = upstream.only();
        assert_eq!((seen.target(), seen.text()), (path, body));
        assert_eq!(gateway.settled_charges().await, [1, prompt, completion, total], "{path}");
    }
}

#[tokio::test]
async fn an_uncounted_path_is_charged_one_request_and_its_reported_usage() {
    let form = "--x\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nwhisper-1\r\n\
                --x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nRIFF\r\n--x--\r\n";
    let form_head = "content-type: multipart/form-data; boundary=x\r\n";
    let usage = r#"{"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}}"#;
    for (path, headers, body, answer, charged) in [
        (
            "/v1/rerank",
            "",
            r#"{"model":"rerank-2","query":"q"}"#,
            r#"{"usage":{"total_tokens":26}}"#,
            [1, 26, 0, 26],
        ),
        ("/v1/moderations", "", r#"{"input":"a"}"#, r#"{"results":[]}"#, [1, 0, 0, 0]),
        ("/v1/images/generations", "", r#"{"prompt":"a cat"}"#, usage, [1, 5, 3, 8]),
        ("/v1/audio/transcriptions", form_head, form, usage, [1, 5, 3, 8]),
        ("/openai/deployments/w/audio/translations", form_head, form, r#"{"text":"a"}"#, [1, 0, 0, 0]),
    ] {
        let upstream = Upstream::always(Answer::json(200, answer)).await;
        let gateway = gateway_at_root(&upstream, "", &format!("quotas: {LARGE_QUOTAS}")).await;
        let reply = gateway.send("POST", path, headers, body).await;
        assert_eq!((reply.status, reply.text()), (200, answer), "{path}");
        assert_eq!(reply.header("x-tollgate-estimated-prompt-tokens"), None);
        assert_eq!(upstream.only().text(), body);
        assert_eq!(gateway.settled_charges().await, charged, "{path}");
    }
}

#[tokio::test]
async fn the_model_list_applies_to_every_path_with_a_model() {
    let upstream = Upstream::always(Answer::json(200, "{}")).await;
    let environment = format!("models: ['whisper-*', 'gemini-*'], quotas: {LARGE_QUOTAS}");
    let gateway = gateway_at_root(&upstream, "", &environment).await;
    let form = |model: &str| {
        format!("--x\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n--x--\r\n")
    };
    let form_head = "content-type: multipart/form-data; boundary=x\r\n";
    let contents = r#"{"contents":"hello","model":"gemini-2.5-pro"}"#;
    for (path, headers, body, is_served) in [
        ("/v1/audio/transcriptions", form_head, form("whisper-1"), true),
        ("/v1/audio/transcriptions", form_head, form("gpt-4o-transcribe"), false),
        ("/v1/audio/transcriptions", form_head, "--x--\r\n".to_owned(), false),
        ("/v1/images/generations", "", r#"{"model":"gpt-image-1"}"#.to_owned(), false),
        ("/v1/rerank", "", r#"{"query":"q"}"#.to_owned(), false),
        ("/openai/deployments/whisper-2/audio/transcriptions", form_head, form("other"), true),
        ("/openai/deployments/other/audio/transcriptions", form_head, form("whisper-1"), false),
        // The model in the path applies, not the one in the body.
        ("/v1beta/models/palm-2:generateContent", "", contents.to_owned(), false),
        ("/v1beta/models/gemini-2.5-flash:generateContent", "", contents.to_owned(), true),
    ] {
        let reply = gateway.send("POST", path, headers, &body).await;
        if is_served {
            assert_eq!(reply.status, 200, "{path} {body}");
        } else {
            assert_eq!(
                (reply.status, reply.header("x-tollgate-error")),
                (404, Some("model_not_found")),
                "{path}"
            );
        }
    }
    let twice = format!("{}{}", form("whisper-1").replace("--x--\r\n", ""), form("other"));
    let reply = gateway.send("POST", "/v1/audio/transcriptions", form_head, &twice).await;
    assert_eq!(reply.refusal(), (400, "invalid_json".into()));
    assert_eq!(upstream.seen().len(), 3);
}

#[tokio::test]
async fn errors_have_the_shape_of_the_api() {
    let upstream = Upstream::always(Answer::json(200, "{}")).await;
    let environment =
        "keys: [{ name: web, secret: key-of-the-web-app-1 }], quotas: { requests: { limit: 1, per: hour } }";
    let gateway = gateway_at_root(&upstream, "", environment).await;
    let key = "x-api-key: key-of-the-web-app-1\r\n";
    let gemini = "/v1beta/models/gemini-2.5-flash:generateContent";
    let admitted = gateway.send("POST", "/v1/messages", key, r#"{"max_tokens":5,"messages":[]}"#).await;
    assert_eq!(admitted.status, 200, "{}", admitted.text());
    for (path, headers, body, status, code, anthropic, google) in [
        ("", "", "{}", 401, "invalid_api_key", "authentication_error", "UNAUTHENTICATED"),
        ("", key, "{", 400, "invalid_json", "invalid_request_error", "INVALID_ARGUMENT"),
        ("", key, "{}", 429, "rate_limit_exceeded", "rate_limit_error", "RESOURCE_EXHAUSTED"),
        ("/nowhere", key, "{}", 404, "unknown_path", "not_found_error", "NOT_FOUND"),
    ] {
        let reply = gateway.send("POST", &format!("/v1/messages{path}"), headers, body).await;
        assert_eq!((reply.status, reply.header("x-tollgate-error")), (status, Some(code)));
        let error = reply.json();
        assert_eq!(
            (&error["type"], &error["error"]["type"]),
            (&json!("error"), &json!(anthropic)),
            "{error}"
        );
        let path = if path.is_empty() { gemini } else { "/v1beta/nowhere" };
        let reply = gateway.send("POST", path, headers, body).await;
        assert_eq!((reply.status, reply.header("x-tollgate-error")), (status, Some(code)));
        let error = reply.json();
        assert_eq!(
            (&error["error"]["code"], &error["error"]["status"]),
            (&json!(status), &json!(google)),
            "{error}"
        );
        if status == 429 {
            assert_eq!(error["error"]["quotas"][0]["kind"], "requests");
            assert!(error["error"]["details"][1]["retryDelay"].as_str().unwrap().ends_with('s'), "{error}");
            assert!(reply.header("retry-after").is_some());
        }
    }
    let reply = gateway.send("GET", "/v1/messages", key, "").await;
    assert_eq!((reply.status, reply.header("allow")), (405, Some("POST")));
    assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
    // The hint depends on the caller's SDK.
    let hint = |path: &'static str| async { gateway.send("POST", path, key, "{}").await.text().to_owned() };
    assert!(hint("/staging/v1/v1/messages").await.contains("ends in '/staging'"));
    assert!(hint("/v1/v1/messages").await.contains("a base_url without a path, also without '/v1'"));
    assert!(hint("/v1/nowhere").await.contains("ends in '/v1'"));
}

#[tokio::test]
async fn a_broken_stream_ends_with_an_error_in_the_shape_of_its_api() {
    let gemini = "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse";
    let messages = r#"{"max_tokens":64,"stream":true,"messages":[{"role":"user","content":"hello"}]}"#;
    for (path, body, event) in [
        (CHAT, HELLO, "data: {\"error\":"),
        ("/v1/responses", r#"{"model":"gpt-4o","input":"hello","stream":true}"#, "event: error\ndata: {"),
        ("/v1/messages", messages, "event: error\ndata: {\"error\":{"),
        (gemini, r#"{"contents":"hello"}"#, "data: {\"error\":{\"code\":502"),
    ] {
        let first = "data: {\"sequence_number\":3}\n\n";
        let upstream = Upstream::always(Answer::stream().event(first).then(Step::Cut)).await;
        let gateway = gateway_at_root(&upstream, "", &format!("quotas: {LARGE_QUOTAS}")).await;
        let reply = gateway.post(path, body).await;
        let rest = reply.text().strip_prefix(first).unwrap();
        assert!(rest.starts_with(event) && rest.ends_with("}\n\n") && !reply.is_incomplete, "{path}: {rest}");
        let data = rest.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert!(data["error"]["message"].as_str().unwrap().contains("broke off"), "{data}");
        let number = (path == "/v1/responses").then_some(4);
        assert_eq!(data["sequence_number"].as_u64(), number, "{data}");
    }
}

#[tokio::test]
async fn upstream_keys_are_sent_in_the_header_of_each_provider() {
    let gemini = "/v1beta/models/gemini-2.5-flash:generateContent?alt=sse&key=the-callers-own";
    for (api, header, value) in [
        ("openai", "authorization", "Bearer sk-up"),
        ("azure", "api-key", "sk-up"),
        ("anthropic", "x-api-key", "sk-up"),
        ("gemini", "x-goog-api-key", "sk-up"),
    ] {
        let upstream = Upstream::always(Answer::json(200, "{}")).await;
        let settings = format!("api: {api}, api_key: sk-up");
        let gateway = gateway_at_root(&upstream, &settings, &format!("quotas: {LARGE_QUOTAS}")).await;
        let reply = gateway
            .send("POST", gemini, "x-goog-api-key: mine\r\nauthorization: Bearer mine\r\n", "{}")
            .await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let seen = upstream.only();
        assert_eq!(seen.all(header), [value]);
        assert!(!seen.head.contains("mine"), "{}", seen.head);
        assert_eq!(seen.target(), "/v1beta/models/gemini-2.5-flash:generateContent?alt=sse");
    }
}

#[tokio::test]
async fn a_query_key_of_the_caller_is_forwarded_and_a_query_key_of_the_gateway_is_not() {
    let upstream = Upstream::always(Answer::json(200, "{}")).await;
    let config = format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ backend: {{ base_url: 'http://{}' }} }}\n\
         environments:\n  open: {{ upstream: backend, quotas: {LARGE_QUOTAS} }}\n\
         \x20 closed: {{ upstream: backend, keys: [{{ name: web, secret: key-of-the-web-app-1 }}], quotas: {LARGE_QUOTAS} }}\n\
         store: {{ memory: true }}",
        upstream.address
    );
    let gateway = Gateway::from_config(&config).await;
    let path = |environment: &str, key: &str| {
        format!("/{environment}/v1beta/models/gemini-2.5-flash:generateContent?key={key}&alt=sse")
    };
    assert_eq!(gateway.post(&path("open", "own"), "{}").await.status, 200);
    assert!(upstream.seen()[0].target().ends_with("?key=own&alt=sse"));
    // A key of the gateway grants no access if it is in the query, and is never forwarded.
    let gateway_key = "key-of-the%2Dweb-app-1";
    assert_eq!(gateway.post(&path("closed", gateway_key), "{}").await.status, 401);
    assert_eq!(gateway.post(&path("open", gateway_key), "{}").await.status, 403);
    let headers = "x-goog-api-key: key-of-the-web-app-1\r\n";
    assert_eq!(gateway.send("POST", &path("closed", gateway_key), headers, "{}").await.status, 200);
    assert!(upstream.seen()[1].target().ends_with(":generateContent?alt=sse"));
    assert_eq!(upstream.seen().len(), 2);
}

/// A request for a stream without `stream_options`, plus these fields.
fn stream_request(fields: &str) -> String {
    hello(&format!(r#""stream":true{fields}"#))
}

fn refusal(status: u16) -> Answer {
    Answer::json(status, r#"{"error":{"message":"Unrecognized request argument: stream_options"}}"#)
}

#[tokio::test]
async fn the_gateway_stops_sending_stream_options_to_an_upstream_that_rejects_them() {
    for status in [400, 422] {
        let upstream = Upstream::answering(move |seen| {
            if seen.text().contains("stream_options") {
                refusal(status)
            } else {
                Answer::stream().event(&delta("Hello")).event(DONE).end()
            }
        })
        .await;
        let gateway = gateway_at_root(&upstream, "", &format!("quotas: {LARGE_QUOTAS}")).await;
        for _ in 0..2 {
            let reply = gateway.chat(&stream_request("")).await;
            assert_eq!((reply.status, reply.text()), (200, (delta("Hello") + DONE).as_str()));
        }
        let bodies: Vec<bool> =
            upstream.seen().iter().map(|seen| seen.text().contains("stream_options")).collect();
        assert_eq!(bodies, [true, false, false], "only the first request has stream_options");
        assert_eq!(upstream.seen()[1].text(), stream_request(""), "as the caller sent it");
        // Each call is charged one request and the count of its answer.
        assert_eq!(gateway.settled_charges().await, [2, 2 * HELLO_TOKENS, 2, 2 * HELLO_TOKENS + 2]);
        // A caller that requests usage itself still receives the error.
        let reply = gateway.chat(&stream_request(r#","stream_options":{"include_usage":true}"#)).await;
        assert_eq!(reply.status, status);
    }
}

#[tokio::test]
async fn an_unrelated_error_passes_and_the_gateway_still_requests_usage() {
    // This upstream rejects every request.
    let upstream = Upstream::answering(|seen| match seen.text() {
        text if text.contains("no-such-model") => refusal(400),
        text if text.contains("bad") => Answer::json(400, r#"{"error":"too bad"}"#),
        _ => Answer::stream().event(&usage_event(8, 1)).event(DONE).end(),
    })
    .await;
    let gateway = gateway_at_root(&upstream, "", &format!("quotas: {LARGE_QUOTAS}")).await;
    let reply = gateway.chat(&stream_request("").replace("gpt-4o", "no-such-model")).await;
    assert_eq!((reply.status, upstream.seen().len()), (400, 2));
    let reply = gateway.chat(&stream_request("").replace("gpt-4o", "bad")).await;
    assert_eq!((reply.status, reply.text(), upstream.seen().len()), (400, r#"{"error":"too bad"}"#, 3));
    assert_eq!(gateway.settled_charges().await, [2, 0, 0, 0]);
    assert_eq!(gateway.chat(&stream_request("")).await.text(), DONE);
    assert!(upstream.seen()[3].text().contains("stream_options"), "the gateway still requests usage");
}

#[tokio::test]
async fn a_slow_large_or_broken_error_passes_unchanged() {
    let large = "x".repeat(300_000);
    let head = "HTTP/1.1 400 No\r\ncontent-type: application/json\r\ncontent-length: 300000\r\n\r\n";
    let whole = Answer::of(vec![Step::Send([head.as_bytes(), large.as_bytes()].concat())]);
    let upstream = Upstream::always(whole).await;
    let gateway = gateway_at_root(&upstream, "", &format!("quotas: {LARGE_QUOTAS}")).await;
    let reply = gateway.chat(&stream_request("")).await;
    assert_eq!((reply.status, reply.body.len(), upstream.seen().len()), (400, 300_000, 1));
    let cut = Answer::of(vec![Step::Send(head.into()), Step::Send(b"abc".to_vec()), Step::Cut]);
    let upstream = Upstream::always(cut).await;
    let gateway = gateway_at_root(&upstream, "", &format!("quotas: {LARGE_QUOTAS}")).await;
    let reply = gateway.chat(&stream_request("")).await;
    assert_eq!((reply.text(), reply.is_incomplete), ("abc", true));
    assert_eq!(gateway.settled_charges().await, [1, 0, 0, 0]);
}
