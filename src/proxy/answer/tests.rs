use super::super::call::Call;
use super::super::headers::Told;
use super::super::route::Endpoint;
use super::super::{Charge, Forward, Proxy, State};
use super::*;
use crate::config::parse;
use crate::ledger::{Account, Demand};
use crate::quota::{Amounts, Subject};
use crate::server::{Patience, Peer};
use crate::telemetry::{Metrics, Record};
use crate::upstream;
use http::Method;
use std::future::pending;
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::time::sleep;

/// The places are one for all tests of this process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

fn state(port: u16) -> Arc<State> {
    let text = format!(
        "upstreams: {{ u: {{ base_url: 'http://127.0.0.1:{port}/v1' }} }}\n\
         environments: {{ e: {{ upstream: u, on_disconnect: drain, quotas: {{ total_tokens: {{ limit: 1000, per: day }} }} }} }}\n\
         store: {{ memory: true }}\n"
    );
    let loaded = parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    Arc::new(State::new(Arc::new(loaded.config), None).unwrap())
}

fn charge(account: &Arc<Account>, metrics: &Arc<Metrics>) -> Charge {
    let subject = Subject { caller: None, model: "m" };
    let demand = Demand { subject, prompt: 8, generates: true, cap: Some(100), completions: 1 };
    Charge { reservation: Some(account.reserve(&demand).unwrap()), record: Record::begin(metrics.clone()) }
}

/// Takes the first steps of an exchange and hangs up.
async fn begin_and_hang_up(exchange: impl Future<Output = Response<AnswerBody>>) {
    let mut exchange = Box::pin(exchange);
    tokio::select! {
        biased;
        _ = &mut exchange => panic!("there is no answer yet"),
        () = sleep(Duration::from_millis(20)) => {}
    }
}

#[tokio::test]
async fn no_more_than_a_hundred_are_drained_at_once_and_none_for_longer_than_it_may_last() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let under_way = Arc::new(());
    let exchanges = (0..=MOST_DRAINED).map(|_| {
        let held = under_way.clone();
        outlive_caller(Dialect::OpenAi, async move {
            let answer = pending().await;
            drop(held);
            answer
        })
    });
    let mut exchanges: Vec<_> = exchanges.map(Box::pin).collect();
    for exchange in &mut exchanges {
        begin_and_hang_up_soon(exchange).await;
    }
    assert_eq!(Arc::strong_count(&under_way) - 1, MOST_DRAINED + 1);
    drop(exchanges);
    sleep(Duration::from_millis(50)).await;
    assert_eq!(Arc::strong_count(&under_way) - 1, MOST_DRAINED, "one has found no place");
    sleep(LONGEST_DRAIN + Duration::from_millis(200)).await;
    assert_eq!(Arc::strong_count(&under_way) - 1, 0);
    assert_eq!(DRAINS.available_permits(), MOST_DRAINED);
}

/// Polls it once.
async fn begin_and_hang_up_soon(exchange: &mut (impl Future<Output = Response<AnswerBody>> + Unpin)) {
    tokio::select! {
        biased;
        _ = exchange => panic!("there is no answer yet"),
        () = tokio::task::yield_now() => {}
    }
}

#[tokio::test]
async fn waiting_for_an_answer_and_reading_it_take_one_time_together() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let state = state(listener.local_addr().unwrap().port());
    // The answer's head comes late, and its body never.
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let _ = socket.read(&mut [0; 4_096]).await;
        sleep(LONGEST_DRAIN * 3 / 4).await;
        let head =
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        socket.write_all(head).await.unwrap();
        pending::<()>().await;
    });
    let proxy = Proxy::new(state.clone(), &upstream::client_config().unwrap()).unwrap();
    let account = state.accounts[0].clone();
    let charge = charge(&account, &state.metrics);
    let forward = Forward {
        request: upstream::Request {
            method: Method::POST,
            target: "/v1/chat/completions".into(),
            headers: Vec::new(),
            body: Bytes::from_static(b"{}"),
        },
        upstream: 0,
        environment: state.config.environments[0].clone(),
        endpoint: Endpoint::Counted(crate::api::Api::Chat),
        call: Call::unread(Bytes::new()),
        received: Stopwatch::start(),
    };
    let peer = Peer::new(([127, 0, 0, 1], 9).into(), Patience::default());
    let exchange = async move { proxy.exchange(forward, charge, Told::default(), &peer).await };
    begin_and_hang_up(outlive_caller(Dialect::OpenAi, exchange)).await;
    let clock = Stopwatch::start();
    sleep(LONGEST_DRAIN / 2).await;
    assert_eq!(account.in_flight(), 1, "it goes on without its caller");
    while account.in_flight() > 0 {
        assert!(clock.elapsed() < LONGEST_DRAIN * 3 / 2, "its body has been given another time");
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(account.snapshot().totals.requests, 1);
}

#[tokio::test]
async fn an_exchange_that_panics_settles_once_and_is_answered() {
    let state = state(9);
    let account = state.accounts[0].clone();
    let mut charge = charge(&account, &state.metrics);
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
