use super::*;
use crate::config::parse;
use crate::quota::Amounts;
use futures_util::FutureExt as _;
use std::pin::pin;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};
use tokio::time::timeout;

fn account(settings: &str) -> Arc<Account> {
    let text = format!(
        "upstreams: {{ u: {{ base_url: http://u/v1 }} }}\nenvironments: {{ e: {{ upstream: u, {settings} }} }}\nstore: {{ memory: true }}\n"
    );
    let loaded = parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    Arc::new(Account::open(&loaded.config.environments[0]))
}

const ROOM_FOR_ONE: &str =
    "reserve: { completion: max_tokens }, quotas: { total_tokens: { limit: 150, per: day } }";

fn demand(cap: u64) -> Demand<'static> {
    let subject = Subject { caller: None, model: "m" };
    Demand {
        subject,
        prompt: 8,
        generates: true,
        cap: Some(cap),
        completions: 1,
        backends: &[],
        may_clamp: true,
    }
}

mod upstreams;

/// With local counters a reservation without a wait never suspends.
fn reserve_now(account: &Arc<Account>, cap: u64) -> Reservation {
    account.reserve(&demand(cap), Duration::ZERO).now_or_never().unwrap().unwrap()
}

const LONG: Duration = Duration::from_secs(20);

/// Fails if the future takes longer than an immediate decision.
async fn at_once<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_millis(500), future).await.unwrap()
}

/// Lets the other tasks run until they wait.
async fn run_other_tasks() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_full_wait_queue_is_not_overtaken() {
    let account = account(ROOM_FOR_ONE);
    let first = reserve_now(&account, 100);
    let mut waiting = Vec::new();
    for n in 0..1_000_u64 {
        let account = account.clone();
        waiting.push(tokio::spawn(async move {
            let reservation = account.reserve(&demand(100), LONG).await.unwrap();
            drop(reservation);
            n
        }));
    }
    run_other_tasks().await;
    // 42 tokens are left, and each waiting request needs more.
    let denied = at_once(account.reserve(&demand(8), LONG)).await.unwrap_err();
    assert_eq!(denied.wait(), Some(crate::quota::Wait::Ms(1_000)));
    let snapshot = account.snapshot();
    assert_eq!((snapshot.in_flight, snapshot.totals.rejected), (1, 1));
    drop(first);
    for (n, waited) in (0..).zip(waiting) {
        assert_eq!(at_once(waited).await.unwrap(), n);
    }
    drop(at_once(account.reserve(&demand(8), LONG)).await.unwrap());
}

#[tokio::test]
async fn waiting_requests_are_served_in_order_of_arrival() {
    let account = account(ROOM_FOR_ONE);
    let first = reserve_now(&account, 100);
    let served = Arc::new(Mutex::new(Vec::new()));
    let mut waiting = Vec::new();
    for n in 0..1_000_u64 {
        let (account, served) = (account.clone(), served.clone());
        waiting.push(tokio::spawn(async move {
            // A small request behind a large one waits as well.
            let cap = if n % 2 == 0 { 100 } else { 1 };
            let reservation = account.reserve(&demand(cap), LONG).await.unwrap();
            served.lock().unwrap().push(n);
            tokio::task::yield_now().await;
            drop(reservation);
        }));
    }
    run_other_tasks().await;
    drop(first);
    for waited in waiting {
        timeout(LONG, waited).await.unwrap().unwrap();
    }
    assert!(served.lock().unwrap().iter().copied().eq(0..1_000));
    assert_eq!(account.in_flight(), 0);
}

#[tokio::test]
async fn a_request_that_cannot_fit_in_time_does_not_wait_behind_others() {
    let account = account(ROOM_FOR_ONE);
    let first = reserve_now(&account, 100);
    let behind = account.clone();
    let second = tokio::spawn(async move { behind.reserve(&demand(100), LONG).await.map(drop) });
    run_other_tasks().await;
    let never = at_once(account.reserve(&demand(143), LONG)).await.unwrap_err();
    assert_eq!(never.wait(), Some(crate::quota::Wait::Never));
    // Used tokens are not refilled within the wait.
    let mut first = first;
    first.observe(Amounts::of_request(8, 100));
    first.progress(Amounts::of_request(8, 50));
    let late = at_once(account.reserve(&demand(90), LONG)).await.unwrap_err();
    assert!(matches!(late.wait(), Some(crate::quota::Wait::Ms(_))));
    drop(first);
    assert!(at_once(second).await.unwrap().is_err(), "the waiting request is denied at its next attempt");
    assert_eq!(account.snapshot().totals.rejected, 3);
}

#[tokio::test]
async fn a_request_whose_wait_failed_does_not_overtake_the_head_of_the_queue() {
    let account = account(ROOM_FOR_ONE);
    let first = reserve_now(&account, 100);
    let front = account.clone();
    let front = tokio::spawn(async move { front.reserve(&demand(100), LONG).await.map(drop) });
    run_other_tasks().await;
    let behind = account.reserve(&demand(8), Duration::from_millis(50)).await;
    assert!(behind.is_err(), "it would fit, but it was not at the head of the queue");
    drop(first);
    at_once(front).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_panic_settles_once_with_the_last_amounts_observed() {
    let account = account(ROOM_FOR_ONE);
    let holder = account.clone();
    let panicked = tokio::spawn(async move {
        let mut reservation = reserve_now(&holder, 100);
        reservation.observe(Amounts::of_request(8, 0));
        reservation.progress(Amounts::of_request(8, 110));
        reservation.observe(Amounts::of_request(8, 12));
        tokio::task::yield_now().await;
        panic!("on purpose");
    });
    assert!(panicked.await.unwrap_err().is_panic());
    let snapshot = account.snapshot();
    assert_eq!((snapshot.in_flight, snapshot.totals.requests, snapshot.totals.total), (0, 1, 20));
    assert_eq!((snapshot.levels[0].used, snapshot.levels[0].held), (20, 0));
    drop(reserve_now(&account, 100));
}

#[test]
fn a_dropped_request_leaves_the_wait_queue() {
    let account = account(ROOM_FOR_ONE);
    let first = reserve_now(&account, 100);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _in_it = runtime.enter();
    {
        let (demand, mut context) = (demand(100), Context::from_waker(Waker::noop()));
        let mut waits = pin!(account.reserve(&demand, LONG));
        assert!(matches!(waits.as_mut().poll(&mut context), Poll::Pending));
    }
    let small = runtime.block_on(account.reserve(&demand(8), LONG));
    assert!(small.is_ok(), "the queue is empty");
    drop((first, small));
}
