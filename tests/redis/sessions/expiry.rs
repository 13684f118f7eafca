//! Sessions that end: their reservations are charged in full.

use super::{
    START, expire_other_sessions, held_reservation, hold, month_state, node, quotas, rejoin, reserve,
};
use crate::server::Server;
use tollgate::clock::Timestamp;
use tollgate::quota::Amounts;
use tollgate::redis::{CommandBuilder, NewLimit, OverrideMark, Step, StepKind, Verdict};

#[test]
fn a_dead_nodes_reservations_are_charged_in_full_once() {
    let server = Server::start();
    let (mut dead, mut survivor) = (node(&server, "dead"), node(&server, "survivor"));
    dead.heartbeat();
    for n in 0..450 {
        assert_eq!(reserve(&mut dead, &format!("a{n}"), 2, 0).verdict, Verdict::Admitted);
    }
    let spent = Step::new(StepKind::Progress, "a7".into(), Amounts::of_request(1, 0));
    dead.run(|commands| commands.apply(1, &[spent], &[]));
    assert_eq!(reserve(&mut survivor, "b", 30, 0).verdict, Verdict::Admitted);
    for half_seconds in 1..=28 {
        let now = START.plus_ms(half_seconds * 500);
        assert_eq!(month_state(&mut survivor, now), (999_070, 929, 1), "held until the session times out");
    }
    for half_seconds in 29..=36 {
        month_state(&mut survivor, START.plus_ms(half_seconds * 500));
    }
    let now = START.plus_ms(20_000);
    assert_eq!(month_state(&mut survivor, now), (999_070, 30, 900));
    assert_eq!(survivor.heartbeat().values, [1, 1], "one node alive, one request in flight");
    // The node was only cut off. It must join again, and its late steps change nothing.
    dead.commands.set_clock(now);
    assert_eq!(reserve(&mut dead, "c", 1, 0).verdict, Verdict::UnknownSession);
    let late_settlement = Step::new(StepKind::Settle, "a8".into(), Amounts::default());
    assert_eq!(
        dead.run(|commands| commands.apply(2, &[late_settlement], &[])).verdict,
        Verdict::UnknownSession,
        "the node must send the step again"
    );
    let late_admission =
        [dead.commands.leased_admission_step("d".into(), Amounts::of_request(5, 0), &[0, 1])];
    assert_eq!(
        dead.run(|commands| commands.apply(2, &late_admission, &[])).verdict,
        Verdict::UnknownSession,
        "without a session the reservation would never be charged"
    );
    assert_eq!(month_state(&mut survivor, now), (999_070, 30, 900));
    dead.join(now);
    assert_eq!(reserve(&mut dead, "c", 1, 0).verdict, Verdict::Admitted);
}

#[test]
fn an_outage_of_the_server_ends_no_session() {
    let server = Server::start();
    let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
    one.heartbeat();
    other.heartbeat();
    assert_eq!(reserve(&mut other, "a", 100, 0).verdict, Verdict::Admitted);
    let thawed = START.plus_ms(300_000);
    assert_eq!(month_state(&mut one, thawed), (999_900, 100, 0));
    other.commands.set_clock(thawed.plus_ms(400));
    assert_eq!(other.heartbeat().values, [2, 1]);
}

#[test]
fn a_node_that_leaves_with_open_reservations_is_charged_in_full() {
    let server = Server::start();
    let (mut leaver, mut survivor) = (node(&server, "leaver"), node(&server, "survivor"));
    assert_eq!(reserve(&mut leaver, "a", 100, 0).verdict, Verdict::Admitted);
    leaver.run(CommandBuilder::leave);
    expire_other_sessions(&mut survivor);
    assert_eq!(month_state(&mut survivor, START.plus_ms(20_000)), (999_900, 0, 100));
}

/// `HSCAN` of a large hash visits a limited number of buckets and finds nothing where all fields were deleted.
#[test]
fn thousands_of_reservations_of_a_dead_node_are_all_charged() {
    let server = Server::start();
    let (mut dead, mut survivor) = (node(&server, "dead"), node(&server, "survivor"));
    let all: Vec<_> = (0..5_000).map(|n| held_reservation(&n.to_string(), 1, 0)).collect();
    for batch in all.chunks(200) {
        hold(&mut dead, true, batch);
    }
    for half_seconds in 1..=60 {
        month_state(&mut survivor, START.plus_ms(half_seconds * 500));
    }
    let now = START.plus_ms(30_000);
    assert_eq!(
        (month_state(&mut survivor, now), survivor.heartbeat().values),
        ((995_000, 0, 5_000), vec![1, 0])
    );
}

#[test]
fn reservations_of_many_dead_nodes_are_charged_in_batches() {
    let server = Server::start();
    let mut survivor = node(&server, "survivor");
    for n in 0..30 {
        let mut dead = node(&server, &format!("dead-{n}"));
        let all: Vec<_> = (0..100).map(|n| held_reservation(&n.to_string(), 1, 0)).collect();
        hold(&mut dead, true, &all);
    }
    let mut used_before = 0;
    for half_seconds in 1..=60 {
        let (_, _, used) = month_state(&mut survivor, START.plus_ms(half_seconds * 500));
        assert!(used - used_before <= 400, "{} charged by one heartbeat", used - used_before);
        used_before = used;
    }
    assert_eq!(survivor.heartbeat().values, [1, 0]);
    assert_eq!(used_before, 3_000);
}

/// The clock can step back, for example when a server with another clock becomes the master.
#[test]
fn a_node_that_dies_when_the_clock_steps_back_is_charged() {
    let server = Server::start();
    let (mut dead, mut survivor) = (node(&server, "dead"), node(&server, "survivor"));
    assert_eq!(reserve(&mut dead, "a", 100, 0).verdict, Verdict::Admitted);
    survivor.heartbeat();
    for seconds in 1..=20 {
        month_state(&mut survivor, Timestamp(START.0 - 7_200_000).plus_ms(seconds * 1_000));
    }
    let now = Timestamp(START.0 - 7_180_000);
    assert_eq!(
        (month_state(&mut survivor, now), survivor.heartbeat().values),
        ((999_900, 0, 100), vec![1, 0])
    );
}

#[test]
fn ended_sessions_leave_no_fields_and_can_rejoin_within_a_day() {
    let server = Server::start();
    let mut survivor = node(&server, "survivor");
    for n in 0..300 {
        let mut dead = node(&server, &format!("dead-{n}"));
        assert_eq!(reserve(&mut dead, "a", 1, 0).verdict, Verdict::Admitted);
    }
    for half_seconds in 1..=40 {
        month_state(&mut survivor, START.plus_ms(half_seconds * 500));
    }
    let now = START.plus_ms(20_000);
    assert_eq!(
        (month_state(&mut survivor, now), survivor.heartbeat().values),
        ((999_700, 0, 300), vec![1, 0])
    );
    let fields: i64 = server.query("HLEN test:{staging}:s");
    assert!(fields < 12, "{fields}");
    // An ended session can still rejoin within a day.
    let next_day = START.plus_ms(86_000_000);
    let mut rejoined = server.node("dead-7", &quotas(), next_day);
    assert!(rejoin(&mut rejoined, next_day));
    hold(&mut rejoined, true, &[held_reservation("a", 1, 0)]);
    assert_eq!(month_state(&mut survivor, next_day), (999_700, 1, 299));
}

#[test]
fn a_quota_that_only_a_dead_node_had_blocks_no_command() {
    let server = Server::start();
    let mut survivor = server.node("survivor", &quotas()[..1], START);
    survivor.commands.set_clock(START);
    survivor.join(START);
    let mut dead = node(&server, "dead");
    assert_eq!(reserve(&mut dead, "a", 100, 0).verdict, Verdict::Admitted);
    // The month is over. Only the dead node could send the bounds of the next one.
    let now = START.plus_ms(10 * 86_400_000);
    for seconds in 0..=20 {
        survivor.commands.set_clock(now.plus_ms(seconds * 1_000));
        survivor.heartbeat();
    }
    assert_eq!(survivor.heartbeat().values, [1, 0], "its reservation is charged");
    assert_eq!(
        survivor
            .run(|commands| commands.limit(
                OverrideMark::Endless,
                "",
                &[(0, NewLimit { limit: 50, burst: 20 })]
            ))
            .verdict,
        Verdict::Done
    );
    assert_eq!(survivor.run(|commands| commands.reset(None)).verdict, Verdict::Done);
    let level = survivor.mirror(now).levels(now).swap_remove(0);
    assert_eq!((level.level, level.held), (20, 0));
}
