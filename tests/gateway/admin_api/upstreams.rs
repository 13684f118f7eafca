//! `/api/upstreams`: the limits of upstreams, which hold for all environments together.

use crate::support::redis::has_shared_counters;
use crate::support::*;
use serde_json::{Value, json};
use std::time::Duration;

/// Two environments with one upstream that has quotas, and one without.
async fn gateway(upstream: &Upstream) -> Gateway {
    gateway_with(upstream, "memory: true").await
}

/// `store`: the settings of the store.
async fn gateway_with(upstream: &Upstream, store: &str) -> Gateway {
    Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams:\n  \
         u: {{ base_url: 'http://{0}/v1', max_in_flight: 7, quotas: {{ requests: {{ limit: 3, per: day }} }}, \
         model_quotas: {{ 'gpt-4o*': {{ total_tokens: {{ limit: 100k, per: minute }} }} }} }}\n  free: {{ base_url: 'http://{0}/v1' }}\n\
         environments: {{ a: {{ upstream: u }}, b: {{ upstream: u }}, c: {{ upstream: free }} }}\ndefault_environment: a\nstore: {{ {store} }}",
        upstream.address
    ))
    .await
}

async fn chat(gateway: &Gateway, environment: &str) -> Reply {
    gateway.post(&format!("/{environment}{CHAT}"), &hello(r#""max_tokens":2"#)).await
}

fn quota<'v>(upstream: &'v Value, scope: &str) -> &'v Value {
    upstream["quotas"].as_array().unwrap().iter().find(|quota| quota["scope"] == scope).unwrap()
}

const REQUESTS: &str = "/api/upstreams/u/quotas/requests/day";
const TOKENS: &str = "/api/upstreams/u/quotas/total_tokens/minute?model=gpt-4o*";

#[tokio::test]
async fn upstreams_have_the_shape_of_environments_and_count_for_all_of_them() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for environment in ["a", "b", "b"] {
        assert_eq!(chat(&gateway, environment).await.status, 200);
    }
    let refused = chat(&gateway, "a").await;
    assert_eq!((refused.status, refused.code().as_str()), (429, "insufficient_quota"));
    assert_eq!(chat(&gateway, "c").await.status, 200);
    let list = gateway.admin_get("/api/upstreams").await.json();
    let [of_u, of_free] = [&list["upstreams"][0], &list["upstreams"][1]];
    assert_eq!((&of_u["name"], &of_u["environments"]), (&json!("u"), &json!(["a", "b"])));
    assert_eq!((&of_u["in_flight"], &of_u["max_in_flight"]), (&json!(0), &json!(7)));
    assert_eq!((&of_u["refused_last_minute"], &of_u["totals"]["requests"]), (&json!(1), &json!(3)));
    assert_eq!(of_u["totals"]["total_tokens"], 30);
    let requests = quota(of_u, "upstream");
    assert_eq!(
        (&requests["name"], &requests["kind"], &requests["per"]),
        (&json!("u"), &json!("requests"), &json!("day"))
    );
    assert_eq!(
        (&requests["limit"], &requests["used"], &requests["level"]),
        (&json!(3), &json!(3), &json!(0))
    );
    assert_eq!((&requests["source"], &requests["refused_last_minute"]), (&json!("file"), &json!(1)));
    let tokens = quota(of_u, "upstream_model");
    assert_eq!((&tokens["name"], &tokens["refused_last_minute"]), (&json!("u/gpt-4o*"), &json!(0)));
    assert_eq!(
        (&of_free["quotas"], &of_free["totals"], &of_free["max_in_flight"]),
        (&json!([]), &Value::Null, &Value::Null)
    );
    let one = gateway.admin_get("/api/upstreams/u").await.json();
    assert_eq!((&one["name"], &one["totals"]), (&of_u["name"], &of_u["totals"]));
    // The series have no environment.
    let metrics = gateway.admin_get("/metrics").await;
    for line in [
        r#"tollgate_quota_limit{environment="",kind="requests",name="u",per="day",scope="upstream"} 3"#,
        r#"tollgate_quota_level{environment="",kind="requests",name="u",per="day",scope="upstream"} 0"#,
        r#"tollgate_quota_burst{environment="",kind="total_tokens",name="u/gpt-4o*",per="minute",scope="upstream_model"} 100000"#,
        r#"tollgate_rejections_total{code="insufficient_quota",environment="a",kind="requests",per="day",scope="upstream"} 1"#,
    ] {
        assert!(metrics.text().contains(line), "{line}\n{}", metrics.text());
    }
    // An explanation has the quotas of the upstream too.
    let explained = admin(&gateway, "POST", "/api/explain?environment=b", HELLO).await.json();
    let of_upstream = quota(&explained, "upstream");
    assert_eq!(
        (&of_upstream["fits"], &of_upstream["requested"], &explained["admitted"]),
        (&json!(false), &json!(1), &json!(false))
    );
    // In shadow mode the limits of the upstream deny requests all the same.
    admin(&gateway, "PATCH", "/api/environments/b", r#"{"enforce": false}"#).await;
    let explained = admin(&gateway, "POST", "/api/explain?environment=b", HELLO).await.json();
    assert_eq!((explained["admitted"].as_bool(), chat(&gateway, "b").await.status), (Some(false), 429));
    admin(&gateway, "POST", &format!("{REQUESTS}/reset"), "").await;
    admin(&gateway, "PUT", "/api/environments/b/quotas/requests/minute", r#"{"limit": 1}"#).await;
    assert_eq!(chat(&gateway, "b").await.status, 200);
    let explained = admin(&gateway, "POST", "/api/explain?environment=b", HELLO).await.json();
    assert_eq!(
        (&explained["admitted"], &explained["code"], chat(&gateway, "b").await.status),
        (&json!(true), &json!("rate_limit_exceeded"), 200)
    );
}

#[tokio::test]
async fn limits_of_upstreams_are_set_unset_and_reset_and_every_change_is_audited() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for environment in ["a", "b", "a"] {
        assert_eq!(chat(&gateway, environment).await.status, 200);
    }
    let dry = admin(&gateway, "PUT", &format!("{REQUESTS}?dry_run=true"), r#"{"limit": 5}"#).await.json();
    // With counters in Redis there is a usage history, without requests yet.
    let refused = if has_shared_counters() { json!(0) } else { Value::Null };
    assert_eq!(
        (&dry["dry_run"], &dry["level"], &dry["refused_last_hour"]),
        (&json!(true), &json!(2), &refused)
    );
    assert_eq!(chat(&gateway, "b").await.status, 429);
    let set = admin(&gateway, "PUT", REQUESTS, r#"{"limit": 5, "for": "2h", "reason": "a test"}"#).await;
    let set = set.json();
    let requests = quota(&set, "upstream");
    assert_eq!((&set["name"], &requests["limit"], &requests["level"]), (&json!("u"), &json!(5), &json!(2)));
    assert_eq!((&requests["source"], &requests["override"]["file_limit"]), (&json!("override"), &json!(3)));
    assert_eq!(chat(&gateway, "b").await.status, 200);
    let set = admin(&gateway, "PUT", TOKENS, r#"{"limit": "200k", "burst": "300k"}"#).await.json();
    let tokens = quota(&set, "upstream_model");
    assert_eq!((&tokens["limit"], &tokens["burst"]), (&json!(200_000), &json!(300_000)));
    let overrides = gateway.admin_get("/api/overrides").await.json()["overrides"].clone();
    assert_eq!(overrides.as_array().unwrap().len(), 2);
    assert_eq!((&overrides[0]["environment"], &overrides[0]["scope"]), (&Value::Null, &json!("upstream")));
    assert_eq!((&overrides[1]["name"], &overrides[1]["file_limit"]), (&json!("u/gpt-4o*"), &json!(100_000)));
    let yaml = gateway.admin_get("/api/overrides?format=yaml").await;
    assert!(
        yaml.text().ends_with(
            "environments: {}\nupstreams:\n  \"u\":\n    quotas:\n      requests:\n        - { limit: 5, per: \"day\", window: calendar, timezone: \"UTC\" }\n    \
             model_quotas:\n      \"gpt-4o*\":\n        total_tokens:\n          - { limit: 200000, per: \"minute\", window: rolling, burst: 300000 }\n"
        ),
        "{}",
        yaml.text()
    );
    let active =
        r#"tollgate_override_active{environment="",kind="requests",name="u",per="day",scope="upstream"} 1"#;
    assert!(gateway.admin_get("/metrics").await.text().contains(active));
    let unset = admin(&gateway, "DELETE", REQUESTS, "").await.json();
    let requests = quota(&unset, "upstream");
    assert_eq!(
        (&requests["limit"], &requests["used"], &requests["source"]),
        (&json!(3), &json!(3), &json!("file"))
    );
    assert_eq!(chat(&gateway, "a").await.status, 429);
    let reset = admin(&gateway, "POST", &format!("{REQUESTS}/reset"), "").await.json();
    assert_eq!(quota(&reset, "upstream")["used"], 0);
    assert_eq!(chat(&gateway, "a").await.status, 200);
    let reset = admin(&gateway, "POST", &TOKENS.replace('?', "/reset?"), "").await.json();
    assert_eq!(quota(&reset, "upstream_model")["used"], 0);
    let audit = gateway.admin_get("/api/audit").await.json();
    let entries = audit["entries"].as_array().unwrap();
    let actions: Vec<(&str, &str)> = entries
        .iter()
        .map(|entry| (entry["action"].as_str().unwrap(), entry["target"].as_str().unwrap()))
        .collect();
    let of_upstream = "upstream 'u': requests per day";
    let of_models = "model 'gpt-4o*' of upstream 'u': total_tokens per minute";
    assert_eq!(
        actions,
        [
            ("reset", of_models),
            ("reset", of_upstream),
            ("limit_unset", of_upstream),
            ("limit_set", of_models),
            ("limit_set", of_upstream)
        ]
    );
    assert_eq!((&entries[4]["before"]["limit"], &entries[4]["after"]["limit"]), (&json!(3), &json!(5)));
}

/// Waits until this report has what `is_so` expects.
async fn report(gateway: &Gateway, query: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let written = async {
        loop {
            let rows = gateway.admin_get(&format!("/api/usage?{query}")).await.json()["rows"].clone();
            if is_so(&rows) {
                return rows;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("the usage history", written).await
}

#[tokio::test]
async fn the_usage_of_an_upstream_is_reported_and_a_dry_run_uses_it() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway_with(&upstream, &format!("path: '{}/t.db'", folder.path().display())).await;
    for (environment, status) in [("a", 200), ("b", 200), ("c", 200), ("b", 200), ("a", 429)] {
        assert_eq!(chat(&gateway, environment).await.status, status);
    }
    gateway.settled().await;
    let rows = report(&gateway, "group_by=upstream,model&step=day", |rows| rows[0]["rejected"] == 1).await;
    assert_eq!(rows.as_array().unwrap().len(), 1, "only an upstream with limits has a history: {rows}");
    let of = |name: &str| rows[0][name].clone();
    assert_eq!((of("upstream"), of("model"), of("requests")), (json!("u"), json!("gpt-4o"), json!(3)));
    assert_eq!((of("environment"), of("caller")), (Value::Null, Value::Null));
    assert_eq!(
        (of("prompt_tokens"), of("completion_tokens"), of("total_tokens")),
        (json!(24), json!(6), json!(30))
    );
    // Environments are reported as before.
    let rows = report(&gateway, "step=day", |rows| rows[2]["requests"] == 1).await;
    assert_eq!(rows[0].get("upstream"), None, "{rows}");
    assert_eq!((&rows[0]["environment"], &rows[1]["total_tokens"]), (&json!("a"), &json!(20)));
    let csv = gateway.admin_get("/api/usage?upstream=u&step=day&format=csv").await;
    let (header, line) = csv.text().split_once('\n').unwrap();
    assert!(header.starts_with("from,environment,upstream,model,caller,requests,"), "{header}");
    assert!(line.trim_end().ends_with(",,u,,,3,1,24,6,30"), "{line}");
    for fault in ["upstream=u&environment=a", "group_by=upstream,caller", "upstream=u&group_by=environment"] {
        let reply = gateway.admin_get(&format!("/api/usage?{fault}")).await;
        assert_eq!(super::error(&reply), (400, "invalid_value".to_owned()), "{fault}");
        assert!(reply.text().contains("group it by upstream or model"), "{}", reply.text());
    }
    assert_eq!(gateway.admin_get("/api/usage?upstream=free").await.json(), json!({ "rows": [] }));
    for (target, limit, refused) in
        [(REQUESTS, 1, 3), (REQUESTS, 3, 1), (REQUESTS, 4, 0), (TOKENS, 10, 3), (TOKENS, 1_000, 0)]
    {
        let separator = if target.contains('?') { '&' } else { '?' };
        let target = format!("{target}{separator}dry_run=true");
        let dry = admin(&gateway, "PUT", &target, &format!("{{\"limit\": {limit}}}")).await.json();
        assert_eq!(dry["refused_last_hour"], refused, "{target} {limit}: {dry}");
    }
}

#[tokio::test]
async fn unknown_upstreams_and_quotas_are_refused() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let limit = r#"{"limit": 5}"#;
    for (method, target, body, status, code) in [
        ("GET", "/api/upstreams/other", "", 404, "unknown_upstream"),
        ("PUT", "/api/upstreams/other/quotas/requests/day", limit, 404, "unknown_upstream"),
        ("PUT", "/api/upstreams/free/quotas/requests/day", limit, 404, "unknown_quota"),
        ("PUT", "/api/upstreams/u/quotas/requests/minute", limit, 404, "unknown_quota"),
        ("PUT", "/api/upstreams/u/quotas/tokens/day", limit, 404, "unknown_quota"),
        ("DELETE", "/api/upstreams/u/quotas/requests/day?model=gpt-4o*", "", 404, "unknown_quota"),
        ("POST", "/api/upstreams/u/quotas/total_tokens/minute/reset", "", 404, "unknown_quota"),
        ("PUT", "/api/upstreams/u/quotas/requests/day?scope=upstream", limit, 400, "invalid_value"),
        ("PUT", REQUESTS, r#"{"limit": 0}"#, 400, "invalid_value"),
        ("PUT", REQUESTS, r#"{"limit": 5, "burst": 9}"#, 400, "invalid_value"),
        ("PUT", REQUESTS, "{", 400, "invalid_json"),
        ("PATCH", "/api/upstreams/u", "", 405, "method_not_allowed"),
    ] {
        let reply = admin(&gateway, method, target, body).await;
        assert_eq!(super::error(&reply), (status, code.to_owned()), "{method} {target}");
    }
    let unchanged = gateway.admin_get("/api/upstreams/u").await.json();
    assert_eq!(quota(&unchanged, "upstream")["source"], "file");
}
