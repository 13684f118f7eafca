//! Whom TLS connections trust: those to upstreams, and to Redis.

use tokio_rustls::rustls::RootCertStore;

/// The machine's roots (also those named by `SSL_CERT_FILE`), and Mozilla's list where the machine has none.
pub(crate) fn trusted_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::warn!(%error, "a trusted root certificate could not be read");
    }
    let (added, _) = roots.add_parsable_certificates(native.certs);
    if added == 0 {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    roots
}
