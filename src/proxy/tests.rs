use super::answer::{DRAINS, MAX_DRAIN_TIME, MAX_DRAINS, outlive_caller};
use super::call::Call;
use super::*;
use crate::config::parse;
use crate::ledger::{Account, Demand};
use crate::quota::{Amounts, Subject};
use crate::server::CallerTimeouts;
use crate::telemetry::Metrics;
use bytes::Bytes;
use http::Method;
use std::future::pending;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::time::sleep;

/// All tests of this process share the drain permits, so tests that use them run one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

fn state(port: u16) -> Arc<State> {
    let text = format!(
        "upstreams: {{ u: {{ base_url: 'http://127.0.0.1:{port}/v1' }} }}\n\
         environments: {{ e: {{ upstream: u, on_disconnect: drain, quotas: {{ total_tokens: {{ limit: 1000, per: day }} }} }} }}\n\
         store: {{ memory: true }}\n"
    );
    let loaded = parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    Arc::new(State::new(Arc::new(loaded.config), crate::estimate::Models::default(), None).unwrap())
}

async fn charge(account: &Arc<Account>, metrics: &Arc<Metrics>) -> Charge {
    let subject = Subject { caller: None, model: "m" };
    let demand = Demand {
        subject,
        prompt: 8,
        generates: true,
        cap: Some(100),
        completions: 1,
        backends: &[],
        may_clamp: true,
    };
    let reservation = account.reserve(&demand, Duration::ZERO).await.unwrap();
    Charge { reservation: Some(reservation), record: Box::new(Record::begin(metrics.clone())) }
}

/// Polls an exchange for a short time, then drops it as if the caller had disconnected.
async fn begin_and_disconnect(exchange: impl Future<Output = Response<AnswerBody>>) {
    let mut exchange = Box::pin(exchange);
    tokio::select! {
        biased;
        _ = &mut exchange => panic!("there is no answer yet"),
        () = sleep(Duration::from_millis(20)) => {}
    }
}

async fn poll_once(exchange: &mut (impl Future<Output = Response<AnswerBody>> + Unpin)) {
    tokio::select! {
        biased;
        _ = exchange => panic!("there is no answer yet"),
        () = tokio::task::yield_now() => {}
    }
}

#[tokio::test]
async fn drains_are_limited_in_number_and_in_time() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let in_flight = Arc::new(());
    let exchanges = (0..=MAX_DRAINS).map(|_| {
        let held = in_flight.clone();
        outlive_caller(Dialect::OpenAi, async move {
            let answer = pending().await;
            drop(held);
            answer
        })
    });
    let mut exchanges: Vec<_> = exchanges.map(Box::pin).collect();
    for exchange in &mut exchanges {
        poll_once(exchange).await;
    }
    assert_eq!(Arc::strong_count(&in_flight) - 1, MAX_DRAINS + 1);
    drop(exchanges);
    sleep(Duration::from_millis(50)).await;
    assert_eq!(Arc::strong_count(&in_flight) - 1, MAX_DRAINS, "one found no permit and was aborted");
    sleep(MAX_DRAIN_TIME + Duration::from_millis(200)).await;
    assert_eq!(Arc::strong_count(&in_flight) - 1, 0);
    assert_eq!(DRAINS.available_permits(), MAX_DRAINS);
}

#[tokio::test]
async fn the_wait_for_the_head_and_the_reading_of_the_body_share_one_drain_deadline() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let state = state(listener.local_addr().unwrap().port());
    // The upstream sends the head late and never sends the body.
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let _ = socket.read(&mut [0; 4_096]).await;
        sleep(MAX_DRAIN_TIME * 3 / 4).await;
        let head =
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        socket.write_all(head).await.unwrap();
        pending::<()>().await;
    });
    let proxy = Proxy::new(state.clone(), &upstream::client_config().unwrap()).unwrap();
    let account = state.current().accounts[0].clone();
    let charge = charge(&account, &state.metrics).await;
    let outgoing = OutgoingRequest {
        lists_models: false,
        request: upstream::Request {
            method: Method::POST,
            target: "/v1/chat/completions".into(),
            headers: Vec::new(),
            body: Bytes::from_static(b"{}"),
        },
        upstream: 0,
        environment: state.current().config.environments[0].clone(),
        endpoint: Endpoint::Counted(crate::api::Api::Chat),
        alternatives: None,
        call: Box::new(Call::opaque(Bytes::new())),
        buffered: BufferedBytes::none(&state.bodies),
        outlives_caller: true,
        pass: None,
        received: Stopwatch::start(),
    };
    let peer = Arc::new(Peer::new(([127, 0, 0, 1], 9).into(), CallerTimeouts::default()));
    let exchange = async move {
        proxy.exchange(Box::new(outgoing), Box::default(), charge, Dialect::OpenAi, &peer).await
    };
    begin_and_disconnect(outlive_caller(Dialect::OpenAi, exchange)).await;
    let clock = Stopwatch::start();
    sleep(MAX_DRAIN_TIME / 2).await;
    assert_eq!(account.in_flight(), 1, "the exchange continues without its caller");
    while account.in_flight() > 0 {
        assert!(clock.elapsed() < MAX_DRAIN_TIME * 3 / 2, "the body has got a deadline of its own");
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(account.snapshot().totals.requests, 1);
}

/// Every connection holds the future of its request, and moves it several times.
#[test]
fn the_future_of_a_request_is_smaller_than_7_5_kib() {
    fn future_size<A, B, C, F>(_: impl FnOnce(A, B, C) -> F) -> usize {
        size_of::<F>()
    }
    let size = future_size(Proxy::serve);
    assert!(size < 7_680, "{size} bytes");
}

#[tokio::test]
async fn an_exchange_that_panics_settles_once_and_is_answered() {
    let state = state(9);
    let account = state.current().accounts[0].clone();
    let mut charge = charge(&account, &state.metrics).await;
    let answer = outlive_caller(Dialect::OpenAi, async move {
        charge.observe(Amounts::of_request(8, 3));
        tokio::task::yield_now().await;
        panic!("on purpose");
    })
    .await;
    assert_eq!(answer.status(), 500);
    let snapshot = account.snapshot();
    assert_eq!((snapshot.in_flight, snapshot.totals.requests, snapshot.totals.total), (0, 1, 11));
    assert_eq!(snapshot.levels[0].held, 0);
}
