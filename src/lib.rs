//! Tollgate: an OpenAI-compatible gateway that keeps every environment within its token quotas.

pub mod clock;
pub mod glob;

pub mod estimate;
pub mod quota;
pub mod usage;

pub mod body;
mod json;

pub mod config;

pub mod error;
pub mod ledger;
pub mod telemetry;
pub mod upstream;

pub mod proxy;

mod admin;
mod server;

pub mod app;
pub mod cli;
pub mod demo;
