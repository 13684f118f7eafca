//! The `tollgate` program. Everything it does is in the library's `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tollgate::cli::run()
}
