//! Nodes whose Redis is killed, frozen, flushed or not started yet.

use super::{Nodes, config};
use crate::support::proxy::{Mode, Proxy};
use crate::support::redis::{Redis, send_signal};
use crate::support::*;
use std::time::Duration;
use tollgate::clock::Stopwatch;

/// 1,000 tokens, which hardly refill while a test runs.
pub const THOUSAND_TOKENS: &str = "{ total_tokens: { limit: 10, burst: 1000, per: day, window: rolling } }";
/// 1,000 tokens of a calendar month.
const THOUSAND_A_MONTH: &str = "{ total_tokens: { limit: 1000, per: month } }";

/// A request that reserves 100 tokens.
pub fn hundred_tokens() -> String {
    hello(r#""max_tokens":92"#)
}

/// Sends requests one after the other and returns how many were admitted. The others are denied with this code.
pub async fn count_admitted(node: &Gateway, requests: usize, code: &str) -> usize {
    let mut count = 0;
    for _ in 0..requests {
        let reply = node.chat(&hundred_tokens()).await;
        if reply.status == 200 {
            count += 1;
        } else {
            assert_eq!(reply.code(), code);
        }
    }
    count
}

/// Waits until all nodes share their quotas, or until none does. Returns how long that took.
pub async fn wait_until_shared(nodes: &[Gateway], is_shared: bool) -> Duration {
    let begun = Stopwatch::start();
    soon("the nodes", async {
        for node in nodes {
            while node.environment().await["shared"]["up"] != is_shared {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    })
    .await;
    begun.elapsed()
}

#[tokio::test]
async fn the_closed_policy_denies_everything_and_restores_the_counters_of_an_empty_redis() {
    for quotas in [THOUSAND_TOKENS, THOUSAND_A_MONTH] {
        let mut redis = Redis::start();
        let upstream = Upstream::always(Answer::chat(8, 92)).await;
        let nodes = Nodes::start(&redis, &upstream, 2, quotas, "on_failure: closed").await;
        assert_eq!(count_admitted(&nodes[0], 2, "").await + count_admitted(&nodes[1], 1, "").await, 3);
        assert_eq!(nodes.levels().await, [700, 700]);
        redis.kill();
        let mut times = Vec::new();
        for _ in 0..20 {
            let begun = Stopwatch::start();
            let reply = nodes[0].chat(&hundred_tokens()).await;
            times.push(begun.elapsed());
            assert_eq!(reply.refusal(), (503, "quota_store_unavailable".into()));
            assert_eq!(reply.header("retry-after"), Some("1"));
        }
        // The bounds allow for a whole HTTP call on a new connection and a busy machine.
        assert!(times[0] < Duration::from_millis(250), "the first call took {:?}", times[0]);
        times.sort();
        assert!(times[10] < Duration::from_millis(25), "later calls took {:?}", times[10]);
        wait_until_shared(&nodes, false).await;
        for node in nodes.iter() {
            let ready = node.admin_get("/readyz").await;
            assert_eq!(ready.status, 503);
            assert!(
                ready.text().contains("staging: Redis is unavailable, this node admits no request"),
                "{}",
                ready.text()
            );
        }
        redis.restart();
        let recovery = wait_until_shared(&nodes, true).await;
        assert!(recovery < Duration::from_secs(3), "shared again after {recovery:?}");
        assert_eq!(nodes[1].admin_get("/readyz").await.status, 200);
        assert_eq!(nodes.levels().await, [700, 700]);
        let after = count_admitted(&nodes[0], 4, "insufficient_quota").await
            + count_admitted(&nodes[1], 9, "insufficient_quota").await;
        assert_eq!(after, 7);
        assert_eq!(nodes.levels().await, [0, 0]);
    }
}

#[tokio::test]
async fn nodes_with_the_local_policy_admit_their_share_and_charge_it_after_the_outage() {
    for (quotas, is_killed) in [
        (THOUSAND_TOKENS, true),
        (THOUSAND_A_MONTH, true),
        (THOUSAND_TOKENS, false),
        (THOUSAND_A_MONTH, false),
    ] {
        let mut redis = Redis::start();
        let upstream = Upstream::always(Answer::chat(8, 92)).await;
        let nodes = Nodes::start(&redis, &upstream, 2, quotas, "").await;
        assert_eq!(count_admitted(&nodes[0], 2, "").await, 2);
        assert_eq!(nodes.levels().await, [800, 800]);
        let process = redis.process_id();
        // Both nodes receive the current levels before the outage.
        tokio::time::sleep(Duration::from_millis(700)).await;
        if is_killed {
            redis.kill();
        } else {
            send_signal(&process, "STOP");
        }
        assert_eq!(count_admitted(&nodes[0], 7, "insufficient_quota").await, 4, "half of what was left");
        assert_eq!(count_admitted(&nodes[1], 1, "").await, 1);
        wait_until_shared(&nodes, false).await;
        let ready = nodes[0].admin_get("/readyz").await;
        assert_eq!(ready.status, 200);
        assert!(ready.text().contains(
            "staging: Redis is unavailable, this node admits from its share of the last known levels"
        ));
        if is_killed {
            redis.restart();
        } else {
            send_signal(&process, "CONT");
        }
        wait_until_shared(&nodes, true).await;
        assert_eq!(nodes.levels().await, [300, 300], "{quotas} {is_killed}");
        assert_eq!(count_admitted(&nodes[1], 5, "insufficient_quota").await, 3);
        assert_eq!(nodes.levels().await, [0, 0]);
        for node in nodes.iter() {
            node.settled().await;
        }
    }
}

#[tokio::test]
async fn nodes_with_the_open_policy_admit_the_whole_limit_each_and_the_excess_becomes_debt() {
    let mut redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND_TOKENS, "on_failure: open").await;
    assert_eq!(count_admitted(&nodes[0], 5, "").await, 5);
    // All steps have arrived in Redis. Steps that arrive just before the data is lost may be charged twice.
    assert_eq!(nodes.levels().await, [500, 500]);
    redis.kill();
    assert_eq!(count_admitted(&nodes[0], 12, "insufficient_quota").await, 10, "capped by the limit");
    assert_eq!(count_admitted(&nodes[1], 1, "").await, 1);
    let ready = nodes[0].admin_get("/readyz").await;
    assert!(ready.status == 200 && ready.text().contains("this node admits up to the whole limits"));
    redis.restart();
    wait_until_shared(&nodes, true).await;
    assert_eq!(nodes.levels().await, [-600, -600]);
    assert_eq!(count_admitted(&nodes[1], 1, "insufficient_quota").await, 0);
}

async fn level_held_used(node: &Gateway) -> [i64; 3] {
    let environment = node.environment().await;
    ["level", "held", "used"].map(|field| environment["quotas"][0][field].as_i64().unwrap())
}

#[tokio::test]
async fn requests_in_flight_stay_held_through_outages_of_redis() {
    let mut redis = Redis::start();
    let gated =
        Answer::of(Answer::chat(8, 42).steps().into_iter().fold(vec![Step::Gate], |mut steps, step| {
            steps.push(step);
            steps
        }));
    let upstream = Upstream::always(gated).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND_TOKENS, "").await;
    let mut callers = Vec::new();
    let mut begin = async |node: &Gateway| {
        let mut caller = node.caller().await;
        caller.request("POST", CHAT, "", hundred_tokens().as_bytes()).await;
        callers.push(caller);
        upstream.wait_until_seen(callers.len()).await;
    };
    // Waits until both nodes report this level, held and used.
    let wait_for_state = async |expected: [i64; 3]| {
        let both_report = async {
            for node in nodes.iter() {
                while level_held_used(node).await != expected {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        };
        soon(&format!("{expected:?}"), both_report).await;
    };
    // Two requests begin before the outage, one during it.
    begin(&nodes[0]).await;
    begin(&nodes[1]).await;
    redis.kill();
    wait_until_shared(&nodes, false).await;
    begin(&nodes[0]).await;
    redis.restart();
    wait_until_shared(&nodes, true).await;
    wait_for_state([700, 300, 0]).await;
    // One request ends during a second outage.
    redis.kill();
    wait_until_shared(&nodes, false).await;
    upstream.open_gate();
    soon("an answer", async {
        while nodes[0].charged().await[0] + nodes[1].charged().await[0] == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    redis.restart();
    wait_until_shared(&nodes, true).await;
    wait_for_state([750, 200, 50]).await;
    upstream.open_gate();
    upstream.open_gate();
    for caller in &mut callers {
        assert_eq!(caller.reply().await.status, 200);
    }
    wait_for_state([850, 0, 150]).await;
}

#[tokio::test]
async fn nodes_recover_from_flushed_scripts_and_flushed_data() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND_TOKENS, "on_failure: closed").await;
    assert_eq!(count_admitted(&nodes[0], 2, "").await, 2);
    redis.admin("SCRIPT FLUSH");
    assert_eq!(count_admitted(&nodes[1], 1, "").await, 1);
    redis.admin("FLUSHALL");
    wait_until_shared(&nodes, false).await;
    wait_until_shared(&nodes, true).await;
    assert_eq!(nodes.levels().await, [700, 700]);
    assert_eq!(count_admitted(&nodes[1], 8, "insufficient_quota").await, 7);
}

#[tokio::test]
async fn a_node_that_starts_without_redis_reports_it_and_charges_its_usage_later() {
    let mut redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    redis.kill();
    let [local, closed] =
        ["", "on_failure: closed"].map(|more| config(&redis, &upstream, 7, THOUSAND_TOKENS, more));
    let node = Gateway::from_config(&closed).await;
    assert_eq!(node.chat(&hundred_tokens()).await.refusal(), (503, "quota_store_unavailable".into()));
    node.shutdown().await;
    let node = Gateway::from_config(&local).await;
    assert_eq!(count_admitted(&node, 3, "").await, 3);
    let ready = node.admin_get("/readyz").await;
    assert!(ready.status == 200 && ready.text().contains("Redis is unavailable"), "{}", ready.text());
    redis.restart();
    let nodes = Nodes(vec![node]);
    wait_until_shared(&nodes, true).await;
    assert_eq!(nodes.levels().await, [700]);
}

#[tokio::test]
async fn a_note_about_redis_is_no_fault_of_a_node() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 1, THOUSAND_TOKENS, "").await;
    wait_until_shared(&nodes, true).await;
    let ready = nodes[0].admin_get("/readyz").await;
    let note = "ready\nnote: staging: Redis: it stores nothing on disk (appendonly no, save \"\"): ";
    assert!(ready.status == 200 && ready.text().starts_with(note), "{}", ready.text());
    assert_eq!(ready.text().lines().count(), 2, "{}", ready.text());
    // The metric and the view of the system count notes too.
    let metrics = nodes[0].admin_get("/metrics").await;
    let count = r#"tollgate_redis_faults{environment="staging"} 1"#;
    assert!(metrics.text().contains(count), "{}", metrics.text());
    let system = nodes[0].admin_get("/api/system").await.json();
    assert_eq!(system["redis"]["faults"].as_array().unwrap().len(), 1, "{system}");
    // A node with a fault does not begin with "ready".
    redis.admin("CONFIG SET maxmemory-policy allkeys-lru");
    let other = Nodes(vec![Gateway::from_config(&config(&redis, &upstream, 1, THOUSAND_TOKENS, "")).await]);
    wait_until_shared(&other, true).await;
    let ready = other[0].admin_get("/readyz").await;
    let lines: Vec<&str> = ready.text().lines().collect();
    assert!(
        lines[0]
            .starts_with("staging: a setting of the Redis server is wrong for quotas: its maxmemory-policy"),
        "{lines:?}"
    );
    assert!(lines.len() == 2 && lines[1].starts_with("note: staging: Redis: "), "{lines:?}");
}

#[tokio::test]
async fn a_node_that_stops_during_a_short_outage_sends_all_its_steps() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 42)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND_TOKENS, "").await;
    assert_eq!(count_admitted(&nodes[0], 2, "").await, 2);
    let process = redis.process_id();
    send_signal(&process, "STOP");
    // Each request spends half of what it reserves.
    assert_eq!(count_admitted(&nodes[0], 4, "").await, 4);
    let Nodes(mut nodes) = nodes;
    tokio::join!(nodes.remove(0).shutdown(), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        send_signal(&process, "CONT");
    });
    wait_until_shared(&nodes, true).await;
    let nodes = Nodes(nodes);
    assert_eq!(nodes.levels().await, [1_000 - 6 * 50]);
    assert_eq!(nodes[0].environment().await["shared"]["nodes"], 1);
}

/// Sets the limit of a node's quota by the admin API.
async fn set_limit(node: &Gateway, body: &str) -> Reply {
    let mut caller = Caller::connect(node.admin).await;
    let path = "/api/environments/staging/quotas/total_tokens/day";
    let (host, length) = (node.admin, body.len());
    let request = format!("PUT {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\n\r\n{body}");
    caller.send(request.as_bytes()).await;
    caller.reply().await
}

#[tokio::test]
async fn a_limit_cannot_be_set_while_redis_is_unavailable() {
    let mut redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 1, THOUSAND_TOKENS, "").await;
    redis.kill();
    let reply = set_limit(&nodes[0], r#"{"limit":5}"#).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &"quota_store_unavailable".into()));
    assert_eq!(nodes[0].environment().await["quotas"][0]["source"], "file");
}

#[tokio::test]
async fn a_change_without_a_reply_may_have_been_made_and_is_in_the_audit_log() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 1, THOUSAND_TOKENS, "").await;
    let node = &nodes[0];
    let process = redis.process_id();
    send_signal(&process, "STOP");
    let reply = set_limit(node, r#"{"limit":5,"reason":"a test"}"#).await;
    send_signal(&process, "CONT");
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &"quota_store_unavailable".into()));
    assert!(reply.text().contains("The change may have been made"), "{}", reply.text());
    let audit = node.admin_get("/api/audit").await.json();
    let entry = &audit["entries"][0];
    assert_eq!((&entry["action"], &entry["reason"]), (&"limit_set".into(), &"a test".into()), "{audit}");
    assert_eq!(entry["after"]["unconfirmed"], true, "{audit}");
}

#[tokio::test]
async fn a_request_larger_than_the_share_of_its_node_waits_for_redis_and_is_no_fault_of_its_caller() {
    let mut redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND_TOKENS, "").await;
    let large = hello(r#""max_tokens":700"#);
    tokio::time::sleep(Duration::from_millis(700)).await;
    redis.kill();
    wait_until_shared(&nodes, false).await;
    let refused = nodes[0].chat(&large).await;
    assert_eq!(refused.refusal(), (503, "quota_store_unavailable".into()), "{}", refused.text());
    let larger = nodes[0].chat(&hello(r#""max_tokens":1700"#)).await;
    assert_eq!(larger.refusal(), (400, "request_exceeds_quota".into()), "{}", larger.text());
    redis.restart();
    wait_until_shared(&nodes, true).await;
    assert_eq!(nodes[0].chat(&large).await.status, 200);
}

#[tokio::test]
async fn a_server_is_used_whose_replies_take_most_of_the_timeout() {
    let redis = Redis::start();
    let proxy = Proxy::start(&redis.socket()).await;
    proxy.set(Mode::Slow);
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    // Each reply takes 200 ms, and two replies more than the timeout.
    let config = config(&redis, &upstream, 1, THOUSAND_TOKENS, "timeout: 320ms");
    let nodes = [Gateway::from_config(&config.replace(&redis.url, &proxy.url())).await];
    wait_until_shared(&nodes, true).await;
}
