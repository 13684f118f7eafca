//! The audit log: `GET /api/audit`, and how other files record actions.

use super::Admin;
use super::answers::{AccessErrors, ErrorBody, QueryResult, read_query, refusal};
use crate::clock::{self, Timestamp};
use crate::ledger::AuditEntry;
use crate::store;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde::Serialize;
use serde_json::Value;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use utoipa::{IntoParams, ToSchema};

/// The target of actions on the admin listener itself.
pub(super) const LISTENER: &str = "admin listener";
/// Number of entries in an answer to a query without `limit`.
const DEFAULT_ENTRIES: usize = 100;
/// Maximum number of entries in an answer.
const MAX_ENTRIES: usize = 1_000;
/// Longer texts are truncated. A reason, a target or a state is much shorter.
const MAX_TEXT_BYTES: usize = 2_048;
/// Maximum number of entries about wrong tokens per minute, whatever their addresses.
const MAX_WRONG_TOKENS_PER_MINUTE: u32 = 10;
const MINUTE_MS: u64 = 60_000;

/// The sender of a request to the admin listener. Handlers take it as `Extension<Actor>`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Actor {
    /// How the sender was identified.
    pub(super) by: Identity,
    pub(super) address: IpAddr,
}

/// How the sender of a request was identified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// By `admin.token`.
    Token,
    /// By the session of a browser that has signed in with the token.
    Session,
    /// Not at all: there is no token, and the listener is on a loopback address.
    Local,
    /// Not at all: the request needs no token, or had a wrong one.
    Anonymous,
}

impl Identity {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Session => "session",
            Self::Local => "local",
            Self::Anonymous => "anonymous",
        }
    }
}

/// An action for the audit log. It must not contain a token or a key.
#[derive(Debug, Default)]
pub(super) struct Action {
    /// The kind of action, such as `limit_set`.
    pub(super) name: &'static str,
    /// The object of the action, such as `caller 'batch' of environment 'production': total_tokens per minute`.
    pub(super) target: String,
    /// The state before; `Value::Null` if there is none.
    pub(super) before: Value,
    /// The state after; `Value::Null` if there is none.
    pub(super) after: Value,
    /// The reason that the sender gave.
    pub(super) reason: Option<String>,
}

/// Records an action that has taken effect. Returns when the entry is durable, at the latest after a second.
pub(super) async fn record(admin: &Admin, actor: Actor, action: Action) {
    admin.state.record_action(entry(actor, action)).await;
}

/// Records a wrong token, unless there were too many in this minute. Does not wait for the store.
pub(super) fn record_wrong_token(admin: &Admin, address: IpAddr) {
    let Some(omitted) = admin.access.wrong_tokens.admit(clock::now()) else { return };
    let after = if omitted > 0 { serde_json::json!({ "omitted_before": omitted }) } else { Value::Null };
    let target = LISTENER.to_owned();
    let action = Action { name: store::WRONG_TOKEN, target, after, ..Action::default() };
    admin.state.record_action_lazily(entry(Actor { by: Identity::Anonymous, address }, action));
}

/// The target of an action on an environment.
pub(super) fn environment_target(environment: &str) -> String {
    format!("environment '{environment}'")
}

fn entry(actor: Actor, action: Action) -> AuditEntry {
    let json = |value: Value| (!value.is_null()).then(|| truncated(value.to_string()));
    AuditEntry {
        at: clock::now(),
        by: actor.by.as_str().to_owned(),
        address: Some(actor.address.to_canonical().to_string()),
        action: action.name.to_owned(),
        target: truncated(action.target),
        before: json(action.before),
        after: json(action.after),
        reason: action.reason.filter(|reason| !reason.is_empty()).map(truncated),
    }
}

fn truncated(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
    text
}

/// Bounds the number of entries about wrong tokens.
#[derive(Debug, Default)]
pub(super) struct WrongTokens(Mutex<WrongTokensOfMinute>);

#[derive(Debug, Default)]
struct WrongTokensOfMinute {
    began: Timestamp,
    recorded: u32,
    omitted: u64,
}

impl WrongTokens {
    /// Whether a wrong token is recorded now, and how many were omitted since the last one that was.
    fn admit(&self, now: Timestamp) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if now.ms_since(state.began) >= MINUTE_MS || now < state.began {
            (state.began, state.recorded) = (now, 0);
        }
        if state.recorded >= MAX_WRONG_TOKENS_PER_MINUTE {
            state.omitted += 1;
            return None;
        }
        state.recorded += 1;
        Some(std::mem::take(&mut state.omitted))
    }
}

/// The query parameters of `GET /api/audit`.
#[derive(serde::Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct AuditParameters {
    /// Maximum number of entries, at most 1,000. Default: 100.
    limit: usize,
}

impl Default for AuditParameters {
    fn default() -> Self {
        Self { limit: DEFAULT_ENTRIES }
    }
}

/// The answer of `GET /api/audit`.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditView {
    /// Newest first.
    entries: Vec<AuditEntryView>,
}

/// An action of an administrator.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditEntryView {
    /// RFC 3339.
    at: String,
    /// `token`, `session`, `local` (there is no token), `anonymous` (a wrong token), `file` (the config file changed), `signal` (SIGHUP), or
    /// `unknown` (recorded by an earlier version).
    by: String,
    /// The address that the request came from.
    address: Option<String>,
    action: String,
    target: String,
    /// The state before the action.
    before: Value,
    /// The state after the action.
    after: Value,
    /// The reason that the administrator gave.
    reason: Option<String>,
}

impl From<AuditEntry> for AuditEntryView {
    fn from(entry: AuditEntry) -> Self {
        let AuditEntry { at, by, address, action, target, before, after, reason } = entry;
        // A truncated state is not JSON any more: it is shown as text.
        let state = |text: Option<String>| {
            text.map_or(Value::Null, |text| serde_json::from_str(&text).unwrap_or(Value::String(text)))
        };
        let (before, after) = (state(before), state(after));
        Self { at: at.to_rfc3339(), by, address, action, target, before, after, reason }
    }
}

/// What administrators did, newest first.
#[utoipa::path(get, path = "/api/audit", tag = "access", params(AuditParameters), responses(
    (status = 200, description = "The newest entries.", body = AuditView),
    (status = 400, description = "`invalid_value`: a parameter is not valid.", body = ErrorBody),
    (status = 503, description = "`audit_unavailable`: the store cannot be read.", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn audit(State(admin): State<Admin>, query: QueryResult<AuditParameters>) -> Response {
    let limit = match read_query(query) {
        Ok(AuditParameters { limit }) => limit.min(MAX_ENTRIES),
        Err(refusal) => return *refusal,
    };
    let mut entries = admin.state.accounts().audit().newest(limit);
    let settings = admin.state.current().config.store.clone();
    if !settings.memory {
        let read = tokio::task::spawn_blocking(move || store::read_audit(&settings.path, limit)).await;
        let stored = match read.map_err(anyhow::Error::from).and_then(|entries| entries) {
            Ok(stored) => stored,
            Err(error) => {
                let message = format!(
                    "The audit log cannot be read: {error:#}. Check that the file is there and that the gateway may read it."
                );
                return refusal(StatusCode::SERVICE_UNAVAILABLE, "audit_unavailable", &message);
            }
        };
        // The store may have written an entry between the two reads.
        entries.retain(|entry| !stored.contains(entry));
        entries.extend(stored);
        entries.truncate(limit);
    }
    Json(AuditView { entries: entries.into_iter().map(AuditEntryView::from).collect() }).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_wrong_tokens_makes_few_entries_and_is_counted() {
        let wrong_tokens = WrongTokens::default();
        let start = Timestamp(1_000_000);
        let admitted = (0..500).filter_map(|n| wrong_tokens.admit(start.plus_ms(n))).collect::<Vec<_>>();
        assert_eq!(admitted, [0; 10]);
        assert_eq!(wrong_tokens.admit(start.plus_ms(60_000)), Some(490));
        assert_eq!(wrong_tokens.admit(start.plus_ms(60_001)), Some(0));
        // A step back of the clock does not stop the log.
        assert_eq!((0..20).filter_map(|_| wrong_tokens.admit(start.plus_ms(60_002))).count(), 8);
        assert!(wrong_tokens.admit(start).is_some());
    }

    #[test]
    fn long_texts_are_truncated_and_shown_as_text() {
        let actor = Actor { by: Identity::Token, address: IpAddr::from([127, 0, 0, 1]) };
        let long = "ä".repeat(2_000);
        let after = serde_json::json!({ "limit": long });
        let entry = entry(actor, Action { reason: Some(long), after, ..Action::default() });
        assert_eq!(entry.reason.as_ref().unwrap().len(), 2_048);
        let view = AuditEntryView::from(entry);
        assert!(view.after.as_str().unwrap().starts_with("{\"limit\":\"ää"));
        assert_eq!(view.before, Value::Null);
    }
}
