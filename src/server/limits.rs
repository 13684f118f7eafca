//! Bounds of the open connections of a listener: in total, and from one address.

use ipnet::IpNet;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// The bounds of the connections of one listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConnectionBounds {
    /// Further connections wait in the kernel's queue.
    pub(crate) total: usize,
    /// Further connections of the same address are closed. `None`: no bound.
    pub(crate) per_address: Option<usize>,
    /// Whether the bound per address also applies to addresses of this machine.
    pub(crate) bounds_loopback: bool,
    /// Networks without a bound per address: a proxy sends the requests of many callers.
    pub(crate) exempt: Vec<IpNet>,
}

/// The open connections of one listener. All its sockets share it.
#[derive(Debug)]
pub(super) struct ConnectionLimits(Mutex<OpenConnections>);

#[derive(Debug)]
struct OpenConnections {
    bounds: ConnectionBounds,
    open: usize,
    by_address: HashMap<IpAddr, usize>,
    /// The accept loops that wait for a slot.
    waiting: Vec<Waker>,
}

/// The right to have one connection open. Dropping it lets another one in.
#[derive(Debug)]
pub(super) struct Slot {
    limits: Arc<ConnectionLimits>,
    /// The address whose connections are counted.
    address: Option<IpAddr>,
}

impl ConnectionLimits {
    pub(super) fn new(bounds: ConnectionBounds) -> Arc<Self> {
        let (by_address, waiting) = (HashMap::new(), Vec::new());
        Arc::new(Self(Mutex::new(OpenConnections { bounds, open: 0, by_address, waiting })))
    }

    /// Changes the bounds. Open connections stay open.
    pub(super) fn set(&self, bounds: ConnectionBounds) {
        let mut state = self.lock();
        state.bounds = bounds;
        state.waiting.drain(..).for_each(Waker::wake);
    }

    /// Takes a slot, or waits until a connection has ended.
    pub(super) fn poll_slot(self: &Arc<Self>, cx: &Context<'_>) -> Poll<Slot> {
        let mut state = self.lock();
        if state.open < state.bounds.total {
            state.open += 1;
            return Poll::Ready(Slot { limits: self.clone(), address: None });
        }
        if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            state.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// A slot beyond the maximum number of connections.
    pub(super) fn extra_slot(self: &Arc<Self>) -> Slot {
        self.lock().open += 1;
        Slot { limits: self.clone(), address: None }
    }

    fn lock(&self) -> MutexGuard<'_, OpenConnections> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// Counts the connection for its address. `None`: the address has too many.
    pub(super) fn count_for(mut self, peer: IpAddr) -> Option<Self> {
        let peer = peer.to_canonical();
        let mut state = self.limits.lock();
        let ConnectionBounds { per_address, bounds_loopback, exempt, .. } = &state.bounds;
        let is_bounded = (*bounds_loopback || !peer.is_loopback())
            && !exempt.iter().any(|network| network.contains(&peer));
        let Some(max) = per_address.filter(|_| is_bounded) else {
            drop(state);
            return Some(self);
        };
        let address = network_of(peer);
        let open = state.by_address.entry(address).or_default();
        if *open >= max {
            drop(state);
            return None;
        }
        *open += 1;
        drop(state);
        self.address = Some(address);
        Some(self)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.limits.lock();
        state.open -= 1;
        if let Some(address) = self.address
            && let Some(open) = state.by_address.get_mut(&address)
        {
            *open -= 1;
            if *open == 0 {
                state.by_address.remove(&address);
            }
        }
        state.waiting.drain(..).for_each(Waker::wake);
    }
}

/// The network that counts as one address: for IPv6 a /64, because one host usually controls all of it.
pub(crate) fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 64 << 64).into()),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(total: usize, per_address: usize) -> ConnectionBounds {
        let exempt = vec!["10.0.0.0/8".parse().unwrap()];
        ConnectionBounds { total, per_address: Some(per_address), bounds_loopback: false, exempt }
    }

    fn take(limits: &Arc<ConnectionLimits>) -> Option<Slot> {
        match limits.poll_slot(&Context::from_waker(Waker::noop())) {
            Poll::Ready(slot) => Some(slot),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_slot_is_free_again_when_its_connection_ends() {
        let limits = ConnectionLimits::new(bounds(2, 9));
        let (first, second) = (take(&limits).unwrap(), take(&limits).unwrap());
        assert!(take(&limits).is_none());
        drop(first);
        let third = take(&limits).unwrap();
        assert!(take(&limits).is_none());
        limits.set(bounds(3, 9));
        let fourth = take(&limits).unwrap();
        drop((second, third, fourth));
        assert_eq!(limits.lock().open, 0);
    }

    #[test]
    fn an_address_has_a_bounded_number_of_connections() {
        let limits = ConnectionLimits::new(bounds(1_000, 2));
        let connect = |address: &str| take(&limits).unwrap().count_for(address.parse().unwrap());
        let open: Vec<Slot> =
            ["192.0.2.1", "::ffff:192.0.2.1"].map(|address| connect(address).unwrap()).into();
        assert!(connect("192.0.2.1").is_none());
        let others = ["192.0.2.2", "10.0.0.1", "10.0.0.1", "10.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.1"];
        let others: Vec<Slot> = others.iter().map(|address| connect(address).unwrap()).collect();
        let network = ["2001:db8::1", "2001:db8::2"].map(|address| connect(address).unwrap());
        assert!(connect("2001:db8::3").is_none());
        drop((open, others, network));
        assert!(connect("192.0.2.1").is_some());
        assert!(limits.lock().by_address.is_empty() && limits.lock().open == 0);
    }
}
