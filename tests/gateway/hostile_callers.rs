//! Callers that name another upstream or another environment, and that try the admin API where they are served.

use crate::support::*;
use std::time::Duration;

const WEB_KEY: &str = "key-of-the-web-app-1";
const SANDBOX_KEY: &str = "key-of-the-sandbox-1";
const ENVIRONMENTS: &str = "  production:\n    upstream: backend\n    keys: [{ name: web, secret: key-of-the-web-app-1 }]\n    quotas: { requests: { limit: 1000, per: minute } }\n  \
     sandbox:\n    upstream: backend\n    keys: [{ name: box, secret: key-of-the-sandbox-1 }]\n    quotas: { requests: { limit: 1000, per: minute } }";

async fn gateway(upstream: &Upstream) -> Gateway {
    Gateway::with(upstream, "", ENVIRONMENTS).await
}

fn bearer(key: &str) -> String {
    format!("authorization: Bearer {key}\r\n")
}

#[tokio::test]
async fn no_header_field_or_model_name_leads_to_another_upstream() {
    let trap = Upstream::always(Answer::chat(1, 1)).await;
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let (address, url) = (trap.address, format!("http://{}/v1", trap.address));
    let headers = [
        "x-forwarded-host",
        "x-host",
        "x-original-host",
        "x-upstream-host",
        "x-base-url",
        "x-target-url",
        "x-original-url",
        "x-rewrite-url",
        "x-portkey-custom-host",
        "x-litellm-api-base",
        "openai-api-base",
        "forwarded",
    ];
    let headers: Vec<String> = headers
        .iter()
        .flat_map(|name| [format!("{name}: {address}\r\n"), format!("{name}: {url}\r\n")])
        .chain([format!("forwarded: host={address};proto=http\r\n")])
        .collect();
    for headers in &headers {
        let reply = gateway.send("POST", CHAT, &(bearer(WEB_KEY) + headers), HELLO).await;
        assert_eq!(reply.status, 200, "{headers}");
    }
    let names = ["api_base", "base_url", "api_url", "endpoint", "host", "proxy", "custom_llm_provider"];
    let fields: Vec<String> = names
        .iter()
        .flat_map(|name| {
            let member = format!(r#""{name}":"{url}""#);
            [
                member.clone(),
                format!(r#""metadata":{{{member}}}"#),
                format!(r#""extra_body":{{{member}}}"#),
                format!(r#""litellm_params":{{{member},"nested":{{{member}}}}}"#),
                format!(r#""user_config":{{"model_list":[{{{member}}}]}}"#),
            ]
        })
        .chain(["fallbacks", "models", "route"].map(|name| format!(r#""{name}":[{{"api_base":"{url}"}}]"#)))
        .collect();
    for field in &fields {
        let reply = gateway.send("POST", CHAT, &bearer(WEB_KEY), &hello(field)).await;
        assert_eq!(reply.status, 200, "{field}");
    }
    let body = HELLO.replace("gpt-4o", &url);
    assert!(body.contains(&url));
    assert_eq!(gateway.send("POST", CHAT, &bearer(WEB_KEY), &body).await.status, 200);
    let target = format!("{CHAT}?api_base={url}&base_url={url}");
    assert_eq!(gateway.send("POST", &target, &bearer(WEB_KEY), HELLO).await.status, 200);
    assert_eq!(upstream.seen().len(), headers.len() + fields.len() + 2);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(trap.connections(), 0);
}

#[tokio::test]
async fn only_the_key_selects_the_environment() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let body = hello(r#""environment":"production","metadata":{"environment":"production"}"#);
    for name in [
        "x-environment",
        "x-tollgate-environment",
        "x-tollgate-env",
        "x-forwarded-prefix",
        "openai-organization",
        "openai-project",
        "x-tenant-id",
        "x-forwarded-user",
    ] {
        let claim = format!("{name}: production\r\n");
        for target in [CHAT, "/v1/chat/completions?environment=production"] {
            let reply = gateway.send("POST", target, &(bearer(SANDBOX_KEY) + &claim), &body).await;
            assert_eq!(
                (reply.status, reply.header("x-tollgate-environment")),
                (200, Some("sandbox")),
                "{name}"
            );
            let reply = gateway.send("POST", target, &claim, &body).await;
            assert_eq!(reply.status, 401, "{name}");
        }
        let reply =
            gateway.send("POST", &format!("/production{CHAT}"), &(bearer(SANDBOX_KEY) + &claim), &body).await;
        assert_eq!(
            (reply.status, reply.header("x-tollgate-error")),
            (403, Some("wrong_environment")),
            "{name}"
        );
    }
}

#[tokio::test]
async fn the_callers_listener_serves_nothing_of_the_admin_listener() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for path in [
        "/metrics",
        "/livez",
        "/readyz",
        "/api/environments",
        "/api/environments/production",
        "/api/environments/production/reset",
        "/api/usage",
        "/api/rejections",
        "/api/events",
        "/api/config",
        "/api/config/reload",
        "/api/session",
        "/api/openapi.json",
        "/api/log-level",
        "/main.js",
        "/style.css",
    ] {
        for method in ["GET", "POST", "PUT", "DELETE"] {
            for headers in [String::new(), bearer(WEB_KEY)] {
                let reply = gateway.send(method, path, &headers, "{}").await;
                let answer = (reply.status, reply.header("x-tollgate-error"));
                assert_eq!(answer, (404, Some("unknown_path")), "{method} {path}");
            }
        }
    }
    assert!(upstream.seen().is_empty());
}
