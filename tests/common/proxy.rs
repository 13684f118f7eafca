//! A way to a server that can be made slow or silent, or lose its connections without a word.

use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;

#[allow(dead_code)] // each kind of tests has use for some
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Through,
    /// 2 ms each way.
    Far,
    /// 100 ms each way.
    Slow,
    /// It connects and takes everything, and nothing comes of it.
    Silent,
}

#[derive(Clone, Copy, Debug)]
struct State {
    mode: Mode,
    /// Connections so far, and of how many of the first of them nothing comes any more.
    accepted: u64,
    forgotten: u64,
}

pub struct Proxy {
    port: u16,
    state: watch::Sender<State>,
}

impl Proxy {
    /// Before the server at this socket.
    pub async fn start(socket: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = watch::Sender::new(State { mode: Mode::Through, accepted: 0, forgotten: 0 });
        let (socket, accepting) = (socket.to_owned(), state.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = UnixStream::connect(&socket).await else { continue };
                accepting.send_modify(|state| state.accepted += 1);
                let number = accepting.borrow().accepted;
                let (client, server) = (client.into_split(), server.into_split());
                tokio::spawn(pass(number, client.0, server.1, accepting.subscribe()));
                tokio::spawn(pass(number, server.0, client.1, accepting.subscribe()));
            }
        });
        Self { port, state }
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn set(&self, mode: Mode) {
        self.state.send_modify(|state| state.mode = mode);
    }

    /// Nothing comes of the connections that there are now, and nobody is told: they are half open. New ones are good.
    pub fn forget(&self) {
        self.state.send_modify(|state| state.forgotten = state.accepted);
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
        let State { mode, forgotten, .. } = *state.borrow();
        match mode {
            Mode::Far => tokio::time::sleep(Duration::from_millis(2)).await,
            Mode::Slow => tokio::time::sleep(Duration::from_millis(100)).await,
            Mode::Through | Mode::Silent => {}
        }
        let is_lost = mode == Mode::Silent || number <= forgotten;
        if !is_lost && to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
