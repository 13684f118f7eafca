//! A copy of the store while a gateway uses it. A copy of the file alone would lack the commits in the WAL.

use super::database::Database;
use anyhow::Context as _;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Writes a consistent copy of the store to a file that must not exist yet. Only its owner can read the copy.
///
/// # Errors
/// The store cannot be read, or the file exists or cannot be written.
pub(crate) fn back_up(store: &Path, file: &Path) -> anyhow::Result<()> {
    let database = Database::open_read_only(store)
        .with_context(|| format!("store.path, {}, cannot be read", store.display()))?;
    let (to, shown) = (file.to_str().context("the path of the copy is not UTF-8")?, file.display());
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .with_context(|| format!("cannot create {shown}: name a new file in a folder that exists"))?;
    // SQLite accepts a file that exists if it is empty.
    let copied = database.connection().execute("VACUUM INTO ?1", [to]);
    if copied.is_err() {
        drop(fs::remove_file(file));
    }
    copied.map(drop).with_context(|| format!("cannot copy {} to {shown}", store.display()))
}
