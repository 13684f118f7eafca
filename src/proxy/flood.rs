//! The flood guard: limits the request rate of each peer address, before a request is parsed.
//!
//! It protects the gateway. It cannot replace quotas, because `governor` cannot refund unused tokens.

use crate::clock::Stopwatch;
use crate::config::FloodGuard;
use crate::server::network_of;
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Idle addresses are removed at most this often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// Idle addresses are removed only above this number of addresses.
const MIN_ADDRESSES_TO_SWEEP: usize = 4_096;
/// One in this many calls checks whether a sweep is due.
const CALLS_PER_SWEEP_CHECK: u32 = 1_024;
/// With more addresses than this, new ones share counters, so that invented addresses cannot fill the memory.
const MAX_ADDRESSES: usize = 65_536;
/// Counters that addresses share if there are too many of them.
const SHARED_COUNTERS: u64 = 4_096;

/// Limits requests by address.
#[derive(Debug)]
pub(super) struct FloodLimiter {
    limiter: DefaultKeyedRateLimiter<u64>,
    guard: FloodGuard,
    clock: DefaultClock,
    calls: AtomicU32,
    /// Whether there are more than [`MAX_ADDRESSES`].
    is_full: AtomicBool,
    last_sweep: Mutex<Stopwatch>,
}

impl FloodLimiter {
    /// `None`: the guard is off.
    pub(super) fn new(guard: FloodGuard) -> Option<Self> {
        let requests = NonZeroU32::new(guard.requests)?;
        let quota = Quota::with_period(guard.per / guard.requests)?.allow_burst(requests);
        Some(Self {
            limiter: RateLimiter::keyed(quota),
            guard,
            clock: DefaultClock::default(),
            calls: AtomicU32::new(0),
            is_full: AtomicBool::new(false),
            last_sweep: Mutex::new(Stopwatch::start()),
        })
    }

    /// Counts a request of this address.
    ///
    /// # Errors
    /// Returns the time after which this address may send its next request.
    pub(super) fn check(&self, peer: IpAddr) -> Result<(), Duration> {
        if !self.guard.guards_loopback && peer.to_canonical().is_loopback() {
            return Ok(());
        }
        if self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(CALLS_PER_SWEEP_CHECK) {
            self.sweep();
        }
        let key = key(peer);
        let key = if self.is_full.load(Ordering::Relaxed) { shared_key(key) } else { key };
        let Err(not_until) = self.limiter.check_key(&key) else { return Ok(()) };
        Err(not_until.wait_time_from(self.clock.now()))
    }

    fn sweep(&self) {
        let addresses = self.limiter.len();
        self.is_full.store(addresses > MAX_ADDRESSES, Ordering::Relaxed);
        if addresses < MIN_ADDRESSES_TO_SWEEP {
            return;
        }
        let mut last_sweep = self.last_sweep.lock().unwrap_or_else(PoisonError::into_inner);
        if last_sweep.elapsed() >= SWEEP_INTERVAL {
            *last_sweep = Stopwatch::start();
            drop(last_sweep);
            self.limiter.retain_recent();
            self.limiter.shrink_to_fit();
        }
    }
}

/// IPv6 addresses are counted by their /64 network, because one host usually controls all of it.
fn key(peer: IpAddr) -> u64 {
    match network_of(peer) {
        IpAddr::V4(v4) => u64::from(v4.to_bits()),
        IpAddr::V6(v6) => u64::try_from(v6.to_bits() >> 64).unwrap_or(0) | 1 << 63,
    }
}

/// The counter of an address that has none of its own. No address has this key.
fn shared_key(key: u64) -> u64 {
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (mixed % SHARED_COUNTERS) | (1 << 62)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(requests: u32, guards_loopback: bool) -> FloodLimiter {
        FloodLimiter::new(FloodGuard { requests, per: Duration::from_mins(1), guards_loopback }).unwrap()
    }

    #[test]
    fn each_address_has_its_own_limit() {
        let flood = guard(3, true);
        let [a, b]: [IpAddr; 2] = ["192.0.2.1", "192.0.2.2"].map(|a| a.parse().unwrap());
        assert_eq!((0..5).filter(|_| flood.check(a).is_ok()).count(), 3);
        assert!(flood.check(b).is_ok());
        let wait = flood.check(a).unwrap_err();
        assert!(wait > Duration::from_secs(15) && wait <= Duration::from_secs(20), "{wait:?}");
        // The same address, written as an IPv4-mapped IPv6 address.
        assert!(flood.check("::ffff:192.0.2.1".parse().unwrap()).is_err());
    }

    #[test]
    fn an_ipv6_network_counts_as_one_address() {
        let flood = guard(2, true);
        let admitted = (0..10).filter(|n| flood.check(format!("2001:db8::{n}").parse().unwrap()).is_ok());
        assert_eq!(admitted.count(), 2);
        assert!(flood.check("2001:db8:0:1::1".parse().unwrap()).is_ok());
    }

    #[test]
    fn a_million_invented_addresses_have_a_bounded_number_of_counters() {
        let flood = guard(1, true);
        let most = u32::try_from(MAX_ADDRESSES).unwrap();
        let admitted = (0..1_000_000u32).filter(|n| flood.check(IpAddr::V4((*n).into())).is_ok()).count();
        let bound =
            MAX_ADDRESSES + CALLS_PER_SWEEP_CHECK as usize + usize::try_from(SHARED_COUNTERS).unwrap();
        assert!(flood.limiter.len() <= bound, "{}", flood.limiter.len());
        assert!(admitted <= bound, "{admitted}");
        // An address that has a counter is limited as before, also if it now shares one.
        assert!(flood.check(IpAddr::V4((most * 10).into())).is_err());
    }

    #[test]
    fn loopback_is_not_limited_by_default() {
        let flood = guard(1, false);
        assert!((0..100).all(|_| flood.check("127.0.0.1".parse().unwrap()).is_ok()));
        assert!(
            FloodLimiter::new(FloodGuard { requests: 0, per: Duration::from_secs(1), guards_loopback: true })
                .is_none()
        );
    }
}
