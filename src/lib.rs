//! Tollgate: an OpenAI-compatible gateway that keeps every environment within its token quotas.
//!
//! The gateway parses a request once (`body`), estimates its prompt tokens (`estimate`), reserves room in every quota
//! (`ledger`, with the arithmetic of `quota`), and forwards the request (`upstream`). It passes the answer on and reads
//! usage from it (`usage`). When the answer ends, for any reason, the reservation settles to the actual usage. [`proxy`]
//! contains the life of a request from top to bottom, and [`app`] builds and starts all parts.
//!
//! # Invariants
//!
//! - `level + held <= burst` in every rolling quota, at every moment, whatever the order of calls.
//! - A request is admitted by every quota that applies to it, or changes none of them.
//! - A reservation settles exactly once, when its holder is dropped: after the last byte, an error, a disconnect or a
//!   panic.
//! - The caller receives the upstream's bytes, except for the usage event that the gateway requested.
//! - No lock is held across an await, and nothing that takes longer than about 100 microseconds runs on an event loop.
//! - There is no `unsafe` code.
//!
//! `quota`, `usage`, `estimate`, `body`, `ledger::local` and `ledger::replica` read neither a clock nor the network.
//! `docs/architecture.md` has a map of the modules and the direction of their imports.

// The core: formats, counting and quota arithmetic.
pub mod api;
pub mod body;
pub mod clock;
pub mod estimate;
pub mod glob;
mod json;
pub mod quota;
mod random;
pub mod redis;
mod roots;
pub mod usage;

// The configuration.
pub mod config;

// State that the core needs: counters, the store, metrics and connections.
pub mod calibrations;
pub mod error;
pub mod ledger;
pub mod store;
mod telemetry;
pub mod upstream;

// The server.
mod admin;
pub mod app;
pub mod proxy;
mod server;

// The simulation of quotas on a recorded trace.
pub mod simulate;

// The command line.
pub mod cli;
mod demo;
