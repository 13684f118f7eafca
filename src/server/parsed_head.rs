//! The hosts that a parsed request head names. For HTTP/1.1, `request_check` checks the host before the head is parsed.

use super::is_host;
use http::header::{self, HeaderMap};
use http::{Uri, Version};

/// Refuses a head from which two servers could read different hosts. `requires_host`: whether HTTP/1.1 must name one.
///
/// # Errors
/// The reason, which follows "The request head is not accepted: ".
pub(crate) fn check_hosts(
    headers: &HeaderMap,
    uri: &Uri,
    version: Version,
    requires_host: bool,
) -> Result<(), &'static str> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err("it has more than one Host header");
    }
    if host.is_none() && requires_host && version == Version::HTTP_11 {
        return Err("it has no Host header");
    }
    // For HTTP/1.1 this was checked before the head was parsed.
    if version == Version::HTTP_2 && host.is_some_and(|host| !is_host(host.as_bytes())) {
        return Err("its Host header is not a host name or address with an optional port");
    }
    if let (Some(authority), Some(host)) = (uri.authority(), host)
        && !authority.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes())
    {
        return Err("the host in its target differs from its Host header");
    }
    Ok(())
}
