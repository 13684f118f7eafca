use super::*;
use crate::config::{CompletionReserve, OnOverrun, Reserve as Reserves, WhenShort};
use crate::ledger::{Counters, Ended, Grant, Rules, Want};
use crate::quota::{Asker, Kind, Per, Scope, Window};
use crate::shared::Verdict;
use std::time::Duration;

const NOW: Timestamp = Timestamp(1_774_700_000_000);

fn done(told: &[i64], states: Vec<(State, bool)>) -> Answer {
    Answer { verdict: Verdict::Done, now: NOW, told: told.to_vec(), states }
}

/// One of two nodes that share 1,000 tokens.
fn shared() -> Counters {
    let reserve = Reserves {
        prompt: true,
        completion: CompletionReserve::MaxTokens,
        quantile: 0.9,
        default_max_tokens: 100,
        when_short: WhenShort::Reject,
        on_overrun: OnOverrun::Finish,
        max_wait: Duration::ZERO,
    };
    let per = Per { written: "day".into(), ms: 86_400_000 };
    let (kind, window) = (Kind::TotalTokens, Window::Rolling { burst: 1_000 });
    let quotas = [Quota { scope: Scope::Environment, kind, limit: 1_000, per, window }];
    let rules = Rules { reserve, enforce: true, max_in_flight: None };
    let mut counters = Counters::new(rules, &quotas, NOW);
    let terms = Terms { on_failure: OnStoreFailure::Local, stamp: 1, leases: false };
    counters.share(NOW, terms, "one");
    takes_part(&mut counters);
    counters
}

fn returns(counters: &mut Counters) -> Command {
    counters.join(NOW).unwrap();
    counters.joined(NOW, &done(&[0; 4], Vec::new())).unwrap();
    counters.return_from_alone(NOW);
    counters.join(NOW).unwrap()
}

fn takes_part(counters: &mut Counters) {
    returns(counters);
    counters.all_is_known();
    let full = Quotas::new(counters.limits.configured(), NOW).states(NOW);
    let states = full.into_iter().map(|state| (state, false)).collect();
    counters.beaten(NOW, &done(&[2, 0], states)).unwrap();
}

fn asker() -> Asker<'static> {
    Asker { caller: None, model: "m" }
}

fn want() -> Want<'static> {
    Want { asker: asker(), prompt: 10, generates: true, cap: Some(90), completions: 1 }
}

fn admitted_alone(counters: &mut Counters) -> Grant {
    counters.admit_alone(NOW, &want()).unwrap().grant
}

fn admitted(counters: &mut Counters) -> Grant {
    let question = counters.question(NOW, &want()).unwrap();
    let states = counters.quotas.states(NOW).into_iter().map(|state| (state, false)).collect();
    let answer = Answer { verdict: Verdict::Admitted, ..done(&[0, 2], states) };
    match counters.answered(NOW, &want(), &question, &answer) {
        Answered::Decided(Ok(admission)) => admission.grant,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_redis_may_have_heard_of_is_told_anew_and_not_paid_for_beside_that() {
    let mut counters = shared();
    counters.lose(NOW);
    let (ends, goes_on) = (admitted_alone(&mut counters), admitted_alone(&mut counters));
    // The server takes them up, and its answer is lost.
    returns(&mut counters);
    counters.lose(NOW);
    let spent = Amounts::of_request(10, 30);
    counters.settle(NOW, asker(), ends, Ended { spent, is_whole: true });
    let cluster = counters.cluster().unwrap();
    let told: Vec<_> =
        cluster.to_take_up().into_iter().map(|held| (held.is_known, held.settled_by)).collect();
    assert_eq!(told, [(false, 0), (false, 1)], "the server is not to charge them as forgotten");
    assert_eq!(cluster.journal.entries[0].step.amounts, spent);
    returns(&mut counters);
    let cluster = counters.cluster().unwrap();
    assert_eq!(cluster.journal.entries.len(), 1, "it is not paid for as well");
    counters.all_is_known();
    counters.settle(NOW, asker(), goes_on, Ended { spent, is_whole: true });
    let is_certain = |entry: &Entry| entry.held.as_ref().is_some_and(|open| open.is_certain);
    assert!(counters.cluster().unwrap().journal.entries.iter().all(is_certain));
}

#[test]
fn a_server_that_is_lost_again_and_empty_is_told_of_the_whole_and_not_of_a_part() {
    let mut counters = shared();
    counters.lose(NOW);
    let told = |command: &Command| command.arguments.iter().filter(|word| *word == "1000").count();
    let in_return = returns(&mut counters);
    counters.lose(NOW);
    for command in [in_return, counters.join(NOW).unwrap()] {
        assert_eq!(told(&command), 3, "limit, burst and level: {command:?}");
    }
}

#[test]
fn of_what_a_reservation_has_come_to_meanwhile_redis_is_told_when_it_is_back() {
    let mut counters = shared();
    let mut grant = admitted(&mut counters);
    counters.lose(NOW);
    counters.progress(NOW, "m", &mut grant, Amounts::of_request(10, 95));
    let held = counters.cluster().unwrap().to_take_up();
    let piece = &held[0].pieces[0];
    // Of a dead node's reservation so much is charged, and so much is given back to a node that was not dead.
    assert_eq!((piece.reserved, piece.moved), (Amounts::of_request(10, 90), Amounts::default()));
    takes_part(&mut counters);
    counters.progress(NOW, "m", &mut grant, Amounts::of_request(10, 96));
    let steps: Vec<_> =
        counters.cluster().unwrap().journal.entries.iter().map(|entry| entry.step.clone()).collect();
    let more = Amounts { completion: 6, total: 6, ..Amounts::default() };
    assert_eq!((steps[0].what, steps[0].amounts), (StepKind::Extend, more));
    assert_eq!((steps[1].what, steps[1].amounts), (StepKind::Progress, Amounts::of_request(10, 96)));
}
