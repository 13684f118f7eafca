//! Throughput and latency of the quota engine and its store.
//!
//! `cargo bench --bench engine -- [--quick]`
//!
//! 1. Reserve and settle in one environment with 16 quotas, in memory: operations per second and time of each. Then the same
//!    with 4 quotas of the upstream; with two threads, each has an environment of its own at the same upstream.
//! 2. A durable quota with 64 concurrent requests: how long a reservation waits for its commit, and the CPU time per
//!    request, compared with the same load without a store.
//! 3. The dry run of a limit: the replay of a busy hour. It fails if it takes more than `MAX_REPLAY`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)] // a bench panics on faults and measures time
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // for printed figures

use futures_util::FutureExt as _;
use std::fmt::Write as _;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tollgate::calibrations::Calibrations;
use tollgate::clock::Timestamp;
use tollgate::config::{Config, Environment, parse};
use tollgate::ledger::{Account, Accounts, Backend, Demand, UsageInterval};
use tollgate::quota::{Amounts, Subject};
use tollgate::simulate::refused_in_history;
use tollgate::store::Store;

fn main() {
    let is_quick = std::env::args().any(|argument| argument == "--quick");
    let rounds = if is_quick { 1 } else { 5 };
    let operations = if is_quick { 200_000 } else { 1_000_000 };
    for (title, has_upstream) in [
        ("one environment, 16 quotas", false),
        (
            "16 quotas of the environment and 4 of its upstream; each thread with an environment of its own",
            true,
        ),
    ] {
        println!("### reserve + settle, {title}, in memory\n");
        println!("| threads | per second | p50 ns | p99 ns |\n| --- | --- | --- | --- |");
        for threads in [1, 2] {
            let best = (0..rounds).map(|_| measure_in_memory(threads, operations, has_upstream));
            let best = best.max_by(|a, b| a.per_second.total_cmp(&b.per_second)).unwrap();
            println!(
                "| {threads} | {:.0} | {} | {} |",
                best.per_second,
                best.p50.as_nanos(),
                best.p99.as_nanos()
            );
        }
        println!();
    }
    println!(
        "\n### reserve, wait until durable, settle 5 to 15 ms later; 64 concurrent requests, a quota of a day\n"
    );
    println!(
        "| store | requests / s | wait p50 us | wait p99 us | CPU us per request |\n| --- | --- | --- | --- | --- |"
    );
    let seconds = if is_quick { 1.0 } else { 3.0 };
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        without.push(measure_durable(false, seconds));
        with.push(measure_durable(true, seconds));
    }
    let cpu = |of: &[DurableLoad]| median(of.iter().map(|k| k.cpu_us).collect());
    for (name, of) in [("memory", &without), ("SQLite", &with)] {
        let wait =
            |at: fn(&DurableLoad) -> Duration| median(of.iter().map(|k| at(k).as_secs_f64() * 1e6).collect());
        println!(
            "| {name} | {:.0} | {:.0} | {:.0} | {:.1} |",
            median(of.iter().map(|k| k.per_second).collect()),
            wait(|k| k.p50),
            wait(|k| k.p99),
            cpu(of)
        );
    }
    println!("\nThe store adds {:.1} us of CPU to a request.", cpu(&with) - cpu(&without));
    println!("\n### dry run of a limit: the replay of the last hour\n");
    println!("| requests | refused | ms |\n| --- | --- | --- |");
    for requests in [10_000, 100_000, 10_000_000] {
        let (refused, time) = (0..3).map(|_| measure_replay(requests)).min_by_key(|(_, time)| *time).unwrap();
        println!("| {requests} | {refused} | {:.1} |", time.as_secs_f64() * 1e3);
        assert!(time < MAX_REPLAY, "the dry run takes {time:?}");
    }
}

/// Four times the target: checked arithmetic and a busy machine make it slower.
const MAX_REPLAY: Duration = Duration::from_millis(200);

/// Replays an hour with this number of requests, of which about a third does not fit, and as many before it. Returns the
/// number of refused requests.
fn measure_replay(requests: u64) -> (u64, Duration) {
    let quota =
        &config("{ total_tokens: { limit: 1M, per: minute } }", "{ memory: true }").environments[0].quotas[0];
    let now = Timestamp(1_774_700_040_000);
    let minute = |ago: i64| {
        let start = Timestamp(now.0 - ago * 60_000);
        let spent = requests / 60;
        let tokens = 1_500_000;
        let spent = Amounts { requests: spent, prompt: tokens, completion: 0, total: tokens };
        UsageInterval { start, end: Timestamp(start.0 + 60_000), rejections: 0, spent }
    };
    let history: Vec<UsageInterval> = (1..=120).rev().map(minute).collect();
    let started = Instant::now();
    let refused = refused_in_history(quota, &history, now).unwrap();
    (refused, started.elapsed())
}

fn config(quotas: &str, store: &str) -> Config {
    let text = format!(
        "upstreams: {{ u: {{ base_url: http://u/v1 }} }}\nenvironments: {{ e: {{ upstream: u, quotas: {quotas} }} }}\nstore: {store}\n"
    );
    parse(&text, "bench.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}")).config
}

/// Four kinds with four periods each. None is ever exhausted.
fn sixteen_quotas() -> String {
    let mut quotas = "{ ".to_owned();
    for kind in ["total_tokens", "prompt_tokens", "completion_tokens", "requests"] {
        let periods =
            ["second", "minute", "hour", "day"].map(|per| format!("{{ limit: 1000000G, per: {per} }}"));
        write!(quotas, "{kind}: [{}], ", periods.join(", ")).unwrap();
    }
    quotas + "}"
}

struct InMemoryLoad {
    per_second: f64,
    p50: Duration,
    p99: Duration,
}

fn measure_in_memory(threads: usize, operations: usize, has_upstream: bool) -> InMemoryLoad {
    let config = config(&sixteen_quotas(), "{ memory: true }");
    assert_eq!(config.environments[0].quotas.len(), 16);
    let upstream = has_upstream.then(upstream_with_four_quotas);
    let backend = Backend { account: upstream.as_ref(), model: "gpt-4o" };
    let backends = if has_upstream { std::slice::from_ref(&backend) } else { &[] };
    let shared = Arc::new(Account::open(&config.environments[0]));
    let account = || {
        if has_upstream { Arc::new(Account::open(&config.environments[0])) } else { shared.clone() }
    };
    let run = || {
        let account = account();
        (0..operations / threads).for_each(|_| reserve_and_settle(&account, backends));
    };
    // Single operations are timed in a second run, because reading the clock twice takes a tenth of an operation.
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(run);
        }
    });
    let per_second = operations as f64 / begun.elapsed().as_secs_f64();
    let mut times: Vec<Duration> = std::thread::scope(|scope| {
        let timed = || {
            let account = account();
            let time = |_| {
                let begun = Instant::now();
                reserve_and_settle(&account, backends);
                begun.elapsed()
            };
            (0..operations / threads / 4).map(time).collect::<Vec<_>>()
        };
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(timed)).collect();
        handles.into_iter().flat_map(|handle| handle.join().unwrap()).collect()
    });
    times.sort_unstable();
    InMemoryLoad { per_second, p50: times[times.len() / 2], p99: times[times.len() * 99 / 100] }
}

/// An upstream with a quota of each kind.
fn upstream_with_four_quotas() -> Arc<Account> {
    let quotas = ["total_tokens", "prompt_tokens", "completion_tokens", "requests"]
        .map(|kind| format!("{kind}: {{ limit: 1000000G, per: minute }}"));
    let text = format!(
        "upstreams: {{ u: {{ base_url: http://u/v1, quotas: {{ {} }} }} }}\nenvironments: {{ e: {{ upstream: u }} }}\nstore: {{ memory: true }}\n",
        quotas.join(", ")
    );
    let loaded = parse(&text, "bench.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    Arc::new(Account::open(&loaded.config.upstreams[0]))
}

fn demand() -> Demand<'static> {
    let subject = Subject { caller: None, model: "gpt-4o" };
    Demand {
        subject,
        prompt: 100,
        generates: true,
        cap: Some(500),
        completions: 1,
        backends: &[],
        may_clamp: true,
    }
}

fn reserve_and_settle(account: &Arc<Account>, backends: &[Backend<'_>]) {
    let demand = Demand { backends, ..demand() };
    let mut reservation = account.reserve(&demand, Duration::ZERO).now_or_never().unwrap().unwrap();
    reservation.observe(Amounts::of_request(100, 200));
    reservation.mark_complete();
}

struct DurableLoad {
    per_second: f64,
    p50: Duration,
    p99: Duration,
    cpu_us: f64,
}

fn measure_durable(is_stored: bool, seconds: f64) -> DurableLoad {
    let folder = tempfile::tempdir().unwrap();
    let store = if is_stored {
        format!("{{ path: {} }}", folder.path().join("bench.db").display())
    } else {
        "{ memory: true }".to_owned()
    };
    let config = config("{ total_tokens: { limit: 1000000G, per: day } }", &store);
    let environment: &Arc<Environment> = &config.environments[0];
    if !is_stored {
        return load(&Arc::new(Account::open(environment)), seconds);
    }
    let store = Store::open(&config.store).unwrap();
    let left = store.restored_state(environment).unwrap();
    let account = Arc::new(Account::open_with(environment, Some(store.persistence()), &left));
    let accounts = Accounts::default();
    accounts.add(&environment.name, account.clone());
    let _writer = store.start(Arc::new(accounts), Arc::new(Calibrations::new([]))).unwrap();
    load(&account, seconds)
}

/// Runs 64 tasks on one thread, like a worker of the gateway.
fn load(account: &Arc<Account>, seconds: f64) -> DurableLoad {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (begun, cpu_before) = (Instant::now(), cpu_time());
    let end = begun + Duration::from_secs_f64(seconds);
    let mut waits: Vec<Duration> = runtime.block_on(async {
        // Different answer times keep the tasks from reserving all at once.
        let tasks: Vec<_> =
            (0..64).map(|n| tokio::spawn(requests(account.clone(), end, 5 + n * 37 % 11))).collect();
        let mut waits = Vec::new();
        for task in tasks {
            waits.extend(task.await.unwrap());
        }
        waits
    });
    waits.sort_unstable();
    let requests = waits.len();
    DurableLoad {
        per_second: requests as f64 / begun.elapsed().as_secs_f64(),
        p50: waits[requests / 2],
        p99: waits[requests * 99 / 100],
        cpu_us: cpu_time().saturating_sub(cpu_before).as_secs_f64() * 1e6 / requests as f64,
    }
}

async fn requests(account: Arc<Account>, end: Instant, answer_ms: u64) -> Vec<Duration> {
    let mut waits = Vec::new();
    while Instant::now() < end {
        let mut reservation = account.reserve(&demand(), Duration::ZERO).now_or_never().unwrap().unwrap();
        let begun = Instant::now();
        reservation.wait_until_durable().await;
        waits.push(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(answer_ms)).await;
        reservation.observe(Amounts::of_request(100, 200));
        drop(reservation);
    }
    waits
}

/// User and system time of this process and all its threads, in ticks of 10 ms.
fn cpu_time() -> Duration {
    let text = fs::read_to_string("/proc/self/stat").unwrap();
    // The second field, the command in brackets, may contain spaces.
    let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
