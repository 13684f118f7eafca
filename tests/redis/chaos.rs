//! Nodes that reserve, extend, settle and give up at random, while the server is frozen, killed and cut off: in the end
//! it has charged what was spent, to the token.

use super::connection::signal;
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

/// Nothing is used beyond this in a month; so what was used is to be seen.
const MONTH: i64 = 1_000_000_000;
const TASKS: u64 = 8;

/// Numbers as at random: the same ones in every run, though what they meet is not.
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

/// What all nodes have done.
#[derive(Debug, Default)]
struct Book {
    stops: AtomicBool,
    /// What every reservation was charged in the end.
    spent: AtomicI64,
    /// What is reserved, and of what has ended, that part of it which was spent; and the most that this ever was.
    taken: AtomicI64,
    most_taken: AtomicI64,
    admitted: AtomicU64,
    denied: AtomicU64,
    dropped: AtomicU64,
    progressed: AtomicU64,
    outgrown: AtomicU64,
}

impl Book {
    fn admits(&self, reservation: &Reservation) {
        self.admitted.fetch_add(1, Ordering::SeqCst);
        let reserved = total(reservation.reserved());
        let taken = self.taken.fetch_add(reserved, Ordering::SeqCst) + reserved;
        self.most_taken.fetch_max(taken, Ordering::SeqCst);
    }

    /// To be called before it is settled: nobody is to have what it gives back sooner.
    fn ends(&self, reserved: i64, spent: i64) {
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

/// For what goes on while the test itself waits.
fn runtime_of_threads() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Ends a node with all that it holds, and without a word. Returns what that is.
fn dies(node: Member, book: &Book) -> Vec<Reservation> {
    let held: Vec<_> = runtime().block_on(async {
        let mut held = Vec::new();
        for n in 0..20 {
            let mut reservation = node.account.reserve(&demand(10, 50 + n), Duration::ZERO).await.unwrap();
            reservation.progress(Amounts::of_request(10, 3 * n));
            book.admits(&reservation);
            held.push(reservation);
        }
        sleep(Duration::from_millis(800)).await;
        held
    });
    for reservation in &held {
        book.spent.fetch_add(total(reservation.reserved()), Ordering::SeqCst);
    }
    node.dies();
    held
}

fn demand(prompt: u64, cap: u64) -> Demand<'static> {
    let subject = Subject { caller: None, model: "m" };
    Demand { subject, prompt, generates: true, cap: Some(cap), completions: 1 }
}

async fn work(account: Arc<Account>, book: Arc<Book>, mut dice: Dice, largest: u64) {
    while !book.stops.load(Ordering::SeqCst) {
        let (prompt, cap) = (dice.below(20), 1 + dice.below(largest));
        let demand = demand(prompt, cap);
        // Some do not wait for the answer.
        let polls = if dice.below(12) == 0 { dice.below(40) } else { u64::MAX };
        let gives_up = async {
            for _ in 0..polls {
                yield_now().await;
            }
        };
        let reserved = if polls == u64::MAX {
            Some(account.reserve(&demand, Duration::ZERO).await)
        } else {
            tokio::select! { biased; reserved = account.reserve(&demand, Duration::ZERO) => Some(reserved), () = gives_up => None }
        };
        match reserved {
            None => count(&book.dropped),
            Some(Err(_)) => {
                count(&book.denied);
                sleep(Duration::from_millis(5)).await;
            }
            Some(Ok(reservation)) => answer(reservation, &book, &mut dice, prompt, cap).await,
        }
    }
}

/// What a request that was admitted costs, little by little.
async fn answer(mut reservation: Reservation, book: &Book, dice: &mut Dice, prompt: u64, cap: u64) {
    book.admits(&reservation);
    let reserved = total(reservation.reserved());
    let length = match dice.below(10) {
        0 => cap.min(200),
        1 if dice.below(4) == 0 => cap + dice.below(cap / 2 + 100),
        _ => dice.below(cap.min(16)),
    };
    for part in 1..=dice.below(4) {
        sleep(dice.ms(0, 20)).await;
        count(&book.progressed);
        reservation.progress(Amounts::of_request(prompt, length * part / 3));
    }
    sleep(dice.ms(0, 20)).await;
    // Now and then the bill is smaller than what was seen, or there is none.
    let spent = match dice.below(12) {
        0 => Amounts::default(),
        1 => Amounts::of_request(prompt, length / 2),
        _ => Amounts::of_request(prompt, length),
    };
    if total(reservation.reserved()) > reserved {
        count(&book.outgrown);
    }
    reservation.observe(spent);
    book.ends(reserved, total(spent));
}

fn seconds() -> Duration {
    Duration::from_secs(std::env::var("TOLLGATE_CHAOS_SECONDS").map_or(8, |n| n.parse().unwrap()))
}

/// Kills a server that keeps nothing, again and again; returns how often, and what was spent in the half seconds before:
/// what a node has spent since the others heard of it last, they cannot bring back.
fn losses(server: &mut Server, dice: &mut Dice, book: &Book) -> (u64, i64) {
    let (begun, mut count, mut unheard) = (Stopwatch::start(), 0, 0);
    while begun.elapsed() < seconds() {
        std::thread::sleep(dice.ms(500, 1_500));
        let before = book.spent.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(500));
        server.kill();
        unheard += book.spent.load(Ordering::SeqCst) - before;
        std::thread::sleep(dice.ms(0, 300));
        server.start_again();
        count += 1;
    }
    (count, unheard)
}

/// Does to the server what happens to servers; returns how often each.
fn faults(server: &mut Server, dice: &mut Dice) -> [u64; 4] {
    let (begun, mut counts, mut process) = (Stopwatch::start(), [0; 4], server.process());
    while begun.elapsed() < seconds() {
        std::thread::sleep(dice.ms(50, 1_500));
        let fault = usize::try_from(dice.below(7)).unwrap().saturating_sub(3);
        match fault {
            0 => {
                signal("-STOP", &process);
                std::thread::sleep(dice.ms(50, 600));
                signal("-CONT", &process);
                // And once more about when nodes take part again.
                if dice.below(2) == 0 {
                    std::thread::sleep(dice.ms(200, 600));
                    signal("-STOP", &process);
                    std::thread::sleep(dice.ms(30, 150));
                    signal("-CONT", &process);
                }
            }
            1 => drop(server.admin("SCRIPT FLUSH")),
            2 => drop(server.admin("CLIENT KILL TYPE normal")),
            _ => {
                server.kill();
                std::thread::sleep(dice.ms(0, 300));
                server.start_again();
                process = server.process();
            }
        }
        counts[fault] += 1;
    }
    counts
}

/// What was used of the quotas and what is held, of both, and how many requests are in flight.
fn counted(server: &Server, burst: i64) -> ([i64; 2], [i64; 2], i64) {
    let names: Vec<String> = server.ask("HKEYS tollgate:{e}:q");
    let (mut used, mut held) = ([0; 2], [0; 2]);
    for name in names {
        // Words of a command are apart by spaces: the script's own are not.
        let script = "local\tc=cmsgpack.unpack(redis.call('HGET',KEYS[1],ARGV[1]))\treturn{c.whole\tor\tc.used,c.held}";
        let [of_cell, is_held]: [i64; 2] = server.ask(&format!("EVAL {script} 1 tollgate:{{e}}:q {name}"));
        let is_rolling = name.ends_with("rolling");
        let place = usize::from(!is_rolling);
        used[place] = if is_rolling { burst - is_held - of_cell } else { of_cell };
        held[place] = is_held;
    }
    (used, held, server.ask::<Option<i64>>("HGET tollgate:{e}:s in_flight").unwrap_or(0))
}

/// How far what was used may be from what was spent, of both quotas.
#[derive(Clone, Copy, Default)]
struct Bounds {
    under: i64,
    over: [i64; 2],
}

/// Waits until nothing is held any more, and compares what was used with what was spent.
fn compare(server: &Server, burst: i64, book: &Book, bounds: Bounds) {
    let (begun, spent) = (Stopwatch::start(), book.spent.load(Ordering::SeqCst));
    loop {
        let found = counted(server, burst);
        let (used, held, in_flight) = found;
        let is_near = |(used, over): (&i64, i64)| (spent - bounds.under..=spent + over).contains(used);
        let is_right = used.iter().zip(bounds.over).all(is_near);
        if is_right && held == [0, 0] && in_flight == 0 {
            return;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{spent} were spent; used, held and in flight are {found:?}; {book:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What happens beside the faults of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Also {
    Nothing,
    /// One node more, which ends without a word.
    OneDies,
    /// One of the nodes does not reach the server for so long that it is given up.
    OneIsCutOff,
    /// The server keeps nothing when it is killed.
    AllIsLost,
}

struct Run {
    seed: u64,
    /// What all nodes may use, nothing of which comes back while it lasts.
    burst: i64,
    settings: &'static str,
    also: Also,
}

impl Run {
    fn run(&self) {
        let Self { burst, settings, also, .. } = *self;
        let keeps = if also == Also::AllIsLost { "no" } else { "yes" };
        let mut server = Server::with(&format!("--port 0 --appendonly {keeps} --appendfsync always"));
        let outside = runtime_of_threads();
        let proxy = outside.block_on(Proxy::start(&server.folder().join("s")));
        let quotas = format!(
            "{{ total_tokens: [{{ limit: 10, burst: {burst}, per: day, window: rolling }}, {{ limit: {MONTH}, per: month }}] }}"
        );
        let start = |url: &str, name: &str| Member::start(url, name, &quotas, settings);
        let third = if also == Also::OneIsCutOff { proxy.url() } else { server.url() };
        let nodes = [("one", server.url()), ("two", server.url()), ("three", third)];
        let nodes = nodes.map(|(name, url)| start(&url, name));
        let book = Arc::new(Book::default());
        let dead = (also == Also::OneDies).then(|| dies(start(&server.url(), "dies"), &book));
        let workers: Vec<_> =
            nodes.iter().zip(1..).map(|(node, number)| self.works(node, number, &book)).collect();
        let (lost, is_leased) = (self.happens(&mut server, &proxy, &book), settings.contains("lease"));
        let leased = if dead.is_some() && is_leased { [burst / 50, MONTH / 50] } else { [0, 0] };
        let bounds = Bounds { under: lost, over: leased.map(|leased| leased + lost) };
        book.stops.store(true, Ordering::SeqCst);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        nodes.iter().for_each(Member::shares);
        let losses: u64 = nodes.iter().map(Member::losses).sum();
        println!("{settings}, {also:?}: {losses} losses; {book:?}");
        self.check(&server, nodes, dead, &book, bounds);
    }

    /// Returns how much of what was spent nobody may know any more.
    fn happens(&self, server: &mut Server, proxy: &Proxy, book: &Book) -> i64 {
        let Self { settings, also, .. } = self;
        let mut dice = Dice(self.seed);
        match also {
            Also::OneIsCutOff => {
                std::thread::sleep(Duration::from_millis(500));
                proxy.set(Mode::Silent);
                // A session is over after 15 seconds.
                std::thread::sleep(Duration::from_secs(17));
                proxy.set(Mode::Through);
                0
            }
            Also::AllIsLost => {
                let (count, unheard) = losses(server, &mut dice, book);
                println!("{settings}: killed {count} times; up to {unheard} may be lost");
                unheard
            }
            Also::Nothing | Also::OneDies => {
                println!("{settings}: frozen, flushed, cut off, killed {:?}", faults(server, &mut dice));
                0
            }
        }
    }

    fn works(&self, node: &Member, number: u64, book: &Arc<Book>) -> JoinHandle<()> {
        let (account, book, seed) = (node.account.clone(), book.clone(), self.seed);
        std::thread::spawn(move || {
            runtime().block_on(async {
                let mut tasks = JoinSet::new();
                for task in 0..TASKS {
                    let dice = Dice(seed * 1_000_003 + number * 7_919 + task * 104_729 + 1);
                    tasks.spawn(work(account.clone(), book.clone(), dice, 1_000));
                }
                tasks.join_all().await;
            });
        })
    }

    /// What was charged is what was spent, when all that is there knows of each other, and when all have gone.
    fn check(
        &self,
        server: &Server,
        nodes: [Member; 3],
        dead: Option<Vec<Reservation>>,
        book: &Book,
        bounds: Bounds,
    ) {
        if !self.settings.contains("lease") {
            compare(server, self.burst, book, bounds);
        }
        if dead.is_some() {
            let begun = Stopwatch::start();
            let is_charged = || server.ask::<Option<i64>>("HGET tollgate:{e}:s s:dies").is_none();
            while !is_charged() {
                assert!(begun.elapsed() < Duration::from_secs(30), "who is dead is charged");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        drop(nodes);
        compare(server, self.burst, book, bounds);
        drop(dead);
        if self.settings.contains("closed") {
            let most = book.most_taken.load(Ordering::SeqCst);
            assert!(most <= self.burst + bounds.under, "{most} were admitted of {}", self.burst);
        }
    }
}

/// They wait for most of the time.
fn side_by_side(runs: &[Run]) {
    std::thread::scope(|scope| {
        runs.iter().for_each(|run| drop(scope.spawn(|| run.run())));
    });
}

const CLOSED: &str = "on_failure: closed";
const CLOSED_WITH_LEASES: &str = "on_failure: closed, lease: true";
const LOCAL: &str = "on_failure: local";
const LOCAL_WITH_LEASES: &str = "on_failure: local, lease: true";

#[test]
fn closed() {
    side_by_side(&[
        Run { seed: 1, burst: 300_000, settings: CLOSED, also: Also::Nothing },
        Run { seed: 2, burst: 600_000, settings: CLOSED_WITH_LEASES, also: Also::Nothing },
        Run { seed: 5, burst: 600_000, settings: CLOSED_WITH_LEASES, also: Also::OneDies },
    ]);
}

#[test]
fn local() {
    side_by_side(&[
        Run { seed: 3, burst: 300_000, settings: LOCAL, also: Also::OneDies },
        Run { seed: 4, burst: 600_000, settings: LOCAL_WITH_LEASES, also: Also::Nothing },
        Run { seed: 6, burst: 300_000, settings: LOCAL, also: Also::Nothing },
    ]);
}

#[test]
fn open_and_where_everything_is_lost() {
    side_by_side(&[
        Run { seed: 9, burst: 300_000, settings: "on_failure: open", also: Also::Nothing },
        Run { seed: 10, burst: 300_000, settings: LOCAL, also: Also::AllIsLost },
        Run { seed: 11, burst: 300_000, settings: CLOSED, also: Also::AllIsLost },
    ]);
}

#[test]
fn one_is_given_up_and_comes_back() {
    side_by_side(&[
        Run { seed: 7, burst: 3_000_000, settings: LOCAL, also: Also::OneIsCutOff },
        Run { seed: 8, burst: 3_000_000, settings: LOCAL_WITH_LEASES, also: Also::OneIsCutOff },
    ]);
}
