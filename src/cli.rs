//! The command line: what each command reads and prints. The work is done elsewhere.

mod check;
mod count;
mod demo;
mod hash_key;
mod serve;
mod simulate;

use clap::{CommandFactory as _, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

use crate::config::{Loaded, Source, load};

/// An OpenAI-compatible gateway that keeps every environment within its token quotas.
#[derive(Parser)]
#[command(version, about, propagate_version = true)]
struct Arguments {
    /// The config file. Default: $TOLLGATE_CONFIG, else config/tollgate.yaml
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the gateway (the default command)
    Serve,
    /// Runs the gateway against a built-in simulated backend: no key, no network
    Demo,
    /// Validates the config and prints every fault with its place and how to mend it
    Check,
    /// Prints the prompt token estimate of a request body
    Count(count::Arguments),
    /// Replays a trace through the quotas of the config and compares ways of reserving
    Simulate(simulate::Arguments),
    /// Reads a key on standard input and prints its SHA-256 for the config
    HashKey,
    /// Prints completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Failed while running.
const FAILED: u8 = 1;
/// Bad usage or bad config.
const BAD_CONFIG: u8 = 2;

/// Runs the program with the process's arguments.
pub fn run() -> ExitCode {
    let Arguments { config, command } = Arguments::parse();
    let result = match command.unwrap_or(Command::Serve) {
        Command::Serve => serve::run(config),
        Command::Demo => demo::run(),
        Command::Check => Ok(check::run(config)),
        Command::Count(arguments) => count::run(config, &arguments),
        Command::Simulate(arguments) => simulate::run(config, &arguments),
        Command::HashKey => hash_key::run(),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "tollgate", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("tollgate: {error:#}");
        ExitCode::from(FAILED)
    })
}

/// The config that was named, if any was.
fn named(config: Option<PathBuf>) -> Option<PathBuf> {
    config.or_else(|| std::env::var_os("TOLLGATE_CONFIG").map(PathBuf::from))
}

/// Loads the config that was asked for, or prints what is wrong with it.
fn load_or_explain(config: Option<PathBuf>) -> Result<Loaded, ExitCode> {
    let path = named(config).unwrap_or_else(|| PathBuf::from("config/tollgate.yaml"));
    load(&Source { path }).map_err(|faults| {
        eprintln!("{faults}");
        ExitCode::from(BAD_CONFIG)
    })
}
