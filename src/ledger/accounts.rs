//! The accounts of all environments of a process.

use super::Account;
use super::audit::AuditLog;
use std::sync::{Arc, Mutex, PoisonError};

/// An account with the name of its environment.
pub type NamedAccount = (Arc<str>, Arc<Account>);

/// The accounts of all environments that a config of this process has had. An account stays when its environment
/// disappears from the config, because requests may still hold reservations, and because the environment may come back.
/// So the index of an account never changes.
#[derive(Debug, Default)]
pub struct Accounts {
    all: Mutex<Arc<Vec<NamedAccount>>>,
    audit: AuditLog,
}

impl Accounts {
    /// Adds the account of a new environment.
    pub fn add(&self, environment: &str, account: Arc<Account>) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut all).push((environment.into(), account));
    }

    /// All accounts, in the order in which they were added.
    pub fn all(&self) -> Arc<Vec<NamedAccount>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The actions of administrators on the accounts and the gateway.
    pub fn audit(&self) -> &AuditLog {
        &self.audit
    }

    /// The account of an environment.
    pub fn of(&self, environment: &str) -> Option<Arc<Account>> {
        self.all().iter().find(|(name, _)| &**name == environment).map(|(_, account)| account.clone())
    }
}
