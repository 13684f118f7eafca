//! What each `on_failure` admits too much while many callers ask at once: Redis is lost in mid-load with half of the
//! quota left, and the load goes on until all of that is spent.

use super::Nodes;
use super::away::until;
use crate::support::redis::{Redis, signal};
use crate::support::*;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Each request reserves and is charged so many tokens.
const TOKENS: usize = 20;
/// Each node's callers. Each asks again as soon as it is answered.
const CALLERS: usize = 6;
/// The README allows for half a second between two times that a node hears how much is left, and that is also what a server
/// that keeps nothing on disk may lose. Under load a node hears at each reservation, so that this is generous, and still
/// less than a wrong share would make of it.
const SINCE_HEARD: Duration = Duration::from_millis(100);
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// It comes back with all that it has answered.
    Killed,
    KilledAndEmptied,
    Frozen,
}

/// When requests were admitted.
type Admissions = Arc<Mutex<Vec<Instant>>>;

/// Asks until nothing is left.
async fn asks(node: SocketAddr, admissions: Admissions) {
    loop {
        let mut caller = Caller::connect(node).await;
        caller.request("POST", CHAT, "", hello(r#""max_tokens":12"#).as_bytes()).await;
        let reply = caller.reply().await;
        if reply.status == 200 {
            admissions.lock().unwrap().push(Instant::now());
            continue;
        }
        match &*reply.code() {
            "insufficient_quota" => return,
            "quota_store_unavailable" => tokio::time::sleep(Duration::from_millis(20)).await,
            _ => panic!("{}", reply.text()),
        }
    }
}

fn load(nodes: &Nodes, admissions: &Admissions) -> JoinSet<()> {
    let mut callers = JoinSet::new();
    for node in nodes.iter() {
        for _ in 0..CALLERS {
            callers.spawn(asks(node.address, admissions.clone()));
        }
    }
    callers
}

/// Waits until every caller was told that nothing is left.
async fn all_are_denied(callers: JoinSet<()>) {
    tokio::time::timeout(Duration::from_mins(1), callers.join_all()).await.unwrap();
}

/// What came of it. All but the level are requests.
#[derive(Debug)]
struct Outcome {
    /// Admitted before Redis was lost; and shortly before that, with what was under way.
    before: usize,
    since_heard: usize,
    /// Admitted in all.
    admitted: usize,
    /// What all nodes have charged.
    charged: usize,
    /// What is left by Redis.
    level: i64,
    /// How often the nodes have lost Redis.
    losses: Vec<u64>,
}

impl Outcome {
    /// A machine that is too busy may lose Redis once more than it should: what is allowed then is allowed once more.
    fn times(&self) -> usize {
        self.losses.iter().max().map_or(1, |&times| usize::try_from(times).unwrap())
    }
}

impl Fault {
    fn server(self) -> Redis {
        // What is not synced to the disk is lost with the machine, not with the process.
        let disk = if self == Self::Killed { "--appendonly yes --appendfsync no" } else { "" };
        Redis::with(|_| disk.to_owned())
    }

    fn begins(self, redis: &mut Redis, process: &str) {
        match self {
            Self::Frozen => signal(process, "STOP"),
            Self::Killed | Self::KilledAndEmptied => redis.kill(),
        }
    }

    fn ends(self, redis: &mut Redis, process: &str) {
        match self {
            Self::Frozen => signal(process, "CONT"),
            Self::Killed | Self::KilledAndEmptied => redis.start_again(),
        }
    }
}

/// One round, with a quota of so many requests.
async fn round(policy: &str, limit: usize, nodes: u32, fault: Fault) -> Outcome {
    let mut redis = fault.server();
    let upstream = Upstream::always(Answer::chat(8, 12)).await;
    let quota =
        format!("{{ total_tokens: {{ limit: 10, burst: {}, per: day, window: rolling }} }}", limit * TOKENS);
    let nodes = Nodes::start(&redis, &upstream, nodes, &quota, &format!("on_failure: {policy}")).await;
    until(&nodes, true).await;
    let process = redis.process();
    let admissions = Admissions::default();
    let mut callers = load(&nodes, &admissions);
    while admissions.lock().unwrap().len() < limit / 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    let lost = Instant::now();
    let within = |time: Duration| {
        let admissions = admissions.lock().unwrap();
        admissions.iter().filter(|&&at| at <= lost && lost.duration_since(at) <= time).count()
    };
    fault.begins(&mut redis, &process);
    let under_way = CALLERS * nodes.len();
    let (before, since_heard) = (within(Duration::MAX), within(SINCE_HEARD) + under_way);
    if policy == "closed" {
        // A node that lets nothing through denies nobody for good.
        tokio::time::sleep(Duration::from_secs(1)).await;
    } else {
        all_are_denied(std::mem::take(&mut callers)).await;
    }
    fault.ends(&mut redis, &process);
    until(&nodes, true).await;
    all_are_denied(callers).await;
    // What was left over: shares are rounded down.
    all_are_denied(load(&nodes, &admissions)).await;

    let mut charged = 0;
    for node in nodes.iter() {
        charged += usize::try_from(node.settled_charges().await[0]).unwrap();
    }
    let admitted = admissions.lock().unwrap().len();
    assert_eq!((admitted, charged), (upstream.seen().len(), admitted));
    // Who was without Redis when it was asked has lost it once more, and that counts.
    let level = nodes[0].environment().await["quotas"][0]["level"].as_i64().unwrap();
    let losses = nodes.losses().await;
    Outcome { before, since_heard, admitted, charged, level, losses }
}

/// One policy with two and four nodes, under each fault. `most`: what may be admitted in all.
async fn holds(policy: &str, limit: usize, most: impl Fn(usize, &Outcome) -> usize) {
    for nodes in [2, 4] {
        for fault in [Fault::Killed, Fault::KilledAndEmptied, Fault::Frozen] {
            let what = format!("{policy}, {nodes} nodes, {fault:?}");
            let outcome = round(policy, limit, nodes, fault).await;
            let over = outcome.admitted.saturating_sub(limit);
            // More of the limit is left in Redis than the nodes have charged.
            let left = i64::try_from(limit).unwrap() - i64::try_from(outcome.charged).unwrap();
            let forgotten = outcome.level - left * i64::try_from(TOKENS).unwrap();
            println!("{what}: {over} over, {forgotten} tokens forgotten, {outcome:?}");
            let most = most(usize::try_from(nodes).unwrap(), &outcome);
            assert!(outcome.admitted <= most, "{what}: at most {most}, {outcome:?}");
            // A server that keeps nothing may have taken note of what it could not confirm any more, and others have heard of it.
            let twice = if fault == Fault::KilledAndEmptied { outcome.since_heard * TOKENS } else { 0 };
            let allowed = -i64::try_from(twice).unwrap()..=0;
            assert!(allowed.contains(&forgotten), "{what}: {forgotten}, {outcome:?}");
        }
    }
}

#[tokio::test]
async fn local_admits_too_much_what_others_had_reserved_since_a_node_last_heard() {
    const LIMIT: usize = 4_000;
    holds("local", LIMIT, |_, outcome| LIMIT + outcome.times() * outcome.since_heard).await;
}

#[tokio::test]
async fn closed_admits_nothing_too_much() {
    const LIMIT: usize = 3_000;
    holds("closed", LIMIT, |_, _| LIMIT).await;
}

#[tokio::test]
async fn open_admits_the_limit_once_for_each_node() {
    const LIMIT: usize = 1_000;
    // Each caller may have been admitted once more than it had read of.
    let most = |nodes, outcome: &Outcome| outcome.before + outcome.times() * nodes * (CALLERS + LIMIT);
    holds("open", LIMIT, most).await;
}
