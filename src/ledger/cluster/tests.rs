mod walk;

use super::*;
use crate::config::{CompletionReserve, OnOverrun, ReserveSettings, WhenShort};
use crate::ledger::{Counters, Demand, Ended, Grant, Rules};
use crate::quota::{Kind, Period, Scope, Subject, Window};
use crate::redis::Verdict;
use std::time::Duration;

const NOW: Timestamp = Timestamp(1_774_700_000_000);

fn done(told: &[i64], states: Vec<(CounterState, bool)>) -> ScriptReply {
    ScriptReply { verdict: Verdict::Done, now: NOW, values: told.to_vec(), states }
}

/// A node that has shared nothing yet.
fn counters(quotas: &[Quota], now: Timestamp) -> Counters {
    let reserve = ReserveSettings {
        prompt: true,
        completion: CompletionReserve::MaxTokens,
        quantile: 0.9,
        default_max_tokens: 100,
        when_short: WhenShort::Reject,
        on_overrun: OnOverrun::Finish,
        max_wait: Duration::ZERO,
    };
    Counters::new(Rules { reserve, enforce: true, max_in_flight: None }, quotas, now)
}

/// One of two nodes that share 1,000 tokens.
fn shared() -> Counters {
    shared_with(1_000, false)
}

fn shared_with(limit: u64, leases: bool) -> Counters {
    let per = Period { text: "day".into(), ms: 86_400_000 };
    let (kind, window) = (Kind::TotalTokens, Window::Rolling { burst: limit });
    let quotas = [Quota { scope: Scope::Environment, kind, limit, per, window }];
    let mut counters = counters(&quotas, NOW);
    let terms = Terms { on_failure: OnStoreFailure::Local, stamp: 1, leases };
    counters.share(NOW, terms, "one");
    takes_part(&mut counters);
    counters
}

/// Redis is told of all that is in flight; returns who was held, and by which step they are settled.
fn holds_all(counters: &mut Counters) -> Vec<(String, u64)> {
    let mut all = Vec::new();
    while let Some((_, ids)) = counters.hold(NOW) {
        let cluster = counters.cluster().unwrap();
        let settled_by = |id| cluster.journal.ended().find(|ended| ended.0 == id).map_or(0, |ended| ended.2);
        all.extend(ids.iter().map(|&id| (id.to_string(), settled_by(id))));
        cluster.are_held(&ids);
    }
    all.sort();
    all
}

/// As far as what was admitted meanwhile has to be told.
fn returns(counters: &mut Counters) -> ScriptCommand {
    let join = counters.join(NOW).unwrap();
    counters.joined(NOW, &done(&[0, 0, 1, 0], Vec::new())).unwrap();
    holds_all(counters);
    counters.return_from_alone(NOW);
    join
}

fn takes_part(counters: &mut Counters) {
    returns(counters);
    holds_all(counters);
    let full = Quotas::new(counters.limits.configured(), NOW).states(NOW);
    let states = full.into_iter().map(|state| (state, false)).collect();
    counters.beaten(NOW, &done(&[2, 0], states)).unwrap();
}

fn subject() -> Subject<'static> {
    Subject { caller: None, model: "m" }
}

fn demand() -> Demand<'static> {
    Demand { subject: subject(), prompt: 10, generates: true, cap: Some(90), completions: 1 }
}

fn admitted_alone(counters: &mut Counters) -> Grant {
    counters.admit_alone(NOW, &demand()).unwrap().grant
}

fn admitted(counters: &mut Counters) -> Grant {
    let question = counters.question(NOW, &demand()).unwrap();
    let states = counters.quotas.states(NOW).into_iter().map(|state| (state, false)).collect();
    let answer = ScriptReply { verdict: Verdict::Admitted, ..done(&[0, 2], states) };
    match counters.answered(NOW, &demand(), &question, &answer) {
        Answered::Decided(Ok(admission)) => admission.grant,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_redis_may_have_heard_of_is_told_anew_and_not_paid_for_beside_that() {
    let mut counters = shared();
    counters.lose(NOW);
    let (ends, goes_on) = (admitted_alone(&mut counters), admitted_alone(&mut counters));
    let all = |counters: &mut Counters| counters.hold(NOW).map_or(0, |(_, ids)| ids.len());
    // It has not heard of them while they were this node's own.
    counters.join(NOW).unwrap();
    assert_eq!(all(&mut counters), 0);
    // The server takes them up, and its answer is lost.
    returns(&mut counters);
    assert_eq!(all(&mut counters), 2);
    counters.lose(NOW);
    let spent = Amounts::of_request(10, 30);
    counters.settle(NOW, subject(), ends, Ended { spent, is_whole: true });
    counters.join(NOW).unwrap();
    let told = holds_all(&mut counters);
    assert_eq!(
        told,
        [("1".to_owned(), 1), ("2".to_owned(), 0)],
        "the server is not to charge them as forgotten"
    );
    let cluster = counters.cluster().unwrap();
    assert_eq!(cluster.journal.entries[0].step.amounts, spent);
    returns(&mut counters);
    assert_eq!(all(&mut counters), 0, "all has been told");
    assert_eq!(counters.cluster().unwrap().journal.entries.len(), 1, "it is not paid for as well");
    counters.settle(NOW, subject(), goes_on, Ended { spent, is_whole: true });
    let mut ended = counters.cluster().unwrap().journal.ended();
    assert!(ended.all(|(_, open, _)| open.is_certain));
}

#[test]
fn what_redis_denies_holds_nothing_whatever_the_node_makes_of_it() {
    let mut counters = shared();
    let stands = |counters: &mut Counters| {
        let levels: Vec<_> = counters.levels(NOW).into_iter().map(|l| (l.level, l.held, l.used)).collect();
        (levels, counters.held(), counters.in_flight)
    };
    let before = stands(&mut counters);
    let question = counters.question(NOW, &demand()).unwrap();
    let states = counters.quotas.states(NOW).into_iter().map(|state| (state, false)).collect();
    let answer = ScriptReply { verdict: Verdict::Denied, ..done(&[0, 2], states) };
    let answered = counters.answered(NOW, &demand(), &question, &answer);
    assert!(matches!(answered, Answered::Decided(Err(_))), "{answered:?}");
    assert_eq!(stands(&mut counters), before);
    let cluster = counters.cluster().unwrap();
    assert!(cluster.open.is_empty() && !cluster.is_behind());
}

#[test]
fn a_lease_does_not_let_a_node_run_ahead_of_what_redis_can_be_told() {
    let mut counters = shared_with(1 << 40, true);
    assert!(counters.lease(NOW).is_some());
    let states = counters.quotas.states(NOW).into_iter().map(|state| (state, false)).collect();
    assert!(counters.leased(NOW, &done(&[1 << 30], states)));
    let mut admitted = 0;
    while let Some(admission) = counters.admit_leased(NOW, &demand()) {
        admitted += 1;
        counters.settle(NOW, subject(), admission.grant, Ended { spent: Amounts::default(), is_whole: true });
    }
    assert_eq!(admitted, MOST_BEHIND / 2, "each has two steps");
    let batch = counters.cluster().unwrap().batch(NOW, u64::MAX).unwrap();
    assert!(counters.batch_is_told(NOW, &batch, &done(&[200], Vec::new())));
    assert!(counters.admit_leased(NOW, &demand()).is_some());
}

#[test]
fn for_what_others_bring_back_nobody_waits_for_longer_than_two_seconds() {
    let mut counters = shared();
    counters.lose(NOW);
    for (says, waits) in [(1_000, 1_000), (86_400_000, 2_000), (-1, 0)] {
        counters.join(NOW).unwrap();
        assert_eq!(counters.joined(NOW, &done(&[0, 0, 0, says], Vec::new())), Some((0, waits)));
    }
}

#[test]
fn thousands_in_flight_are_told_a_part_at_a_time() {
    let mut counters = shared();
    let mut cluster = counters.cluster().unwrap();
    let open =
        || Open { is_known: true, is_certain: true, pieces: SmallVec::new(), told: Amounts::default() };
    cluster.open.extend((1..=900).map(|id| (id, open())));
    cluster.next_id = 901;
    cluster.cancel(950);
    counters.lose(NOW);
    counters.join(NOW).unwrap();
    let mut calls = Vec::new();
    while let Some((command, ids)) = counters.hold(NOW) {
        assert!(command.arguments.len() < 3_000);
        calls.push(ids.len());
        cluster = counters.cluster().unwrap();
        cluster.are_held(&ids);
    }
    assert_eq!(calls, [200, 200, 200, 200, 101]);
    let command = counters.hold_only(NOW).unwrap();
    assert!(["1", "900", "950"].iter().all(|id| command.arguments.iter().any(|word| word == id)));
}

#[test]
fn a_server_that_is_lost_again_and_empty_is_told_of_the_whole_and_not_of_a_part() {
    let mut counters = shared();
    counters.lose(NOW);
    let told = |command: &ScriptCommand| command.arguments.iter().filter(|word| *word == "1000").count();
    let in_return = returns(&mut counters);
    counters.lose(NOW);
    for command in [in_return, counters.join(NOW).unwrap()] {
        assert_eq!(told(&command), 5, "limit and burst, also the config's, and level: {command:?}");
    }
}

#[test]
fn of_what_a_reservation_has_come_to_meanwhile_redis_is_told_when_it_is_back() {
    let mut counters = shared();
    let mut grant = admitted(&mut counters);
    counters.lose(NOW);
    counters.progress(NOW, "m", &mut grant, Amounts::of_request(10, 95));
    counters.join(NOW).unwrap();
    let (_, held) = counters.cluster().unwrap().next_to_hold();
    let piece = &held[0].pieces[0];
    // Of a dead node's reservation so much is charged, and so much is given back to a node that was not dead.
    assert_eq!((piece.reserved, piece.spent), (Amounts::of_request(10, 90), Amounts::default()));
    takes_part(&mut counters);
    counters.progress(NOW, "m", &mut grant, Amounts::of_request(10, 96));
    let steps: Vec<_> =
        counters.cluster().unwrap().journal.entries.iter().map(|entry| entry.step.clone()).collect();
    let more = Amounts { completion: 6, total: 6, ..Amounts::default() };
    assert_eq!((steps[0].kind, steps[0].amounts), (StepKind::Extend, more));
    assert_eq!((steps[1].kind, steps[1].amounts), (StepKind::Progress, Amounts::of_request(10, 96)));
}

#[test]
fn what_was_used_alone_is_not_taken_to_be_counted_where_the_first_call_that_tells_of_it_was_in_vain() {
    let mut counters = shared();
    counters.lose(NOW);
    let mut grant = admitted_alone(&mut counters);
    counters.progress(NOW, "m", &mut grant, Amounts::of_request(10, 20));
    // The server has lost its data, as all nodes have known them before.
    counters.join(NOW).unwrap();
    counters.joined(NOW, &done(&[0, 0, 0, 0], Vec::new())).unwrap();
    counters.return_from_alone(NOW);
    let first = counters.hold(NOW).unwrap();
    // It has come too late, or the period was another one.
    assert_eq!(counters.hold(NOW).unwrap(), first);
    // Or it was lost, and so is everything once more.
    counters.lose(NOW);
    counters.join(NOW).unwrap();
    counters.joined(NOW, &done(&[0, 0, 0, 0], Vec::new())).unwrap();
    assert_eq!(counters.hold(NOW).unwrap(), first);
    counters.cluster().unwrap().are_held(&first.1);
    let cluster = counters.cluster().unwrap();
    cluster.all_open().for_each(|(_, open)| open.is_certain = false);
    let (_, held) = cluster.next_to_hold();
    assert_eq!(held[0].pieces[0].spent, Amounts::default(), "of that it has not been told yet");
}

#[test]
fn what_redis_was_asked_for_is_not_charged_before_somebody_has_looked_at_its_answer() {
    let mut counters = shared();
    let is_spared = |counters: &mut Counters, question: &Question| {
        let command = counters.hold_only(NOW).unwrap();
        command.arguments.iter().skip(5).any(|word| *word == question.id.to_string())
    };
    let question = counters.question(NOW, &demand()).unwrap();
    counters.lose(NOW);
    counters.join(NOW).unwrap();
    assert!(is_spared(&mut counters, &question), "it may have been admitted");
    let answer = ScriptReply { verdict: Verdict::Admitted, ..done(&[0, 2], Vec::new()) };
    let answered = counters.answered(NOW, &demand(), &question, &answer);
    assert!(matches!(answered, Answered::Again), "{answered:?}");
    assert!(is_spared(&mut counters, &question), "it is to be cancelled");
    let steps = counters.cluster().unwrap().journal.entries.len();
    counters.cluster().unwrap().told(steps);
    assert!(!is_spared(&mut counters, &question));
}
