//! An account that moves to another process settles like an account that stays. Both sides run in this process, with a
//! real socket.

use super::{line, predecessor};
use crate::config::{Environment, parse};
use crate::ledger::{
    Account, Accounts, Backend, Demand, Owner, Progress, Reservation, RestoredState, SuccessorLine,
};
use crate::quota::{Amounts, PersistedCounter, Quota, Subject};
use crate::server::RunState;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const QUOTAS: &str = "total_tokens: { limit: 100k, per: month, window: calendar }, requests: { limit: 1k, per: month, window: calendar }";

fn environment(settings: &str) -> Arc<Environment> {
    let text = format!(
        "upstreams: {{ u: {{ base_url: 'http://127.0.0.1:1/v1' }} }}\nenvironments: {{ e: {{ upstream: u, {settings} }} }}\n\
         default_environment: e\nstore: {{ memory: true }}"
    );
    parse(&text, "t.yaml", &|_| None, &[]).unwrap().config.environments[0].clone()
}

/// Two processes, of which the second has taken over from the first.
struct Pair {
    old: Arc<Account>,
    new: Arc<Account>,
    /// Dropping it ends the old process.
    line: JoinHandle<()>,
    serving: JoinHandle<()>,
    _states: [watch::Sender<RunState>; 2],
}

/// Hands an account over, as `incumbent` and `claim` do.
fn hand_over(environment: &Environment, old: Arc<Account>) -> Pair {
    let left = old.leave();
    let changes = old.take_changes().unwrap_or_default();
    let quotas: Vec<(Quota, PersistedCounter)> = changes.quotas;
    let restored =
        RestoredState { quotas, totals: changes.totals, left: Some(left), ..RestoredState::default() };
    let (states, receivers): (Vec<_>, Vec<_>) = (0..2).map(|_| watch::channel(RunState::Running)).unzip();
    let new = Arc::new(Account::open_with(environment, Some(Arc::new(Unwritten::default())), &restored));
    let accounts = Arc::new(Accounts::default());
    accounts.add("e", new.clone());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (line, messages) = SuccessorLine::new();
    old.move_to(&line, &"e".into());
    let [first, second] = <[_; 2]>::try_from(receivers).unwrap();
    let serving =
        tokio::spawn(async move { predecessor::serve(Some(theirs), accounts, first).await.unwrap() });
    let line = tokio::spawn(async move { line::run(ours, line, messages, second).await.unwrap() });
    Pair { old, new, line, serving, _states: states.try_into().unwrap() }
}

impl Pair {
    /// Waits until this many requests are in flight in the new process.
    async fn in_flight(&self, want: u64) {
        let reached = async {
            while self.new.in_flight() != want {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(10), reached).await;
        assert!(found.is_ok(), "{} are in flight, not {want}", self.new.in_flight());
    }

    /// Held and used amounts in the new process.
    fn levels(&self) -> Vec<(u64, u64)> {
        levels(&self.new)
    }

    async fn kill_old(&mut self) {
        self.line.abort();
        (&mut self.serving).await.unwrap();
    }
}

fn levels(account: &Account) -> Vec<(u64, u64)> {
    account.snapshot().levels.iter().map(|level| (level.held, level.used)).collect()
}

/// A store that finishes each commit at once and writes nothing.
#[derive(Debug, Default)]
struct Unwritten(crate::ledger::Commits);

impl crate::ledger::Persistence for Unwritten {
    fn changed(&self, _: bool) {
        let commit = self.0.begin();
        self.0.finish(commit);
    }

    fn is_writing(&self) -> bool {
        true
    }

    fn on_wait_timeout(&self) {}

    fn commits(&self) -> &crate::ledger::Commits {
        &self.0
    }
}

async fn reserve(account: &Arc<Account>, prompt: u64) -> Reservation {
    let subject = Subject { caller: None, model: "m" };
    let demand = Demand {
        subject,
        prompt,
        generates: true,
        cap: None,
        completions: 1,
        backends: &[],
        may_clamp: true,
    };
    account.reserve(&demand, Duration::ZERO).await.unwrap()
}

fn account(environment: &Environment) -> Arc<Account> {
    Arc::new(Account::open_with(environment, Some(Arc::new(Unwritten::default())), &RestoredState::default()))
}

/// The next of a fixed sequence of numbers below `n`.
fn next(state: &mut u64, n: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % n
}

fn index(state: &mut u64, length: usize) -> usize {
    usize::try_from(next(state, u64::try_from(length).unwrap())).unwrap()
}

#[tokio::test]
async fn an_account_that_moves_settles_like_one_that_stays() {
    let environment = environment(&format!("reserve: {{ completion: 50 }}, quotas: {{ {QUOTAS} }}"));
    let mut seed = 7;
    for _ in 0..20 {
        let [stays, moves] = [(); 2].map(|()| account(&environment));
        let mut requests = Vec::new();
        let mut pair = None;
        for step in 0..60 {
            if step == 20 {
                pair = Some(hand_over(&environment, moves.clone()));
            }
            let spent = |n| Amounts { requests: 1, prompt: 10, completion: n, total: 10 + n };
            match next(&mut seed, 4) {
                0 | 1 => {
                    let prompt = next(&mut seed, 30);
                    requests.push((reserve(&stays, prompt).await, reserve(&moves, prompt).await));
                }
                2 if !requests.is_empty() => {
                    let at = index(&mut seed, requests.len());
                    let spent = spent(next(&mut seed, 90));
                    let (first, second) = &mut requests[at];
                    first.progress(spent);
                    second.progress(spent);
                }
                3 if !requests.is_empty() => {
                    let at = index(&mut seed, requests.len());
                    let spent = spent(next(&mut seed, 200));
                    let (mut first, mut second) = requests.swap_remove(at);
                    first.observe(spent);
                    second.observe(spent);
                }
                _ => {}
            }
        }
        let mut pair = pair.unwrap();
        pair.in_flight(u64::try_from(requests.len()).unwrap()).await;
        requests.clear();
        pair.in_flight(0).await;
        assert_eq!(pair.levels(), levels(&stays));
        assert_eq!(pair.new.snapshot().totals, stays.snapshot().totals);
        pair.kill_old().await;
        assert_eq!(pair.levels(), levels(&stays));
        assert_eq!(moves.in_flight(), 0);
    }
}

#[tokio::test]
async fn requests_in_flight_of_a_killed_process_are_charged_in_full_once() {
    let environment = environment(&format!("reserve: {{ completion: 50 }}, quotas: {{ {QUOTAS} }}"));
    let old = account(&environment);
    // Four requests: one without a message to the new process, one with progress, one that settles, and a later one.
    let _silent = reserve(&old, 10).await;
    let mut streaming = reserve(&old, 10).await;
    let mut settled = reserve(&old, 10).await;
    let mut pair = hand_over(&environment, old);
    assert_eq!(pair.levels()[..2], [(180, 0), (3, 0)]);
    streaming.progress(Amounts { requests: 1, prompt: 10, completion: 70, total: 80 });
    settled.observe(Amounts { requests: 1, prompt: 5, completion: 5, total: 10 });
    drop(settled);
    let _late = reserve(&pair.old, 20).await;
    pair.in_flight(3).await;
    pair.kill_old().await;
    // 60 and 10 and 70; the stream was extended from 60 to 60 + 64.
    assert_eq!(pair.levels()[..2], [(0, 60 + 124 + 10 + 70), (0, 4)]);
    assert_eq!(pair.new.in_flight(), 0);
    let totals = pair.new.snapshot().totals;
    assert_eq!((totals.requests, totals.total), (4, 60 + 124 + 10 + 70));
    // If the old process still runs, it gets no reply and admits nothing.
    let subject = Subject { caller: None, model: "m" };
    let demand = Demand {
        subject,
        prompt: 1,
        generates: true,
        cap: None,
        completions: 1,
        backends: &[],
        may_clamp: true,
    };
    assert!(pair.old.reserve(&demand, Duration::ZERO).await.is_err());
}

#[tokio::test]
async fn the_new_process_reports_an_overrun_to_a_stream_of_the_old_one() {
    let environment = environment(
        "reserve: { completion: 50 }, quotas: { total_tokens: { limit: 100, per: month, window: calendar } }",
    );
    let old = account(&environment);
    let mut stream = reserve(&old, 10).await;
    let pair = hand_over(&environment, old);
    let spent = |completion| Amounts { requests: 1, prompt: 10, completion, total: 10 + completion };
    let mut outcome = Progress::Within;
    for completion in 51.. {
        if completion > stream.progress_threshold() {
            outcome = stream.progress(spent(completion));
        }
        if outcome == Progress::Overrun {
            assert!(completion <= 50 + 4 * 64, "{completion}");
            break;
        }
        assert!(completion < 1_000, "the stream has no end");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(stream);
    pair.in_flight(0).await;
}

#[tokio::test]
async fn an_account_that_stays_makes_the_deferred_settlements() {
    let environment = environment(&format!("reserve: {{ completion: 50 }}, quotas: {{ {QUOTAS} }}"));
    let old = account(&environment);
    let mut settled = reserve(&old, 10).await;
    let kept = reserve(&old, 10).await;
    old.leave();
    settled.observe(Amounts { requests: 1, prompt: 5, completion: 5, total: 10 });
    drop(settled);
    let waiting = tokio::spawn({
        let old = old.clone();
        async move { reserve(&old, 20).await }
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert!(!waiting.is_finished());
    assert_eq!(levels(&old)[..2], [(120, 0), (2, 0)]);
    old.stay();
    let late = waiting.await.unwrap();
    assert_eq!(levels(&old)[..2], [(60 + 70, 10), (2, 1)]);
    drop((kept, late));
    assert_eq!((levels(&old), old.in_flight()), (vec![(0, 10), (0, 1), (0, 5), (0, 5)], 0));
}

#[tokio::test]
async fn the_quotas_of_an_upstream_move_with_its_environments() {
    let text = "upstreams:\n  u: { base_url: 'http://127.0.0.1:1/v1', quotas: { total_tokens: { limit: 1000, per: month } } }\n  \
         v: { base_url: 'http://127.0.0.1:1/v1', quotas: { total_tokens: { limit: 300, per: month } } }\n\
         environments: { e: { upstream: u, reserve: { completion: 100 }, quotas: { requests: { limit: 1k, per: month } } } }\n\
         store: { memory: true }";
    let config = parse(text, "t.yaml", &|_| None, &[]).unwrap().config;
    let [u, v] = &config.upstreams[..] else { panic!() };
    let owners = [Owner::from(&config.environments[0]), Owner::from(u), Owner::from(v)];
    let open = |owner, restored: &RestoredState| {
        Arc::new(Account::open_with(owner, Some(Arc::new(Unwritten::default())), restored))
    };
    let old = owners.map(|owner| open(owner, &RestoredState::default()));
    let backends = [Backend { account: Some(&old[1]), model: "m" }];
    let reserve = async |prompt| {
        let subject = Subject { caller: None, model: "m" };
        let demand = Demand {
            subject,
            prompt,
            generates: true,
            cap: None,
            completions: 1,
            backends: &backends,
            may_clamp: true,
        };
        old[0].reserve(&demand, Duration::ZERO).await
    };
    let mut earlier = reserve(50).await.unwrap();
    let left = old.each_ref().map(|account| account.leave());
    let accounts = Arc::new(Accounts::default());
    let mut new = Vec::new();
    for ((owner, old), left) in owners.into_iter().zip(&old).zip(left) {
        let changes = old.take_changes().unwrap_or_default();
        let restored = RestoredState {
            quotas: changes.quotas,
            totals: changes.totals,
            left: Some(left),
            ..RestoredState::default()
        };
        new.push(open(owner, &restored));
        accounts.add(&owner.key(), new[new.len() - 1].clone());
    }
    let (states, receivers): (Vec<_>, Vec<_>) = (0..2).map(|_| watch::channel(RunState::Running)).unzip();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (line, messages) = SuccessorLine::new();
    owners.iter().zip(&old).for_each(|(owner, account)| account.move_to(&line, &owner.key().into()));
    let [first, second] = <[_; 2]>::try_from(receivers).unwrap();
    let serving =
        tokio::spawn(async move { predecessor::serve(Some(theirs), accounts, first).await.unwrap() });
    let line = tokio::spawn(async move { line::run(ours, line, messages, second).await.unwrap() });

    let mut later = reserve(20).await.unwrap();
    assert_eq!((levels(&new[1])[0], new[1].in_flight()), ((270, 0), 2));
    let denied = reserve(700).await.unwrap_err();
    let scope = &denied.worst().unwrap().quota.scope;
    assert_eq!((scope.as_str(), scope.name()), ("upstream", "u"));
    // Both move to the other upstream: one was reserved in the old process, one in the new. The third finds no room.
    let mut full = reserve(30).await.unwrap();
    let other = Backend { account: Some(&old[2]), model: "m" };
    earlier.move_to(1, &other).await.unwrap();
    later.move_to(1, &other).await.unwrap();
    let held = || [levels(&new[1])[0].0, levels(&new[2])[0].0];
    let moved = async {
        // The part of the earlier one is released with a message.
        while held() != [130, 270] {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), moved).await.unwrap();
    assert_eq!((earlier.backend(), later.backend(), new[2].in_flight()), (1, 1, 2));
    let denied = full.move_to(1, &other).await.unwrap_err();
    let scope = &denied.worst().unwrap().quota.scope;
    assert_eq!((scope.as_str(), scope.name(), full.backend()), ("upstream", "v", 0));
    // An upstream without limits holds nothing, and the one before is released.
    full.move_to(2, &Backend { account: None, model: "m" }).await.unwrap();
    assert_eq!(held(), [0, 270]);
    earlier.observe(Amounts::of_request(50, 10));
    later.observe(Amounts::of_request(20, 5));
    full.observe(Amounts::of_request(30, 1));
    drop((earlier, later, full));
    let settled = async {
        while new.iter().any(|account| account.in_flight() != 0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), settled).await.unwrap();
    let all = [&new[0], &new[1], &new[2]].map(|account| levels(account)[0]);
    assert_eq!(all, [(0, 3), (0, 0), (0, 85)]);
    line.abort();
    serving.await.unwrap();
    drop(states);
}

#[test]
fn a_process_with_another_password_has_the_same_store() {
    let identity = |url: &str| {
        let text = format!(
            "upstreams: {{ u: {{ base_url: 'http://127.0.0.1:1/v1' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\n\
             store: {{ path: /nowhere/t.db, redis: {{ url: '{url}' }} }}"
        );
        super::store_identity(&parse(&text, "t.yaml", &|_| None, &[]).unwrap().config)
    };
    let old = identity("redis://:old-password@host:1/2");
    assert_eq!(identity("redis://me:new-password@host:1/2"), old);
    assert!(!old.contains("password"), "{old}");
    for other in [
        "redis://:old-password@host:1/3",
        "redis://:old-password@host:2/2",
        "redis://:old-password@other:1/2",
    ] {
        assert_ne!(identity(other), old, "{other}");
    }
}
