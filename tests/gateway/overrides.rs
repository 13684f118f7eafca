//! Unlimited quotas, and overrides while the gateway runs: limits with a reason and an end, shadow mode.

use crate::cluster::Nodes;
use crate::support::redis::Redis;
use crate::support::*;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// A gateway whose store is in this folder. The file names total tokens only.
async fn gateway(upstream: &Upstream, folder: &Path) -> Gateway {
    Gateway::from_config(&config(upstream, folder, "{ total_tokens: { limit: 1000, per: hour } }")).await
}

fn config(upstream: &Upstream, folder: &Path, quotas: &str) -> String {
    format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\n\
         environments: {{ staging: {{ upstream: backend, reserve: {{ completion: max_tokens }}, quotas: {quotas} }} }}\n\
         default_environment: staging\nstore: {{ path: '{}' }}\n",
        upstream.address,
        folder.join("tollgate.db").display()
    )
}

const ENVIRONMENT: &str = "/api/environments/staging";
const TOTAL: &str = "/api/environments/staging/quotas/total_tokens/hour";
const PROMPT: &str = "/api/environments/staging/quotas/prompt_tokens/minute";
const REQUESTS: &str = "/api/environments/staging/quotas/requests/minute";

/// The quota of a kind.
fn quota<'a>(environment: &'a Value, kind: &str) -> &'a Value {
    environment["quotas"].as_array().unwrap().iter().find(|quota| quota["kind"] == kind).unwrap()
}

/// Waits until more than `seconds` of the clock's minute are left, so that a test does not cross its end.
async fn early_in_a_minute(seconds: u64) {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let left = 60 - now % 60;
    if left <= seconds {
        tokio::time::sleep(Duration::from_secs(left + 1)).await;
    }
}

#[tokio::test]
async fn every_kind_without_a_quota_is_counted_and_can_get_a_limit() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 12)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, folder.path()).await;
    early_in_a_minute(15).await;
    let reply = gateway.chat(&hello(r#""max_tokens":12"#)).await;
    assert_eq!(reply.status, 200);
    assert!(reply.header("x-ratelimit-limit-tokens").is_some());
    assert_eq!(reply.header("x-ratelimit-limit-requests"), None, "an unlimited quota sends no headers");
    let environment = gateway.settled().await;
    for (kind, used) in [("prompt_tokens", 8), ("completion_tokens", 12), ("requests", 1)] {
        let quota = quota(&environment, kind);
        assert_eq!(
            (&quota["unlimited"], &quota["limit"], &quota["burst"], &quota["level"], &quota["per"]),
            (&json!(true), &Value::Null, &Value::Null, &Value::Null, &json!("minute"))
        );
        assert_eq!((&quota["used"], &quota["source"]), (&json!(used), &json!("file")));
    }
    assert_eq!(quota(&environment, "total_tokens")["unlimited"], false);
    let metrics = gateway.admin_get("/metrics").await;
    assert!(
        !metrics.text().contains(r#"tollgate_quota_limit{environment="staging",kind="requests",name="""#)
    );

    let set = admin(&gateway, "PUT", REQUESTS, r#"{"limit": 2, "reason": "load test"}"#).await.json();
    let requests = quota(&set, "requests");
    assert_eq!((&requests["used"], &requests["level"]), (&json!(1), &json!(1)), "{requests}");
    let origin = &requests["override"];
    assert_eq!((&origin["reason"], &origin["file_limit"]), (&json!("load test"), &Value::Null));
    assert!(origin["by"].is_string() && origin["since"].is_string() && origin["until"].is_null());
    let reply = gateway.chat(&hello(r#""max_tokens":12"#)).await;
    assert_eq!((reply.status, reply.header("x-ratelimit-limit-requests")), (200, Some("2")));
    assert_eq!(gateway.chat(&hello(r#""max_tokens":12"#)).await.status, 429);
    let lower = admin(&gateway, "PUT", PROMPT, r#"{"limit": "9"}"#).await.json();
    assert_eq!(quota(&lower, "prompt_tokens")["used"], 9, "at most the limit");
    assert_eq!(quota(&lower, "prompt_tokens")["level"], 0);

    let back = admin(&gateway, "DELETE", REQUESTS, "").await.json();
    assert_eq!(
        (&quota(&back, "requests")["unlimited"], &quota(&back, "requests")["used"]),
        (&json!(true), &json!(2))
    );
    assert!(quota(&back, "requests")["override"].is_null());
    // The count of the clock's minute survives a restart.
    gateway.shutdown().await;
    let again = self::gateway(&upstream, folder.path()).await;
    assert_eq!(quota(&again.environment().await, "requests")["used"], 2);
}

#[tokio::test]
async fn a_limit_can_be_removed_for_some_time() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 592)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, folder.path()).await;
    let body = hello(r#""max_tokens":592"#);
    assert_eq!((gateway.chat(&body).await.status, gateway.chat(&body).await.status), (200, 429));
    let set = admin(&gateway, "PUT", TOTAL, r#"{"limit": "unlimited", "for": "3s"}"#).await.json();
    let total = quota(&set, "total_tokens");
    assert_eq!((&total["unlimited"], &total["used"]), (&json!(true), &json!(600)));
    assert_eq!(total["override"]["file_limit"], 1_000);
    assert_eq!(gateway.chat(&body).await.status, 200);
    let ended = async {
        while quota(&gateway.environment().await, "total_tokens")["unlimited"] == true {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("the override to end", ended).await;
    let environment = gateway.environment().await;
    let total = quota(&environment, "total_tokens");
    assert_eq!((&total["limit"], &total["source"]), (&json!(1_000), &json!("file")));
    assert!(total["level"].as_i64().unwrap() < 10, "1,200 were used: {total}");
}

#[tokio::test]
async fn overrides_keep_their_terms_through_a_restart_and_end_while_the_gateway_is_down() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 8)).await, tempfile::tempdir().unwrap());
    let first = gateway(&upstream, folder.path()).await;
    admin(
        &first,
        "PUT",
        TOTAL,
        r#"{"limit": "2k", "burst": 3000, "for": "1h", "reason": "a \"quoted\" reason"}"#,
    )
    .await;
    admin(&first, "PUT", REQUESTS, r#"{"limit": 5, "for": "1s"}"#).await;
    assert_eq!(
        admin(&first, "PATCH", ENVIRONMENT, r#"{"enforce": false, "reason": "trial"}"#).await.status,
        200
    );
    let before = first.admin_get("/api/overrides").await.json();
    first.shutdown().await;
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let second = gateway(&upstream, folder.path()).await;
    let after = second.admin_get("/api/overrides").await.json();
    assert_eq!(after["overrides"], json!([before["overrides"][0]]));
    assert_eq!(after["enforce"], before["enforce"]);
    let total = &after["overrides"][0];
    assert_eq!(
        (&total["limit"], &total["burst"], &total["file_limit"], &total["reason"]),
        (&json!(2_000), &json!(3_000), &json!(1_000), &json!("a \"quoted\" reason"))
    );
    assert!(total["until"].as_str().unwrap() > total["since"].as_str().unwrap());
    assert_eq!(quota(&second.environment().await, "requests")["unlimited"], true);
    // A limit that would refuse: in shadow mode nothing is.
    admin(&second, "PUT", TOTAL, r#"{"limit": 1}"#).await;
    assert_eq!(second.chat(&hello(r#""max_tokens":8"#)).await.status, 200);
    let back = admin(&second, "PATCH", ENVIRONMENT, r#"{"enforce": null}"#).await.json();
    assert_eq!((&back["enforce"], &back["enforce_override"]), (&json!(true), &Value::Null));
    assert_eq!(second.chat(&hello(r#""max_tokens":8"#)).await.status, 400);
}

#[tokio::test]
async fn a_reload_keeps_overrides() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 8)).await, tempfile::tempdir().unwrap());
    let file = folder.path().join("tollgate.yaml");
    std::fs::write(&file, config(&upstream, folder.path(), "{ total_tokens: { limit: 1000, per: hour } }"))
        .unwrap();
    let gateway = Gateway::from_file(&file).await;
    admin(&gateway, "PUT", TOTAL, r#"{"limit": 700}"#).await;
    admin(&gateway, "PATCH", ENVIRONMENT, r#"{"enforce": false}"#).await;
    let changed = "{ total_tokens: { limit: 900, per: hour }, requests: { limit: unlimited, per: day } }";
    std::fs::write(&file, config(&upstream, folder.path(), changed)).unwrap();
    let reloaded = admin(&gateway, "POST", "/api/config/reload", "").await;
    assert_eq!(reloaded.status, 200, "{}", reloaded.text());
    let environment = gateway.environment().await;
    let total = quota(&environment, "total_tokens");
    assert_eq!((&total["limit"], &total["override"]["file_limit"]), (&json!(700), &json!(900)));
    assert_eq!(
        (&environment["enforce"], &quota(&environment, "requests")["per"]),
        (&json!(false), &json!("day"))
    );
}

#[tokio::test]
async fn an_override_is_removed_though_its_quota_has_left_the_file() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 8)).await, tempfile::tempdir().unwrap());
    let file = folder.path().join("tollgate.yaml");
    let write = |quotas: &str| std::fs::write(&file, config(&upstream, folder.path(), quotas)).unwrap();
    let (with, without) =
        ("{ total_tokens: { limit: 1000, per: hour } }", "{ total_tokens: { limit: 50, per: day } }");
    for restarts in [false, true] {
        write(with);
        let mut gateway = Gateway::from_file(&file).await;
        assert_eq!(admin(&gateway, "PUT", TOTAL, r#"{"limit": 700}"#).await.status, 200);
        write(without);
        if restarts {
            gateway.shutdown().await;
            gateway = Gateway::from_file(&file).await;
        } else {
            assert_eq!(admin(&gateway, "POST", "/api/config/reload", "").await.status, 200);
        }
        let list =
            || async { admin(&gateway, "GET", "/api/overrides", "").await.json()["overrides"].clone() };
        assert_eq!((&list().await[0]["in_file"], &list().await[0]["limit"]), (&json!(false), &json!(700)));
        let patch = admin(&gateway, "GET", "/api/overrides?format=yaml", "").await;
        let text = "# Left out, because the file does not have this quota now: \"environment 'staging'\", total_tokens per hour, limit 700\nenvironments: {}\n";
        assert!(patch.text().contains(text), "{}", patch.text());
        assert_eq!(admin(&gateway, "PUT", TOTAL, r#"{"limit": 1}"#).await.status, 404);
        let removed = admin(&gateway, "DELETE", TOTAL, "").await;
        assert_eq!(removed.status, 200, "{}", removed.text());
        assert_eq!(list().await, json!([]));
        assert_eq!(admin(&gateway, "DELETE", TOTAL, "").await.status, 404);
        let audit = admin(&gateway, "GET", "/api/audit", "").await.json();
        let entry =
            audit["entries"].as_array().unwrap().iter().find(|e| e["action"] == "limit_unset").unwrap();
        assert_eq!((&entry["before"]["limit"], &entry["after"]), (&json!(700), &Value::Null), "{entry}");
        write(with);
        assert_eq!(admin(&gateway, "POST", "/api/config/reload", "").await.status, 200);
        assert_eq!(quota(&gateway.environment().await, "total_tokens")["limit"], 1000);
        gateway.shutdown().await;
    }
}

#[tokio::test]
async fn with_redis_an_override_is_removed_though_its_quota_has_left_the_file() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 12)).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tollgate.yaml");
    let write = |quotas: &str| {
        let text = config(&upstream, folder.path(), quotas);
        let (rest, _) = text.split_once("store:").unwrap();
        std::fs::write(&file, format!("{rest}{}\n", redis.store(0, ""))).unwrap();
    };
    let with = "{ total_tokens: { limit: 1000, per: hour } }";
    write(with);
    let gateway = Gateway::from_file(&file).await;
    assert_eq!(admin(&gateway, "PUT", TOTAL, r#"{"limit": 700}"#).await.status, 200);
    write("{ total_tokens: { limit: 50, per: day } }");
    assert_eq!(admin(&gateway, "POST", "/api/config/reload", "").await.status, 200);
    let removed = admin(&gateway, "DELETE", TOTAL, "").await;
    assert_eq!(removed.status, 200, "{}", removed.text());
    assert_eq!(admin(&gateway, "GET", "/api/overrides", "").await.json()["overrides"], json!([]));
    write(with);
    assert_eq!(admin(&gateway, "POST", "/api/config/reload", "").await.status, 200);
    assert_eq!(quota(&gateway.environment().await, "total_tokens")["limit"], 1000);
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let (upstream, folder) = (Upstream::always(Answer::chat(100, 100)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, folder.path()).await;
    for _ in 0..3 {
        assert_eq!(gateway.chat(&hello(r#""max_tokens":100"#)).await.status, 200);
    }
    gateway.settled().await;
    let target = format!("{TOTAL}?dry_run=true");
    let answer = admin(&gateway, "PUT", &target, r#"{"limit": 300}"#).await.json();
    assert_eq!(
        (&answer["dry_run"], &answer["limit"], &answer["burst"], &answer["level"]),
        (&json!(true), &json!(300), &json!(300), &json!(0))
    );
    assert!(answer["exhausts_at"].is_string(), "{answer}");
    let refused = || async {
        let answer = admin(&gateway, "PUT", &target, r#"{"limit": 300}"#).await.json();
        answer["refused_last_hour"].as_u64().unwrap()
    };
    let written = async {
        while refused().await != 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("the usage history to have the three requests", written).await;
    let unlimited = admin(&gateway, "PUT", &target, r#"{"limit": "unlimited"}"#).await.json();
    assert_eq!(
        unlimited,
        json!({"dry_run": true, "limit": null, "burst": null, "level": null, "exhausts_at": null, "refused_last_hour": 0})
    );
    assert_eq!(gateway.admin_get("/api/overrides").await.json(), json!({"overrides": [], "enforce": []}));
    assert_eq!(quota(&gateway.environment().await, "total_tokens")["limit"], 1_000);
    // Other changes have no dry run. They are refused, and change nothing.
    admin(&gateway, "PUT", TOTAL, r#"{"limit": 700}"#).await;
    let before = gateway.environment().await;
    for (method, path, body) in [
        ("DELETE", TOTAL.to_owned(), ""),
        ("POST", format!("{TOTAL}/reset"), ""),
        ("POST", format!("{ENVIRONMENT}/reset"), ""),
        ("PATCH", ENVIRONMENT.to_owned(), r#"{"enforce": false}"#),
    ] {
        let refused = admin(&gateway, method, &format!("{path}?dry_run=true"), body).await;
        let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(refused.status == 400 && message.contains("dry_run"), "{method} {message}");
    }
    let after = gateway.environment().await;
    for field in ["limit", "used"] {
        assert_eq!(quota(&after, "total_tokens")[field], quota(&before, "total_tokens")[field]);
    }
    assert_eq!(after["enforce"], true);
}

#[tokio::test]
async fn one_quota_is_reset_and_the_others_stay() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 12)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, folder.path()).await;
    early_in_a_minute(10).await;
    gateway.chat(&hello(r#""max_tokens":12"#)).await;
    gateway.settled().await;
    let reset = admin(&gateway, "POST", &format!("{TOTAL}/reset"), "").await;
    assert_eq!((reset.status, &quota(&reset.json(), "total_tokens")["level"]), (200, &json!(1_000)));
    assert_eq!(quota(&reset.json(), "requests")["used"], 1);
    let reset = admin(&gateway, "POST", &format!("{REQUESTS}/reset"), "").await;
    assert_eq!(quota(&reset.json(), "requests")["used"], 0);
    assert_eq!(admin(&gateway, "POST", &format!("{TOTAL}/reset?scope=caller&name=x"), "").await.status, 404);
}

#[tokio::test]
async fn the_error_for_an_unknown_quota_lists_the_quotas_of_the_environment() {
    let upstream = Upstream::always(Answer::chat(8, 8)).await;
    let models: Vec<String> =
        (0..30).map(|n| format!("m{n}: {{ requests: {{ limit: 5, per: day }} }}")).collect();
    let gateway = Gateway::with(
        &upstream,
        "",
        &format!(
            "  staging: {{ upstream: backend, quotas: {{ total_tokens: {{ limit: 9, per: hour }}, requests: {{ limit: 5, per: day }} }}, \
             keys: [{{ name: web, secret: key-of-the-web-app }}, {{ name: batch, secret: key-of-the-batch-job, quotas: {{ requests: {{ limit: 5, per: day }} }} }}] }}\n  \
             large: {{ upstream: backend, model_quotas: {{ {} }} }}",
            models.join(", ")
        ),
    )
    .await;
    let has = "The environment has: total_tokens per hour, requests per day, ";
    for (target, words) in [
        ("staging/quotas/requests/hour", ["Environment 'staging' has no such quota. ", has]),
        ("staging/quotas/tokens/hour", ["Environment 'staging' has no such quota. ", has]),
        (
            "staging/quotas/requests/day?scope=caller&name=web",
            ["Caller 'web' of environment 'staging' has no quotas of its own. ", has],
        ),
        (
            "staging/quotas/requests/day?scope=caller&name=nobody",
            ["Environment 'staging' has no caller of this name. ", has],
        ),
        (
            "staging/quotas/requests/hour?scope=caller&name=batch",
            [
                "Environment 'staging' has no such quota. ",
                "The environment has: requests per day (scope caller, name batch), total_tokens per hour, ",
            ],
        ),
        (
            "large/quotas/requests/day",
            [
                "Environment 'large' has no such quota. ",
                " and 14 more, which GET /api/environments/large lists. Write kind and period",
            ],
        ),
    ] {
        let refused = admin(&gateway, "DELETE", &format!("/api/environments/{target}"), "").await;
        assert_eq!(
            (refused.status, &refused.json()["error"]["code"]),
            (404, &"unknown_quota".into()),
            "{target}"
        );
        let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(words.iter().all(|words| message.contains(words)), "{target}: {message}");
        assert!(message.matches(" per ").count() <= 20, "{message}");
    }
}

#[tokio::test]
async fn bad_overrides_are_refused_with_a_reason() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 8)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, folder.path()).await;
    let bomb = format!("{{\"limit\": {}", "[".repeat(60_000));
    let large = format!(r#"{{"limit": 5, "reason": "{}"}}"#, "x".repeat(1 << 20));
    for (method, target, body, words) in [
        ("PUT", TOTAL, r#"{"limit": 0}"#, "limit must be a whole number from 1"),
        ("PUT", TOTAL, r#"{"limit": -5}"#, "limit must be"),
        ("PUT", TOTAL, r#"{"limit": 1e300}"#, "limit must be"),
        ("PUT", TOTAL, r#"{"limit": "400x"}"#, "limit must be"),
        ("PUT", TOTAL, r#"{"limit": "unlimited", "burst": 5}"#, "no burst"),
        ("PUT", TOTAL, r#"{"limit": 5, "for": "0s"}"#, "for must be a duration"),
        ("PUT", TOTAL, r#"{"limit": 5, "for": "3650d"}"#, "for must be a duration"),
        ("PUT", TOTAL, r#"{"limit": 5, "until": "2h"}"#, "unknown field"),
        ("PUT", TOTAL, &large, "at most 64 KiB"),
        ("PUT", TOTAL, &bomb, "recursion limit"),
        (
            "PUT",
            &format!("{TOTAL}?dry_run=perhaps"),
            r#"{"limit": 5}"#,
            "query parameters are not valid: dry_run",
        ),
        ("PATCH", ENVIRONMENT, r#"{"enforce": "no"}"#, "enforce must be"),
        ("PATCH", ENVIRONMENT, "{}", "missing field"),
        ("GET", "/api/overrides?format=xml", "", "json or yaml"),
    ] {
        let refused = admin(&gateway, method, target, body).await;
        let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
        assert_eq!(refused.status, if body.len() > 64 << 10 { 413 } else { 400 }, "{message}");
        assert!(message.contains(words), "{message}");
    }
    assert_eq!(gateway.admin_get("/api/overrides").await.json(), json!({"overrides": [], "enforce": []}));
}

#[tokio::test]
async fn overrides_and_unlimited_amounts_are_the_same_at_all_nodes_within_a_second() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 12)).await;
    let quotas = "{ total_tokens: { limit: 1000, per: hour } }";
    let nodes = Nodes::start(&redis, &upstream, 2, quotas, "").await;
    early_in_a_minute(20).await;
    for node in nodes.iter() {
        assert_eq!(node.chat(&hello(r#""max_tokens":12"#)).await.status, 200);
    }
    let within_a_second = |what: &'static str, is_so: fn(&Value) -> bool| {
        let nodes = &nodes;
        async move {
            for node in nodes.iter() {
                let so = async {
                    while !is_so(&node.environment().await) {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                };
                assert!(
                    tokio::time::timeout(Duration::from_secs(1), so).await.is_ok(),
                    "{what}: {}",
                    node.environment().await
                );
            }
        }
    };
    within_a_second("both requests are counted", |all| quota(all, "requests")["used"] == 2).await;
    let set = admin(&nodes[0], "PUT", REQUESTS, r#"{"limit": 3, "for": "1h", "reason": "trial"}"#).await;
    assert_eq!((set.status, &quota(&set.json(), "requests")["level"]), (200, &json!(1)), "{}", set.text());
    within_a_second("the limit", |all| {
        let quota = quota(all, "requests");
        quota["limit"] == 3
            && quota["level"] == 1
            && quota["override"]["reason"] == "trial"
            && quota["override"]["until"].is_string()
            && quota["override"]["by"].is_string()
    })
    .await;
    assert_eq!(nodes[1].chat(&hello(r#""max_tokens":12"#)).await.status, 200);
    assert_eq!(nodes[1].chat(&hello(r#""max_tokens":12"#)).await.status, 429);
    admin(&nodes[1], "PATCH", ENVIRONMENT, r#"{"enforce": false, "reason": "shadow"}"#).await;
    within_a_second("shadow mode", |all| {
        all["enforce"] == false && all["enforce_override"]["reason"] == "shadow"
    })
    .await;
    assert_eq!(nodes[0].chat(&hello(r#""max_tokens":12"#)).await.status, 200);
    admin(&nodes[0], "PATCH", ENVIRONMENT, r#"{"enforce": null}"#).await;
    within_a_second("enforced again", |all| all["enforce"] == true && all["enforce_override"].is_null())
        .await;
    // Redis ends an override without a request of a node.
    admin(&nodes[1], "PUT", REQUESTS, r#"{"limit": 1, "for": "1s"}"#).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    within_a_second("the limit has ended", |all| {
        quota(all, "requests")["unlimited"] == true && quota(all, "requests")["override"].is_null()
    })
    .await;
    let one = admin(&nodes[1], "POST", &format!("{TOTAL}/reset"), "").await;
    assert_eq!(one.status, 200);
    within_a_second("one quota is reset", |all| {
        quota(all, "total_tokens")["used"] == 0 && quota(all, "requests")["used"] != 0
    })
    .await;
}

#[tokio::test]
async fn overrides_end_on_every_node_while_redis_is_unavailable() {
    let mut redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 12)).await;
    let quotas = "{ total_tokens: { limit: 1000, per: hour } }";
    let nodes = Nodes::start(&redis, &upstream, 2, quotas, "").await;
    admin(&nodes[0], "PUT", TOTAL, r#"{"limit": 100000, "for": "3s"}"#).await;
    admin(&nodes[0], "PATCH", ENVIRONMENT, r#"{"enforce": false, "for": "3s"}"#).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    redis.kill();
    let state = async |node: &Gateway| {
        let environment = node.environment().await;
        let total = quota(&environment, "total_tokens");
        (total["limit"].as_u64().unwrap(), environment["enforce"].as_bool().unwrap())
    };
    for node in nodes.iter() {
        let is_offline = async { while state(node).await.0 != 50_000 {} };
        soon("a node to count alone", is_offline).await;
        assert!(!state(node).await.1);
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    for node in nodes.iter() {
        assert_eq!(state(node).await, (500, true), "the share of one of two nodes");
        let shown = node.admin_get("/api/overrides").await.json();
        assert_eq!(shown, json!({"overrides": [], "enforce": []}));
        let metrics = node.admin_get("/metrics").await;
        let active = metrics.text();
        let mut active = active.lines().filter(|line| line.starts_with("tollgate_override_active{"));
        assert!(active.all(|line| line.ends_with(" 0")));
        assert_eq!(node.chat(&hello(r#""max_tokens":600"#)).await.status, 503, "more than the share");
    }
}
