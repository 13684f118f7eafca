//! Tollgate: an OpenAI-compatible gateway that keeps every environment within its token quotas.
//!
//! The gateway parses a request once (`body`) and estimates its prompt (`estimate`). It reserves room in every quota (`ledger`,
//! with the arithmetic of `quota`) and forwards the request (`upstream`). The answer passes through as it comes, and `usage`
//! reads the reported tokens from the same bytes. When the answer ends, for whatever reason, the reservation settles to the used tokens.
//! [`proxy`] is the life of a request from top to bottom. [`app`] puts the parts together. `docs/architecture.md` is the map.
//!
//! # Invariants
//!
//! - `level + held <= burst` in every rolling quota, at every moment, whatever the order of calls.
//! - A request is admitted by every quota that applies to it, or changes no quota.
//! - A reservation settles exactly once, when its holder is dropped: at the last byte, an error, a disconnect or a panic.
//! - The caller receives the upstream's bytes, except for the usage event that the gateway requested.
//!
//! # What the code does not do
//!
//! - `quota`, `usage`, `estimate`, `body`, `ledger::local` and `ledger::replica` read neither the clock nor the network; `redis` only in its
//!   `FailFastConnection`.
//! - No lock is held across an await.
//! - Nothing that takes longer than about 100 microseconds runs on an event loop.
//! - There is no `unsafe`.
//!
//! The modules below are in the order of their imports: a group imports only from the groups above it.

// Foundations.
pub mod api;
pub mod clock;
pub mod glob;
mod json;
mod random;
mod roots;
mod similar;
mod timer;

// The core.
pub mod quota;
pub mod redis;
mod wait_queue;

// The settings.
pub mod config;

// Readers of requests and answers.
pub mod body;
pub mod estimate;
pub mod usage;

// The parts of the gateway.
pub mod calibrations;
pub mod error;
pub mod learned;
pub mod ledger;
mod provider_limits;
pub mod upstream;

// What observes, persists and serves them.
mod reload;
mod server;
mod service_manager;
pub mod store;
mod takeover;
mod telemetry;

// The gateway at work.
mod admin;
pub mod app;
pub mod proxy;

// Without the gateway: quotas on a recorded trace, the demo's backend.
mod demo;
pub mod simulate;

// The program.
pub mod cli;

#[cfg(feature = "fuzz")]
pub mod fuzzed;
