//! The listeners for callers and for the admin API: their bounds, protocols and certificates. A reload changes them.

use crate::clock;
use crate::config::{Config, ServerSettings, TlsFiles};
use crate::server::{self, CallerTimeouts, Certificate, ConnectionBounds, Listener, PemFile, Protocols};
use crate::telemetry::Metrics;
use std::sync::Arc;

/// Connections of the admin listener. Further ones wait in the kernel's queue.
const MAX_ADMIN_CONNECTIONS: usize = 1_000;
/// Connections of the admin listener from one address of another machine.
const MAX_ADMIN_CONNECTIONS_PER_ADDRESS: usize = 100;

/// Both listeners.
pub(super) struct Listeners {
    pub(super) callers: Arc<Listener>,
    pub(super) admin: Arc<Listener>,
}

/// The settings of both listeners by a config that is not in force yet.
pub(super) struct PreparedListeners {
    callers: (ConnectionBounds, Protocols),
    admin: (ConnectionBounds, Protocols),
    /// What changes, for the log.
    pub(super) changes: Vec<String>,
    pub(super) warnings: Vec<String>,
    /// The faults of files whose certificates stay in force.
    pub(super) certificate_faults: Vec<String>,
}

impl Listeners {
    /// Reads the certificates of a config.
    ///
    /// # Errors
    /// A certificate cannot be used.
    pub(super) fn open(config: &Config, timeouts: CallerTimeouts, metrics: &Metrics) -> anyhow::Result<Self> {
        let prepared = prepare(config, None).map_err(|faults| anyhow::Error::msg(faults.join("; ")))?;
        prepared.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let PreparedListeners { callers, admin, .. } = prepared;
        record_expiry(metrics, [&callers.1, &admin.1]);
        Ok(Self {
            callers: Listener::new(timeouts, callers.0, callers.1),
            admin: Listener::new(timeouts, admin.0, admin.1),
        })
    }

    /// Reads the certificates of another config. A file that has the same path as before and cannot be used now, for example
    /// because only one of two files is written yet, is a warning: the certificate in force stays.
    ///
    /// # Errors
    /// All faults.
    pub(super) fn prepare(&self, old: &Config, new: &Config) -> Result<PreparedListeners, Vec<String>> {
        prepare(new, Some((self, old)))
    }

    /// Puts the settings of a config in force, for new connections.
    pub(super) fn put_in_force(&self, prepared: PreparedListeners, metrics: &Metrics) {
        let PreparedListeners { callers, admin, .. } = prepared;
        record_expiry(metrics, [&callers.1, &admin.1]);
        self.callers.set(callers.0, callers.1);
        self.admin.set(admin.0, admin.1);
    }

    /// Logs a warning for each certificate in force that has expired or expires soon.
    pub(super) fn warn_of_expiry(&self) {
        for (section, listener) in [("server", &self.callers), ("admin", &self.admin)] {
            let certificate = listener.protocols().certificate;
            let warning =
                certificate.and_then(|certificate| certificate.expiry_warning(section, clock::now()));
            warning.iter().for_each(|warning| tracing::warn!("{warning}"));
        }
    }
}

/// `in_force`: the listeners, and the config that they have.
fn prepare(new: &Config, in_force: Option<(&Listeners, &Config)>) -> Result<PreparedListeners, Vec<String>> {
    let (server, admin) = (&new.server, &new.admin);
    let mut reader = CertificateReader::default();
    let known = in_force.map(|(listeners, old)| (&listeners.callers, old.server.tls.as_ref()));
    let callers = reader.read("server", server.tls.as_ref(), server.http2, known);
    let known = in_force.map(|(listeners, old)| (&listeners.admin, old.admin.tls.as_ref()));
    let admin = reader.read("admin", admin.tls.as_ref(), true, known);
    let CertificateReader { changes, warnings, certificate_faults, faults } = reader;
    if !faults.is_empty() {
        return Err(faults);
    }
    Ok(PreparedListeners {
        callers: (
            callers_bounds(server),
            Protocols { certificate: callers, http2: server.http2, requires_host: true },
        ),
        // Without TLS, browsers and scrapers use HTTP/1.1.
        // Probes need not name a host.
        admin: (admin_bounds(), Protocols { certificate: admin, http2: false, requires_host: false }),
        changes,
        warnings,
        certificate_faults,
    })
}

fn callers_bounds(server: &ServerSettings) -> ConnectionBounds {
    let per_address = server.max_connections_per_address;
    ConnectionBounds {
        total: server.max_connections,
        per_address: per_address.map(|bound| bound.connections),
        bounds_loopback: per_address.is_some_and(|bound| bound.bounds_loopback),
        exempt: server.trusted_proxies.clone(),
    }
}

fn admin_bounds() -> ConnectionBounds {
    ConnectionBounds {
        total: MAX_ADMIN_CONNECTIONS,
        per_address: Some(MAX_ADMIN_CONNECTIONS_PER_ADDRESS),
        bounds_loopback: false,
        exempt: Vec::new(),
    }
}

/// Reads the certificates of a config, and collects changes, warnings and faults.
#[derive(Default)]
struct CertificateReader {
    changes: Vec<String>,
    warnings: Vec<String>,
    certificate_faults: Vec<String>,
    faults: Vec<String>,
}

impl CertificateReader {
    /// `known`: the listener that uses this section of the config, and the files of the config in force.
    fn read(
        &mut self,
        section: &str,
        files: Option<&TlsFiles>,
        http2: bool,
        known: Option<(&Arc<Listener>, Option<&TlsFiles>)>,
    ) -> Option<Certificate> {
        let files = files?;
        let in_force = known.and_then(|(listener, _)| listener.protocols().certificate);
        let has_same_files = known.is_some_and(|(_, known)| known == Some(files));
        match (load_certificate(section, files, http2), in_force) {
            (Ok(certificate), in_force) => {
                let certificate = match in_force {
                    // Its callers can continue their TLS sessions.
                    Some(known) if known.is_same_as(&certificate) => known.with_http2(http2),
                    Some(_) => {
                        self.changes.push(format!("{section}.tls has another certificate"));
                        certificate
                    }
                    None => certificate,
                };
                self.warnings.extend(certificate.expiry_warning(section, clock::now()));
                Some(certificate)
            }
            (Err(fault), Some(in_force)) if has_same_files => {
                self.warnings.push(format!("{fault}; the certificate in force stays until both files match"));
                self.certificate_faults.push(fault);
                Some(in_force.with_http2(http2))
            }
            (Err(fault), _) => {
                self.faults.push(fault);
                None
            }
        }
    }
}

/// Reads the certificate that a section of the config names.
///
/// # Errors
/// It cannot be used. The message has the location of the setting and the file.
pub(crate) fn load_certificate(section: &str, files: &TlsFiles, http2: bool) -> Result<Certificate, String> {
    let cert = PemFile { path: &files.cert, location: &files.locations.cert };
    let key = PemFile { path: &files.key, location: &files.locations.key };
    server::load_certificate(section, cert, key, http2)
}

fn record_expiry(metrics: &Metrics, [callers, admin]: [&Protocols; 2]) {
    for (listener, protocols) in [("callers", callers), ("admin", admin)] {
        let expires = protocols.certificate.as_ref().and_then(|certificate| certificate.expires);
        metrics.certificate_expires(listener, expires);
    }
}
