//! Settings that the contract has and this version does not act on yet: accepted, so that a config need
//! not change later, and said aloud, so that nobody relies on them.

use super::item::{Item, Section};

/// A path (`*`: every entry), the value that needs no warning, and what happens instead.
const NOT_IN_FORCE: &[(&[&str], &str, &str)] = &[
    (&["server", "tls"], "", "callers are served plain HTTP"),
    (&["server", "flood_guard"], "0", "no address is held back"),
    (&["upstreams", "*", "api"], "openai azure", "only OpenAI's own paths are served"),
    (&["environments", "*", "enforce"], "true", "quotas are enforced"),
    (&["environments", "*", "reserve", "quantile"], "", "adaptive expects 512 tokens of every answer"),
    (&["environments", "*", "reserve", "when_short"], "reject", "requests that do not fit are refused"),
    (&["environments", "*", "reserve", "on_overrun"], "finish", "streams end when the upstream ends them"),
    (&["environments", "*", "reserve", "max_wait"], "0 0s", "requests that do not fit are refused at once"),
    (&["environments", "*", "on_disconnect"], "cancel", "the upstream call is cancelled"),
    (&["environments", "*", "unseen_prompt_tokens"], "", "nothing is reserved for what a request refers to"),
    (&["environments", "*", "cached_prompt_tokens"], "count", "cache reads count"),
    (&["environments", "*", "calibrate"], "false", "estimates are not corrected"),
    (&["models", "*", "tokenizer"], "", "its models are counted like unknown ones"),
    (&["store", "path"], "", "counters are kept in memory and are lost at a restart"),
    (&["store", "history"], "", "no usage history is kept"),
    (&["store", "redis"], "", "counters are this node's own and kept in memory"),
];

/// Warns of every setting in the file that has no effect yet.
pub(super) fn not_in_force(top: &Section<'_>) {
    for (path, fine, instead) in NOT_IN_FORCE {
        let Some((first, rest)) = path.split_first() else { continue };
        if let Some(item) = top.get(first) {
            visit(&item, rest, fine, instead);
        }
    }
    if top.get("store").is_none() {
        let message =
            "counters are kept in memory and are lost at a restart; store: { memory: true } says so";
        top.findings.warn(top.place, "store", message);
    }
}

fn visit(item: &Item<'_>, path: &[&str], fine: &str, instead: &str) {
    use super::node::Value;
    let Some((next, rest)) = path.split_first() else {
        let is_fine = matches!(&item.node.value, Value::Scalar(s) if fine.split(' ').any(|f| f == s.text));
        if !is_fine {
            item.warn(format!("this is not in force in this version: {instead}"));
        }
        return;
    };
    match &item.node.value {
        Value::Map(_) => {
            let entries = item.map("a mapping").into_iter().flat_map(|s| s.items().collect::<Vec<_>>());
            for (_, entry) in
                entries.filter(|(key, entry)| (*next == "*" || key.name == *next) && !entry.node.is_null())
            {
                visit(&entry, rest, fine, instead);
            }
        }
        Value::List(_) if *next == "*" => {
            item.list().unwrap_or_default().iter().for_each(|entry| visit(entry, rest, fine, instead));
        }
        _ => {}
    }
}
