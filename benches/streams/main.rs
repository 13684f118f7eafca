//! Measures the cost of streams: the readers alone, and a thousand callers at once.
//!
//! `cargo bench --bench streams -- [--quick] [readers] [paced] [unread]`
//!
//! 1. Readers of usage: MB/s by piece size, and the time for twice the input.
//! 2. A thousand streams with an event every 200 ms, alternately through a gateway in its own process and directly to the
//!    mock: latency of events, the part that the gateway adds, memory per stream, CPU per event.
//! 3. Callers that do not read: memory per stream.
//!
//! Exits with 1 if a figure exceeds its bound. The bounds of times have a margin for a busy machine.

#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)] // a benchmark may panic, and measures time
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the figures are for display

#[allow(dead_code)] // the overhead benchmark uses the rest
#[path = "../overhead/bodies.rs"]
mod bodies;
mod live;
#[allow(dead_code)] // the overhead benchmark uses the rest
#[path = "../overhead/peers.rs"]
mod peers;
mod readers;

use std::process::ExitCode;

fn main() -> ExitCode {
    let is_quick = std::env::args().any(|a| a == "--quick");
    let names = ["readers", "paced", "unread"];
    let named: Vec<String> = std::env::args().filter(|a| names.contains(&a.as_str())).collect();
    let is_on = |name: &str| named.is_empty() || named.iter().any(|n| n == name);
    let readers = !is_on("readers") || readers::measure(is_quick);
    let paced = !is_on("paced") || live::measure_paced(is_quick);
    let unread = !is_on("unread") || live::measure_unread();
    if readers && paced && unread { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether a figure is within its bound. Prints a line if not.
fn is_within(what: &str, figure: f64, max: f64) -> bool {
    if figure > max {
        println!("MISSED  {what}: {figure:.2}, at most {max}");
    }
    figure <= max
}
