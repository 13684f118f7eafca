//! TLS to upstreams: rustls, the machine's trusted roots, HTTP/2 by ALPN.

use super::tls_fault::CertificateFault;
use crate::roots::trusted_roots;
use anyhow::Context as _;
use std::io;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, crypto};

/// The TLS settings of one upstream.
pub(super) struct TlsClient {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl TlsClient {
    /// # Errors
    /// `host` cannot be the name of a TLS server.
    pub(super) fn new(config: Arc<ClientConfig>, host: &str) -> anyhow::Result<Self> {
        let name = ServerName::try_from(host.to_owned())
            .with_context(|| format!("'{host}' cannot be the name of a TLS server"))?;
        Ok(Self { connector: TlsConnector::from(config), name })
    }

    /// Performs the handshake. The error of a refused certificate has its reason in words.
    pub(super) async fn connect(&self, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.connector.connect(self.name.clone(), tcp).await.map_err(CertificateFault::explain)
    }
}

/// The settings that all TLS connections to upstreams share.
///
/// # Errors
/// The cryptography library rejects its own defaults, which the features built in make impossible.
pub fn client_config() -> anyhow::Result<Arc<ClientConfig>> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(trusted_roots())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
