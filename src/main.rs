//! The `tollgate` program. The library's module `cli` contains its commands.

use std::process::ExitCode;

/// The background thread of jemalloc returns freed memory to the system within 10 s. glibc's allocator keeps the memory of
/// many streams that have ended.
#[cfg(not(target_env = "musl"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The allocator of musl has one lock for all threads. There jemalloc has no background thread.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tollgate::cli::run()
}
