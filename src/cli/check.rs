//! `tollgate check`: validates the config.

use super::{load_or_explain, output};
use std::path::PathBuf;
use std::process::ExitCode;

pub(super) fn run(config: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    match load_or_explain(config) {
        Err(code) => Ok(code),
        Ok(loaded) => {
            for warning in &loaded.warnings {
                output::print(&format!("warning: {warning}\n"))?;
            }
            let config = &loaded.config;
            output::print(&format!(
                "The config is valid. Environments: {}. Upstreams: {}. Listener for callers: {}. Admin listener: {}.\n",
                config.environments.len(),
                config.upstreams.len(),
                config.server.listen,
                config.admin.listen
            ))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
