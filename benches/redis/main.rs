//! What shared counters cost, and what nodes do with Redis and without.
//!
//! `cargo bench --bench redis`; `-- --quick`: a tenth of the calls.
//!
//! 1. The script: round trips to a server at a loopback port.
//! 2. A node: what a reservation takes, asked for one by one or out of a lease, and how many a second.
//! 3. Bursts of 1,000 requests at two, four and eight nodes: how much is admitted of what there is.
//! 4. Redis killed, and started again empty: how long calls take then, and how long it takes to share again.
//!
//! Exits with 1 if a token too much is admitted, or a figure is missed by more than a busy machine explains.

#![allow(missing_docs, unreachable_pub)] // a program of its own
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods)] // it fails loudly, and times things
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it prints figures

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

/// Whether a figure is reached; tells if not.
fn is_within(what: &str, figure: f64, most: f64) -> bool {
    if figure > most {
        println!("MISSED  {what}: {figure:.2}, at most {most}");
    }
    figure <= most
}
