//! The `tollgate` program. The library's module `cli` contains its commands.

use std::process::ExitCode;

/// jemalloc returns freed memory to the system within 10 s: by a thread of its own or, with musl, in the threads that use it.
/// glibc's allocator keeps the memory of many streams that have ended. musl's allocator has one lock for all threads.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    tollgate::cli::run()
}
