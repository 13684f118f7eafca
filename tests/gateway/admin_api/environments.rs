//! `GET /api/environments`: the fields of quotas, and the parameters that select environments and fields.

use crate::support::*;
use serde_json::Value;

/// Three environments, of which `busy` is used the most. A request costs 10 tokens.
async fn gateway(upstream: &Upstream) -> Gateway {
    let quotas = |limit: u32| format!("{{ total_tokens: {{ limit: {limit}, per: month }} }}");
    let environments = format!(
        "  idle: {{ upstream: backend, quotas: {0} }}\n  half: {{ upstream: backend, quotas: {1} }}\n  busy:\n    \
         upstream: backend\n    keys: [{{ name: web, secret: sk-some-key-of-web-app, quotas: {{ requests: {{ limit: 2, per: minute }} }} }}]\n    \
         quotas: {2}",
        quotas(1_000),
        quotas(40),
        quotas(100)
    );
    Gateway::with(upstream, "", &environments).await
}

async fn send(gateway: &Gateway, environment: &str, count: usize) {
    for _ in 0..count {
        let key = "authorization: Bearer sk-some-key-of-web-app\r\n";
        let headers = if environment == "busy" { key } else { "" };
        let target = format!("/{environment}/v1/chat/completions");
        let body = hello(r#""max_tokens":2"#);
        assert_eq!(gateway.send("POST", &target, headers, &body).await.status, 200);
    }
}

async fn get(gateway: &Gateway, query: &str) -> Value {
    let reply = gateway.admin_get(&format!("/api/environments{query}")).await;
    assert_eq!(reply.status, 200, "{query}: {}", reply.text());
    reply.json()
}

fn names(answer: &Value) -> Vec<&str> {
    answer["environments"].as_array().unwrap().iter().map(|e| e["name"].as_str().unwrap()).collect()
}

/// The moment of a field, in milliseconds since the Unix epoch.
fn moment(field: &Value) -> i64 {
    field.as_str().unwrap().parse::<jiff::Timestamp>().unwrap().as_millisecond()
}

#[tokio::test]
async fn a_quota_shows_its_rate_and_when_it_resets_or_is_exhausted() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    send(&gateway, "half", 3).await;
    let before = jiff::Timestamp::now().as_millisecond();
    let half = get(&gateway, "/half").await;
    let quota = &half["quotas"][0];
    assert_eq!((&quota["used"], &quota["level"], &quota["name"]), (&30.into(), &10.into(), &Value::Null));
    // 30 tokens in the first minute.
    assert_eq!(quota["rate"].as_f64(), Some(0.5));
    #[allow(clippy::cast_possible_truncation)] // less than a month
    let resets_in = (quota["reset_seconds"].as_f64().unwrap() * 1e3) as i64;
    let resets_at = moment(&quota["resets_at"]);
    assert!((0..2_000).contains(&(resets_at - resets_in - before)), "{quota}");
    assert!(quota["resets_at"].as_str().unwrap().ends_with("-01T00:00:00Z"), "{quota}");
    // 10 tokens are left, which is 20 s at this rate, unless the month ends before.
    match &quota["exhausts_at"] {
        Value::Null => assert!(resets_at < before + 22_000, "{quota}"),
        at => assert!((20_000..22_000).contains(&(moment(at) - before)), "{quota}"),
    }
    let idle = get(&gateway, "/idle").await;
    assert_eq!((&idle["quotas"][0]["rate"], &idle["quotas"][0]["exhausts_at"]), (&0.0.into(), &Value::Null));
    send(&gateway, "busy", 1).await;
    let busy = get(&gateway, "/busy").await;
    let of_caller = &busy["quotas"][1];
    assert_eq!((&of_caller["scope"], &of_caller["name"]), (&"caller".into(), &"web".into()));
    assert_eq!(of_caller["rate"].as_f64(), Some(1.0 / 60.0));
}

#[tokio::test]
async fn the_most_used_environments_come_first_and_a_limit_bounds_their_number() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    send(&gateway, "half", 2).await;
    send(&gateway, "busy", 2).await;
    assert_eq!(names(&get(&gateway, "").await), ["idle", "half", "busy"]);
    assert_eq!(names(&get(&gateway, "?limit=2").await), ["idle", "half"]);
    // The caller has used all of its 2 requests, and its environment a fifth of its tokens.
    let sorted = get(&gateway, "?sort=used").await;
    assert_eq!(names(&sorted), ["busy", "half", "idle"]);
    let kinds: Vec<_> =
        sorted["environments"][0]["quotas"].as_array().unwrap().iter().map(|q| &q["kind"]).collect();
    assert_eq!(kinds[..2], ["requests", "total_tokens"]);
    assert_eq!(names(&get(&gateway, "?sort=used&limit=1").await), ["busy"]);
}

#[tokio::test]
async fn fields_select_parts_of_the_answer() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let mut only = get(&gateway, "?fields=name,quotas.kind,level&limit=1").await;
    // The other kinds are unlimited.
    only["environments"][0]["quotas"].as_array_mut().unwrap().truncate(1);
    let quotas = serde_json::json!([{ "kind": "total_tokens", "level": 1_000 }]);
    assert_eq!(only, serde_json::json!({ "environments": [{ "name": "idle", "quotas": quotas }] }));
    let one = get(&gateway, "/busy?fields=totals").await;
    assert_eq!(one.as_object().unwrap().keys().collect::<Vec<_>>(), ["totals"]);
    let whole = get(&gateway, "/busy?fields=quotas").await;
    assert_eq!(whole["quotas"][1]["per"], "minute");
    for query in [
        "?fields=nothing",
        "?sort=name",
        "?limit=0",
        "?limit=-1",
        "?limit=x",
        "?limit=99999999999999999999",
        "?other=1",
    ] {
        for path in ["", "/busy"] {
            let reply = gateway.admin_get(&format!("/api/environments{path}{query}")).await;
            assert_eq!(
                (reply.status, &reply.json()["error"]["code"]),
                (400, &"invalid_value".into()),
                "{query}"
            );
        }
    }
}
