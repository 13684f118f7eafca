//! The config changes while the gateway runs.

use crate::support::redis::{Redis, send_signal};
use crate::support::*;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

mod triggers;
mod two_nodes;

/// A gateway whose config is in a file.
struct Live {
    folder: TempDir,
    upstream: Upstream,
    gateway: Gateway,
}

impl Live {
    /// Starts a gateway with this content of `environments`.
    async fn start(upstream: Upstream, environments: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("t.yaml");
        fs::write(&file, text(&upstream, environments)).unwrap();
        let gateway = Gateway::from_file(&file).await;
        Self { folder, upstream, gateway }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("t.yaml")
    }

    /// Replaces the file and reloads it.
    async fn change(&self, environments: &str) -> Reply {
        self.change_text(&text(&self.upstream, environments)).await
    }

    async fn change_text(&self, text: &str) -> Reply {
        replace(&self.file(), text);
        self.reload().await
    }

    async fn reload(&self) -> Reply {
        let admin = self.gateway.admin;
        let mut caller = Caller::connect(admin).await;
        let head = format!("POST /api/config/reload HTTP/1.1\r\nhost: {admin}\r\ncontent-length: 0\r\n\r\n");
        caller.send(head.as_bytes()).await;
        caller.reply().await
    }

    /// The first quota of the first environment.
    async fn quota(&self) -> Value {
        self.gateway.environment().await["quotas"][0].clone()
    }

    /// Limit, used and level of the first quota.
    async fn amounts(&self) -> [i64; 3] {
        let quota = self.quota().await;
        ["limit", "used", "level"].map(|field| quota[field].as_i64().unwrap())
    }

    async fn chat_with_key(&self, key: &str) -> u16 {
        let headers = format!("authorization: Bearer {key}\r\n");
        self.gateway.send("POST", CHAT, &headers, HELLO).await.status
    }

    async fn metric(&self, name: &str) -> u64 {
        let metrics = self.gateway.admin_get("/metrics").await;
        metrics.text().lines().find_map(|line| line.strip_prefix(&format!("{name} "))?.parse().ok()).unwrap()
    }
}

/// A config with this content of `environments`.
fn text(upstream: &Upstream, environments: &str) -> String {
    format!(
        "server: {{ listen: '127.0.0.1:0', drain_timeout: 5s }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams:\n  backend: {{ base_url: 'http://{}/v1' }}\n\
         environments:\n{environments}\nstore: {{ memory: true }}\n",
        upstream.address
    )
}

/// The open environment `staging` with these quotas.
fn staging(quotas: &str) -> String {
    format!(
        "  staging: {{ upstream: backend, reserve: {{ completion: max_tokens }}, quotas: {quotas} }}\ndefault_environment: staging"
    )
}

/// Replaces a file as a whole, as most editors do.
fn replace(file: &Path, text: &str) {
    let next = file.with_extension("next");
    fs::write(&next, text).unwrap();
    fs::rename(next, file).unwrap();
}

const DAY: &str = "{ total_tokens: { limit: 1000, per: day } }";

#[tokio::test]
async fn a_reload_keeps_used_amounts_and_reports_what_changed() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let live = Live::start(upstream, &staging(DAY)).await;
    assert_eq!(live.gateway.chat(&hello(r#""max_tokens":92"#)).await.status, 200);
    let reply = live.change(&staging("{ total_tokens: { limit: 5000, per: day } }")).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let expected =
        "environment 'staging': total_tokens per day changed from limit 1000 (UTC) to limit 5000 (UTC)";
    assert_eq!(reply.json()["changes"], serde_json::json!([expected]));
    assert_eq!(live.amounts().await, [5_000, 100, 4_900]);
    // Another period or window keeps the used amount too, at most the new limit.
    for (quota, used) in [
        ("{ total_tokens: { limit: 900, per: week } }", [900, 100, 800]),
        ("{ total_tokens: { limit: 70, per: day, window: rolling } }", [70, 70, 0]),
        ("{ total_tokens: { limit: 900, per: week } }", [900, 100, 800]),
        ("{ total_tokens: { limit: 5000, per: day, timezone: Asia/Tokyo } }", [5_000, 100, 4_900]),
    ] {
        assert_eq!(live.change(&staging(quota)).await.status, 200);
        assert_eq!(live.amounts().await, used, "{quota}");
    }
    // A removed quota that comes back continues.
    assert_eq!(live.change(&staging("{ requests: { limit: 50, per: day } }")).await.status, 200);
    assert_eq!(live.amounts().await, [50, 0, 50]);
    assert_eq!(live.change(&staging(DAY)).await.status, 200);
    assert_eq!(live.amounts().await, [1_000, 100, 900]);
    assert_eq!(live.metric("tollgate_config_reload_failures_total").await, 0);
    assert!(live.metric("tollgate_config_last_reload_success_timestamp_seconds").await > 1_700_000_000);
    assert_eq!(live.metric("tollgate_config_last_reload_successful").await, 1);
}

#[tokio::test]
async fn a_new_limit_applies_to_the_next_request_and_an_override_stays() {
    let upstream = Upstream::always(Answer::chat(8, 12)).await;
    let live = Live::start(upstream, &staging("{ requests: { limit: 1, per: day } }")).await;
    assert_eq!(live.gateway.chat(HELLO).await.status, 200);
    assert_eq!(live.gateway.chat(HELLO).await.status, 429);
    live.change(&staging("{ requests: { limit: 2, per: day } }")).await;
    assert_eq!(live.gateway.chat(HELLO).await.status, 200);
    assert_eq!(live.gateway.chat(HELLO).await.status, 429);
    let admin = live.gateway.admin;
    let change = async |method: &str, body: &str| {
        let mut caller = Caller::connect(admin).await;
        let length = body.len();
        let path = "/api/environments/staging/quotas/requests/day";
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: {admin}\r\ncontent-length: {length}\r\n\r\n{body}");
        caller.send(request.as_bytes()).await;
        assert_eq!(caller.reply().await.status, 200);
    };
    change("PUT", r#"{"limit":3}"#).await;
    for limit in [7, 9] {
        live.change(&staging(&format!("{{ requests: {{ limit: {limit}, per: day }} }}"))).await;
        assert_eq!((live.amounts().await[0], live.quota().await["source"].clone()), (3, "override".into()));
    }
    change("DELETE", "").await;
    assert_eq!(live.amounts().await, [9, 2, 7], "the limit of the file, which has changed meanwhile");
}

#[tokio::test]
async fn environments_come_go_and_come_back_with_their_balance() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let both = |a: &str, b: &str| {
        format!("  a: {{ upstream: backend, quotas: {a} }}\n  b: {{ upstream: backend, quotas: {b} }}")
    };
    let only_b = format!("  b: {{ upstream: backend, quotas: {DAY} }}");
    let live = Live::start(upstream, &both(DAY, DAY)).await;
    assert_eq!(live.gateway.post("/a/v1/chat/completions", HELLO).await.status, 200);
    live.change(&only_b).await;
    assert_eq!(live.gateway.post("/a/v1/chat/completions", HELLO).await.refusal().0, 404);
    assert_eq!(live.gateway.admin_get("/api/environments/a").await.status, 404);
    live.change(&both(DAY, DAY)).await;
    assert_eq!(live.amounts().await, [1_000, 100, 900]);
    let with_c = format!("{}\n  c: {{ upstream: backend, quotas: {DAY} }}", both(DAY, DAY));
    let reply = live.change(&with_c).await;
    assert_eq!(reply.json()["changes"], serde_json::json!(["environment c added"]));
    assert_eq!(live.gateway.post("/c/v1/chat/completions", HELLO).await.status, 200);
}

#[tokio::test]
async fn a_caller_with_another_key_and_another_place_is_the_same_caller() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let caller = |name: &str, key: &str| {
        format!("{{ name: {name}, secret: {key}, quotas: {{ total_tokens: {{ limit: 100, per: day }} }} }}")
    };
    let with = |callers: &[String]| {
        format!(
            "  e: {{ upstream: backend, reserve: {{ completion: none }}, keys: [{}], quotas: {DAY} }}",
            callers.join(", ")
        )
    };
    let live = Live::start(
        upstream,
        &with(&[caller("one", "key-of-caller-one-1"), caller("two", "key-of-caller-two-1")]),
    )
    .await;
    assert_eq!(live.chat_with_key("key-of-caller-one-1").await, 200);
    assert_eq!(live.chat_with_key("key-of-caller-one-1").await, 429);
    live.change(&with(&[caller("two", "key-of-caller-two-1"), caller("one", "key-of-caller-one-2")])).await;
    assert_eq!(live.chat_with_key("key-of-caller-one-1").await, 401);
    assert_eq!(live.chat_with_key("key-of-caller-one-2").await, 429);
    assert_eq!(live.chat_with_key("key-of-caller-two-1").await, 200);
    // Removed, and back within the period.
    live.change(&with(&[caller("two", "key-of-caller-two-1")])).await;
    assert_eq!(live.chat_with_key("key-of-caller-one-2").await, 401);
    live.change(&with(&[caller("one", "key-of-caller-one-3"), caller("two", "key-of-caller-two-1")])).await;
    assert_eq!(live.chat_with_key("key-of-caller-one-3").await, 429);
}

#[tokio::test]
async fn a_stream_and_its_connection_outlive_reloads_and_settle_where_they_began() {
    let answer = || {
        Answer::stream()
            .event(&delta("Hi"))
            .then(Step::Gate)
            .event(&delta("there"))
            .event(&usage_event(8, 2))
            .end()
    };
    let upstream =
        Upstream::answering(
            move |request| if request.text().contains("stream") { answer() } else { Answer::chat(8, 12) },
        )
        .await;
    let live = Live::start(upstream, &staging(DAY)).await;
    let mut caller = live.gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true,"max_tokens":100"#).as_bytes()).await;
    caller.head().await;
    assert_eq!(caller.chunk().await.unwrap(), delta("Hi").into_bytes());
    assert_eq!(live.upstream.connections(), 1);
    // Each reload replaces something that the stream began with.
    live.change(&staging("{ total_tokens: { limit: 500, per: week } }")).await;
    live.change("  other: { upstream: backend, quotas: { requests: { limit: 5, per: day } } }").await;
    live.change(&staging("{ total_tokens: { limit: 500, per: week } }")).await;
    live.upstream.open_gate();
    assert!(caller.chunk().await.unwrap().starts_with(delta("there").as_bytes()));
    while caller.chunk().await.is_some_and(|chunk| !chunk.is_empty()) {}
    let environment = live.gateway.settled().await;
    assert_eq!(
        (environment["quotas"][0]["used"].clone(), environment["totals"]["total_tokens"].clone()),
        (10.into(), 10.into())
    );
    // The connection to a replica is used as long as the config has its URL. Each worker has connections of its own, so the
    // caller's connection stays the same too.
    caller.request("POST", CHAT, "", hello(r#""max_tokens":9"#).as_bytes()).await;
    assert_eq!(caller.reply().await.status, 200);
    assert_eq!(live.upstream.connections(), 1);
    let changed = text(&live.upstream, &staging(DAY)).replace("/v1' }", "/v1', timeouts: { connect: 4s } }");
    assert_eq!(
        live.change_text(&changed).await.json()["changes"][0],
        "environment 'staging': total_tokens per day added, limit 1000 (UTC)"
    );
    caller.request("POST", CHAT, "", hello(r#""max_tokens":9"#).as_bytes()).await;
    assert_eq!(caller.reply().await.status, 200);
    assert_eq!(live.upstream.connections(), 1);
    let moved = changed.replace("http://127.0.0.1:", "http://localhost:");
    assert_ne!(moved, changed);
    assert_eq!(live.change_text(&moved).await.status, 200);
    caller.request("POST", CHAT, "", hello(r#""max_tokens":9"#).as_bytes()).await;
    assert_eq!(caller.reply().await.status, 200);
    assert_eq!(live.upstream.connections(), 2);
}

/// The last event of a chat stream, with this usage.
fn usage_event(prompt: u64, completion: u64) -> String {
    format!(
        "data: {{\"id\":\"c1\",\"choices\":[{{\"index\":0,\"delta\":{{}},\"finish_reason\":\"stop\"}}],\"usage\":{}}}\n\n",
        usage(prompt, completion)
    )
}

#[tokio::test]
async fn a_bad_file_changes_nothing_and_is_reported() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let live = Live::start(upstream, &staging(DAY)).await;
    let good = text(&live.upstream, &staging(DAY));
    let file = live.file();
    let port = |section: &str| {
        good.replace(
            &format!("{section}: {{ listen: '127.0.0.1:0'"),
            &format!("{section}: {{ listen: '127.0.0.1:1'"),
        )
    };
    let half = good[..good.find("quotas").unwrap() + 12].to_owned();
    let mut failures = 0;
    for (name, broken, expected) in [
        ("faulty", good.replace("per: day", "per: fortnight"), "fortnight"),
        ("half-written", half, "t.yaml"),
        ("empty", String::new(), "t.yaml"),
        ("server.listen", port("server"), "server.listen cannot change while the gateway runs"),
        ("admin.listen", port("admin"), "a restart is needed"),
        ("store.memory", good.replace("memory: true", "memory: false"), "store.memory"),
        (
            "store.redis",
            good.replace("store: { memory: true }", "store: { redis: { url: 'redis://127.0.0.1:1/0' } }"),
            "store.redis.url",
        ),
        (
            "unreachable tokenizer",
            format!("{good}models: [{{ match: x, tokenizer: /nowhere/t.json }}]\n"),
            "models[0].tokenizer",
        ),
        (
            "missing key file",
            good.replace("/v1' }", "/v1', api_key: '${file:/nowhere/key}' }"),
            "/nowhere/key",
        ),
    ] {
        failures += 1;
        let reply = live.change_text(&broken).await;
        assert_eq!(
            (reply.status, reply.code()),
            (422, "invalid_config".to_owned()),
            "{name}: {}",
            reply.text()
        );
        assert!(reply.json()["faults"].to_string().contains(expected), "{name}: {}", reply.text());
        assert!(
            live.gateway.admin_get("/readyz").await.text().contains("the new config was refused"),
            "{name}"
        );
        assert!(live.metric("tollgate_config_reload_failures_total").await >= failures, "{name}");
        assert_eq!(live.metric("tollgate_config_last_reload_successful").await, 0, "{name}");
    }
    fs::remove_file(&file).unwrap();
    assert!(live.reload().await.text().contains("cannot be read"));
    fs::create_dir(&file).unwrap();
    assert!(live.reload().await.text().contains("this is a directory"));
    fs::remove_dir(&file).unwrap();
    fs::File::create(&file).unwrap().set_len(100 << 20).unwrap();
    assert!(live.reload().await.text().contains("larger than 4 MiB"));
    fs::remove_file(&file).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
    assert!(live.reload().await.text().contains("not a regular file"));
    fs::remove_file(&file).unwrap();

    assert_eq!(live.gateway.chat(&hello(r#""max_tokens":92"#)).await.status, 200);
    assert_eq!(live.amounts().await, [1_000, 100, 900]);
    let reply = live.change_text(&good).await;
    assert_eq!((reply.status, reply.json()["changes"].clone()), (200, serde_json::json!([])));
    assert_eq!(live.gateway.admin_get("/readyz").await.text(), "ready\n");
    assert_eq!(live.metric("tollgate_config_last_reload_successful").await, 1);
}

#[tokio::test]
async fn a_gateway_without_a_file_says_so() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let gateway = Gateway::in_front_of(&upstream, DAY).await;
    let mut caller = Caller::connect(gateway.admin).await;
    let head =
        format!("POST /api/config/reload HTTP/1.1\r\nhost: {}\r\ncontent-length: 0\r\n\r\n", gateway.admin);
    caller.send(head.as_bytes()).await;
    let reply = caller.reply().await;
    assert_eq!(reply.status, 422);
    assert!(reply.text().contains("no config file"));
}
