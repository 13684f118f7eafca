//! Sockets that the service manager has opened (socket activation).
//!
//! They stay open in the service manager while the gateway restarts. Callers that connect in between wait; none is refused.

use anyhow::{Context as _, bail};
use listenfd::ListenFd;
use rustix::net::sockopt;
use std::net::TcpListener;

/// The name of the socket for callers: `FileDescriptorName=` in its unit.
const CALLERS: &str = "callers";
/// The name of the socket of the admin listener.
const ADMIN: &str = "admin";

/// More sockets than any mistake passes.
const MAX_SOCKETS: u64 = 64;

/// The listening sockets that the service manager has passed. Both are `None` without socket activation.
#[derive(Debug, Default)]
pub(crate) struct PassedListeners {
    pub(crate) callers: Option<TcpListener>,
    pub(crate) admin: Option<TcpListener>,
}

impl PassedListeners {
    /// Takes the sockets. Call this once, before any thread starts: it removes the variables that describe them.
    ///
    /// # Errors
    /// A socket has another name, or is not a listening TCP socket.
    pub(crate) fn take() -> anyhow::Result<Self> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        // `ListenFd` takes as much memory as the variable claims.
        if let Ok(count) = std::env::var("LISTEN_FDS")
            && count.parse().is_ok_and(|count: u64| count > MAX_SOCKETS)
        {
            bail!(
                "the service manager has passed {count} sockets; the gateway takes two, with the names {CALLERS} and {ADMIN}"
            );
        }
        let mut sockets = ListenFd::from_env();
        let mut passed = Self::default();
        let mut names = names.split(':');
        for index in 0..sockets.len() {
            let name = names.next().unwrap_or_default();
            let place = match name {
                CALLERS => &mut passed.callers,
                ADMIN => &mut passed.admin,
                _ => bail!(
                    "the service manager has passed a socket with the name \"{name}\"; set FileDescriptorName={CALLERS} or \
                     FileDescriptorName={ADMIN} in its socket unit"
                ),
            };
            if place.is_some() {
                bail!(
                    "the service manager has passed two sockets with the name \"{name}\"; the gateway takes one address \
                     for each: [::]:8080 accepts IPv6 and IPv4"
                );
            }
            let taken = sockets.take_tcp_listener(index).map_err(anyhow::Error::from).and_then(listening);
            *place = taken.with_context(|| {
                format!("the socket \"{name}\" of the service manager cannot be used; set ListenStream= to an IP address and a port")
            })?;
        }
        Ok(passed)
    }
}

/// Checks that a socket listens, and makes it ready for an event loop.
fn listening(socket: Option<TcpListener>) -> anyhow::Result<Option<TcpListener>> {
    let Some(socket) = socket else { return Ok(None) };
    if !sockopt::socket_acceptconn(&socket)? {
        bail!("it does not listen");
    }
    socket.set_nonblocking(true)?;
    Ok(Some(socket))
}
