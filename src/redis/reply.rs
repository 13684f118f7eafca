//! The replies of the script.

use crate::clock::Timestamp;
use crate::quota::{CounterState, Quotas, UNLIMITED};

/// Numbers per cell in a reply.
const NUMBERS_PER_CELL: usize = 9;

/// The result of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A quota has no room for the request.
    Denied,
    /// The amounts are reserved in all quotas.
    Admitted,
    /// The maximum number of requests is in flight.
    TooManyInFlight,
    /// A calendar period in the command is not the current one on Redis's clock: repeat the command.
    StalePeriod,
    /// The session is over, or cells are missing: join again.
    UnknownSession,
    /// The command arrived after its deadline, and the script did nothing.
    DeadlinePassed,
    /// The command was executed.
    Done,
}

/// Whether an administrator has set something, and when that ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OverrideMark {
    /// It is as in the config.
    #[default]
    None,
    /// An administrator has set it, until it is deleted.
    Endless,
    /// An administrator has set it, until this time.
    Until(Timestamp),
}

impl OverrideMark {
    /// The mark of an override that ends at this time.
    pub fn until(end: Option<Timestamp>) -> Self {
        end.map_or(Self::Endless, Self::Until)
    }

    /// Whether there is an override.
    pub fn is_set(self) -> bool {
        self != Self::None
    }

    /// When the override ends. `None`: when it is deleted.
    pub fn end(self) -> Option<Timestamp> {
        match self {
            Self::Until(end) => Some(end),
            Self::None | Self::Endless => None,
        }
    }

    /// The number that the script uses.
    pub(super) fn number(self) -> i64 {
        match self {
            Self::None => 0,
            Self::Endless => 1,
            Self::Until(end) => end.0.max(2),
        }
    }

    /// The mark with this number.
    pub fn of_number(number: i64) -> Self {
        match number {
            0 => Self::None,
            1 => Self::Endless,
            end => Self::Until(Timestamp(end)),
        }
    }
}

/// A reply of the script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptReply {
    /// The result.
    pub verdict: Verdict,
    /// The time on Redis's clock.
    pub now: Timestamp,
    /// Further numbers. Each command documents its own.
    pub values: Vec<i64>,
    /// The states of the requested cells, each with the override of its limit.
    pub states: Vec<(CounterState, OverrideMark)>,
}

impl ScriptReply {
    /// Parses a reply. `calendars`: for each cell in it, whether it is a calendar quota. `None`: it is not a reply of the script.
    pub(super) fn parse(numbers: &[i64], value_count: usize, calendars: &[bool]) -> Option<Self> {
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
        let (values, cells) = rest.split_at_checked(value_count.min(rest.len())).unwrap_or_default();
        let states = cells.chunks_exact(NUMBERS_PER_CELL).zip(calendars);
        let states =
            states.map(|(cell, &is_calendar)| parse_state(cell, is_calendar)).collect::<Option<Vec<_>>>()?;
        Some(Self { verdict, now: Timestamp(now), values: values.to_vec(), states })
    }
}

impl ScriptReply {
    /// The part of the environment and that of the upstream, of a reply to a command that reserves in both. `cells`: the
    /// number of the environment's cells.
    pub fn split(&self, cells: usize) -> (Self, Self) {
        let part = |values: &[i64], states: &[(CounterState, OverrideMark)]| Self {
            verdict: self.verdict,
            now: self.now,
            values: values.to_vec(),
            states: states.to_vec(),
        };
        let (own, other) = self.values.split_at(2.min(self.values.len()));
        let (own_states, other_states) = self.states.split_at(cells.min(self.states.len()));
        (part(own, own_states), part(other, other_states))
    }
}

/// Loads the states of a reply into the node's own quotas, so that the node repeats the decision of Redis.
pub fn load_states(quotas: &mut Quotas, touched: &[u32], reply: &ScriptReply) {
    for (&index, (state, _)) in touched.iter().zip(&reply.states) {
        quotas.load(reply.now, index as usize, state);
    }
}

fn parse_state(cell: &[i64], is_calendar: bool) -> Option<(CounterState, OverrideMark)> {
    let &[limit, burst, third, fourth, held, since, until, turn, mark] = cell else { return None };
    let unsigned = |n: i64| u64::try_from(n).ok();
    let (limit, held) = (unsigned(limit)?, unsigned(held)?);
    let limit = if limit == 0 { UNLIMITED } else { limit };
    // An unlimited rolling quota has a period of the clock.
    let state = if is_calendar || limit == UNLIMITED {
        let period = (Timestamp(since), Timestamp(until));
        CounterState::Calendar { limit, used: unsigned(third)?, held, period, period_id: unsigned(turn)? }
    } else {
        let level = (third, unsigned(fourth)?);
        CounterState::Rolling { limit, burst: unsigned(burst)?, level, held, at: Timestamp(since) }
    };
    Some((state, OverrideMark::of_number(mark)))
}
