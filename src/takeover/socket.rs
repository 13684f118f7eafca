//! The control socket, and the file descriptors that are sent through it.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// The listener of the control socket.
#[derive(Debug)]
pub(crate) struct ControlListener(pub(super) UnixListener);

/// The process at the other end of a control connection.
#[derive(Debug)]
pub(super) struct PeerProcess {
    pub(super) pid: i32,
    /// The pidfd. `None`: the kernel has none, so this process cannot detect the end of the other one.
    handle: Option<OwnedFd>,
}

impl fmt::Display for PeerProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)
    }
}

impl ControlListener {
    /// Listens at the control socket of a gateway.
    ///
    /// # Errors
    /// Another process listens there, or the system has no abstract Unix sockets.
    pub(crate) fn bind(address: SocketAddr) -> io::Result<Self> {
        sys::bind(address).map(Self)
    }

    /// Records this process as the one that listens. A client sees the process that called `listen` last, even if that
    /// process has only received the socket from another one, or has ended.
    ///
    /// # Errors
    /// The socket is not a listener.
    pub(super) fn adopt(&self) -> io::Result<()> {
        sys::listen(&self.0)
    }
}

/// Connects to the gateway at an address. `None`: there is no gateway, or it cannot be replaced without a gap.
pub(super) fn connect(address: SocketAddr) -> Option<UnixStream> {
    sys::connect(address).ok()
}

/// The process at the other end.
///
/// # Errors
/// The process runs as another user.
pub(super) fn peer(stream: &UnixStream) -> io::Result<PeerProcess> {
    sys::peer(stream)
}

/// Sends a file descriptor with one byte.
pub(super) fn send_file(stream: &UnixStream, file: impl AsFd) -> io::Result<()> {
    sys::send_file(stream, file.as_fd())
}

/// Receives a file descriptor and the byte that carries it.
pub(super) fn receive_file(stream: &UnixStream) -> io::Result<OwnedFd> {
    sys::receive_file(stream)?.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "a file is missing"))
}

impl PeerProcess {
    /// Whether the process ends within this time.
    pub(super) fn ends_within(&self, time: Duration) -> bool {
        self.handle.as_ref().is_some_and(|handle| sys::ends_within(handle, time))
    }
}

#[cfg(target_os = "linux")]
mod sys {
    use super::PeerProcess;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg, sockopt,
    };
    use rustix::process::{PidfdFlags, geteuid, pidfd_open};
    use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
    use std::mem::MaybeUninit;
    use std::net::SocketAddr;
    use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr as UnixAddress, UnixListener, UnixStream};
    use std::time::Duration;

    /// Maximum number of connections that wait to be accepted.
    const BACKLOG: i32 = 128;

    /// An abstract socket belongs to the network namespace, as the TCP address does, and ends with its process.
    fn name(address: SocketAddr) -> io::Result<UnixAddress> {
        UnixAddress::from_abstract_name(format!("tollgate {address}"))
    }

    pub(super) fn bind(address: SocketAddr) -> io::Result<UnixListener> {
        UnixListener::bind_addr(&name(address)?)
    }

    pub(super) fn listen(listener: &UnixListener) -> io::Result<()> {
        Ok(rustix::net::listen(listener, BACKLOG)?)
    }

    pub(super) fn connect(address: SocketAddr) -> io::Result<UnixStream> {
        UnixStream::connect_addr(&name(address)?)
    }

    pub(super) fn peer(stream: &UnixStream) -> io::Result<PeerProcess> {
        let peer = sockopt::socket_peercred(stream)?;
        if peer.uid != geteuid() {
            return Err(io::Error::new(ErrorKind::PermissionDenied, "it runs as another user"));
        }
        let handle = pidfd_open(peer.pid, PidfdFlags::empty()).ok();
        Ok(PeerProcess { pid: peer.pid.as_raw_nonzero().get(), handle })
    }

    pub(super) fn send_file(stream: &UnixStream, file: BorrowedFd<'_>) -> io::Result<()> {
        let files = [file];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
        sendmsg(stream, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    pub(super) fn receive_file(stream: &UnixStream) -> io::Result<Option<OwnedFd>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut files = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        Ok(files.next().and_then(|mut files| files.next()))
    }

    pub(super) fn ends_within(process: &OwnedFd, time: Duration) -> bool {
        let Ok(time) = Timespec::try_from(time) else { return false };
        let process = process.as_fd();
        poll(&mut [PollFd::from_borrowed_fd(process, PollFlags::IN)], Some(&time))
            .is_ok_and(|ready| ready > 0)
    }
}

#[cfg(not(target_os = "linux"))]
mod sys {
    use super::PeerProcess;
    use std::io::{self, ErrorKind};
    use std::net::SocketAddr;
    use std::os::fd::{BorrowedFd, OwnedFd};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::time::Duration;

    fn unsupported<T>() -> io::Result<T> {
        Err(ErrorKind::Unsupported.into())
    }

    pub(super) fn bind(_: SocketAddr) -> io::Result<UnixListener> {
        unsupported()
    }

    pub(super) fn listen(_: &UnixListener) -> io::Result<()> {
        unsupported()
    }

    pub(super) fn connect(_: SocketAddr) -> io::Result<UnixStream> {
        unsupported()
    }

    pub(super) fn peer(_: &UnixStream) -> io::Result<PeerProcess> {
        unsupported()
    }

    pub(super) fn send_file(_: &UnixStream, _: BorrowedFd<'_>) -> io::Result<()> {
        unsupported()
    }

    pub(super) fn receive_file(_: &UnixStream) -> io::Result<Option<OwnedFd>> {
        unsupported()
    }

    pub(super) fn ends_within(_: &OwnedFd, _: Duration) -> bool {
        false
    }
}
