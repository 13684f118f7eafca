//! Names of fields in other spellings.

/// The index of the name that a key equals when case is ignored, as other parsers may do.
pub(super) fn position(names: &[&str], key: &str) -> Option<usize> {
    if key.len() > 64 {
        return None;
    }
    names.iter().position(|name| *name == key).or_else(|| {
        // The long s and the Kelvin sign fold to ASCII letters.
        let folded: String = key
            .chars()
            .map(|c| match c {
                'ſ' => 's',
                '\u{212a}' => 'k',
                c => c.to_ascii_lowercase(),
            })
            .collect();
        names.iter().position(|name| name.eq_ignore_ascii_case(&folded))
    })
}
