//! The accounts of all environments and upstreams of a process.

use super::Account;
use super::audit::AuditLog;
use super::owner::UPSTREAM_PREFIX;
use std::sync::{Arc, Mutex, PoisonError};

/// An account with its name: that of its environment, or `upstream:openai`.
pub type NamedAccount = (Arc<str>, Arc<Account>);

/// The accounts of all environments and upstreams that a config of this process has had. An account stays when its owner
/// disappears from the config, because requests may still hold reservations, and because the owner may come back.
/// So the index of an account never changes.
#[derive(Debug, Default)]
pub struct Accounts {
    all: Mutex<Arc<Vec<NamedAccount>>>,
    audit: AuditLog,
}

impl Accounts {
    /// Adds a new account. `name`: as [`Owner::key`](super::Owner::key) returns it.
    pub fn add(&self, name: &str, account: Arc<Account>) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut all).push((name.into(), account));
    }

    /// All accounts, in the order in which they were added.
    pub fn all(&self) -> Arc<Vec<NamedAccount>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The actions of administrators on the accounts and the gateway.
    pub fn audit(&self) -> &AuditLog {
        &self.audit
    }

    /// The account with this name.
    pub fn of(&self, name: &str) -> Option<Arc<Account>> {
        self.all().iter().find(|(known, _)| &**known == name).map(|(_, account)| account.clone())
    }

    /// The account of an upstream. `None`: no config of this process has had limits for it.
    pub fn of_upstream(&self, name: &str) -> Option<Arc<Account>> {
        self.of(&format!("{UPSTREAM_PREFIX}{name}"))
    }
}
