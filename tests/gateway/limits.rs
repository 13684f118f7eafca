//! Limits that the admin API overrides while the gateway runs.

use crate::support::*;
use serde_json::{Value, json};
use std::path::Path;

/// A gateway whose store is in this folder.
async fn gateway(upstream: &Upstream, folder: &Path) -> Gateway {
    let text = format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\n\
         environments:\n  staging:\n    upstream: backend\n    reserve: {{ completion: max_tokens }}\n    \
         quotas: {{ total_tokens: [{{ limit: 1000, per: hour }}, {{ limit: 5000, per: day }}] }}\n    \
         model_quotas: {{ 'gpt-*': {{ requests: {{ limit: 100, per: hour }} }} }}\n\
         default_environment: staging\nstore: {{ path: '{}' }}\n",
        upstream.address,
        folder.join("tollgate.db").display()
    );
    Gateway::from_config(&text).await
}

const HOURLY: &str = "/api/environments/staging/quotas/total_tokens/hour";

fn hourly(environment: &Value) -> (u64, i64, u64, String) {
    let quota = &environment["quotas"][0];
    let number = |field: &str| quota[field].as_u64().unwrap();
    (
        number("limit"),
        quota["level"].as_i64().unwrap(),
        number("used"),
        quota["source"].as_str().unwrap().to_owned(),
    )
}

#[tokio::test]
async fn an_override_changes_the_limit_and_keeps_the_used_amount() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::always(Answer::chat(300, 300)).await;
    let gateway = gateway(&upstream, folder.path()).await;
    assert_eq!(gateway.chat(&hello(r#""max_tokens":300"#)).await.status, 200);

    let lowered = admin(&gateway, "PUT", HOURLY, r#"{"limit":500}"#).await;
    assert_eq!(lowered.status, 200);
    let (limit, level, used, source) = hourly(&lowered.json());
    assert!(limit == 500 && source == "override" && (0..5).contains(&level), "{}", lowered.text());
    assert!((495..=500).contains(&used), "the used amount is at most the new limit: {}", lowered.text());
    assert_eq!(gateway.chat(&hello(r#""max_tokens":1"#)).await.status, 429, "nothing is left");

    let raised = admin(&gateway, "PUT", HOURLY, r#"{"limit":2000,"burst":4000}"#).await;
    assert_eq!(hourly(&raised.json()).0, 2_000);
    assert_eq!(raised.json()["quotas"][0]["burst"], 4_000);
    let used = hourly(&raised.json()).2;
    assert!((590..=600).contains(&used), "what the lower limit cut off counts again: {used}");
    assert_eq!(gateway.chat(&hello(r#""max_tokens":1"#)).await.status, 200);

    let back = admin(&gateway, "DELETE", HOURLY, "").await;
    let (limit, level, used, source) = hourly(&back.json());
    assert!(limit == 1_000 && source == "file" && (0..5).contains(&level), "{}", back.text());
    assert!((995..=1_000).contains(&used), "{}", back.text());

    let reset = admin(&gateway, "POST", "/api/environments/staging/reset", "").await;
    assert_eq!(hourly(&reset.json()), (1_000, 1_000, 0, "file".into()));
    assert_eq!(reset.json()["quotas"][1]["used"], 0);
    assert_eq!(reset.json()["totals"]["total_tokens"], 1_200, "a reset does not change the totals");
}

#[tokio::test]
async fn overrides_survive_a_restart_and_are_in_the_audit_log() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::always(Answer::chat(8, 8)).await;
    let first = gateway(&upstream, folder.path()).await;
    let of_model = "/api/environments/staging/quotas/requests/hour?scope=model&name=gpt-*";
    for (target, limit) in [(HOURLY, 700), (of_model, 7)] {
        let put = admin(&first, "PUT", target, &format!(r#"{{"limit":{limit}}}"#)).await;
        assert_eq!(put.status, 200, "{}", put.text());
    }
    first.shutdown().await;
    let second = gateway(&upstream, folder.path()).await;
    let environment = second.environment().await;
    assert_eq!(hourly(&environment), (700, 700, 0, "override".into()));
    assert_eq!(environment["quotas"][2]["limit"], 7);
    admin(&second, "DELETE", HOURLY, "").await;
    second.shutdown().await;
    let third = gateway(&upstream, folder.path()).await;
    assert_eq!(hourly(&third.environment().await), (1_000, 1_000, 0, "file".into()));

    let audit = third.admin_get("/api/audit").await.json();
    let shown = |entry: &Value| {
        (entry["action"].clone(), entry["target"].clone(), entry["before"].clone(), entry["after"].clone())
    };
    let actual: Vec<_> = audit["entries"].as_array().unwrap().iter().map(shown).collect();
    let limit = |limit: u64| json!({ "limit": limit, "burst": limit });
    let (hourly, of_model) = (
        "environment 'staging': total_tokens per hour",
        "model 'gpt-*' in environment 'staging': requests per hour",
    );
    let expected = [
        ("limit_unset", hourly, limit(700), limit(1_000)),
        ("limit_set", of_model, limit(100), limit(7)),
        ("limit_set", hourly, limit(1_000), limit(700)),
    ];
    assert_eq!(
        actual,
        expected.map(|(action, target, before, after)| (action.into(), target.into(), before, after))
    );
    let newest = &audit["entries"][0];
    assert_eq!((&newest["by"], &newest["address"]), (&"local".into(), &"127.0.0.1".into()));
}

#[tokio::test]
async fn an_invalid_override_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::always(Answer::chat(8, 8)).await;
    let gateway = gateway(&upstream, folder.path()).await;
    for (method, target, body, status) in [
        ("PUT", HOURLY, r#"{"limit":0}"#, 400),
        ("PUT", HOURLY, r#"{"limit":5,"burst":0}"#, 400),
        ("PUT", HOURLY, r#"{"limit":1125899906842625}"#, 400),
        ("PUT", HOURLY, r#"{"limit":-1}"#, 400),
        ("PUT", HOURLY, r#"{"limit":"5x"}"#, 400),
        ("PUT", HOURLY, r#"{"limit":5,"brust":5}"#, 400),
        ("PUT", HOURLY, "", 400),
        ("PUT", "/api/environments/staging/quotas/total_tokens/minute", r#"{"limit":5}"#, 404),
        ("PUT", "/api/environments/staging/quotas/tokens/hour", r#"{"limit":5}"#, 404),
        ("PUT", "/api/environments/nowhere/quotas/total_tokens/hour", r#"{"limit":5}"#, 404),
        ("PUT", &format!("{HOURLY}?scope=caller&name=x"), r#"{"limit":5}"#, 404),
        ("POST", "/api/environments/nowhere/reset", "", 404),
        ("POST", HOURLY, r#"{"limit":5}"#, 405),
    ] {
        let refused = admin(&gateway, method, target, body).await;
        assert_eq!(refused.status, status, "{method} {target} {body}: {}", refused.text());
    }
    // A cross-site request from a browser on this machine.
    let mut caller = Caller::connect(gateway.admin).await;
    let foreign = format!(
        "POST /api/environments/staging/reset HTTP/1.1\r\nhost: {}\r\norigin: http://evil.example\r\ncontent-length: 0\r\n\r\n",
        gateway.admin
    );
    caller.send(foreign.as_bytes()).await;
    assert_eq!(caller.reply().await.status, 403);
    assert_eq!(hourly(&gateway.environment().await), (1_000, 1_000, 0, "file".into()));
}
