//! Ports for servers that are killed and started again.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};

/// A port that nobody has now, nor gets while a server is away: not one of those that connections are made from.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(61);
    let mut ports = std::iter::repeat_with(|| {
        10_000 + (first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))) % 20_000
    });
    let port = ports.find_map(|port| TcpListener::bind(("127.0.0.1", u16::try_from(port).ok()?)).ok());
    port.unwrap().local_addr().unwrap().port()
}
