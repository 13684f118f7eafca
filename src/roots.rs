//! The certificate authorities that TLS connections to upstreams and to Redis trust.

use tokio_rustls::rustls::RootCertStore;

/// The machine's root certificates, or those that `SSL_CERT_FILE` names. Mozilla's list if there are none.
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
