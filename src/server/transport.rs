//! What a connection runs over: TCP, or TLS over TCP.

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// A caller's bytes in both directions.
pub(super) trait Transport: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Whether written bytes may wait in a buffer until it is flushed.
    const BUFFERS: bool;
    /// The scheme of its URLs.
    const SCHEME: &'static str;

    /// The TCP connection below.
    fn tcp(&self) -> &TcpStream;
}

impl Transport for TcpStream {
    const BUFFERS: bool = false;
    const SCHEME: &'static str = "http";

    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl Transport for TlsStream<TcpStream> {
    const BUFFERS: bool = true;
    const SCHEME: &'static str = "https";

    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}
