//! Settings that the contract has and this version does not act on yet: accepted, so that a config need
//! not change later, and said aloud, so that nobody relies on them.

use super::item::Section;

/// A section, a setting of it, and what happens instead.
const NOT_IN_FORCE: &[(&str, &str, &str)] = &[("server", "tls", "callers are served plain HTTP")];

/// Warns of every setting that has no effect yet.
pub(super) fn not_in_force(top: &Section<'_>) {
    for (section, setting, instead) in NOT_IN_FORCE {
        let section = top.get(section).and_then(|item| item.map("a mapping"));
        if let Some(item) =
            section.and_then(|section| section.get(setting)).filter(|item| !item.node.is_null())
        {
            item.warn(format!("this is not in force in this version: {instead}"));
        }
    }
}
