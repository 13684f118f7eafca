//! The flood guard: how many requests one peer address may send, before anything of them is read.
//!
//! It protects the gateway, not the quotas: `governor` only admits and cannot give back.

use crate::clock::Stopwatch;
use crate::config::FloodGuard;
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Addresses that have been silent are forgotten so often, once there are many.
const SWEEP: Duration = Duration::from_secs(10);
const MANY: usize = 4_096;
/// That there are many is looked for once in so many calls.
const LOOKS: u32 = 1_024;

/// Counts requests by address.
#[derive(Debug)]
pub(super) struct Flood {
    limiter: DefaultKeyedRateLimiter<u64>,
    guard: FloodGuard,
    clock: DefaultClock,
    calls: AtomicU32,
    swept: Mutex<Stopwatch>,
}

impl Flood {
    pub(super) fn new(guard: FloodGuard) -> Option<Self> {
        let requests = NonZeroU32::new(guard.requests)?;
        let quota = Quota::with_period(guard.per / guard.requests)?.allow_burst(requests);
        Some(Self {
            limiter: RateLimiter::keyed(quota),
            guard,
            clock: DefaultClock::default(),
            calls: AtomicU32::new(0),
            swept: Mutex::new(Stopwatch::start()),
        })
    }

    /// Counts a request of this address.
    ///
    /// # Errors
    /// How long to wait for the next one.
    pub(super) fn check(&self, peer: IpAddr) -> Result<(), Duration> {
        if !self.guard.guards_loopback && peer.to_canonical().is_loopback() {
            return Ok(());
        }
        if self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOKS) {
            self.sweep();
        }
        let Err(not_until) = self.limiter.check_key(&key(peer)) else { return Ok(()) };
        Err(not_until.wait_time_from(self.clock.now()))
    }

    fn sweep(&self) {
        if self.limiter.len() < MANY {
            return;
        }
        let mut swept = self.swept.lock().unwrap_or_else(PoisonError::into_inner);
        if swept.elapsed() >= SWEEP {
            *swept = Stopwatch::start();
            drop(swept);
            self.limiter.retain_recent();
        }
    }
}

/// Whoever has one IPv6 address has all of its /64.
fn key(peer: IpAddr) -> u64 {
    match peer.to_canonical() {
        IpAddr::V4(v4) => u64::from(v4.to_bits()),
        IpAddr::V6(v6) => u64::try_from(v6.to_bits() >> 64).unwrap_or(0) | 1 << 63,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(requests: u32, guards_loopback: bool) -> Flood {
        Flood::new(FloodGuard { requests, per: Duration::from_mins(1), guards_loopback }).unwrap()
    }

    #[test]
    fn each_address_has_its_own_count() {
        let flood = guard(3, true);
        let [a, b]: [IpAddr; 2] = ["192.0.2.1", "192.0.2.2"].map(|a| a.parse().unwrap());
        assert_eq!((0..5).filter(|_| flood.check(a).is_ok()).count(), 3);
        assert!(flood.check(b).is_ok());
        let wait = flood.check(a).unwrap_err();
        assert!(wait > Duration::from_secs(15) && wait <= Duration::from_secs(20), "{wait:?}");
        // One peer, written in two ways.
        assert!(flood.check("::ffff:192.0.2.1".parse().unwrap()).is_err());
    }

    #[test]
    fn a_network_of_addresses_counts_as_one() {
        let flood = guard(2, true);
        let admitted = (0..10).filter(|n| flood.check(format!("2001:db8::{n}").parse().unwrap()).is_ok());
        assert_eq!(admitted.count(), 2);
        assert!(flood.check("2001:db8:0:1::1".parse().unwrap()).is_ok());
    }

    #[test]
    fn by_default_this_machine_itself_is_not_held_back() {
        let flood = guard(1, false);
        assert!((0..100).all(|_| flood.check("127.0.0.1".parse().unwrap()).is_ok()));
        assert!(
            Flood::new(FloodGuard { requests: 0, per: Duration::from_secs(1), guards_loopback: true })
                .is_none()
        );
    }
}
