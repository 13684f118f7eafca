//! Paths that count the tokens of a prompt: one request without tokens.

use crate::support::*;

const PATHS: [(&str, &str); 4] = [
    (
        "/v1/messages/count_tokens",
        r#"{"model":"claude-sonnet-4-5","messages":[{"role":"user","content":"hello"}]}"#,
    ),
    ("/v1/responses/input_tokens", r#"{"model":"gpt-4o","input":"hello"}"#),
    ("/openai/v1/responses/input_tokens", r#"{"model":"gpt-4o","input":"hello"}"#),
    ("/v1beta/models/gemini-2.5-pro:countTokens", r#"{"contents":[{"parts":[{"text":"hello"}]}]}"#),
];
const ANSWER: &str = r#"{"input_tokens":14,"usage":{"input_tokens":14,"output_tokens":3},"usageMetadata":{"promptTokenCount":14}}"#;

async fn gateway(upstream: &Upstream, settings: &str) -> Gateway {
    let environments = format!(
        "  staging: {{ upstream: backend, quotas: {{ total_tokens: {{ limit: 1000, per: day }}, requests: {{ limit: 100, per: day }} }}, {settings} }}\ndefault_environment: staging"
    );
    Gateway::with(upstream, "", &environments).await
}

#[tokio::test]
async fn counting_tokens_costs_one_request_and_no_tokens() {
    let upstream = Upstream::always(Answer::json(200, ANSWER)).await;
    let gateway = gateway(&upstream, "").await;
    let mut requests = 0;
    for (path, body) in PATHS {
        let without_version = path.replacen("/v1beta", "", 1).replacen("/v1", "", 1);
        let all = [path.to_owned(), format!("/staging{path}"), without_version];
        for path in all.iter().filter(|path| !path.starts_with("/openai/responses")) {
            let reply = gateway.post(path, body).await;
            assert_eq!((reply.status, reply.text()), (200, ANSWER), "{path}");
            assert_eq!(reply.header("x-tollgate-estimated-prompt-tokens"), None, "{path}");
            requests += 1;
            assert_eq!(gateway.settled_charges().await, [requests, 0, 0, 0], "{path}");
            assert_eq!(upstream.seen().pop().unwrap().text(), body);
        }
    }
    let metrics = gateway.admin_get("/metrics").await;
    let line = format!(
        r#"tollgate_requests_total{{api="count_tokens",code="2xx",environment="staging",outcome="answered"}} {requests}"#
    );
    assert!(metrics.text().contains(&line), "{}", metrics.text());
}

#[tokio::test]
async fn counting_tokens_is_limited_by_requests_and_models_and_not_by_tokens() {
    let upstream = Upstream::always(Answer::json(200, ANSWER)).await;
    let listed = gateway(&upstream, "models: ['gpt-9*']").await;
    for (path, body) in PATHS {
        let reply = listed.post(path, body).await;
        assert_eq!(
            (reply.status, reply.header("x-tollgate-error")),
            (404, Some("model_not_found")),
            "{path}"
        );
    }
    assert!(upstream.seen().is_empty());
    let limited = gateway(&upstream, "model_quotas: { '*': { requests: { limit: 4, per: day } } }").await;
    for (path, body) in PATHS {
        assert_eq!(limited.post(path, body).await.status, 200, "{path}");
    }
    for (path, body) in PATHS {
        let reply = limited.post(path, body).await;
        assert_eq!(
            (reply.status, reply.header("x-tollgate-error")),
            (429, Some("insufficient_quota")),
            "{path}"
        );
    }
}

#[tokio::test]
async fn counting_tokens_accepts_post_only_and_errors_have_the_apis_shape() {
    let upstream = Upstream::always(Answer::json(200, ANSWER)).await;
    let gateway = gateway(&upstream, "").await;
    for (path, _) in PATHS {
        for path in [path, path.trim_start_matches("/v1beta").trim_start_matches("/v1")] {
            if path.starts_with("/openai/v1") {
                continue;
            }
            let reply = gateway.send("GET", path, "", "").await;
            assert_eq!((reply.status, reply.header("allow")), (405, Some("POST")), "{path}");
            let error = &reply.json();
            if path.contains("/messages/") {
                assert_eq!(error["type"], "error", "{path}");
            } else if path.contains("/models/") {
                assert_eq!(error["error"]["status"], "UNIMPLEMENTED", "{path}");
            } else {
                assert_eq!(error["error"]["code"], "method_not_allowed", "{path}");
            }
        }
    }
    assert!(upstream.seen().is_empty());
}
