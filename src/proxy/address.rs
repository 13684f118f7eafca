//! The caller's address: that of its connection, or behind a trusted proxy the one that the proxy reports.

use http::header::HeaderMap;
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};

/// The header in which each proxy appends the address from which it got the request.
const FORWARDED_FOR: &str = "x-forwarded-for";

/// The caller's address. `peer`: the address of the connection. `trusted`: the networks of trusted proxies.
///
/// Every entry of the header was written by the hop to its right. So the entries are read from the right, as long as that
/// hop is trusted. An entry that is not an address ends this: the hop to its right is then the last known one.
pub(super) fn of(headers: &HeaderMap, peer: IpAddr, trusted: &[IpNet]) -> IpAddr {
    let peer = peer.to_canonical();
    if trusted.is_empty() {
        return peer;
    }
    let is_trusted = |address: &IpAddr| trusted.iter().any(|network| network.contains(address));
    let lines: Vec<&str> =
        headers.get_all(FORWARDED_FOR).iter().map(|line| line.to_str().unwrap_or_default()).collect();
    let mut hops = lines.iter().rev().flat_map(|line| line.rsplit(','));
    let mut address = peer;
    while is_trusted(&address) {
        let Some(hop) = hops.next().and_then(parse) else { break };
        address = hop;
    }
    address
}

/// An address, with or without a port.
fn parse(hop: &str) -> Option<IpAddr> {
    let hop = hop.trim();
    let bare = hop.strip_prefix('[').and_then(|hop| hop.strip_suffix(']')).unwrap_or(hop);
    let address = bare.parse().ok().or_else(|| hop.parse::<SocketAddr>().ok().map(|socket| socket.ip()));
    address.map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn the_last_hop_that_is_not_trusted_is_the_caller() {
        let trusted = ["10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32"].map(|text| text.parse().unwrap());
        for (peer, lines, want) in [
            ("10.0.0.1", &["198.51.100.9"][..], "198.51.100.9"),
            ("10.0.0.1", &["203.0.113.1, 198.51.100.9, 10.1.1.1,192.0.2.7"], "198.51.100.9"),
            ("10.0.0.1", &["203.0.113.1", "198.51.100.9", "10.1.1.1"], "198.51.100.9"),
            // Another address is not believed.
            ("198.51.100.1", &["203.0.113.1"], "198.51.100.1"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["10.0.0.2, 10.0.0.3"], "10.0.0.2"),
            ("10.0.0.1", &["203.0.113.1, unknown, 10.0.0.3"], "10.0.0.3"),
            ("10.0.0.1", &[""], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.9:4711"], "198.51.100.9"),
            ("2001:db8::1", &["[2001:db9::5]:4711"], "2001:db9::5"),
            ("2001:db8::1", &["[2001:db9::5]"], "2001:db9::5"),
            ("::ffff:10.0.0.1", &["::ffff:198.51.100.9"], "198.51.100.9"),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(FORWARDED_FOR, HeaderValue::from_static(line));
            }
            assert_eq!(of(&headers, peer.parse().unwrap(), &trusted).to_string(), want, "{peer} {lines:?}");
        }
    }
}
