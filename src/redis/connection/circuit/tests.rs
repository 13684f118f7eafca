use super::*;
use crate::clock::Stopwatch;
use proptest::prelude::*;
use std::future::{pending, ready};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

fn block_on(test: impl Future<Output = ()>) {
    Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

/// A closed circuit with connection 1, and a task that serves its timer.
fn closed(timeout: Duration) -> Arc<Circuit> {
    let circuit = Arc::new(Circuit::new(timeout));
    circuit.close(1);
    let timed = circuit.clone();
    tokio::spawn(async move { timed.timer.serve_rechecks().await });
    circuit
}

async fn run<T: Send + 'static>(
    circuit: &Circuit,
    pass: CircuitPass,
    extra: Duration,
    command: impl Future<Output = T> + Send + 'static,
) -> Result<T, CallFailure> {
    circuit.run(pass, extra, command).await.map(|(reply, _)| reply)
}

/// Calls that wait for their replies, as many as may be in flight.
async fn fill(circuit: &Circuit) -> Vec<CircuitPass> {
    let mut passes = Vec::new();
    for _ in 0..MAX_CALLS_IN_FLIGHT {
        passes.push(circuit.enter(1, true).await.unwrap());
    }
    passes
}

async fn wait_for(condition: impl Fn() -> bool) {
    let begun = Stopwatch::start();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(20));
        sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn a_call_without_a_reply_fails_after_the_timeout_and_not_before() {
    block_on(async {
        let circuit = closed(Duration::from_millis(40));
        let (pass, begun) = (circuit.enter(1, true).await.unwrap(), Stopwatch::start());
        assert_eq!(run(&circuit, pass, Duration::ZERO, pending::<()>()).await, Err(CallFailure::NoReply));
        assert!(begun.elapsed() >= Duration::from_millis(50), "{:?}", begun.elapsed());
        let (pass, begun) = (circuit.enter(1, true).await.unwrap(), Stopwatch::start());
        let failed = run(&circuit, pass, Duration::from_millis(60), pending::<()>()).await;
        assert_eq!(failed, Err(CallFailure::NoReply));
        assert!(begun.elapsed() >= Duration::from_millis(110), "{:?}", begun.elapsed());
        let pass = circuit.enter(1, true).await.unwrap();
        assert_eq!(run(&circuit, pass, Duration::ZERO, ready(7)).await, Ok(7));
    });
}

#[test]
fn an_open_circuit_fails_calls_in_flight_and_in_the_queue_and_refuses_new_ones() {
    block_on(async {
        let circuit = closed(Duration::from_mins(1));
        let mut calls = JoinSet::new();
        for pass in fill(&circuit).await {
            let circuit = circuit.clone();
            calls.spawn(async move { run(&circuit, pass, Duration::ZERO, pending::<()>()).await });
        }
        let mut line = JoinSet::new();
        for _ in 0..100 {
            let circuit = circuit.clone();
            line.spawn(async move { circuit.enter(1, true).await.map(drop) });
        }
        wait_for(|| circuit.queued.load(Ordering::Relaxed) == 100).await;
        circuit.open();
        assert_eq!(calls.join_all().await, vec![Err(CallFailure::CircuitOpened); MAX_CALLS_IN_FLIGHT]);
        assert_eq!(line.join_all().await, vec![Err(CallRefusal::CircuitOpen); 100]);
        assert_eq!(circuit.enter(1, true).await.unwrap_err(), CallRefusal::CircuitOpen);
        assert_eq!(circuit.queued.load(Ordering::Relaxed), 0);
        circuit.close(2);
        assert_eq!(circuit.enter(1, true).await.unwrap_err(), CallRefusal::CircuitOpen, "the old connection");
        assert!(circuit.enter(2, true).await.is_ok(), "all permits are free again");
    });
}

#[test]
fn the_line_is_bounded_for_requests_and_not_for_the_task() {
    block_on(async {
        let circuit = closed(Duration::from_mins(1));
        let passes = fill(&circuit).await;
        let mut line = JoinSet::new();
        for _ in 0..MAX_QUEUED {
            let circuit = circuit.clone();
            line.spawn(async move { circuit.enter(1, true).await.map(drop) });
        }
        wait_for(|| circuit.queued.load(Ordering::Relaxed) == MAX_QUEUED).await;
        assert_eq!(circuit.enter(1, true).await.unwrap_err(), CallRefusal::LineFull);
        let task = circuit.clone();
        let task = tokio::spawn(async move { task.enter(1, false).await.map(drop) });
        drop(passes);
        assert!(line.join_all().await.iter().all(Result::is_ok));
        assert_eq!(task.await.unwrap(), Ok(()));
        assert!(circuit.enter(1, true).await.is_ok());
    });
}

#[test]
fn a_call_whose_caller_hangs_up_keeps_its_permit_until_the_reply() {
    block_on(async {
        let circuit = closed(Duration::from_mins(1));
        let (reply, replied) = oneshot::channel::<()>();
        let pass = circuit.enter(1, true).await.unwrap();
        let hung_up =
            tokio::time::timeout(Duration::from_millis(5), run(&circuit, pass, Duration::ZERO, replied));
        assert!(hung_up.await.is_err());
        sleep(Duration::from_millis(5)).await;
        assert_eq!(circuit.permits.available_permits(), MAX_CALLS_IN_FLIGHT - 1);
        reply.send(()).unwrap();
        wait_for(|| circuit.permits.available_permits() == MAX_CALLS_IN_FLIGHT).await;
        // If the connection is lost, there will be no reply.
        let pass = circuit.enter(1, true).await.unwrap();
        let hung_up = tokio::time::timeout(
            Duration::from_millis(5),
            run(&circuit, pass, Duration::ZERO, pending::<()>()),
        );
        assert!(hung_up.await.is_err());
        assert_eq!(circuit.permits.available_permits(), MAX_CALLS_IN_FLIGHT - 1);
        circuit.open();
        wait_for(|| circuit.permits.available_permits() == MAX_CALLS_IN_FLIGHT).await;
    });
}

proptest! {
    /// A connection that lasts is replaced at once, and one that is lost again and again at most every 1.5 s.
    #[test]
    fn pauses_grow_while_connections_are_lost_soon(lasted in prop::collection::vec(0_u64..3_000, 1..30)) {
        let (mut pause, mut before) = (ReconnectPause::default(), Duration::ZERO);
        for (n, lasted) in lasted.into_iter().map(Duration::from_millis).enumerate() {
            let next = pause.after(lasted);
            if lasted >= MIN_STABLE_TIME || n == 0 {
                prop_assert_eq!(next, Duration::ZERO);
            } else {
                prop_assert_eq!(next, (before * 2).clamp(RETRY_INTERVAL, MAX_RECONNECT_PAUSE));
            }
            before = next;
        }
    }
}
