//! Measures the gateway's CPU time per request and per streamed event, and compares it with bare proxies in the same run.
//!
//! `cargo bench --bench overhead -- [--rounds N] [--seconds S] [--peers A,B] [--scenarios X,Y] [--quick]`
//!
//! The gateway is the binary that `TOLLGATE_BIN` names, or the one that `cargo bench` built. The latter takes more CPU than
//! that of `cargo build --release`: its dependencies have more features, so their code has other symbols than the profile
//! (`packaging/rustc`). The peer `tollgate-other` is the binary that `TOLLGATE_OTHER` names, such as a build of the code
//! before a change.
//!
//! The mock upstream, the load generator and the bare proxies are this binary, started with `--role`. The figures are
//! CPU times of the proxy's process (user and system, all threads), because wall-clock times depend on the other load
//! of the machine. Compare ratios within one run only.

#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)] // a benchmark may panic, and measures time
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the figures are for display

mod bodies;
mod load;
mod mock;
#[allow(dead_code)] // the streams benchmark uses the rest
mod peers;
mod proxies;

use peers::{Peer, free_address};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

/// One kind of traffic.
struct Scenario {
    name: &'static str,
    connections: usize,
    /// The figures are per event instead of per request.
    streams: bool,
}

const SCENARIOS: [Scenario; 4] = [
    Scenario { name: "small", connections: 64, streams: false },
    Scenario { name: "large", connections: 16, streams: false },
    Scenario { name: "stream", connections: 16, streams: true },
    Scenario { name: "stream-paced", connections: 64, streams: true },
];

struct Options {
    rounds: usize,
    seconds: f64,
    peers: Vec<String>,
    scenarios: Vec<String>,
}

/// The result of one run of one peer in one scenario.
#[derive(Clone, Copy)]
struct Measured {
    cpu_us: f64,
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let [flag, role, rest @ ..] = arguments.as_slice()
        && flag == "--role"
    {
        return run_role(role, rest);
    }
    let options = options(&arguments);
    let folder = tempfile::tempdir().unwrap();
    let upstream = free_address();
    let _mock = Peer::this_binary("mock", "mock", &[upstream.to_string()]).ready(upstream).unwrap();
    let mut peers = start(&options, upstream, folder.path());
    let results = measure(&options, &mut peers);
    report(&options, &peers, &results);
}

/// Runs one of this binary's roles.
fn run_role(role: &str, arguments: &[String]) {
    let address: SocketAddr = arguments[0].parse().unwrap();
    match role {
        "mock" => mock::run(address),
        "load" => {
            load::run(address, &arguments[1], arguments[2].parse().unwrap(), arguments[3].parse().unwrap());
        }
        _ => proxies::run(role, address, arguments[1].parse().unwrap()),
    }
}

fn options(arguments: &[String]) -> Options {
    let value = |flag: &str| arguments.iter().position(|a| a == flag).and_then(|at| arguments.get(at + 1));
    let list = |flag: &str, default: &str| {
        value(flag).map_or(default, String::as_str).split(',').map(str::to_owned).collect::<Vec<_>>()
    };
    let is_quick = arguments.iter().any(|a| a == "--quick");
    let number = |flag: &str, quick: f64, default: f64| {
        value(flag).map_or(if is_quick { quick } else { default }, |v| v.parse().expect("a number"))
    };
    Options {
        rounds: number("--rounds", 1.0, 3.0) as usize,
        seconds: number("--seconds", 0.5, 3.0),
        peers: list(
            "--peers",
            if is_quick {
                "pool,tollgate"
            } else {
                "nginx,reqwest,pool,pool-percore,tollgate,tollgate-multi"
            },
        ),
        scenarios: list(
            "--scenarios",
            if is_quick { "small,stream" } else { "small,large,stream,stream-paced" },
        ),
    }
}

/// Starts every peer. A peer that does not start is skipped; the gateway must start.
fn start(options: &Options, upstream: SocketAddr, folder: &Path) -> Vec<(Peer, SocketAddr)> {
    let mut peers = Vec::new();
    for name in &options.peers {
        let address = free_address();
        match peers::start(name, address, upstream, folder).and_then(|peer| peer.ready(address)) {
            Ok(peer) => peers.push((peer, address)),
            Err(reason) if name.starts_with("tollgate") => panic!("{name} does not start: {reason}"),
            Err(reason) => eprintln!("{name} is skipped: {reason}"),
        }
    }
    peers
}

/// Measurements by scenario and peer.
type Results = BTreeMap<(usize, usize), Vec<Measured>>;

fn measure(options: &Options, peers: &mut [(Peer, SocketAddr)]) -> Results {
    let mut results = Results::new();
    for round in 1..=options.rounds {
        for (s, scenario) in
            SCENARIOS.iter().enumerate().filter(|(_, s)| options.scenarios.iter().any(|n| n == s.name))
        {
            for (p, (peer, address)) in peers.iter().enumerate() {
                let measured =
                    load::measure(peer, *address, scenario.name, scenario.connections, options.seconds);
                eprintln!(
                    "round {round}/{} {} {}: {:.1} us of CPU per {}",
                    options.rounds,
                    scenario.name,
                    peer.name,
                    measured.cpu_us,
                    unit(scenario)
                );
                results.entry((s, p)).or_default().push(measured);
            }
        }
    }
    results
}

fn unit(scenario: &Scenario) -> &'static str {
    if scenario.streams { "event" } else { "request" }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(options: &Options, peers: &[(Peer, SocketAddr)], results: &Results) {
    for (s, scenario) in SCENARIOS.iter().enumerate().filter(|(s, _)| results.keys().any(|(of, _)| of == s)) {
        let cpu = |name: &str| {
            let at = peers.iter().position(|(peer, _)| peer.name == name)?;
            Some(median(results.get(&(s, at))?.iter().map(|m| m.cpu_us)))
        };
        let (pool, nginx) = (cpu("pool"), cpu("nginx"));
        println!(
            "\n### {}, {} connections, {} rounds of {} s\n",
            scenario.name, scenario.connections, options.rounds, options.seconds
        );
        println!(
            "| peer | CPU us per {} | min - max | to pool | to nginx | {}s / s | p50 us | p99 us |",
            unit(scenario),
            unit(scenario)
        );
        println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
        for (p, (peer, _)) in peers.iter().enumerate() {
            let Some(runs) = results.get(&(s, p)) else { continue };
            let own = median(runs.iter().map(|m| m.cpu_us));
            let (min, max) =
                runs.iter().fold((f64::MAX, 0_f64), |(l, m), r| (l.min(r.cpu_us), m.max(r.cpu_us)));
            let ratio = |to: Option<f64>| to.map_or("-".to_owned(), |to| format!("{:.2}", own / to));
            println!(
                "| {} | {own:.1} | {min:.1} - {max:.1} | {} | {} | {:.0} | {:.0} | {:.0} |",
                peer.name,
                ratio(pool),
                ratio(nginx),
                median(runs.iter().map(|m| m.per_second)),
                median(runs.iter().map(|m| m.p50_us)),
                median(runs.iter().map(|m| m.p99_us)),
            );
        }
    }
}
