//! Nodes that share quotas while Redis is available.

use super::outages::THOUSAND_TOKENS;
use super::{Nodes, config};
use crate::support::redis::{Redis, send_signal};
use crate::support::*;
use std::time::Duration;

#[tokio::test]
async fn a_burst_through_two_four_and_eight_nodes_admits_exactly_the_quota() {
    for count in [2, 4, 8] {
        let redis = Redis::start();
        let upstream = Upstream::always(Answer::chat(8, 12)).await;
        let nodes = Nodes::start(&redis, &upstream, count, THOUSAND_TOKENS, "on_failure: closed").await;
        let mut requests = tokio::task::JoinSet::new();
        for n in 0..1_000 {
            let address = nodes[n % nodes.len()].address;
            requests.spawn(async move {
                let mut caller = Caller::connect(address).await;
                // The request reserves 20 tokens, and 20 are charged.
                caller.request("POST", CHAT, "", hello(r#""max_tokens":12"#).as_bytes()).await;
                let reply = caller.reply().await;
                assert!(matches!(reply.status, 200 | 429 | 503), "{}", reply.text());
                reply.status
            });
        }
        let replies = requests.join_all().await;
        let admitted = replies.iter().filter(|status| **status == 200).count();
        assert_eq!(admitted, upstream.seen().len());
        assert!(admitted <= 50, "{admitted} through {count} nodes");
        // On a busy machine Redis may miss the deadline. The nodes then deny requests.
        if replies.contains(&503) {
            println!("{count} nodes: Redis was lost during the burst, {admitted} of 50 admitted");
            continue;
        }
        assert_eq!(admitted, 50, "{count} nodes");
        for node in nodes.iter() {
            let is_up_to_date = async {
                loop {
                    let environment = node.settled().await;
                    let shared = &environment["shared"];
                    if (&environment["quotas"][0]["level"], &shared["up"], &shared["nodes"])
                        == (&0.into(), &true.into(), &count.into())
                    {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            soon("a node to report all nodes and an empty quota", is_up_to_date).await;
        }
    }
}

#[tokio::test]
async fn usage_of_one_node_is_visible_at_the_other_when_the_answer_has_arrived() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND_TOKENS, "").await;
    for n in 1..=9_i64 {
        assert_eq!(nodes[0].chat(&hello(r#""max_tokens":192"#)).await.status, 200);
        assert_eq!(nodes.levels().await, [1_000 - 100 * n; 2]);
    }
    // 100 tokens are left. A request for 101 is denied, one for 100 is admitted, and nothing fits after that.
    assert_eq!(
        nodes[1].chat(&hello(r#""max_tokens":93"#)).await.refusal(),
        (429, "insufficient_quota".into())
    );
    assert_eq!(nodes[1].chat(&hello(r#""max_tokens":92"#)).await.status, 200);
    for node in nodes.iter() {
        let denied = node.chat(&hello(r#""max_tokens":1"#)).await;
        assert_eq!(denied.refusal(), (429, "insufficient_quota".into()));
        assert_eq!(denied.json()["error"]["quotas"][0]["remaining"], 0);
        // Each node measures the spending of both nodes.
        let rate = node.environment().await["quotas"][0]["rate"].as_f64().unwrap();
        assert!((rate - 1_000.0 / 60.0).abs() < 1e-9, "{rate}");
    }
}

#[tokio::test]
async fn a_limit_set_at_one_node_applies_to_every_node_within_a_second() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 3, THOUSAND_TOKENS, "").await;
    assert_eq!(nodes[2].chat(&hello(r#""max_tokens":92"#)).await.status, 200);
    let admin = nodes[0].admin;
    let call = async |method: &str, path: &str, body: &str| {
        let mut caller = Caller::connect(admin).await;
        let path = format!("/api/environments/staging{path}");
        let length = body.len();
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: {admin}\r\ncontent-length: {length}\r\n\r\n{body}");
        caller.send(request.as_bytes()).await;
        let reply = caller.reply().await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        tokio::time::sleep(Duration::from_millis(900)).await;
    };
    let report = async || {
        let mut all = Vec::new();
        for node in nodes.iter() {
            let quota = node.environment().await["quotas"][0].clone();
            all.push(["burst", "level"].map(|field| quota[field].as_u64().unwrap()));
            all.push([u64::from(quota["source"] == "override"); 2]);
        }
        all
    };
    call("PUT", "/quotas/total_tokens/day", r#"{"limit":10,"burst":150}"#).await;
    assert_eq!(report().await, [[150, 50], [1, 1]].repeat(3));
    assert_eq!(nodes[1].chat(&hello(r#""max_tokens":92"#)).await.status, 429);
    call("POST", "/reset", "").await;
    assert_eq!(report().await, [[150, 150], [1, 1]].repeat(3));
    assert_eq!(nodes[1].chat(&hello(r#""max_tokens":92"#)).await.status, 200);
    call("DELETE", "/quotas/total_tokens/day", "").await;
    assert_eq!(report().await, [[1_000, 900], [0, 0]].repeat(3));
}

#[tokio::test]
async fn reservations_of_a_killed_node_are_charged_and_released() {
    let redis = Redis::start();
    let upstream = Upstream::answering(|_| Answer::silence()).await;
    let survivor = Gateway::from_config(&config(&redis, &upstream, 0, THOUSAND_TOKENS, "")).await;
    let text = config(&redis, &upstream, 1, THOUSAND_TOKENS, "");
    let killed_node = Process::of_config(&text).await;
    let mut callers = Vec::new();
    for _ in 0..3 {
        let mut caller = killed_node.caller().await;
        caller.request("POST", CHAT, "", hello(r#""max_tokens":92"#).as_bytes()).await;
        callers.push(caller);
    }
    upstream.wait_until_seen(3).await;
    let held = async || {
        let environment = survivor.environment().await;
        ["level", "held", "used"].map(|field| environment["quotas"][0][field].as_i64().unwrap())
    };
    assert_eq!(held().await, [700, 300, 0]);
    send_signal(&killed_node.id(), "KILL");
    let killed = tollgate::clock::Stopwatch::start();
    while held().await != [700, 0, 300] {
        assert!(killed.elapsed() < Duration::from_mins(1), "{:?}", held().await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(killed.elapsed() > Duration::from_secs(10), "a session ends only after its timeout");
    assert_eq!(survivor.environment().await["shared"]["nodes"], 1);
}

#[tokio::test]
async fn a_node_that_stops_leaves_no_session_and_no_reservation() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND_TOKENS, "").await;
    assert_eq!(nodes[0].chat(&hello(r#""max_tokens":92"#)).await.status, 200);
    let Nodes(mut nodes) = nodes;
    nodes.remove(0).shutdown().await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    let environment = nodes[0].environment().await;
    assert_eq!(
        (&environment["quotas"][0]["level"], &environment["shared"]["nodes"]),
        (&900.into(), &1.into())
    );
}

#[tokio::test]
async fn a_caller_that_disconnects_while_its_node_waits_for_redis_leaves_nothing_held() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 12)).await;
    let nodes = Nodes::start(
        &redis,
        &upstream,
        1,
        "{ total_tokens: { limit: 10, burst: 100000, per: day, window: rolling } }",
        "",
    )
    .await;
    for _ in 0..300 {
        let mut caller = nodes[0].caller().await;
        caller.request("POST", CHAT, "", hello(r#""max_tokens":12"#).as_bytes()).await;
        drop(caller);
    }
    // Redis may still reply to commands of disconnected callers. The node releases the reservations it admits.
    let mut last = String::new();
    let released = async {
        loop {
            let environment = nodes[0].environment().await;
            last = environment.to_string();
            let charged = environment["totals"]["total_tokens"].as_u64().unwrap();
            let quota = &environment["quotas"][0];
            if environment["in_flight"] == 0 && quota["held"] == 0 && quota["level"] == 100_000 - charged {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let released = tokio::time::timeout(EVENT_TIMEOUT, released).await;
    assert!(released.is_ok(), "still held: {last}");
}

#[tokio::test]
async fn leases_admit_without_calls_to_redis_and_never_over_admit() {
    const QUOTA: &str = "{ total_tokens: { limit: 10, burst: 40000, per: day, window: rolling } }";
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 12)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, QUOTA, "lease: true").await;
    // The quota admits 2,000 requests of 20 tokens each.
    let mut callers = tokio::task::JoinSet::new();
    for n in 0..20 {
        let address = nodes[n % nodes.len()].address;
        callers.spawn(async move {
            let mut admitted = 0;
            for _ in 0..120 {
                let mut caller = Caller::connect(address).await;
                caller.request("POST", CHAT, "", hello(r#""max_tokens":12"#).as_bytes()).await;
                let status = caller.reply().await.status;
                assert!(matches!(status, 200 | 429), "{status}");
                admitted += usize::from(status == 200);
            }
            admitted
        });
    }
    let admitted: usize = callers.join_all().await.into_iter().sum();
    assert!((1_960..=2_000).contains(&admitted), "{admitted} of 2000");
    assert_eq!(upstream.seen().len(), admitted);
    let calls = redis.calls("evalsha");
    println!("{calls} Redis calls for 2400 requests, {admitted} of them admitted");
    // Unused leases have been returned.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(nodes.levels().await, [40_000 - 20 * i64::try_from(admitted).unwrap(); 2]);
    let Nodes(mut nodes) = nodes;
    nodes.remove(0).shutdown().await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(nodes[0].environment().await["quotas"][0]["held"], 0);
}

#[tokio::test]
async fn the_limits_of_the_newest_config_file_apply_to_all_nodes() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let quota_of = |burst: u64| {
        format!("{{ total_tokens: {{ limit: 10, burst: {burst}, per: day, window: rolling }} }}")
    };
    // This config is not read from a file and therefore counts as older than any file.
    let old = Gateway::from_config(&config(&redis, &upstream, 0, &quota_of(1_000), "")).await;
    assert_eq!(old.chat(&hello(r#""max_tokens":92"#)).await.status, 200);
    let new = Process::of_config(&config(&redis, &upstream, 1, &quota_of(2_000), "")).await;
    let also_old = Gateway::from_config(&config(&redis, &upstream, 2, &quota_of(500), "")).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let expect = async |admin, burst: u64, level: u64| {
        let shown = gateway::admin_get_at(admin, "/api/environments").await.json();
        let quota = &shown["environments"][0]["quotas"][0];
        assert_eq!((&quota["burst"], &quota["level"]), (&burst.into(), &level.into()), "{quota}");
        assert_eq!(quota["source"], "file");
    };
    for admin in [old.admin, new.admin, also_old.admin] {
        expect(admin, 2_000, 1_900).await;
    }
    // When the newest config has gone, that of the node applies that started last.
    new.stop().await;
    tokio::time::sleep(Duration::from_millis(1_400)).await;
    for admin in [old.admin, also_old.admin] {
        expect(admin, 500, 400).await;
    }
}
