//! `tollgate schema`: prints the JSON Schema of the config.

use super::output;
use std::process::ExitCode;

pub(super) fn run() -> anyhow::Result<ExitCode> {
    output::print(&format!("{:#}\n", crate::config::schema()))?;
    Ok(ExitCode::SUCCESS)
}
