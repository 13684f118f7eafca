mod walk;

use super::admission::{ReserveCall, ReserveOutcome};
use super::session::Joined;
use super::*;
use crate::config::{CompletionReserve, OnOverrun, ReserveSettings, WhenShort};
use crate::ledger::{Demand, Grant, Local, Rules, Settlement};
use crate::quota::{CounterState, Kind, Period, Quota, Scope, Subject, Window};
use crate::redis::{OverrideMark, ScriptCommand, Verdict};
use std::time::Duration;

const NOW: Timestamp = Timestamp(1_774_700_000_000);

fn done(values: &[i64], states: Vec<(CounterState, OverrideMark)>) -> ScriptReply {
    ScriptReply { verdict: Verdict::Done, now: NOW, values: values.to_vec(), states }
}

/// The counters of one node, with all quotas full.
fn local(quotas: &[Quota], now: Timestamp) -> Local {
    let reserve = ReserveSettings {
        prompt: true,
        completion: CompletionReserve::MaxTokens,
        quantile: 0.9,
        default_max_tokens: 100,
        when_short: WhenShort::Reject,
        on_overrun: OnOverrun::Finish,
        max_wait: Duration::ZERO,
    };
    Local::new(Rules { reserve, enforce: true, max_in_flight: None }, quotas, now)
}

/// One of two nodes that share 1,000 tokens, online.
fn replica() -> Replica {
    replica_with(1_000, false)
}

fn replica_with(limit: u64, leases: bool) -> Replica {
    let per = Period { text: "day".into(), ms: 86_400_000 };
    let (kind, window) = (Kind::TotalTokens, Window::Rolling { burst: limit });
    let quotas = [Quota { scope: Scope::Environment, kind, limit, per, window }];
    let config =
        ReplicaConfig { on_failure: OnStoreFailure::Local, stamp: 1, max_call_delay_ms: 400, leases };
    let mut replica = Replica::new(local(&quotas, NOW), config, "one", NOW);
    go_online(&mut replica);
    replica
}

/// Confirms every reservation that Redis should hold. Returns their numbers, each with the step that settles it.
fn confirm_all_held(replica: &mut Replica) -> Vec<(String, u64)> {
    let mut all = Vec::new();
    while let Some((_, ids)) = replica.hold_command(NOW) {
        let settled_by =
            |id| replica.journal.settled().find(|settled| settled.0 == id).map_or(0, |settled| settled.2);
        all.extend(ids.iter().map(|&id| (id.to_string(), settled_by(id))));
        replica.confirm_held(&ids);
    }
    all.sort();
    all
}

/// Joins and begins the resync. Returns the join command.
fn begin_resync(replica: &mut Replica) -> ScriptCommand {
    let join = replica.join_command(NOW);
    let applied = replica.journal.sent(0, 0).acknowledged.cast_signed();
    replica.on_join(NOW, &done(&[0, 0, 1, 0, applied], Vec::new())).unwrap();
    confirm_all_held(replica);
    replica.begin_resync(NOW);
    join
}

fn go_online(replica: &mut Replica) {
    begin_resync(replica);
    confirm_all_held(replica);
    let full = Quotas::new(replica.local.overrides.configured(), NOW).states(NOW);
    let states = full.into_iter().map(|state| (state, OverrideMark::None)).collect();
    replica.on_heartbeat(NOW, &done(&[2, 0], states)).unwrap();
}

fn subject() -> Subject<'static> {
    Subject { caller: None, model: "m" }
}

fn demand() -> Demand<'static> {
    Demand {
        subject: subject(),
        prompt: 10,
        generates: true,
        cap: Some(90),
        completions: 1,
        backends: &[],
        may_clamp: true,
    }
}

fn admitted_offline(replica: &mut Replica) -> Box<Grant> {
    replica.admit_offline(NOW, &demand()).unwrap().grant
}

fn states(replica: &mut Replica) -> Vec<(CounterState, OverrideMark)> {
    replica.local.quotas.states(NOW).into_iter().map(|state| (state, OverrideMark::None)).collect()
}

fn admitted_by_redis(replica: &mut Replica) -> Box<Grant> {
    let call = replica.reserve_call(NOW, &demand()).unwrap();
    let reply = ScriptReply { verdict: Verdict::Admitted, ..done(&[0, 2], states(replica)) };
    match replica.on_reserve(NOW, &demand(), &call, &reply) {
        ReserveOutcome::Decided(Ok(admission)) => admission.grant,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_offline_reservation_whose_hold_reply_is_lost_is_held_again_and_charged_once() {
    let mut replica = replica();
    replica.go_offline(NOW);
    let (ends, goes_on) = (admitted_offline(&mut replica), admitted_offline(&mut replica));
    let next_held = |replica: &mut Replica| replica.hold_command(NOW).map_or(0, |(_, ids)| ids.len());
    // While this node is offline, Redis does not have its offline reservations.
    replica.join_command(NOW);
    assert_eq!(next_held(&mut replica), 0);
    // Redis holds them, and its reply is lost.
    begin_resync(&mut replica);
    assert_eq!(next_held(&mut replica), 2);
    replica.go_offline(NOW);
    let spent = Amounts::of_request(10, 30);
    replica.settle(NOW, subject(), ends, Settlement { spent, is_complete: true });
    replica.join_command(NOW);
    let held = confirm_all_held(&mut replica);
    let expected = [("1".to_owned(), 1), ("2".to_owned(), 0)];
    assert_eq!(held, expected, "otherwise Redis would charge them in full as unlisted");
    assert_eq!(replica.journal.entries[0].step.amounts, spent);
    begin_resync(&mut replica);
    assert_eq!(next_held(&mut replica), 0, "Redis has confirmed all of them");
    assert_eq!(replica.journal.entries.len(), 1, "the reservation is not part of the offline usage as well");
    replica.settle(NOW, subject(), goes_on, Settlement { spent, is_complete: true });
    assert!(replica.journal.settled().all(|(_, tracked, _)| tracked.is_confirmed));
}

#[test]
fn another_on_failure_applies_at_once_also_without_redis() {
    const REQUEST: i64 = 100;
    let mut replica = replica();
    let spent = Amounts::of_request(10, 90);
    let level = |replica: &mut Replica| replica.local.levels(NOW)[0].level;
    // Each request spends what it has reserved.
    let admit = |replica: &mut Replica| {
        let Ok(admission) = replica.admit_offline(NOW, &demand()) else { return false };
        replica.settle(NOW, subject(), admission.grant, Settlement { spent, is_complete: true });
        true
    };
    replica.set_on_failure(NOW, OnStoreFailure::Closed);
    replica.go_offline(NOW);
    assert!(replica.is_closed() && !admit(&mut replica));
    // Half of 1,000 tokens is the share of one of two nodes.
    replica.set_on_failure(NOW, OnStoreFailure::Local);
    assert!(admit(&mut replica));
    assert_eq!(level(&mut replica), 500 - REQUEST);
    replica.set_on_failure(NOW, OnStoreFailure::Closed);
    assert!(!admit(&mut replica));
    // No second share.
    replica.set_on_failure(NOW, OnStoreFailure::Local);
    assert_eq!(level(&mut replica), 500 - REQUEST);
    replica.set_on_failure(NOW, OnStoreFailure::Open);
    assert_eq!(level(&mut replica), 1_000);
    assert!((0..3).all(|_| admit(&mut replica)));
    replica.set_on_failure(NOW, OnStoreFailure::Local);
    assert_eq!(level(&mut replica), 500 - 4 * REQUEST);
    assert!(admit(&mut replica) && !admit(&mut replica));
    // Redis gets the usage of all five requests.
    begin_resync(&mut replica);
    let steps = replica.journal.entries.iter().map(|entry| entry.step.amounts.total);
    assert_eq!(steps.sum::<u64>(), 5 * REQUEST.cast_unsigned());
}

/// Sets the states of the quotas as Redis reports them. `enforce_until`: until then Redis has shadow mode.
fn heartbeat(
    replica: &mut Replica,
    limit: u64,
    mark: OverrideMark,
    enforce_until: Timestamp,
) -> Option<bool> {
    let quota = replica.local.overrides.configured()[0].with_limit(limit, limit);
    let state = Quotas::new(&[quota], NOW).states(NOW).remove(0);
    replica.on_heartbeat(NOW, &done(&[2, 0, 1, 1, enforce_until.0], vec![(state, mark)]))
}

fn limit_and_level(replica: &mut Replica) -> (u64, i64) {
    let level = replica.local.levels(NOW).remove(0);
    (level.quota.limit, level.level)
}

#[test]
fn overrides_end_without_redis_and_the_usage_before_is_reported() {
    let mut replica = replica();
    let end = NOW.plus_ms(1);
    heartbeat(&mut replica, 100_000, OverrideMark::Until(end), end).unwrap();
    replica.go_offline(NOW);
    let spent = Amounts::of_request(10, 90);
    for _ in 0..30 {
        let grant = admitted_offline(&mut replica);
        replica.settle(NOW, subject(), grant, Settlement { spent, is_complete: true });
    }
    replica.end_overrides(NOW);
    assert_eq!(limit_and_level(&mut replica), (50_000, 47_000));
    assert!(!replica.is_enforcing());
    replica.end_overrides(end);
    assert_eq!(limit_and_level(&mut replica), (500, 0), "the share of one of two nodes, and no debt");
    assert!(replica.is_enforcing());
    assert!(replica.admit_offline(end, &demand()).is_err());
    let set = replica.local.overrides.set();
    assert!(set.limits.is_empty() && set.enforce.is_none());
    // A server that has lost its data gets the limits of the config.
    let join = begin_resync(&mut replica);
    let whole = join.arguments.iter().filter(|word| *word == "1000").count();
    assert_eq!(whole, 5, "limit and burst in force, limit and burst of the config, and level: {join:?}");
    let steps = replica.journal.entries.iter().map(|entry| entry.step.amounts.total);
    assert_eq!(steps.sum::<u64>(), 3_000);
}

#[test]
fn an_override_that_ends_without_redis_changes_no_other_limit() {
    let mut replica = replica();
    let end = NOW.plus_ms(1);
    // Another node has a newer config, with 2,000 tokens.
    heartbeat(&mut replica, 2_000, OverrideMark::None, end).unwrap();
    replica.go_offline(NOW);
    replica.end_overrides(end);
    assert!(replica.is_enforcing());
    assert_eq!(limit_and_level(&mut replica), (1_000, 1_000));
}

#[test]
fn a_node_sends_its_limits_when_redis_asks_for_them() {
    let mut replica = replica();
    let states = states(&mut replica);
    let other = replica.local.overrides.configured()[0].with_limit(2_000, 2_000);
    let differing = vec![(Quotas::new(&[other], NOW).states(NOW).remove(0), OverrideMark::None)];
    let beat = |replica: &mut Replica, asks: i64, states: &[(CounterState, OverrideMark)]| {
        replica.on_heartbeat(NOW, &done(&[1, 0, 0, 0, 0, asks], states.to_vec()))
    };
    assert_eq!(beat(&mut replica, 1, &differing), Some(false), "they do not differ for long");
    let settings = replica.settings_to_send().unwrap();
    assert_eq!((settings.stamp, settings.quotas), (1, replica.local.overrides.configured().to_vec()));
    assert_eq!(replica.settings_to_send(), None);
    for _ in 0..2 {
        assert_eq!(beat(&mut replica, 0, &differing), Some(true), "another node has a newer config");
        assert_eq!(beat(&mut replica, 0, &differing), Some(false), "it is known");
        assert_eq!(beat(&mut replica, 0, &states), Some(false));
    }
}

#[test]
fn a_request_denied_by_redis_holds_nothing_even_if_this_node_would_admit_it() {
    let mut replica = replica();
    let counters = |replica: &mut Replica| {
        let levels: Vec<_> =
            replica.local.levels(NOW).into_iter().map(|l| (l.level, l.held, l.used)).collect();
        (levels, replica.local.held(), replica.local.in_flight)
    };
    let before = counters(&mut replica);
    let call = replica.reserve_call(NOW, &demand()).unwrap();
    let reply = ScriptReply { verdict: Verdict::Denied, ..done(&[0, 2], states(&mut replica)) };
    let outcome = replica.on_reserve(NOW, &demand(), &call, &reply);
    assert!(matches!(outcome, ReserveOutcome::Decided(Err(_))), "{outcome:?}");
    assert_eq!(counters(&mut replica), before);
    assert!(replica.tracked.is_empty() && replica.pending.is_empty() && !replica.has_unsent_steps());
}

#[test]
fn a_node_with_a_large_backlog_admits_nothing_from_its_lease() {
    let mut replica = replica_with(1 << 40, true);
    assert!(replica.lease_command(NOW).is_some());
    let states = states(&mut replica);
    assert!(replica.on_lease(NOW, &done(&[1 << 30], states)));
    let mut admitted = 0;
    while let Some(admission) = replica.admit_leased(NOW, &demand()) {
        admitted += 1;
        let settlement = Settlement { spent: Amounts::default(), is_complete: true };
        replica.settle(NOW, subject(), admission.grant, settlement);
    }
    assert_eq!(admitted, MAX_BACKLOG / 2, "each request has two steps");
    let batch = replica.next_batch(NOW, u64::MAX).unwrap();
    assert!(replica.on_batch(NOW, &batch, &done(&[200], Vec::new())));
    assert!(replica.admit_leased(NOW, &demand()).is_some());
}

#[test]
fn a_node_waits_at_most_two_seconds_for_other_nodes_to_restore_lost_data() {
    let mut replica = replica();
    replica.go_offline(NOW);
    for (reply_ms, waits_ms) in [(1_000, 1_000), (86_400_000, 2_000), (-1, 0)] {
        replica.join_command(NOW);
        assert_eq!(
            replica.on_join(NOW, &done(&[0, 0, 0, reply_ms], Vec::new())),
            Some(Joined { differing_limits: 0, wait_ms: waits_ms, lost_steps: 0 })
        );
    }
}

#[test]
fn many_reservations_are_held_again_in_batches() {
    let mut replica = replica();
    let tracked = || TrackedReservation {
        may_be_in_redis: true,
        is_confirmed: true,
        pieces: smallvec::SmallVec::new(),
        acknowledged: Amounts::default(),
    };
    replica.tracked.extend((1..=900).map(|id| (id, tracked())));
    replica.next_id = 901;
    replica.cancel(950);
    replica.go_offline(NOW);
    replica.join_command(NOW);
    let mut calls = Vec::new();
    while let Some((command, ids)) = replica.hold_command(NOW) {
        assert!(command.arguments.len() < 3_000);
        calls.push(ids.len());
        replica.confirm_held(&ids);
    }
    assert_eq!(calls, [200, 200, 200, 200, 101]);
    let command = replica.release_unlisted_command(NOW);
    assert!(["1", "900", "950"].iter().all(|id| command.arguments.iter().any(|word| word == id)));
}

#[test]
fn a_node_that_loses_redis_during_a_resync_joins_with_the_whole_quotas_not_its_share() {
    let mut replica = replica();
    replica.go_offline(NOW);
    let whole = |command: &ScriptCommand| command.arguments.iter().filter(|word| *word == "1000").count();
    let during_resync = begin_resync(&mut replica);
    replica.go_offline(NOW);
    for command in [during_resync, replica.join_command(NOW)] {
        assert_eq!(
            whole(&command),
            5,
            "limit and burst in force, limit and burst of the config, and level: {command:?}"
        );
    }
}

#[test]
fn offline_progress_of_an_online_reservation_is_sent_after_the_resync() {
    let mut replica = replica();
    let mut grant = admitted_by_redis(&mut replica);
    replica.go_offline(NOW);
    replica.progress(NOW, "m", &mut grant, Amounts::of_request(10, 95));
    replica.join_command(NOW);
    let (_, held) = replica.next_to_hold();
    let piece = &held[0].pieces[0];
    // Redis charges this amount if the node dies, and refunds it if the node turns out to be alive.
    assert_eq!((piece.reserved, piece.spent), (Amounts::of_request(10, 90), Amounts::default()));
    go_online(&mut replica);
    replica.progress(NOW, "m", &mut grant, Amounts::of_request(10, 96));
    let steps: Vec<_> = replica.journal.entries.iter().map(|entry| entry.step.clone()).collect();
    let more = Amounts { completion: 6, total: 6, ..Amounts::default() };
    assert_eq!((steps[0].kind, steps[0].amounts), (StepKind::Extend, more));
    assert_eq!((steps[1].kind, steps[1].amounts), (StepKind::Progress, Amounts::of_request(10, 96)));
}

#[test]
fn offline_progress_counts_as_unacknowledged_until_redis_acknowledges_it() {
    let mut replica = replica();
    replica.go_offline(NOW);
    let mut grant = admitted_offline(&mut replica);
    replica.progress(NOW, "m", &mut grant, Amounts::of_request(10, 20));
    // Redis has lost its data.
    replica.join_command(NOW);
    replica.on_join(NOW, &done(&[0, 0, 0, 0], Vec::new())).unwrap();
    replica.begin_resync(NOW);
    let first = replica.hold_command(NOW).unwrap();
    // The call arrived too late, or a calendar period had ended.
    assert_eq!(replica.hold_command(NOW).unwrap(), first);
    // Or the connection was lost, and Redis lost its data again.
    replica.go_offline(NOW);
    replica.join_command(NOW);
    replica.on_join(NOW, &done(&[0, 0, 0, 0], Vec::new())).unwrap();
    assert_eq!(replica.hold_command(NOW).unwrap(), first);
    replica.confirm_held(&first.1);
    replica.all_tracked().for_each(|(_, tracked)| tracked.is_confirmed = false);
    let (_, held) = replica.next_to_hold();
    assert_eq!(held[0].pieces[0].spent, Amounts::default(), "no step has reported it");
}

#[test]
fn a_requested_reservation_is_listed_until_its_cancellation_is_acknowledged() {
    let mut replica = replica();
    let is_listed = |replica: &mut Replica, call: &ReserveCall| {
        let command = replica.release_unlisted_command(NOW);
        command.arguments.iter().skip(5).any(|word| *word == call.id.to_string())
    };
    let call = replica.reserve_call(NOW, &demand()).unwrap();
    replica.go_offline(NOW);
    replica.join_command(NOW);
    assert!(is_listed(&mut replica, &call), "Redis may have admitted it");
    let reply = ScriptReply { verdict: Verdict::Admitted, ..done(&[0, 2], Vec::new()) };
    let outcome = replica.on_reserve(NOW, &demand(), &call, &reply);
    assert!(matches!(outcome, ReserveOutcome::Retry), "{outcome:?}");
    assert!(is_listed(&mut replica, &call), "its cancellation is in the journal");
    let steps = replica.journal.entries.len();
    replica.acknowledge(steps);
    assert!(!is_listed(&mut replica, &call));
}

/// Applies all steps of the journal, as Redis does. Returns the numbers of the first and the last step.
fn acknowledge_all(replica: &mut Replica) -> (u64, u64) {
    let first = replica.journal.first;
    while let Some(batch) = replica.next_batch(NOW, replica.next_step()) {
        let reply = done(&[], states(replica));
        assert!(replica.on_batch(NOW, &batch, &reply));
    }
    (first, replica.journal.first - 1)
}

fn rejoin_on_a_server_that_has_applied(replica: &mut Replica, step: i64) -> u64 {
    replica.go_offline(NOW);
    replica.join_command(NOW);
    replica.on_join(NOW, &done(&[0, 0, 1, 0, step], Vec::new())).unwrap().lost_steps
}

#[test]
fn steps_that_a_lagging_replica_lacks_are_repeated_with_their_reservations() {
    let mut replica = replica();
    let spent = |n| Settlement { spent: Amounts::of_request(10, n), is_complete: true };
    for n in 1..=3 {
        let grant = admitted_by_redis(&mut replica);
        replica.settle(NOW, subject(), grant, spent(n));
        assert_eq!(acknowledge_all(&mut replica), (n, n));
    }
    let unsent = admitted_by_redis(&mut replica);
    replica.settle(NOW, subject(), unsent, spent(4));
    assert_eq!(rejoin_on_a_server_that_has_applied(&mut replica, 1), 2);
    let held = confirm_all_held(&mut replica);
    let expected = [("2", 2), ("3", 3), ("4", 4)].map(|(id, step)| (id.to_owned(), step));
    assert_eq!(held, expected, "the server may lack the reservations too");
    let repeated: Vec<_> = replica.journal.entries.iter().map(|entry| entry.step.amounts).collect();
    assert_eq!(repeated, [2, 3, 4].map(|n| spent(n).spent));
    begin_resync(&mut replica);
    assert_eq!(acknowledge_all(&mut replica), (2, 4));
    // The former master returns. It has applied step 3.
    assert_eq!(rejoin_on_a_server_that_has_applied(&mut replica, 3), 1);
    assert_eq!(acknowledge_all(&mut replica), (4, 4));
    assert_eq!(rejoin_on_a_server_that_has_applied(&mut replica, 4), 0);
}

#[test]
fn the_journal_keeps_a_bounded_number_of_acknowledged_steps() {
    let mut journal = Journal::new();
    let push =
        |journal: &mut Journal| journal.push(Step::new(StepKind::Progress, "1".into(), Amounts::default()));
    for n in 0..30_000 {
        push(&mut journal);
        journal.acknowledge(1);
        assert!(journal.sent(0, 0).acknowledged == n + 1 && journal.sent(0, 0).oldest >= 1);
    }
    let oldest = journal.sent(0, 0).oldest;
    assert_eq!(oldest, 10_001);
    assert_eq!(journal.rewind(5), 20_000, "older steps are lost");
    assert_eq!((journal.first, journal.entries.len()), (oldest, 20_000));
    assert_eq!(journal.rewind(29_000), 0, "a server that has more changes nothing");
}
