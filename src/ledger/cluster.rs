//! One node's part in counters that a cluster shares. Pure: what is sent and what comes back are arguments.
//!
//! Redis decides who is admitted, and this node's own quotas mirror it: they explain a denial, decide whether a
//! stream may grow, and are shown. While Redis cannot be asked the node is alone: its quotas become its part of
//! what there was left, and what it spends is remembered and paid in when it takes part again. What becomes of
//! reservations goes into a journal, which is sent in numbered batches, so that nothing is applied twice.

mod admission;
mod membership;

use super::counters::{Admission, NoRoom};
use super::lease::Lease;
use crate::clock::Timestamp;
use crate::config::OnStoreFailure;
use crate::quota::{Amounts, CounterState, Quota, Quotas, Receipt};
use crate::redis::{
    Cells, CommandBuilder, HeldReservation, LEASE_ID, Piece, ScriptCommand, ScriptReply, Step, StepKind,
};
use smallvec::SmallVec;
use std::collections::{HashMap, HashSet, VecDeque};

/// Redis takes nothing for a call that it reads later than this after it was sent (ms): by then its caller has been told
/// otherwise. Longer than any answer is waited for, since the server's clock is not known better than that.
pub(super) const LATEST_MS: u64 = 400;
/// For nodes that bring back what the server has lost nobody waits longer than this (ms), whatever it says.
const LONGEST_REGAIN_MS: u64 = 2_000;
/// Steps in one call, and reservations in one call: more would keep the server from others for longer than they wait.
const LARGEST_BATCH: usize = 200;

/// With so much to tell a node admits nothing out of a lease: it would go on faster than Redis can follow, without end.
const MOST_BEHIND: usize = 10_000;

/// How a node takes part.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// What is done while Redis is away.
    pub(super) on_failure: OnStoreFailure,
    /// When the config was written: of two nodes' limits the newer hold.
    pub(super) stamp: u64,
    /// Requests are admitted out of what the node leases, as far as that reaches.
    pub(super) leases: bool,
}

/// One node's part.
#[derive(Debug)]
pub(super) struct Cluster {
    terms: Terms,
    commands: CommandBuilder,
    alone: Option<Box<Alone>>,
    /// The quotas of all as they stood before it was alone, until Redis has told how they stand now: this node's own are
    /// its part of them.
    before: Option<Quotas>,
    /// Counts the times that Redis was lost: an answer to a call of before is no answer.
    losses: u64,
    /// It has taken part before.
    was_here: bool,
    /// When it joined last, Redis had kept what it knew of this node.
    was_kept: bool,
    /// Nodes alive, and requests in flight on all of them, as last heard.
    nodes: u64,
    in_flight: u64,
    /// Quotas have other limits there than in this node's config.
    differs: bool,
    /// Redis's clock is so many milliseconds ahead of this node's.
    ahead_ms: i64,
    next_id: u64,
    open: HashMap<u64, Open>,
    /// Reservations that Redis was asked for, and whose answers nobody has looked at yet.
    asked: HashSet<u64>,
    journal: Journal,
    lease: Option<Lease>,
}

/// While Redis is away.
#[derive(Debug)]
struct Alone {
    /// The quotas of all, as they stood before.
    before: Quotas,
    /// This node's part, if nothing were spent of it, and with what is: the difference is paid in.
    unspent: Quotas,
    spent: Quotas,
}

/// A reservation that is not settled.
#[derive(Debug)]
struct Open {
    /// Redis has it, or had it when it was lost, or may have heard of it by a call whose answer was lost.
    is_known: bool,
    /// It has said so since it was lost last.
    is_certain: bool,
    /// Nothing, where nobody knows whether Redis has admitted it, and it is to be given back.
    pieces: SmallVec<[Piece; 1]>,
    /// Redis has been told that so much of it is spent. What it has still to be told is not to be taken for known.
    told: Amounts,
}

/// What Redis has still to be told.
#[derive(Debug)]
struct Journal {
    entries: VecDeque<Entry>,
    /// The number of the first of them.
    first: u64,
}

#[derive(Debug)]
struct Entry {
    step: Step,
    /// Of a reservation that has ended: its number, and what it held, should Redis have lost it.
    held: Option<(u64, Open)>,
}

/// A call that tells Redis what has become of reservations.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) command: ScriptCommand,
    steps: usize,
    /// How these stand afterwards it answers.
    cells: Vec<u32>,
}

/// A call that asks Redis to admit a request.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) command: ScriptCommand,
    pub(super) id: u64,
    allowance: u64,
    touched: SmallVec<[u32; 8]>,
    losses: u64,
    /// The number of the first step that Redis had not taken note of.
    first: u64,
    /// Redis had still to be told of others that have ended.
    pub(super) is_early: bool,
}

/// What came of it.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // the large one is the usual one, and is taken apart at once
pub(super) enum Answered {
    Decided(Result<Admission, NoRoom>),
    /// Nothing was taken, and it can be asked anew.
    Again,
    /// Redis does not know this node.
    Unknown,
}

impl Journal {
    fn push(&mut self, step: Step) {
        self.entries.push_back(Entry { step, held: None });
    }

    fn push_end(&mut self, id: u64, spent: Amounts, held: Open) {
        let step = Step::new(StepKind::Settle, id.to_string(), spent);
        self.entries.push_back(Entry { step, held: Some((id, held)) });
    }

    fn ended_mut(&mut self, id: u64) -> Option<&mut Open> {
        let mut ended = self.entries.iter_mut().filter_map(|entry| entry.held.as_mut());
        ended.find(|(other, _)| *other == id).map(|(_, open)| open)
    }

    /// What is not known to be over, each with its number and that of the step that ends it.
    fn ended(&self) -> impl Iterator<Item = (u64, &Open, u64)> {
        let numbered = self.entries.iter().zip(self.first..);
        numbered.filter_map(|(entry, number)| entry.held.as_ref().map(|(id, open)| (*id, open, number)))
    }
}

impl Cluster {
    pub(super) fn new(terms: Terms, session: &str, quotas: &[Quota], now: Timestamp, own: &Quotas) -> Self {
        let mut commands = CommandBuilder::new(Cells::new(quotas, now), session, now);
        commands.set_max_delay_ms(LATEST_MS);
        Self {
            terms,
            commands,
            alone: Some(Box::new(Alone { before: own.clone(), unspent: own.clone(), spent: own.clone() })),
            before: None,
            losses: 0,
            was_here: false,
            was_kept: false,
            nodes: 1,
            in_flight: 0,
            differs: false,
            ahead_ms: 0,
            next_id: 1,
            open: HashMap::new(),
            asked: HashSet::new(),
            journal: Journal { entries: VecDeque::new(), first: 1 },
            lease: terms.leases.then(|| Lease::nothing(quotas.len())),
        }
    }

    pub(super) fn is_alone(&self) -> bool {
        self.alone.is_some()
    }

    /// It takes part again, and what it has spent alone is being paid in: until then Redis has more than is left.
    pub(super) fn is_returning(&self) -> bool {
        self.before.is_some()
    }

    /// By Redis's clock, which all nodes count by.
    pub(super) fn now(&self, own: Timestamp) -> Timestamp {
        Timestamp(own.0.saturating_add(self.ahead_ms))
    }

    pub(super) fn nodes(&self) -> u64 {
        self.nodes
    }

    pub(super) fn losses(&self) -> u64 {
        self.losses
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    pub(super) fn keys(&self, prefix: &str, environment: &str) -> [String; 3] {
        self.commands.keys(prefix, environment)
    }

    /// Redis has told its time.
    pub(super) fn heard(&mut self, own: Timestamp, answer: &ScriptReply) {
        self.ahead_ms = answer.now.0.saturating_sub(own.0);
        self.commands.set_redis_time(answer.now);
    }

    fn begin(&mut self, is_known: bool, receipt: &Receipt) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.keep(id, is_known, std::slice::from_ref(receipt));
        id
    }

    fn keep(&mut self, id: u64, is_known: bool, receipts: &[Receipt]) {
        let pieces = receipts.iter().map(piece).collect();
        let before = self.open.get(&id);
        let (is_certain, told) =
            before.map_or((is_known, Amounts::default()), |open| (open.is_certain, open.told));
        self.open.insert(id, Open { is_known, is_certain, pieces, told });
    }

    /// A reservation has used so much, and may hold more than before.
    pub(super) fn progressed(&mut self, id: u64, receipts: &[Receipt], spent: Amounts) {
        let Some(open) = self.open.get(&id) else { return };
        let (is_known, told) = (open.is_known, reserved(&open.pieces));
        // What it has come to is told when it ends; should Redis have lost it, it takes up what it had.
        if is_known && self.is_alone() {
            return;
        }
        self.keep(id, is_known, receipts);
        let Some(open) = self.open.get(&id).filter(|open| open.is_known) else { return };
        let more = reserved(&open.pieces).saturating_sub(told);
        let mut tell = |what, amounts| self.journal.push(Step::new(what, id.to_string(), amounts));
        if more != Amounts::default() {
            tell(StepKind::Extend, more);
        }
        tell(StepKind::Progress, spent);
    }

    /// One receipt of a reservation is about to be settled: what Redis has never heard of is owed.
    pub(super) fn owe(&mut self, now: Timestamp, id: u64, receipt: &Receipt, spent: Amounts) {
        let is_known = self.open.get(&id).is_some_and(|open| open.is_known);
        if let Some(alone) = self.alone.as_mut().filter(|_| !is_known) {
            alone.spent.charge_without_hold(now, receipt, spent);
        }
    }

    /// A reservation has ended.
    pub(super) fn settled(&mut self, id: u64, spent: Amounts) {
        let Some(open) = self.open.remove(&id) else { return };
        if open.is_known || !self.is_alone() {
            self.journal.push_end(id, spent, open);
        }
    }

    /// What is left of the lease is given back.
    pub(super) fn give_lease_back(&mut self) {
        if self.lease.as_mut().is_some_and(Lease::clear) {
            self.journal.push(Step::new(StepKind::Settle, LEASE_ID.to_owned(), Amounts::default()));
        }
    }

    /// Nobody knows whether Redis has admitted this one: it is not to hold anything.
    pub(super) fn cancel(&mut self, id: u64) {
        self.asked.remove(&id);
        let (pieces, told) = (SmallVec::new(), Amounts::default());
        let nothing = Open { is_known: true, is_certain: false, pieces, told };
        self.journal.push_end(id, Amounts::default(), nothing);
    }

    pub(super) fn is_behind(&self) -> bool {
        !self.journal.entries.is_empty()
    }

    fn is_far_behind(&self) -> bool {
        self.journal.entries.len() >= MOST_BEHIND
    }

    /// The number that the next step will have.
    pub(super) fn next_step(&self) -> u64 {
        self.journal.first + self.journal.entries.len() as u64
    }

    /// The next call that tells of reservations; `None`: all before the step `end` is told.
    pub(super) fn batch(&mut self, own: Timestamp, end: u64) -> Option<Batch> {
        if self.journal.first >= end {
            return None;
        }
        let entries = || self.journal.entries.iter().take(LARGEST_BATCH);
        let steps: Vec<Step> = entries().map(|entry| entry.step.clone()).collect();
        let mut cells: Vec<u32> = entries().flat_map(|entry| self.cells_of(entry)).collect();
        cells.sort_unstable();
        cells.dedup();
        let now = self.now(own);
        self.commands.set_redis_time(now);
        Some(Batch {
            command: self.commands.apply(self.journal.first, &steps, &cells),
            steps: steps.len(),
            cells,
        })
    }

    /// Where a step changes something.
    fn cells_of(&self, Entry { step, held }: &Entry) -> Vec<u32> {
        if step.id == LEASE_ID {
            return (0..).take(self.commands.cell_count()).collect();
        }
        let of_step = step.cells.iter().copied();
        // What it was about may have ended since, and that may be told later.
        let ended = |id| self.journal.ended().find(|(other, ..)| *other == id).map(|(_, open, _)| open);
        let of = |id: u64| self.open.get(&id).or_else(|| ended(id));
        let open = held.as_ref().map(|(_, open)| open).or_else(|| of(step.id.parse().ok()?));
        let pieces = open.into_iter().flat_map(|open| &open.pieces);
        of_step.chain(pieces.flat_map(|piece| piece.cells.iter().map(|cell| cell.0))).collect()
    }

    /// Redis has taken note of so many steps.
    fn told(&mut self, steps: usize) {
        let journal = &mut self.journal;
        journal.first += steps as u64;
        let told: Vec<Entry> = journal.entries.drain(..steps.min(journal.entries.len())).collect();
        for Entry { step, .. } in told.iter().filter(|entry| entry.step.kind == StepKind::Progress) {
            let Ok(id) = step.id.parse() else { continue };
            if let Some(open) = self.open.get_mut(&id).or_else(|| journal.ended_mut(id)) {
                open.told = step.amounts;
            }
        }
    }

    /// What this node's requests hold of each quota.
    fn own_holds(&self, quotas: &[Quota], states: &[CounterState]) -> Vec<u64> {
        let mut held = vec![0_u64; quotas.len()];
        for piece in self.open.values().flat_map(|open| &open.pieces) {
            for &(index, turn) in &piece.cells {
                let index = index as usize;
                let is_over = matches!(states.get(index), Some(CounterState::Calendar { period_id: now, .. }) if *now != turn);
                if let (Some(held), Some(quota), false) = (held.get_mut(index), quotas.get(index), is_over) {
                    *held += piece.reserved.saturating_sub(piece.spent).of(quota.kind);
                }
            }
        }
        held
    }

    /// Some of what Redis may have lost, or has never heard of: their numbers, and what they hold. From now on it may have
    /// heard of them, though its answer is lost.
    fn next_to_hold(&mut self) -> (Vec<u64>, Vec<HeldReservation>) {
        let is_alone = self.is_alone();
        let open = self.open.iter().filter(|(_, open)| open.is_known || !is_alone);
        let all = open.map(|(&id, open)| (id, open, 0)).chain(self.journal.ended());
        let missing = all.filter(|(_, open, _)| !open.is_certain).take(LARGEST_BATCH);
        let held = |(id, open, settled_by): (u64, &Open, u64)| {
            (id, HeldReservation { id: id.to_string(), settled_by, pieces: known_pieces(open) })
        };
        let (ids, held): (Vec<u64>, Vec<HeldReservation>) = missing.map(held).unzip();
        self.of(&ids, |open| open.is_known = true);
        (ids, held)
    }

    /// Redis has said that it knows of these.
    pub(super) fn are_held(&mut self, ids: &[u64]) {
        self.of(ids, |open| open.is_certain = true);
    }

    fn of(&mut self, ids: &[u64], change: impl Fn(&mut Open)) {
        let ids: HashSet<u64> = ids.iter().copied().collect();
        self.all_open().filter(|(id, _)| ids.contains(id)).for_each(|(_, open)| change(open));
    }

    /// All that is not known to be over there.
    fn all_open(&mut self) -> impl Iterator<Item = (u64, &mut Open)> {
        let ended = self.journal.entries.iter_mut().filter_map(|entry| entry.held.as_mut());
        let open = self.open.iter_mut().map(|(&id, open)| (id, open));
        open.chain(ended.map(|(id, open)| (*id, open)))
    }

    /// What is still to be paid for: of each quota, what was spent alone and has not come back.
    fn pay(&mut self, now: Timestamp, alone: Alone) {
        let Alone { mut unspent, mut spent, .. } = alone;
        for (index, states) in (0..).zip(unspent.states(now).into_iter().zip(spent.states(now))) {
            let (amount, turn) = match states {
                (
                    CounterState::Rolling { level: (all, _), .. },
                    CounterState::Rolling { level: (left, _), .. },
                ) => (all.saturating_sub(left), 0),
                (
                    CounterState::Calendar { used: none, .. },
                    CounterState::Calendar { used, period_id: turn, .. },
                ) => (i64::try_from(used.saturating_sub(none)).unwrap_or(i64::MAX), turn),
                _ => continue,
            };
            if let Some(amount) = u64::try_from(amount).ok().filter(|amount| *amount > 0) {
                let step = self.commands.offline_usage_step(index, amount, turn);
                self.journal.push(step);
            }
        }
    }
}

fn piece(receipt: &Receipt) -> Piece {
    Piece { reserved: receipt.reserved(), spent: receipt.marked_spent(), cells: receipt.holds().collect() }
}

fn reserved(pieces: &[Piece]) -> Amounts {
    pieces.iter().fold(Amounts::default(), |sum, piece| sum.saturating_add(piece.reserved))
}

/// A reservation as far as Redis has been told of it.
fn known_pieces(open: &Open) -> Vec<Piece> {
    let mut spent = open.told;
    let known = |piece: &Piece| {
        let moved = spent.min(piece.reserved);
        spent = spent.saturating_sub(moved);
        Piece { spent: moved, ..piece.clone() }
    };
    open.pieces.iter().map(known).collect()
}

fn told(answer: &ScriptReply, at: usize) -> u64 {
    answer.values.get(at).map_or(0, |&n| u64::try_from(n).unwrap_or(0))
}

fn limit(state: &CounterState) -> (u64, u64) {
    match *state {
        CounterState::Rolling { limit, burst, .. } => (limit, burst),
        CounterState::Calendar { limit, .. } => (limit, limit),
    }
}

#[cfg(test)]
mod tests;
