//! The gateway as its callers, its upstreams and its operators see it. One module for each chapter of
//! the README.

#![allow(clippy::disallowed_methods)] // tests time what they see
#![allow(missing_docs, unreachable_pub, clippy::panic, clippy::unwrap_used, clippy::missing_panics_doc)]

mod admission;
mod apis;
mod bad_input;
mod cluster;
mod compressed;
mod count;
mod estimate;
mod fixtures;
mod limits;
mod operations;
mod passthrough;
mod patience;
mod quotas;
mod routing;
mod settling;
mod simulate;
mod streams;
mod support;
mod tls;
mod upstreams;
mod withholding;
