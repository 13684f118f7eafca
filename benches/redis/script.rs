//! The script alone: round trips from threads that each wait for the reply.

use super::server::Server;
use std::time::{Duration, Instant};
use tollgate::clock;
use tollgate::quota::{Amounts, CounterState, Kind, Period, Quota, Scope, Window};
use tollgate::redis::{
    Cells, CommandBuilder, OnShortage, OverrideMark, ReserveRequest, SCRIPT, Step, StepKind, Verdict,
};

fn quotas(number: u64) -> Vec<Quota> {
    let quota = |n| {
        let ms = 60_000 + n;
        let per = Period { text: format!("{ms}ms"), ms };
        let (limit, window) = (1 << 40, Window::Rolling { burst: 1 << 40 });
        Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit, per, window }
    };
    (0..number).map(quota).collect()
}

/// Reserves and settles, one call after the other. Returns how long each reservation took.
fn run_node(server: &Server, name: &str, quotas: &[Quota], calls: u64) -> Vec<Duration> {
    let now = clock::now();
    let mut connection = server.connect().unwrap();
    let sha: String = redis::cmd("SCRIPT").arg("LOAD").arg(SCRIPT).query(&mut connection).unwrap();
    let mut commands = CommandBuilder::new(Cells::new(quotas, now), name, now);
    let keys = commands.keys("bench", None, "production");
    let mut call = |command: &tollgate::redis::ScriptCommand| {
        let mut call = redis::cmd("EVALSHA");
        call.arg(&sha).arg(3).arg(&keys[..]).arg(&command.arguments);
        let numbers: Vec<i64> = call.query(&mut connection).unwrap();
        command.parse_reply(&numbers).unwrap().verdict
    };
    let unused = |quota: &Quota| {
        let burst = quota.capacity();
        let level = (burst.cast_signed(), 0);
        (
            CounterState::Rolling { limit: quota.limit, burst, level, held: 0, at: now },
            OverrideMark::None,
            true,
        )
    };
    let join = commands.join(1, None, &quotas.iter().map(unused).collect::<Vec<_>>(), None);
    assert_eq!(call(&join), Verdict::Done);
    let all: Vec<u32> = (0..).take(quotas.len()).collect();
    let mut took = Vec::new();
    for n in 1..=calls {
        let id = n.to_string();
        let reserve = ReserveRequest {
            id: &id,
            max_in_flight: 0,
            on_shortage: OnShortage::Reject,
            generates: true,
            amounts: Amounts::of_request(100, 200),
            completions: 1,
        };
        let begun = Instant::now();
        let command = commands.reserve(&reserve, &all);
        let verdict = call(&command);
        took.push(begun.elapsed());
        assert_eq!(verdict, Verdict::Admitted);
        let settle = Step::new(StepKind::Settle, id, Amounts::of_request(100, 150));
        let command = commands.apply(n, &[settle], &[]);
        assert_eq!(call(&command), Verdict::Done);
    }
    took
}

pub fn measure(calls: u64) {
    println!("reserve and settle, one call each; round trips of reservations in microseconds\n");
    println!("| quotas | nodes | p50 | p99 | max | calls per second | server time per call, us |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for number in [1, 4, 16] {
        for nodes in [1_usize, 8] {
            let server = Server::start();
            let quotas = quotas(number);
            server.reset_statistics();
            let begun = Instant::now();
            let mut took: Vec<Duration> = std::thread::scope(|scope| {
                let one = |n| (&server, &quotas, format!("node-{n}"));
                let threads: Vec<_> = (0..nodes)
                    .map(one)
                    .map(|(server, quotas, name)| scope.spawn(move || run_node(server, &name, quotas, calls)))
                    .collect();
                threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
            });
            let seconds = begun.elapsed().as_secs_f64();
            took.sort_unstable();
            #[allow(clippy::cast_precision_loss)] // for a printed figure
            let rate = 2.0 * took.len() as f64 / seconds;
            let us = |at: usize| took[at.min(took.len() - 1)].as_micros();
            let (p50, p99, max) = (us(took.len() / 2), us(took.len() * 99 / 100), us(usize::MAX));
            let server_time = server.time_per_call();
            println!("| {number} | {nodes} | {p50} | {p99} | {max} | {rate:.0} | {server_time} |");
        }
    }
}
