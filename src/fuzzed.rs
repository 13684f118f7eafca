//! Readers of bytes from outside that are private, for the fuzz target.

use crate::proxy::read_form_model;
use crate::server::{Refused, RequestCheck};
pub use crate::upstream::{ReadAnswer, read_answer};

/// The result of the check of requests for a connection's bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CheckedRequests {
    /// The number of bytes that hyper may receive.
    pub passed: usize,
    /// Whether a head was refused.
    pub refused_head: bool,
    /// Whether the chunks of a body were refused.
    pub refused_body: bool,
}

/// Checks the requests in `wire`, which arrives in pieces of `step` bytes.
pub fn check_requests(wire: &[u8], step: usize) -> CheckedRequests {
    let (mut check, mut passed) = (RequestCheck::new("http", true), 0);
    let mut end = 0;
    while end < wire.len() {
        end = end.saturating_add(step).min(wire.len());
        passed += check.advance(&wire[passed..end]);
    }
    let refused = check.refused();
    CheckedRequests {
        passed,
        refused_head: matches!(refused, Some(Refused::Head(_))),
        refused_body: refused == Some(Refused::Body),
    }
}

/// The model that a form names.
///
/// # Errors
/// The form is not valid or ambiguous.
pub fn form_model(form: &[u8], boundary: &str) -> Result<String, String> {
    read_form_model(form.to_vec().into(), boundary.to_owned()).map_err(|fault| fault.to_string())
}
