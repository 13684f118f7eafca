//! The counters that nodes share, in Redis servers of the tests' own: the same steps give the same as the engine without
//! Redis, and a server that is away holds nobody up.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, clippy::panic, clippy::cast_possible_wrap)]

mod access;
mod burst;
mod chaos;
mod client;
mod cluster;
mod connection;
mod member;
#[path = "../common/port.rs"]
mod port;
#[path = "../common/proxy.rs"]
mod proxy;
mod sentinel;
mod server;
mod sessions;
mod walk;
