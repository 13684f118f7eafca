//! The reservation and the log record of a request.

use crate::ledger::Reservation;
use crate::quota::Amounts;
use crate::telemetry::Record;

/// The reservation of a request and its log record. Dropping it settles the reservation, then writes the record.
pub(super) struct Charge {
    /// `None`: nothing is reserved, or the reservation is settled.
    pub(super) reservation: Option<Reservation>,
    /// Boxed, because a request passes its charge through many functions.
    pub(super) record: Box<Record>,
}

/// Request ids and model names are logged up to this length, because upstreams and callers choose them.
const MAX_LOGGED_NAME_BYTES: usize = 128;

/// The part of a name that is logged.
pub(super) fn logged_name(name: &str) -> &str {
    &name[..name.floor_char_boundary(MAX_LOGGED_NAME_BYTES)]
}

impl Charge {
    /// Sets what the request has cost so far. The last amounts are the ones that are settled.
    pub(super) fn observe(&mut self, spent: Amounts) {
        if let Some(reservation) = &mut self.reservation {
            reservation.observe(spent);
            self.record.charged = spent;
        }
    }
}
