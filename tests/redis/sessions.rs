//! Nodes that come, go and die.

use super::server::{Node, Server, full};
use tollgate::clock::Timestamp;
use tollgate::quota::{Amounts, Kind, Period, Quota, Scope, Window};
use tollgate::redis::{
    HeldReservation, NewLimit, OnShortage, Piece, ReserveRequest, ScriptReply, Step, StepKind, Verdict,
};

const BEGIN: Timestamp = Timestamp(1_774_700_000_000);
/// The start of its month: names that period.
const MONTH: u64 = 1_772_323_200_000;

/// 1,000 tokens a minute, and a month's quota: what is held longer than the first one lasts shows in it.
fn quotas() -> Vec<Quota> {
    let month = Window::Calendar { unit: tollgate::quota::ClockUnit::Month, zone: jiff::tz::TimeZone::UTC };
    let quota = |limit, ms, window| {
        let per = Period { text: format!("{ms}ms"), ms };
        Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit, per, window }
    };
    vec![quota(1_000, 60_000, Window::Rolling { burst: 1_000 }), quota(1_000_000, 30 * 86_400_000, month)]
}

fn node(server: &Server, session: &str) -> Node {
    let mut node = server.node(session, &quotas(), BEGIN);
    node.commands.set_clock(BEGIN);
    node.join(BEGIN);
    node
}

fn reserve(node: &mut Node, id: &str, tokens: u64, most: u64) -> ScriptReply {
    let amounts = Amounts::of_request(tokens, 0);
    let on_shortage = OnShortage::Reject;
    let reserve =
        ReserveRequest { id, max_in_flight: most, on_shortage, generates: true, amounts, completions: 1 };
    let command = node.commands.reserve(&reserve, &[0, 1]);
    node.call(&command)
}

/// Level, held and used of the month's quota, by this node's clock.
fn month(node: &mut Node, now: Timestamp) -> (i64, u64, u64) {
    node.commands.set_clock(now);
    let level = node.mirror(now).levels(now).pop().unwrap();
    (level.level, level.held, level.used)
}

/// Shows that it is alive for twenty seconds, in which nobody else does; tells when that was over.
fn gives_others_up(node: &mut Node) -> Timestamp {
    for seconds in 1..=20 {
        month(node, BEGIN.plus_ms(seconds * 1_000));
    }
    BEGIN.plus_ms(20_000)
}

#[test]
fn what_a_dead_node_held_is_charged_in_full_and_once() {
    let server = Server::start();
    let (mut dies, mut lives) = (node(&server, "dies"), node(&server, "lives"));
    dies.beat();
    for n in 0..450 {
        assert_eq!(reserve(&mut dies, &format!("a{n}"), 2, 0).verdict, Verdict::Admitted);
    }
    let spent = Step::new(StepKind::Progress, "a7".into(), Amounts::of_request(1, 0));
    let command = dies.commands.apply(1, &[spent], &[]);
    dies.call(&command);
    assert_eq!(reserve(&mut lives, "b", 30, 0).verdict, Verdict::Admitted);
    for half_seconds in 1..=28 {
        let now = BEGIN.plus_ms(half_seconds * 500);
        assert_eq!(month(&mut lives, now), (999_070, 929, 1), "held for as long as it may live");
    }
    for half_seconds in 29..=36 {
        month(&mut lives, BEGIN.plus_ms(half_seconds * 500));
    }
    let now = BEGIN.plus_ms(20_000);
    assert_eq!(month(&mut lives, now), (999_070, 30, 900));
    assert_eq!(lives.beat().values, [1, 1], "one node alive, one request in flight");
    // It was only cut off: it is told to join anew, and what it settles late changes nothing.
    dies.commands.set_clock(now);
    assert_eq!(reserve(&mut dies, "c", 1, 0).verdict, Verdict::UnknownSession);
    let late = Step::new(StepKind::Settle, "a8".into(), Amounts::default());
    let command = dies.commands.apply(2, &[late], &[]);
    assert_eq!(dies.call(&command).verdict, Verdict::UnknownSession, "it is to be told again");
    let opened = [dies.commands.leased_admission_step("d".into(), Amounts::of_request(5, 0), &[0, 1])];
    let command = dies.commands.apply(2, &opened, &[]);
    assert_eq!(dies.call(&command).verdict, Verdict::UnknownSession, "nobody would charge it");
    assert_eq!(month(&mut lives, now), (999_070, 30, 900));
    dies.join(now);
    assert_eq!(reserve(&mut dies, "c", 1, 0).verdict, Verdict::Admitted);
}

#[test]
fn nobody_is_charged_because_the_server_was_away() {
    let server = Server::start();
    let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
    one.beat();
    other.beat();
    assert_eq!(reserve(&mut other, "a", 100, 0).verdict, Verdict::Admitted);
    let thawed = BEGIN.plus_ms(300_000);
    assert_eq!(month(&mut one, thawed), (999_900, 100, 0));
    other.commands.set_clock(thawed.plus_ms(400));
    assert_eq!(other.beat().values, [2, 1]);
}

#[test]
fn a_command_that_is_read_too_late_takes_nothing() {
    let server = Server::start();
    let mut node = node(&server, "one");
    node.commands.set_max_delay_ms(25);
    let limit = [(0, NewLimit { limit: 50, burst: 20 })];
    for (late_ms, late) in [(26, true), (25, false)] {
        node.commands.set_clock(BEGIN.plus_ms(late_ms));
        // When it was sent.
        node.commands.set_redis_time(BEGIN);
        let verdict = |on_time| if late { Verdict::DeadlinePassed } else { on_time };
        let lease = node.commands.lease(&[10, 10]);
        assert_eq!(node.call(&lease).verdict, verdict(Verdict::Done));
        assert_eq!(reserve(&mut node, "a", 100, 0).verdict, verdict(Verdict::Admitted));
        node.commands.set_redis_time(BEGIN);
        for command in [
            node.commands.reset(),
            node.commands.hold(true, &[held("b", 50, 0)]),
            node.commands.limit(true, &limit),
            node.commands.release_unlisted(&[]),
            node.commands.join(2, true, &full(&quotas(), BEGIN)),
        ] {
            assert_eq!(node.call(&command).verdict, verdict(Verdict::Done), "{command:?}");
        }
        let is_taken = (999_850, 0, 150);
        assert_eq!(month(&mut node, BEGIN.plus_ms(late_ms)), if late { (1_000_000, 0, 0) } else { is_taken });
    }
}

#[test]
fn requests_in_flight_are_counted_over_all_nodes() {
    let server = Server::start();
    let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
    assert_eq!(reserve(&mut one, "a", 1, 2).verdict, Verdict::Admitted);
    assert_eq!(reserve(&mut other, "b", 1, 2).verdict, Verdict::Admitted);
    assert_eq!(reserve(&mut one, "c", 1, 2).verdict, Verdict::TooManyInFlight);
    let ends = Step::new(StepKind::Settle, "b".into(), Amounts::of_request(1, 0));
    let command = other.commands.apply(1, &[ends], &[]);
    other.call(&command);
    assert_eq!(reserve(&mut one, "c", 1, 2).verdict, Verdict::Admitted);
    assert_eq!(month(&mut one, BEGIN), (999_997, 2, 1));
}

#[test]
fn what_one_node_sets_every_node_sees() {
    let server = Server::start();
    let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
    let command = one.commands.limit(true, &[(0, NewLimit { limit: 50, burst: 20 })]);
    assert_eq!(one.call(&command).verdict, Verdict::Done);
    let answer = reserve(&mut other, "a", 30, 0);
    assert_eq!((answer.verdict, answer.states[0].1), (Verdict::Denied, true));
    // Whoever joins later does not undo it.
    let mut third = node(&server, "third");
    let quota = third.mirror(BEGIN).levels(BEGIN).swap_remove(0).quota;
    assert_eq!((quota.limit, quota.capacity()), (50, 20));
    assert_eq!(reserve(&mut other, "a", 20, 0).verdict, Verdict::Admitted);
    let command = one.commands.reset();
    assert_eq!(one.call(&command).verdict, Verdict::Done);
    assert_eq!(month(&mut other, BEGIN), (999_980, 20, 0), "what is held stays held");
}

#[test]
fn a_calendar_period_that_the_node_has_wrong_is_asked_for_anew() {
    let server = Server::start();
    let mut node = node(&server, "one");
    let next_month = BEGIN.plus_ms(10 * 86_400_000);
    node.commands.set_clock(next_month);
    node.commands.set_redis_time(BEGIN);
    let answer = reserve(&mut node, "a", 1, 0);
    assert_eq!((answer.verdict, answer.now), (Verdict::StalePeriod, next_month));
    node.commands.set_redis_time(answer.now);
    assert_eq!(reserve(&mut node, "a", 1, 0).verdict, Verdict::Admitted);
}

/// A reservation of so many tokens in both quotas, as its node keeps it.
fn held(id: &str, tokens: u64, settled_by: u64) -> HeldReservation {
    let piece = Piece {
        reserved: Amounts::of_request(tokens, 0),
        spent: Amounts::default(),
        cells: vec![(0, 0), (1, MONTH)],
    };
    HeldReservation { id: id.into(), settled_by, pieces: vec![piece] }
}

fn hold(node: &mut Node, is_news: bool, held: &[HeldReservation]) {
    let command = node.commands.hold(is_news, held);
    assert_eq!(node.call(&command).verdict, Verdict::Done);
}

fn settle(node: &mut Node, number: u64, id: &str, tokens: u64) {
    let step = Step::new(StepKind::Settle, id.into(), Amounts::of_request(tokens, 0));
    let command = node.commands.apply(number, &[step], &[]);
    assert_eq!(node.call(&command).verdict, Verdict::Done);
}

/// Joins once more, and tells whether the server still knew it.
fn join_again(node: &mut Node, now: Timestamp) -> bool {
    node.commands.set_clock(now);
    let command = node.commands.join(1, true, &full(&quotas(), now));
    node.call(&command).values[2] == 1
}

#[test]
fn what_a_server_has_lost_the_nodes_bring_back() {
    let server = Server::start();
    let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
    reserve(&mut one, "a", 100, 0);
    reserve(&mut other, "b", 200, 0);
    settle(&mut other, 1, "b", 70);
    reserve(&mut other, "c", 300, 0);
    let answer = one.beat();
    one.flush();
    assert_eq!(reserve(&mut one, "d", 1, 0).verdict, Verdict::UnknownSession);
    // The first to come makes the cells of what it knows, each brings what it holds, and nothing counts twice.
    let command = one.commands.join(1, true, &answer.states);
    assert_eq!(one.call(&command).values, [2, 0, 0, 1_000], "others are waited for");
    hold(&mut one, false, &[held("a", 100, 0)]);
    let command = other.commands.join(1, true, &full(&quotas(), BEGIN));
    assert_eq!(other.call(&command).values, [0, 0, 0, 1_000]);
    for _ in 0..2 {
        hold(&mut other, false, &[held("b", 200, 1), held("c", 300, 0)]);
    }
    // What "b" has cost was in the cells already, and its settling is lost with the rest: it is sent again.
    assert_eq!(month(&mut one, BEGIN), (1_000_000 - 70 - 600, 600, 70));
    assert_eq!(one.beat().values, [2, 3]);
}

#[test]
fn a_node_that_was_given_up_takes_back_what_was_charged() {
    let server = Server::start();
    let (mut cut_off, mut lives) = (node(&server, "cut-off"), node(&server, "lives"));
    reserve(&mut cut_off, "a", 100, 0);
    reserve(&mut cut_off, "b", 10, 0);
    let now = gives_others_up(&mut lives);
    assert_eq!(month(&mut lives, now), (999_890, 0, 110), "charged in full");
    assert!(join_again(&mut cut_off, now));
    // It holds 50 more by now, which the server is about to be told. And of "b" nobody knows whether it was admitted.
    let cancelled = HeldReservation { pieces: Vec::new(), ..held("b", 0, 2) };
    hold(&mut cut_off, true, &[held("a", 150, 0), cancelled]);
    assert_eq!(month(&mut lives, now), (999_890, 110, 0), "held again, as it was");
    let steps = [
        Step::new(StepKind::Extend, "a".into(), Amounts::of_request(50, 0)),
        Step::new(StepKind::Settle, "b".into(), Amounts::default()),
    ];
    let command = cut_off.commands.apply(1, &steps, &[]);
    cut_off.call(&command);
    assert_eq!(month(&mut lives, now), (999_850, 150, 0));
    settle(&mut cut_off, 3, "a", 30);
    assert_eq!(month(&mut lives, now), (999_970, 0, 30));
    // Its answer was lost: what is over is not taken up again.
    hold(&mut cut_off, true, &[held("a", 150, 3)]);
    assert_eq!(month(&mut lives, now), (999_970, 0, 30));
    assert_eq!(lives.beat().values, [2, 0]);
}

#[test]
fn who_comes_back_while_it_is_charged_pays_for_nothing_twice_and_nothing_less() {
    let server = Server::start();
    let (mut cut_off, mut lives) = (node(&server, "cut-off"), node(&server, "lives"));
    let ids: Vec<_> = (0..900).map(|n| n.to_string()).collect();
    for id in &ids {
        assert_eq!(reserve(&mut cut_off, id, 1, 0).verdict, Verdict::Admitted);
    }
    for half_seconds in 1..=30 {
        lives.commands.set_clock(BEGIN.plus_ms(half_seconds * 500));
        lives.beat();
    }
    let now = BEGIN.plus_ms(15_100);
    let (level, still_held, charged) = month(&mut lives, now);
    assert!(level == 999_100 && still_held > 0 && charged > 0, "{still_held} held, {charged} charged");
    assert!(join_again(&mut cut_off, now));
    let all: Vec<_> = ids.iter().map(|id| held(id, 1, 0)).collect();
    for some in all.chunks(300) {
        hold(&mut cut_off, true, some);
    }
    let command = cut_off.commands.release_unlisted(&(0..900).collect::<Vec<_>>());
    assert_eq!(cut_off.call(&command).values, [0]);
    assert_eq!(month(&mut lives, now), (999_100, 900, 0));
    assert_eq!(lives.beat().values, [2, 900], "and the rest is not charged any more");
    for (number, id) in (1..).zip(&ids) {
        settle(&mut cut_off, number, id, 0);
    }
    assert_eq!((month(&mut lives, now), lives.beat().values), ((1_000_000, 0, 0), vec![2, 0]));
}

#[test]
fn the_limits_of_the_newest_config_hold() {
    let server = Server::start();
    let mut one = node(&server, "one");
    reserve(&mut one, "a", 100, 0);
    let limit = |node: &mut Node| {
        let level = node.mirror(BEGIN).levels(BEGIN).swap_remove(0);
        (level.quota.limit, level.quota.capacity(), level.level)
    };
    let with = |limit| vec![quotas()[0].with_limit(limit, limit), quotas()[1].clone()];
    for (stamp, given, want) in [(5, 2_000, (2_000, 2_000, 1_900)), (4, 500, (2_000, 2_000, 1_900))] {
        let mut other = server.node("other", &with(given), BEGIN);
        other.commands.set_clock(BEGIN);
        let command = other.commands.join(stamp, false, &full(&with(given), BEGIN));
        let told = other.call(&command).values;
        assert_eq!((told[0], told[1], told[3]), (0, 1, 0), "the node is told");
        assert_eq!(limit(&mut one), want);
    }
}

#[test]
fn a_lease_is_held_until_it_is_used_given_back_or_its_node_is_dead() {
    let server = Server::start();
    let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
    let levels = |node: &mut Node, now: Timestamp| {
        node.commands.set_clock(now);
        let levels = node.mirror(now).levels(now);
        levels.into_iter().map(|level| (level.level, level.held, level.used)).collect::<Vec<_>>()
    };
    let lease = |node: &mut Node, wanted: &[u64]| {
        let command = node.commands.lease(wanted);
        node.call(&command).values
    };
    assert_eq!(lease(&mut one, &[100, 5_000]), [100, 5_000]);
    assert_eq!(lease(&mut one, &[100, 5_000]), [0, 0], "together with what there is");
    assert_eq!(levels(&mut other, BEGIN), [(900, 100, 0), (995_000, 5_000, 0)]);
    // Two requests out of it, of which the second is too large by 20: that much is taken beside it.
    let open = |node: &Node, id: &str, tokens| {
        node.commands.leased_admission_step(id.into(), Amounts::of_request(tokens, 0), &[0, 1])
    };
    let steps = [open(&one, "a", 80), open(&one, "b", 40)];
    let command = one.commands.apply(1, &steps, &[]);
    one.call(&command);
    assert_eq!(levels(&mut other, BEGIN), [(880, 120, 0), (995_000, 5_000, 0)]);
    assert_eq!(one.beat().values, [2, 2], "a lease is no request");
    let ends = |id: &str, tokens| Step::new(StepKind::Settle, id.into(), Amounts::of_request(tokens, 0));
    let command =
        one.commands.apply(3, &[ends("a", 30), ends("b", 50), open(&one, "c", 10), ends("lease", 0)], &[]);
    one.call(&command);
    assert_eq!(levels(&mut other, BEGIN), [(910, 10, 80), (999_910, 10, 80)]);
    // Never the last tenth; and what a dead node leased is charged with the rest.
    assert_eq!(lease(&mut other, &[900, 999_000]), [810, 899_910]);
    for seconds in 1..=20 {
        levels(&mut one, BEGIN.plus_ms(seconds * 1_000));
    }
    let now = BEGIN.plus_ms(20_000);
    assert_eq!(levels(&mut one, now)[1], (100_000, 10, 899_990));
    assert_eq!(one.beat().values, [1, 1]);
}

#[test]
fn what_the_server_has_and_its_node_has_not_is_charged_when_the_node_comes_back() {
    let server = Server::start();
    let mut node = node(&server, "one");
    let (kept, cancelled, forgotten) = ("1", "2", "3");
    for (id, tokens) in [(kept, 10), (cancelled, 40), (forgotten, 20)] {
        assert_eq!(reserve(&mut node, id, tokens, 0).verdict, Verdict::Admitted);
    }
    let command = node.commands.lease(&[100, 100]);
    node.call(&command);
    assert!(join_again(&mut node, BEGIN));
    hold(
        &mut node,
        true,
        &[held(kept, 10, 0), HeldReservation { pieces: Vec::new(), ..held(cancelled, 0, 1) }],
    );
    assert_eq!(month(&mut node, BEGIN), (999_830, 170, 0), "the node does not say that this is all");
    let command = node.commands.release_unlisted(&[1, 2]);
    assert_eq!(node.call(&command).values, [0]);
    assert_eq!(month(&mut node, BEGIN), (999_930, 50, 20), "what was leased goes back");
    settle(&mut node, 1, cancelled, 0);
    assert_eq!((month(&mut node, BEGIN), node.beat().values), ((999_970, 10, 20), vec![1, 1]));
}

#[test]
fn what_a_node_leased_that_was_given_up_goes_back_when_it_returns() {
    let server = Server::start();
    let (mut cut_off, mut lives) = (node(&server, "cut-off"), node(&server, "lives"));
    let command = cut_off.commands.lease(&[100, 5_000]);
    cut_off.call(&command);
    let now = gives_others_up(&mut lives);
    assert_eq!(month(&mut lives, now), (995_000, 0, 5_000), "charged in full");
    assert!(join_again(&mut cut_off, now));
    let command = cut_off.commands.release_unlisted(&[]);
    assert_eq!(cut_off.call(&command).values, [0]);
    assert_eq!(month(&mut lives, now), (1_000_000, 0, 0));
}

#[test]
fn however_much_was_forgotten_is_charged_a_part_at_a_time() {
    let server = Server::start();
    let mut node = node(&server, "one");
    for n in 0..450 {
        assert_eq!(reserve(&mut node, &n.to_string(), 1, 0).verdict, Verdict::Admitted);
    }
    for left in [250, 50, 0] {
        let command = node.commands.release_unlisted(&[]);
        assert_eq!(node.call(&command).values, [left]);
    }
    assert_eq!((month(&mut node, BEGIN), node.beat().values), ((999_550, 0, 450), vec![1, 0]));
}

/// As when a node has admitted it out of a lease, and Redis is lost before it was told.
#[test]
fn what_is_spent_of_a_reservation_that_the_server_has_never_heard_of_is_charged() {
    let server = Server::start();
    let mut node = node(&server, "one");
    let mut held = held("1", 100, 0);
    held.pieces[0].spent = Amounts::of_request(30, 0);
    hold(&mut node, true, &[held]);
    assert_eq!(month(&mut node, BEGIN), (999_900, 70, 30));
    assert_eq!(node.mirror(BEGIN).levels(BEGIN)[0].level, 900);
    // What was on its way takes nothing twice.
    let steps = [
        node.commands.leased_admission_step("1".into(), Amounts::of_request(100, 0), &[0, 1]),
        Step::new(StepKind::Progress, "1".into(), Amounts::of_request(30, 0)),
        Step::new(StepKind::Settle, "1".into(), Amounts::of_request(50, 0)),
    ];
    let command = node.commands.apply(1, &steps, &[]);
    node.call(&command);
    assert_eq!(month(&mut node, BEGIN), (999_950, 0, 50));
    assert_eq!(node.mirror(BEGIN).levels(BEGIN)[0].level, 950);
}

#[test]
fn a_quota_that_other_nodes_have_no_more_is_in_nobodys_way() {
    let server = Server::start();
    let mut lives = server.node("lives", &quotas()[..1], BEGIN);
    lives.commands.set_clock(BEGIN);
    lives.join(BEGIN);
    let mut dies = node(&server, "dies");
    assert_eq!(reserve(&mut dies, "a", 100, 0).verdict, Verdict::Admitted);
    // The month is over, which only the dead node could tell the end of.
    let now = BEGIN.plus_ms(10 * 86_400_000);
    for seconds in 0..=20 {
        lives.commands.set_clock(now.plus_ms(seconds * 1_000));
        lives.beat();
    }
    assert_eq!(lives.beat().values, [1, 0], "what it held is charged");
    let command = lives.commands.limit(true, &[(0, NewLimit { limit: 50, burst: 20 })]);
    assert_eq!(lives.call(&command).verdict, Verdict::Done);
    let command = lives.commands.reset();
    assert_eq!(lives.call(&command).verdict, Verdict::Done);
    let level = lives.mirror(now).levels(now).swap_remove(0);
    assert_eq!((level.level, level.held), (20, 0));
}

#[test]
fn what_nobody_uses_any_more_is_forgotten() {
    let server = Server::start();
    let mut lives = server.node("lives", &quotas()[..1], BEGIN);
    lives.commands.set_clock(BEGIN);
    lives.join(BEGIN);
    let mut goes = node(&server, "goes");
    let command = goes.commands.leave();
    goes.call(&command);
    let cells = || server.ask::<i64>("HLEN test:{staging}:q");
    // Twice the month and a day: until then somebody may come back who has it.
    for day in 0..=61 {
        assert_eq!(cells(), 2, "{day}");
        for hours in [0, 2, 4] {
            lives.commands.set_clock(BEGIN.plus_ms(day * 86_400_000 + hours * 3_600_000));
            lives.beat();
        }
    }
    assert_eq!(cells(), 1);
    // Where there is no node at all the server does it, by its own clock.
    let left: i64 = server.ask("PTTL test:{staging}:q");
    let minutes_and_a_day = 2 * 60_000 + 86_400_000;
    assert!((1..=minutes_and_a_day).contains(&left), "{left} ms");
}

#[test]
fn who_goes_and_has_not_settled_everything_is_charged() {
    let server = Server::start();
    let (mut goes, mut stays) = (node(&server, "goes"), node(&server, "stays"));
    assert_eq!(reserve(&mut goes, "a", 100, 0).verdict, Verdict::Admitted);
    let command = goes.commands.leave();
    goes.call(&command);
    gives_others_up(&mut stays);
    assert_eq!(month(&mut stays, BEGIN.plus_ms(20_000)), (999_900, 0, 100));
}

#[test]
fn there_may_be_thousands_of_quotas() {
    let server = Server::start();
    let quota = |n: u64| {
        let per = Period { text: format!("{n}ms"), ms: 60_000 + n };
        let window = Window::Rolling { burst: 1_000 };
        Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit: 1_000, per, window }
    };
    let quotas: Vec<_> = (0..9_000).map(quota).collect();
    let mut node = server.node("one", &quotas, BEGIN);
    node.commands.set_clock(BEGIN);
    node.join(BEGIN);
    let levels = node.mirror(BEGIN).levels(BEGIN);
    assert!(levels.len() == 9_000 && levels.iter().all(|level| level.level == 1_000));
}

/// Of a large hash the server's scan goes over so many places at a time, and finds nothing where all that was there is gone.
#[test]
fn thousands_that_a_dead_node_held_are_all_charged() {
    let server = Server::start();
    let (mut dies, mut lives) = (node(&server, "dies"), node(&server, "lives"));
    let all: Vec<_> = (0..5_000).map(|n| held(&n.to_string(), 1, 0)).collect();
    for some in all.chunks(200) {
        hold(&mut dies, true, some);
    }
    for half_seconds in 1..=60 {
        month(&mut lives, BEGIN.plus_ms(half_seconds * 500));
    }
    let now = BEGIN.plus_ms(30_000);
    assert_eq!((month(&mut lives, now), lives.beat().values), ((995_000, 0, 5_000), vec![1, 0]));
}

/// What was on its way while the node was cut off comes when it is back, and before it has said what it holds.
#[test]
fn what_was_charged_and_ends_before_it_is_held_again_costs_what_was_spent() {
    let server = Server::start();
    let (mut cut_off, mut lives) = (node(&server, "cut-off"), node(&server, "lives"));
    for (id, tokens) in [("1", 100), ("2", 10)] {
        assert_eq!(reserve(&mut cut_off, id, tokens, 0).verdict, Verdict::Admitted);
    }
    let now = gives_others_up(&mut lives);
    assert_eq!(month(&mut lives, now), (999_890, 0, 110));
    assert!(join_again(&mut cut_off, now));
    let ends = |id: &str, tokens| Step::new(StepKind::Settle, id.into(), Amounts::of_request(tokens, 0));
    let steps = [ends("1", 30), ends("2", 500)];
    let command = cut_off.commands.apply(1, &steps, &[]);
    assert_eq!(cut_off.call(&command).verdict, Verdict::Done);
    hold(&mut cut_off, true, &[held("1", 100, 1), held("2", 10, 2)]);
    let command = cut_off.commands.release_unlisted(&[1, 2]);
    assert_eq!(cut_off.call(&command).values, [0]);
    assert_eq!((month(&mut lives, now), lives.beat().values), ((999_470, 0, 530), vec![2, 0]));
}

/// Nodes of which one has a month's quota, and the last that is there has not.
#[test]
fn a_node_that_has_fewer_quotas_does_not_shorten_how_long_those_of_others_are_kept() {
    let server = Server::start();
    drop(node(&server, "one").beat());
    let mut other = server.node("other", &quotas()[..1], BEGIN);
    other.commands.set_clock(BEGIN);
    other.join(BEGIN);
    other.beat();
    for key in ["q", "s"] {
        let left: i64 = server.ask(&format!("PTTL test:{{staging}}:{key}"));
        assert!(left > 60 * 86_400_000, "{key}: {left} ms");
    }
}

#[test]
fn where_many_nodes_die_at_once_what_they_held_is_charged_a_part_at_a_time() {
    let server = Server::start();
    let mut lives = node(&server, "lives");
    for n in 0..30 {
        let mut dies = node(&server, &format!("dies-{n}"));
        let all: Vec<_> = (0..100).map(|n| held(&n.to_string(), 1, 0)).collect();
        hold(&mut dies, true, &all);
    }
    let mut before = 0;
    for half_seconds in 1..=60 {
        let (_, _, used) = month(&mut lives, BEGIN.plus_ms(half_seconds * 500));
        assert!(used - before <= 400, "{} at once", used - before);
        before = used;
    }
    assert_eq!(lives.beat().values, [1, 0]);
    assert_eq!(before, 3_000);
}

#[test]
fn what_was_reset_after_it_was_charged_is_not_given_back_once_more() {
    let server = Server::start();
    let (mut cut_off, mut lives) = (node(&server, "cut-off"), node(&server, "lives"));
    assert_eq!(reserve(&mut cut_off, "1", 100, 0).verdict, Verdict::Admitted);
    let command = cut_off.commands.lease(&[50, 50]);
    cut_off.call(&command);
    let now = gives_others_up(&mut lives);
    let reset = lives.commands.reset();
    assert_eq!(lives.call(&reset).verdict, Verdict::Done);
    assert_eq!(reserve(&mut lives, "b", 400, 0).verdict, Verdict::Admitted);
    settle(&mut lives, 1, "b", 400);
    assert!(join_again(&mut cut_off, now));
    hold(&mut cut_off, true, &[held("1", 100, 0)]);
    let command = cut_off.commands.release_unlisted(&[1]);
    cut_off.call(&command);
    assert_eq!(month(&mut lives, now), (999_500, 100, 400));
    settle(&mut cut_off, 1, "1", 30);
    assert_eq!(month(&mut lives, now), (999_570, 0, 430));
    assert_eq!(lives.mirror(now).levels(now)[0].level, 570);
}

/// As by another server that takes over.
#[test]
fn who_dies_when_the_clock_is_stepped_back_is_charged_all_the_same() {
    let server = Server::start();
    let (mut dies, mut lives) = (node(&server, "dies"), node(&server, "lives"));
    assert_eq!(reserve(&mut dies, "a", 100, 0).verdict, Verdict::Admitted);
    lives.beat();
    for seconds in 1..=20 {
        month(&mut lives, Timestamp(BEGIN.0 - 7_200_000).plus_ms(seconds * 1_000));
    }
    let now = Timestamp(BEGIN.0 - 7_180_000);
    assert_eq!((month(&mut lives, now), lives.beat().values), ((999_900, 0, 100), vec![1, 0]));
}

/// Before it was noted whether anybody uses a cell, and how long a calendar's period is.
#[test]
fn cells_that_an_older_version_has_made_are_used_on() {
    let server = Server::start();
    let (mut one, mut other) = (server.node("one", &quotas()[..1], BEGIN), node(&server, "other"));
    one.commands.set_clock(BEGIN);
    for name in server.ask::<Vec<String>>("HKEYS test:{staging}:q") {
        let script = "local\tc=cmsgpack.unpack(redis.call('HGET',KEYS[1],ARGV[1]))\tc.seen,c.per=nil,not\tc.class\tand\tc.per\tor\tnil\treturn\tredis.call('HSET',KEYS[1],ARGV[1],cmsgpack.pack(c))";
        server.ask::<i64>(&format!("EVAL {script} 1 test:{{staging}}:q {name}"));
    }
    one.join(BEGIN);
    one.beat();
    assert_eq!(month(&mut other, BEGIN), (1_000_000, 0, 0));
}

/// A request that was admitted out of the lease is told of late: before the node has said what it holds.
#[test]
fn what_was_leased_goes_back_also_where_a_request_out_of_it_is_told_of_late() {
    let server = Server::start();
    let (mut cut_off, mut lives) = (node(&server, "cut-off"), node(&server, "lives"));
    let command = cut_off.commands.lease(&[100, 5_000]);
    cut_off.call(&command);
    let now = gives_others_up(&mut lives);
    assert!(join_again(&mut cut_off, now));
    let opens = cut_off.commands.leased_admission_step("1".into(), Amounts::of_request(10, 0), &[0, 1]);
    let command = cut_off.commands.apply(1, &[opens], &[]);
    cut_off.call(&command);
    let command = cut_off.commands.release_unlisted(&[1]);
    assert_eq!(cut_off.call(&command).values, [0]);
    assert_eq!(month(&mut lives, now), (999_990, 10, 0));
    settle(&mut cut_off, 2, "1", 4);
    assert_eq!((month(&mut lives, now), lives.beat().values), ((999_996, 0, 4), vec![2, 0]));
}

/// A node has an administrator's limit in its store that was taken back at another one while it was away.
#[test]
fn a_limit_that_was_taken_back_is_not_the_newest_configs() {
    let server = Server::start();
    let mut one = node(&server, "one");
    let quotas = vec![quotas()[0].with_limit(2_000, 2_000), quotas()[1].clone()];
    let mut other = server.node("other", &quotas, BEGIN);
    other.commands.set_clock(BEGIN);
    let mut states = full(&[quotas[0].with_limit(50, 50), quotas[1].clone()], BEGIN);
    states[0].1 = true;
    let command = other.commands.join(5, false, &states);
    assert_eq!(other.call(&command).verdict, Verdict::Done);
    let level = one.mirror(BEGIN).levels(BEGIN).swap_remove(0);
    assert_eq!((level.quota.limit, level.quota.capacity(), level.level), (2_000, 2_000, 2_000));
}

/// Requests in flight alone are counted, or nothing at all.
#[test]
fn an_environment_without_quotas_is_shared_too() {
    let server = Server::start();
    let mut one = server.node("one", &[], BEGIN);
    one.commands.set_clock(BEGIN);
    one.join(BEGIN);
    one.beat();
    let amounts = Amounts::of_request(1, 0);
    let on_shortage = OnShortage::Reject;
    let reserve =
        ReserveRequest { id: "a", max_in_flight: 1, on_shortage, generates: true, amounts, completions: 1 };
    let command = one.commands.reserve(&reserve, &[]);
    assert_eq!(one.call(&command).verdict, Verdict::Admitted);
    assert_eq!(one.beat().values, [1, 1]);
    assert_eq!(one.call(&command).verdict, Verdict::TooManyInFlight);
}

#[test]
fn those_who_are_dead_cost_the_living_nothing() {
    let server = Server::start();
    let mut lives = node(&server, "lives");
    for n in 0..300 {
        let mut dies = node(&server, &format!("dies-{n}"));
        assert_eq!(reserve(&mut dies, "a", 1, 0).verdict, Verdict::Admitted);
    }
    for half_seconds in 1..=40 {
        month(&mut lives, BEGIN.plus_ms(half_seconds * 500));
    }
    let now = BEGIN.plus_ms(20_000);
    assert_eq!((month(&mut lives, now), lives.beat().values), ((999_700, 0, 300), vec![1, 0]));
    let fields: i64 = server.ask("HLEN test:{staging}:s");
    assert!(fields < 12, "{fields}");
    // And still they may come back within a day.
    let next_day = BEGIN.plus_ms(86_000_000);
    let mut returns = server.node("dies-7", &quotas(), next_day);
    assert!(join_again(&mut returns, next_day));
    hold(&mut returns, true, &[held("a", 1, 0)]);
    assert_eq!(month(&mut lives, next_day), (999_700, 1, 299));
}
