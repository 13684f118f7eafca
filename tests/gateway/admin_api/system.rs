//! `GET /api/system`: the gateway, its store and its upstreams.

use crate::support::*;
use serde_json::{Value, json};

#[tokio::test]
async fn the_system_shows_version_config_store_upstreams_and_errors_of_estimates() {
    let answers = |seen: &SeenRequest| {
        if seen.text().contains(r#""user":"fail""#) {
            Answer::json(500, r#"{"error":{"message":"no"}}"#)
        } else {
            Answer::chat(16, 2)
        }
    };
    let upstream = Upstream::answering(answers).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 3, per: day } }").await;
    let empty = gateway.admin_get("/api/system").await.json();
    assert_eq!(empty["upstreams"][0]["first_byte_ms"], Value::Null);
    assert_eq!(empty["estimates"], json!([]));
    for fields in
        [r#""max_tokens":2"#, r#""max_tokens":2"#, r#""user":"fail","max_tokens":2"#, r#""max_tokens":2"#]
    {
        gateway.chat(&hello(fields)).await;
    }
    gateway.settled().await;
    let system = gateway.admin_get("/api/system").await.json();
    assert_eq!(system["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(system["listen"], gateway.address.to_string());
    assert!(system["started_at"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok(), "{system}");
    assert_eq!(
        (&system["draining"], &system["in_flight"], &system["tls"]),
        (&json!(false), &json!(0), &json!(false))
    );
    assert_eq!((&system["config"]["file"], &system["config"]["faults"]), (&Value::Null, &json!([])));
    let of_upstream = &system["upstreams"][0];
    assert_eq!((&of_upstream["name"], &of_upstream["requests"]), (&json!("backend"), &json!(3)));
    assert_eq!(of_upstream["errors"], json!({ "answers": 1, "unanswered": 0, "incomplete": 0 }));
    assert_eq!(of_upstream["first_byte_ms"]["answers"], 3);
    // 8 tokens were estimated for the first request, and 16 reported. The estimate of the second may follow from that.
    let estimates = &system["estimates"][0];
    assert_eq!((&estimates["model"], &estimates["answers"]), (&json!("gpt-4o"), &json!(2)));
    let ratio = estimates["ratio"].as_f64().unwrap();
    assert!(
        (0.5..=1.0).contains(&ratio)
            && (ratio + estimates["mean_error"].as_f64().unwrap() - 1.0).abs() < 1e-9,
        "{estimates}"
    );
    assert_eq!(
        gateway.admin_get("/api/environments").await.json()["environments"][0]["quotas"][0]["timezone"],
        "UTC"
    );
}

#[tokio::test]
async fn the_system_shows_no_password_of_an_upstream() {
    let environments = "environments: { e: { upstream: u } }\nstore: { memory: true }";
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: 'http://127.0.0.1:1/v1', api_key: sk-upstream-secret }} }}\n{environments}\n"
    ))
    .await;
    let system = gateway.admin_get("/api/system").await;
    assert_eq!(system.json()["upstreams"][0]["base_url"], "http://127.0.0.1:1/v1");
    assert!(!system.text().contains("secret"));
}
