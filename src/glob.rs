//! Patterns for model names.

/// A pattern. `*` matches any number of characters, `?` matches one byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(String);

impl Glob {
    /// Creates a pattern. Every string is valid.
    pub fn new(pattern: impl Into<String>) -> Self {
        Self(pattern.into())
    }

    /// The text of the pattern.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether some name matches both patterns. Takes time in proportion to the product of both lengths.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let (one, other) = (self.0.as_bytes(), other.0.as_bytes());
        // `row[j]`: whether some text matches the first `i` bytes of `one` and the first `j` bytes of `other`.
        let mut row: Vec<bool> = vec![false; other.len() + 1];
        row[0] = true;
        for j in 0..other.len() {
            row[j + 1] = row[j] && other[j] == b'*';
        }
        for &a in one {
            let mut diagonal = row[0];
            row[0] &= a == b'*';
            for (j, &b) in other.iter().enumerate() {
                let above = row[j + 1];
                row[j + 1] = if a == b'*' || b == b'*' {
                    // A star matches nothing, or the character that the other pattern has here.
                    above || row[j]
                } else {
                    diagonal && (a == b || a == b'?' || b == b'?')
                };
                diagonal = above;
            }
        }
        row[other.len()]
    }

    /// Whether every name matches.
    pub(crate) fn is_any(&self) -> bool {
        !self.0.is_empty() && self.0.bytes().all(|b| b == b'*')
    }

    /// Whether this pattern certainly matches every name that `other` matches. `false`: this is not known.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        // Only a star matches a text that is longer than the pattern.
        let long = "\u{1}".repeat(self.0.len() + 1);
        self.matches(&other.0.replace('*', "")) && self.matches(&other.0.replace('*', &long))
    }

    /// Whether the whole `name` matches.
    ///
    /// Backtracks to the last star only, so time is at most proportional to the product of both lengths.
    pub fn matches(&self, name: &str) -> bool {
        let (pattern, name) = (self.0.as_bytes(), name.as_bytes());
        let (mut p, mut n) = (0, 0);
        let mut retry: Option<(usize, usize)> = None;
        while n < name.len() {
            match pattern.get(p) {
                Some(b'*') => {
                    retry = Some((p, n));
                    p += 1;
                }
                Some(&c) if c == b'?' || c == name[n] => {
                    p += 1;
                    n += 1;
                }
                _ => match retry {
                    Some((star, at)) => {
                        p = star + 1;
                        n = at + 1;
                        retry = Some((star, n));
                    }
                    None => return false,
                },
            }
        }
        pattern[p..].iter().all(|&c| c == b'*')
    }
}

#[cfg(test)]
mod tests {
    use super::Glob;
    use proptest::prelude::*;

    #[test]
    fn two_patterns_overlap_if_a_name_matches_both() {
        for (one, other, want) in [
            ("gpt-4o*", "gpt-4*", true),
            ("gpt-4.1*", "gpt-4o*", false),
            ("*-mini", "gpt-?", false),
            ("*-mini", "gpt-*", true),
            ("gpt-4o", "gpt-4o", true),
            ("a*", "*b", true),
            ("a?", "?b", true),
            ("", "*", true),
            ("", "?", false),
        ] {
            assert_eq!(Glob::new(one).overlaps(&Glob::new(other)), want, "{one} {other}");
            assert_eq!(Glob::new(other).overlaps(&Glob::new(one)), want, "{other} {one}");
        }
    }

    proptest! {
        #[test]
        fn patterns_that_share_a_short_name_overlap(one in "[ab*?]{0,4}", other in "[ab*?]{0,4}") {
            let names = (0..=8usize).flat_map(|length| {
                (0..1usize << length).map(move |bits| (0..length).map(|at| if bits >> at & 1 == 0 { 'a' } else { 'b' }).collect::<String>())
            });
            let (one, other) = (Glob::new(one), Glob::new(other));
            // Two patterns of four characters that overlap share a name of at most eight characters.
            let shares = names.into_iter().any(|name| one.matches(&name) && other.matches(&name));
            prop_assert_eq!(one.overlaps(&other), shares);
        }

        #[test]
        fn a_pattern_covers_only_what_it_matches(one in "[ab*?]{0,5}", other in "[ab*?]{0,5}", name in "[ab]{0,9}") {
            let (one, other) = (Glob::new(one), Glob::new(other));
            prop_assert!(!one.covers(&other) || !other.matches(&name) || one.matches(&name), "{:?} {:?}", one, other);
        }
    }

    #[test]
    fn a_pattern_covers_narrower_ones() {
        for (one, other, want) in [
            ("*", "gpt-*", true),
            ("gpt-*", "gpt-4*", true),
            ("gpt-*", "gpt-4o", true),
            ("gpt-?", "gpt-4", true),
            ("gpt-?", "gpt-*", false),
            ("gpt-4*", "gpt-*", false),
            ("*-mini", "gpt-*-mini", true),
            ("gpt-*", "*", false),
        ] {
            assert_eq!(Glob::new(one).covers(&Glob::new(other)), want, "{one} {other}");
        }
        assert!(Glob::new("**").is_any() && !Glob::new("").is_any() && !Glob::new("a*").is_any());
    }

    #[test]
    fn a_glob_matches_the_whole_name() {
        for (pattern, name, want) in [
            ("gpt-4o*", "gpt-4o-mini", true),
            ("gpt-4o*", "my-gpt-4o", false),
            ("*-mini", "gpt-4o-mini", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-b", false),
            ("gpt-?", "gpt-4", true),
            ("gpt-?", "gpt-40", false),
            ("*", "", true),
            ("", "", true),
            ("", "x", false),
        ] {
            assert_eq!(Glob::new(pattern).matches(name), want, "{pattern} {name}");
        }
    }
}
