//! What each `on_failure` promises, for whatever befalls Redis: two nodes with one quota of a thousand tokens, of which
//! three hundred are spent when it is lost.

use super::Nodes;
use super::away::{THOUSAND, admitted, until};
use crate::support::proxy::{Mode, Proxy};
use crate::support::redis::{Redis, signal};
use crate::support::*;
use std::time::Duration;
use tollgate::clock::Stopwatch;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// It is killed, and started again without its data.
    Killed,
    /// Stopped as by a debugger, and let go on with what it was sent meanwhile.
    Frozen,
    /// `FLUSHALL`: it is there all the time, and knows nobody.
    Emptied,
    /// The master is killed, and sentinels make its replica the master.
    FailedOver,
    /// 100 ms each way.
    Slow,
    /// There is no memory left for a write, and nothing may be evicted.
    Full,
    /// The network swallows everything.
    Silent,
    /// The connections of before lead nowhere, and nobody has told; new ones are good.
    HalfOpen,
}

struct Policy {
    name: &'static str,
    /// What `/readyz` says while Redis is away.
    ready: (u16, &'static str),
    /// What a request is told that is not admitted then.
    code: &'static str,
    /// How many of twelve requests each node admits.
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

/// No call is waited for longer than 35 ms; here it is a whole HTTP call, on a busy machine.
const FIRST: Duration = Duration::from_millis(250);
/// Two seconds, on a busy machine.
const BACK: Duration = Duration::from_secs(3);
/// A node that has lost Redis does without for so long at least.
const PAUSE: Duration = Duration::from_millis(400);
/// A fault lasts for so long: nodes try to come back meanwhile, in vain.
const LASTS: Duration = Duration::from_secs(1);
/// Within this time each node has heard how the quotas stand.
const BEAT: Duration = Duration::from_millis(700);

impl Fault {
    /// It is over when it has begun.
    fn is_short(self) -> bool {
        matches!(self, Self::Emptied | Self::HalfOpen)
    }
}

/// A Redis and what makes it fail.
struct Scene {
    fault: Fault,
    redis: Redis,
    proxy: Proxy,
    /// The replica and its sentinel.
    others: Option<(Redis, Redis)>,
}

/// Waits until something is so, asking without holding up others.
async fn comes(what: &str, is_so: impl Fn() -> bool) {
    soon(what, async {
        while !tokio::task::block_in_place(&is_so) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// A replica, and a sentinel that makes it the master when that is gone.
async fn watched(redis: &mut Redis) -> (Redis, Redis) {
    let master = redis.port;
    let replica = Redis::with(|_| format!("--replicaof 127.0.0.1 {master}"));
    redis.admin("CONFIG SET repl-diskless-sync-delay 0");
    comes("replication", || replica.info("replication", "master_link_status").unwrap() == "up").await;
    let sentinel = Redis::with(|folder| {
        let config = format!(
            "sentinel monitor quotas 127.0.0.1 {master} 1\nsentinel down-after-milliseconds quotas 500\n\
             sentinel failover-timeout quotas 3000\n"
        );
        let file = folder.join("sentinel.conf");
        std::fs::write(&file, config).unwrap();
        format!("{} --sentinel", file.display())
    });
    comes("the sentinel", || sentinel.info("sentinel", "master0").unwrap().contains("slaves=1")).await;
    redis.url = format!("redis+sentinel://127.0.0.1:{}/quotas", sentinel.port);
    (replica, sentinel)
}

impl Scene {
    async fn start(fault: Fault) -> Self {
        let mut redis = Redis::start();
        let proxy = Proxy::start(&redis.socket()).await;
        let others = if fault == Fault::FailedOver { Some(watched(&mut redis).await) } else { None };
        if matches!(fault, Fault::Slow | Fault::Silent | Fault::HalfOpen) {
            redis.url = proxy.url();
        }
        Self { fault, redis, proxy, others }
    }

    /// Nodes have heard of everything, and so has a replica.
    async fn rests(&self) {
        tokio::time::sleep(BEAT).await;
        let Some((replica, _)) = &self.others else { return };
        let offset =
            |server: &Redis, name| -> u64 { server.info("replication", name).unwrap().parse().unwrap() };
        let sent = offset(&self.redis, "master_repl_offset");
        comes("the replica", || offset(replica, "slave_repl_offset") >= sent).await;
    }

    fn begins(&mut self) {
        match self.fault {
            Fault::Killed | Fault::FailedOver => self.redis.kill(),
            Fault::Frozen => signal(&self.redis.process(), "STOP"),
            Fault::Emptied => drop(self.redis.admin("FLUSHALL")),
            Fault::Slow => self.proxy.set(Mode::Slow),
            Fault::Full => drop(self.redis.admin("CONFIG SET maxmemory 1")),
            Fault::Silent => self.proxy.set(Mode::Silent),
            Fault::HalfOpen => self.proxy.make_half_open(),
        }
    }

    async fn ends(&mut self, process: &str) {
        match self.fault {
            Fault::Killed => tokio::task::block_in_place(|| self.redis.start_again()),
            Fault::Frozen => signal(process, "CONT"),
            Fault::FailedOver => {
                let (replica, _) = self.others.as_ref().unwrap();
                comes("the failover", || replica.info("replication", "role").unwrap() == "master").await;
            }
            Fault::Slow => self.proxy.set(Mode::Through),
            Fault::Silent => {
                self.proxy.make_half_open();
                self.proxy.set(Mode::Through);
            }
            Fault::Full => drop(self.redis.admin("CONFIG SET maxmemory 0")),
            Fault::Emptied | Fault::HalfOpen => {}
        }
    }
}

/// Two nodes that have spent three hundred tokens. A machine that is too busy may lose Redis already, and then it is begun
/// anew.
async fn begun(fault: Fault, upstream: &Upstream, policy: &Policy) -> (Scene, Nodes) {
    for _ in 0..10 {
        let (scene, seen) = (Scene::start(fault).await, upstream.seen().len());
        let more = format!("on_failure: {}", policy.name);
        let nodes = Nodes::start(&scene.redis, upstream, 2, THOUSAND, &more).await;
        until(&nodes, true).await;
        let [one, other] = [&nodes[0], &nodes[1]];
        let count = admitted(one, 2, policy.code).await + admitted(other, 1, policy.code).await;
        scene.rests().await;
        let levels = nodes.levels().await;
        if nodes.losses().await == [0, 0] {
            assert_eq!((count, levels, upstream.seen().len()), (3, vec![700, 700], seen + 3));
            return (scene, nodes);
        }
        println!("{fault:?}, {}: Redis was lost too early", policy.name);
    }
    panic!("Redis is always lost too early");
}

/// Twelve requests at a node that has lost Redis, and what it says of itself. Returns how many it admitted, and how long
/// the first has taken.
async fn without_redis(node: &Gateway, policy: &Policy) -> (usize, Duration) {
    let clock = Stopwatch::start();
    let mut count = admitted(node, 1, policy.code).await;
    let first = clock.elapsed();
    let ready = node.admin_get("/readyz").await;
    let (status, says) = policy.ready;
    assert_eq!(ready.status, status, "{}", ready.text());
    assert!(ready.text().contains(&format!("staging: Redis is unavailable, {says}: ")), "{}", ready.text());
    let shared = &node.environment().await["shared"];
    assert_eq!(shared["up"], false);
    assert!(!shared["reason"].as_str().unwrap_or_default().is_empty(), "{shared}");
    count += admitted(node, 11, policy.code).await;
    (count, first)
}

/// One fault under one policy: tells what it has measured.
async fn holds(fault: Fault, policy: &Policy) -> String {
    let what = format!("{fault:?}, {}", policy.name);
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let (mut scene, nodes) = begun(fault, &upstream, policy).await;
    let seen = upstream.seen().len();
    let process = scene.redis.process();
    let clock = Stopwatch::start();
    scene.begins();
    let (one, other) = tokio::join!(without_redis(&nodes[0], policy), without_redis(&nodes[1], policy));
    let (first, admits) = (one.1.max(other.1), [one.0, other.0]);
    // Who is slow finds that a short fault is over.
    if !fault.is_short() || clock.elapsed() < PAUSE {
        assert_eq!(admits, [policy.admits; 2], "{what}");
    }
    assert!(first < FIRST, "{what}: the first call took {first:?}");
    if !fault.is_short() {
        tokio::time::sleep(LASTS).await;
        for node in nodes.iter() {
            assert_eq!(node.environment().await["shared"]["up"], false, "{what}");
            assert_eq!(admitted(node, 1, policy.code).await, 0, "{what}");
        }
    }
    scene.ends(&process).await;
    let back = until(&nodes, true).await;
    assert!(back < BACK, "{what}: back after {back:?}");
    assert_eq!(nodes[1].admin_get("/readyz").await.status, 200, "{what}");

    // What was spent meanwhile is known to all; what is left is admitted, and not a token more.
    let meanwhile = admits[0] + admits[1];
    let level = 700 - 100 * i64::try_from(meanwhile).unwrap();
    assert_eq!(nodes.levels().await, [level, level], "{what}");
    let (one, other) = tokio::join!(
        admitted(&nodes[0], 8, "insufficient_quota"),
        admitted(&nodes[1], 8, "insufficient_quota")
    );
    let after = one + other;
    assert_eq!(after, usize::try_from(level.max(0) / 100).unwrap(), "{what}");
    assert_eq!(nodes.levels().await, [level.min(0); 2], "{what}");
    assert_eq!(upstream.seen().len(), seen + meanwhile + after, "{what}");
    for node in nodes.iter() {
        node.settled().await;
    }
    format!("{what}: {admits:?} admitted, the first call took {first:?}, shared again after {back:?}")
}

/// One fault under each policy, side by side.
async fn holds_for_all(fault: Fault) {
    let mut cells = tokio::task::JoinSet::new();
    for policy in &POLICIES {
        cells.spawn(holds(fault, policy));
    }
    println!("{}", cells.join_all().await.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn killed_and_started_again_empty() {
    holds_for_all(Fault::Killed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn frozen_and_thawed() {
    holds_for_all(Fault::Frozen).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn emptied_while_it_runs() {
    holds_for_all(Fault::Emptied).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn failed_over_to_a_replica() {
    holds_for_all(Fault::FailedOver).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn slow_by_a_hundred_milliseconds() {
    holds_for_all(Fault::Slow).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn out_of_memory() {
    holds_for_all(Fault::Full).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn cut_off_without_a_word() {
    holds_for_all(Fault::Silent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn half_open_connections() {
    holds_for_all(Fault::HalfOpen).await;
}

/// Scripts that are forgotten are no outage: each call is made, and nothing is said of a loss.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn scripts_that_are_forgotten_are_no_outage() {
    for policy in &POLICIES {
        let upstream = Upstream::always(Answer::chat(8, 92)).await;
        // Whichever fault, as it does not begin.
        let (scene, nodes) = begun(Fault::Full, &upstream, policy).await;
        let mut count = 3;
        for n in 0..10 {
            scene.redis.admin("SCRIPT FLUSH");
            count += admitted(&nodes[n % 2], 1, "insufficient_quota").await;
        }
        assert_eq!(count, 10, "{}", policy.name);
        assert_eq!(nodes.levels().await, [0, 0], "{}", policy.name);
        assert_eq!(nodes.losses().await, [0, 0], "{}", policy.name);
        for node in nodes.iter() {
            assert_eq!(node.settled().await["shared"]["up"], true);
        }
    }
}
