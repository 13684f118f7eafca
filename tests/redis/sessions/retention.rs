//! The time for which the server retains cells and keys.

use super::{START, month_state, node, quotas};
use crate::server::Server;
use tollgate::redis::CommandBuilder;

#[test]
fn unused_cells_are_removed_after_two_periods_and_a_day() {
    let server = Server::start();
    let mut survivor = server.node("survivor", &quotas()[..1], START);
    survivor.commands.set_clock(START);
    survivor.join(START);
    let mut leaver = node(&server, "leaver");
    leaver.run(CommandBuilder::leave);
    let cells = || server.query::<i64>("HLEN test:{staging}:q");
    // Two months and a day: before that, a node with the quota may rejoin.
    for day in 0..=61 {
        assert_eq!(cells(), 2, "{day}");
        for hours in [0, 2, 4] {
            survivor.commands.set_clock(START.plus_ms(day * 86_400_000 + hours * 3_600_000));
            survivor.heartbeat();
        }
    }
    assert_eq!(cells(), 1);
    // If no node is alive, Redis expires the key by its own clock.
    let left: i64 = server.query("PTTL test:{staging}:q");
    let minutes_and_a_day = 2 * 60_000 + 86_400_000;
    assert!((1..=minutes_and_a_day).contains(&left), "{left} ms");
}

/// One node has a quota of a month. The last node alive does not have it.
#[test]
fn a_node_with_fewer_quotas_does_not_shorten_the_expiry_of_the_keys() {
    let server = Server::start();
    drop(node(&server, "one").heartbeat());
    let mut other = server.node("other", &quotas()[..1], START);
    other.commands.set_clock(START);
    other.join(START);
    other.heartbeat();
    for key in ["q", "s"] {
        let left: i64 = server.query(&format!("PTTL test:{{staging}}:{key}"));
        assert!(left > 60 * 86_400_000, "{key}: {left} ms");
    }
}

/// Older versions recorded neither the last use of a cell nor the length of a calendar period.
#[test]
fn cells_of_an_older_version_are_usable() {
    let server = Server::start();
    let (mut one, mut other) = (server.node("one", &quotas()[..1], START), node(&server, "other"));
    one.commands.set_clock(START);
    for name in server.query::<Vec<String>>("HKEYS test:{staging}:q") {
        let script = "local\tc=cmsgpack.unpack(redis.call('HGET',KEYS[1],ARGV[1]))\tc.seen,c.per=nil,not\tc.class\tand\tc.per\tor\tnil\treturn\tredis.call('HSET',KEYS[1],ARGV[1],cmsgpack.pack(c))";
        server.query::<i64>(&format!("EVAL {script} 1 test:{{staging}}:q {name}"));
    }
    one.join(START);
    one.heartbeat();
    assert_eq!(month_state(&mut other, START), (1_000_000, 0, 0));
}
