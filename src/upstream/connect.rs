//! TCP connections: name resolution and Happy Eyeballs (RFC 8305), so that one address that drops packets does
//! not make every connection time out.

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::sleep;

/// If an attempt has no result after this time, an attempt to the next address starts in parallel (RFC 8305, section
/// 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// The addresses of a host, in the order in which they are tried. The caller bounds the time.
pub(super) async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok(alternate_families(lookup_host((host, port)).await?.collect()))
}

/// Connects to the first of these addresses that accepts. The caller bounds the time.
pub(super) async fn connect_to(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let stream = connect_to_any(addresses).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Orders addresses so that IPv6 and IPv4 alternate. The first one stays first, and the resolver's order is preserved
/// within a family.
fn alternate_families(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let Some(first) = addresses.first().copied() else { return addresses };
    let count = addresses.len();
    let is_preferred = |address: &SocketAddr| address.is_ipv6() == first.is_ipv6();
    let (preferred, other): (Vec<_>, Vec<_>) = addresses.into_iter().partition(is_preferred);
    let (mut preferred, mut other) = (preferred.into_iter(), other.into_iter());
    let pairs = std::iter::repeat_with(|| [preferred.next(), other.next()]);
    pairs.take(count).flatten().flatten().collect()
}

/// Starts an attempt to the next address whenever the last one has failed, or has no result after
/// `ATTEMPT_DELAY`. The first connection wins; the other attempts are dropped. If all attempts fail, the error
/// is that of the first one.
async fn connect_to_any(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut addresses = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut first_error = None;
    loop {
        attempts.extend(addresses.next().map(TcpStream::connect));
        tokio::select! {
            result = attempts.next() => match result {
                Some(Ok(stream)) => return Ok(stream),
                Some(Err(error)) => drop(first_error.get_or_insert(error)),
                None => {
                    let unresolved = || io::Error::new(ErrorKind::NotFound, "the host name has no address");
                    return Err(first_error.unwrap_or_else(unresolved));
                }
            },
            () = sleep(ATTEMPT_DELAY), if addresses.len() > 0 => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketType};
    use std::net::{Ipv4Addr, TcpListener, TcpStream as BlockingStream};
    use tokio::time::{Instant, timeout};

    const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    /// An address that does not answer: the kernel drops the connection requests of a listener whose backlog is
    /// full. It does so while the returned sockets live.
    fn black_hole() -> (SocketAddr, TcpListener, Vec<BlockingStream>) {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &ANY).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let listener = TcpListener::from(socket);
        let address = listener.local_addr().unwrap();
        let connect = |_| BlockingStream::connect_timeout(&address, Duration::from_millis(200)).ok();
        let accepted = (0..64).map_while(connect).collect();
        (address, listener, accepted)
    }

    #[tokio::test]
    async fn an_address_that_drops_packets_does_not_delay_the_next_one_for_long() {
        let (hole, _listener, _accepted) = black_hole();
        let listener = TcpListener::bind(ANY).unwrap();
        let live = listener.local_addr().unwrap();
        let started = Instant::now();
        let connected = timeout(Duration::from_secs(5), connect_to_any(vec![hole, hole, live])).await;
        assert_eq!(connected.expect("no timeout").unwrap().peer_addr().unwrap(), live);
        assert!(started.elapsed() >= 2 * ATTEMPT_DELAY, "{:?}", started.elapsed());
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn the_next_address_is_tried_at_once_after_a_refusal() {
        let refusing = TcpListener::bind(ANY).unwrap().local_addr().unwrap();
        let listener = TcpListener::bind(ANY).unwrap();
        let live = listener.local_addr().unwrap();
        let started = Instant::now();
        let connected = connect_to_any(vec![refusing, refusing, live]).await.unwrap();
        assert_eq!(connected.peer_addr().unwrap(), live);
        assert!(started.elapsed() < ATTEMPT_DELAY, "{:?}", started.elapsed());
        let error = connect_to_any(vec![refusing, refusing]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(connect_to_any(Vec::new()).await.unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn address_families_alternate_and_the_first_address_stays_first() {
        let all = |text: &str| -> Vec<SocketAddr> { text.split(' ').map(|a| a.parse().unwrap()).collect() };
        for (given, ordered) in [
            ("[::1]:1 [::2]:1 [::3]:1 1.1.1.1:1 2.2.2.2:1", "[::1]:1 1.1.1.1:1 [::2]:1 2.2.2.2:1 [::3]:1"),
            ("1.1.1.1:1 [::1]:1 [::2]:1", "1.1.1.1:1 [::1]:1 [::2]:1"),
            ("1.1.1.1:1 2.2.2.2:1", "1.1.1.1:1 2.2.2.2:1"),
        ] {
            assert_eq!(alternate_families(all(given)), all(ordered));
        }
        assert!(alternate_families(Vec::new()).is_empty());
    }
}
