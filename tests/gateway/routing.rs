//! How a request is mapped to an environment, a caller and an endpoint.

use crate::support::*;

const WEB_KEY: &str = "key-of-the-web-app-1";
const SANDBOX_KEY: &str = "key-of-the-sandbox-1";

async fn gateway(upstream: &Upstream, default: &str) -> Gateway {
    let environments = format!(
        "  production:\n    upstream: backend\n    keys: [{{ name: web, secret: {WEB_KEY} }}]\n    models: ['gpt-4o*']\n    quotas: {{ requests: {{ limit: 1000, per: minute }} }}\n  \
         sandbox:\n    upstream: backend\n    keys: [{{ name: box, secret: {SANDBOX_KEY} }}]\n    quotas: {{ requests: {{ limit: 1000, per: minute }} }}\n  \
         open:\n    upstream: backend\n    other_paths: forward\n    quotas: {{ requests: {{ limit: 1000, per: minute }} }}\n{default}"
    );
    Gateway::with(upstream, "", &environments).await
}

fn bearer(key: &str) -> String {
    format!("authorization: Bearer {key}\r\n")
}

#[tokio::test]
async fn path_key_and_default_select_the_environment_in_this_order() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream, "default_environment: open").await;
    for (path, key, environment) in [
        ("/production/v1/chat/completions", Some(WEB_KEY), "production"),
        ("/sandbox/chat/completions", Some(SANDBOX_KEY), "sandbox"),
        ("/v1/chat/completions", Some(WEB_KEY), "production"),
        ("/v1/chat/completions", Some(SANDBOX_KEY), "sandbox"),
        ("/chat/completions", Some(SANDBOX_KEY), "sandbox"),
        ("/v1/chat/completions", Some("the caller's own"), "open"),
        ("/v1/chat/completions", None, "open"),
        ("/open/openai/v1/chat/completions", None, "open"),
    ] {
        let headers = key.map(bearer).unwrap_or_default();
        let reply = gateway.send("POST", path, &headers, HELLO).await;
        assert_eq!(
            (reply.status, reply.header("x-tollgate-environment")),
            (200, Some(environment)),
            "{path} {key:?}"
        );
    }
    assert!(
        upstream.seen().iter().all(|s| s.target() == CHAT || s.target() == "/v1/openai/v1/chat/completions")
    );
}

#[tokio::test]
async fn the_key_is_accepted_in_every_header_that_sdks_use() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream, "").await;
    for headers in [
        bearer(WEB_KEY),
        format!("api-key: {WEB_KEY}\r\n"),
        format!("x-api-key: {WEB_KEY}\r\n"),
        format!("x-goog-api-key: {WEB_KEY}\r\n"),
    ] {
        assert_eq!(gateway.send("POST", CHAT, &headers, HELLO).await.status, 200, "{headers}");
    }
}

#[tokio::test]
async fn missing_unknown_and_foreign_keys_have_distinct_errors() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream, "").await;
    for (path, headers, refusal) in [
        ("/v1/chat/completions", String::new(), (401, "invalid_api_key")),
        ("/v1/chat/completions", bearer("no such key"), (401, "invalid_api_key")),
        ("/production/v1/chat/completions", String::new(), (401, "invalid_api_key")),
        ("/production/v1/chat/completions", bearer("no such key"), (401, "invalid_api_key")),
        ("/production/v1/chat/completions", bearer(""), (401, "invalid_api_key")),
        ("/production/v1/chat/completions", bearer(SANDBOX_KEY), (403, "wrong_environment")),
        // An open environment refuses it too, because a key of this gateway must never reach an upstream.
        ("/open/v1/chat/completions", bearer(SANDBOX_KEY), (403, "wrong_environment")),
    ] {
        let reply = gateway.send("POST", path, &headers, HELLO).await;
        assert_eq!(reply.refusal(), (refusal.0, refusal.1.to_owned()), "{path} {headers}");
        assert!(!reply.text().contains(SANDBOX_KEY));
    }
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn a_key_of_the_gateway_is_never_forwarded() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream, "").await;
    // The upstream has no key in the config. The caller sends one besides the gateway's key.
    for (ours, theirs) in [
        (bearer(WEB_KEY), "x-api-key: sk-own"),
        (format!("api-key: {WEB_KEY}\r\n"), "authorization: Bearer sk-own"),
        (format!("x-goog-api-key: {WEB_KEY}\r\n"), "api-key: sk-own"),
        (format!("x-api-key: {WEB_KEY}\r\nx-api-key: {WEB_KEY}\r\n"), "authorization: Bearer sk-own"),
        (format!("{}x-api-key: {WEB_KEY}\r\n", bearer(WEB_KEY)), "x-goog-api-key: sk-own"),
    ] {
        for headers in [format!("{ours}{theirs}\r\n"), format!("{theirs}\r\n{ours}")] {
            let reply = gateway.send("POST", "/production/v1/chat/completions", &headers, HELLO).await;
            assert_eq!(reply.status, 200, "{headers}");
            let seen = upstream.seen().pop().unwrap();
            assert!(!seen.head.contains(WEB_KEY), "{headers}\n{}", seen.head);
            assert!(seen.head.contains(theirs), "{headers}\n{}", seen.head);
        }
    }
}

#[tokio::test]
async fn a_key_of_another_environment_is_refused_in_every_header() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream, "default_environment: open").await;
    for (path, headers) in [
        ("/production/v1/chat/completions", format!("{}x-api-key: {SANDBOX_KEY}\r\n", bearer(WEB_KEY))),
        ("/v1/chat/completions", format!("{}api-key: {SANDBOX_KEY}\r\n", bearer(WEB_KEY))),
        ("/open/v1/chat/completions", format!("{}x-goog-api-key: {SANDBOX_KEY}\r\n", bearer("mine"))),
        ("/open/v1/chat/completions", format!("api-key: mine, {SANDBOX_KEY}\r\n")),
        ("/open/v1/chat/completions", format!("authorization: {SANDBOX_KEY}\r\n")),
        ("/open/v1/chat/completions", format!("authorization: Key {SANDBOX_KEY}\r\n")),
        ("/v1/chat/completions", format!("authorization: {SANDBOX_KEY}\r\n")),
    ] {
        let reply = gateway.send("POST", path, &headers, HELLO).await;
        assert_eq!(reply.refusal(), (403, "wrong_environment".into()), "{path} {headers}");
    }
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn a_404_reveals_no_environment_that_the_path_does_not_name() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    for (default, path, base_url) in [
        ("", "/v2//chat", "'/v1'"),
        ("", "/sandbox/v2/chat", "'/sandbox/v1'"),
        ("", "/sandbox", "'/sandbox/v1'"),
        ("default_environment: open", "/v2//chat", "'/v1'"),
        ("default_environment: open", "/production/v2", "'/production/v1'"),
    ] {
        let gateway = gateway(&upstream, default).await;
        let reply = gateway.post(path, HELLO).await;
        assert!(reply.text().contains(base_url), "{default} {path} {}", reply.text());
        let rest = reply.text().replace(path, "").replace(base_url, "");
        for name in ["production", "sandbox", "open"] {
            assert!(!rest.contains(&format!("/{name}")), "{default} {path} {}", reply.text());
        }
    }
    // Without keys and without a default, only the path can name the environment.
    let environments = "  secret: { upstream: backend, quotas: { requests: { limit: 9, per: minute } } }";
    let gateway = Gateway::with(&upstream, "", environments).await;
    let reply = gateway.post("/v2/chat", HELLO).await;
    assert!(
        reply.text().contains("'/<environment>/v1'") && !reply.text().contains("secret"),
        "{}",
        reply.text()
    );
}

#[tokio::test]
async fn a_deployment_name_with_percent_encoding_is_an_unknown_path() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let environments = "  staging: { upstream: backend, model_quotas: { gpt-4.1: { requests: { limit: 1, per: day } } } }\ndefault_environment: staging";
    let gateway = Gateway::with(&upstream, "", environments).await;
    for deployment in ["%67pt-4.1", "gpt-4%2E1", "gpt-4.1%20", "%", "gpt-4.1%"] {
        let reply = gateway.post(&format!("/openai/deployments/{deployment}/chat/completions"), HELLO).await;
        assert_eq!(reply.refusal(), (404, "unknown_path".into()), "{deployment}");
    }
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn an_unknown_path_is_a_404_that_suggests_a_base_url() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 9, per: minute } }").await;
    for path in [
        "/",
        "/v2/chat/completions",
        "/nowhere/v1/chat/completions",
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/V1/chat/completions",
        "/v1/chat%2fcompletions",
        "/v1/%63hat/completions",
        "/staging",
        "/staging/",
        "/staging/v1",
        "/nowhere/v1/files",
        "/v1/files/",
        "/staging/staging/v1/chat/completions",
    ] {
        let reply = gateway.post(path, HELLO).await;
        assert_eq!(
            reply.refusal(),
            (
                if path == "/" { 405 } else { 404 },
                if path == "/" { "method_not_allowed" } else { "unknown_path" }.to_owned()
            ),
            "{path}"
        );
        let hint = if path == "/v1/chat/completions/" { "Remove the '/' at the end" } else { "base_url" };
        assert!(
            path == "/" || reply.text().contains(hint) && reply.text().contains("/v1"),
            "{}",
            reply.text()
        );
    }
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn a_404_for_an_unknown_environment_or_a_final_slash_names_the_mistake() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let keyed = format!(
        "  production: {{ upstream: backend, keys: [{{ name: web, secret: {WEB_KEY} }}] }}\n  sandbox: {{ upstream: backend }}"
    );
    let keyed = Gateway::with(&upstream, "", &keyed).await;
    let open = "  secret: { upstream: backend, quotas: { requests: { limit: 9, per: minute } } }";
    let open = Gateway::with(&upstream, "", open).await;
    let operator = "sk the gateway's operator for the name of the environment.";
    for (gateway, path, words) in [
        (
            &keyed,
            "/elsewhere/v1/chat/completions",
            &[
                "'elsewhere' is not an environment of this gateway. Remove '/elsewhere' from the base_url, so that its path is '/v1'.",
                operator,
            ][..],
        ),
        (&keyed, "/elsewhere/v1/chat/completions/", &["'elsewhere' is not an environment"]),
        (&keyed, "/elsewhere/v1/files", &["'elsewhere' is not an environment"]),
        (&keyed, "/Elsewhere/chat/completions", &["'Elsewhere' is not an environment"]),
        (
            &keyed,
            "/elsewhere/v1/messages",
            &["Remove '/elsewhere' from the base_url, which then has no path, also not '/v1'.", operator],
        ),
        (
            &open,
            "/elsewhere/v1/chat/completions",
            &[
                "'elsewhere' is not an environment of this gateway. An OpenAI SDK needs a base_url that ends in '/<environment>/v1'.",
                operator,
            ],
        ),
        (
            &keyed,
            "/v1/chat/completions/",
            &["because it ends in '/'. Remove the '/' at the end of the path."],
        ),
        (&keyed, "/sandbox/v1/models//", &["because it ends in '/'."]),
        (&keyed, "/v1/chat/completion", &["Did you mean a path that ends in '/v1/chat/completions'?"]),
        (&open, "/secret/v1/embedding", &["Did you mean a path that ends in '/v1/embeddings'?"]),
        (&open, "/secret/v1/messages/", &["because it ends in '/'."]),
        (&open, "/v1/chat/completions/", &["a base_url that ends in '/<environment>/v1'."]),
        // These are versions, or nothing at all, and not meant as environments.
        (&keyed, "/v2/chat/completions", &["a base_url that ends in '/v1'."]),
        (&keyed, "/V1/chat/completions", &["a base_url that ends in '/v1'."]),
        (&keyed, "//v1/chat/completions", &["a base_url that ends in '/v1'."]),
        (&keyed, "/elsewhere/v1/nothing", &["a base_url that ends in '/v1'."]),
    ] {
        let reply = gateway.post(path, HELLO).await;
        assert_eq!((reply.status, reply.header("x-tollgate-error")), (404, Some("unknown_path")), "{path}");
        let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(words.iter().all(|words| message.contains(words)), "{path}: {message}");
        let rest = message.replace(path, "");
        let names = ["production", "sandbox", "open", "secret"];
        assert!(names.iter().all(|name| !rest.contains(&format!("/{name}"))), "{path}: {message}");
    }
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn a_wrong_method_is_a_405_with_an_allow_header() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 9, per: minute } }").await;
    for (method, path, allow) in [
        ("GET", CHAT, "POST"),
        ("PUT", CHAT, "POST"),
        ("TRACE", CHAT, "POST"),
        ("OPTIONS", CHAT, "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/gpt-4o", "GET"),
    ] {
        let reply = gateway.send(method, path, "", "").await;
        assert_eq!(reply.refusal(), (405, "method_not_allowed".into()), "{method} {path}");
        assert_eq!(reply.header("allow"), Some(allow));
    }
    let mut caller = gateway.caller().await;
    caller.request("HEAD", "/", "", b"").await;
    assert!(caller.head().await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_model_that_is_not_on_the_allow_list_is_a_404() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream, "").await;
    for (model, found) in [
        ("gpt-4o", true),
        ("gpt-4o-mini", true),
        ("gpt-4", false),
        ("GPT-4o", false),
        ("gpt-4\u{43e}", false),
    ] {
        let reply = gateway.send("POST", CHAT, &bearer(WEB_KEY), &HELLO.replace("gpt-4o", model)).await;
        assert_eq!(reply.status, if found { 200 } else { 404 }, "{model}");
        if !found {
            assert_eq!(reply.code(), "model_not_found");
            assert_eq!(reply.json()["error"]["param"], "model");
        }
    }
    let nameless = gateway.send("POST", CHAT, &bearer(WEB_KEY), r#"{"messages":[]}"#).await;
    assert_eq!(nameless.refusal(), (404, "model_not_found".into()));
}

#[tokio::test]
async fn the_list_of_models_is_forwarded_and_not_charged() {
    let upstream = wiremock::MockServer::start().await;
    for path in ["/v1/models", "/v1/models/ft:gpt-4o:org::id"] {
        let answer = wiremock::ResponseTemplate::new(200).set_body_string(path);
        let mock =
            wiremock::Mock::given(wiremock::matchers::method("GET")).and(wiremock::matchers::path(path));
        mock.respond_with(answer).mount(&upstream).await;
    }
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: '{}/v1' }} }}\n\
         environments: {{ staging: {{ upstream: u, quotas: {{ requests: {{ limit: 1, per: day }} }} }} }}\ndefault_environment: staging\nstore: {{ memory: true }}",
        upstream.uri()
    ))
    .await;
    for path in ["/v1/models", "/models", "/staging/v1/models", "/v1/models/ft:gpt-4o:org::id"] {
        let reply = gateway.send("GET", path, "", "").await;
        assert_eq!(reply.status, 200, "{path}");
    }
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
}

#[tokio::test]
async fn a_path_that_resembles_a_served_one_is_not_forwarded() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream, "default_environment: open").await;
    for path in [
        "/v1/%63hat/completions",
        "/v1/Chat/completions",
        "/V1/%43HAT/COMPLETIONS",
        "/v1/chat/completions%20",
        "/v1/chat/completions%00%0A",
        "/open/v1/%63ompletions",
        "/v1/%41udio/speech%09",
        "/openai/Deployments/d/chat/completions",
        "/v1beta/Models/gemini:generateContent",
        "/v1beta/models/gemini%3AgenerateContent",
        "/v1beta/models/gemini:GenerateContent",
        "/v1/%4Dessages/count_tokens",
    ] {
        let status = gateway.send("POST", path, "", HELLO).await.status;
        assert!(matches!(status, 404 | 405), "{path} {status}");
    }
    assert!(upstream.seen().is_empty());
    for path in ["/v1/chat/Completions-2", "/v1/Files", "/v1/models/gemini:embedContent", "/v1/%66iles"] {
        assert_eq!(gateway.send("POST", path, "", HELLO).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn other_paths_forward_forwards_unknown_paths_and_charges_one_request() {
    let upstream =
        Upstream::always(Answer::json(200, r#"{"usage":{"prompt_tokens":4,"total_tokens":4}}"#)).await;
    let gateway = gateway(&upstream, "").await;
    let reply = gateway.send("POST", "/open/v1/batches?x=1", "", "not json at all").await;
    assert_eq!(reply.status, 200);
    assert_eq!(upstream.only().target(), "/v1/batches?x=1");
    let open = &gateway.admin_get("/api/environments/open").await.json();
    assert_eq!(
        (open["totals"]["requests"].as_u64(), open["totals"]["total_tokens"].as_u64()),
        (Some(1), Some(4))
    );
    let denied = gateway.send("POST", "/v1/batches", &bearer(SANDBOX_KEY), "{}").await;
    assert_eq!(denied.refusal(), (404, "unknown_path".into()));
    for path in ["/open/v1/%2e%2e/x", "/open/v1//x", "/open/v1/../x"] {
        assert_eq!(gateway.post(path, "{}").await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn forwarded_paths_accept_neither_tunnels_nor_trace() {
    let upstream = Upstream::always(Answer::json(200, "{}")).await;
    let gateway = gateway(&upstream, "").await;
    for method in ["TRACE", "CONNECT", "PROPFIND"] {
        let mut caller = gateway.caller().await;
        caller.request(method, "/open/v1/files", "", b"").await;
        let head = caller.head().await;
        assert!(head.starts_with("HTTP/1.1 405") && head.contains("allow: GET"), "{method} {head}");
    }
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\n";
    let reply = gateway.send("GET", "/open/v1/realtime", upgrade, "").await;
    assert_eq!(reply.refusal(), (400, "bad_request".into()));
    assert!(upstream.seen().is_empty());
    // Some clients offer HTTP/2 with every request; that does not request a tunnel.
    let offer = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAA\r\n";
    assert_eq!(gateway.send("GET", "/open/v1/files", offer, "").await.status, 200);
}
