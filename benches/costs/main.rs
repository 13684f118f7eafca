//! The costs of one request and of one streamed event in the gateway, in instructions and allocations.
//!
//! `cargo bench --bench costs -- [--record]`
//!
//! Both figures hardly depend on the load of the machine. They show the cost of a change where CPU times are too
//! inaccurate. Instructions are those of the whole gateway process in user space, counted by valgrind's callgrind.
//! Allocations are counted by the global allocator of this binary, which runs the gateway as `costs serve`. One
//! caller sends requests one after the other over one connection, and the next event of a stream is sent when the
//! caller has received the previous one.
//!
//! Instructions are those of the binary that `TOLLGATE_BIN` names, or of the one that `cargo bench` built. The latter is not
//! optimised by the profile of `cargo build --release` (`benches/overhead/main.rs` says why).
//!
//! The bench compares each figure with the one in `baseline.txt` and fails if it is more than `MAX_GROWTH` above.
//! `--record` writes the figures of this run to that file. Without valgrind it counts only allocations, and prints a
//! note.

#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)] // a benchmark may panic, and waits for a start
#![allow(clippy::cast_precision_loss)] // it prints ratios

mod baseline;
mod exchange;
mod gateway;

use baseline::{Baseline, Costs};
use exchange::{Exchange, KEY, ROUTED_KEY};
use gateway::Gateway;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use std::alloc::System;
use std::io::{BufRead as _, Write as _};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// A figure may exceed its baseline by this factor.
const MAX_GROWTH: f64 = 1.1;

/// One kind of traffic. The bench measures a longer and a shorter run, and divides the difference of the costs by the
/// difference of the units. The fixed costs of a connection or an answer are thus not included.
#[derive(Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    unit: &'static str,
    /// Requests that are sent before anything is counted.
    warm_up: usize,
    requests: usize,
    /// Events of each answer in the longer and in the shorter run. `None`: answers are JSON.
    events: Option<(usize, usize)>,
    prompt: Prompt,
    /// The caller's key, which decides on the environment.
    key: &'static str,
}

/// What the caller sends.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Prompt {
    /// 200 bytes.
    Small,
    /// 32 KiB, the same in every request: the gateway caches the token counts of its messages.
    LargeRepeated,
    /// 32 KiB, with different words in every request: the gateway counts all its tokens.
    LargeNew,
}

const SCENARIOS: [Scenario; 5] = [
    Scenario {
        name: "small-chat",
        unit: "request",
        warm_up: 50,
        requests: 200,
        events: None,
        prompt: Prompt::Small,
        key: KEY,
    },
    // Beside `small-chat`: the cost of a route with two upstreams, and of four quotas of the one that answers.
    Scenario {
        name: "small-chat-routed",
        unit: "request",
        warm_up: 50,
        requests: 200,
        events: None,
        prompt: Prompt::Small,
        key: ROUTED_KEY,
    },
    Scenario {
        name: "sse-event",
        unit: "event",
        warm_up: 5,
        requests: 4,
        events: Some((1_100, 100)),
        prompt: Prompt::Small,
        key: KEY,
    },
    Scenario {
        name: "32k-chat-repeated",
        unit: "request",
        warm_up: 20,
        requests: 50,
        events: None,
        prompt: Prompt::LargeRepeated,
        key: KEY,
    },
    Scenario {
        name: "32k-chat-new",
        unit: "request",
        warm_up: 20,
        requests: 30,
        events: None,
        prompt: Prompt::LargeNew,
        key: KEY,
    },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if arguments.first().is_some_and(|a| a == "serve") {
        report_allocations_on_request();
        return tollgate::cli::run();
    }
    let is_recording = arguments.iter().any(|a| a == "--record");
    let allocations = measure_all(Gateway::counting_allocations);
    let instructions = Gateway::has_valgrind().then(|| measure_all(Gateway::in_callgrind));
    if instructions.is_none() {
        println!("*** valgrind is missing: instructions are not counted. ***");
    }
    let costs = |(i, scenario): (usize, Scenario)| {
        let [allocations, bytes] = allocations[i];
        let instructions = instructions.as_ref().map(|counted| counted[i][0]);
        (scenario, Costs { instructions, allocations, bytes })
    };
    let figures: Vec<_> = SCENARIOS.into_iter().enumerate().map(costs).collect();
    if is_recording {
        baseline::record(figures.iter().map(|(scenario, costs)| (scenario.name, *costs)));
    }
    report(&figures, &Baseline::load())
}

/// Answers each line on standard input with the allocations of this process so far and their bytes.
fn report_allocations_on_request() {
    std::thread::spawn(|| {
        for _ in std::io::stdin().lock().lines() {
            let stats = ALLOCATOR.stats();
            // Reallocations are calls of the allocator too, and may copy.
            println!("{} {}", stats.allocations + stats.reallocations, stats.bytes_allocated);
            std::io::stdout().flush().unwrap();
        }
    });
}

/// Costs of one unit of each scenario, in the counters that the gateway has.
fn measure_all(start: fn(&Exchange) -> Gateway) -> Vec<[f64; 2]> {
    let exchange = Exchange::listen();
    let mut gateway = start(&exchange);
    SCENARIOS.map(|scenario| measure(&exchange, &mut gateway, scenario)).to_vec()
}

fn measure(exchange: &Exchange, gateway: &mut Gateway, scenario: Scenario) -> [f64; 2] {
    let mut caller = exchange.caller(gateway.address(), scenario);
    let events = scenario.events.map(|(long, _)| long);
    caller.send(scenario.warm_up, events);
    let mut count = |events| {
        let before = gateway.counters();
        caller.send(scenario.requests, events);
        let after = gateway.counters();
        [after[0] - before[0], after[1] - before[1]]
    };
    let long = count(events);
    let (short, units) = match scenario.events {
        Some((long, short)) => (count(Some(short)), scenario.requests * (long - short)),
        None => ([0.0; 2], scenario.requests),
    };
    [0, 1].map(|i| (long[i] - short[i]) / units as f64)
}

fn report(figures: &[(Scenario, Costs)], baseline: &Baseline) -> ExitCode {
    println!(
        "| unit | instructions | relative to baseline | allocations | relative to baseline | bytes allocated |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut is_within = true;
    for (scenario, costs) in figures {
        let known = baseline.of(scenario.name);
        let instructions = compare(costs.instructions, known.and_then(|known| known.instructions), 0.0);
        // A count of a few allocations may differ by one occasional allocation.
        let allocations = compare(Some(costs.allocations), known.map(|known| known.allocations), 0.5);
        println!(
            "| {} ({}) | {} | {} | {:.1} | {} | {:.0} |",
            scenario.name,
            scenario.unit,
            costs.instructions.map_or("-".to_owned(), |n| format!("{n:.0}")),
            instructions.text,
            costs.allocations,
            allocations.text,
            costs.bytes,
        );
        is_within &= instructions.is_within && allocations.is_within;
    }
    if is_within {
        return ExitCode::SUCCESS;
    }
    println!(
        "\nMISSED: a figure is more than {MAX_GROWTH} times its baseline. If the change is worth it, run with --record."
    );
    ExitCode::FAILURE
}

struct Comparison {
    text: String,
    is_within: bool,
}

fn compare(figure: Option<f64>, baseline: Option<f64>, tolerance: f64) -> Comparison {
    match (figure, baseline) {
        (Some(figure), Some(known)) => Comparison {
            text: if known < 0.05 { "-".to_owned() } else { format!("{:.3}", figure / known) },
            is_within: figure <= known * MAX_GROWTH + tolerance,
        },
        _ => Comparison { text: "-".to_owned(), is_within: true },
    }
}
