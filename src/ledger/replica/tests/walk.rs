//! A random walk of three nodes against the script in a real Redis, on the test's clock. Calls are lost, arrive late,
//! or are executed without a reply, nodes are cut off until Redis has ended their sessions, and replicas that lack the
//! last writes become masters. At the end Redis has charged exactly the spent amounts, and holds nothing.

use super::super::*;
use super::subject;
use crate::clock::Stopwatch;
use crate::config::OnStoreFailure;
use crate::ledger::replica::admission::ReserveOutcome;
use crate::ledger::{Demand, Grant, Settlement};
use crate::quota::{Amounts, Quota};
use crate::quota::{ClockUnit, Kind, Period, Scope, Window};
use crate::redis::{SCRIPT, Verdict};
use crate::redis::{ScriptCommand, ScriptReply};
use std::collections::VecDeque;
use std::process::{Child, Command as Process, Stdio};
use std::time::Duration;

const BEGIN: i64 = 1_775_100_000_000;
/// The capacity of a quota that hardly refills.
const BURST: i64 = 3_000_000;
/// Faults happen only during the first steps. Then all nodes recover, and finally they leave.
const FAULTY_STEPS: u64 = 1_500;
const RECOVERY_STEPS: u64 = 500;
/// From this step on the server has a replica. All nodes have joined before it.
const REPLICATED_FROM: u64 = 50;
const LEAVING_STEPS: u64 = 200;
const HEARTBEAT_MS: i64 = 500;
/// A node that has lost Redis joins again after this time. Redis ignores calls that arrive later.
const MAX_CALL_DELAY_MS: u64 = 400;

/// SplitMix64: the walk is the same on every machine.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn ms(&mut self, end: u64) -> i64 {
        self.below(end).cast_signed()
    }

    fn is_one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }
}

/// A Redis server on its own Unix socket. It stops when its standard input closes.
struct Server(Child, tempfile::TempDir);

impl Server {
    fn start() -> (Self, redis::Connection) {
        let folder = tempfile::tempdir().unwrap();
        let script = "redis-server --port 0 --save '' --dir \"$1\" --unixsocket \"$1/s\" >/dev/null & read -r _; kill -9 $!; wait";
        let mut server = Process::new("sh");
        server.args(["-c", script, "sh"]).arg(folder.path()).stdin(Stdio::piped());
        let server = Self(server.spawn().unwrap(), folder);
        let client = redis::Client::open(format!("redis+unix://{}/s", server.1.path().display())).unwrap();
        let begun = Stopwatch::start();
        loop {
            if let Ok(connection) = client.get_connection() {
                return (server, connection);
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "is the package redis-server installed?");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        drop(self.0.wait());
    }
}

/// What all nodes share: Redis, the clock, and the faults.
struct World {
    redis: redis::Connection,
    dice: Dice,
    now: Timestamp,
    /// Whether calls can fail.
    is_faulty: bool,
    /// What a replica of the server has received: all keys with their times to live.
    replicated: Vec<(Vec<u8>, u64, Vec<u8>)>,
    spent: i64,
    counts: Counts,
}

/// Counts of events. The test checks that each kind occurred.
#[derive(Debug, Default)]
struct Counts {
    late: u64,
    lost: u64,
    unanswered: u64,
    leased: u64,
    by_redis: u64,
    offline: u64,
    failovers: u64,
    repeated: u64,
}

impl World {
    fn run(&mut self, keys: &[String; 3], arguments: &[String]) -> Vec<i64> {
        let mut call = redis::cmd("EVAL");
        // The script uses the test's clock instead of Redis's clock.
        let now = self.now.0.to_string();
        call.arg(SCRIPT).arg(3).arg(&keys[..]).arg(&arguments[0]).arg(now).arg(&arguments[2..]);
        call.query(&mut self.redis).unwrap()
    }

    /// Brings the replica up to date.
    fn replicate(&mut self) {
        let keys: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query(&mut self.redis).unwrap();
        let dump = |key: Vec<u8>, redis: &mut redis::Connection| {
            let ttl: i64 = redis::cmd("PTTL").arg(&key).query(redis).unwrap();
            let value = redis::cmd("DUMP").arg(&key).query(redis).unwrap();
            (key, u64::try_from(ttl).unwrap_or(0), value)
        };
        self.replicated = keys.into_iter().map(|key| dump(key, &mut self.redis)).collect();
    }

    /// The replica becomes the master. It lacks the last writes.
    fn fail_over(&mut self) {
        let (): () = redis::cmd("FLUSHALL").query(&mut self.redis).unwrap();
        for (key, ttl, value) in &self.replicated {
            let (): () = redis::cmd("RESTORE").arg(key).arg(ttl).arg(value).query(&mut self.redis).unwrap();
        }
        self.counts.failovers += 1;
    }

    /// Used and held amounts of each cell, and the number of requests in flight, as Redis has them.
    fn counted(&mut self) -> (Vec<(i64, i64)>, i64) {
        let script = "local all = {} for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do \
             local cell = cmsgpack.unpack(redis.call('HGET', KEYS[1], name)) \
             all[#all + 1] = cell.used or tonumber(ARGV[1]) - cell.held - cell.whole \
             all[#all + 1] = cell.held end \
             all[#all + 1] = tonumber(redis.call('HGET', KEYS[2], 'in_flight') or 0) return all";
        let mut call = redis::cmd("EVAL");
        call.arg(script).arg(2).arg("t:{e}:q").arg("t:{e}:s").arg(BURST);
        let mut all: Vec<i64> = call.query(&mut self.redis).unwrap();
        let in_flight = all.pop().unwrap();
        (all.chunks_exact(2).map(|cell| (cell[0], cell[1])).collect(), in_flight)
    }
}

/// The next step of a node that joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Offline { until: Timestamp },
    Join,
    Hold,
    ReleaseUnlisted,
    HoldOffline,
    Online,
}

struct Node {
    replica: Replica,
    /// Whether `on_failure` changes at random moments.
    changes_policy: bool,
    keys: [String; 3],
    phase: Phase,
    is_cut_off: bool,
    next_heartbeat: Timestamp,
    /// Requests in flight, each with the completion tokens of its answer so far.
    open: Vec<(Box<Grant>, u64)>,
    /// Delayed calls, with the time of their arrival.
    late: VecDeque<(Timestamp, Vec<String>)>,
}

impl Node {
    /// `policy`: `None` changes at random moments.
    fn start(n: usize, policy: Option<OnStoreFailure>, leases: bool, now: Timestamp) -> Self {
        let (changes_policy, on_failure) = (policy.is_none(), policy.unwrap_or(OnStoreFailure::Local));
        let quota = |limit, ms, window| {
            let per = Period { text: format!("{ms}ms"), ms };
            Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit, per, window }
        };
        let month = Window::Calendar { unit: ClockUnit::Month, zone: jiff::tz::TimeZone::UTC };
        let quotas = [
            quota(1, 366 * 86_400_000, Window::Rolling { burst: BURST.cast_unsigned() }),
            quota(1_000_000_000, 30 * 86_400_000, month),
        ];
        let config = ReplicaConfig { on_failure, stamp: 1, max_call_delay_ms: MAX_CALL_DELAY_MS, leases };
        let replica = Replica::new(super::local(&quotas, now), config, &format!("node-{n}"), now);
        let keys = replica.keys("t", None, "e");
        let phase = Phase::Offline { until: now };
        let (open, late) = (Vec::new(), VecDeque::new());
        Self { replica, changes_policy, keys, phase, is_cut_off: false, next_heartbeat: now, open, late }
    }

    /// `None`: the call is lost or delayed, or its reply is lost.
    fn call(&mut self, world: &mut World, command: &ScriptCommand) -> Option<ScriptReply> {
        let fate = if self.is_cut_off { world.dice.below(2) } else { world.dice.below(60) };
        if world.is_faulty && fate < 3 {
            match fate {
                0 => {
                    let at = world.now.plus_ms(world.dice.below(3_000));
                    self.late.push_back((at, command.arguments.clone()));
                    world.counts.late += 1;
                }
                1 => world.counts.lost += 1,
                _ => {
                    self.run_late_calls(world, true);
                    world.run(&self.keys, &command.arguments);
                    world.counts.unanswered += 1;
                }
            }
            return None;
        }
        let numbers = world.run(&self.keys, &command.arguments);
        Some(command.parse_reply(&numbers).unwrap())
    }

    /// Executes delayed calls in the order in which they were sent, because they share one connection.
    fn run_late_calls(&mut self, world: &mut World, all: bool) {
        while let Some((_, arguments)) = self.late.pop_front_if(|(at, _)| all || *at <= world.now) {
            world.run(&self.keys, &arguments);
        }
    }

    /// The server dies. Delayed calls never arrive.
    fn lose_server(&mut self, world: &World) {
        self.late.clear();
        self.lose_redis(world);
    }

    fn lose_redis(&mut self, world: &World) {
        self.replica.go_offline(world.now);
        self.phase = Phase::Offline { until: world.now.plus_ms(MAX_CALL_DELAY_MS) };
    }

    fn request(&mut self, world: &mut World) {
        let cap = Some(1 + world.dice.below(500));
        let demand = Demand {
            subject: subject(),
            prompt: 10,
            generates: true,
            cap,
            completions: 1,
            backends: &[],
            may_clamp: true,
        };
        if let Some(admission) = self.replica.admit_leased(world.now, &demand) {
            world.counts.leased += 1;
            return self.open.push((admission.grant, 0));
        }
        if let Some(call) = self.replica.reserve_call(world.now, &demand) {
            let answer = self.call(world, &call.command);
            let outcome = answer.map(|answer| self.replica.on_reserve(world.now, &demand, &call, &answer));
            match outcome {
                None => {
                    self.replica.cancel(call.id);
                    self.lose_redis(world);
                }
                Some(ReserveOutcome::Decided(decided)) => {
                    world.counts.by_redis += 1;
                    return self.open.extend(decided.ok().map(|admission| (admission.grant, 0)));
                }
                Some(ReserveOutcome::Retry) => return,
                Some(ReserveOutcome::UnknownSession) => self.lose_redis(world),
            }
        }
        if let Ok(admission) = self.replica.admit_offline(world.now, &demand) {
            world.counts.offline += 1;
            self.open.push((admission.grant, 0));
        }
    }

    fn pick(&self, world: &mut World) -> Option<usize> {
        let count = self.open.len() as u64;
        (count > 0).then(|| usize::try_from(world.dice.below(count)).unwrap())
    }

    fn progress(&mut self, world: &mut World) {
        let Some(at) = self.pick(world) else { return };
        let (grant, completion) = &mut self.open[at];
        *completion += if world.dice.is_one_in(7) { world.dice.below(600) } else { world.dice.below(60) };
        self.replica.progress(world.now, "m", grant, Amounts::of_request(10, *completion));
    }

    fn settle(&mut self, world: &mut World) {
        let Some(at) = self.pick(world) else { return };
        let (grant, completion) = self.open.swap_remove(at);
        let spent = match world.dice.below(8) {
            0 => Amounts::default(),
            1 => Amounts::of_request(10, completion / 2),
            _ => Amounts::of_request(10, completion + world.dice.below(50)),
        };
        world.spent += spent.total.cast_signed();
        self.replica.settle(world.now, subject(), grant, Settlement { spent, is_complete: true });
    }

    fn flush(&mut self, world: &mut World) -> Option<()> {
        let end = self.replica.next_step();
        while let Some(batch) = self.replica.next_batch(world.now, end) {
            let answer = self.call(world, &batch.command)?;
            if !self.replica.on_batch(world.now, &batch, &answer) {
                assert_eq!(answer.verdict, Verdict::UnknownSession);
                return None;
            }
        }
        Some(())
    }

    fn lease(&mut self, world: &mut World) -> Option<()> {
        let Some(command) = self.replica.lease_command(world.now) else { return Some(()) };
        let answer = self.call(world, &command)?;
        self.replica.on_lease(world.now, &answer).then_some(())
    }

    fn heartbeat(&mut self, world: &mut World) -> Option<()> {
        let command = self.replica.heartbeat_command(world.now);
        let answer = self.call(world, &command)?;
        self.next_heartbeat = world.now.plus_ms(HEARTBEAT_MS.cast_unsigned());
        self.replica.on_heartbeat(world.now, &answer).map(drop)
    }

    /// Returns whether there was a reservation to hold.
    fn hold(&mut self, world: &mut World) -> Option<bool> {
        let Some((command, ids)) = self.replica.hold_command(world.now) else { return Some(false) };
        let answer = self.call(world, &command)?;
        (answer.verdict == Verdict::Done).then(|| self.replica.confirm_held(&ids))?;
        Some(true)
    }

    /// Does one or two calls of the sync task, so that other nodes run in between. `None`: Redis is lost.
    fn work(&mut self, world: &mut World) -> Option<()> {
        match self.phase {
            Phase::Offline { until } => {
                if world.now >= until && !self.is_cut_off {
                    self.phase = Phase::Join;
                }
            }
            Phase::Join => {
                let command = self.replica.join_command(world.now);
                let answer = self.call(world, &command)?;
                world.counts.repeated += self.replica.on_join(world.now, &answer)?.lost_steps;
                self.phase = Phase::Hold;
            }
            Phase::Hold => {
                if !self.hold(world)? {
                    self.phase = Phase::ReleaseUnlisted;
                }
            }
            Phase::ReleaseUnlisted => {
                let command = self.replica.release_unlisted_command(world.now);
                let answer = self.call(world, &command)?;
                (answer.verdict == Verdict::Done).then_some(())?;
                if answer.values == [0] {
                    self.replica.begin_resync(world.now);
                    self.phase = Phase::HoldOffline;
                }
            }
            Phase::HoldOffline => {
                if !self.hold(world)? {
                    self.flush(world)?;
                    self.heartbeat(world)?;
                    self.phase = Phase::Online;
                }
            }
            Phase::Online => {
                self.flush(world)?;
                self.lease(world)?;
                self.flush(world)?;
                if world.now >= self.next_heartbeat {
                    self.heartbeat(world)?;
                }
            }
        }
        Some(())
    }

    fn faulty_step(&mut self, world: &mut World) {
        if !self.is_cut_off {
            self.is_cut_off = world.dice.is_one_in(150);
        } else if world.dice.is_one_in(200) {
            self.is_cut_off = false;
            self.late.iter_mut().for_each(|(at, _)| *at = world.now.plus_ms(world.dice.below(1_500)));
        }
        if self.changes_policy && world.dice.is_one_in(20) {
            let on_failure = match world.dice.below(3) {
                0 => OnStoreFailure::Local,
                1 => OnStoreFailure::Open,
                _ => OnStoreFailure::Closed,
            };
            self.replica.set_on_failure(world.now, on_failure);
        }
        for _ in 0..world.dice.below(3) {
            if self.open.len() < 40 {
                self.request(world);
            }
        }
        (0..world.dice.below(3)).for_each(|_| self.progress(world));
    }

    fn step(&mut self, world: &mut World, leaves: bool) {
        if world.is_faulty {
            self.faulty_step(world);
        } else {
            self.is_cut_off = false;
        }
        (0..world.dice.below(3)).for_each(|_| self.settle(world));
        if !self.is_cut_off && world.dice.is_one_in(2) {
            self.run_late_calls(world, false);
        }
        if self.work(world).is_none() {
            self.lose_redis(world);
        }
        if leaves {
            self.replica.return_lease();
            self.flush(world).unwrap();
        }
    }
}

fn walk(seed: u64, policy: Option<OnStoreFailure>, leases: bool) {
    let (_server, redis) = Server::start();
    let (now, counts) = (Timestamp(BEGIN), Counts::default());
    let (dice, replicated) = (Dice(seed), Vec::new());
    let mut world = World { redis, dice, now, is_faulty: true, replicated, spent: 0, counts };
    let mut nodes: Vec<Node> = (0..3).map(|n| Node::start(n, policy, leases, now)).collect();
    for step in 0..FAULTY_STEPS + RECOVERY_STEPS + LEAVING_STEPS {
        world.is_faulty = step < FAULTY_STEPS;
        let ms = if world.is_faulty { 20 + world.dice.ms(180) } else { 100 };
        world.now = Timestamp(world.now.0 + ms);
        if step == REPLICATED_FROM || world.is_faulty && step > REPLICATED_FROM && world.dice.is_one_in(10) {
            world.replicate();
        } else if world.is_faulty && step > REPLICATED_FROM && world.dice.is_one_in(150) {
            world.fail_over();
            nodes.iter_mut().for_each(|node| node.lose_server(&world));
        }
        nodes.iter_mut().for_each(|node| node.step(&mut world, step >= FAULTY_STEPS + RECOVERY_STEPS));
    }
    let what = format!("seed {seed}, {policy:?}, leases {leases}, {:?}", world.counts);
    assert!(nodes.iter().all(|node| node.open.is_empty() && node.phase == Phase::Online), "{what}");
    let (cells, in_flight) = world.counted();
    println!("{what}: {} spent", world.spent);
    assert_eq!((cells, in_flight), (vec![(world.spent, 0); 2], 0), "{what}");
    let Counts { late, lost, unanswered, leased, by_redis, offline, failovers, repeated } = world.counts;
    assert!(failovers >= 2 && repeated >= 10, "{what}");
    assert!(
        [late, lost, unanswered].iter().all(|&count| count >= 10) && by_redis >= 100 && offline >= 100,
        "{what}"
    );
    assert_eq!(leased > 0, leases, "{what}");
}

#[test]
fn redis_charges_exactly_what_was_spent_even_if_calls_are_lost_or_delayed() {
    let walks = std::env::var("TOLLGATE_CLUSTER_WALKS").map_or(3, |n| n.parse().unwrap());
    for seed in 0..walks {
        for policy in [Some(OnStoreFailure::Local), Some(OnStoreFailure::Open), None] {
            for leases in [false, true] {
                walk(seed, policy, leases);
            }
        }
    }
}

/// Works until all nodes are online.
fn go_online(world: &mut World, nodes: &mut [Node]) {
    for _ in 0..100 {
        world.now = world.now.plus_ms(100);
        for node in &mut *nodes {
            assert!(node.work(world).is_some(), "the server knows the session");
        }
        if nodes.iter().all(|node| node.phase == Phase::Online) {
            return;
        }
    }
    panic!("a node does not rejoin");
}

#[test]
fn an_emptied_redis_charges_progress_that_it_had_not_received_once() {
    let (_server, redis) = Server::start();
    let (now, counts) = (Timestamp(BEGIN), Counts::default());
    let mut world =
        World { redis, dice: Dice(1), now, is_faulty: false, replicated: Vec::new(), spent: 0, counts };
    let mut nodes: Vec<Node> =
        (0..2).map(|n| Node::start(n, Some(OnStoreFailure::Local), false, now)).collect();
    go_online(&mut world, &mut nodes);
    for _ in 0..5 {
        for node in &mut nodes {
            (0..4).for_each(|_| node.request(&mut world));
            // Some progress is acknowledged.
            (0..4).for_each(|_| node.progress(&mut world));
            node.flush(&mut world).unwrap();
            node.heartbeat(&mut world).unwrap();
        }
        // The states of both nodes have what the other one had reported.
        nodes.iter_mut().for_each(|node| node.heartbeat(&mut world).unwrap());
        for node in &mut nodes {
            (0..8).for_each(|_| node.progress(&mut world));
            assert!(node.replica.has_unsent_steps());
        }
        let (): () = redis::cmd("FLUSHALL").query(&mut world.redis).unwrap();
        nodes.iter_mut().for_each(|node| node.lose_server(&world));
        go_online(&mut world, &mut nodes);
        for node in &mut nodes {
            while !node.open.is_empty() {
                node.settle(&mut world);
            }
            node.flush(&mut world).unwrap();
        }
        assert_eq!(world.counted(), (vec![(world.spent, 0); 2], 0));
    }
    assert!(world.spent > 0);
}
