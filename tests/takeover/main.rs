//! Restarts without a gap: a new process takes a running gateway over. No request is lost, and each is charged once.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)]

mod counters;
mod crashes;
mod gateway;
mod http;
mod http2;
mod load;
#[path = "../common/port.rs"]
mod port;
mod refused;
mod requests;
mod service_manager;
mod upgrades;
mod upstream;
mod upstreams;
