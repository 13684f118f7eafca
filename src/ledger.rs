//! Who holds what: the counters of every environment, and reservations that settle themselves.

use crate::clock::{self, Timestamp};
use crate::quota::{Amounts, Ask, Asker, Denied, Level, Quota, Quotas, Receipt, Standing};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The counters of one environment, shared by every request that draws on them.
#[derive(Debug)]
pub struct Account {
    max_in_flight: Option<u64>,
    counters: Mutex<Counters>,
}

#[derive(Debug)]
struct Counters {
    quotas: Quotas,
    in_flight: u64,
    totals: Totals,
}

/// Sums since the account was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests charged.
    pub requests: u64,
    /// Requests denied.
    pub rejected: u64,
    /// Prompt tokens charged.
    pub prompt: u64,
    /// Completion tokens charged.
    pub completion: u64,
    /// Total tokens charged.
    pub total: u64,
}

/// Why there is no reservation.
#[derive(Clone, Debug, PartialEq)]
pub enum NoRoom {
    /// Quotas that cannot hold it.
    Quota(Denied),
    /// So many requests are under way already.
    InFlight {
        /// The environment's bound.
        limit: u64,
    },
}

/// What an account looks like at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Reservations not yet settled.
    pub in_flight: u64,
    /// Every quota, in the config's order.
    pub levels: Vec<Level>,
    /// Sums since the account was opened.
    pub totals: Totals,
}

impl Account {
    /// Full quotas.
    pub fn open(quotas: &[Quota], max_in_flight: Option<u64>) -> Self {
        let quotas = Quotas::new(quotas, clock::now());
        Self {
            max_in_flight,
            counters: Mutex::new(Counters { quotas, in_flight: 0, totals: Totals::default() }),
        }
    }

    /// Holds room for one request in every quota it touches, or in none.
    ///
    /// # Errors
    /// What is in the way. A denied request changes nothing but the count of denials.
    pub fn reserve(self: &Arc<Self>, asker: Asker<'_>, ask: &Ask) -> Result<Reservation, NoRoom> {
        let now = clock::now();
        let mut counters = self.lock();
        match counters.reserve(now, asker, ask, self.max_in_flight) {
            Ok(receipt) => {
                counters.in_flight += 1;
                let standing = counters.quotas.standing(now, asker);
                drop(counters);
                Ok(Reservation {
                    account: self.clone(),
                    receipt: Some(receipt),
                    spent: Amounts::default(),
                    standing,
                })
            }
            Err(no_room) => {
                counters.totals.rejected += 1;
                Err(no_room)
            }
        }
    }

    /// What the asker is told of its quotas of each kind, in the order of `Kind::ALL`.
    pub fn standing(&self, asker: Asker<'_>) -> [Option<Standing>; 4] {
        self.lock().quotas.standing(clock::now(), asker)
    }

    /// The largest completion that the smallest quota could ever hold beside a prompt of this size.
    pub fn largest_completion(&self, asker: Asker<'_>, prompt: u64) -> u64 {
        self.lock().quotas.largest_completion(asker, prompt)
    }

    /// All counters at one moment.
    pub fn snapshot(&self) -> Snapshot {
        let now = clock::now();
        let mut counters = self.lock();
        Snapshot {
            in_flight: counters.in_flight,
            levels: counters.quotas.levels(now),
            totals: counters.totals,
        }
    }

    /// Reservations not yet settled.
    pub fn in_flight(&self) -> u64 {
        self.lock().in_flight
    }

    fn settle(&self, receipt: Receipt, spent: Amounts) {
        let now = clock::now();
        let mut counters = self.lock();
        counters.quotas.settle(now, receipt, spent);
        counters.in_flight = counters.in_flight.saturating_sub(1);
        let totals = &mut counters.totals;
        totals.requests += spent.requests;
        totals.prompt += spent.prompt;
        totals.completion += spent.completion;
        totals.total += spent.total;
    }

    /// A panic elsewhere while the lock was held cannot have left it half changed: amounts are
    /// checked before anything is taken.
    fn lock(&self) -> MutexGuard<'_, Counters> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counters {
    fn reserve(
        &mut self,
        now: Timestamp,
        asker: Asker<'_>,
        ask: &Ask,
        max_in_flight: Option<u64>,
    ) -> Result<Receipt, NoRoom> {
        if let Some(limit) = max_in_flight.filter(|&limit| self.in_flight >= limit) {
            return Err(NoRoom::InFlight { limit });
        }
        self.quotas.reserve(now, asker, ask).map_err(NoRoom::Quota)
    }
}

/// Room held in the quotas of one environment for one request. Dropping it settles the charge with
/// the last amounts observed, which are nothing until the request has gone to the upstream.
#[derive(Debug)]
#[must_use = "dropping a reservation settles it at once"]
pub struct Reservation {
    account: Arc<Account>,
    receipt: Option<Receipt>,
    spent: Amounts,
    standing: [Option<Standing>; 4],
}

impl Reservation {
    /// Records the latest word on what the request has cost.
    pub fn observe(&mut self, spent: Amounts) {
        self.spent = spent;
    }

    /// The latest word on what the request has cost.
    pub fn spent(&self) -> Amounts {
        self.spent
    }

    /// The quotas of each kind right after this reservation, in the order of `Kind::ALL`.
    pub fn standing(&self) -> &[Option<Standing>; 4] {
        &self.standing
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(receipt) = self.receipt.take() {
            self.account.settle(receipt, self.spent);
        }
    }
}
