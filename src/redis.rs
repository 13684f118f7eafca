//! Counters that several nodes hold together in Redis: the script that decides there, and how it is spoken to.
//!
//! Redis decides, the node explains. The script does what has to happen at once, and answers with the state in
//! which it found each quota; the node loads that into its own [`Quotas`] and comes to the same verdict by the same
//! code as without Redis, and so to the same waits, headers and words. Pure, but for [`FailFastConnection`]: nothing else here reads a
//! clock or a socket.

mod connection;

use crate::clock::Timestamp;
use crate::quota::{Amounts, CalendarPeriod, CounterState, Kind, Quota, Quotas, Scope, Window};
use smallvec::SmallVec;

pub use connection::{CALL_DEADLINE, CallPermit, FailFastConnection, Unavailable, check_url};

/// The script, for `EVALSHA` and `EVAL`.
pub const SCRIPT: &str = concat!(
    include_str!("redis/script/cells.lua"),
    include_str!("redis/script/requests.lua"),
    include_str!("redis/script/limits.lua"),
    include_str!("redis/script/sessions.lua"),
);

/// What the script gives back for each cell.
const FIELDS: usize = 9;

/// How the script has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A quota cannot hold it.
    Denied,
    /// It is held in all quotas.
    Admitted,
    /// So many requests are under way already.
    TooManyInFlight,
    /// The bounds of a calendar period are not those of the server's time: say them anew.
    StalePeriod,
    /// The session is over, or cells are missing: join again.
    UnknownSession,
    /// The command came after its deadline, and nothing was taken.
    DeadlinePassed,
    /// Done.
    Done,
}

/// An answer of the script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptReply {
    /// What was decided.
    pub verdict: Verdict,
    /// The server's time.
    pub now: Timestamp,
    /// What the command tells beside that.
    pub values: Vec<i64>,
    /// The cells asked for, each with whether its limit is an administrator's.
    pub states: Vec<(CounterState, bool)>,
}

/// A call of the script: `EVALSHA sha 3 keys arguments`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptCommand {
    /// The arguments.
    pub arguments: Vec<String>,
    /// How many numbers come before the states in its answer.
    value_count: usize,
    /// The window of each cell whose state is asked for: whether it is a calendar's.
    calendars: Vec<bool>,
}

/// What is done where a request does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnShortage {
    /// It is denied.
    Reject,
    /// Its completions are lowered to what is left.
    Clamp,
    /// It is taken all the same.
    AdmitAnyway,
}

/// What a reservation asks of the script.
#[derive(Clone, Copy, Debug)]
pub struct ReserveRequest<'a> {
    /// Its name, once and for all.
    pub id: &'a str,
    /// Requests under way at once; 0: any number.
    pub max_in_flight: u64,
    /// Where it does not fit.
    pub on_shortage: OnShortage,
    /// Whether the model generates tokens for it.
    pub generates: bool,
    /// What is to be held.
    pub amounts: Amounts,
    /// How many completions share the completion tokens.
    pub completions: u64,
}

/// What has become of a reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What to do.
    pub kind: StepKind,
    /// The reservation's name.
    pub id: String,
    /// More to be held, all that was spent so far, or all that is charged.
    pub amounts: Amounts,
    /// Of a request admitted out of a lease: where it holds; of what was spent alone: where. By place in the config's order.
    pub cells: SmallVec<[u32; 8]>,
}

impl Step {
    /// A step of a reservation that is known already.
    pub fn new(kind: StepKind, id: String, amounts: Amounts) -> Self {
        Self { kind, id, amounts, cells: SmallVec::new() }
    }
}

/// The name under which a session's lease is settled, as if it were a reservation: then all of it is given back.
pub const LEASE_ID: &str = "lease";

/// What to do with a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// It holds more, whether that fits or not.
    Extend,
    /// What is spent is held no longer.
    Progress,
    /// It ends.
    Settle,
    /// Not a reservation's: what was spent of a cell by the node alone, see [`CommandBuilder::pay`].
    OfflineUsage,
    /// A request that the node has admitted out of its lease, see [`CommandBuilder::open`].
    LeasedAdmission,
}

/// A reservation as its node keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldReservation {
    /// Its name.
    pub id: String,
    /// The number of the step that settles it, if that is on its way; else 0.
    pub settled_by: u64,
    /// What it holds: more than one where a period has turned between them.
    pub pieces: Vec<Piece>,
}

/// What an administrator sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewLimit {
    /// Of a period.
    pub limit: u64,
    /// What the quota can hold at most.
    pub burst: u64,
}

/// What a reservation holds in cells, each with the turn that admitted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// What was reserved.
    pub reserved: Amounts,
    /// How much of that is spent.
    pub spent: Amounts,
    /// Where, by place in the config's order.
    pub cells: Vec<(u32, u64)>,
}

/// The names of an environment's cells, and the classes of calendar periods that they follow.
#[derive(Clone, Debug)]
pub struct Cells {
    quotas: Vec<Quota>,
    names: Vec<String>,
    classes: Vec<(String, CalendarPeriod)>,
}

impl Cells {
    /// Those of these quotas.
    pub fn new(quotas: &[Quota], now: Timestamp) -> Self {
        let mut classes: Vec<(String, CalendarPeriod)> = Vec::new();
        for quota in quotas {
            let Window::Calendar { unit, zone } = &quota.window else { continue };
            let class = class(quota);
            if classes.iter().all(|(known, _)| *known != class) {
                classes.push((class, CalendarPeriod::new(1, *unit, zone.clone(), now)));
            }
        }
        Self { quotas: quotas.to_vec(), names: quotas.iter().map(name).collect(), classes }
    }

    /// The quotas, in the config's order.
    pub fn quotas(&self) -> &[Quota] {
        &self.quotas
    }

    /// A command with what every one begins with. `clock`: the time to count by, in place of the server's;
    /// `about`: what that is thought to be.
    fn command(
        &mut self,
        command: &str,
        clock: Option<Timestamp>,
        redis_time: Timestamp,
        deadline: Option<Timestamp>,
        session: &str,
    ) -> ScriptCommand {
        let [now, deadline] = [clock, deadline].map(|time| time.map_or(0, |time| time.0));
        let mut arguments =
            vec![command.to_owned(), now.to_string(), deadline.to_string(), session.to_owned()];
        arguments.push(self.classes.len().to_string());
        for (class, calendar) in &mut self.classes {
            calendar.roll(redis_time);
            arguments.extend([class.clone(), calendar.start().0.to_string(), calendar.end().0.to_string()]);
        }
        ScriptCommand { arguments, value_count: 0, calendars: Vec::new() }
    }
}

/// Speaks to the script for one session of a node in one environment.
#[derive(Clone, Debug)]
pub struct CommandBuilder {
    cells: Cells,
    session: String,
    /// The time to count by, in place of the server's: for tests.
    clock: Option<Timestamp>,
    /// What the server's time is thought to be.
    redis_time: Timestamp,
    /// The server is to do nothing for a call that it reads so many ms after that.
    max_delay_ms: Option<u64>,
}

impl CommandBuilder {
    /// For a session of this name, which nobody may have had before.
    pub fn new(cells: Cells, session: &str, redis_time: Timestamp) -> Self {
        Self { cells, session: session.to_owned(), clock: None, redis_time, max_delay_ms: None }
    }

    /// The server does nothing for a call that it reads later than so many ms after it was made: by then nobody waits for the
    /// answer. Other calls tell it of what has happened, and may come late.
    pub fn set_max_delay_ms(&mut self, ms: u64) {
        self.max_delay_ms = Some(ms);
    }

    /// Counts by this clock instead of the server's.
    pub fn set_clock(&mut self, now: Timestamp) {
        self.clock = Some(now);
        self.redis_time = now;
    }

    /// The server has told its time.
    pub fn set_redis_time(&mut self, now: Timestamp) {
        self.redis_time = now;
    }

    /// How many cells there are.
    pub fn cell_count(&self) -> usize {
        self.cells.quotas.len()
    }

    /// Its session's name.
    pub fn session(&self) -> &str {
        &self.session
    }

    /// The keys of an environment, and of this session in it: all in one slot.
    pub fn keys(&self, prefix: &str, environment: &str) -> [String; 3] {
        let of = |what: &str| format!("{prefix}:{{{environment}}}:{what}");
        [of("q"), of("s"), of(&format!("r:{}", self.session))]
    }

    /// Takes part with a config of this stamp. Cells that are missing are made as `states` has them; of the
    /// others the newest config's limits hold. `was_here`: the session has taken part before, so that its states
    /// say what a server that has lost its data no longer knows.
    /// Answers with how many cells were made, how many have other limits than the node's, whether (1) the server has kept
    /// what it knew of this session, and for how many milliseconds other nodes that know more are to be waited for.
    pub fn join(&mut self, stamp: u64, was_here: bool, states: &[(CounterState, bool)]) -> ScriptCommand {
        let mut command = self.timely("join", 4);
        command.int(stamp);
        command.int(u64::from(was_here));
        command.int(self.cells.quotas.len() as u64);
        let cells = self.cells.quotas.iter().zip(&self.cells.names);
        for ((quota, name), (state, is_override)) in cells.zip(states) {
            command.text(name);
            command.int(kind(quota.kind));
            command.text(&class(quota));
            command.int(quota.per.ms);
            command.int(quota.limit);
            command.int(quota.capacity());
            let (limit, burst, whole, fraction, turn) = match *state {
                CounterState::Rolling { limit, burst, level, held, .. } => {
                    (limit, burst, level.0.saturating_add_unsigned(held), level.1, 0)
                }
                CounterState::Calendar { limit, used, period_id: turn, .. } => {
                    (limit, limit, i64::try_from(used).unwrap_or(i64::MAX), 0, turn)
                }
            };
            [limit, burst, u64::from(*is_override)].into_iter().for_each(|number| command.int(number));
            command.text(&whole.to_string());
            command.int(fraction);
            command.int(turn);
        }
        command
    }

    /// Has reservations held again that the server may have lost, or charged as a dead node's. `is_news`: it has lost nothing,
    /// so that it has never heard of what it does not know.
    pub fn hold(&mut self, is_news: bool, held: &[HeldReservation]) -> ScriptCommand {
        let mut command = self.timely("hold", 0);
        command.int(u64::from(is_news));
        command.int(held.len() as u64);
        for one in held {
            command.text(&one.id);
            command.int(one.settled_by);
            command.int(one.pieces.len() as u64);
            for piece in &one.pieces {
                command.amounts(piece.reserved);
                command.amounts(piece.spent);
                command.int(piece.cells.len() as u64);
                for &(index, turn) in &piece.cells {
                    command.text(&self.cells.names[index as usize]);
                    command.int(turn);
                }
            }
        }
        command
    }

    /// Says that the node holds nothing beside these: what else the server has of this session is charged in full, but a lease,
    /// which goes back. Answers with how many are still to be charged, by another such call.
    pub fn release_unlisted(&mut self, ids: &[u64]) -> ScriptCommand {
        let mut command = self.timely("only", 1);
        command.int(ids.len() as u64);
        ids.iter().for_each(|&id| command.int(id));
        command
    }

    /// Holds room in these cells; answers with the number of requests in flight and of nodes alive.
    pub fn reserve(&mut self, reserve: &ReserveRequest<'_>, touched: &[u32]) -> ScriptCommand {
        let mut command = self.timely("reserve", 2);
        command.text(reserve.id);
        command.int(reserve.max_in_flight);
        command.text(match reserve.on_shortage {
            OnShortage::Reject => "reject",
            OnShortage::Clamp => "clamp",
            OnShortage::AdmitAnyway => "watch",
        });
        command.int(u64::from(reserve.generates));
        command.amounts(reserve.amounts);
        command.int(reserve.completions.max(1));
        self.add_cells(&mut command, touched);
        command
    }

    /// Steps of reservations, the first of which has this number in the session's sequence. Such as were
    /// applied already are not applied again. Answers with how many were, and with how these cells stand then.
    pub fn apply(&mut self, first: u64, steps: &[Step], cells: &[u32]) -> ScriptCommand {
        let mut command = self.begin("apply", 1);
        command.int(first);
        command.int(steps.len() as u64);
        for step in steps {
            command.text(match step.kind {
                StepKind::Extend => "extend",
                StepKind::Progress => "progress",
                StepKind::Settle => "settle",
                StepKind::OfflineUsage => "pay",
                StepKind::LeasedAdmission => "open",
            });
            command.text(&step.id);
            command.amounts(step.amounts);
            if step.kind == StepKind::LeasedAdmission {
                command.int(step.cells.len() as u64);
                step.cells.iter().for_each(|&index| command.text(&self.cells.names[index as usize]));
            }
        }
        self.add_cells(&mut command, cells);
        command
    }

    /// A step that takes what the node has spent of this cell while it was cut off; `turn` names a calendar's period.
    pub fn offline_usage_step(&self, cell: u32, amount: u64, turn: u64) -> Step {
        let amounts = Amounts { total: amount, prompt: turn, ..Amounts::default() };
        let id = self.cells.names[cell as usize].clone();
        Step { kind: StepKind::OfflineUsage, id, amounts, cells: SmallVec::from_slice(&[cell]) }
    }

    /// A step that tells of a request that the node has admitted out of its lease of these cells.
    pub fn leased_admission_step(&self, id: String, amounts: Amounts, touched: &[u32]) -> Step {
        Step { kind: StepKind::LeasedAdmission, id, amounts, cells: SmallVec::from_slice(touched) }
    }

    /// Asks for a lease of so much of each cell, together with what it has of them; answers with how much more it has
    /// now.
    pub fn lease(&mut self, wanted: &[u64]) -> ScriptCommand {
        let mut command = self.timely("lease", wanted.len());
        command.int(wanted.len() as u64);
        for (index, wanted) in wanted.iter().enumerate() {
            command.text(&self.cells.names[index]);
            command.int(*wanted);
        }
        command.calendars =
            self.cells.quotas.iter().map(|q| matches!(q.window, Window::Calendar { .. })).collect();
        command
    }

    /// Renews the session; answers with the number of nodes alive, of requests in flight, and all cells.
    pub fn heartbeat(&mut self) -> ScriptCommand {
        let mut command = self.begin("beat", 2);
        let all: Vec<u32> = (0..).take(self.cells.quotas.len()).collect();
        self.add_cells(&mut command, &all);
        command
    }

    /// Other limits for now, each of the quota at this place, or (`is_override` false) the config's again.
    pub fn limit(&mut self, is_override: bool, changes: &[(usize, NewLimit)]) -> ScriptCommand {
        let mut command = self.timely("limit", 0);
        command.int(u64::from(is_override));
        command.int(changes.len() as u64);
        for &(index, NewLimit { limit, burst }) in changes {
            command.text(&self.cells.names[index]);
            command.int(limit);
            command.int(burst);
        }
        command
    }

    /// All quotas whole again, but for what is held.
    pub fn reset(&mut self) -> ScriptCommand {
        self.timely("reset", 0)
    }

    /// The session ends; it holds nothing any more.
    pub fn leave(&mut self) -> ScriptCommand {
        self.begin("leave", 0)
    }

    fn begin(&mut self, command: &str, value_count: usize) -> ScriptCommand {
        let Self { cells, session, clock, redis_time, .. } = self;
        ScriptCommand { value_count, ..cells.command(command, *clock, *redis_time, None, session) }
    }

    fn timely(&mut self, command: &str, value_count: usize) -> ScriptCommand {
        let Self { cells, session, clock, redis_time, max_delay_ms } = self;
        let deadline = max_delay_ms.map(|ms| redis_time.plus_ms(ms));
        ScriptCommand { value_count, ..cells.command(command, *clock, *redis_time, deadline, session) }
    }

    fn add_cells(&self, command: &mut ScriptCommand, touched: &[u32]) {
        command.int(touched.len() as u64);
        for &index in touched {
            let index = index as usize;
            command.text(&self.cells.names[index]);
            command.calendars.push(matches!(self.cells.quotas[index].window, Window::Calendar { .. }));
        }
    }
}

impl ScriptCommand {
    fn text(&mut self, text: &str) {
        self.arguments.push(text.to_owned());
    }

    fn int(&mut self, number: u64) {
        self.arguments.push(number.to_string());
    }

    fn amounts(&mut self, amounts: Amounts) {
        Kind::ALL.into_iter().for_each(|kind| self.int(amounts.of(kind)));
    }

    /// Reads the answer to it; `None`: it is none.
    pub fn parse_reply(&self, numbers: &[i64]) -> Option<ScriptReply> {
        let (&[verdict, now], rest) = numbers.split_first_chunk::<2>()?;
        let verdict = match verdict {
            0 => Verdict::Denied,
            1 => Verdict::Admitted,
            2 => Verdict::TooManyInFlight,
            3 => Verdict::StalePeriod,
            4 => Verdict::UnknownSession,
            5 => Verdict::DeadlinePassed,
            6 => Verdict::Done,
            _ => return None,
        };
        let (values, cells) = rest.split_at_checked(self.value_count).unwrap_or_default();
        let states = cells.chunks_exact(FIELDS).zip(&self.calendars);
        let states =
            states.map(|(cell, &is_calendar)| state(cell, is_calendar)).collect::<Option<Vec<_>>>()?;
        Some(ScriptReply { verdict, now: Timestamp(now), values: values.to_vec(), states })
    }
}

/// Loads the states of an answer into the node's own quotas, so that they come to the same verdict.
pub fn load_states(quotas: &mut Quotas, touched: &[u32], answer: &ScriptReply) {
    for (&index, (state, _)) in touched.iter().zip(&answer.states) {
        quotas.load(index as usize, state);
    }
}

fn state(cell: &[i64], is_calendar: bool) -> Option<(CounterState, bool)> {
    let &[limit, burst, third, fourth, held, since, until, turn, is_override] = cell else { return None };
    let unsigned = |n: i64| u64::try_from(n).ok();
    let (limit, held) = (unsigned(limit)?, unsigned(held)?);
    let state = if is_calendar {
        let period = (Timestamp(since), Timestamp(until));
        CounterState::Calendar { limit, used: unsigned(third)?, held, period, period_id: unsigned(turn)? }
    } else {
        let level = (third, unsigned(fourth)?);
        CounterState::Rolling { limit, burst: unsigned(burst)?, level, held, at: Timestamp(since) }
    };
    Some((state, is_override != 0))
}

/// The script's number for a kind: its place among all, from 1 on.
fn kind(kind: Kind) -> u64 {
    kind as u64 + 1
}

/// What stays the same when a quota's limit changes.
fn name(quota: &Quota) -> String {
    let window = match quota.window {
        Window::Rolling { .. } => "rolling".to_owned(),
        // Of another time zone it is another cell, which the first node makes of what it knows was used.
        Window::Calendar { .. } => class(quota),
    };
    let Quota { scope, kind, per, .. } = quota;
    match scope {
        Scope::Environment => format!("{kind}/{}/{window}", per.ms),
        Scope::Caller(..) | Scope::Model(_) => {
            format!("{kind}/{}/{window}/{}/{}", per.ms, scope.as_str(), scope.name())
        }
    }
}

/// Quotas of one class have their periods at the same time; empty: it rolls.
fn class(quota: &Quota) -> String {
    match &quota.window {
        Window::Rolling { .. } => String::new(),
        Window::Calendar { unit, zone } => {
            format!("{unit:?}/{}", zone.iana_name().unwrap_or("UTC")).to_lowercase()
        }
    }
}
