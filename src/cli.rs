//! The command line. Each command is a file that reads arguments and prints results; other modules do the work.

mod backup;
mod check;
mod count;
mod demo;
mod hash_key;
mod health;
mod init;
mod man;
mod new_key;
mod output;
mod schema;
mod serve;
mod simulate;
mod usage;

use clap::{CommandFactory as _, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

use crate::app::load_certificate;
use crate::clock;
use crate::config::{Config, Loaded, load};

/// An OpenAI-compatible gateway that keeps every environment within its token quotas
#[derive(Parser)]
#[command(version, about, propagate_version = true)]
struct Arguments {
    /// Path of the config file [default: $TOLLGATE_CONFIG, else config/tollgate.yaml]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<CliCommand>,
}

#[derive(Subcommand)]
enum CliCommand {
    /// Runs the gateway (the default command)
    Serve,
    /// Runs the gateway with a built-in simulated backend, without a key and without network
    Demo,
    /// Validates the config and prints every fault with its location and how to fix it
    Check(check::CheckArguments),
    /// Prints the JSON Schema of the config, for editors, or the reference of its keys
    Schema(schema::SchemaArguments),
    /// Prints the prompt token estimate of a request body
    Count(count::CountArguments),
    /// Replays a trace of requests through the quotas of the config and compares reservation modes
    Simulate(simulate::SimulateArguments),
    /// Writes a config file with comments, to start from
    Init(init::InitArguments),
    /// Makes a random key for a caller, and the line with its digest for the config
    NewKey(new_key::NewKeyArguments),
    /// Prints the usage history of the store, also while a gateway runs
    Usage(usage::UsageArguments),
    /// Copies the store to a file, also while a gateway runs
    Backup(backup::BackupArguments),
    /// Asks a running gateway whether it is ready, for health checks of containers
    Health(health::HealthArguments),
    /// Reads a key from standard input and prints its SHA-256 for the config
    HashKey,
    /// Prints a script with command completions for a shell
    Completions {
        /// Name of the shell
        shell: clap_complete::Shell,
    },
    /// Prints the manual page, or writes the pages of all commands to a folder
    Man(man::ManArguments),
}

/// Exit code of a command that failed while running.
const FAILED: u8 = 1;
/// Exit code for wrong usage or an invalid config.
const BAD_CONFIG: u8 = 2;

/// Runs the command that the arguments of the process name.
pub fn run() -> ExitCode {
    let Arguments { config, command } = Arguments::parse();
    let result = match command.unwrap_or(CliCommand::Serve) {
        CliCommand::Serve => serve::run(config),
        CliCommand::Demo => demo::run(),
        CliCommand::Check(arguments) => check::run(config, &arguments),
        CliCommand::Schema(arguments) => schema::run(&arguments),
        CliCommand::Count(arguments) => count::run(config, &arguments),
        CliCommand::Simulate(arguments) => simulate::run(config, &arguments),
        CliCommand::Usage(arguments) => usage::run(config, &arguments),
        CliCommand::Backup(arguments) => backup::run(config, &arguments),
        CliCommand::Init(arguments) => init::run(config, &arguments),
        CliCommand::NewKey(arguments) => new_key::run(&arguments),
        CliCommand::Health(arguments) => health::run(config, &arguments),
        CliCommand::HashKey => hash_key::run(),
        CliCommand::Completions { shell } => print_completions(shell),
        CliCommand::Man(arguments) => man::run(Arguments::command(), &arguments),
    };
    result.unwrap_or_else(|error| {
        if output::is_closed_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        output::report(&format!("tollgate: {error:#}"));
        ExitCode::from(FAILED)
    })
}

fn print_completions(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "tollgate", &mut script);
    output::print(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}

/// The path from the arguments or from `TOLLGATE_CONFIG`, if there is one.
fn config_path(config: Option<PathBuf>) -> Option<PathBuf> {
    config.or_else(|| std::env::var_os("TOLLGATE_CONFIG").map(PathBuf::from))
}

/// The path of the config file. It need not exist.
fn config_path_or_default(config: Option<PathBuf>) -> PathBuf {
    config_path(config).unwrap_or_else(|| PathBuf::from("config/tollgate.yaml"))
}

/// Reads the certificates of the listeners. Returns warnings, or prints the faults and returns the exit code.
fn check_certificates(config: &Config) -> Result<Vec<String>, ExitCode> {
    let (server, admin) = (&config.server, &config.admin);
    let pairs = [("server", &server.tls, server.http2), ("admin", &admin.tls, true)];
    let (mut warnings, mut faults) = (Vec::new(), Vec::new());
    for (section, files, http2) in pairs {
        let Some(files) = files else { continue };
        match load_certificate(section, files, http2) {
            Ok(certificate) => warnings.extend(certificate.expiry_warning(section, clock::now())),
            Err(fault) => faults.push(fault),
        }
    }
    if faults.is_empty() {
        return Ok(warnings);
    }
    faults.iter().for_each(|fault| output::report(fault));
    Err(ExitCode::from(BAD_CONFIG))
}

/// Loads the config, or prints its faults and returns the exit code.
fn load_or_explain(config: Option<PathBuf>) -> Result<Loaded, ExitCode> {
    let path = config_path_or_default(config);
    if !path.exists() {
        output::report(&format!(
            "tollgate: there is no config file {}. `tollgate demo` runs without one, `tollgate init` writes one, and `--config FILE` names another.",
            path.display()
        ));
        return Err(ExitCode::from(BAD_CONFIG));
    }
    load(&path).map_err(|faults| {
        let count = faults.count();
        let end =
            if count == 1 { "There is 1 fault.".to_owned() } else { format!("There are {count} faults.") };
        output::report(&format!("{faults}\n{end}"));
        ExitCode::from(BAD_CONFIG)
    })
}
