//! Why a TLS handshake with an upstream has failed, in words.

use crate::clock::Timestamp;
use std::error::Error;
use std::fmt;
use std::io;
use tokio_rustls::rustls::pki_types::UnixTime;
use tokio_rustls::rustls::{self, CertificateError};

/// Why the certificate of an upstream was refused, and what to do.
#[derive(Debug)]
pub(crate) struct CertificateFault {
    pub(crate) reason: String,
    pub(crate) remedy: &'static str,
}

impl CertificateFault {
    /// The error of a handshake, in which a refused certificate is a `CertificateFault`.
    pub(super) fn explain(error: io::Error) -> io::Error {
        let fault = match error.get_ref().and_then(|source| source.downcast_ref()) {
            Some(rustls::Error::InvalidCertificate(refusal)) => Self::of(refusal),
            _ => None,
        };
        match fault {
            Some(fault) => io::Error::new(error.kind(), fault),
            None => error,
        }
    }

    /// The fault in an error of `explain`, if a certificate was refused for a known reason.
    pub(crate) fn in_error(error: &io::Error) -> Option<&Self> {
        error.get_ref().and_then(|source| source.downcast_ref())
    }

    /// `None`: the error has a rare reason, which rustls describes.
    fn of(error: &CertificateError) -> Option<Self> {
        let (reason, remedy) = match error {
            CertificateError::UnknownIssuer => (
                "the certificate is signed by an authority that this machine does not trust".to_owned(),
                "add the authority to the system's certificates (or to the file that SSL_CERT_FILE names)",
            ),
            CertificateError::ExpiredContext { time, not_after } => (
                format!("the certificate has expired at {}; it is now {}", date(*not_after), date(*time)),
                "renew the certificate of its server, or correct the clock of this machine",
            ),
            CertificateError::NotValidYetContext { time, not_before } => (
                format!(
                    "the certificate is not valid before {}; it is now {}",
                    date(*not_before),
                    date(*time)
                ),
                "correct the clock of this machine, or issue a certificate that is valid now",
            ),
            CertificateError::NotValidForNameContext { .. } => (
                format!("the certificate belongs to another name: {error}"),
                "issue a certificate for this name",
            ),
            // rustls has no variant for this error of its verifier.
            CertificateError::Other(other) if other.to_string() == "CaUsedAsEndEntity" => (
                "the certificate is marked as an authority and cannot serve as a server's".to_owned(),
                "issue one with CA:FALSE",
            ),
            CertificateError::BadSignature
            | CertificateError::UnsupportedSignatureAlgorithmContext { .. }
            | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => (
                "the certificate is not signed by the trusted authority that it names".to_owned(),
                "add the authority that has signed it to the system's certificates (or to the file that SSL_CERT_FILE names)",
            ),
            _ => return None,
        };
        Some(Self { reason, remedy })
    }
}

fn date(time: UnixTime) -> String {
    let ms = i64::try_from(time.as_secs()).unwrap_or(i64::MAX).saturating_mul(1_000);
    Timestamp(ms).to_rfc3339()
}

impl fmt::Display for CertificateFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.remedy)
    }
}

impl Error for CertificateFault {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;
    use tokio_rustls::rustls::RootCertStore;
    use tokio_rustls::rustls::client::WebPkiServerVerifier;
    use tokio_rustls::rustls::client::danger::ServerCertVerifier as _;
    use tokio_rustls::rustls::crypto::ring;
    use tokio_rustls::rustls::pki_types::ServerName;

    /// What rustls refuses in a self-signed certificate that is trusted, at a time after the epoch.
    fn refused(parameters: &rcgen::CertificateParams, name: &'static str, now_s: u64) -> io::Error {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        let provider = Arc::new(ring::default_provider());
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now_s));
        let name = ServerName::try_from(name).unwrap();
        let refusal = verifier.verify_server_cert(certificate.der(), &[], &name, &[], now).unwrap_err();
        // As tokio-rustls does.
        CertificateFault::explain(io::Error::new(io::ErrorKind::InvalidData, refusal))
    }

    fn parameters() -> rcgen::CertificateParams {
        let mut parameters = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
        parameters.not_before = rcgen::date_time_ymd(2026, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(2026, 3, 1);
        parameters
    }

    /// 2026-02-01.
    const VALID: u64 = 1_769_904_000;

    #[test]
    fn a_refused_certificate_has_a_reason_and_a_remedy_in_words() {
        let day = 86_400;
        let mut authority = parameters();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        for (error, reason, remedy) in [
            (
                refused(&authority, "localhost", VALID),
                "the certificate is marked as an authority and cannot serve as a server's",
                "issue one with CA:FALSE",
            ),
            (
                refused(&parameters(), "localhost", VALID + 60 * day),
                "the certificate has expired at 2026-03-01T00:00:00Z; it is now 2026-04-02T00:00:00Z",
                "renew the certificate of its server, or correct the clock of this machine",
            ),
            (
                refused(&parameters(), "localhost", VALID - 60 * day),
                "the certificate is not valid before 2026-01-01T00:00:00Z; it is now 2025-12-03T00:00:00Z",
                "correct the clock of this machine, or issue a certificate that is valid now",
            ),
            (
                refused(&parameters(), "example.com", VALID),
                "the certificate belongs to another name: certificate not valid for name \"example.com\"; \
                 certificate is only valid for DnsName(\"localhost\")",
                "issue a certificate for this name",
            ),
        ] {
            let fault = CertificateFault::in_error(&error).expect(reason);
            assert_eq!((fault.reason.as_str(), fault.remedy), (reason, remedy));
            assert_eq!(error.to_string(), format!("{reason}: {remedy}"));
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn other_errors_stay_as_they_are() {
        for error in [
            io::Error::from(io::ErrorKind::UnexpectedEof),
            io::Error::new(io::ErrorKind::InvalidData, rustls::Error::DecryptError),
            io::Error::new(io::ErrorKind::InvalidData, rustls::Error::from(CertificateError::Revoked)),
        ] {
            let (kind, text) = (error.kind(), error.to_string());
            let explained = CertificateFault::explain(error);
            assert_eq!((explained.kind(), explained.to_string()), (kind, text));
            assert!(CertificateFault::in_error(&explained).is_none());
        }
    }
}
