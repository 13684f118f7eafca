//! How much each `on_failure` policy over-admits under load on a busy machine. Redis is lost when half of the quota is
//! left, and the load continues until all of it is spent. All cores are kept busy meanwhile.

use super::Nodes;
use super::outages::wait_until_shared;
use crate::support::redis::{Redis, send_signal};
use crate::support::*;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Tokens that each request reserves and is charged.
const TOKENS: usize = 20;
/// Callers of each node. Each sends its next request when the answer to the last one arrives.
const CALLERS: usize = 6;
/// A server without a disk may have applied what nodes reported within this time before it was killed, without having
/// confirmed it.
const MAX_UNCONFIRMED_TIME: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The server restarts with everything that it has confirmed.
    Killed,
    /// The server restarts without data.
    KilledAndEmptied,
    Frozen,
}

/// An admitted request.
#[derive(Clone, Copy, Debug)]
struct AdmittedRequest {
    node: usize,
    begun: Instant,
    ended: Instant,
}

type Admissions = Arc<Mutex<Vec<AdmittedRequest>>>;

/// Threads that keep all cores busy.
struct BusyCores(Arc<AtomicBool>);

impl BusyCores {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for _ in 0..std::thread::available_parallelism().unwrap().get() {
            let stop = stop.clone();
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        Self(stop)
    }
}

impl Drop for BusyCores {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends requests until the quota is exhausted.
async fn send_until_exhausted(number: usize, node: SocketAddr, admissions: Admissions) {
    loop {
        let begun = Instant::now();
        let mut caller = Caller::connect(node).await;
        caller.request("POST", CHAT, "", hello(r#""max_tokens":12"#).as_bytes()).await;
        let reply = caller.reply().await;
        if reply.status == 200 {
            let ended = Instant::now();
            admissions.lock().unwrap().push(AdmittedRequest { node: number, begun, ended });
            continue;
        }
        match &*reply.code() {
            "insufficient_quota" => return,
            "quota_store_unavailable" => tokio::time::sleep(Duration::from_millis(20)).await,
            _ => panic!("{}", reply.text()),
        }
    }
}

fn spawn_callers(nodes: &Nodes, admissions: &Admissions) -> JoinSet<()> {
    let mut callers = JoinSet::new();
    for (number, node) in nodes.iter().enumerate() {
        for _ in 0..CALLERS {
            callers.spawn(send_until_exhausted(number, node.address, admissions.clone()));
        }
    }
    callers
}

/// The documented bound of the `local` policy: what other nodes reserved after a node last received the levels. A node
/// receives them with each of its own reservations. Its share is its part of these levels, so this is the mean over
/// all nodes. The fault began after `before` and was in effect at `since`.
fn reserved_after_last_levels(
    admissions: &[AdmittedRequest],
    nodes: usize,
    before: Instant,
    since: Instant,
) -> usize {
    let others = |node: usize| {
        let own = admissions.iter().filter(|request| request.node == node && request.ended <= before);
        let received = own.map(|request| request.begun).max();
        let is_later = |request: &&AdmittedRequest| {
            request.node != node
                && request.begun <= since
                && received.is_none_or(|received| request.ended >= received)
        };
        admissions.iter().filter(is_later).count()
    };
    (0..nodes).map(others).sum::<usize>().div_ceil(nodes)
}

/// Waits until every caller has found the quota exhausted.
async fn wait_until_exhausted(callers: JoinSet<()>) {
    tokio::time::timeout(Duration::from_mins(1), callers.join_all()).await.unwrap();
}

/// The result of one round. All numbers except the level are numbers of requests.
#[derive(Debug)]
struct Outcome {
    /// Admitted before the fault.
    before: usize,
    /// The bound of the `local` policy for one loss.
    unknown: usize,
    /// Admitted shortly before the fault, plus requests in flight.
    unconfirmed: usize,
    /// Admitted in total.
    admitted: usize,
    /// Charged by all nodes.
    charged: usize,
    /// Tokens left in Redis.
    level: i64,
    /// How often the nodes have lost Redis.
    losses: Vec<u64>,
}

impl Outcome {
    /// The number of losses. A busy machine may lose Redis more than once, and each loss permits the same excess.
    fn losses(&self) -> usize {
        self.losses.iter().max().map_or(1, |&times| usize::try_from(times).unwrap())
    }
}

impl Fault {
    fn start_server(self) -> Redis {
        // Without fsync, data survives the death of the process, but not of the machine.
        let disk = if self == Self::Killed { "--appendonly yes --appendfsync no" } else { "" };
        Redis::with(|_| disk.to_owned())
    }

    fn start(self, redis: &mut Redis, process: &str) {
        match self {
            Self::Frozen => send_signal(process, "STOP"),
            Self::Killed | Self::KilledAndEmptied => redis.kill(),
        }
    }

    fn end(self, redis: &mut Redis, process: &str) {
        match self {
            Self::Frozen => send_signal(process, "CONT"),
            Self::Killed | Self::KilledAndEmptied => redis.restart(),
        }
    }
}

/// Runs one round with a quota for `limit` requests. `None`: on this busy machine, a node lost Redis before the fault, so
/// the bounds do not apply.
async fn run_round(policy: &str, limit: usize, nodes: u32, fault: Fault) -> Option<Outcome> {
    let mut redis = fault.start_server();
    let upstream = Upstream::always(Answer::chat(8, 12)).await;
    let quota =
        format!("{{ total_tokens: {{ limit: 10, burst: {}, per: day, window: rolling }} }}", limit * TOKENS);
    let nodes = Nodes::start(&redis, &upstream, nodes, &quota, &format!("on_failure: {policy}")).await;
    wait_until_shared(&nodes, true).await;
    let process = redis.process_id();
    let admissions = Admissions::default();
    let mut callers = spawn_callers(&nodes, &admissions);
    while admissions.lock().unwrap().len() < limit / 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    if nodes.losses().await.iter().any(|&losses| losses > 0) {
        return None;
    }

    let fault_start = Instant::now();
    let within = |time: Duration| {
        let admissions = admissions.lock().unwrap();
        let times = admissions.iter().map(|request| request.ended).filter(|&at| at <= fault_start);
        times.filter(|&at| fault_start.duration_since(at) <= time).count()
    };
    fault.start(&mut redis, &process);
    let fault_in_effect = Instant::now();
    let in_flight = CALLERS * nodes.len();
    let (before, unconfirmed) = (within(Duration::MAX), within(MAX_UNCONFIRMED_TIME) + in_flight);
    if policy == "closed" {
        // Denials of the closed policy are temporary, so the callers do not stop.
        tokio::time::sleep(Duration::from_millis(500)).await;
    } else {
        wait_until_exhausted(std::mem::take(&mut callers)).await;
    }
    fault.end(&mut redis, &process);
    wait_until_shared(&nodes, true).await;
    wait_until_exhausted(callers).await;
    // Shares are rounded down. This spends the rest.
    wait_until_exhausted(spawn_callers(&nodes, &admissions)).await;

    let mut charged = 0;
    for node in nodes.iter() {
        charged += usize::try_from(node.settled_charges().await[0]).unwrap();
    }
    let admissions = admissions.lock().unwrap().clone();
    let admitted = admissions.len();
    assert_eq!((admitted, charged), (upstream.seen().len(), admitted));
    let unknown = reserved_after_last_levels(&admissions, nodes.len(), fault_start, fault_in_effect);
    // A request without Redis counts as a further loss, so the losses are read last.
    let level = nodes[0].environment().await["quotas"][0]["level"].as_i64().unwrap();
    let losses = nodes.losses().await;
    Some(Outcome { before, unknown, unconfirmed, admitted, charged, level, losses })
}

/// Tests one policy with two and four nodes under each fault. `max_admitted`: the bound for all admissions.
async fn test_policy(policy: &str, limit: usize, max_admitted: impl Fn(usize, &Outcome) -> usize) {
    let _busy = BusyCores::start();
    for nodes in [2, 4] {
        for fault in [Fault::Killed, Fault::KilledAndEmptied, Fault::Frozen] {
            let what = format!("{policy}, {nodes} nodes, {fault:?}");
            let begun = Instant::now();
            let outcome = loop {
                if let Some(outcome) = run_round(policy, limit, nodes, fault).await {
                    break outcome;
                }
                assert!(begun.elapsed() < Duration::from_mins(1), "{what}: nodes lose Redis without a fault");
            };
            let over = outcome.admitted.saturating_sub(limit);
            // Positive if Redis has not charged everything that the nodes have charged.
            let left = i64::try_from(limit).unwrap() - i64::try_from(outcome.charged).unwrap();
            let uncharged = outcome.level - left * i64::try_from(TOKENS).unwrap();
            println!("{what}: {over} over, {uncharged} tokens uncharged, {outcome:?}");
            let max_admitted = max_admitted(usize::try_from(nodes).unwrap(), &outcome);
            assert!(outcome.admitted <= max_admitted, "{what}: at most {max_admitted}, {outcome:?}");
            // A server without a disk may have applied and reported steps without confirming them. They are charged twice.
            let twice = if fault == Fault::KilledAndEmptied { outcome.unconfirmed * TOKENS } else { 0 };
            let allowed = -i64::try_from(twice).unwrap()..=0;
            assert!(allowed.contains(&uncharged), "{what}: {uncharged}, {outcome:?}");
        }
    }
}

#[tokio::test]
async fn the_local_policy_over_admits_at_most_the_reservations_since_the_last_reported_level() {
    const LIMIT: usize = 500;
    test_policy("local", LIMIT, |_, outcome| LIMIT + outcome.losses() * outcome.unknown).await;
}

#[tokio::test]
async fn the_closed_policy_never_over_admits() {
    const LIMIT: usize = 500;
    test_policy("closed", LIMIT, |_, _| LIMIT).await;
}

#[tokio::test]
async fn the_open_policy_admits_the_limit_once_per_node() {
    const LIMIT: usize = 400;
    // Each caller may have been admitted once without having read the answer.
    let max_admitted =
        |nodes, outcome: &Outcome| outcome.before + outcome.losses() * nodes * (CALLERS + LIMIT);
    test_policy("open", LIMIT, max_admitted).await;
}
