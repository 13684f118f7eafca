//! TLS for connections to Redis.

use super::url::RedisTlsFiles;
use crate::roots;
use anyhow::{Context as _, bail};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

/// The machine's roots. They are read once for the connections of all environments.
static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();

/// Builds the TLS side of connections from the files of the URL.
///
/// # Errors
/// A file cannot be read, or its content is invalid.
pub(super) fn connector(files: &RedisTlsFiles) -> anyhow::Result<TlsConnector> {
    let roots = match &files.ca {
        Some(path) => Arc::new(read_roots(path)?),
        None => ROOTS.get_or_init(|| Arc::new(roots::trusted_roots())).clone(),
    };
    let config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let config = match &files.client {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let file = key.display();
            let key = PrivateKeyDer::from_pem_file(key).with_context(|| format!("key_file {file}"))?;
            let chain = read_certificates(certificate)
                .with_context(|| format!("cert_file {}", certificate.display()))?;
            config.with_client_auth_cert(chain, key).with_context(|| format!("key_file {file}"))?
        }
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

fn read_roots(path: &Path) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let in_file = || format!("ca_file {}", path.display());
    for certificate in read_certificates(path).with_context(in_file)? {
        roots.add(certificate).with_context(in_file)?;
    }
    Ok(roots)
}

fn read_certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>()?;
    if certificates.is_empty() {
        bail!("the file contains no certificate");
    }
    Ok(certificates)
}
