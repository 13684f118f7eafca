//! Quotas of an upstream, for the requests of all its environments together.

use crate::support::*;
use futures_util::future::join_all;

const THREE: &str = "  one: { upstream: backend, reserve: { completion: max_tokens }, quotas: { requests: { limit: 1000, per: day } } }
  two: { upstream: backend, reserve: { completion: max_tokens }, quotas: { requests: { limit: 1000, per: day } } }
  shadow: { upstream: backend, enforce: false, reserve: { completion: max_tokens }, quotas: { requests: { limit: 1000, per: day } } }";

/// `limits`: of the upstream.
async fn gateway(upstream: &Upstream, limits: &str, store: &str) -> Gateway {
    let text = format!(
        "server: {{ listen: '127.0.0.1:0', flood_guard: 0 }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ backend: {{ base_url: 'http://{}/v1', {limits} }} }}\nenvironments:\n{THREE}\nstore: {store}\n",
        upstream.address
    );
    Gateway::from_config(&text).await
}

const MEMORY: &str = "{ memory: true }";

async fn chat(gateway: &Gateway, environment: &str, body: &str) -> Reply {
    gateway.post(&format!("/{environment}{CHAT}"), body).await
}

#[tokio::test]
async fn a_burst_over_three_environments_is_served_as_far_as_the_upstream_has_room() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let limits = "quotas: { total_tokens: { limit: 10, burst: 5050, per: day, window: rolling } }";
    let gateway = gateway(&upstream, limits, MEMORY).await;
    let body = hello(r#""max_tokens":92"#);
    let environments = ["one", "two", "shadow"];
    let requests = (0..300).map(|n| chat(&gateway, environments[n % 3], &body));
    let replies = join_all(requests).await;
    assert_eq!(replies.iter().filter(|reply| reply.status == 200).count(), 50);
    let denied = replies.iter().find(|reply| reply.status == 429).unwrap();
    let text = denied.text();
    assert!(text.contains("upstream 'backend' on total_tokens per day: limit 10, used "), "{text}");
    assert!(!environments.iter().any(|name| text.contains(&format!("'{name}'"))), "{text}");
    assert_eq!(denied.code(), "insufficient_quota");
    assert_eq!(denied.header("x-ratelimit-remaining-tokens"), Some("50"));
    assert_eq!(denied.header("x-ratelimit-limit-tokens"), Some("10"));
}

#[tokio::test]
async fn the_tightest_quota_speaks_in_the_headers_and_a_shadow_environment_is_bound() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let limits = "model_quotas: { 'gpt-*': { requests: { limit: 2, per: minute } } }";
    let gateway = gateway(&upstream, limits, MEMORY).await;
    let first = chat(&gateway, "one", HELLO).await;
    assert_eq!((first.status, first.header("x-ratelimit-remaining-requests")), (200, Some("1")));
    assert_eq!(chat(&gateway, "two", HELLO).await.status, 200);
    let denied = chat(&gateway, "shadow", HELLO).await;
    assert_eq!(denied.refusal(), (429, "rate_limit_exceeded".to_owned()));
    assert!(denied.text().contains("model 'gpt-*' of upstream 'backend'"), "{}", denied.text());
}

#[tokio::test]
async fn the_maximum_in_flight_counts_all_environments() {
    let upstream = Upstream::always(Answer::silence()).await;
    let gateway = gateway(&upstream, "max_in_flight: 1", MEMORY).await;
    let mut caller = gateway.caller().await;
    caller.request("POST", &format!("/one{CHAT}"), "", HELLO.as_bytes()).await;
    upstream.wait_until_seen(1).await;
    let denied = chat(&gateway, "two", HELLO).await;
    assert_eq!(denied.refusal(), (429, "too_many_in_flight".to_owned()));
    let want = "Upstream 'backend' already has 1 requests in flight (max_in_flight)";
    assert!(denied.text().contains(want), "{}", denied.text());
    let metrics = gateway.admin_get("/metrics").await;
    let want = r#"tollgate_rejections_total{code="too_many_in_flight",environment="two",kind="",per="",scope="upstream"} 1"#;
    assert!(metrics.text().contains(want), "{}", metrics.text());
    let causes = gateway.admin_get("/api/rejections").await.json()["last_day"]["causes"].clone();
    assert_eq!(
        (&causes[0]["scope"], &causes[0]["name"]),
        (&"upstream".into(), &"backend".into()),
        "{causes}"
    );
}

#[tokio::test]
async fn a_durable_quota_of_an_upstream_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = format!("{{ path: '{}' }}", folder.path().join("tollgate.db").display());
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let limits = "quotas: { total_tokens: { limit: 150, per: day } }";
    let body = hello(r#""max_tokens":92"#);
    let first = gateway(&upstream, limits, &store).await;
    assert_eq!(chat(&first, "one", &body).await.status, 200);
    first.shutdown().await;
    let second = gateway(&upstream, limits, &store).await;
    let denied = chat(&second, "two", &body).await;
    assert_eq!((denied.status, denied.header("x-ratelimit-remaining-tokens")), (429, Some("50")));
}
