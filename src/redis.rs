//! The counters that several nodes share in Redis: the script that changes them, its commands and replies, and the connection.
//!
//! The script decides whether a request is admitted, and replies with the state in which it found each quota. The
//! node loads these states into its own [`crate::quota::Quotas`] and decides again with the same code as without
//! Redis. The decision is the same. From it the node derives the wait, headers and message of a denial. Except for
//! [`FailFastConnection`], nothing here reads a clock or a socket.

mod cells;
mod command;
mod connection;
mod reply;

pub use cells::Cells;
pub use command::{
    CommandBuilder, EnforceMark, HeldReservation, LEASE_ID, NewLimit, OnShortage, Piece, ReserveRequest,
    ScriptCommand, SentSteps, Step, StepKind, UpstreamReserve,
};
pub(crate) use connection::note;
pub use connection::{
    CallPermit, CallRefusal, FailFastConnection, Unavailable, catch_up_time, check_url, server_identity,
};
pub use reply::{OverrideMark, ScriptReply, Verdict, load_states};

/// The script, for `EVALSHA` and `EVAL`.
pub const SCRIPT: &str = concat!(
    include_str!("redis/script/cells.lua"),
    include_str!("redis/script/requests.lua"),
    include_str!("redis/script/limits.lua"),
    include_str!("redis/script/sessions.lua"),
);
