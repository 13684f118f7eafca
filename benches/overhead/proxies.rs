//! Bare proxies that only forward. The benchmark compares the gateway with them.

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::uri::{Authority, Scheme};
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use socket2::{Domain, Socket, Type};
use std::net::SocketAddr;
use tokio::net::TcpListener;

const CORES: usize = 2;

pub(crate) fn run(role: &str, address: SocketAddr, upstream: SocketAddr) {
    let all_cores =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(CORES).enable_all().build().unwrap();
    match role {
        "pool" => all_cores().block_on(serve_hyper(address, upstream)),
        "reqwest" => all_cores().block_on(serve_reqwest(address, upstream)),
        "pool-percore" => {
            let threads: Vec<_> = (0..CORES)
                .map(|_| {
                    std::thread::spawn(move || {
                        let runtime =
                            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                        runtime.block_on(serve_hyper(address, upstream));
                    })
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().unwrap());
        }
        _ => panic!("there is no role {role}"),
    }
}

fn listen(address: SocketAddr) -> TcpListener {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(4_096).unwrap();
    TcpListener::from_std(socket.into()).unwrap()
}

/// A proxy made of hyper's server and hyper-util's pooled client.
async fn serve_hyper(address: SocketAddr, upstream: SocketAddr) {
    let listener = listen(address);
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client: Client<_, Incoming> =
        Client::builder(TokioExecutor::new()).pool_max_idle_per_host(4_096).set_host(false).build(connector);
    let host = HeaderValue::from_str(&upstream.to_string()).unwrap();
    let authority: Authority = upstream.to_string().parse().unwrap();
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        socket.set_nodelay(true).unwrap();
        let (client, host, authority) = (client.clone(), host.clone(), authority.clone());
        let service =
            service_fn(move |request| forward(client.clone(), host.clone(), authority.clone(), request));
        tokio::spawn(
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), service),
        );
    }
}

async fn forward(
    client: Client<HttpConnector, Incoming>,
    host: HeaderValue,
    authority: Authority,
    mut request: Request<Incoming>,
) -> Result<Response<Incoming>, hyper_util::client::legacy::Error> {
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(authority);
    *request.uri_mut() = Uri::from_parts(parts).unwrap();
    request.headers_mut().insert(header::HOST, host);
    client.request(request).await
}

/// A proxy made of axum's router and reqwest.
async fn serve_reqwest(address: SocketAddr, upstream: SocketAddr) {
    let client = reqwest::Client::builder()
        .pool_max_idle_per_host(4_096)
        .tcp_nodelay(true)
        .no_proxy()
        .build()
        .unwrap();
    let handler = move |request: axum::extract::Request| {
        let client = client.clone();
        async move {
            let (mut parts, body) = request.into_parts();
            let url = format!("http://{upstream}{}", parts.uri.path());
            parts.headers.remove(header::HOST);
            parts.headers.remove(header::CONTENT_LENGTH);
            let body: Bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
            let answer =
                client.request(parts.method, url).headers(parts.headers).body(body).send().await.unwrap();
            http::Response::<reqwest::Body>::from(answer).map(axum::body::Body::new)
        }
    };
    let app = axum::Router::new().fallback(handler);
    let listener = axum::serve::ListenerExt::tap_io(listen(address), |socket| {
        let _ = socket.set_nodelay(true);
    });
    axum::serve(listener, app).await.unwrap();
}
