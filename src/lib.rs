//! Tollgate

pub mod clock;
pub mod config;
pub mod glob;
pub mod quota;
