//! Tollgate: an OpenAI-compatible gateway that keeps every environment within its token quotas.
//!
//! A request is read once (`body`), its prompt counted (`estimate`), room for it held in every quota
//! (`ledger`, by the law in `quota`), and then it is sent on (`upstream`). Its answer passes through
//! as it comes while usage is read on the side (`usage`), and when the answer ends, however it ends,
//! the reservation settles to what was used. [`proxy`] tells that life from top to bottom; [`app`]
//! puts the parts together.
//!
//! # What always holds
//!
//! - `level + held <= burst` in every rolling quota, at every moment, whatever the order of calls.
//! - A request is admitted by every quota that it touches, or changes nothing.
//! - A reservation settles exactly once, when its holder is dropped: at the last byte, at an error, at
//!   a hang-up, at a panic.
//! - The caller receives the upstream's bytes, less the one usage event that the gateway asked for.
//!
//! # What is deliberately absent
//!
//! Nothing in `quota`, `usage`, `estimate`, `body` and `ledger::Counters` reads the clock or the network, nor in `shared` but its
//! `FailFastConnection`. No lock is held
//! across an await. Nothing that takes longer than about 100 microseconds runs on an event loop.
//! There is no `unsafe`.
//!
//! Imports point one way: `clock`, `glob` and `api`, then `quota`, then `shared` (the quotas of a cluster: its script, and the
//! connection to Redis), then `config` (settings as those types), then `estimate`, `body` and `usage`, then `calibrations`, `ledger`, `error`, `telemetry` and `upstream`, then `store` (keeps what
//! these two hold), then `server`, then `proxy` and `admin`, then [`app`], then [`cli`]. [`simulate`] replays traces through
//! the ledger's counters alone.

// The core: pure.
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

// The settings.
pub mod config;

// What surrounds the core.
pub mod calibrations;
pub mod error;
pub mod ledger;
pub mod store;
mod telemetry;
pub mod upstream;

// The gateway at work.
mod admin;
pub mod app;
pub mod proxy;
mod server;

// The engine without the gateway.
pub mod simulate;

// The program.
pub mod cli;
mod demo;
