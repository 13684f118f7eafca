//! `tollgate backup`: copies the store, also while a gateway runs.

use super::{load_or_explain, output};
use crate::store;
use anyhow::bail;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct BackupArguments {
    /// The file to write; it must not exist yet
    file: PathBuf,
}

pub(super) fn run(config: Option<PathBuf>, arguments: &BackupArguments) -> anyhow::Result<ExitCode> {
    let settings = match load_or_explain(config) {
        Ok(loaded) => loaded.config.store,
        Err(code) => return Ok(code),
    };
    if settings.memory {
        bail!("the config stores nothing (store.memory: true), so there is nothing to copy");
    }
    store::back_up(&settings.path, &arguments.file)?;
    output::print(&format!(
        "Copied {} to {}. To restore it, stop the gateway and move the copy to store.path; delete the files with -wal and -shm at the end of their names.\n",
        settings.path.display(),
        arguments.file.display()
    ))?;
    Ok(ExitCode::SUCCESS)
}
