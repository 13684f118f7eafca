//! The journal: changes of reservations that Redis has not acknowledged. Its steps are numbered and sent in batches,
//! so that Redis applies each step once. The last acknowledged steps are kept, in case Redis loses them.

use crate::quota::{Amounts, Receipt};
use crate::redis::{Piece, ScriptCommand, SentSteps, Step, StepKind};
use smallvec::SmallVec;
use std::collections::VecDeque;

/// Maximum steps in one call, and reservations in one call. A longer call would block Redis for longer than other
/// nodes wait for a reply.
pub(super) const MAX_BATCH: usize = 200;
/// Maximum acknowledged steps that the journal keeps. They take about 8 MB.
const MAX_ACKNOWLEDGED: usize = 20_000;

/// A reservation of this node that is open, or that Redis may still hold.
#[derive(Debug)]
pub(super) struct TrackedReservation {
    /// Redis may have this reservation: it admitted it, or it may have received a call whose reply was lost.
    pub(super) may_be_in_redis: bool,
    /// Redis confirmed this reservation after the last reconnect.
    pub(super) is_confirmed: bool,
    /// The held amounts. Empty if the request was cancelled before this node received the decision of Redis.
    pub(super) pieces: SmallVec<[Piece; 1]>,
    /// The amounts that Redis has acknowledged as spent. Steps that are still in the journal are not included.
    pub(super) acknowledged: Amounts,
}

impl TrackedReservation {
    /// Sum of all pieces.
    pub(super) fn reserved(&self) -> Amounts {
        self.pieces.iter().fold(Amounts::default(), |sum, piece| sum.saturating_add(piece.reserved))
    }

    /// The reservation in the state that Redis has acknowledged.
    pub(super) fn acknowledged_pieces(&self) -> Vec<Piece> {
        let mut left = self.acknowledged;
        let acknowledged = |piece: &Piece| {
            let spent = left.min(piece.reserved);
            left = left.saturating_sub(spent);
            Piece { spent, ..piece.clone() }
        };
        self.pieces.iter().map(acknowledged).collect()
    }
}

/// A receipt in the form in which Redis stores it.
pub(super) fn piece(receipt: &Receipt) -> Piece {
    Piece { reserved: receipt.reserved(), spent: receipt.marked_spent(), cells: receipt.holds().collect() }
}

/// Steps that Redis has not acknowledged, and the last ones that it has.
#[derive(Debug)]
pub(super) struct Journal {
    /// Steps that Redis has not acknowledged.
    pub(super) entries: VecDeque<JournalEntry>,
    /// The number of the first entry.
    pub(super) first: u64,
    /// The steps before the first entry. A replica that becomes the master may lack them.
    acknowledged: VecDeque<JournalEntry>,
}

#[derive(Debug)]
pub(super) struct JournalEntry {
    pub(super) step: Step,
    /// If the step settles a reservation: its number and its last state, in case Redis loses the reservation.
    pub(super) settled: Option<(u64, TrackedReservation)>,
}

/// A call that sends steps of the journal.
#[derive(Debug)]
pub(in crate::ledger) struct Batch {
    pub(in crate::ledger) command: ScriptCommand,
    pub(super) steps: usize,
    /// The cells whose states the reply contains.
    pub(super) cells: Vec<u32>,
}

impl Journal {
    pub(super) fn new() -> Self {
        Self { entries: VecDeque::new(), first: 1, acknowledged: VecDeque::new() }
    }

    pub(super) fn push(&mut self, step: Step) {
        self.entries.push_back(JournalEntry { step, settled: None });
    }

    pub(super) fn push_settlement(&mut self, id: u64, spent: Amounts, reservation: TrackedReservation) {
        let step = Step::new(StepKind::Settle, id.to_string(), spent);
        self.entries.push_back(JournalEntry { step, settled: Some((id, reservation)) });
    }

    /// The number that the next step will get.
    pub(super) fn next_step(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// The settled reservations whose settlement Redis has not acknowledged, each with its number and that of the step.
    pub(super) fn settled(&self) -> impl Iterator<Item = (u64, &TrackedReservation, u64)> {
        let numbered = self.entries.iter().zip(self.first..);
        numbered.filter_map(|(entry, step)| entry.settled.as_ref().map(|(id, held)| (*id, held, step)))
    }

    pub(super) fn settled_mut(&mut self) -> impl Iterator<Item = (u64, &mut TrackedReservation)> {
        self.entries.iter_mut().filter_map(|entry| entry.settled.as_mut()).map(|(id, held)| (*id, held))
    }

    /// Records that Redis has acknowledged the first steps. Returns the amounts that they reported as spent, each with
    /// the number of its reservation.
    pub(super) fn acknowledge(&mut self, steps: usize) -> Vec<(u64, Amounts)> {
        let steps = steps.min(self.entries.len());
        self.first += steps as u64;
        let progress = self.entries.iter().take(steps).map(|entry| &entry.step);
        let progress = progress.filter(|step| step.kind == StepKind::Progress);
        let spent = progress.filter_map(|step| Some((step.id.parse().ok()?, step.amounts))).collect();
        self.acknowledged.extend(self.entries.drain(..steps));
        let excess = self.acknowledged.len().saturating_sub(MAX_ACKNOWLEDGED);
        self.acknowledged.drain(..excess);
        spent
    }

    /// The steps sent so far.
    pub(super) fn sent(&self, data_set: u64, first_joined: u64) -> SentSteps {
        let oldest = self.first - self.acknowledged.len() as u64;
        SentSteps { oldest, acknowledged: self.first - 1, data_set, first_joined }
    }

    /// Forgets the acknowledged steps.
    pub(super) fn forget_acknowledged(&mut self) {
        self.acknowledged.clear();
    }

    /// Makes the journal begin after the step `applied`, because Redis has lost the later ones. Returns how many
    /// acknowledged steps Redis has lost.
    pub(super) fn rewind(&mut self, applied: u64) -> u64 {
        let before = self.first;
        while self.first > applied.saturating_add(1)
            && let Some(mut entry) = self.acknowledged.pop_back()
        {
            if let Some((_, reservation)) = &mut entry.settled {
                reservation.is_confirmed = false;
            }
            self.entries.push_front(entry);
            self.first -= 1;
        }
        before - self.first
    }
}
