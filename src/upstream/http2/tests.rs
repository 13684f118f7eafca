use super::*;
use h2::Reason;
use h2::server::{self, SendResponse};
use http::{HeaderName, HeaderValue, Method, Response};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::time::{Instant, timeout};

const SOON: Duration = Duration::from_secs(5);
const LONG: Duration = Duration::from_mins(1);
const SHORT: Duration = Duration::from_millis(100);

type Server = server::Connection<DuplexStream, Bytes>;

async fn connected(timeouts: Http2Timeouts) -> (Http2Client, Http2Stream, Server) {
    let (ours, theirs) = duplex(64 * 1024);
    let client = Http2Client::new(timeouts, Arc::default());
    let (stream, server) = tokio::join!(client.open(ours), server::handshake(theirs));
    (client, stream.unwrap(), server.unwrap())
}

fn request() -> Request {
    let headers = vec![(HeaderName::from_static("x-test"), HeaderValue::from_static("1"))];
    Request { method: Method::POST, target: "/v1/x".into(), headers, body: Bytes::from_static(b"{}") }
}

/// A request whose body is larger than the window of the server.
fn large_request() -> Request {
    Request { body: vec![b'x'; 1024 * 1024].into(), ..request() }
}

async fn exchange(stream: Http2Stream) -> Result<(response::Parts, Http2Body), ExchangeError> {
    timeout(SOON, stream.exchange("upstream", &request())).await.expect("the exchange ends soon")
}

fn answer(mut respond: SendResponse<Bytes>) {
    respond.send_response(Response::new(()), true).unwrap();
}

/// Answers the first request with `act`, and polls the connection until it ends.
async fn serve(mut server: Server, mut act: impl FnMut(SendResponse<Bytes>)) {
    while let Some(Ok((_, respond))) = server.accept().await {
        act(respond);
    }
}

#[tokio::test]
async fn a_silently_dropped_connection_is_closed_while_it_is_idle() {
    let timeouts = Http2Timeouts { ping_interval: SHORT, ping_timeout: SHORT, idle: LONG };
    let (client, stream, server) = connected(timeouts).await;
    let silent = tokio::spawn(async move {
        let mut server = server;
        answer(server.accept().await.unwrap().unwrap().1);
        let _ = timeout(SHORT / 2, server.accept()).await;
        // The connection is no longer polled, so it does not answer pings.
        server
    });
    drop(exchange(stream).await.unwrap());
    let _server = silent.await.unwrap();
    timeout(SOON, async {
        while client.reuse().is_some() {
            sleep(SHORT / 10).await;
        }
    })
    .await
    .expect("the connection is closed");
}

#[tokio::test]
async fn a_request_on_a_silently_dropped_connection_fails_soon_and_can_be_retried() {
    let timeouts = Http2Timeouts { ping_interval: SHORT, ping_timeout: SHORT, idle: LONG };
    let (_client, stream, _server) = connected(timeouts).await;
    let started = Instant::now();
    let error = exchange(stream).await.err().unwrap();
    assert!(error.is_retriable() && !error.is_not_processed(), "{error}");
    assert!(started.elapsed() < 10 * SHORT, "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_connection_is_closed_after_its_idle_timeout_but_not_while_it_has_a_stream() {
    let timeouts = Http2Timeouts { ping_interval: LONG, ping_timeout: LONG, idle: SHORT };
    let (client, stream, server) = connected(timeouts).await;
    let server = tokio::spawn(serve(server, answer));
    let answer = exchange(stream).await.unwrap();
    sleep(3 * SHORT).await;
    assert!(client.reuse().is_some(), "it has a stream");
    drop(answer);
    assert!(client.reuse().is_some(), "it was used just now");
    timeout(SOON, server).await.expect("the connection is closed").unwrap();
    assert!(client.reuse().is_none());
}

#[tokio::test]
async fn a_refused_stream_counts_as_not_processed_and_a_cancelled_one_does_not() {
    let timeouts = Http2Timeouts { ping_interval: LONG, ping_timeout: LONG, idle: LONG };
    for (reason, is_not_processed) in
        [(Reason::REFUSED_STREAM, true), (Reason::CANCEL, false), (Reason::INTERNAL_ERROR, false)]
    {
        let (_client, stream, server) = connected(timeouts).await;
        tokio::spawn(serve(server, move |mut respond| respond.send_reset(reason)));
        let error = exchange(stream).await.err().unwrap();
        assert_eq!(error.is_not_processed(), is_not_processed, "{error}");
        assert_eq!(error.is_retriable(), is_not_processed, "{error}");
    }
}

/// Writes a frame with these payload bytes on stream 0.
async fn write_frame(socket: &mut DuplexStream, kind: u8, payload: &[u8]) {
    let length = u8::try_from(payload.len()).unwrap();
    let frame = [&[0, 0, length, kind, 0, 0, 0, 0, 0], payload].concat();
    socket.write_all(&frame).await.unwrap();
}

#[tokio::test]
async fn a_stream_after_a_goaway_counts_as_not_processed_and_one_before_it_does_not() {
    const SETTINGS: u8 = 4;
    const GOAWAY: u8 = 7;
    for (last_stream, is_not_processed) in [(0, true), (1, false)] {
        let (ours, mut theirs) = duplex(64 * 1024);
        let timeouts = Http2Timeouts { ping_interval: LONG, ping_timeout: LONG, idle: LONG };
        let client = Http2Client::new(timeouts, Arc::default());
        tokio::spawn(async move {
            write_frame(&mut theirs, SETTINGS, &[]).await;
            let mut read = Vec::new();
            // The header of a HEADERS frame on stream 1.
            while !read.windows(6).any(|bytes| bytes == [1, 4, 0, 0, 0, 1]) {
                theirs.read_buf(&mut read).await.unwrap();
            }
            write_frame(&mut theirs, GOAWAY, &[0, 0, 0, last_stream, 0, 0, 0, 0]).await;
            sleep(SHORT).await;
        });
        let error = exchange(client.open(ours).await.unwrap()).await.err().unwrap();
        assert_eq!(error.is_not_processed(), is_not_processed, "{last_stream} {error}");
        assert!(error.is_retriable(), "{error}");
    }
}

#[tokio::test]
async fn an_answer_may_have_many_headers_up_to_64_kib() {
    let timeouts = Http2Timeouts { ping_interval: LONG, ping_timeout: LONG, idle: LONG };
    for (headers, is_accepted) in [(400, true), (600, false)] {
        let (_client, stream, server) = connected(timeouts).await;
        tokio::spawn(serve(server, move |mut respond| {
            let mut answer = Response::new(());
            for n in 0..headers {
                let name = HeaderName::from_bytes(format!("x-{n}").as_bytes()).unwrap();
                answer.headers_mut().insert(name, HeaderValue::from_static(TEXT));
            }
            respond.send_response(answer, true).unwrap();
        }));
        let answer = exchange(stream).await;
        let received = answer.ok().map(|(parts, _)| parts.headers.len());
        assert_eq!(received, is_accepted.then_some(headers));
    }
}

/// Each header with this value counts as some 140 bytes.
const TEXT: &str =
    "a header value of one hundred bytes, which is longer than most values of headers in an answer are...";

/// The whole body of an answer.
async fn read(body: &mut Http2Body) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(data) = timeout(SOON, poll_fn(|cx| body.poll_data(cx))).await.expect("the answer arrives")
    {
        all.extend_from_slice(&data?);
    }
    Ok(all)
}

const UNTIMED: Http2Timeouts = Http2Timeouts { ping_interval: LONG, ping_timeout: LONG, idle: LONG };

#[tokio::test]
async fn many_small_pieces_that_wait_do_not_end_the_connection() {
    let (_client, stream, server) = connected(UNTIMED).await;
    let pieces = 2_000;
    tokio::spawn(serve(server, move |mut respond| {
        let mut body = respond.send_response(Response::new(()), false).unwrap();
        for n in 1..=pieces {
            body.send_data(Bytes::from_static(b"data: {\"text\":\"a word\"}\n\n"), n == pieces).unwrap();
        }
    }));
    let (_, mut body) = exchange(stream).await.unwrap();
    // Meanwhile all pieces arrive.
    sleep(2 * SHORT).await;
    assert_eq!(read(&mut body).await.unwrap().len(), 25 * pieces);
}

#[tokio::test]
async fn an_answer_that_is_not_read_does_not_stop_the_others() {
    let (client, stream, server) = connected(UNTIMED).await;
    tokio::spawn(serve(server, |mut respond| {
        // The piece is larger than the window of a stream.
        let mut body = respond.send_response(Response::new(()), false).unwrap();
        body.send_data(vec![b'x'; 2 * STREAM_WINDOW as usize].into(), true).unwrap();
    }));
    let _unread = exchange(stream).await.unwrap();
    for _ in 0..3 {
        let _also_unread = exchange(client.reuse().unwrap()).await.unwrap();
        let (_, mut body) = exchange(client.reuse().unwrap()).await.unwrap();
        assert_eq!(read(&mut body).await.unwrap().len(), 2 * STREAM_WINDOW as usize);
    }
}

#[tokio::test]
async fn a_request_that_the_upstream_has_no_stream_for_needs_another_connection() {
    let (ours, theirs) = duplex(64 * 1024);
    let client = Http2Client::new(UNTIMED, Arc::default());
    let (stream, server) = tokio::join!(
        client.open(ours),
        server::Builder::new().max_concurrent_streams(2).handshake::<_, Bytes>(theirs)
    );
    tokio::spawn(serve(server.unwrap(), answer));
    let first = exchange(stream.unwrap()).await.unwrap();
    let second = client.reuse().unwrap();
    assert!(client.reuse().is_none(), "all streams are in use");
    // As if the upstream had allowed more when the request got its stream.
    let third = lock(&client.shared)[0].stream(&client.shared, false);
    let error = exchange(third).await.err().unwrap();
    assert!(error.is_not_processed(), "{error}");
    let second = exchange(second).await.unwrap();
    drop((first, second));
    exchange(client.reuse().expect("streams are free again")).await.unwrap();
}

#[tokio::test]
async fn an_answer_is_complete_only_if_the_upstream_has_ended_it() {
    for (ends, is_complete) in [(true, true), (false, false)] {
        let (_client, stream, server) = connected(UNTIMED).await;
        tokio::spawn(serve(server, move |mut respond| {
            let mut body = respond.send_response(Response::new(()), false).unwrap();
            body.send_data(Bytes::from_static(b"{}"), ends).unwrap();
            tokio::spawn(async move {
                sleep(SHORT).await;
                body.send_reset(Reason::NO_ERROR);
            });
        }));
        // The body is not sent completely when the answer ends.
        let request = large_request();
        let (_, mut body) = timeout(SOON, stream.exchange("upstream", &request)).await.unwrap().unwrap();
        sleep(2 * SHORT).await;
        let read = read(&mut body).await;
        assert_eq!(read.is_ok(), is_complete, "{read:?}");
    }
}
