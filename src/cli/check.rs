//! `tollgate check`: validates the config.

use super::load_or_explain;
use std::path::PathBuf;
use std::process::ExitCode;

pub(super) fn run(config: Option<PathBuf>) -> ExitCode {
    match load_or_explain(config) {
        Err(code) => code,
        Ok(loaded) => {
            for warning in &loaded.warnings {
                println!("warning: {warning}");
            }
            let config = &loaded.config;
            println!(
                "The config is valid. Environments: {}. Upstreams: {}. Listener for callers: {}. Admin listener: {}.",
                config.environments.len(),
                config.upstreams.len(),
                config.server.listen,
                config.admin.listen
            );
            ExitCode::SUCCESS
        }
    }
}
