//! Sessions of the page: a signed-in browser sends a cookie instead of the token.

use crate::clock::Timestamp;
use crate::random;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use subtle::ConstantTimeEq as _;

/// A session ends when it was not used for this long.
const IDLE_MS: u64 = 12 * 3_600_000;
/// Maximum number of sessions. A new session replaces the one that was unused for longest.
const MAX_SESSIONS: usize = 1_000;

/// The sessions, by the digest of their secret. The secrets themselves are not stored.
#[derive(Debug, Default)]
pub(super) struct Sessions(HashMap<[u8; 32], BrowserSession>);

#[derive(Debug)]
struct BrowserSession {
    /// Digest of the value that unsafe requests must repeat in a header.
    csrf: [u8; 32],
    /// Digest of the token that opened the session. With another token in the config the session ends.
    token: [u8; 32],
    used: Timestamp,
}

impl BrowserSession {
    fn is_current(&self, token: &str, now: Timestamp) -> bool {
        now.ms_since(self.used) < IDLE_MS && bool::from(self.token.ct_eq(&digest(token)))
    }
}

/// The cookies of a new session.
pub(super) struct SessionSecrets {
    pub(super) session: String,
    /// Scripts of the page read it, scripts of other sites cannot.
    pub(super) csrf: String,
}

impl Sessions {
    /// Opens a session. `None`: there are no random numbers.
    pub(super) fn open(&mut self, token: &str, now: Timestamp) -> Option<SessionSecrets> {
        let secrets = SessionSecrets { session: random::secret()?, csrf: random::secret()? };
        self.0.retain(|_, session| now.ms_since(session.used) < IDLE_MS);
        if self.0.len() >= MAX_SESSIONS
            && let Some(oldest) = self.0.iter().min_by_key(|(_, session)| session.used).map(|(key, _)| *key)
        {
            self.0.remove(&oldest);
        }
        let session = BrowserSession { csrf: digest(&secrets.csrf), token: digest(token), used: now };
        self.0.insert(digest(&secrets.session), session);
        Some(secrets)
    }

    /// Whether this cookie belongs to a session that the token has opened. `csrf`: the value that an unsafe request
    /// repeats; `None` for a safe one.
    pub(super) fn allow(
        &mut self,
        session: &str,
        csrf: Option<&str>,
        token: &str,
        now: Timestamp,
    ) -> SessionVerdict {
        let Some(known) = self.0.get_mut(&digest(session)) else { return SessionVerdict::Unknown };
        if !known.is_current(token, now) {
            self.0.remove(&digest(session));
            return SessionVerdict::Unknown;
        }
        known.used = now;
        match csrf {
            Some(given) if !bool::from(known.csrf.ct_eq(&digest(given))) => SessionVerdict::Forged,
            _ => SessionVerdict::Allowed,
        }
    }

    /// Whether this cookie belongs to a session that the token has opened. Does not count as a use of the session.
    pub(super) fn is_open(&self, session: &str, token: &str, now: Timestamp) -> bool {
        self.0.get(&digest(session)).is_some_and(|known| known.is_current(token, now))
    }

    /// Ends a session.
    pub(super) fn close(&mut self, session: &str) {
        self.0.remove(&digest(session));
    }
}

/// What a session cookie permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionVerdict {
    Allowed,
    /// There is no such session.
    Unknown,
    /// The session exists, but the request does not repeat the value of its `tollgate_csrf` cookie.
    Forged,
}

fn digest(secret: &str) -> [u8; 32] {
    Sha256::digest(secret).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_allows_safe_requests_and_unsafe_ones_that_repeat_its_value() {
        let mut sessions = Sessions::default();
        let now = Timestamp(0);
        let SessionSecrets { session, csrf } = sessions.open("token", now).unwrap();
        for (secret, given, token, at, want) in [
            (&session, None, "token", now, SessionVerdict::Allowed),
            (&session, Some(csrf.as_str()), "token", now, SessionVerdict::Allowed),
            (&session, Some("other"), "token", now, SessionVerdict::Forged),
            (&session, Some(""), "token", now, SessionVerdict::Forged),
            (&csrf, Some(csrf.as_str()), "token", now, SessionVerdict::Unknown),
            (&session, None, "token", now.plus_ms(IDLE_MS - 1), SessionVerdict::Allowed),
            (&session, None, "token", now.plus_ms(2 * IDLE_MS - 1), SessionVerdict::Unknown),
            (&session, None, "token", now, SessionVerdict::Unknown),
        ] {
            assert_eq!(sessions.allow(secret, given, token, at), want, "{given:?} {at:?}");
        }
        let SessionSecrets { session, .. } = sessions.open("token", now).unwrap();
        assert_eq!(sessions.allow(&session, None, "new token", now), SessionVerdict::Unknown);
        let SessionSecrets { session, .. } = sessions.open("token", now).unwrap();
        assert!(sessions.is_open(&session, "token", now) && !sessions.is_open(&session, "new token", now));
        assert!(!sessions.is_open(&session, "token", now.plus_ms(IDLE_MS)));
        sessions.close(&session);
        assert!(!sessions.is_open(&session, "token", now));
        assert_eq!(sessions.allow(&session, None, "token", now), SessionVerdict::Unknown);
    }

    #[test]
    fn the_number_of_sessions_is_bounded() {
        let mut sessions = Sessions::default();
        let first = sessions.open("token", Timestamp(0)).unwrap();
        (1..=1_000).for_each(|n| drop(sessions.open("token", Timestamp(n))));
        assert_eq!(sessions.0.len(), MAX_SESSIONS);
        assert_eq!(sessions.allow(&first.session, None, "token", Timestamp(1)), SessionVerdict::Unknown);
    }
}
