//! Compares prompt estimates and usage readers with recorded exchanges of providers.
//!
//! `cargo test --release --test recordings -- --table` prints the errors of the estimates by API, provider and kind
//! of request, and `--list` each request with its estimate. The recordings are not part of the project. Their folder is `$TOLLGATE_DATA` (default `../shared`).

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_precision_loss)] // a test may panic, and prints fractions

mod charges;
mod completions;
#[allow(dead_code)] // the replay test uses the rest
mod exchange;
mod figures;
mod golden;
mod groups;
mod measured;
mod rules;
mod table;

use std::io::IsTerminal as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let data = exchange::data();
    let shows_table = std::env::args().any(|argument| argument == "--table");
    let mut is_fine = true;
    if let Some(vectors) = golden::vectors(&data) {
        is_fine &= golden::are_exact(&vectors);
    } else {
        not_tested(&format!("there is no golden-vectors.jsonl in {}", data.display()));
    }
    let files = exchange::files(&data.join("recordings"));
    if files.is_empty() {
        not_tested(&format!("there are no recordings in {}", data.display()));
    } else {
        let prints_progress = shows_table || std::io::stderr().is_terminal();
        let (mut exchanges, mut charges) = (Vec::new(), charges::Charges::default());
        let mut completions = completions::Completions::default();
        for (at, file) in files.iter().enumerate() {
            for exchange in exchange::read(file) {
                charges.check(&exchange);
                completions.count(&exchange);
                exchanges.extend(measured::estimate(&exchange));
            }
            if prints_progress {
                eprintln!("{} of {} files, {} requests counted", at + 1, files.len(), exchanges.len());
            }
        }
        let orders = measured::orders(&exchanges);
        if std::env::args().any(|argument| argument == "--list") {
            groups::list(&exchanges, &orders);
        }
        if shows_table {
            table::print(&exchanges, &orders);
            completions.print();
        }
        is_fine &= figures::are_within_bounds(&exchanges, &orders)
            & groups::meet_goals(&exchanges, &orders)
            & charges.are_correct()
            & completions.are_within_bounds();
    }
    if is_fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn not_tested(why: &str) {
    eprintln!("\n*** NOT TESTED: {why} (set TOLLGATE_DATA) ***\n");
}
