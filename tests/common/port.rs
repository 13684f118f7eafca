//! Fixed ports for servers that tests stop and restart.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};

/// Returns a free port. It lies outside the ephemeral range, so that the kernel assigns it to no connection while its
/// server is stopped.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(61);
    let mut ports = std::iter::repeat_with(|| {
        10_000 + (first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))) % 20_000
    });
    let port = ports.find_map(|port| TcpListener::bind(("127.0.0.1", u16::try_from(port).ok()?)).ok());
    port.unwrap().local_addr().unwrap().port()
}
