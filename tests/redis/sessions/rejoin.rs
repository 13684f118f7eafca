//! Nodes that rejoin: they restore lost state, and the server reverses its charges.

use super::{
    START, expire_other_sessions, full_states, held_reservation, hold, month_state, node, quotas, rejoin,
    reserve, settle,
};
use crate::node::{Node, of_config};
use crate::server::Server;
use tollgate::quota::Amounts;
use tollgate::redis::{HeldReservation, ScriptReply, SentSteps, Step, StepKind, Verdict};

#[test]
fn nodes_restore_the_state_that_the_server_lost() {
    let server = Server::start();
    let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
    reserve(&mut one, "a", 100, 0);
    reserve(&mut other, "b", 200, 0);
    settle(&mut other, 1, "b", 70);
    reserve(&mut other, "c", 300, 0);
    let answer = one.heartbeat();
    one.flush_server();
    assert_eq!(reserve(&mut one, "d", 1, 0).verdict, Verdict::UnknownSession);
    // The first node creates the cells from its copy. Each node adds its reservations. Nothing is counted twice.
    assert_eq!(
        one.run(|commands| commands.join(1, Some(SentSteps::default()), &of_config(&answer.states), None))
            .values,
        [2, 0, 0, 1_000, 0, START.0],
        "the node must wait for the others"
    );
    hold(&mut one, false, &[held_reservation("a", 100, 0)]);
    assert_eq!(
        other
            .run(|commands| commands.join(
                1,
                Some(SentSteps::default()),
                &full_states(&quotas(), START),
                None
            ))
            .values,
        [0, 0, 0, 1_000, 0, START.0]
    );
    for _ in 0..2 {
        hold(&mut other, false, &[held_reservation("b", 200, 1), held_reservation("c", 300, 0)]);
    }
    // The copy of the cells contains the cost of "b". The server lost the step that settled "b", so it is sent again.
    assert_eq!(month_state(&mut one, START), (1_000_000 - 70 - 600, 600, 70));
    assert_eq!(one.heartbeat().values, [2, 3]);
}

/// One node takes part again long after the other. The usage that only it knew is charged in addition to the usage since then.
#[test]
fn a_node_that_comes_late_restores_what_only_it_knew() {
    for is_late in [false, true] {
        let server = Server::start();
        let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
        reserve(&mut one, "a", 100, 0);
        settle(&mut one, 1, "a", 100);
        let known_to_one = one.heartbeat();
        reserve(&mut other, "b", 30, 0);
        settle(&mut other, 1, "b", 30);
        let known_to_other = other.heartbeat();
        one.flush_server();
        let sent = Some(SentSteps { oldest: 1, acknowledged: 1, data_set: 1, first_joined: 1 });
        let at = |node: &mut Node, ms| node.commands.set_clock(START.plus_ms(ms));
        let join = |node: &mut Node, known: &ScriptReply| {
            node.run(|c| c.join(1, sent, &of_config(&known.states), None)).values
        };
        assert_eq!(join(&mut one, &known_to_one), [2, 0, 0, 1_000, 1, START.0]);
        if !is_late {
            assert_eq!(join(&mut other, &known_to_other), [0, 0, 0, 1_000, 1, START.0]);
        }
        let mut now = START.plus_ms(1_500);
        at(&mut one, 1_500);
        assert_eq!(reserve(&mut one, "c", 50, 0).verdict, Verdict::Admitted);
        settle(&mut one, 2, "c", 50);
        if is_late {
            assert_eq!(month_state(&mut one, now).2, 150, "30 tokens are missing");
            at(&mut other, 2_000);
            now = START.plus_ms(2_000);
            assert_eq!(join(&mut other, &known_to_other)[0], 0);
        }
        assert_eq!(month_state(&mut one, now), (999_820, 0, 180), "late: {is_late}");
        // The states of a third node contain nothing that is missing.
        let mut third = server.node("third", &quotas(), now);
        third.commands.set_clock(now);
        assert_eq!(join(&mut third, &known_to_one)[0], 0);
        assert_eq!(month_state(&mut one, now), (999_820, 0, 180), "late: {is_late}");
    }
}

/// The server has fewer steps than it has acknowledged: it was a replica that lagged behind the master.
#[test]
fn a_server_that_has_lost_steps_rejects_later_ones_until_the_node_repeats_them() {
    let server = Server::start();
    let mut one = node(&server, "one");
    reserve(&mut one, "a", 100, 0);
    settle(&mut one, 1, "a", 70);
    let steps = |id: &str| [Step::new(StepKind::Settle, id.into(), Amounts::of_request(20, 0))];
    let late = one.run(|commands| commands.apply(4, &steps("d"), &[])).verdict;
    assert_eq!(late, Verdict::UnknownSession, "steps 2 and 3 are missing");
    let begun = START.0.cast_unsigned();
    let sent = |oldest| Some(SentSteps { oldest, acknowledged: 3, data_set: begun, first_joined: begun });
    let states = full_states(&quotas(), START);
    assert_eq!(one.run(|commands| commands.join(1, sent(1), &states, None)).values, [0, 0, 1, 0, 1, START.0]);
    // The server lacks the reservations too.
    let all = [("b", 2), ("c", 3), ("d", 4)].map(|(id, step)| held_reservation(id, 40, step));
    hold(&mut one, true, &all);
    for (id, step) in [("b", 2), ("c", 3), ("d", 4)] {
        assert_eq!(one.run(|commands| commands.apply(step, &steps(id), &[])).verdict, Verdict::Done);
    }
    assert_eq!(month_state(&mut one, START), (999_870, 0, 130));
    // Steps that the node has not kept are lost. The server accepts the steps after them.
    assert_eq!(one.run(|commands| commands.join(1, sent(9), &states, None)).values, [0, 0, 1, 0, 8, START.0]);
    assert_eq!(one.run(|commands| commands.apply(9, &steps("e"), &[])).verdict, Verdict::Done);
    // The server never had this session, and has the data set that the node knew. The node repeats everything.
    let mut other = server.node("other", &quotas(), START);
    other.commands.set_clock(START);
    assert_eq!(
        other.run(|commands| commands.join(1, sent(1), &states, None)).values,
        [0, 0, 1, 0, 0, START.0]
    );
    assert_eq!(month_state(&mut one, START), (999_870, 0, 130));
}

#[test]
fn the_full_charge_of_a_rejoining_node_is_reversed() {
    let server = Server::start();
    let (mut cut_off, mut survivor) = (node(&server, "cut-off"), node(&server, "survivor"));
    reserve(&mut cut_off, "a", 100, 0);
    reserve(&mut cut_off, "b", 10, 0);
    let now = expire_other_sessions(&mut survivor);
    assert_eq!(month_state(&mut survivor, now), (999_890, 0, 110), "charged in full");
    assert!(rejoin(&mut cut_off, now));
    // "a" has grown by 50, and the step for that is not sent yet. The reply for "b" was lost, so "b" is cancelled.
    let cancelled = HeldReservation { pieces: Vec::new(), ..held_reservation("b", 0, 2) };
    hold(&mut cut_off, true, &[held_reservation("a", 150, 0), cancelled]);
    assert_eq!(month_state(&mut survivor, now), (999_890, 110, 0), "held again with the reserved amounts");
    let steps = [
        Step::new(StepKind::Extend, "a".into(), Amounts::of_request(50, 0)),
        Step::new(StepKind::Settle, "b".into(), Amounts::default()),
    ];
    cut_off.run(|commands| commands.apply(1, &steps, &[]));
    assert_eq!(month_state(&mut survivor, now), (999_850, 150, 0));
    settle(&mut cut_off, 3, "a", 30);
    assert_eq!(month_state(&mut survivor, now), (999_970, 0, 30));
    // The reply to the settlement was lost. A settled reservation is not held again.
    hold(&mut cut_off, true, &[held_reservation("a", 150, 3)]);
    assert_eq!(month_state(&mut survivor, now), (999_970, 0, 30));
    assert_eq!(survivor.heartbeat().values, [2, 0]);
}

#[test]
fn a_node_that_rejoins_while_it_is_charged_pays_exactly_once() {
    let server = Server::start();
    let (mut cut_off, mut survivor) = (node(&server, "cut-off"), node(&server, "survivor"));
    let ids: Vec<_> = (0..900).map(|n| n.to_string()).collect();
    for id in &ids {
        assert_eq!(reserve(&mut cut_off, id, 1, 0).verdict, Verdict::Admitted);
    }
    for half_seconds in 1..=30 {
        survivor.commands.set_clock(START.plus_ms(half_seconds * 500));
        survivor.heartbeat();
    }
    let now = START.plus_ms(15_100);
    let (level, still_held, charged) = month_state(&mut survivor, now);
    assert!(level == 999_100 && still_held > 0 && charged > 0, "{still_held} held, {charged} charged");
    assert!(rejoin(&mut cut_off, now));
    let all: Vec<_> = ids.iter().map(|id| held_reservation(id, 1, 0)).collect();
    for batch in all.chunks(300) {
        hold(&mut cut_off, true, batch);
    }
    assert_eq!(cut_off.run(|commands| commands.release_unlisted(&(0..900).collect::<Vec<_>>())).values, [0]);
    assert_eq!(month_state(&mut survivor, now), (999_100, 900, 0));
    assert_eq!(survivor.heartbeat().values, [2, 900], "the rest is no longer charged");
    for (number, id) in (1..).zip(&ids) {
        settle(&mut cut_off, number, id, 0);
    }
    assert_eq!(
        (month_state(&mut survivor, now), survivor.heartbeat().values),
        ((1_000_000, 0, 0), vec![2, 0])
    );
}

#[test]
fn reservations_that_a_rejoining_node_does_not_list_are_charged() {
    let server = Server::start();
    let mut node = node(&server, "one");
    let (listed, cancelled, unlisted) = ("1", "2", "3");
    for (id, tokens) in [(listed, 10), (cancelled, 40), (unlisted, 20)] {
        assert_eq!(reserve(&mut node, id, tokens, 0).verdict, Verdict::Admitted);
    }
    node.run(|commands| commands.lease(&[100, 100]));
    assert!(rejoin(&mut node, START));
    hold(
        &mut node,
        true,
        &[
            held_reservation(listed, 10, 0),
            HeldReservation { pieces: Vec::new(), ..held_reservation(cancelled, 0, 1) },
        ],
    );
    assert_eq!(month_state(&mut node, START), (999_830, 170, 0), "the list may be incomplete");
    assert_eq!(node.run(|commands| commands.release_unlisted(&[1, 2])).values, [0]);
    assert_eq!(month_state(&mut node, START), (999_930, 50, 20), "the lease is returned");
    settle(&mut node, 1, cancelled, 0);
    assert_eq!((month_state(&mut node, START), node.heartbeat().values), ((999_970, 10, 20), vec![1, 1]));
}

#[test]
fn unlisted_reservations_are_charged_in_batches() {
    let server = Server::start();
    let mut node = node(&server, "one");
    for n in 0..450 {
        assert_eq!(reserve(&mut node, &n.to_string(), 1, 0).verdict, Verdict::Admitted);
    }
    for left in [250, 50, 0] {
        assert_eq!(node.run(|commands| commands.release_unlisted(&[])).values, [left]);
    }
    assert_eq!((month_state(&mut node, START), node.heartbeat().values), ((999_550, 0, 450), vec![1, 0]));
}

/// A node admitted the request from its lease, and lost Redis before it reported the request.
#[test]
fn spent_tokens_of_a_reservation_new_to_the_server_are_charged() {
    let server = Server::start();
    let mut node = node(&server, "one");
    let mut held = held_reservation("1", 100, 0);
    held.pieces[0].spent = Amounts::of_request(30, 0);
    hold(&mut node, true, &[held]);
    assert_eq!(month_state(&mut node, START), (999_900, 70, 30));
    assert_eq!(node.mirror(START).levels(START)[0].level, 900);
    // Steps that were already queued are not charged twice.
    let steps = [
        node.commands.leased_admission_step("1".into(), Amounts::of_request(100, 0), &[0, 1]),
        Step::new(StepKind::Progress, "1".into(), Amounts::of_request(30, 0)),
        Step::new(StepKind::Settle, "1".into(), Amounts::of_request(50, 0)),
    ];
    node.run(|commands| commands.apply(1, &steps, &[]));
    assert_eq!(month_state(&mut node, START), (999_950, 0, 50));
    assert_eq!(node.mirror(START).levels(START)[0].level, 950);
}

/// Steps queued while the node was cut off arrive after the rejoin, before the node lists its reservations.
#[test]
fn a_charged_reservation_that_settles_before_it_is_listed_costs_what_was_spent() {
    let server = Server::start();
    let (mut cut_off, mut survivor) = (node(&server, "cut-off"), node(&server, "survivor"));
    for (id, tokens) in [("1", 100), ("2", 10)] {
        assert_eq!(reserve(&mut cut_off, id, tokens, 0).verdict, Verdict::Admitted);
    }
    let now = expire_other_sessions(&mut survivor);
    assert_eq!(month_state(&mut survivor, now), (999_890, 0, 110));
    assert!(rejoin(&mut cut_off, now));
    let settlement =
        |id: &str, tokens| Step::new(StepKind::Settle, id.into(), Amounts::of_request(tokens, 0));
    let steps = [settlement("1", 30), settlement("2", 500)];
    assert_eq!(cut_off.run(|commands| commands.apply(1, &steps, &[])).verdict, Verdict::Done);
    hold(&mut cut_off, true, &[held_reservation("1", 100, 1), held_reservation("2", 10, 2)]);
    assert_eq!(cut_off.run(|commands| commands.release_unlisted(&[1, 2])).values, [0]);
    assert_eq!(
        (month_state(&mut survivor, now), survivor.heartbeat().values),
        ((999_470, 0, 530), vec![2, 0])
    );
}

#[test]
fn a_charge_that_a_reset_removed_is_not_reversed_again() {
    let server = Server::start();
    let (mut cut_off, mut survivor) = (node(&server, "cut-off"), node(&server, "survivor"));
    assert_eq!(reserve(&mut cut_off, "1", 100, 0).verdict, Verdict::Admitted);
    cut_off.run(|commands| commands.lease(&[50, 50]));
    let now = expire_other_sessions(&mut survivor);
    assert_eq!(survivor.run(|commands| commands.reset(None)).verdict, Verdict::Done);
    assert_eq!(reserve(&mut survivor, "b", 400, 0).verdict, Verdict::Admitted);
    settle(&mut survivor, 1, "b", 400);
    assert!(rejoin(&mut cut_off, now));
    hold(&mut cut_off, true, &[held_reservation("1", 100, 0)]);
    cut_off.run(|commands| commands.release_unlisted(&[1]));
    assert_eq!(month_state(&mut survivor, now), (999_500, 100, 400));
    settle(&mut cut_off, 1, "1", 30);
    assert_eq!(month_state(&mut survivor, now), (999_570, 0, 430));
    assert_eq!(survivor.mirror(now).levels(now)[0].level, 570);
}
