//! Settings that the contract has and this version does not act on yet: accepted, so that a config need
//! not change later, and said aloud, so that nobody relies on them.

use super::Store;
use super::item::{Item, Section};
use super::node::Value;

/// A path (`*`: every entry), the values that need no warning, and what happens instead.
const NOT_IN_FORCE: &[(&[&str], &[&str], &str)] = &[
    (&["server", "tls"], &[], "callers are served plain HTTP"),
    (&["server", "flood_guard"], &["0"], "no address is held back"),
    (&["upstreams", "*", "api"], &["openai", "azure"], "only OpenAI's own paths are served"),
    (&["environments", "*", "enforce"], &["true"], "quotas are enforced"),
    (&["environments", "*", "reserve", "quantile"], &[], "adaptive expects 512 tokens of every answer"),
    (&["environments", "*", "reserve", "when_short"], &["reject"], "requests that do not fit are refused"),
    (&["environments", "*", "reserve", "on_overrun"], &["finish"], "streams end when the upstream ends them"),
    (
        &["environments", "*", "reserve", "max_wait"],
        &["0", "0s", "0ms"],
        "requests that do not fit are refused at once",
    ),
    (&["environments", "*", "on_disconnect"], &["cancel"], "the upstream call is cancelled"),
    (&["environments", "*", "unseen_prompt_tokens"], &[], "nothing is reserved for what a request refers to"),
    (&["environments", "*", "cached_prompt_tokens"], &["count"], "cache reads count"),
    (&["environments", "*", "calibrate"], &["false"], "estimates are not corrected"),
    (&["models", "*", "tokenizer"], &[], "its models are counted like unknown ones"),
    (&["store", "path"], &[], "counters are kept in memory and start full after a restart"),
    (&["store", "history"], &[], "no usage history is kept"),
    (&["store", "redis"], &[], "counters are this node's own, and kept in memory"),
];

/// Warns of every setting that has no effect yet.
pub(super) fn not_in_force(top: &Section<'_>, store: &Store) {
    for (path, fine, instead) in NOT_IN_FORCE {
        let Some((first, rest)) = path.split_first() else { continue };
        if let Some(item) = top.get(first) {
            visit(&item, rest, fine, instead);
        }
    }
    let item = top.get("store");
    let names = item.as_ref().and_then(|i| i.map("a mapping")).map_or(Vec::new(), |section| section.names());
    if !store.memory && !names.contains(&"path") && !names.contains(&"redis") {
        let message = "counters are kept in memory and start full after a restart; memory: true says so";
        top.findings.warn(item.as_ref().map_or(top.place, |item| &item.node.place), "store", message);
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
