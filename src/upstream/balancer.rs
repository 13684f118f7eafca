//! Chooses the replica for a request: of two taken at random, the one with the fewest requests in flight.

use super::availability::{Attempt, Standing};
use super::replica_status::ReplicaStatus;
use std::sync::Arc;

/// The replica for a request.
#[derive(Debug)]
pub(super) struct Choice {
    /// Its index.
    pub(super) index: usize,
    pub(super) attempt: Attempt,
    /// It cannot be reached or is unhealthy, and there is no better one.
    pub(super) is_last_resort: bool,
}

/// Chooses one of the replicas that this request has not `tried` yet. `None`: it has tried all.
///
/// A replica whose probe is due is chosen first. Replicas that are left out are chosen last: those that fail only their
/// health check, then the one whose probe is due next.
pub(super) fn choose(
    replicas: &[Arc<ReplicaStatus>],
    tried: &[usize],
    random: u64,
    now_ms: u64,
) -> Option<Choice> {
    let untried = || replicas.iter().enumerate().filter(|(index, _)| !tried.contains(index));
    if replicas.len() > 1 {
        let attempt = |index: usize| {
            let attempt = replicas.get(index)?.availability.attempt(now_ms).ok()?;
            Some(Choice { index, attempt, is_last_resort: false })
        };
        let is_due = |replica: &ReplicaStatus| {
            replica.standing(now_ms) == Standing::ProbeIsDue && replica.is_healthy()
        };
        if let Some(probe) = untried().filter(|(_, r)| is_due(r)).find_map(|(index, _)| attempt(index)) {
            return Some(probe);
        }
        let is_available = |replica: &ReplicaStatus| replica.standing(now_ms) == Standing::Available;
        let usable = || untried().filter(|(_, r)| is_available(r) && r.is_healthy());
        // Another worker may have found in the meantime that it cannot be reached.
        if let Some(choice) = less_loaded_of_two(usable, random).and_then(attempt) {
            return Some(choice);
        }
        let reachable = || untried().filter(|(_, r)| is_available(r));
        if let Some(mut choice) = less_loaded_of_two(reachable, random).and_then(attempt) {
            choice.is_last_resort = true;
            return Some(choice);
        }
    }
    let due = |replica: &ReplicaStatus| match replica.standing(now_ms) {
        Standing::Available | Standing::ProbeIsDue => 0,
        Standing::LeftOut { due_ms } => due_ms,
    };
    let (index, replica) = untried().min_by_key(|(_, replica)| due(replica))?;
    Some(Choice { index, attempt: replica.attempt_anyway(now_ms), is_last_resort: true })
}

/// The index of the less loaded one of two different candidates. Of equal ones, either is as likely.
fn less_loaded_of_two<'r, I>(candidates: impl Fn() -> I, random: u64) -> Option<usize>
where
    I: Iterator<Item = (usize, &'r Arc<ReplicaStatus>)>,
{
    let count = candidates().count();
    let below = |random: u64, end: usize| usize::try_from(random).unwrap_or(0).checked_rem(end);
    let first = below(random & u64::from(u32::MAX), count)?;
    // Their number may have changed since.
    let (index, one) = candidates().nth(first)?;
    let Some(step) = below(random >> 32, count - 1) else { return Some(index) };
    let (other_index, other) = candidates().nth((first + 1 + step) % count)?;
    Some(if other.in_flight() < one.in_flight() { other_index } else { index })
}

#[cfg(test)]
mod tests;
