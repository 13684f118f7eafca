//! Connections with TLS and HTTP/2 when a new process takes over.

use super::gateway::Place;
use super::load::{JSON, STREAM};
use super::upstream::Upstream;
use bytes::Bytes;
use h2::client::SendRequest;
use http::{Request, Response};
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// Connects with HTTP/2 over TLS.
async fn connect(
    port: u16,
    config: &Arc<ClientConfig>,
) -> (SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>) {
    let socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let connector = TlsConnector::from(config.clone());
    let stream = connector.connect("localhost".try_into().unwrap(), socket).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    (send, tokio::spawn(connection))
}

async fn post(send: &mut SendRequest<Bytes>, body: &str) -> Response<h2::RecvStream> {
    let request = Request::post("https://localhost/v1/chat/completions").body(()).unwrap();
    *send = send.clone().ready().await.unwrap();
    let (answer, mut stream) = send.send_request(request, false).unwrap();
    stream.send_data(Bytes::copy_from_slice(body.as_bytes()), true).unwrap();
    answer.await.unwrap()
}

async fn text(answer: Response<h2::RecvStream>) -> String {
    let (mut stream, mut text) = (answer.into_body(), Vec::new());
    while let Some(data) = stream.data().await {
        let data = data.unwrap();
        stream.flow_control().release_capacity(data.len()).unwrap();
        text.extend_from_slice(&data);
    }
    String::from_utf8(text).unwrap()
}

/// Waits for the end of a connection. The last frames of the client may meet a socket that the gateway has closed.
async fn end_of(connection: JoinHandle<Result<(), h2::Error>>) {
    let ended = tokio::time::timeout(Duration::from_secs(10), connection).await.unwrap().unwrap();
    let is_closed = |error: &h2::Error| {
        let kind = error.get_io().map(std::io::Error::kind);
        matches!(kind, Some(ErrorKind::BrokenPipe | ErrorKind::ConnectionReset))
    };
    assert!(ended.as_ref().err().is_none_or(is_closed), "{ended:?}");
}

#[test]
fn streams_over_http2_and_tls_end_at_the_old_process_and_new_requests_go_to_the_new_one() {
    let (upstream, port) = Upstream::start();
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(at("key.pem"), made.signing_key.serialize_pem()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let config = Arc::new(config);
    let server = format!(
        "drain_timeout: 20s, tls: {{ cert: '{}', key: '{}' }}",
        at("cert.pem").display(),
        at("key.pem").display()
    );
    let place =
        Place::new(port, &server, "quotas: { total_tokens: { limit: 1M, per: day } }", "path: '@/t.db'");
    let mut first = place.start();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (mut send, connection) = runtime.block_on(connect(place.port, &config));
    let held = STREAM.replace("\"stream\":true", "\"stream\":true,\"user\":\"held\"");
    let answer = runtime.block_on(post(&mut send, &held));
    assert_eq!(answer.status(), 200);
    let idle = runtime.block_on(connect(place.port, &config));
    let _second = place.start();
    // The idle connection ends, and the stream continues.
    runtime.block_on(end_of(idle.1));
    let (mut other, _) = runtime.block_on(connect(place.port, &config));
    let second = runtime.block_on(async { text(post(&mut other, JSON).await).await });
    assert!(second.contains("\"usage\""), "{second}");
    upstream.is_released.store(true, SeqCst);
    let streamed = runtime.block_on(text(answer));
    assert!(streamed.ends_with("data: [DONE]\n\n"), "{streamed}");
    // The old process closes the connection after its last stream, and ends.
    runtime.block_on(end_of(connection));
    assert_eq!(first.exit_code(Duration::from_secs(10)), Some(0), "{}", first.log());
    assert_eq!(place.settled()["totals"]["requests"], 2);
}
