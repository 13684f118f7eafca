//! Leases: tokens that a node holds in advance and admits requests from.

use super::{START, expire_other_sessions, month_state, node, rejoin, settle};
use crate::node::Node;
use crate::server::Server;
use tollgate::clock::Timestamp;
use tollgate::quota::Amounts;
use tollgate::redis::{Step, StepKind};

#[test]
fn a_lease_is_held_until_it_is_used_returned_or_its_node_dies() {
    let server = Server::start();
    let (mut one, mut other) = (node(&server, "one"), node(&server, "other"));
    let levels = |node: &mut Node, now: Timestamp| {
        node.commands.set_clock(now);
        let levels = node.mirror(now).levels(now);
        levels.into_iter().map(|level| (level.level, level.held, level.used)).collect::<Vec<_>>()
    };
    let lease = |node: &mut Node, wanted: &[u64]| node.run(|commands| commands.lease(wanted)).values;
    assert_eq!(lease(&mut one, &[100, 5_000]), [100, 5_000]);
    assert_eq!(
        lease(&mut one, &[100, 5_000]),
        [0, 0],
        "the requested amount includes what is leased already"
    );
    assert_eq!(levels(&mut other, START), [(900, 100, 0), (995_000, 5_000, 0)]);
    // Two requests from the lease. The second exceeds the rest of the lease by 20, which is taken from the cell.
    let admission = |node: &Node, id: &str, tokens| {
        node.commands.leased_admission_step(id.into(), Amounts::of_request(tokens, 0), &[0, 1])
    };
    let steps = [admission(&one, "a", 80), admission(&one, "b", 40)];
    one.run(|commands| commands.apply(1, &steps, &[]));
    assert_eq!(levels(&mut other, START), [(880, 120, 0), (995_000, 5_000, 0)]);
    assert_eq!(one.heartbeat().values, [2, 2], "a lease does not count as a request");
    let settlement =
        |id: &str, tokens| Step::new(StepKind::Settle, id.into(), Amounts::of_request(tokens, 0));
    let steps = [settlement("a", 30), settlement("b", 50), admission(&one, "c", 10), settlement("lease", 0)];
    one.run(|commands| commands.apply(3, &steps, &[]));
    assert_eq!(levels(&mut other, START), [(910, 10, 80), (999_910, 10, 80)]);
    // The last tenth is never leased. The lease of a dead node is charged like its reservations.
    assert_eq!(lease(&mut other, &[900, 999_000]), [810, 899_910]);
    for seconds in 1..=20 {
        levels(&mut one, START.plus_ms(seconds * 1_000));
    }
    let now = START.plus_ms(20_000);
    assert_eq!(levels(&mut one, now)[1], (100_000, 10, 899_990));
    assert_eq!(one.heartbeat().values, [1, 1]);
}

#[test]
fn a_charged_lease_is_returned_when_its_node_rejoins() {
    let server = Server::start();
    let (mut cut_off, mut survivor) = (node(&server, "cut-off"), node(&server, "survivor"));
    cut_off.run(|commands| commands.lease(&[100, 5_000]));
    let now = expire_other_sessions(&mut survivor);
    assert_eq!(month_state(&mut survivor, now), (995_000, 0, 5_000), "charged in full");
    assert!(rejoin(&mut cut_off, now));
    assert_eq!(cut_off.run(|commands| commands.release_unlisted(&[])).values, [0]);
    assert_eq!(month_state(&mut survivor, now), (1_000_000, 0, 0));
}

/// The step for a request from the lease arrives after the rejoin, before the node lists its reservations.
#[test]
fn a_lease_is_returned_even_if_a_request_admitted_from_it_is_reported_late() {
    let server = Server::start();
    let (mut cut_off, mut survivor) = (node(&server, "cut-off"), node(&server, "survivor"));
    cut_off.run(|commands| commands.lease(&[100, 5_000]));
    let now = expire_other_sessions(&mut survivor);
    assert!(rejoin(&mut cut_off, now));
    let late_admission =
        cut_off.commands.leased_admission_step("1".into(), Amounts::of_request(10, 0), &[0, 1]);
    cut_off.run(|commands| commands.apply(1, &[late_admission], &[]));
    assert_eq!(cut_off.run(|commands| commands.release_unlisted(&[1])).values, [0]);
    assert_eq!(month_state(&mut survivor, now), (999_990, 10, 0));
    settle(&mut cut_off, 2, "1", 4);
    assert_eq!((month_state(&mut survivor, now), survivor.heartbeat().values), ((999_996, 0, 4), vec![2, 0]));
}
