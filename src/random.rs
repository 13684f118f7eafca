//! Random numbers for identifiers, and random secrets.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use std::hash::{BuildHasher as _, RandomState};
use tokio_rustls::rustls::crypto::ring::default_provider;

/// Random bytes of a secret: 256 bits cannot be guessed.
const SECRET_BYTES: usize = 32;

/// A number that no other process is likely to draw. It is not secret: keys and tokens must not be made from it.
pub(crate) fn number() -> u64 {
    // The standard library takes the keys of a `RandomState` from the operating system.
    RandomState::new().hash_one(())
}

/// A secret that no other party can guess: 43 letters, digits, `-` and `_`. `None`: the operating system provides no
/// random numbers.
pub(crate) fn secret() -> Option<String> {
    let mut bytes = [0; SECRET_BYTES];
    default_provider().secure_random.fill(&mut bytes).ok()?;
    Some(BASE64_URL_SAFE_NO_PAD.encode(bytes))
}

#[cfg(test)]
mod tests {
    #[test]
    fn secrets_differ_and_fit_a_header() {
        let secrets: std::collections::HashSet<String> = (0..100).map(|_| super::secret().unwrap()).collect();
        assert_eq!(secrets.len(), 100);
        assert!(secrets.iter().all(|s| s.len() == 43 && s.bytes().all(|b| b.is_ascii_graphic())));
    }

    #[test]
    fn numbers_differ() {
        let numbers: std::collections::HashSet<u64> = (0..1000).map(|_| super::number()).collect();
        assert_eq!(numbers.len(), 1000);
    }
}
