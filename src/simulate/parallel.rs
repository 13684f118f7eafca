//! Jobs on all cores.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Runs the jobs with these numbers, from 0 on, as many at once as there are cores. Returns their results in order. `None`:
/// the job, or one before it on the same thread, has panicked; the message is already printed.
pub(super) fn run_jobs<T: Send>(count: usize, job: impl Fn(usize) -> T + Sync) -> Vec<Option<T>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return done;
            }
            done.push((at, job(at)));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(count);
    let mut results: Vec<Option<T>> = (0..count).map(|_| None).collect();
    thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for (at, result) in handles.into_iter().flat_map(|handle| handle.join().unwrap_or_default()) {
            results[at] = Some(result);
        }
    });
    results
}
