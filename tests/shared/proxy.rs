//! A way to a server that can be made slow or silent.

use super::server::Server;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;

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

pub struct Proxy {
    port: u16,
    mode: watch::Sender<Mode>,
}

impl Proxy {
    pub async fn start(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mode, watched) = watch::channel(Mode::Through);
        let socket = server.folder().join("s");
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = UnixStream::connect(&socket).await else { continue };
                let (client, server) = (client.into_split(), server.into_split());
                tokio::spawn(pass(client.0, server.1, watched.clone()));
                tokio::spawn(pass(server.0, client.1, watched.clone()));
            }
        });
        Self { port, mode }
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mode: watch::Receiver<Mode>,
) {
    let mut buffer = vec![0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let mode = *mode.borrow();
        match mode {
            Mode::Far => tokio::time::sleep(Duration::from_millis(2)).await,
            Mode::Slow => tokio::time::sleep(Duration::from_millis(100)).await,
            Mode::Through | Mode::Silent => {}
        }
        if mode != Mode::Silent && to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
