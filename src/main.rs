//! The `tollgate` program. The library's module `cli` contains its commands.

use std::process::ExitCode;

fn main() -> ExitCode {
    tollgate::cli::run()
}
