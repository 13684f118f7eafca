//! The label `code` of requests.

use super::Record;

/// Values of the `code` label for answers that are not errors of the gateway: the class of the status. The first one: the
/// caller got no answer.
pub(super) const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// The value of the `code` label of a request.
pub(super) fn code_of(record: &Record) -> &'static str {
    if record.error.is_empty() { CLASSES[class_of(record)] } else { record.error }
}

/// The index of a request's class in `CLASSES`.
pub(super) fn class_of(record: &Record) -> usize {
    usize::from(record.status / 100).min(CLASSES.len() - 1)
}
