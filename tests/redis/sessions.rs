//! Sessions of nodes that join, leave, die and rejoin. The tests call the script directly and step its clock by hand.

mod expiry;
mod leases;
mod limits;
mod rejoin;
mod retention;

use super::node::{Node, full_states};
use super::server::Server;
use tollgate::clock::Timestamp;
use tollgate::quota::{Amounts, ClockUnit, Kind, Period, Quota, Scope, Window};
use tollgate::redis::{
    HeldReservation, OnShortage, Piece, ReserveRequest, ScriptReply, SentSteps, Step, StepKind, Verdict,
};

const START: Timestamp = Timestamp(1_774_700_000_000);

/// The turn (period id) of the month that contains [`START`]: the start of that month.
const MONTH_TURN: u64 = 1_772_323_200_000;

/// 1,000 tokens a minute and 1,000,000 tokens a month. The long quota still shows held tokens after the short quota
/// has refilled.
fn quotas() -> Vec<Quota> {
    let month = Window::Calendar { unit: ClockUnit::Month, zone: jiff::tz::TimeZone::UTC };
    let quota = |limit, ms, window| {
        let per = Period { text: format!("{ms}ms"), ms };
        Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit, per, window }
    };
    vec![quota(1_000, 60_000, Window::Rolling { burst: 1_000 }), quota(1_000_000, 30 * 86_400_000, month)]
}

/// A node that has joined with both quotas and counts by the clock of the test.
fn node(server: &Server, session: &str) -> Node {
    let mut node = server.node(session, &quotas(), START);
    node.commands.set_clock(START);
    node.join(START);
    node
}

/// Reserves tokens in both quotas. `max_in_flight` 0: any number of requests.
fn reserve(node: &mut Node, id: &str, tokens: u64, max_in_flight: u64) -> ScriptReply {
    let amounts = Amounts::of_request(tokens, 0);
    let on_shortage = OnShortage::Reject;
    let reserve = ReserveRequest { id, max_in_flight, on_shortage, generates: true, amounts, completions: 1 };
    node.run(|commands| commands.reserve(&reserve, &[0, 1]))
}

/// Level, held and used of the monthly quota, at this time.
fn month_state(node: &mut Node, now: Timestamp) -> (i64, u64, u64) {
    node.commands.set_clock(now);
    let level = node.mirror(now).levels(now).pop().unwrap();
    (level.level, level.held, level.used)
}

/// Sends heartbeats of this node for twenty seconds, so that all other sessions expire. Returns the time at the end.
fn expire_other_sessions(node: &mut Node) -> Timestamp {
    for seconds in 1..=20 {
        month_state(node, START.plus_ms(seconds * 1_000));
    }
    START.plus_ms(20_000)
}

/// A reservation in both quotas, as its node lists it. `settled_by`: the number of the step that settles it, or 0.
fn held_reservation(id: &str, tokens: u64, settled_by: u64) -> HeldReservation {
    let piece = Piece {
        reserved: Amounts::of_request(tokens, 0),
        spent: Amounts::default(),
        cells: vec![(0, 0), (1, MONTH_TURN)],
    };
    HeldReservation { id: id.into(), settled_by, pieces: vec![piece] }
}

fn hold(node: &mut Node, is_new: bool, held: &[HeldReservation]) {
    assert_eq!(node.run(|commands| commands.hold(is_new, held)).verdict, Verdict::Done);
}

fn settle(node: &mut Node, number: u64, id: &str, tokens: u64) {
    let step = Step::new(StepKind::Settle, id.into(), Amounts::of_request(tokens, 0));
    assert_eq!(node.run(|commands| commands.apply(number, &[step], &[])).verdict, Verdict::Done);
}

/// Joins again. Returns whether the server remembered the session.
fn rejoin(node: &mut Node, now: Timestamp) -> bool {
    node.commands.set_clock(now);
    node.run(|commands| commands.join(1, Some(SentSteps::default()), &full_states(&quotas(), now), None))
        .values[2]
        == 1
}
