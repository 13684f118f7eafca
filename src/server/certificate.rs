//! Certificates for TLS towards callers, read from files.

use super::not_after;
use crate::clock::Timestamp;
use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

/// ALPN names in the order of preference.
const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// A certificate that expires sooner is a warning.
const EXPIRY_WARNING_MS: u64 = 14 * DAY_MS;
const DAY_MS: u64 = 86_400_000;

/// A certificate with its key, ready to serve.
#[derive(Clone, Debug)]
pub(crate) struct Certificate {
    pub(super) config: Arc<ServerConfig>,
    /// When the certificate expires. `None`: its date cannot be read.
    pub(crate) expires: Option<Timestamp>,
    chain: Vec<CertificateDer<'static>>,
}

/// A file that a setting names.
#[derive(Clone, Copy)]
pub(crate) struct PemFile<'f> {
    pub(crate) path: &'f Path,
    /// The location of the setting, such as `tollgate.yaml:7:13`.
    pub(crate) location: &'f str,
}

impl PemFile<'_> {
    fn fault(&self, section: &str, name: &str, what: &dyn Display) -> String {
        format!("{}: {section}.tls.{name}: {}: {what}", self.location, self.path.display())
    }
}

impl Certificate {
    pub(crate) fn is_same_as(&self, other: &Self) -> bool {
        self.chain == other.chain
    }

    /// The warning for a certificate that has expired or expires soon. `section`: the section of the config that names it.
    pub(crate) fn expiry_warning(&self, section: &str, now: Timestamp) -> Option<String> {
        let expires = self.expires?;
        let date = expires.to_rfc3339();
        if expires <= now {
            return Some(format!(
                "the certificate of {section}.tls has expired at {date}: replace its files"
            ));
        }
        let left = expires.ms_since(now);
        (left < EXPIRY_WARNING_MS).then(|| {
            let days = left / DAY_MS;
            format!("the certificate of {section}.tls expires in {days} days, at {date}: replace its files")
        })
    }

    /// The same certificate, with or without HTTP/2.
    pub(crate) fn with_http2(self, http2: bool) -> Self {
        let alpn_protocols = alpn(http2);
        if self.config.alpn_protocols == alpn_protocols {
            return self;
        }
        let mut config = (*self.config).clone();
        config.alpn_protocols = alpn_protocols;
        Self { config: Arc::new(config), ..self }
    }
}

/// Reads a certificate chain and its private key. `section`: the section of the config that names the files.
///
/// # Errors
/// A file cannot be read or parsed, or the two do not belong together. The message has the location and the name of the
/// setting, and the file.
pub(crate) fn load(
    section: &str,
    cert: PemFile<'_>,
    key: PemFile<'_>,
    http2: bool,
) -> Result<Certificate, String> {
    let cert_fault = |what: &dyn Display| cert.fault(section, "cert", what);
    let key_fault = |what: &dyn Display| key.fault(section, "key", what);
    let (cert, key) = (cert.path, key.path);
    let pem = std::fs::read(cert).map_err(|error| cert_fault(&error))?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| cert_fault(&format!("this is not a PEM file: {error}")))?;
    let Some(first) = chain.first() else {
        return Err(cert_fault(&"the file has no certificate; it must have the chain in PEM"));
    };
    let expires = not_after::of(first);
    let private = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| key_fault(&format!("the file has no private key in PEM: {error}")))?;
    let built = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain.clone(), private));
    let mut config = built.map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            key_fault(&format!("it does not belong to the certificate in {}", cert.display()))
        }
        error => cert_fault(&format!("the certificate cannot be used: {error}")),
    })?;
    config.alpn_protocols = alpn(http2);
    // Callers resume sessions without a table of sessions in memory. Without random numbers they do not.
    if let Ok(ticketer) = ring::Ticketer::new() {
        config.ticketer = ticketer;
    }
    Ok(Certificate { config: Arc::new(config), expires, chain })
}

fn alpn(http2: bool) -> Vec<Vec<u8>> {
    if http2 { vec![HTTP2.to_vec(), HTTP1.to_vec()] } else { vec![HTTP1.to_vec()] }
}

/// Whether a caller has chosen HTTP/2.
pub(super) fn is_http2(alpn: Option<&[u8]>) -> bool {
    alpn == Some(HTTP2)
}
