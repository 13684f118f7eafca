//! The sockets of both listeners: taken over from a process that this one replaces, passed by the service manager, or new.

use crate::config::Config;
use crate::server;
use crate::service_manager::PassedListeners;
use crate::takeover::Claim;
use anyhow::Context as _;
use std::net::{SocketAddr, TcpListener};

/// The sockets of both listeners, with their addresses.
pub(super) struct Sockets {
    /// One for each worker.
    pub(super) workers: Vec<TcpListener>,
    pub(super) address: SocketAddr,
    /// Whether the service manager has passed the sockets for callers, to this process or to one that it replaces. It keeps
    /// them open.
    pub(super) is_passed: bool,
    pub(super) admin: TcpListener,
    pub(super) admin_address: SocketAddr,
}

impl Sockets {
    /// Opens one socket for each worker, and one for the admin listener.
    ///
    /// # Errors
    /// An address cannot be used.
    pub(super) fn open(
        config: &Config,
        workers: usize,
        claim: Option<&mut Claim>,
        passed: PassedListeners,
    ) -> anyhow::Result<Self> {
        let (inherited, is_passed, inherited_admin) = match claim {
            Some(claim) => (std::mem::take(&mut claim.listeners), claim.is_passed, claim.admin.take()),
            None => (Vec::new(), passed.callers.is_some(), None),
        };
        let callers = if !inherited.is_empty() {
            inherited
        } else if let Some(socket) = passed.callers {
            warn_of_other_address(&socket, config.server.listen, "server.listen")?;
            // All workers accept connections from the one queue of this socket.
            (0..workers).map(|_| socket.try_clone()).collect::<Result<_, _>>()?
        } else {
            listen(config.server.listen, workers, "server.listen")?
        };
        let admin = if let Some(socket) = inherited_admin {
            socket
        } else if let Some(socket) = passed.admin {
            warn_of_other_address(&socket, config.admin.listen, "admin.listen")?;
            socket
        } else {
            listen(config.admin.listen, 1, "admin.listen")?.pop().context("no admin socket")?
        };
        let address = callers.first().context("no socket")?.local_addr()?;
        let admin_address = admin.local_addr()?;
        Ok(Self { workers: callers, address, is_passed, admin, admin_address })
    }
}

fn listen(address: SocketAddr, sockets: usize, setting: &str) -> anyhow::Result<Vec<TcpListener>> {
    server::listen(address, sockets).with_context(|| {
        format!("cannot listen at {address}; set {setting} to a free address of this machine")
    })
}

/// The address of a passed socket is set in two places, which should agree.
fn warn_of_other_address(socket: &TcpListener, configured: SocketAddr, setting: &str) -> anyhow::Result<()> {
    let address = socket.local_addr()?;
    if address != configured {
        tracing::warn!(
            %address, %configured,
            "the socket of the service manager has another address than {setting}: the gateway listens at that of the socket"
        );
    }
    Ok(())
}
