//! Redis stalls for a shorter time than `store.redis.timeout`, in the middle of bursts of requests: a host is busy, or
//! Redis forks to save a snapshot. The requests wait, and every request that fits is admitted.

use super::Nodes;
use super::outages::{THOUSAND_TOKENS, hundred_tokens, wait_until_shared};
use crate::support::redis::{Redis, send_signal};
use crate::support::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use tollgate::clock::Stopwatch;

/// Requests in each burst, and how many of them fit.
const REQUESTS: usize = 400;
const ROOM: usize = 100;
/// Tokens of each request.
const TOKENS: usize = 20;
/// Lengths of the stalls in milliseconds.
const STALLS: [u64; 4] = [10, 50, 100, 200];
/// The default of `store.redis.timeout`. If the server was silent for longer, the machine is so busy that the stall was
/// not a short one.
const TIMEOUT: Duration = Duration::from_millis(250);
/// Attempts to make a short stall.
const MAX_ATTEMPTS: usize = 10;

/// Measures the longest time that the server does not reply.
struct SilenceMeter {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Duration>,
}

impl SilenceMeter {
    fn start(redis: &Redis) -> Self {
        let client = ::redis::Client::open(("127.0.0.1", redis.port)).unwrap();
        let mut connection = client.get_connection().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            while !stopped.load(Ordering::Relaxed) {
                let begun = Stopwatch::start();
                let _: String = ::redis::cmd("PING").query(&mut connection).unwrap();
                longest = longest.max(begun.elapsed());
                std::thread::sleep(Duration::from_millis(2));
            }
            longest
        });
        Self { stop, thread }
    }

    fn longest(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// The results of the requests of a burst.
#[derive(Debug, Default)]
struct Burst {
    admitted: AtomicUsize,
    /// Denied because the quota is exhausted.
    denied: AtomicUsize,
    /// Refused because Redis is unavailable.
    refused: AtomicUsize,
}

impl Burst {
    fn decided(&self) -> usize {
        [&self.admitted, &self.denied, &self.refused].map(|count| count.load(Ordering::SeqCst)).iter().sum()
    }

    fn start(self: &Arc<Self>, nodes: &Nodes) -> JoinSet<()> {
        let mut callers = JoinSet::new();
        for n in 0..REQUESTS {
            let (node, burst) = (nodes[n % nodes.len()].address, self.clone());
            callers.spawn(async move {
                let mut caller = Caller::connect(node).await;
                caller.request("POST", CHAT, "", hello(r#""max_tokens":12"#).as_bytes()).await;
                let reply = caller.reply().await;
                let count = match (reply.status, &*reply.code()) {
                    (200, _) => &burst.admitted,
                    (_, "insufficient_quota") => &burst.denied,
                    (_, "quota_store_unavailable") => &burst.refused,
                    _ => panic!("{}", reply.text()),
                };
                count.fetch_add(1, Ordering::SeqCst);
            });
        }
        callers
    }
}

/// Stops the server for this time while a burst is decided. Returns the counts, and the longest silence.
async fn stall_in_burst(redis: &Redis, process: &str, nodes: &Nodes, stall: Duration) -> (Burst, Duration) {
    let meter = SilenceMeter::start(redis);
    let burst = Arc::new(Burst::default());
    let callers = burst.start(nodes);
    while burst.decided() < 20 {
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    tokio::task::block_in_place(|| {
        send_signal(process, "STOP");
        std::thread::sleep(stall);
        let decided = burst.decided();
        send_signal(process, "CONT");
        assert!(decided < REQUESTS, "the burst was over before the stall ended");
    });
    soon("the burst", callers.join_all()).await;
    let longest = tokio::task::block_in_place(|| meter.longest());
    (Arc::into_inner(burst).unwrap(), longest)
}

async fn reset(node: &Gateway) {
    let mut caller = Caller::connect(node.admin).await;
    let head = format!("host: {}\r\ncontent-length: 0", node.admin);
    caller.send(format!("POST /api/environments/staging/reset HTTP/1.1\r\n{head}\r\n\r\n").as_bytes()).await;
    assert_eq!(caller.reply().await.status, 200);
}

async fn test_stalls(nodes: u32, policy: &str) {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 12)).await;
    let quota =
        format!("{{ total_tokens: {{ limit: 10, burst: {}, per: day, window: rolling }} }}", ROOM * TOKENS);
    let nodes = Nodes::start(&redis, &upstream, nodes, &quota, &format!("on_failure: {policy}")).await;
    wait_until_shared(&nodes, true).await;
    let process = redis.process_id();
    for stall in STALLS.map(Duration::from_millis) {
        for _ in 0..MAX_ATTEMPTS {
            let (burst, silence) = stall_in_burst(&redis, &process, &nodes, stall).await;
            let what =
                format!("{policy}, {} nodes, {stall:?}: {burst:?}, silent for {silence:?}", nodes.len());
            println!("{what}");
            wait_until_shared(&nodes, true).await;
            for node in nodes.iter() {
                node.settled().await;
            }
            let levels = nodes.levels().await;
            reset(&nodes[0]).await;
            let counts = [&burst.admitted, &burst.denied, &burst.refused].map(|n| n.load(Ordering::SeqCst));
            if silence > TIMEOUT {
                assert!(policy != "closed" || counts[0] <= ROOM, "{what}");
                continue;
            }
            assert_eq!(counts, [ROOM, REQUESTS - ROOM, 0], "{what}");
            assert_eq!(levels, vec![0; nodes.len()], "{what}");
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_stall_in_a_burst_over_admits_nothing_and_refuses_no_request_with_the_local_policy() {
    for nodes in [2, 4, 8] {
        test_stalls(nodes, "local").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_stall_in_a_burst_over_admits_nothing_and_refuses_no_request_with_the_closed_policy() {
    for nodes in [2, 4, 8] {
        test_stalls(nodes, "closed").await;
    }
}

/// More callers than calls may be in flight: some hang up while their call is in the queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_hang_up_during_a_stall_leave_nothing_held() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let nodes = Nodes::start(&redis, &upstream, 2, THOUSAND_TOKENS, "timeout: 5s").await;
    wait_until_shared(&nodes, true).await;
    let process = redis.process_id();
    send_signal(&process, "STOP");
    for round in 0..3 {
        let mut callers = Vec::new();
        for _ in 0..40 {
            let mut caller = nodes[round % 2].caller().await;
            caller.request("POST", CHAT, "", hundred_tokens().as_bytes()).await;
            callers.push(caller);
        }
        // Time for the node to read the requests. It does not report requests that wait for Redis.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    send_signal(&process, "CONT");
    soon("everything to be released", async {
        while nodes.levels().await != [1_000, 1_000] {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    for node in nodes.iter() {
        assert_eq!(node.settled().await["quotas"][0]["level"], 1_000);
    }
    assert_eq!(redis.admin("HGET tollgate:{staging}:s in_flight"), ::redis::Value::BulkString(b"0".to_vec()));
    assert_eq!((nodes.losses().await, upstream.seen().len()), (vec![0, 0], 0));
}
