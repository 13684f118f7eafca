//! Nodes whose Redis is killed, frozen, emptied or not there yet.

use super::{Nodes, config};
use crate::support::redis::{Redis, signal};
use crate::support::*;
use std::time::Duration;
use tollgate::clock::Stopwatch;

/// 1,000 tokens that do not come back while a test runs.
pub const THOUSAND: &str = "{ total_tokens: { limit: 10, burst: 1000, per: day, window: rolling } }";
/// The same of a calendar's period.
const CALENDAR: &str = "{ total_tokens: { limit: 1000, per: month } }";

/// 100 tokens, reserved and charged.
pub fn hundred() -> String {
    hello(r#""max_tokens":92"#)
}

/// So many requests one after the other: how many are admitted; the others get this code.
pub async fn admitted(node: &Gateway, requests: usize, code: &str) -> usize {
    let mut count = 0;
    for _ in 0..requests {
        let reply = node.chat(&hundred()).await;
        if reply.status == 200 {
            count += 1;
        } else {
            assert_eq!(reply.code(), code);
        }
    }
    count
}

/// Waits until all nodes share their quotas again, or all do without; tells how long that took.
pub async fn until(nodes: &[Gateway], is_up: bool) -> Duration {
    let begun = Stopwatch::start();
    soon("the cluster", async {
        for node in nodes {
            while node.environment().await["shared"]["up"] != is_up {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    })
    .await;
    begun.elapsed()
}

#[tokio::test]
async fn closed_nothing_is_let_through_and_nothing_is_forgotten_when_redis_comes_back_empty() {
    for quotas in [THOUSAND, CALENDAR] {
        let mut redis = Redis::start();
        let upstream = Upstream::always(Answer::chat(8, 92)).await;
        let nodes = Nodes::start(&redis, &upstream, 2, quotas, "on_failure: closed").await;
        assert_eq!(admitted(&nodes[0], 2, "").await + admitted(&nodes[1], 1, "").await, 3);
        assert_eq!(nodes.levels().await, [700, 700]);
        redis.kill();
        let mut waits = Vec::new();
        for _ in 0..20 {
            let begun = Stopwatch::start();
            let reply = nodes[0].chat(&hundred()).await;
            waits.push(begun.elapsed());
            assert_eq!(reply.refusal(), (503, "quota_store_unavailable".into()));
            assert_eq!(reply.header("retry-after"), Some("1"));
        }
        // A whole HTTP call on a connection of its own, on a busy machine.
        assert!(waits[0] < Duration::from_millis(250), "the first call took {:?}", waits[0]);
        waits.sort();
        assert!(waits[10] < Duration::from_millis(25), "later ones took {:?}", waits[10]);
        until(&nodes, false).await;
        for node in nodes.iter() {
            let ready = node.admin_get("/readyz").await;
            assert_eq!(ready.status, 503);
            assert!(
                ready.text().contains("staging: Redis is unavailable, this node admits no request"),
                "{}",
                ready.text()
            );
        }
        redis.start_again();
        let back = until(&nodes, true).await;
        assert!(back < Duration::from_secs(3), "back after {back:?}");
        assert_eq!(nodes[1].admin_get("/readyz").await.status, 200);
        assert_eq!(nodes.levels().await, [700, 700]);
        let all = admitted(&nodes[0], 4, "insufficient_quota").await
            + admitted(&nodes[1], 9, "insufficient_quota").await;
        assert_eq!(all, 7);
        assert_eq!(nodes.levels().await, [0, 0]);
    }
}

#[tokio::test]
async fn local_each_node_goes_on_with_its_share_and_pays_it_in() {
    for (quotas, restarts) in [(THOUSAND, true), (CALENDAR, true), (THOUSAND, false), (CALENDAR, false)] {
        let mut redis = Redis::start();
        let upstream = Upstream::always(Answer::chat(8, 92)).await;
        let nodes = Nodes::start(&redis, &upstream, 2, quotas, "").await;
        assert_eq!(admitted(&nodes[0], 2, "").await, 2);
        assert_eq!(nodes.levels().await, [800, 800]);
        let process = redis.process();
        // Both have to know how much is left when it goes.
        tokio::time::sleep(Duration::from_millis(700)).await;
        if restarts {
            redis.kill();
        } else {
            signal(&process, "STOP");
        }
        assert_eq!(admitted(&nodes[0], 7, "insufficient_quota").await, 4, "half of what was left");
        assert_eq!(admitted(&nodes[1], 1, "").await, 1);
        until(&nodes, false).await;
        let ready = nodes[0].admin_get("/readyz").await;
        assert_eq!(ready.status, 200);
        assert!(ready.text().contains(
            "staging: Redis is unavailable, this node admits from its share of the last known levels"
        ));
        if restarts {
            redis.start_again();
        } else {
            signal(&process, "CONT");
        }
        until(&nodes, true).await;
        assert_eq!(nodes.levels().await, [300, 300], "{quotas} {restarts}");
        assert_eq!(admitted(&nodes[1], 5, "insufficient_quota").await, 3);
        assert_eq!(nodes.levels().await, [0, 0]);
        for node in nodes.iter() {
            node.settled().await;
        }
    }
}

#[tokio::test]
async fn open_each_node_admits_by_the_whole_limits_and_what_was_too_much_is_debt() {
    let mut redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND, "on_failure: open").await;
    assert_eq!(admitted(&nodes[0], 5, "").await, 5);
    // What Redis has not been told of when it loses everything may be charged twice.
    assert_eq!(nodes.levels().await, [500, 500]);
    redis.kill();
    assert_eq!(admitted(&nodes[0], 12, "insufficient_quota").await, 10, "capped by the limit");
    assert_eq!(admitted(&nodes[1], 1, "").await, 1);
    let ready = nodes[0].admin_get("/readyz").await;
    assert!(ready.status == 200 && ready.text().contains("this node admits up to the whole limits"));
    redis.start_again();
    until(&nodes, true).await;
    assert_eq!(nodes.levels().await, [-600, -600]);
    assert_eq!(admitted(&nodes[1], 1, "insufficient_quota").await, 0);
}

async fn shown(node: &Gateway) -> [i64; 3] {
    let environment = node.environment().await;
    ["level", "held", "used"].map(|field| environment["quotas"][0][field].as_i64().unwrap())
}

#[tokio::test]
async fn what_is_in_flight_stays_held_whatever_becomes_of_redis() {
    let mut redis = Redis::start();
    let gated =
        Answer::of(Answer::chat(8, 42).steps().into_iter().fold(vec![Step::Gate], |mut steps, step| {
            steps.push(step);
            steps
        }));
    let upstream = Upstream::always(gated).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND, "").await;
    let mut callers = Vec::new();
    let mut begin = async |node: &Gateway| {
        let mut caller = node.caller().await;
        caller.request("POST", CHAT, "", hundred().as_bytes()).await;
        callers.push(caller);
        upstream.has_seen(callers.len()).await;
    };
    // At both nodes, as soon as Redis has been told.
    let come_to_show = async |level_held_used: [i64; 3]| {
        let both_do = async {
            for node in nodes.iter() {
                while shown(node).await != level_held_used {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        };
        soon(&format!("{level_held_used:?}"), both_do).await;
    };
    // Two before it is lost, one meanwhile.
    begin(&nodes[0]).await;
    begin(&nodes[1]).await;
    redis.kill();
    until(&nodes, false).await;
    begin(&nodes[0]).await;
    redis.start_again();
    until(&nodes, true).await;
    come_to_show([700, 300, 0]).await;
    // One of them ends while it is lost once more.
    redis.kill();
    until(&nodes, false).await;
    upstream.open_gate();
    soon("an answer", async {
        while nodes[0].charged().await[0] + nodes[1].charged().await[0] == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    redis.start_again();
    until(&nodes, true).await;
    come_to_show([750, 200, 50]).await;
    upstream.open_gate();
    upstream.open_gate();
    for caller in &mut callers {
        assert_eq!(caller.reply().await.status, 200);
    }
    come_to_show([850, 0, 150]).await;
}

#[tokio::test]
async fn a_server_that_forgets_its_scripts_or_everything_is_told_again() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND, "on_failure: closed").await;
    assert_eq!(admitted(&nodes[0], 2, "").await, 2);
    redis.admin("SCRIPT FLUSH");
    assert_eq!(admitted(&nodes[1], 1, "").await, 1);
    redis.admin("FLUSHALL");
    until(&nodes, false).await;
    until(&nodes, true).await;
    assert_eq!(nodes.levels().await, [700, 700]);
    assert_eq!(admitted(&nodes[1], 8, "insufficient_quota").await, 7);
}

#[tokio::test]
async fn a_node_that_starts_without_redis_says_so_and_pays_in_later() {
    let mut redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    redis.kill();
    let [local, closed] = ["", "on_failure: closed"].map(|more| config(&redis, &upstream, 7, THOUSAND, more));
    let node = Gateway::from_config(&closed).await;
    assert_eq!(node.chat(&hundred()).await.refusal(), (503, "quota_store_unavailable".into()));
    node.shutdown().await;
    let node = Gateway::from_config(&local).await;
    assert_eq!(admitted(&node, 3, "").await, 3);
    let ready = node.admin_get("/readyz").await;
    assert!(ready.status == 200 && ready.text().contains("Redis is unavailable"), "{}", ready.text());
    redis.start_again();
    let nodes = Nodes(vec![node]);
    until(&nodes, true).await;
    assert_eq!(nodes.levels().await, [700]);
}

#[tokio::test]
async fn a_node_that_stops_while_redis_is_away_for_a_moment_tells_it_everything() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 42)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND, "").await;
    assert_eq!(admitted(&nodes[0], 2, "").await, 2);
    let process = redis.process();
    signal(&process, "STOP");
    // Half of what is reserved is spent.
    assert_eq!(admitted(&nodes[0], 4, "").await, 4);
    let Nodes(mut nodes) = nodes;
    tokio::join!(nodes.remove(0).shutdown(), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        signal(&process, "CONT");
    });
    until(&nodes, true).await;
    let nodes = Nodes(nodes);
    assert_eq!(nodes.levels().await, [1_000 - 6 * 50]);
    assert_eq!(nodes[0].environment().await["shared"]["nodes"], 1);
}

#[tokio::test]
async fn a_limit_cannot_be_set_while_redis_is_away() {
    let mut redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 1, THOUSAND, "").await;
    redis.kill();
    let mut caller = Caller::connect(nodes[0].admin).await;
    let path = "/api/environments/staging/quotas/total_tokens/day";
    let body = r#"{"limit":5}"#;
    let request = format!(
        "PUT {path} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n{body}",
        nodes[0].admin,
        body.len()
    );
    caller.send(request.as_bytes()).await;
    let reply = caller.reply().await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &"quota_store_unavailable".into()));
    assert_eq!(nodes[0].environment().await["quotas"][0]["source"], "file");
}
