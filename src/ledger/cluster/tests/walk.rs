//! Three nodes at random against the script itself, on a clock of the test's own. Calls are lost, come late or are answered
//! in vain, and nodes are cut off for so long that they are given up. In the end Redis has charged what was spent, to the
//! token, and holds nothing.

use super::super::*;
use super::subject;
use crate::clock::Stopwatch;
use crate::ledger::{Counters, Demand, Ended, Grant};
use crate::quota::{ClockUnit, Kind, Period, Scope, Window};
use crate::redis::{SCRIPT, Verdict};
use std::process::{Child, Command as Process, Stdio};
use std::time::Duration;

const BEGIN: i64 = 1_775_100_000_000;
/// Of this quota nothing comes back to speak of.
const BURST: i64 = 3_000_000;
/// Faults happen during the first steps; then everybody comes back, and goes.
const STEPS: u64 = 1_500;
const STEPS_TO_RETURN: u64 = 500;
const STEPS_TO_GO: u64 = 200;
const BEAT_MS: i64 = 500;

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

/// A server at a socket of its own. It ends when its standard input does.
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

/// The world that the nodes are in.
struct World {
    redis: redis::Connection,
    dice: Dice,
    now: Timestamp,
    /// Calls go astray.
    is_rough: bool,
    spent: i64,
    counts: Counts,
}

/// What has happened, so that no walk is an idle one.
#[derive(Debug, Default)]
struct Counts {
    late: u64,
    lost: u64,
    in_vain: u64,
    leased: u64,
    asked: u64,
    alone: u64,
}

impl World {
    fn run(&mut self, keys: &[String; 3], arguments: &[String]) -> Vec<i64> {
        let mut call = redis::cmd("EVAL");
        // In place of the server's clock.
        let now = self.now.0.to_string();
        call.arg(SCRIPT).arg(3).arg(&keys[..]).arg(&arguments[0]).arg(now).arg(&arguments[2..]);
        call.query(&mut self.redis).unwrap()
    }

    /// What was used and is held of each cell, and how many requests are in flight.
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

/// Where a node is on its way to take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Unavailable { until: Timestamp },
    Joins,
    Holds,
    HoldsOnly,
    HoldsTheRest,
    TakesPart,
}

struct Node {
    counters: Counters,
    keys: [String; 3],
    phase: Phase,
    is_cut_off: bool,
    next_beat: Timestamp,
    /// Requests in flight, each with the completion tokens that have come.
    open: Vec<(Grant, u64)>,
    /// Calls that are on their way for long.
    late: VecDeque<(Timestamp, Vec<String>)>,
}

impl Node {
    fn start(n: usize, policy: OnStoreFailure, leases: bool, now: Timestamp) -> Self {
        let quota = |limit, ms, window| {
            let per = Period { text: format!("{ms}ms"), ms };
            Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit, per, window }
        };
        let month = Window::Calendar { unit: ClockUnit::Month, zone: jiff::tz::TimeZone::UTC };
        let quotas = [
            quota(1, 366 * 86_400_000, Window::Rolling { burst: BURST.cast_unsigned() }),
            quota(1_000_000_000, 30 * 86_400_000, month),
        ];
        let mut counters = super::counters(&quotas, now);
        counters.share(now, Terms { on_failure: policy, stamp: 1, leases }, &format!("node-{n}"));
        let keys = counters.cluster().unwrap().keys("t", "e");
        let phase = Phase::Unavailable { until: now };
        let (open, late) = (Vec::new(), VecDeque::new());
        Self { counters, keys, phase, is_cut_off: false, next_beat: now, open, late }
    }

    /// `None`: it does not come there, comes there late, or its answer does not come back.
    fn call(&mut self, world: &mut World, command: &ScriptCommand) -> Option<ScriptReply> {
        let fate = if self.is_cut_off { world.dice.below(2) } else { world.dice.below(60) };
        if world.is_rough && fate < 3 {
            match fate {
                0 => {
                    let at = world.now.plus_ms(world.dice.below(3_000));
                    self.late.push_back((at, command.arguments.clone()));
                    world.counts.late += 1;
                }
                1 => world.counts.lost += 1,
                _ => {
                    self.late_calls_come(world, true);
                    world.run(&self.keys, &command.arguments);
                    world.counts.in_vain += 1;
                }
            }
            return None;
        }
        let numbers = world.run(&self.keys, &command.arguments);
        Some(command.parse_reply(&numbers).unwrap())
    }

    /// In their order: they are of one connection.
    fn late_calls_come(&mut self, world: &mut World, all: bool) {
        while let Some((_, arguments)) = self.late.pop_front_if(|(at, _)| all || *at <= world.now) {
            world.run(&self.keys, &arguments);
        }
    }

    fn loses(&mut self, world: &World) {
        self.counters.lose(world.now);
        self.phase = Phase::Unavailable { until: world.now.plus_ms(LATEST_MS) };
    }

    fn request(&mut self, world: &mut World) {
        let cap = Some(1 + world.dice.below(500));
        let demand = Demand { subject: subject(), prompt: 10, generates: true, cap, completions: 1 };
        if let Some(admission) = self.counters.admit_leased(world.now, &demand) {
            world.counts.leased += 1;
            return self.open.push((admission.grant, 0));
        }
        if let Some(question) = self.counters.question(world.now, &demand) {
            let answer = self.call(world, &question.command);
            let answered =
                answer.map(|answer| self.counters.answered(world.now, &demand, &question, &answer));
            match answered {
                None => {
                    self.counters.cluster().unwrap().cancel(question.id);
                    self.loses(world);
                }
                Some(Answered::Decided(decided)) => {
                    world.counts.asked += 1;
                    return self.open.extend(decided.ok().map(|admission| (admission.grant, 0)));
                }
                Some(Answered::Again) => return,
                Some(Answered::Unknown) => self.loses(world),
            }
        }
        if let Ok(admission) = self.counters.admit_alone(world.now, &demand) {
            world.counts.alone += 1;
            self.open.push((admission.grant, 0));
        }
    }

    fn picks(&self, world: &mut World) -> Option<usize> {
        let count = self.open.len() as u64;
        (count > 0).then(|| usize::try_from(world.dice.below(count)).unwrap())
    }

    fn progress(&mut self, world: &mut World) {
        let Some(at) = self.picks(world) else { return };
        let (grant, completion) = &mut self.open[at];
        *completion += if world.dice.is_one_in(7) { world.dice.below(600) } else { world.dice.below(60) };
        self.counters.progress(world.now, "m", grant, Amounts::of_request(10, *completion));
    }

    fn settle(&mut self, world: &mut World) {
        let Some(at) = self.picks(world) else { return };
        let (grant, completion) = self.open.swap_remove(at);
        let spent = match world.dice.below(8) {
            0 => Amounts::default(),
            1 => Amounts::of_request(10, completion / 2),
            _ => Amounts::of_request(10, completion + world.dice.below(50)),
        };
        world.spent += spent.total.cast_signed();
        self.counters.settle(world.now, subject(), grant, Ended { spent, is_whole: true });
    }

    fn flush(&mut self, world: &mut World) -> Option<()> {
        let end = self.counters.cluster()?.next_step();
        while let Some(batch) = self.counters.cluster()?.batch(world.now, end) {
            let answer = self.call(world, &batch.command)?;
            if !self.counters.batch_is_told(world.now, &batch, &answer) {
                assert_eq!(answer.verdict, Verdict::UnknownSession);
                return None;
            }
        }
        Some(())
    }

    fn lease(&mut self, world: &mut World) -> Option<()> {
        let Some(command) = self.counters.lease(world.now) else { return Some(()) };
        let answer = self.call(world, &command)?;
        self.counters.leased(world.now, &answer).then_some(())
    }

    fn beat(&mut self, world: &mut World) -> Option<()> {
        let command = self.counters.beat(world.now)?;
        let answer = self.call(world, &command)?;
        self.next_beat = world.now.plus_ms(BEAT_MS.cast_unsigned());
        self.counters.beaten(world.now, &answer).map(drop)
    }

    /// Whether there was anything to hold.
    fn hold(&mut self, world: &mut World) -> Option<bool> {
        let Some((command, ids)) = self.counters.hold(world.now) else { return Some(false) };
        let answer = self.call(world, &command)?;
        (answer.verdict == Verdict::Done).then(|| self.counters.cluster().unwrap().are_held(&ids))?;
        Some(true)
    }

    /// What its task does, a call or two at a time, so that others come in between. `None`: Redis is lost.
    fn works(&mut self, world: &mut World) -> Option<()> {
        match self.phase {
            Phase::Unavailable { until } => {
                if world.now >= until && !self.is_cut_off {
                    self.phase = Phase::Joins;
                }
            }
            Phase::Joins => {
                let command = self.counters.join(world.now)?;
                let answer = self.call(world, &command)?;
                self.counters.joined(world.now, &answer)?;
                self.phase = Phase::Holds;
            }
            Phase::Holds => {
                if !self.hold(world)? {
                    self.phase = Phase::HoldsOnly;
                }
            }
            Phase::HoldsOnly => {
                let command = self.counters.hold_only(world.now)?;
                let answer = self.call(world, &command)?;
                (answer.verdict == Verdict::Done).then_some(())?;
                if answer.values == [0] {
                    self.counters.return_from_alone(world.now);
                    self.phase = Phase::HoldsTheRest;
                }
            }
            Phase::HoldsTheRest => {
                if !self.hold(world)? {
                    self.flush(world)?;
                    self.beat(world)?;
                    self.phase = Phase::TakesPart;
                }
            }
            Phase::TakesPart => {
                self.flush(world)?;
                self.lease(world)?;
                self.flush(world)?;
                if world.now >= self.next_beat {
                    self.beat(world)?;
                }
            }
        }
        Some(())
    }

    fn is_rough_with(&mut self, world: &mut World) {
        if !self.is_cut_off {
            self.is_cut_off = world.dice.is_one_in(150);
        } else if world.dice.is_one_in(200) {
            self.is_cut_off = false;
            self.late.iter_mut().for_each(|(at, _)| *at = world.now.plus_ms(world.dice.below(1_500)));
        }
        for _ in 0..world.dice.below(3) {
            if self.open.len() < 40 {
                self.request(world);
            }
        }
        (0..world.dice.below(3)).for_each(|_| self.progress(world));
    }

    fn steps(&mut self, world: &mut World, goes: bool) {
        if world.is_rough {
            self.is_rough_with(world);
        } else {
            self.is_cut_off = false;
        }
        (0..world.dice.below(3)).for_each(|_| self.settle(world));
        if !self.is_cut_off && world.dice.is_one_in(2) {
            self.late_calls_come(world, false);
        }
        if self.works(world).is_none() {
            self.loses(world);
        }
        if goes {
            self.counters.end_lease();
            self.flush(world).unwrap();
        }
    }
}

fn walk(seed: u64, policy: OnStoreFailure, leases: bool) {
    let (_server, redis) = Server::start();
    let (now, counts) = (Timestamp(BEGIN), Counts::default());
    let mut world = World { redis, dice: Dice(seed), now, is_rough: true, spent: 0, counts };
    let mut nodes: Vec<Node> = (0..3).map(|n| Node::start(n, policy, leases, now)).collect();
    for step in 0..STEPS + STEPS_TO_RETURN + STEPS_TO_GO {
        world.is_rough = step < STEPS;
        let ms = if world.is_rough { 20 + world.dice.ms(180) } else { 100 };
        world.now = Timestamp(world.now.0 + ms);
        nodes.iter_mut().for_each(|node| node.steps(&mut world, step >= STEPS + STEPS_TO_RETURN));
    }
    let what = format!("seed {seed}, {policy:?}, leases {leases}, {:?}", world.counts);
    assert!(nodes.iter().all(|node| node.open.is_empty() && node.phase == Phase::TakesPart), "{what}");
    let (cells, in_flight) = world.counted();
    println!("{what}: {} spent", world.spent);
    assert_eq!((cells, in_flight), (vec![(world.spent, 0); 2], 0), "{what}");
    let Counts { late, lost, in_vain, leased, asked, alone } = world.counts;
    assert!([late, lost, in_vain].iter().all(|&count| count >= 10) && asked >= 100 && alone >= 100, "{what}");
    assert_eq!(leased > 0, leases, "{what}");
}

#[test]
fn whatever_becomes_of_calls_what_was_spent_is_charged_and_nothing_else() {
    let walks = std::env::var("TOLLGATE_CLUSTER_WALKS").map_or(3, |n| n.parse().unwrap());
    for seed in 0..walks {
        for policy in [OnStoreFailure::Local, OnStoreFailure::Open] {
            for leases in [false, true] {
                walk(seed, policy, leases);
            }
        }
    }
}
