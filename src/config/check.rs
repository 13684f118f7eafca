//! Settings that the contract has and this version does not act on yet: accepted, so that a config need
//! not change later, and said aloud, so that nobody relies on them.

use super::item::{Item, Section};
use super::node::Value;

/// A path (`*`: every entry), the values that need no warning, and what happens instead.
const NOT_IN_FORCE: &[(&[&str], &[&str], &str)] = &[
    (&["server", "tls"], &[], "callers are served plain HTTP"),
    (&["upstreams", "*", "api"], &["openai", "azure"], "only OpenAI's own paths are served"),
    (&["store", "redis"], &[], "counters are this node's own"),
];

/// Warns of every setting that has no effect yet.
pub(super) fn not_in_force(top: &Section<'_>) {
    for (path, fine, instead) in NOT_IN_FORCE {
        let Some((first, rest)) = path.split_first() else { continue };
        if let Some(item) = top.get(first) {
            visit(&item, rest, fine, instead);
        }
    }
}

fn visit(item: &Item<'_>, path: &[&str], fine: &[&str], instead: &str) {
    let Some((next, rest)) = path.split_first() else {
        let is_fine = matches!(&item.node.value, Value::Scalar(s) if fine.contains(&s.text.as_str()));
        if !is_fine && !item.node.is_null() {
            item.warn(format!("this is not in force in this version: {instead}"));
        }
        return;
    };
    let items = match &item.node.value {
        Value::Map(_) => item.map("a mapping").map(|section| section.items_named(next)),
        Value::List(_) if *next == "*" => item.list(),
        _ => None,
    };
    for item in items.unwrap_or_default() {
        visit(&item, rest, fine, instead);
    }
}
