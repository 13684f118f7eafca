//! Slows down guesses of the admin token: an address with several wrong tokens has to wait before its next attempt.

use crate::clock::Timestamp;
use crate::server::network_of;
use std::collections::HashMap;
use std::net::IpAddr;

/// Wrong tokens of an address that cost no wait.
const FREE_GUESSES: u32 = 5;
/// The wait after the next wrong token. It doubles with each further one.
const FIRST_WAIT_MS: u64 = 1_000;
/// The longest wait.
const MAX_WAIT_MS: u64 = 60_000;
/// An address that sent no wrong token for this long starts again.
const FORGET_AFTER_MS: u64 = 3_600_000;
/// Number of addresses that are remembered. When there are more, the address with the oldest last guess is removed.
const MAX_ADDRESSES: usize = 4_096;

/// The addresses that sent wrong tokens.
#[derive(Debug, Default)]
pub(super) struct Guesses(HashMap<IpAddr, WrongTokens>);

#[derive(Clone, Copy, Debug)]
struct WrongTokens {
    count: u32,
    last: Timestamp,
    blocked_until: Timestamp,
}

impl Guesses {
    /// How long an address must wait until its next token is checked, in milliseconds; 0: no wait.
    pub(super) fn wait_ms(&self, address: IpAddr, now: Timestamp) -> u64 {
        self.0.get(&network_of(address)).map_or(0, |wrong| wrong.blocked_until.ms_since(now).min(MAX_WAIT_MS))
    }

    /// Records a wrong token.
    pub(super) fn record(&mut self, address: IpAddr, now: Timestamp) {
        let address = network_of(address);
        self.0.retain(|_, wrong| now.ms_since(wrong.last) < FORGET_AFTER_MS);
        if self.0.len() >= MAX_ADDRESSES
            && !self.0.contains_key(&address)
            && let Some(oldest) =
                self.0.iter().min_by_key(|(_, wrong)| wrong.last).map(|(address, _)| *address)
        {
            self.0.remove(&oldest);
        }
        let new = WrongTokens { count: 0, last: now, blocked_until: now };
        let wrong = self.0.entry(address).or_insert(new);
        wrong.count += 1;
        wrong.last = now;
        if wrong.count >= FREE_GUESSES {
            let doublings = (wrong.count - FREE_GUESSES).min(6);
            wrong.blocked_until = now.plus_ms((FIRST_WAIT_MS << doublings).min(MAX_WAIT_MS));
        }
    }

    /// Forgets the wrong tokens of an address that has sent the right one.
    pub(super) fn forget(&mut self, address: IpAddr) {
        self.0.remove(&network_of(address));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    #[test]
    fn the_wait_begins_after_five_wrong_tokens_and_doubles_up_to_a_minute() {
        let (mut guesses, mut now) = (Guesses::default(), Timestamp(0));
        let mut waits = Vec::new();
        for _ in 0..14 {
            guesses.record(address(1), now);
            let wait = guesses.wait_ms(address(1), now);
            waits.push(wait / 1_000);
            now = now.plus_ms(wait);
            assert_eq!(guesses.wait_ms(address(1), now), 0);
        }
        assert_eq!(waits, [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]);
        assert_eq!(guesses.wait_ms(address(2), now), 0);
        guesses.forget(address(1));
        guesses.record(address(1), now);
        assert_eq!(guesses.wait_ms(address(1), now), 0);
    }

    #[test]
    fn guesses_are_forgotten_after_an_hour_and_bounded_in_number() {
        let mut guesses = Guesses::default();
        (0..9).for_each(|_| guesses.record(address(0), Timestamp(0)));
        for n in 1..10_000 {
            guesses.record(address(n), Timestamp(i64::from(n)));
        }
        assert_eq!(guesses.0.len(), MAX_ADDRESSES);
        guesses.record(address(1), Timestamp(0).plus_ms(FORGET_AFTER_MS + 10_000));
        assert_eq!(guesses.0.len(), 1);
    }

    #[test]
    fn addresses_of_one_ipv6_network_count_as_one() {
        let mut guesses = Guesses::default();
        for n in 0..5u16 {
            guesses.record(IpAddr::V6([0x2001, 0xdb8, 0, 1, 0, 0, 0, n].into()), Timestamp(0));
        }
        assert_eq!(
            guesses.wait_ms(IpAddr::V6([0x2001, 0xdb8, 0, 1, 9, 9, 9, 9].into()), Timestamp(0)),
            1_000
        );
        assert_eq!(guesses.wait_ms(IpAddr::V6([0x2001, 0xdb8, 0, 2, 0, 0, 0, 1].into()), Timestamp(0)), 0);
    }
}
