//! The cost of shared counters, and the behaviour of nodes with and without Redis.
//!
//! `cargo bench --bench redis`; with `-- --quick` a tenth of the calls.
//!
//! 1. The script: round trips to a server at a loopback port.
//! 2. A node: the time of a reservation by a call or from a lease, and reservations per second.
//! 3. Bursts of 1,000 requests at two, four and eight nodes: the number admitted by a quota for 50.
//! 4. Redis is killed and restarted empty: the time of calls without it, and the time until counters are shared again.
//!
//! Exits with 1 if too many requests are admitted, or if a figure exceeds its bound. The bounds allow for a busy machine.

#![allow(missing_docs, unreachable_pub)] // a program of its own
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods)] // a bench panics on faults and measures time
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // for printed figures

mod nodes;
#[path = "../../tests/common/port.rs"]
mod port;
mod script;
mod server;

use std::process::ExitCode;

fn main() -> ExitCode {
    let is_quick = std::env::args().any(|argument| argument == "--quick");
    script::measure(if is_quick { 1_000 } else { 10_000 });
    if nodes::measure(is_quick) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether a figure is within its bound. Prints it if not.
fn is_within(what: &str, figure: f64, max: f64) -> bool {
    if figure > max {
        println!("MISSED  {what}: {figure:.2}, at most {max}");
    }
    figure <= max
}
