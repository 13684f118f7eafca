//! Counters that several nodes share, on Redis servers that the tests start: the script agrees with the engine without
//! Redis, and an unavailable server delays no caller.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, clippy::panic, clippy::cast_possible_wrap)]

mod access;
mod burst;
mod chaos;
mod client;
mod cluster;
mod connection;
mod member;
mod node;
#[path = "../common/port.rs"]
mod port;
#[path = "../common/proxy.rs"]
mod proxy;
mod sentinel;
mod server;
mod sessions;
mod tied_walk;
mod upstreams;
mod walk;
