//! Finds the known name that a mistyped name probably means.

/// A longer name has no similar name: comparing costs time in proportion to both lengths.
const MAX_TYPO_BYTES: usize = 64;

/// The most similar known name, if it is similar enough to be the intended one.
pub(crate) fn most_similar<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    if name.len() > MAX_TYPO_BYTES {
        return None;
    }
    let distance = |candidate: &str| edit_distance(&name.to_lowercase(), &candidate.to_lowercase());
    let max_distance = |candidate: &str| 1 + candidate.len().max(name.len()) / 4;
    let candidates =
        known.iter().filter(|c| c.len().abs_diff(name.len()) <= max_distance(c)).map(|c| (distance(c), *c));
    candidates
        .filter(|(distance, candidate)| *distance <= max_distance(candidate))
        .min()
        .map(|(_, candidate)| candidate)
}

/// The number of characters to insert, delete or replace, or of neighbours to exchange, to make one name of the other.
fn edit_distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    // Row `i` has the distances from the first `i` characters to every beginning of `to`.
    let mut rows: Vec<Vec<usize>> = vec![(0..=to.len()).collect()];
    for i in 1..=from.len() {
        let mut row = vec![i];
        for j in 1..=to.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let is_exchange = i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1];
            let exchanged = if is_exchange { rows[i - 2][j - 2] + 1 } else { usize::MAX };
            row.push(replaced.min(exchanged).min(rows[i - 1][j] + 1).min(row[j - 1] + 1));
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_counted() {
        for (from, to, edits) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("abc", "abd", 1),
            ("abc", "acb", 1),
            ("promt", "prompt", 1),
            ("ünit", "unit", 1),
        ] {
            assert_eq!(edit_distance(from, to), edits, "{from} {to}");
        }
    }

    #[test]
    fn a_similar_known_name_is_suggested() {
        let known = ["total_tokens", "prompt_tokens", "requests"];
        for (name, want) in [
            ("total_token", Some("total_tokens")),
            ("TOTAL_TOKENS", Some("total_tokens")),
            ("request", Some("requests")),
            ("promt_tokens", Some("prompt_tokens")),
            ("colour", None),
            ("", None),
            (&"x".repeat(1_000_000), None),
        ] {
            assert_eq!(most_similar(name, &known), want);
        }
    }
}
