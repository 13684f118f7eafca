//! The content of a refusal: the owner of the quota, the requested amount, and the moment when the request fits.

use crate::support::*;
use serde_json::json;

const KEY: &str = "authorization: Bearer sk-batch-0123456789\r\n";

/// An environment with room for every request, whose caller and model have little.
const ENVIRONMENT: &str = "{ upstream: u, quotas: { total_tokens: { limit: 100k, per: minute } },
    keys: [{ name: batch, secret: sk-batch-0123456789, quotas: { total_tokens: { limit: 600, per: hour } } }],
    model_quotas: { 'gpt-4.1*': { requests: { limit: 1, per: day, timezone: Europe/Berlin } } }, reserve: { completion: 512 } }";

async fn chat(process: &Process, model: &str) -> Reply {
    let body = format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"hello"}}]}}"#);
    let mut caller = process.caller().await;
    caller.request("POST", CHAT, KEY, body.as_bytes()).await;
    caller.reply().await
}

#[tokio::test]
async fn a_refusal_names_the_scope_of_the_quota_in_message_body_log_and_metric() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let sections = format!(
        "upstreams: {{ u: {{ base_url: 'http://{}/v1' }} }}\nenvironments: {{ production: {ENVIRONMENT} }}",
        upstream.address
    );
    for (model, scope, name, kind, owner, words) in [
        (
            "gpt-4o",
            "caller",
            "batch",
            "total_tokens",
            "caller 'batch' of environment 'production'",
            "requested 520 (8 for the prompt and 512 reserved for the answer). Try again in ",
        ),
        (
            "gpt-4.1-mini",
            "model",
            "gpt-4.1*",
            "requests",
            "model 'gpt-4.1*' in environment 'production'",
            // The moment depends on the time of day: shortly before midnight the message has none.
            "requested 1. Try again in ",
        ),
    ] {
        let process = Process::start(&sections, &[]).await;
        assert_eq!(chat(&process, model).await.status, 200);
        // The first answer spent 100 of the caller's 600 tokens and the only request for the model.
        let denied = chat(&process, model).await;
        assert_eq!(denied.status, 429);
        let error = &denied.json()["error"];
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(owner) && message.contains(words), "{message}");
        let quotas = error["quotas"].as_array().unwrap();
        let quota = quotas.iter().find(|quota| quota["scope"] == scope).unwrap();
        assert_eq!((&quota["name"], &quota["kind"]), (&json!(name), &json!(kind)));
        let request_id = denied.header("x-request-id").unwrap();
        let line = process.log_line("request_id", request_id).await;
        for field in ["scope", "name", "kind", "per", "limit", "requested", "remaining", "retry_after_ms"] {
            assert_eq!(line[field], quota[field], "{field}: {line}");
        }
        let metrics = process.admin_get("/metrics").await.text().to_owned();
        let series = metrics
            .lines()
            .find(|line| line.starts_with("tollgate_rejections_total") && line.ends_with(" 1"));
        assert!(series.unwrap().contains(&format!("scope=\"{scope}\"")), "{metrics}");
        let admitted = process.log_line("outcome", "answered").await;
        assert!(admitted.get("scope").is_none() && admitted.get("retry_after_ms").is_none(), "{admitted}");
    }
}

#[tokio::test]
async fn a_mistyped_path_or_model_gets_a_hint() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let gateway = Gateway::with(
        &upstream,
        "",
        "  production: { upstream: backend, models: [gpt-4o*, o3], quotas: { requests: { limit: 9k, per: minute } } }\n  \
         sandbox: { upstream: backend, quotas: { requests: { limit: 9k, per: minute } } }",
    )
    .await;
    let with_model = |model: &str| HELLO.replace("gpt-4o", model);
    for (path, body, hint) in [
        (
            "/sandbx/v1/chat/completions",
            HELLO.to_owned(),
            "Did you mean 'sandbox'? An OpenAI SDK needs a base_url that ends in '/sandbox/v1'.",
        ),
        (
            "/sandbox/v1/chat/completions/chat/completions",
            HELLO.to_owned(),
            "It contains '/chat/completions' twice: an OpenAI SDK appends this path itself.",
        ),
        ("/metrics", HELLO.to_owned(), "The admin listener serves the path '/metrics'"),
        ("/production/v1/chat/completions", with_model("gtp-4o"), "Did you mean 'gpt-4o'?"),
    ] {
        let reply = gateway.post(path, &body).await;
        let message = reply.json()["error"]["message"].to_string();
        assert!(reply.status == 404 && message.contains(hint), "{path}: {message}");
    }
    for (path, body) in [
        ("/unrelated/v1/chat/completions", HELLO.to_owned()),
        ("/sandbx/v1/nothing", HELLO.to_owned()),
        ("/production/v1/chat/completions", with_model("claude-opus")),
    ] {
        let reply = gateway.post(path, &body).await;
        assert!(reply.status == 404 && !reply.text().contains("Did you mean"), "{path}: {}", reply.text());
    }
}

#[tokio::test]
async fn the_list_of_models_has_only_the_allowed_ones() {
    let list = r#"{"object":"list","data":[{"id":"gpt-4o","object":"model"},{"id":"gpt-4.1","object":"model"},{"id":"o3"}]}"#;
    let upstream = Upstream::always(Answer::json(200, list)).await;
    let environments = |models: &str| {
        format!(
            "  production: {{ upstream: backend, {models} quotas: {{ requests: {{ limit: 9k, per: minute }} }} }}"
        )
    };
    let get = |models: &str, path: &'static str| {
        let (upstream, environments) = (&upstream, environments(models));
        async move {
            let gateway = Gateway::with(upstream, "", &environments).await;
            gateway.send("GET", path, "", "").await
        }
    };
    let restricted = get("models: [gpt-4o*],", "/production/v1/models").await;
    assert_eq!(restricted.text(), r#"{"object":"list","data":[{"id":"gpt-4o","object":"model"}]}"#);
    assert_eq!(get("", "/production/v1/models").await.text(), list);
    // A long list is restricted on the blocking pool.
    let long = format!(r#"{{"data":[{}{{"id":"gpt-4o"}}]}}"#, r#"{"id":"o3"},"#.repeat(10_000));
    let upstream_of_long = Upstream::always(Answer::json(200, &long)).await;
    let gateway = Gateway::with(&upstream_of_long, "", &environments("models: [gpt-4o*],")).await;
    let restricted = gateway.send("GET", "/production/v1/models", "", "").await;
    assert_eq!(restricted.text(), r#"{"data":[{"id":"gpt-4o"}]}"#);
    for (path, status) in [
        ("/production/v1/models/gpt-4o", 200),
        ("/production/v1/models/gpt%2D4o", 200),
        ("/production/v1/models/o3", 404),
        ("/production/openai/models/gpt%2D4.1", 404),
        ("/production/v1beta/models/gemini-2.5-pro", 404),
    ] {
        let reply = get("models: [gpt-4o*],", path).await;
        assert_eq!(reply.status, status, "{path}: {}", reply.text());
    }
}
