//! The flood guard: limits the request rate of each peer address, before a request is parsed.
//!
//! It protects the gateway. It cannot replace quotas, because it does not refund unused tokens.

use crate::clock::Stopwatch;
use crate::config::FloodGuard;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Number of maps that share the addresses, so that workers seldom wait for each other.
const SHARDS: usize = 64;
/// A map with fewer addresses keeps also those that are idle.
const MIN_ADDRESSES_TO_SWEEP: usize = 64;

/// Limits requests by address.
#[derive(Debug)]
pub(super) struct FloodLimiter {
    shards: [Mutex<Shard>; SHARDS],
    guard: FloodGuard,
    /// Time that one request uses up.
    interval: Duration,
    clock: Stopwatch,
}

/// Some of the addresses.
#[derive(Debug, Default)]
struct Shard {
    /// When each address will have no used requests left. The unused part of `per` is its room.
    idle_at: HashMap<u64, Duration>,
    /// Number of addresses at which idle ones are removed.
    sweep_at: usize,
}

impl FloodLimiter {
    /// `None`: the guard is off.
    pub(super) fn new(guard: FloodGuard) -> Option<Self> {
        let interval = guard.per.checked_div(guard.requests).filter(|interval| !interval.is_zero())?;
        let shards = std::array::from_fn(|_| Mutex::default());
        Some(Self { shards, guard, interval, clock: Stopwatch::start() })
    }

    /// Counts a request of this address.
    ///
    /// # Errors
    /// Returns the time after which this address may send its next request.
    pub(super) fn check(&self, peer: IpAddr) -> Result<(), Duration> {
        if !self.guard.guards_loopback && peer.to_canonical().is_loopback() {
            return Ok(());
        }
        self.count(key(peer), self.clock.elapsed())
    }

    /// The generic cell rate algorithm: each request moves the moment at which its address is idle by one interval.
    /// That moment is at most all intervals of the period ahead.
    fn count(&self, key: u64, now: Duration) -> Result<(), Duration> {
        let Some(shard) = self.shards.get(shard_of(key)) else { return Ok(()) };
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let idle_at = shard.idle_at.get(&key).copied().unwrap_or_default().max(now) + self.interval;
        let earliest = idle_at.saturating_sub(self.interval * self.guard.requests);
        if let Some(wait) = earliest.checked_sub(now).filter(|wait| !wait.is_zero()) {
            return Err(wait);
        }
        shard.idle_at.insert(key, idle_at);
        if shard.idle_at.len() > shard.sweep_at.max(MIN_ADDRESSES_TO_SWEEP) {
            shard.idle_at.retain(|_, idle_at| *idle_at > now);
            shard.sweep_at = 2 * shard.idle_at.len();
        }
        Ok(())
    }
}

/// The index of the map that has an address. Neighbouring addresses are in different maps.
fn shard_of(key: u64) -> usize {
    // The multiplier is 2^64 divided by the golden ratio.
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    usize::try_from(mixed).unwrap_or(0) % SHARDS
}

/// IPv6 addresses are counted by their /64 network, because one host usually controls all of it.
fn key(peer: IpAddr) -> u64 {
    match peer.to_canonical() {
        IpAddr::V4(v4) => u64::from(v4.to_bits()),
        IpAddr::V6(v6) => u64::try_from(v6.to_bits() >> 64).unwrap_or(0) | 1 << 63,
    }
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
    fn an_address_has_its_rate_and_a_burst_of_one_period() {
        let flood = guard(60, true);
        let at = |seconds: u64| Duration::from_secs(seconds);
        let admitted = |now: Duration| (0..1_000).filter(|_| flood.count(7, now).is_ok()).count();
        assert_eq!(admitted(at(100)), 60);
        assert_eq!(flood.count(7, at(100)), Err(at(1)));
        assert_eq!(admitted(at(101)), 1);
        assert_eq!(admitted(at(111)), 10);
        assert_eq!(admitted(at(1_000)), 60);
    }

    #[test]
    fn idle_addresses_are_removed() {
        let flood = guard(60, true);
        let addresses =
            || flood.shards.iter().map(|shard| shard.lock().unwrap().idle_at.len()).sum::<usize>();
        for second in 0..100_u64 {
            for n in 0..1_000 {
                flood.count(second * 1_000 + n, Duration::from_secs(second * 2)).unwrap();
            }
        }
        // One second after its request an address is idle.
        assert!(addresses() < 2 * SHARDS * MIN_ADDRESSES_TO_SWEEP, "{}", addresses());
        let largest = flood.shards.iter().map(|shard| shard.lock().unwrap().idle_at.len()).max();
        assert!(largest < Some(4 * MIN_ADDRESSES_TO_SWEEP), "{largest:?}");
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
