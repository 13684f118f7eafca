//! Replays recorded answers through a running gateway. The upstream sends each answer whole, in single bytes and cut at
//! random. The gateway must pass it on unchanged and charge the usage in it.
//!
//! Replays a fixed tenth, or all: `cargo test --release --test replay -- --all`. The recordings are not part of the
//! project. Their folder is `$TOLLGATE_DATA` (default `../shared`).

#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)] // a test may panic, and measures time

mod case;
#[allow(dead_code)] // the recordings test uses the rest
#[path = "../recordings/exchange.rs"]
mod exchange;
#[path = "../recordings/rules.rs"]
mod rules;
#[allow(dead_code, unused_imports, unreachable_pub, missing_docs)] // the gateway tests use the rest
#[path = "../gateway/support/mod.rs"]
mod support;
mod worker;

use exchange::Exchange;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use support::Gateway;
use worker::{Outcome, Scripted, Worker};

/// Exchanges in flight at once, each in its own environment.
const WORKERS: usize = 8;
/// Progress is printed after this many exchanges.
const STEP: usize = 500;

fn main() -> ExitCode {
    let all = std::env::args().any(|argument| argument == "--all");
    let folder = exchange::data().join("recordings");
    let exchanges: Vec<Exchange> = exchange::files(&folder)
        .iter()
        .flat_map(|file| exchange::read(file))
        .filter(|exchange| all || is_in_the_fixed_tenth(exchange))
        .collect();
    if exchanges.is_empty() {
        eprintln!(
            "\n*** NOT TESTED: there are no recordings in {} (set TOLLGATE_DATA) ***\n",
            folder.display()
        );
        return ExitCode::SUCCESS;
    }
    let started = Instant::now();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let rows = runtime.block_on(replay(exchanges.into()));
    let is_fine = print(&rows);
    println!("replayed in {:.1} s", started.elapsed().as_secs_f64());
    if is_fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Selects an exchange by its id, which is a hash.
fn is_in_the_fixed_tenth(exchange: &Exchange) -> bool {
    exchange.id.bytes().fold(0, |sum, byte| (sum * 16 + u32::from(byte)) % 1_009) % 10 == 0
}

/// One line of the table.
#[derive(Default)]
struct Row {
    exchanges: usize,
    exact: usize,
    replays: usize,
    wrong_bytes: usize,
    wrong_charges: usize,
}

type Rows = BTreeMap<(String, String), Row>;

async fn replay(exchanges: Arc<[Exchange]>) -> Rows {
    let (gateway, workers) = start().await;
    let next = Arc::new(AtomicUsize::new(0));
    let mut running = tokio::task::JoinSet::new();
    for worker in workers {
        let (exchanges, next) = (exchanges.clone(), next.clone());
        running.spawn(async move {
            let mut outcomes = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(exchange) = exchanges.get(at) else { return outcomes };
                if at.is_multiple_of(STEP) {
                    eprintln!("{at} of {} exchanges", exchanges.len());
                }
                outcomes.push((at, worker.replay(exchange).await));
            }
        });
    }
    let mut rows = Rows::new();
    for (at, outcome) in running.join_all().await.into_iter().flatten() {
        add(&mut rows, &exchanges[at], &outcome);
    }
    gateway.shutdown().await;
    rows
}

fn add(rows: &mut Rows, exchange: &Exchange, outcome: &Outcome) {
    let row = rows.entry((exchange.api.clone(), exchange.provider.clone())).or_default();
    row.exchanges += usize::from(outcome.replays > 0);
    row.exact += usize::from(outcome.replays > 0 && exchange.is_exact());
    row.replays += outcome.replays;
    row.wrong_bytes += outcome.wrong_bytes;
    row.wrong_charges += outcome.wrong_charges;
}

/// Starts one gateway with an environment and an upstream for each worker.
async fn start() -> (Gateway, Vec<Worker>) {
    let (mut upstreams, mut environments, mut scripted) = (String::new(), String::new(), Vec::new());
    for n in 0..WORKERS {
        let of_worker = Scripted::start().await;
        upstreams += &format!("  u{n}: {{ base_url: 'http://{}' }}\n", of_worker.upstream.address);
        environments += &format!(
            "  w{n}: {{ upstream: u{n}, calibrate: false, other_paths: forward, quotas: {{ total_tokens: {{ limit: 1000000G, per: minute }} }} }}\n"
        );
        scripted.push(of_worker);
    }
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0', flood_guard: {{ requests: 0, per: second }} }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams:\n{upstreams}environments:\n{environments}store: {{ memory: true }}\n"
    ))
    .await;
    let (address, admin) = (gateway.address, gateway.admin);
    let worker = |(n, upstream)| Worker { environment: format!("w{n}"), gateway: address, admin, upstream };
    let workers = scripted.into_iter().enumerate().map(worker).collect();
    (gateway, workers)
}

/// Prints the table. Returns whether no answer was changed or wrongly charged.
fn print(rows: &Rows) -> bool {
    println!("| API | provider | exchanges | recorded byte for byte | replays | changed | wrongly charged |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let mut sum = Row::default();
    for ((api, provider), row) in rows {
        line(api, provider, row);
        sum.exchanges += row.exchanges;
        sum.exact += row.exact;
        sum.replays += row.replays;
        sum.wrong_bytes += row.wrong_bytes;
        sum.wrong_charges += row.wrong_charges;
    }
    line("all", "", &sum);
    sum.replays > 0 && sum.wrong_bytes + sum.wrong_charges == 0
}

fn line(api: &str, provider: &str, row: &Row) {
    let Row { exchanges, exact, replays, wrong_bytes, wrong_charges } = row;
    println!("| {api} | {provider} | {exchanges} | {exact} | {replays} | {wrong_bytes} | {wrong_charges} |");
}
