//! The service manager that has started this process, such as systemd: readiness, reloads, the watchdog, and sockets that
//! it has opened.
//!
//! A process learns of it from environment variables: `NOTIFY_SOCKET` (`sd_notify(3)`), `WATCHDOG_USEC`
//! (`sd_watchdog_enabled(3)`) and `LISTEN_FDS` (`sd_listen_fds(3)`). Without them nothing here has an effect.

mod listeners;
mod watchdog;

use crate::clock;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

pub(crate) use listeners::PassedListeners;
pub(crate) use watchdog::{EventLoop, run as run_watchdog, timeout as watchdog_timeout};

/// How long a message may wait for room in the socket of the service manager.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// A change of state that the service manager receives.
#[derive(Debug)]
pub(crate) enum Notification<'a> {
    /// The process serves requests. It also names itself as the main process, because it may have replaced another one.
    Ready {
        /// For the administrator.
        status: &'a str,
    },
    /// The config is read again. `Ready` follows.
    Reloading,
    /// The process stops within this time.
    Stopping {
        /// The longest shutdown that the config allows.
        within: Duration,
    },
    /// All event loops have answered.
    Alive,
}

impl Notification<'_> {
    fn message(&self) -> String {
        match self {
            Self::Ready { status } => {
                format!("READY=1\nMAINPID={}\nSTATUS={}\n", std::process::id(), one_line(status))
            }
            Self::Reloading => format!(
                "RELOADING=1\nMONOTONIC_USEC={}\nSTATUS=reading the config again\n",
                clock::monotonic_us()
            ),
            Self::Stopping { within } => format!(
                "STOPPING=1\nEXTEND_TIMEOUT_USEC={}\nSTATUS=shutting down, at most {} s\n",
                within.as_micros(),
                within.as_secs()
            ),
            Self::Alive => "WATCHDOG=1\n".to_owned(),
        }
    }
}

/// Notifies the service manager, if there is one.
pub(crate) fn notify(notification: &Notification<'_>) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else { return };
    if let Err(error) = send(&socket, &notification.message()) {
        let socket = socket.to_string_lossy();
        tracing::warn!(%error, %socket, "the service manager could not be notified");
    }
}

fn send(socket: &OsStr, message: &str) -> io::Result<()> {
    let sender = UnixDatagram::unbound()?;
    sender.set_write_timeout(Some(SEND_TIMEOUT))?;
    sender.send_to_addr(message.as_bytes(), &address(socket)?)?;
    Ok(())
}

/// The address of the socket. A name that begins with `@` is that of an abstract socket.
fn address(socket: &OsStr) -> io::Result<SocketAddr> {
    match socket.as_bytes() {
        #[cfg(target_os = "linux")]
        [b'@', name @ ..] => {
            use std::os::linux::net::SocketAddrExt as _;
            SocketAddr::from_abstract_name(name)
        }
        _ => SocketAddr::from_pathname(socket),
    }
}

/// A message has one line per variable.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 4096];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    #[test]
    fn a_message_reaches_a_socket_with_a_path_and_an_abstract_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), "READY=1\n").unwrap();
        assert_eq!(received(&socket), "READY=1\n");
        #[cfg(target_os = "linux")]
        {
            let name = format!("@tollgate-test-{}", std::process::id());
            let socket = UnixDatagram::bind_addr(&address(OsStr::new(&name)).unwrap()).unwrap();
            send(OsStr::new(&name), "WATCHDOG=1\n").unwrap();
            assert_eq!(received(&socket), "WATCHDOG=1\n");
        }
        assert!(send(folder.path().join("none").as_os_str(), "READY=1\n").is_err());
    }

    #[test]
    fn messages_have_one_line_per_variable() {
        let ready = Notification::Ready { status: "serving\nSTOPPING=1" }.message();
        let lines: Vec<_> = ready.lines().collect();
        assert_eq!(lines[0], "READY=1");
        assert_eq!(lines[1], format!("MAINPID={}", std::process::id()));
        assert_eq!(lines[2..], ["STATUS=serving STOPPING=1"]);
        let stopping = Notification::Stopping { within: Duration::from_millis(31_500) }.message();
        assert_eq!(
            stopping,
            "STOPPING=1\nEXTEND_TIMEOUT_USEC=31500000\nSTATUS=shutting down, at most 31 s\n"
        );
        let reloading = Notification::Reloading.message();
        let now = reloading.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")).unwrap();
        let later = clock::monotonic_us();
        assert!((1..=later).contains(&now.parse().unwrap()), "{reloading}");
    }
}
