//! A TCP proxy in front of a server that simulates a slow network, a silent server and half-open connections.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;

#[allow(dead_code)] // each test binary uses some of them
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forwards without delay.
    Through,
    /// Delays by 2 ms in each direction.
    Far,
    /// Delays by 100 ms in each direction.
    Slow,
    /// Accepts connections and bytes, and forwards nothing.
    Silent,
}

#[derive(Clone, Copy, Debug)]
struct State {
    mode: Mode,
    /// Connections accepted so far.
    accepted: u64,
    /// This many of the first connections are half open: nothing is forwarded on them.
    half_open: u64,
}

pub struct Proxy {
    port: u16,
    state: watch::Sender<State>,
    /// The server of new connections.
    socket: Arc<Mutex<PathBuf>>,
}

impl Proxy {
    /// Starts a proxy in front of the server at this Unix socket.
    pub async fn start(socket: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = watch::Sender::new(State { mode: Mode::Through, accepted: 0, half_open: 0 });
        let socket = Arc::new(Mutex::new(socket.to_owned()));
        let (target, accepting) = (socket.clone(), state.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let target = target.lock().unwrap().clone();
                let Ok(server) = UnixStream::connect(&target).await else { continue };
                accepting.send_modify(|state| state.accepted += 1);
                let number = accepting.borrow().accepted;
                let (client, server) = (client.into_split(), server.into_split());
                tokio::spawn(pass(number, client.0, server.1, accepting.subscribe()));
                tokio::spawn(pass(number, server.0, client.1, accepting.subscribe()));
            }
        });
        Self { port, state, socket }
    }

    #[allow(dead_code)]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connects new clients to the server at this socket.
    #[allow(dead_code)]
    pub fn redirect(&self, socket: &Path) {
        socket.clone_into(&mut self.socket.lock().unwrap());
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn set(&self, mode: Mode) {
        self.state.send_modify(|state| state.mode = mode);
    }

    /// Makes all current connections half open: neither end is notified. New connections work.
    pub fn make_half_open(&self) {
        self.state.send_modify(|state| state.half_open = state.accepted);
    }
}

async fn pass(
    number: u64,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    state: watch::Receiver<State>,
) {
    let mut buffer = vec![0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let State { mode, half_open, .. } = *state.borrow();
        match mode {
            Mode::Far => tokio::time::sleep(Duration::from_millis(2)).await,
            Mode::Slow => tokio::time::sleep(Duration::from_millis(100)).await,
            Mode::Through | Mode::Silent => {}
        }
        let is_lost = mode == Mode::Silent || number <= half_open;
        if !is_lost && to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
