//! Random numbers for identifiers.

use std::hash::{BuildHasher as _, RandomState};

/// A number that no other process is likely to draw. It is not secret: keys and tokens must not be made from it.
pub(crate) fn number() -> u64 {
    // The standard library takes the keys of a `RandomState` from the operating system.
    RandomState::new().hash_one(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_differ() {
        let numbers: std::collections::HashSet<u64> = (0..1000).map(|_| super::number()).collect();
        assert_eq!(numbers.len(), 1000);
    }
}
