//! Limits, deadlines and counts that apply to all nodes.

use super::{START, full_states, held_reservation, month_state, node, quotas, reserve};
use crate::node::Node;
use crate::server::Server;
use tollgate::clock::Timestamp;
use tollgate::glob::Glob;
use tollgate::quota::{Amounts, ClockUnit, CounterState, Kind, Period, Quota, Scope, Window};
use tollgate::redis::{
    Cells, CommandBuilder, NewLimit, OnShortage, OverrideMark, ReserveRequest, SentSteps, Step, StepKind,
    Verdict,
};

#[test]
fn a_limit_and_a_reset_apply_to_every_node() {
    let server = Server::start();
    let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
    assert_eq!(
        one.run(|commands| commands.limit(
            OverrideMark::Endless,
            "",
            &[(0, NewLimit { limit: 50, burst: 20 })]
        ))
        .verdict,
        Verdict::Done
    );
    let answer = reserve(&mut other, "a", 30, 0);
    assert_eq!((answer.verdict, answer.states[0].1), (Verdict::Denied, OverrideMark::Endless));
    // A node that joins later does not undo the override.
    let mut third = node(&server, "third");
    let quota = third.mirror(START).levels(START).swap_remove(0).quota;
    assert_eq!((quota.limit, quota.capacity()), (50, 20));
    assert_eq!(reserve(&mut other, "a", 20, 0).verdict, Verdict::Admitted);
    assert_eq!(one.run(|commands| commands.reset(None)).verdict, Verdict::Done);
    assert_eq!(month_state(&mut other, START), (999_980, 20, 0), "held amounts stay held");
}

#[test]
fn the_limits_of_the_newest_config_apply() {
    let server = Server::start();
    let mut one = node(&server, "one");
    reserve(&mut one, "a", 100, 0);
    let limit = |node: &mut Node| {
        let level = node.mirror(START).levels(START).swap_remove(0);
        (level.quota.limit, level.quota.capacity(), level.level)
    };
    let with = |limit| vec![quotas()[0].with_limit(limit, limit), quotas()[1].clone()];
    for (session, stamp, given, want) in
        [("new", 5, 2_000, (2_000, 2_000, 1_900)), ("old", 4, 500, (2_000, 2_000, 1_900))]
    {
        let mut other = server.node(session, &with(given), START);
        other.commands.set_clock(START);
        let reply =
            other.run(|commands| commands.join(stamp, None, &full_states(&with(given), START), None)).values;
        assert_eq!((reply[0], reply[1], reply[3]), (0, 1, 0), "the reply counts the differing limit");
        assert_eq!(limit(&mut one), want);
    }
}

/// A node whose config has this limit in its first quota, from a file that was written at `stamp`.
struct Configured {
    node: Node,
    stamp: u64,
    first_joined: Option<Timestamp>,
}

impl Configured {
    /// The node joins for the first time.
    fn join(server: &Server, session: &str, limit: u64, stamp: u64, now: Timestamp) -> Self {
        let quotas = vec![quotas()[0].with_limit(limit, limit), quotas()[1].clone()];
        let mut joined = Self { node: server.node(session, &quotas, now), stamp, first_joined: None };
        joined.join_again(now);
        joined.first_joined = Some(now);
        joined
    }

    /// Joins. Returns how many of its limits differ from those of other nodes.
    fn join_again(&mut self, now: Timestamp) -> i64 {
        let states = full_states(&self.node.quotas, now);
        let sent = self
            .first_joined
            .map(|at| SentSteps { first_joined: at.0.cast_unsigned(), ..SentSteps::default() });
        self.node.commands.set_clock(now);
        let stamp = self.stamp;
        let reply = self.node.run(|commands| commands.join(stamp, sent, &states, None));
        assert_eq!(reply.verdict, Verdict::Done);
        reply.values[1]
    }

    /// A heartbeat. Returns the limit in force, and whether the node must join again so that its own limit applies.
    fn beat(&mut self, now: Timestamp) -> (u64, bool) {
        self.node.commands.set_clock(now);
        let reply = self.node.run(CommandBuilder::heartbeat);
        let CounterState::Rolling { limit, .. } = reply.states[0].0 else { panic!("{reply:?}") };
        (limit, reply.values[5] == 1)
    }

    fn leave(mut self) {
        self.node.run(CommandBuilder::leave);
    }
}

#[test]
fn a_node_that_starts_alone_sets_its_limits_even_if_its_file_is_older() {
    let server = Server::start();
    Configured::join(&server, "new file", 2_000, 5, START).leave();
    let mut other = Configured::join(&server, "old file", 500, 4, START.plus_ms(10));
    assert_eq!(other.beat(START.plus_ms(20)), (500, false));
    other.leave();
    // An environment variable has changed.
    let mut last = Configured::join(&server, "same file", 700, 4, START.plus_ms(30));
    assert_eq!(last.beat(START.plus_ms(40)), (700, false));
    assert_eq!(last.join_again(START.plus_ms(50)), 0, "no other node has other limits");
}

#[test]
fn a_changed_limit_of_a_node_that_is_alone_is_no_difference_between_nodes() {
    let server = Server::start();
    Configured::join(&server, "before", 2_000, 5, START).leave();
    let mut alone = Configured::join(&server, "alone", 500, 6, START);
    alone.stamp = 7;
    alone.node.quotas[0] = alone.node.quotas[0].with_limit(600, 600);
    alone.node.commands.set_cells(Cells::new(&alone.node.quotas, START));
    assert_eq!(alone.join_again(START), 0);
    assert_eq!(alone.beat(START), (600, false));
    // The other node has the limits of before.
    let mut other = Configured::join(&server, "other", 500, 6, START);
    assert_eq!((other.join_again(START), other.beat(START)), (1, (600, false)));
}

#[test]
fn the_limits_of_an_older_file_apply_when_the_last_node_with_the_newer_one_has_gone() {
    for leaves in [true, false] {
        let server = Server::start();
        let newer = Configured::join(&server, "newer", 2_000, 5, START);
        let mut older = Configured::join(&server, "older", 500, 4, START.plus_ms(10));
        let mut oldest = Configured::join(&server, "oldest", 300, 3, START.plus_ms(20));
        let mut now = START.plus_ms(500);
        assert_eq!((older.beat(now), oldest.beat(now)), ((2_000, false), (2_000, false)));
        if leaves {
            newer.leave();
        } else {
            for _ in 0..30 {
                now = now.plus_ms(500);
                oldest.beat(now);
                older.beat(now);
            }
        }
        now = now.plus_ms(500);
        assert_eq!((oldest.beat(now), older.beat(now)), ((2_000, false), (2_000, true)));
        older.join_again(now);
        assert_eq!((oldest.beat(now), older.beat(now)), ((500, false), (500, false)), "leaves: {leaves}");
        // The newest limits apply again at once.
        let mut newer = Configured::join(&server, "newer again", 2_000, 5, now);
        assert_eq!((newer.beat(now), older.beat(now)), ((2_000, false), (2_000, false)));
    }
}

#[test]
fn among_equally_old_files_the_limits_of_the_node_that_started_last_apply() {
    let server = Server::start();
    let mut first = Configured::join(&server, "first", 1_000, 5, START);
    let mut last = Configured::join(&server, "last", 3_000, 5, START.plus_ms(10));
    let later = START.plus_ms(500);
    assert_eq!((first.beat(later), last.beat(later)), ((3_000, false), (3_000, false)));
    // A node that lost its connection comes back.
    assert_eq!(first.join_again(later), 1);
    assert_eq!((first.beat(later), last.beat(later)), ((3_000, false), (3_000, false)));
    // Its session may have ended meanwhile.
    let later = START.plus_ms(20_500);
    for ms in (1_000..=20_500).step_by(500) {
        last.beat(START.plus_ms(ms));
    }
    first.join_again(later);
    assert_eq!((first.beat(later), last.beat(later)), ((3_000, false), (3_000, false)));
}

/// The first node that rejoins creates the cells from its states, which have the limits in force. Its own are older.
#[test]
fn an_emptied_server_gets_the_limits_that_were_in_force() {
    let server = Server::start();
    let mut older = Configured::join(&server, "older", 500, 4, START);
    let mut newer = Configured::join(&server, "newer", 2_000, 5, START);
    older.node.flush_server();
    let now = START.plus_ms(1_000);
    let sent = Some(SentSteps { first_joined: START.0.cast_unsigned(), ..SentSteps::default() });
    let states = full_states(&newer.node.quotas, now);
    older.node.commands.set_clock(now);
    assert_eq!(older.node.run(|commands| commands.join(4, sent, &states, None)).values[..2], [2, 0]);
    newer.join_again(now);
    assert_eq!((older.beat(now), newer.beat(now)), ((2_000, false), (2_000, false)));
    // Without the other node its own limits apply.
    newer.node.flush_server();
    older.node.run(|commands| commands.join(4, sent, &states, None));
    assert_eq!(older.beat(now), (2_000, true));
    older.join_again(now);
    assert_eq!(older.beat(now), (500, false));
}

#[test]
fn a_node_that_rejoins_first_after_an_outage_does_not_replace_newer_limits() {
    let server = Server::start();
    let mut newer = Configured::join(&server, "newer", 2_000, 5, START);
    let mut older = Configured::join(&server, "older", 500, 4, START);
    assert_eq!((newer.beat(START), older.beat(START)), ((2_000, false), (2_000, false)));
    let now = START.plus_ms(300_000);
    older.join_again(now);
    assert_eq!(older.beat(now), (2_000, false));
    newer.join_again(now);
    assert_eq!((older.beat(now), newer.beat(now)), ((2_000, false), (2_000, false)));
}

#[test]
fn an_override_is_no_difference_between_the_limits_of_nodes() {
    let server = Server::start();
    let mut one = Configured::join(&server, "one", 1_000, 1, START);
    let until = OverrideMark::Until(START.plus_ms(20_000));
    one.node.run(|commands| commands.limit(until, "", &[(0, NewLimit { limit: 50, burst: 20 })]));
    let mut other = Configured::join(&server, "other", 1_000, 1, START);
    assert_eq!((other.join_again(START), one.join_again(START)), (0, 0));
    assert_eq!(other.beat(START), (50, false));
    // The override has ended. A node that was stopped meanwhile has it in its store.
    assert_eq!(one.beat(START.plus_ms(20_000)), (1_000, false));
    let mut states = full_states(&[quotas()[0].with_limit(50, 20), quotas()[1].clone()], START);
    states[0].1 = OverrideMark::Endless;
    assert_eq!(other.node.run(|commands| commands.join(0, None, &states, None)).values[1], 0);
}

/// A node restores an override from its store that an administrator revoked on another node in the meantime.
#[test]
fn a_revoked_override_does_not_replace_the_limits_of_the_newest_config() {
    let server = Server::start();
    let mut one = node(&server, "one");
    let quotas = vec![quotas()[0].with_limit(2_000, 2_000), quotas()[1].clone()];
    let mut other = server.node("other", &quotas, START);
    other.commands.set_clock(START);
    let mut states = full_states(&[quotas[0].with_limit(50, 50), quotas[1].clone()], START);
    states[0].1 = OverrideMark::Endless;
    assert_eq!(other.run(|commands| commands.join(5, None, &states, None)).verdict, Verdict::Done);
    let level = one.mirror(START).levels(START).swap_remove(0);
    assert_eq!((level.quota.limit, level.quota.capacity(), level.level), (2_000, 2_000, 2_000));
}

#[test]
fn requests_in_flight_are_counted_over_all_nodes() {
    let server = Server::start();
    let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
    assert_eq!(reserve(&mut one, "a", 1, 2).verdict, Verdict::Admitted);
    assert_eq!(reserve(&mut other, "b", 1, 2).verdict, Verdict::Admitted);
    assert_eq!(reserve(&mut one, "c", 1, 2).verdict, Verdict::TooManyInFlight);
    let settlement = Step::new(StepKind::Settle, "b".into(), Amounts::of_request(1, 0));
    other.run(|commands| commands.apply(1, &[settlement], &[]));
    assert_eq!(reserve(&mut one, "c", 1, 2).verdict, Verdict::Admitted);
    assert_eq!(month_state(&mut one, START), (999_997, 2, 1));
}

#[test]
fn an_environment_without_quotas_counts_requests_in_flight() {
    let server = Server::start();
    let mut one = server.node("one", &[], START);
    one.commands.set_clock(START);
    one.join(START);
    one.heartbeat();
    let amounts = Amounts::of_request(1, 0);
    let on_shortage = OnShortage::Reject;
    let reserve =
        ReserveRequest { id: "a", max_in_flight: 1, on_shortage, generates: true, amounts, completions: 1 };
    let command = one.commands.reserve(&reserve, &[]);
    assert_eq!(one.call(&command).verdict, Verdict::Admitted);
    assert_eq!(one.heartbeat().values, [1, 1]);
    assert_eq!(one.call(&command).verdict, Verdict::TooManyInFlight);
}

#[test]
fn a_command_after_its_deadline_changes_nothing() {
    let server = Server::start();
    let mut node = node(&server, "one");
    node.commands.set_max_delay_ms(25);
    let limit = [(0, NewLimit { limit: 50, burst: 20 })];
    for (delay_ms, is_late) in [(26, true), (25, false)] {
        node.commands.set_clock(START.plus_ms(delay_ms));
        // The time of sending.
        node.commands.set_redis_time(START);
        let verdict = |on_time| if is_late { Verdict::DeadlinePassed } else { on_time };
        assert_eq!(node.run(|commands| commands.lease(&[10, 10])).verdict, verdict(Verdict::Done));
        assert_eq!(reserve(&mut node, "a", 100, 0).verdict, verdict(Verdict::Admitted));
        node.commands.set_redis_time(START);
        for command in [
            node.commands.reset(None),
            node.commands.hold(true, &[held_reservation("b", 50, 0)]),
            node.commands.limit(OverrideMark::Endless, "", &limit),
            node.commands.release_unlisted(&[]),
            node.commands.join(2, Some(SentSteps::default()), &full_states(&quotas(), START), None),
        ] {
            assert_eq!(node.call(&command).verdict, verdict(Verdict::Done), "{command:?}");
        }
        let all_applied = (999_850, 0, 150);
        assert_eq!(
            month_state(&mut node, START.plus_ms(delay_ms)),
            if is_late { (1_000_000, 0, 0) } else { all_applied }
        );
    }
}

#[test]
fn stale_calendar_bounds_are_rejected_with_the_servers_time() {
    let server = Server::start();
    let mut node = node(&server, "one");
    let next_month = START.plus_ms(10 * 86_400_000);
    node.commands.set_clock(next_month);
    node.commands.set_redis_time(START);
    let answer = reserve(&mut node, "a", 1, 0);
    assert_eq!((answer.verdict, answer.now), (Verdict::StalePeriod, next_month));
    node.commands.set_redis_time(answer.now);
    assert_eq!(reserve(&mut node, "a", 1, 0).verdict, Verdict::Admitted);
}

#[test]
fn one_call_handles_thousands_of_quotas() {
    let server = Server::start();
    let quota = |n: u64| {
        let per = Period { text: format!("{n}ms"), ms: 60_000 + n };
        let window = Window::Rolling { burst: 1_000 };
        Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit: 1_000, per, window }
    };
    let quotas: Vec<_> = (0..9_000).map(quota).collect();
    let mut node = server.node("one", &quotas, START);
    node.commands.set_clock(START);
    node.join(START);
    let levels = node.mirror(START).levels(START);
    assert!(levels.len() == 9_000 && levels.iter().all(|level| level.level == 1_000));
}

/// A quota of total tokens.
fn total(scope: Scope, limit: u64, ms: u64, is_calendar: bool) -> Quota {
    let per = Period { text: format!("{ms}ms"), ms };
    let window = if is_calendar {
        Window::Calendar { unit: ClockUnit::of_length(ms).unwrap(), zone: jiff::tz::TimeZone::UTC }
    } else {
        Window::Rolling { burst: limit }
    };
    Quota { scope, kind: Kind::TotalTokens, limit, per, window }
}

/// A node that has joined with these quotas, from a config that was written at `stamp`.
fn node_with(server: &Server, session: &str, quotas: &[Quota], stamp: u64) -> Node {
    let mut node = server.node(session, quotas, START);
    node.commands.set_clock(START);
    let states = full_states(quotas, START);
    assert_eq!(node.run(|commands| commands.join(stamp, None, &states, None)).verdict, Verdict::Done);
    node
}

fn used(node: &mut Node) -> Vec<u64> {
    node.mirror(START).levels(START).iter().map(|level| level.used).collect()
}

#[test]
fn a_quota_with_another_period_or_window_continues_with_the_used_amount() {
    const MINUTE: u64 = 60_000;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    let all = || Scope::Environment;
    for (changed, expected) in [
        (vec![total(all(), 900, HOUR, false), total(all(), 900_000, 7 * DAY, true)], vec![100, 100]),
        (vec![total(all(), 60, HOUR, false), total(all(), 70, 7 * DAY, true)], vec![60, 70]),
        (vec![total(all(), 900, DAY, true)], vec![100]),
        (vec![total(all(), 1_000_000, 30 * DAY, true), total(all(), 50, HOUR, false)], vec![100, 50]),
        (vec![total(all(), 1_000, MINUTE, false), total(all(), 900, DAY, false)], vec![100, 100]),
        // The same quotas, with lower limits.
        (vec![total(all(), 40, MINUTE, false), total(all(), 30, 30 * DAY, true)], vec![40, 30]),
        // Other owners.
        (vec![total(Scope::Caller("a".into()), 900, HOUR, false)], vec![0]),
        (vec![total(Scope::Model(Glob::new("a")), 900, HOUR, false)], vec![0]),
    ] {
        let server = Server::start();
        let mut one = node(&server, "one");
        assert_eq!(reserve(&mut one, "a", 100, 0).verdict, Verdict::Admitted);
        let settlement = Step::new(StepKind::Settle, "a".into(), Amounts::of_request(100, 0));
        one.run(|commands| commands.apply(1, &[settlement], &[]));
        let mut other = node_with(&server, "other", &changed, 9);
        assert_eq!(used(&mut other), expected, "{changed:?}");
        // The first node still counts with its quotas.
        assert!(used(&mut one)[0] <= 100);
    }
}

#[test]
fn each_caller_continues_its_own_quota() {
    let server = Server::start();
    let of = |name: &str, ms| total(Scope::Caller(name.into()), 900, ms, false);
    let callers = ["a", "b", "a/caller/b"];
    let mut one = node_with(&server, "one", &callers.map(|name| of(name, 60_000)), 1);
    for (index, name) in (0..).zip(callers) {
        let amounts = Amounts::of_request(100 * (u64::from(index) + 1), 0);
        let on_shortage = OnShortage::Reject;
        let request = ReserveRequest {
            id: name,
            max_in_flight: 0,
            on_shortage,
            generates: true,
            amounts,
            completions: 1,
        };
        assert_eq!(one.run(|commands| commands.reserve(&request, &[index])).verdict, Verdict::Admitted);
    }
    let mut other = node_with(&server, "other", &callers.map(|name| of(name, 3_600_000)), 2);
    assert_eq!(used(&mut other), [100, 200, 300], "what is held counts as used");
}
