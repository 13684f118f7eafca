//! The commands of the script, with their arguments in the order in which it reads them.

use super::cells::{Cells, calendar_class};
use super::reply::{OverrideMark, ScriptReply};
use crate::clock::Timestamp;
use crate::quota::{Amounts, CounterState, Kind, UNLIMITED};
use smallvec::SmallVec;

/// A call of the script: `EVALSHA sha 3 keys arguments`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptCommand {
    /// The arguments of the script.
    pub arguments: Vec<String>,
    /// How many `values` its reply has.
    value_count: usize,
    /// For each cell whose state the reply contains: whether it is a calendar quota.
    calendars: Vec<bool>,
}

/// What the script does with a request that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnShortage {
    /// Denies it.
    Reject,
    /// Reserves fewer completion tokens, so that it fits.
    Clamp,
    /// Admits it anyway (shadow mode).
    AdmitAnyway,
}

/// A request for a reservation.
#[derive(Clone, Copy, Debug)]
pub struct ReserveRequest<'a> {
    /// The reservation's id, unique in its session.
    pub id: &'a str,
    /// Maximum requests in flight; 0: unlimited.
    pub max_in_flight: u64,
    /// What happens if it does not fit.
    pub on_shortage: OnShortage,
    /// Whether the model generates tokens for it.
    pub generates: bool,
    /// The amounts to reserve.
    pub amounts: Amounts,
    /// The number of completions that share the completion tokens.
    pub completions: u64,
}

/// The part of a reservation in the cells of an upstream. Its amounts are those of the environment's part.
#[derive(Clone, Copy, Debug)]
pub struct UpstreamReserve<'a> {
    /// The id of this part, unique in the session.
    pub id: &'a str,
    /// Maximum requests in flight to the upstream; 0: unlimited.
    pub max_in_flight: u64,
    /// The cells, as indices into the upstream's quotas.
    pub touched: &'a [u32],
}

/// One change of a reservation, as sent to Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The kind of change.
    pub kind: StepKind,
    /// The reservation's id.
    pub id: String,
    /// `Extend`: the additional amounts. `Progress`: everything spent so far. `Settle`: everything charged.
    pub amounts: Amounts,
    /// `LeasedAdmission`: the cells in which the reservation holds amounts. `OfflineUsage`: the cell that is charged.
    /// Both are indices into the config's quotas.
    pub cells: SmallVec<[u32; 8]>,
}

impl Step {
    /// A step of a reservation that Redis already has.
    pub fn new(kind: StepKind, id: String, amounts: Amounts) -> Self {
        Self { kind, id, amounts, cells: SmallVec::new() }
    }
}

/// The id of a session's lease. A `Settle` step with this id returns the whole lease.
pub const LEASE_ID: &str = "lease";

/// The kinds of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// The reservation holds larger amounts, whether they fit or not.
    Extend,
    /// Moves the amounts spent so far from held to spent.
    Progress,
    /// The reservation ends.
    Settle,
    /// Not a change of a reservation: usage of one cell while the node was offline, see [`CommandBuilder::offline_usage_step`].
    OfflineUsage,
    /// The node has admitted a request from its lease, see [`CommandBuilder::leased_admission_step`].
    LeasedAdmission,
}

/// A reservation as its node tracks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldReservation {
    /// The reservation's id.
    pub id: String,
    /// The number of the step in the journal that settles it; 0: there is none.
    pub settled_by: u64,
    /// What it holds. There are several pieces if a new calendar period began between its extensions.
    pub pieces: Vec<Piece>,
}

/// What a session that joins again has done before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SentSteps {
    /// The number of the oldest step that the node can repeat.
    pub oldest: u64,
    /// The number of the last step that Redis has acknowledged.
    pub acknowledged: u64,
    /// The data set in Redis at the last join. 0: none.
    pub data_set: u64,
    /// When the session joined for the first time, on Redis's clock (ms). 0: now.
    pub first_joined: u64,
}

impl Default for SentSteps {
    /// No step was sent.
    fn default() -> Self {
        Self { oldest: 1, acknowledged: 0, data_set: 0, first_joined: 0 }
    }
}

/// Whether quotas are enforced, instead of the config's `enforce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnforceMark {
    /// `false`: shadow mode.
    pub enforce: bool,
    /// When it ends. `None`: when it is deleted.
    pub until: Option<Timestamp>,
}

impl EnforceMark {
    /// The mark in the values of a heartbeat's reply. `None`: `enforce` is as in the config.
    pub fn of_numbers(value: u64, end: u64) -> Option<Self> {
        let until = OverrideMark::of_number(end.cast_signed()).end();
        (value > 0).then_some(Self { enforce: value == 2, until })
    }

    /// The numbers that the script uses.
    fn numbers(mark: Option<Self>) -> [u64; 2] {
        mark.map_or([0, 0], |Self { enforce, until }| {
            [1 + u64::from(enforce), OverrideMark::until(until).number().unsigned_abs()]
        })
    }
}

/// A limit to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewLimit {
    /// The limit per period, or [`UNLIMITED`].
    pub limit: u64,
    /// The capacity of a rolling quota.
    pub burst: u64,
}

/// Amounts that a reservation holds in the same cells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The reserved amounts.
    pub reserved: Amounts,
    /// How much of `reserved` is already spent.
    pub spent: Amounts,
    /// Each cell as an index into the config's quotas, with the calendar period in which it was reserved.
    pub cells: Vec<(u32, u64)>,
}

/// Builds the commands of one session: one node in one environment.
#[derive(Clone, Debug)]
pub struct CommandBuilder {
    cells: Cells,
    session: String,
    /// The time to use instead of Redis's clock, in tests.
    clock: Option<Timestamp>,
    /// The estimated time on Redis's clock.
    redis_time: Timestamp,
    /// Commands expire this many ms after `redis_time`.
    max_delay_ms: Option<u64>,
}

impl CommandBuilder {
    /// A builder for a session with this name, which must never have been used before.
    pub fn new(cells: Cells, session: &str, redis_time: Timestamp) -> Self {
        Self { cells, session: session.to_owned(), clock: None, redis_time, max_delay_ms: None }
    }

    /// Sets the delay (ms) after which a command expires, counted from when it was built. The script ignores an
    /// expired command, because no request waits for its reply. Commands that only report (`apply`, `heartbeat`,
    /// `leave`) never expire.
    pub fn set_max_delay_ms(&mut self, ms: u64) {
        self.max_delay_ms = Some(ms);
    }

    /// Makes the script use this time instead of Redis's clock.
    pub fn set_clock(&mut self, now: Timestamp) {
        self.clock = Some(now);
        self.redis_time = now;
    }

    /// Sets the estimated time on Redis's clock.
    pub fn set_redis_time(&mut self, now: Timestamp) {
        self.redis_time = now;
    }

    /// Builds commands for these cells from now on.
    pub fn set_cells(&mut self, cells: Cells) {
        self.cells = cells;
    }

    /// The number of cells.
    pub fn cell_count(&self) -> usize {
        self.cells.quotas().len()
    }

    /// The session's name.
    pub fn session(&self) -> &str {
        &self.session
    }

    /// The keys of an account and of this session, all in one slot. `slot`: the hash tag that all accounts share. `None`:
    /// each account has a slot of its own.
    pub fn keys(&self, prefix: &str, slot: Option<&str>, account: &str) -> [String; 3] {
        let start = match slot {
            Some(slot) => format!("{prefix}:{{{slot}}}:{account}"),
            None => format!("{prefix}:{{{account}}}"),
        };
        let of = |what: &str| format!("{start}:{what}");
        [of("q"), of("s"), of(&format!("r:{}", self.session))]
    }

    /// Joins with a config written at `stamp`. The script creates missing cells with these states. For the others, the limits of
    /// the newest config of the nodes alive are in force; among equally old ones, those of the session that joined last.
    ///
    /// `states`: for each cell its state, its override, and whether the config has the quota. `enforce`: the override that
    /// Redis adopts if it has no data. `sent`: the session has joined before, so that its states can restore lost data.
    ///
    /// Values of the reply:
    /// 1. the number of created cells,
    /// 2. the number of cells that have other limits in this node's config than in those of other nodes,
    /// 3. 1 if Redis still had this session,
    /// 4. the milliseconds to wait for other nodes that restore lost data,
    /// 5. the number of the last step that Redis has applied,
    /// 6. the data set in Redis.
    pub fn join(
        &mut self,
        stamp: u64,
        sent: Option<SentSteps>,
        states: &[(CounterState, OverrideMark, bool)],
        enforce: Option<EnforceMark>,
    ) -> ScriptCommand {
        let mut command = self.begin_expiring("join", 6);
        command.push_int(stamp);
        command.push_int(u64::from(sent.is_some()));
        let SentSteps { oldest, acknowledged, data_set, first_joined } = sent.unwrap_or_default();
        [oldest, acknowledged, data_set, first_joined]
            .into_iter()
            .for_each(|number| command.push_int(number));
        EnforceMark::numbers(enforce).into_iter().for_each(|number| command.push_int(number));
        command.push_int(self.cells.quotas().len() as u64);
        for (index, (quota, (state, mark, is_in_config))) in
            self.cells.quotas().iter().zip(states).enumerate()
        {
            command.push_text(self.cells.name(index));
            command.push_int(kind_number(quota.kind));
            command.push_text(&calendar_class(quota));
            command.push_int(quota.per.ms);
            command.push_limit(quota.limit);
            command.push_limit(quota.capacity());
            let (limit, burst, whole, fraction, turn) = match *state {
                CounterState::Rolling { limit, burst, level, held, .. } => {
                    (limit, burst, level.0.saturating_add_unsigned(held), level.1, 0)
                }
                CounterState::Calendar { limit, used, period_id: turn, .. } => {
                    (limit, limit, i64::try_from(used).unwrap_or(i64::MAX), 0, turn)
                }
            };
            [limit, burst].into_iter().for_each(|limit| command.push_limit(limit));
            command.push_text(&mark.number().to_string());
            command.push_text(&whole.to_string());
            command.push_int(fraction);
            command.push_int(turn);
            command.push_int(u64::from(*is_in_config));
        }
        command
    }

    /// Makes Redis hold reservations that it may have lost, or charged as those of a dead node.
    ///
    /// `are_new`: Redis still had this session at the join. A reservation that Redis does not have is then new to Redis,
    /// and its spent tokens are not charged yet.
    pub fn hold(&mut self, are_new: bool, held: &[HeldReservation]) -> ScriptCommand {
        let mut command = self.begin_expiring("hold", 0);
        command.push_int(u64::from(are_new));
        command.push_int(held.len() as u64);
        for one in held {
            command.push_text(&one.id);
            command.push_int(one.settled_by);
            command.push_int(one.pieces.len() as u64);
            for piece in &one.pieces {
                command.push_amounts(piece.reserved);
                command.push_amounts(piece.spent);
                command.push_int(piece.cells.len() as u64);
                for &(index, turn) in &piece.cells {
                    command.push_text(self.cells.name(index as usize));
                    command.push_int(turn);
                }
            }
        }
        command
    }

    /// Releases every reservation of this session that is not listed: Redis charges it in full, and returns a lease.
    /// On the wire this command is `only`. The value of the reply: the number of reservations that a repeated command
    /// must release.
    pub fn release_unlisted(&mut self, ids: &[u64]) -> ScriptCommand {
        let mut command = self.begin_expiring("only", 1);
        command.push_int(ids.len() as u64);
        ids.iter().for_each(|&id| command.push_int(id));
        command
    }

    /// Reserves in these cells. Values of the reply: requests in flight, nodes alive.
    pub fn reserve(&mut self, reserve: &ReserveRequest<'_>, touched: &[u32]) -> ScriptCommand {
        self.reserve_as("reserve", 2, reserve, touched)
    }

    /// Reserves in these cells and in those of the upstream, or in none. `upstream_cells`: all cells of the upstream. The
    /// keys of the call are those of both. Values of the reply: requests in flight and nodes alive, for both. The states
    /// of the upstream's cells are last.
    pub fn reserve_at(
        &mut self,
        reserve: &ReserveRequest<'_>,
        touched: &[u32],
        upstream_cells: &mut Self,
        upstream: &UpstreamReserve<'_>,
    ) -> ScriptCommand {
        let mut command = self.reserve_as("reserve_at", 4, reserve, touched);
        command.push_text(upstream.id);
        command.push_int(upstream.max_in_flight);
        upstream_cells.add_cells(&mut command, upstream.touched);
        command.arguments.extend(upstream_cells.cells.period_arguments(self.redis_time));
        command
    }

    fn reserve_as(
        &mut self,
        name: &str,
        value_count: usize,
        reserve: &ReserveRequest<'_>,
        touched: &[u32],
    ) -> ScriptCommand {
        let mut command = self.begin_expiring(name, value_count);
        command.push_text(reserve.id);
        command.push_int(reserve.max_in_flight);
        command.push_text(match reserve.on_shortage {
            OnShortage::Reject => "reject",
            OnShortage::Clamp => "clamp",
            OnShortage::AdmitAnyway => "watch",
        });
        command.push_int(u64::from(reserve.generates));
        command.push_amounts(reserve.amounts);
        command.push_int(reserve.completions.max(1));
        self.add_cells(&mut command, touched);
        command
    }

    /// Sends steps; `first` is the number of the first one in the session's journal. The script skips steps that it has applied
    /// before. The value of the reply: how many steps it applied. The reply has the states of these cells.
    pub fn apply(&mut self, first: u64, steps: &[Step], cells: &[u32]) -> ScriptCommand {
        let mut command = self.begin("apply", 1);
        command.push_int(first);
        command.push_int(steps.len() as u64);
        for step in steps {
            command.push_text(match step.kind {
                StepKind::Extend => "extend",
                StepKind::Progress => "progress",
                StepKind::Settle => "settle",
                StepKind::OfflineUsage => "pay",
                StepKind::LeasedAdmission => "open",
            });
            command.push_text(&step.id);
            command.push_amounts(step.amounts);
            if step.kind == StepKind::LeasedAdmission {
                command.push_int(step.cells.len() as u64);
                step.cells.iter().for_each(|&index| command.push_text(self.cells.name(index as usize)));
            }
        }
        self.add_cells(&mut command, cells);
        command
    }

    /// The step that charges usage of a cell while the node was offline. `turn`: the calendar period, or 0.
    pub fn offline_usage_step(&self, cell: u32, amount: u64, turn: u64) -> Step {
        let amounts = Amounts { total: amount, prompt: turn, ..Amounts::default() };
        let id = self.cells.name(cell as usize).to_owned();
        Step { kind: StepKind::OfflineUsage, id, amounts, cells: SmallVec::from_slice(&[cell]) }
    }

    /// The step that reports a request that the node has admitted from its lease of these cells.
    pub fn leased_admission_step(&self, id: String, amounts: Amounts, touched: &[u32]) -> Step {
        Step { kind: StepKind::LeasedAdmission, id, amounts, cells: SmallVec::from_slice(touched) }
    }

    /// Raises the lease of each cell to these amounts. Values of the reply: how much more of each cell is leased now.
    pub fn lease(&mut self, wanted: &[u64]) -> ScriptCommand {
        let mut command = self.begin_expiring("lease", wanted.len());
        command.push_int(wanted.len() as u64);
        for (index, wanted) in wanted.iter().enumerate() {
            command.push_text(self.cells.name(index));
            command.push_int(*wanted);
        }
        command.calendars = (0..self.cell_count()).map(|index| self.cells.is_calendar(index)).collect();
        command
    }

    /// Renews the session. On the wire this command is `beat`. Values of the reply: nodes alive, requests in flight,
    /// the version of the overrides, the two numbers of [`EnforceMark`], and 1 if the node must join again so that the
    /// limits of its config apply. The reply has the states of all cells.
    pub fn heartbeat(&mut self) -> ScriptCommand {
        let mut command = self.begin("beat", 6);
        let all: Vec<u32> = (0..).take(self.cells.quotas().len()).collect();
        self.add_cells(&mut command, &all);
        command
    }

    /// Sets limits, each with the index of its quota. `mark`: an administrator has set these limits. Without one they are
    /// the limits of the config, and the override ends. `origin`: who set them and why; empty if the override ends.
    pub fn limit(
        &mut self,
        mark: OverrideMark,
        origin: &str,
        changes: &[(usize, NewLimit)],
    ) -> ScriptCommand {
        let mut command = self.begin_expiring("limit", 0);
        command.push_text(&mark.number().to_string());
        command.push_text(origin);
        command.push_int(changes.len() as u64);
        for &(index, NewLimit { limit, burst }) in changes {
            let configured = &self.cells.quotas()[index];
            command.push_text(self.cells.name(index));
            for limit in [limit, burst, configured.limit, configured.capacity()] {
                command.push_limit(limit);
            }
        }
        command
    }

    /// Sets whether quotas are enforced on all nodes. `None`: by the config. `origin`: who set it and why.
    pub fn enforce(&mut self, mark: Option<EnforceMark>, origin: &str) -> ScriptCommand {
        let mut command = self.begin_expiring("enforce", 0);
        EnforceMark::numbers(mark).into_iter().for_each(|number| command.push_int(number));
        command.push_text(origin);
        command
    }

    /// Reads who set the override of each cell and why, and at last that of `enforce`. Values of the reply: for each the
    /// number of bytes, and the bytes.
    pub fn origins(&mut self) -> ScriptCommand {
        let mut command = self.begin_expiring("origins", usize::MAX);
        command.push_int(self.cell_count() as u64);
        (0..self.cell_count()).for_each(|index| command.push_text(self.cells.name(index)));
        command
    }

    /// Resets the quotas with these indices to full, or all of them. Held amounts stay held.
    pub fn reset(&mut self, cells: Option<&[usize]>) -> ScriptCommand {
        let mut command = self.begin_expiring("reset", 0);
        let cells = cells.unwrap_or_default();
        command.push_int(cells.len() as u64);
        cells.iter().for_each(|&index| command.push_text(self.cells.name(index)));
        command
    }

    /// Ends the session. It must have no reservations.
    pub fn leave(&mut self) -> ScriptCommand {
        self.begin("leave", 0)
    }

    /// A command that never expires.
    fn begin(&mut self, name: &str, value_count: usize) -> ScriptCommand {
        self.begin_with(name, value_count, None)
    }

    /// A command that expires.
    fn begin_expiring(&mut self, name: &str, value_count: usize) -> ScriptCommand {
        let deadline = self.max_delay_ms.map(|ms| self.redis_time.plus_ms(ms));
        self.begin_with(name, value_count, deadline)
    }

    /// The arguments that all commands have. A time of 0 stands for no time.
    fn begin_with(&mut self, name: &str, value_count: usize, deadline: Option<Timestamp>) -> ScriptCommand {
        let [now, deadline] = [self.clock, deadline].map(|time| time.map_or(0, |time| time.0));
        let mut arguments =
            vec![name.to_owned(), now.to_string(), deadline.to_string(), self.session.clone()];
        arguments.extend(self.cells.period_arguments(self.redis_time));
        ScriptCommand { arguments, value_count, calendars: Vec::new() }
    }

    fn add_cells(&self, command: &mut ScriptCommand, touched: &[u32]) {
        command.push_int(touched.len() as u64);
        for &index in touched {
            let index = index as usize;
            command.push_text(self.cells.name(index));
            command.calendars.push(self.cells.is_calendar(index));
        }
    }
}

impl ScriptCommand {
    fn push_text(&mut self, text: &str) {
        self.arguments.push(text.to_owned());
    }

    fn push_int(&mut self, number: u64) {
        self.arguments.push(number.to_string());
    }

    /// A limit or a burst. 0 is unlimited.
    fn push_limit(&mut self, limit: u64) {
        self.push_int(if limit == UNLIMITED { 0 } else { limit });
    }

    fn push_amounts(&mut self, amounts: Amounts) {
        Kind::ALL.into_iter().for_each(|kind| self.push_int(amounts.of(kind)));
    }

    /// Parses the reply to this command. `None`: it is not a reply of the script.
    pub fn parse_reply(&self, numbers: &[i64]) -> Option<ScriptReply> {
        ScriptReply::parse(numbers, self.value_count, &self.calendars)
    }
}

/// The script's number for a kind: its position in `Kind::ALL`, from 1 on.
fn kind_number(kind: Kind) -> u64 {
    kind as u64 + 1
}
