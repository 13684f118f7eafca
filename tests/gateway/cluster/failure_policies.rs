//! Each `on_failure` policy under each fault of Redis. Two nodes share a quota of 1,000 tokens, of which 300 are spent
//! when the fault begins.

use super::Nodes;
use super::outages::{THOUSAND_TOKENS, count_admitted, wait_until_shared};
use crate::support::proxy::{Mode, Proxy};
use crate::support::redis::{Redis, send_signal};
use crate::support::*;
use std::time::Duration;
use tollgate::clock::Stopwatch;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The server is killed and restarted without its data.
    Killed,
    /// The process is stopped by a signal. After the fault it processes the commands that arrived during it.
    Frozen,
    /// `FLUSHALL`: the server is available and has no session.
    Flushed,
    /// The master is killed, and a sentinel makes its replica the master.
    FailedOver,
    /// The network delays everything by 100 ms in each direction, and the timeout is shorter.
    Slow,
    /// No memory is left for writes, and nothing may be evicted.
    Full,
    /// The network drops everything.
    Silent,
    /// Existing connections drop everything without being closed. New connections work.
    HalfOpen,
}

struct Policy {
    name: &'static str,
    /// Status and text of `/readyz` during the fault.
    ready: (u16, &'static str),
    /// The error code of requests that are denied during the fault.
    code: &'static str,
    /// How many of twelve requests each node admits during the fault.
    admits: usize,
}

const POLICIES: [Policy; 3] = [
    Policy {
        name: "local",
        ready: (200, "this node admits from its share of the last known levels"),
        code: "insufficient_quota",
        admits: 3,
    },
    Policy {
        name: "closed",
        ready: (503, "this node admits no request"),
        code: "quota_store_unavailable",
        admits: 0,
    },
    Policy {
        name: "open",
        ready: (200, "this node admits up to the whole limits"),
        code: "insufficient_quota",
        admits: 10,
    },
];

/// Bound for the first request. A node waits for Redis 310 ms, or up to 550 ms on a busy machine; the rest is for HTTP.
const MAX_FIRST_REQUEST: Duration = Duration::from_millis(800);
/// Bound for the recovery: two seconds, and one more for a busy machine.
const MAX_RECOVERY: Duration = Duration::from_secs(3);
/// A node that has lost Redis stays offline for at least this time.
const MIN_OFFLINE: Duration = Duration::from_millis(450);
/// Duration of a fault. Attempts to reconnect fail until it ends.
const FAULT_TIME: Duration = Duration::from_secs(1);
/// Within this time each node sends a heartbeat and receives the state of all quotas.
const HEARTBEAT_TIME: Duration = Duration::from_millis(700);

impl Fault {
    /// Whether the fault has no duration.
    fn is_momentary(self) -> bool {
        matches!(self, Self::Flushed | Self::HalfOpen)
    }
}

/// A Redis server and the means to inject one fault.
struct Scene {
    fault: Fault,
    redis: Redis,
    proxy: Proxy,
    /// The replica and the sentinel, for a failover only.
    replica_and_sentinel: Option<(Redis, Redis)>,
}

/// Waits until a condition holds. The check may block.
async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    soon(what, async {
        while !tokio::task::block_in_place(&condition) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// Starts a replica, and a sentinel that makes it the master when the master fails.
async fn add_replica_and_sentinel(redis: &mut Redis) -> (Redis, Redis) {
    let master = redis.port;
    let replica = Redis::with(|_| format!("--replicaof 127.0.0.1 {master}"));
    redis.admin("CONFIG SET repl-diskless-sync-delay 0");
    wait_for("replication", || replica.info("replication", "master_link_status").unwrap() == "up").await;
    let sentinel = Redis::with(|folder| {
        let config = format!(
            "sentinel monitor quotas 127.0.0.1 {master} 1\nsentinel down-after-milliseconds quotas 500\n\
             sentinel failover-timeout quotas 3000\n"
        );
        let file = folder.join("sentinel.conf");
        std::fs::write(&file, config).unwrap();
        format!("{} --sentinel", file.display())
    });
    wait_for("the sentinel", || sentinel.info("sentinel", "master0").unwrap().contains("slaves=1")).await;
    redis.url = format!("redis+sentinel://127.0.0.1:{}/quotas", sentinel.port);
    (replica, sentinel)
}

impl Scene {
    async fn start(fault: Fault) -> Self {
        let mut redis = Redis::start();
        let proxy = Proxy::start(&redis.socket()).await;
        let replica_and_sentinel =
            if fault == Fault::FailedOver { Some(add_replica_and_sentinel(&mut redis).await) } else { None };
        if matches!(fault, Fault::Slow | Fault::Silent | Fault::HalfOpen) {
            redis.url = proxy.url();
        }
        Self { fault, redis, proxy, replica_and_sentinel }
    }

    /// Waits until nodes and replica have received everything.
    async fn settle(&self) {
        tokio::time::sleep(HEARTBEAT_TIME).await;
        let Some((replica, _)) = &self.replica_and_sentinel else { return };
        let offset =
            |server: &Redis, name| -> u64 { server.info("replication", name).unwrap().parse().unwrap() };
        let sent = offset(&self.redis, "master_repl_offset");
        wait_for("the replica", || offset(replica, "slave_repl_offset") >= sent).await;
    }

    fn start_fault(&mut self) {
        match self.fault {
            Fault::Killed | Fault::FailedOver => self.redis.kill(),
            Fault::Frozen => send_signal(&self.redis.process_id(), "STOP"),
            Fault::Flushed => drop(self.redis.admin("FLUSHALL")),
            Fault::Slow => self.proxy.set(Mode::Slow),
            Fault::Full => drop(self.redis.admin("CONFIG SET maxmemory 1")),
            Fault::Silent => self.proxy.set(Mode::Silent),
            Fault::HalfOpen => self.proxy.make_half_open(),
        }
    }

    async fn end_fault(&mut self, process: &str) {
        match self.fault {
            Fault::Killed => tokio::task::block_in_place(|| self.redis.restart()),
            Fault::Frozen => send_signal(process, "CONT"),
            Fault::FailedOver => {
                let (replica, _) = self.replica_and_sentinel.as_ref().unwrap();
                wait_for("the failover", || replica.info("replication", "role").unwrap() == "master").await;
            }
            Fault::Slow => self.proxy.set(Mode::Through),
            Fault::Silent => {
                self.proxy.make_half_open();
                self.proxy.set(Mode::Through);
            }
            Fault::Full => drop(self.redis.admin("CONFIG SET maxmemory 0")),
            Fault::Flushed | Fault::HalfOpen => {}
        }
    }
}

/// Starts two nodes that have spent 300 tokens. A busy machine may lose Redis before the fault; then this starts again.
async fn start_nodes(fault: Fault, upstream: &Upstream, policy: &Policy) -> (Scene, Nodes) {
    for _ in 0..10 {
        let (scene, seen) = (Scene::start(fault).await, upstream.seen().len());
        let timeout = if fault == Fault::Slow { "timeout: 100ms, " } else { "" };
        let more = format!("{timeout}on_failure: {}", policy.name);
        let nodes = Nodes::start(&scene.redis, upstream, 2, THOUSAND_TOKENS, &more).await;
        wait_until_shared(&nodes, true).await;
        let [one, other] = [&nodes[0], &nodes[1]];
        let count = count_admitted(one, 2, policy.code).await + count_admitted(other, 1, policy.code).await;
        scene.settle().await;
        let levels = nodes.levels().await;
        if nodes.losses().await == [0, 0] {
            assert_eq!((count, levels, upstream.seen().len()), (3, vec![700, 700], seen + 3));
            return (scene, nodes);
        }
        println!("{fault:?}, {}: Redis was lost before the fault", policy.name);
    }
    panic!("Redis was lost before the fault in every attempt");
}

/// Sends twelve requests to a node that has lost Redis, and checks its reports. Returns how many it admitted, and how
/// long the first request took.
async fn send_without_redis(node: &Gateway, policy: &Policy) -> (usize, Duration) {
    let clock = Stopwatch::start();
    let mut count = count_admitted(node, 1, policy.code).await;
    let first = clock.elapsed();
    let ready = node.admin_get("/readyz").await;
    let (status, words) = policy.ready;
    assert_eq!(ready.status, status, "{}", ready.text());
    assert!(ready.text().contains(&format!("staging: Redis is unavailable, {words}: ")), "{}", ready.text());
    let shared = &node.environment().await["shared"];
    assert_eq!(shared["up"], false);
    assert!(!shared["reason"].as_str().unwrap_or_default().is_empty(), "{shared}");
    count += count_admitted(node, 11, policy.code).await;
    (count, first)
}

/// Tests one fault under one policy. Returns the measured times.
async fn test_policy(fault: Fault, policy: &Policy) -> String {
    let what = format!("{fault:?}, {}", policy.name);
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let (mut scene, nodes) = start_nodes(fault, &upstream, policy).await;
    let seen = upstream.seen().len();
    let process = scene.redis.process_id();
    let clock = Stopwatch::start();
    scene.start_fault();
    let (one, other) =
        tokio::join!(send_without_redis(&nodes[0], policy), send_without_redis(&nodes[1], policy));
    let (first, admits) = (one.1.max(other.1), [one.0, other.0]);
    // On a slow machine a momentary fault may be over before the last request.
    if !fault.is_momentary() || clock.elapsed() < MIN_OFFLINE {
        assert_eq!(admits, [policy.admits; 2], "{what}");
    }
    assert!(first < MAX_FIRST_REQUEST, "{what}: the first call took {first:?}");
    if !fault.is_momentary() {
        tokio::time::sleep(FAULT_TIME).await;
        for node in nodes.iter() {
            assert_eq!(node.environment().await["shared"]["up"], false, "{what}");
            assert_eq!(count_admitted(node, 1, policy.code).await, 0, "{what}");
        }
    }
    scene.end_fault(&process).await;
    let recovery = wait_until_shared(&nodes, true).await;
    assert!(recovery < MAX_RECOVERY, "{what}: shared again after {recovery:?}");
    assert_eq!(nodes[1].admin_get("/readyz").await.status, 200, "{what}");

    // Both nodes have reported all usage during the fault. Together they admit exactly the rest.
    let during_fault = admits[0] + admits[1];
    let level = 700 - 100 * i64::try_from(during_fault).unwrap();
    assert_eq!(nodes.levels().await, [level, level], "{what}");
    let (one, other) = tokio::join!(
        count_admitted(&nodes[0], 8, "insufficient_quota"),
        count_admitted(&nodes[1], 8, "insufficient_quota")
    );
    let after = one + other;
    assert_eq!(after, usize::try_from(level.max(0) / 100).unwrap(), "{what}");
    assert_eq!(nodes.levels().await, [level.min(0); 2], "{what}");
    assert_eq!(upstream.seen().len(), seen + during_fault + after, "{what}");
    for node in nodes.iter() {
        node.settled().await;
    }
    format!("{what}: {admits:?} admitted, the first call took {first:?}, shared again after {recovery:?}")
}

/// Tests one fault under all policies in parallel.
async fn test_all_policies(fault: Fault) {
    let mut tests = tokio::task::JoinSet::new();
    for policy in &POLICIES {
        tests.spawn(test_policy(fault, policy));
    }
    println!("{}", tests.join_all().await.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn policies_hold_when_redis_is_killed_and_restarts_empty() {
    test_all_policies(Fault::Killed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn policies_hold_when_redis_is_frozen() {
    test_all_policies(Fault::Frozen).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn policies_hold_when_redis_is_flushed() {
    test_all_policies(Fault::Flushed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn policies_hold_when_redis_fails_over_to_a_replica() {
    test_all_policies(Fault::FailedOver).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn policies_hold_when_redis_is_slow() {
    test_all_policies(Fault::Slow).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn policies_hold_when_redis_is_out_of_memory() {
    test_all_policies(Fault::Full).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn policies_hold_when_the_network_drops_everything() {
    test_all_policies(Fault::Silent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn policies_hold_when_connections_are_half_open() {
    test_all_policies(Fault::HalfOpen).await;
}

/// After `SCRIPT FLUSH` every call succeeds, and no node loses Redis.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_script_flush_does_not_cause_an_outage() {
    for policy in &POLICIES {
        let upstream = Upstream::always(Answer::chat(8, 92)).await;
        // No fault is injected, so the choice of the fault has no effect.
        let (scene, nodes) = start_nodes(Fault::Full, &upstream, policy).await;
        let mut count = 3;
        for n in 0..10 {
            scene.redis.admin("SCRIPT FLUSH");
            count += count_admitted(&nodes[n % 2], 1, "insufficient_quota").await;
        }
        assert_eq!(count, 10, "{}", policy.name);
        assert_eq!(nodes.levels().await, [0, 0], "{}", policy.name);
        assert_eq!(nodes.losses().await, [0, 0], "{}", policy.name);
        for node in nodes.iter() {
            assert_eq!(node.settled().await["shared"]["up"], true);
        }
    }
}
