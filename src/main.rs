//! The `tollgate` program. The library's module `cli` contains its commands.

use std::process::ExitCode;

/// It returns the memory of a storm of requests to the system within some seconds, which glibc's allocator does not. That of
/// musl has one lock for all threads.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tollgate::cli::run()
}
