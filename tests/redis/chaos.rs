//! Nodes reserve, extend, settle and cancel at random while the server is frozen, killed and cut off. At the end the
//! server has charged exactly the tokens that were spent.

use super::connection::send_signal;
use super::member::{Member, runtime};
use super::proxy::{Mode, Proxy};
use super::server::Server;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::task::{JoinSet, yield_now};
use tokio::time::sleep;
use tollgate::clock::Stopwatch;
use tollgate::ledger::{Account, Demand, Reservation};
use tollgate::quota::{Amounts, Subject};

/// The limit of a month. It is never reached, so the use of the month equals the tokens charged.
const MONTH_LIMIT: i64 = 1_000_000_000;
/// Concurrent requests of each node.
const TASKS: u64 = 8;

/// A random generator (xorshift). Its numbers are the same in every run; the timing is not.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end.max(1)
    }

    fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

/// Independent sums over all nodes.
#[derive(Debug, Default)]
struct Totals {
    stop: AtomicBool,
    /// Tokens charged for all settled reservations.
    spent: AtomicI64,
    /// Tokens of all open reservations, plus the tokens that ended reservations have spent.
    taken: AtomicI64,
    /// The maximum of `taken` so far.
    max_taken: AtomicI64,
    admitted: AtomicU64,
    denied: AtomicU64,
    cancelled: AtomicU64,
    progressed: AtomicU64,
    extended: AtomicU64,
}

impl Totals {
    fn on_admitted(&self, reservation: &Reservation) {
        self.admitted.fetch_add(1, Ordering::SeqCst);
        let reserved = total(reservation.reserved());
        let taken = self.taken.fetch_add(reserved, Ordering::SeqCst) + reserved;
        self.max_taken.fetch_max(taken, Ordering::SeqCst);
    }

    /// Call this before the reservation settles. Otherwise another request could use the refund first.
    fn on_ending(&self, reserved: i64, spent: i64) {
        self.spent.fetch_add(spent, Ordering::SeqCst);
        self.taken.fetch_sub((reserved - spent).max(0), Ordering::SeqCst);
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::SeqCst);
}

fn total(amounts: Amounts) -> i64 {
    amounts.total.cast_signed()
}

/// A runtime that works while the thread of the test waits.
fn background_runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Kills a node that holds reservations. Returns the reservations. Their settlement never reaches the server.
fn kill_with_reservations(node: Member, totals: &Totals) -> Vec<Reservation> {
    let held: Vec<_> = runtime().block_on(async {
        let mut held = Vec::new();
        for n in 0..20 {
            let mut reservation = node.account.reserve(&demand(10, 50 + n), Duration::ZERO).await.unwrap();
            reservation.progress(Amounts::of_request(10, 3 * n));
            totals.on_admitted(&reservation);
            held.push(reservation);
        }
        sleep(Duration::from_millis(800)).await;
        held
    });
    for reservation in &held {
        totals.spent.fetch_add(total(reservation.reserved()), Ordering::SeqCst);
    }
    node.kill();
    held
}

fn demand(prompt: u64, cap: u64) -> Demand<'static> {
    let subject = Subject { caller: None, model: "m" };
    Demand {
        subject,
        prompt,
        generates: true,
        cap: Some(cap),
        completions: 1,
        backends: &[],
        may_clamp: true,
    }
}

async fn work(account: Arc<Account>, totals: Arc<Totals>, mut dice: Dice, max_completion: u64) {
    while !totals.stop.load(Ordering::SeqCst) {
        let (prompt, cap) = (dice.below(20), 1 + dice.below(max_completion));
        let demand = demand(prompt, cap);
        // Some requests are cancelled while they wait for Redis.
        let polls = if dice.below(12) == 0 { dice.below(40) } else { u64::MAX };
        let cancelled = async {
            for _ in 0..polls {
                yield_now().await;
            }
        };
        let reserved = if polls == u64::MAX {
            Some(account.reserve(&demand, Duration::ZERO).await)
        } else {
            tokio::select! { biased; reserved = account.reserve(&demand, Duration::ZERO) => Some(reserved), () = cancelled => None }
        };
        match reserved {
            None => count(&totals.cancelled),
            Some(Err(_)) => {
                count(&totals.denied);
                sleep(Duration::from_millis(5)).await;
            }
            Some(Ok(reservation)) => run_request(reservation, &totals, &mut dice, prompt, cap).await,
        }
    }
}

/// Reports progress of an admitted request several times, then settles it.
async fn run_request(mut reservation: Reservation, totals: &Totals, dice: &mut Dice, prompt: u64, cap: u64) {
    totals.on_admitted(&reservation);
    let reserved = total(reservation.reserved());
    let length = match dice.below(10) {
        0 => cap.min(200),
        1 if dice.below(4) == 0 => cap + dice.below(cap / 2 + 100),
        _ => dice.below(cap.min(16)),
    };
    for part in 1..=dice.below(4) {
        sleep(dice.ms(0, 20)).await;
        count(&totals.progressed);
        reservation.progress(Amounts::of_request(prompt, length * part / 3));
    }
    sleep(dice.ms(0, 20)).await;
    // Sometimes the final usage is lower than the progress reported before, or zero.
    let spent = match dice.below(12) {
        0 => Amounts::default(),
        1 => Amounts::of_request(prompt, length / 2),
        _ => Amounts::of_request(prompt, length),
    };
    if total(reservation.reserved()) > reserved {
        count(&totals.extended);
    }
    reservation.observe(spent);
    totals.on_ending(reserved, total(spent));
}

fn fault_time() -> Duration {
    Duration::from_secs(std::env::var("TOLLGATE_CHAOS_SECONDS").map_or(8, |n| n.parse().unwrap()))
}

/// Repeatedly kills a server that stores nothing on disk. Returns the number of kills, and the tokens spent in the
/// half second before each kill. The other nodes have not received these tokens and cannot restore them.
fn kill_repeatedly(server: &mut Server, dice: &mut Dice, totals: &Totals) -> (u64, i64) {
    let (begun, mut count, mut unreported) = (Stopwatch::start(), 0, 0);
    while begun.elapsed() < fault_time() {
        std::thread::sleep(dice.ms(500, 1_500));
        let before = totals.spent.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(500));
        server.kill();
        unreported += totals.spent.load(Ordering::SeqCst) - before;
        std::thread::sleep(dice.ms(0, 300));
        server.restart();
        count += 1;
    }
    (count, unreported)
}

/// Injects random faults into the server. Returns how often it was frozen, its scripts flushed, its connections closed,
/// and it was killed.
fn inject_faults(server: &mut Server, dice: &mut Dice) -> [u64; 4] {
    let (begun, mut counts, mut process) = (Stopwatch::start(), [0; 4], server.process_id());
    while begun.elapsed() < fault_time() {
        std::thread::sleep(dice.ms(50, 1_500));
        let fault = usize::try_from(dice.below(7)).unwrap().saturating_sub(3);
        match fault {
            0 => {
                send_signal("-STOP", &process);
                std::thread::sleep(dice.ms(50, 600));
                send_signal("-CONT", &process);
                // Freeze it again about when the nodes rejoin.
                if dice.below(2) == 0 {
                    std::thread::sleep(dice.ms(200, 600));
                    send_signal("-STOP", &process);
                    std::thread::sleep(dice.ms(30, 150));
                    send_signal("-CONT", &process);
                }
            }
            1 => drop(server.admin("SCRIPT FLUSH")),
            2 => drop(server.admin("CLIENT KILL TYPE normal")),
            _ => {
                server.kill();
                std::thread::sleep(dice.ms(0, 300));
                server.restart();
                process = server.process_id();
            }
        }
        counts[fault] += 1;
    }
    counts
}

/// Reads the used and the held tokens of both quotas, and the number of requests in flight.
fn read_counters(server: &Server, burst: i64) -> ([i64; 2], [i64; 2], i64) {
    let names: Vec<String> = server.query("HKEYS tollgate:{e}:q");
    let (mut used, mut held) = ([0; 2], [0; 2]);
    // The others are the implicit quotas.
    for name in names.into_iter().filter(|name| name.contains("total_tokens")) {
        // The script is one word of the command, so it contains tabs instead of spaces.
        let script = "local\tc=cmsgpack.unpack(redis.call('HGET',KEYS[1],ARGV[1]))\treturn{c.whole\tor\tc.used,c.held}";
        let [level_or_used, held_in_cell]: [i64; 2] =
            server.query(&format!("EVAL {script} 1 tollgate:{{e}}:q {name}"));
        let is_rolling = name.ends_with("rolling");
        let index = usize::from(!is_rolling);
        used[index] = if is_rolling { burst - held_in_cell - level_or_used } else { level_or_used };
        held[index] = held_in_cell;
    }
    (used, held, server.query::<Option<i64>>("HGET tollgate:{e}:s in_flight").unwrap_or(0))
}

/// Permitted differences between the used tokens of the server and the spent tokens. `over`: for each quota.
#[derive(Clone, Copy, Default)]
struct Bounds {
    under: i64,
    over: [i64; 2],
}

/// Waits until nothing is held and the used tokens equal the spent tokens, within the bounds.
fn expect_equal(server: &Server, burst: i64, totals: &Totals, bounds: Bounds) {
    let (begun, spent) = (Stopwatch::start(), totals.spent.load(Ordering::SeqCst));
    loop {
        let found = read_counters(server, burst);
        let (used, held, in_flight) = found;
        let is_within = |(used, over): (&i64, i64)| (spent - bounds.under..=spent + over).contains(used);
        let is_equal = used.iter().zip(bounds.over).all(is_within);
        if is_equal && held == [0, 0] && in_flight == 0 {
            return;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{spent} spent; used, held and in flight: {found:?}; {totals:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The events of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scenario {
    /// The server has random faults.
    RandomFaults,
    /// The server has random faults, and an additional node dies.
    NodeDies,
    /// One node is cut off until its session ends.
    NodeIsCutOff,
    /// The server is killed repeatedly and loses all data.
    DataIsLost,
}

struct Run {
    seed: u64,
    /// The burst of the rolling quota. It hardly refills during the run.
    burst: i64,
    settings: &'static str,
    scenario: Scenario,
}

impl Run {
    fn run(&self) {
        let Self { burst, settings, scenario, .. } = *self;
        let append_only = if scenario == Scenario::DataIsLost { "no" } else { "yes" };
        let mut server = Server::with(&format!("--port 0 --appendonly {append_only} --appendfsync always"));
        let background = background_runtime();
        let proxy = background.block_on(Proxy::start(&server.folder().join("s")));
        let quotas = format!(
            "{{ total_tokens: [{{ limit: 10, burst: {burst}, per: day, window: rolling }}, {{ limit: {MONTH_LIMIT}, per: month }}] }}"
        );
        let start = |url: &str, name: &str| Member::start(url, name, &quotas, settings);
        let third = if scenario == Scenario::NodeIsCutOff { proxy.url() } else { server.url() };
        let nodes = [("one", server.url()), ("two", server.url()), ("three", third)];
        let nodes = nodes.map(|(name, url)| start(&url, name));
        let totals = Arc::new(Totals::default());
        let dead = (scenario == Scenario::NodeDies)
            .then(|| kill_with_reservations(start(&server.url(), "dead"), &totals));
        let workers: Vec<_> =
            nodes.iter().zip(1..).map(|(node, number)| self.spawn_work(node, number, &totals)).collect();
        let (lost, is_leased) = (self.run_scenario(&mut server, &proxy, &totals), settings.contains("lease"));
        let leased = if dead.is_some() && is_leased { [burst / 50, MONTH_LIMIT / 50] } else { [0, 0] };
        let bounds = Bounds { under: lost, over: leased.map(|leased| leased + lost) };
        totals.stop.store(true, Ordering::SeqCst);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        nodes.iter().for_each(Member::wait_until_shared);
        let losses: u64 = nodes.iter().map(Member::losses).sum();
        println!("{settings}, {scenario:?}: {losses} losses; {totals:?}");
        self.check(&server, nodes, dead, &totals, bounds);
    }

    /// Runs the scenario. Returns how many spent tokens may be lost.
    fn run_scenario(&self, server: &mut Server, proxy: &Proxy, totals: &Totals) -> i64 {
        let Self { settings, scenario, .. } = self;
        let mut dice = Dice(self.seed);
        match scenario {
            Scenario::NodeIsCutOff => {
                std::thread::sleep(Duration::from_millis(500));
                proxy.set(Mode::Silent);
                // A session times out after 15 seconds.
                std::thread::sleep(Duration::from_secs(17));
                proxy.set(Mode::Through);
                0
            }
            Scenario::DataIsLost => {
                let (count, unreported) = kill_repeatedly(server, &mut dice, totals);
                println!("{settings}: killed {count} times; up to {unreported} tokens may be lost");
                unreported
            }
            Scenario::RandomFaults | Scenario::NodeDies => {
                println!(
                    "{settings}: frozen, flushed, cut off, killed {:?}",
                    inject_faults(server, &mut dice)
                );
                0
            }
        }
    }

    fn spawn_work(&self, node: &Member, number: u64, totals: &Arc<Totals>) -> JoinHandle<()> {
        let (account, totals, seed) = (node.account.clone(), totals.clone(), self.seed);
        std::thread::spawn(move || {
            runtime().block_on(async {
                let mut tasks = JoinSet::new();
                for task in 0..TASKS {
                    let dice = Dice(seed * 1_000_003 + number * 7_919 + task * 104_729 + 1);
                    tasks.spawn(work(account.clone(), totals.clone(), dice, 1_000));
                }
                tasks.join_all().await;
            });
        })
    }

    /// Compares charged and spent tokens twice: with all nodes connected, and after all have left.
    fn check(
        &self,
        server: &Server,
        nodes: [Member; 3],
        dead: Option<Vec<Reservation>>,
        totals: &Totals,
        bounds: Bounds,
    ) {
        if !self.settings.contains("lease") {
            expect_equal(server, self.burst, totals, bounds);
        }
        if dead.is_some() {
            let begun = Stopwatch::start();
            let is_archived = || server.query::<Option<i64>>("HGET tollgate:{e}:s s:dead").is_none();
            while !is_archived() {
                assert!(begun.elapsed() < Duration::from_secs(30), "the dead node is not charged");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        drop(nodes);
        expect_equal(server, self.burst, totals, bounds);
        drop(dead);
        if self.settings.contains("closed") {
            let max_taken = totals.max_taken.load(Ordering::SeqCst);
            assert!(max_taken <= self.burst + bounds.under, "{max_taken} admitted of {}", self.burst);
        }
    }
}

/// Executes all runs in parallel, because each mostly waits.
fn run_all(runs: &[Run]) {
    std::thread::scope(|scope| {
        runs.iter().for_each(|run| drop(scope.spawn(|| run.run())));
    });
}

const CLOSED: &str = "on_failure: closed";
const CLOSED_WITH_LEASES: &str = "on_failure: closed, lease: true";
const LOCAL: &str = "on_failure: local";
const LOCAL_WITH_LEASES: &str = "on_failure: local, lease: true";

#[test]
fn no_token_is_lost_or_overspent_with_the_closed_policy() {
    run_all(&[
        Run { seed: 1, burst: 300_000, settings: CLOSED, scenario: Scenario::RandomFaults },
        Run { seed: 2, burst: 600_000, settings: CLOSED_WITH_LEASES, scenario: Scenario::RandomFaults },
        Run { seed: 5, burst: 600_000, settings: CLOSED_WITH_LEASES, scenario: Scenario::NodeDies },
    ]);
}

#[test]
fn no_token_is_lost_with_the_local_policy() {
    run_all(&[
        Run { seed: 3, burst: 300_000, settings: LOCAL, scenario: Scenario::NodeDies },
        Run { seed: 4, burst: 600_000, settings: LOCAL_WITH_LEASES, scenario: Scenario::RandomFaults },
        Run { seed: 6, burst: 300_000, settings: LOCAL, scenario: Scenario::RandomFaults },
    ]);
}

#[test]
fn with_the_open_policy_only_unreported_tokens_are_lost_and_only_if_the_server_loses_its_data() {
    run_all(&[
        Run { seed: 9, burst: 300_000, settings: "on_failure: open", scenario: Scenario::RandomFaults },
        Run { seed: 10, burst: 300_000, settings: LOCAL, scenario: Scenario::DataIsLost },
        Run { seed: 11, burst: 300_000, settings: CLOSED, scenario: Scenario::DataIsLost },
    ]);
}

#[test]
fn no_token_is_lost_when_a_session_ends_and_its_node_rejoins() {
    run_all(&[
        Run { seed: 7, burst: 3_000_000, settings: LOCAL, scenario: Scenario::NodeIsCutOff },
        Run { seed: 8, burst: 3_000_000, settings: LOCAL_WITH_LEASES, scenario: Scenario::NodeIsCutOff },
    ]);
}
