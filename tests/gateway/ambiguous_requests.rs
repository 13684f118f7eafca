//! Requests that other servers could read differently: they are refused, and what follows them on the connection is never
//! taken for a request. The cases are from RFC 9112 and from known attacks on proxies.

use crate::support::*;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Heads that are refused, on both listeners. `{T}` is the path, `{N}` the length of the body.
const HEADS: &[&str] = &[
    // Two lengths.
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\nTransfer-Encoding: chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\nTransfer-Encoding: identity\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\nContent-Length: 0\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: 0\r\ncontent-length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}, {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N},\r\n\r\n",
    "GET {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\nTransfer-Encoding: chunked\r\n\r\n",
    // Lengths that are no numbers.
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: +{N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: -1\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: 0x10\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}.0\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: 1_0\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: 1 0\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: \"{N}\"\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N};\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length:\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: 18446744073709551616\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: 99999999999999999999999999999999\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: \u{661}\r\n\r\n",
    // Transfer codings.
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: identity, chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: identity\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: gzip\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding:\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: ,chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked,\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked;q=1\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: \"chunked\"\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: \u{b}chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding : chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding\t: chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\n Transfer-Encoding: chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding:\r\n chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nX: y\r\n\tTransfer-Encoding: chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer_Encoding: chunked\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent_Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.0\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n",
    "POST {T} HTTP/1.0\r\nHost: g\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\nContent-Length: {N}\r\n\r\n",
    // Line ends.
    "POST {T} HTTP/1.1\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\n",
    "POST {T} HTTP/1.1\nHost: g\nContent-Length: {N}\n\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nX: a\rContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nX: a\r\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\rHost: g\r\nContent-Length: {N}\r\n\r\n",
    "\nPOST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "\rPOST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    " \r\nPOST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    // The first line.
    "POST  {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T}  HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    " POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1 \r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST\t{T}\tHTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1 x\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/2.0\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.2\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/0.9\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.10\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} http/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/11\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T}\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "GET {T}\r\n\r\n",
    "POST HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "PO(ST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "P\0ST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    // Targets.
    "POST {T}#x HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T}\0 HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T}\u{7f} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST http://evil{T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST http://g:81{T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST http://g@evil{T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST http://a@g{T} HTTP/1.1\r\nHost: a@g\r\nContent-Length: {N}\r\n\r\n",
    "POST https://g{T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST ftp://g{T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST file://{T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST g{T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST g:80 HTTP/1.1\r\nHost: g:80\r\nContent-Length: {N}\r\n\r\n",
    "POST * HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "CONNECT g:80 HTTP/1.1\r\nHost: g:80\r\n\r\n",
    "TRACE {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "TRACE {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n",
    // Hosts.
    "POST {T} HTTP/1.1\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nHost: g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nhost: evil\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost:\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g/?x=\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g/#\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: a@b\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g, evil\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g evil\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: http://g\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g:x\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g:99999\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g:80:80\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: [::1\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\\evil\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost : g\r\nContent-Length: {N}\r\n\r\n",
    // Header names and values.
    "POST {T} HTTP/1.1\r\nHost: g\r\n: x\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nno-colon\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length : {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nX@Y: 1\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nX\u{e9}: 1\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nX: a\0b\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nX: a\u{7f}b\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nX: a\r\n b\r\nContent-Length: {N}\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nX\0: a\r\nContent-Length: {N}\r\n\r\n",
];

/// Chunked bodies that are refused. `{B}` is the body, `{X}` its length in hexadecimal.
const CHUNKS: &[&str] = &[
    "0x{X}\r\n{B}\r\n0\r\n\r\n",
    "+{X}\r\n{B}\r\n0\r\n\r\n",
    "-{X}\r\n{B}\r\n0\r\n\r\n",
    " {X}\r\n{B}\r\n0\r\n\r\n",
    "{X} \r\n{B}\r\n0\r\n\r\n",
    "{X}\t;x\r\n{B}\r\n0\r\n\r\n",
    "{X}\n{B}\r\n0\r\n\r\n",
    "{X}\r{B}\r\n0\r\n\r\n",
    "{X}\r\n{B}\n0\r\n\r\n",
    "{X}\r\n{B}0\r\n\r\n",
    "{X}\r\n{B}x\r\n0\r\n\r\n",
    "{X};x=y\n{B}\r\n0\r\n\r\n",
    "{X};x=\"\n\"\r\n{B}\r\n0\r\n\r\n",
    "{X};\u{0}\r\n{B}\r\n0\r\n\r\n",
    "\r\n{X}\r\n{B}\r\n0\r\n\r\n",
    "1000000000000000{X}\r\n{B}\r\n0\r\n\r\n",
    "10000000000000000{X}\r\n{B}\r\n0\r\n\r\n",
    "G\r\n{B}\r\n0\r\n\r\n",
    "{X}\r\n{B}\r\n0\n\r\n",
    "{X}\r\n{B}\r\n0\r\n\n",
    "{X}\r\n{B}\r\n0\r\nx: y\n\r\n",
    "{X}\r\n{B}\r\n0\r\n x: y\r\n\r\n",
    "{X}\r\n{B}\r\n0\r\nx: \0\r\n\r\n",
];

/// Requests that are served, and after which the next request on the connection is served too.
const SERVED: &[&str] = &[
    "POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n{B}",
    "\r\n\r\nPOST {T} HTTP/1.1\r\nHost: g:8080\r\nContent-Length: 00{N}\r\n\r\n{B}",
    "POST http://g{T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\n\r\n{B}",
    "POST {T} HTTP/1.1\r\nhOST:\t[::1]:80 \r\nX-Y_Z: \u{e9} \t,\r\ncontent-length:{N}\r\n\r\n{B}",
    "POST {T} HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: {N}\r\n\r\n{B}",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: CHUNKED\r\n\r\n{X}\r\n{B}\r\n0\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n000{X};a=\"b;c\";d\r\n{B}\r\n000;x\r\nx-trailer: 1\r\n\r\n",
    "POST {T} HTTP/1.1\r\nHost: g\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: {N}\r\n\r\n{B}",
];

fn filled(request: &str, path: &str) -> String {
    let (length, size) = (HELLO.len().to_string(), format!("{:x}", HELLO.len()));
    request.replace("{T}", path).replace("{N}", &length).replace("{X}", &size).replace("{B}", HELLO)
}

/// A request that a server would see which takes the bytes in front of it for a complete request.
fn next_request(path: &str) -> String {
    filled("POST {T} HTTP/1.1\r\nhost: gateway\r\ncontent-length: {N}\r\n\r\n{B}", path)
}

/// Sends these bytes in two pieces, the first of this length, and reads to the end of the connection. Returns the status of each answer.
async fn statuses(address: SocketAddr, bytes: &[u8], cut: usize) -> Vec<u16> {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.set_nodelay(true).unwrap();
    let _ = socket.write_all(&bytes[..cut]).await;
    if cut > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let _ = socket.write_all(&bytes[cut..]).await;
    let mut all = Vec::new();
    // A reset after the answer is no fault.
    let _ = soon("the end of the connection", socket.read_to_end(&mut all)).await;
    let text = String::from_utf8_lossy(&all).into_owned();
    let heads = text.split("HTTP/1.").skip(1);
    heads.filter_map(|head| head.get(2..5)?.parse().ok()).collect()
}

#[tokio::test]
async fn an_ambiguous_request_is_refused_and_nothing_after_it_is_a_request() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 100000, per: minute } }").await;
    let heads = HEADS.iter().map(|head| format!("{head}{{B}}"));
    let chunked = "POST {T} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n";
    let requests: Vec<String> =
        heads.chain(CHUNKS.iter().map(|chunks| format!("{chunked}{chunks}"))).collect();
    assert!(requests.len() >= 107, "{}", requests.len());
    for request in requests {
        let bytes = format!("{}{}", filled(&request, CHAT), next_request(CHAT));
        for cut in [0, 20, bytes.len() / 3] {
            let answers = statuses(gateway.address, bytes.as_bytes(), cut).await;
            assert_eq!(answers, [400], "{request:?}, after {cut} bytes");
        }
        assert!(upstream.seen().is_empty(), "{request:?}");
    }
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
}

#[tokio::test]
async fn an_ambiguous_request_behind_a_valid_one_is_refused() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 100000, per: minute } }").await;
    let heads: Vec<&&str> = HEADS.iter().step_by(10).collect();
    for head in &heads {
        let bytes = format!("{}{}{HELLO}{0}", next_request(CHAT), filled(head, CHAT));
        assert_eq!(statuses(gateway.address, bytes.as_bytes(), 0).await, [200, 400], "{head:?}");
    }
    assert_eq!(upstream.seen().len(), heads.len());
}

#[tokio::test]
async fn the_admin_listener_refuses_ambiguous_heads_too() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 9, per: minute } }").await;
    // Health checks need not name a host.
    let names_host =
        |head: &&&str| head.to_ascii_lowercase().contains("host:") && !head.contains("Host:\r\n");
    for head in HEADS.iter().filter(names_host) {
        let head = filled(head, "/livez");
        let bytes = format!("{head}GET /livez HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!(statuses(gateway.admin, bytes.as_bytes(), 0).await, [400], "{head:?}");
    }
}

#[tokio::test]
async fn an_unusual_but_valid_request_is_served_and_so_is_the_next_one() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 100, per: minute } }").await;
    for (n, request) in SERVED.iter().enumerate() {
        for m in 0..2 {
            let last = next_request(CHAT).replace("host:", "connection: close\r\nhost:");
            let bytes = format!("{}{last}", filled(request, CHAT));
            let answers = statuses(gateway.address, bytes.as_bytes(), m * bytes.len() / 3).await;
            assert_eq!(answers, [200, 200], "{request:?}");
            let seen = upstream.seen();
            assert_eq!(seen.len(), 4 * n + 2 * (m + 1), "{request:?}");
            assert!(seen.iter().all(|seen| seen.text() == HELLO), "{request:?}");
        }
    }
}

#[tokio::test]
async fn a_refused_head_names_its_fault() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 9, per: minute } }").await;
    let mut caller = gateway.caller().await;
    let head =
        filled("POST {T} HTTP/1.1\r\nHost: g\r\nContent-Length: {N}\r\nContent-Length: {N}\r\n\r\n", CHAT);
    caller.send(head.as_bytes()).await;
    let reply = caller.reply().await;
    assert_eq!((reply.refusal(), reply.header("connection")), ((400, "bad_request".into()), Some("close")));
    assert!(reply.text().contains("more than one Content-Length"), "{}", reply.text());
    // An upgrade would make the rest of the connection opaque.
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\n";
    assert_eq!(gateway.send("POST", CHAT, upgrade, HELLO).await.refusal(), (400, "bad_request".into()));
    assert!(upstream.seen().is_empty());
}
