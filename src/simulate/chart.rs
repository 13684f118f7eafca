//! A chart of one quota for a terminal: used and held amounts over time, the limit, and the refused calls.

use super::meter::QuotaOutcome;
use super::timeline::{PARTS, TimePart, Timeline};
use super::words::{duration, grouped, short_amount, utc};
use crate::clock::Timestamp;
use crate::quota::Kind;

/// Number of rows up to the limit.
const ROWS: u64 = 8;
/// Maximum number of rows above the limit, for debt.
const MAX_ROWS_ABOVE: u64 = 3;
/// Width of the labels of amounts, with the axis.
const LABEL_WIDTH: usize = 10;
/// Follows the labels of times.
const TIME_ZONE: &str = " UTC";
/// A chart is at least this wide.
const MIN_WIDTH: usize = 40;
/// Parts of a character cell, from empty to full.
const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const HELD: char = '░';

/// Draws the chart, at most `width` characters wide.
pub(super) fn chart(outcome: &QuotaOutcome, width: usize) -> String {
    let columns = outcome.timeline.columns(width.max(MIN_WIDTH) - LABEL_WIDTH - TIME_ZONE.len());
    let capacity = outcome.quota.capacity().max(1);
    let unit = if outcome.quota.kind == Kind::Requests { "requests" } else { "tokens" };
    let mut chart = format!("{unit:>8}\n");
    let debt = columns.iter().map(|part| part.used.saturating_add(part.held).saturating_sub(capacity)).max();
    let above = (u128::from(debt.unwrap_or(0)) * u128::from(ROWS)).div_ceil(u128::from(capacity));
    for row in (ROWS..ROWS + u64::try_from(above).unwrap_or(u64::MAX).min(MAX_ROWS_ABOVE)).rev() {
        chart += &line("", '│', columns.iter().map(|part| cell(part, row, capacity)));
    }
    chart += &line(
        &short_amount(capacity),
        '┼',
        columns.iter().map(|part| if part.denials > 0 { '×' } else { '─' }),
    );
    for row in (0..ROWS).rev() {
        let below = u128::from(capacity) * u128::from(row + 1) / u128::from(ROWS);
        let label = short_amount(u64::try_from(below).unwrap_or(u64::MAX));
        let (label, axis) = if row + 1 < ROWS && row % 2 == 1 { (&*label, '┤') } else { ("", '│') };
        chart += &line(label, axis, columns.iter().map(|part| cell(part, row, capacity)));
    }
    let ticks = ticks(&outcome.timeline, columns.len());
    chart += &line(
        "0",
        '└',
        (0..columns.len()).map(|at| if ticks.iter().any(|tick| tick.column == at) { '┬' } else { '─' }),
    );
    chart += &time_labels(&ticks, columns.len());
    chart += &denials(&columns, &outcome.timeline);
    chart
}

fn line(label: &str, axis: char, cells: impl Iterator<Item = char>) -> String {
    let text = format!("{label:>8} {axis}{}", cells.collect::<String>());
    format!("{}\n", text.trim_end())
}

/// The character of a column in a row. Row 0 is the lowest.
fn cell(part: &TimePart, row: u64, capacity: u64) -> char {
    // In eighths of a row.
    let height = |amount: u64| {
        let eighths = u128::from(amount) * u128::from(ROWS * 8) / u128::from(capacity);
        let at_least = u128::from(amount > 0);
        u64::try_from(eighths.max(at_least)).unwrap_or(u64::MAX).saturating_sub(row * 8).min(8)
    };
    let used = height(part.used);
    let all = height(part.used.saturating_add(part.held));
    if used == 0 && all >= 4 {
        return HELD;
    }
    usize::try_from(used).ok().and_then(|eighths| EIGHTHS.get(eighths)).copied().unwrap_or(' ')
}

/// A mark on the time axis.
pub(super) struct Tick {
    pub(super) column: usize,
    pub(super) label: String,
}

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
/// Distances of marks on the time axis, in milliseconds.
const STEPS: [u64; 22] = [
    SECOND,
    2 * SECOND,
    5 * SECOND,
    10 * SECOND,
    15 * SECOND,
    30 * SECOND,
    MINUTE,
    2 * MINUTE,
    5 * MINUTE,
    10 * MINUTE,
    15 * MINUTE,
    30 * MINUTE,
    HOUR,
    2 * HOUR,
    3 * HOUR,
    6 * HOUR,
    12 * HOUR,
    DAY,
    2 * DAY,
    7 * DAY,
    30 * DAY,
    365 * DAY,
];
/// Minimum distance of two marks, in columns.
const TICK_DISTANCE: u128 = 11;

/// Marks at round times in UTC.
pub(super) fn ticks(timeline: &Timeline, columns: usize) -> Vec<Tick> {
    let span = u128::from(timeline.last.ms_since(timeline.first)) + 1;
    let is_wide = |step: &&u64| u128::from(**step) * columns as u128 >= TICK_DISTANCE * span;
    let Some(&step) = STEPS.iter().find(is_wide) else { return Vec::new() };
    let whole = i64::try_from(step).unwrap_or(i64::MAX);
    let mut at = Timestamp(timeline.first.0.div_euclid(whole).saturating_mul(whole));
    let mut ticks = Vec::new();
    while at <= timeline.last {
        if at >= timeline.first {
            let column = u128::from(at.ms_since(timeline.first)) * columns as u128 / span;
            let is_midnight = at.0.rem_euclid(DAY.cast_signed()) == 0;
            let form = match step {
                _ if is_midnight || step >= DAY => "%b %d",
                0..MINUTE => "%H:%M:%S",
                _ => "%H:%M",
            };
            ticks.push(Tick { column: usize::try_from(column).unwrap_or(PARTS), label: utc(at, form) });
        }
        at = at.plus_ms(step);
        if ticks.len() > columns {
            break;
        }
    }
    ticks
}

/// The label of each mark is centred below it, unless it does not fit.
fn time_labels(ticks: &[Tick], columns: usize) -> String {
    let mut row = vec![b' '; LABEL_WIDTH + columns];
    for tick in ticks {
        let begin = (LABEL_WIDTH + tick.column).saturating_sub(tick.label.len() / 2);
        if let Some(place) = row.get_mut(begin..begin + tick.label.len()) {
            place.copy_from_slice(tick.label.as_bytes());
        }
    }
    format!("{}{TIME_ZONE}\n", String::from_utf8_lossy(&row).trim_end())
}

/// The denied calls of each column, relative to the largest number.
fn denials(columns: &[TimePart], timeline: &Timeline) -> String {
    let most = columns.iter().map(|part| part.denials).max().unwrap_or(0);
    if most == 0 {
        return String::new();
    }
    let bar = |part: &TimePart| {
        let eighths = usize::try_from((part.denials * 8).div_ceil(most)).unwrap_or(8);
        EIGHTHS.get(eighths).copied().unwrap_or(' ')
    };
    let bars = line("refused", '│', columns.iter().map(bar));
    let ms = timeline.last.ms_since(timeline.first) / columns.len().max(1) as u64;
    format!("{bars}{:LABEL_WIDTH$}at most {} in {}\n", "", grouped(most), duration(ms))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{call, environment};
    use super::super::{Mode, Pace, replay::replay, traffic::Traffic};
    use super::*;

    #[test]
    fn a_chart_shows_used_and_held_amounts_the_limit_and_refusals() {
        let environment = environment(
            "quotas: { total_tokens: { limit: 800, per: minute, burst: 1600 } }, reserve: { completion: 500 }",
        );
        // Calls of 200 tokens, of which 100 are the prompt: at 22:13:20 one, at 22:14:20 six, at 22:18:20 one.
        let calls = [0, 60, 60, 60, 60, 60, 60, 300].map(|second| call(second, 100, 100));
        let pace = Pace { first_token: std::time::Duration::from_secs(20), tokens_per_second: 50.0 };
        let outcome = replay(&Traffic::alone(&environment, &calls), 0, pace, Mode::Configured);
        let drawn = chart(&outcome.quotas[0], 50);
        let want = [
            "  tokens",
            "   1,600 ┼───────×────────────────────────────",
            "         │",
            "         │",
            "   1,200 ┤       ░░░",
            "         │       ░░░",
            "     800 ┤       ░░░",
            "         │░░░    ░░░                         ░",
            "     400 ┤░░░    ░░░▆▁                       ░",
            "         │░░▄▅▁  ░░███▅▁                     ░",
            "       0 └────┬──────────────┬─────────────┬──",
            "            22:14          22:16         22:18 UTC",
            " refused │       █",
            "          at most 4 in 8.3 s",
        ];
        assert_eq!(drawn.lines().collect::<Vec<_>>(), want, "{drawn}");
        assert!(drawn.lines().all(|line| line.chars().count() <= 50), "{drawn}");
    }

    #[test]
    fn debt_is_above_the_limit() {
        let environment =
            environment("quotas: { total_tokens: { limit: 800, per: hour } }, reserve: { completion: 1 }");
        let calls = [0, 60].map(|second| call(second, 100, 800));
        let outcome = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), Mode::Configured);
        let drawn = chart(&outcome.quotas[0], 40);
        let row_with = |mark: char| drawn.lines().position(|line| line.contains(mark)).unwrap();
        assert!(row_with('▇') < row_with('┼'), "{drawn}");
    }

    #[test]
    fn charts_of_any_width_and_time_are_drawn() {
        let environment = environment("quotas: { requests: { limit: 1000000G, per: minute } }");
        for seconds in [0, 1, 100, 86_400, 10_000_000, 4_000_000_000] {
            let calls = [0, seconds].map(|second| call(second, 100, 800));
            let outcome = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), Mode::Configured);
            for width in [0, 40, 80, 239, 10_000] {
                let drawn = chart(&outcome.quotas[0], width);
                let widest = drawn.lines().map(|line| line.chars().count()).max();
                assert!(widest <= Some(width.max(MIN_WIDTH)), "{widest:?}\n{drawn}");
            }
        }
    }
}
