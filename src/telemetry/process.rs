//! Metrics of the process, with the names that all of Prometheus's client libraries use.

use super::catalogue::{
    Metric, PROCESS_CPU, PROCESS_MAX_FDS, PROCESS_OPEN_FDS, PROCESS_RESIDENT, PROCESS_START, PROCESS_VIRTUAL,
};
use super::exposition::{Family, seconds};
use crate::clock::Timestamp;
use std::fmt::Display;
use std::fs;

/// Appends the metrics of this process. It reads files of `/proc`; a figure that cannot be read is absent.
pub(super) fn append(text: &mut String, started: Timestamp) {
    append_one(text, &PROCESS_CPU, cpu_seconds());
    let [virtual_bytes, resident_bytes] = memory().map_or([None; 2], |bytes| bytes.map(Some));
    append_one(text, &PROCESS_VIRTUAL, virtual_bytes);
    append_one(text, &PROCESS_RESIDENT, resident_bytes);
    // The directory itself is open while it is read.
    let open = fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1));
    append_one(text, &PROCESS_OPEN_FDS, open);
    append_one(text, &PROCESS_MAX_FDS, max_fds());
    append_one(text, &PROCESS_START, Some(seconds(started.0)));
}

fn append_one(text: &mut String, metric: &'static Metric, value: Option<impl Display>) {
    if let Some(value) = value {
        let mut family = Family::new(metric);
        family.add("", value);
        family.append_to(text);
    }
}

#[cfg(unix)]
#[allow(clippy::unnecessary_wraps)] // other systems have none
fn cpu_seconds() -> Option<f64> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    #[allow(clippy::cast_precision_loss)] // exact for 285,000 years
    Some(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

#[cfg(not(unix))]
fn cpu_seconds() -> Option<f64> {
    None
}

/// Virtual and resident memory in bytes.
#[cfg(unix)]
fn memory() -> Option<[u64; 2]> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let page = u64::try_from(rustix::param::page_size()).ok()?;
    let mut pages = text.split_ascii_whitespace().map(str::parse::<u64>);
    let mut next = || pages.next()?.ok()?.checked_mul(page);
    Some([next()?, next()?])
}

#[cfg(not(unix))]
fn memory() -> Option<[u64; 2]> {
    None
}

/// `None`: unlimited or unknown.
#[cfg(unix)]
fn max_fds() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current
}

#[cfg(not(unix))]
fn max_fds() -> Option<u64> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_process_has_all_figures() {
        let mut text = String::new();
        append(&mut text, Timestamp(1_800_000_000_500));
        let value = |metric: &Metric| {
            let line = text.lines().find_map(|line| line.strip_prefix(metric.name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("no {}", metric.name)).parse::<f64>().unwrap()
        };
        for metric in [&PROCESS_CPU, &PROCESS_VIRTUAL, &PROCESS_OPEN_FDS, &PROCESS_MAX_FDS] {
            assert!(value(metric) > 0.0, "{}", metric.name);
        }
        assert!((1e6..1e11).contains(&value(&PROCESS_RESIDENT)));
        assert!((value(&PROCESS_START) - 1_800_000_000.5).abs() < 1e-3);
    }
}
