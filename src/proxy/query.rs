//! API keys in a request's query, where Google's clients may put them.

use std::borrow::Cow;

/// The values of every `key` of a query, decoded.
pub(super) fn keys(query: &str) -> impl Iterator<Item = Cow<'_, str>> {
    form_urlencoded::parse(query.as_bytes()).filter(|(name, _)| name == "key").map(|(_, value)| value)
}

/// A query without its keys; everything else as it came. `None`: nothing is left.
pub(super) fn without_keys(query: &str) -> Option<String> {
    let is_key = |part: &&str| form_urlencoded::parse(part.as_bytes()).any(|(name, _)| name == "key");
    let rest: Vec<&str> = query.split('&').filter(|part| !is_key(part)).collect();
    Some(rest.join("&")).filter(|rest| !rest.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_however_they_are_written() {
        let query = "alt=sse&key=a%62c&x=key&%6bey=d&Key=e&key=";
        assert_eq!(keys(query).collect::<Vec<_>>(), ["abc", "d", ""]);
        assert_eq!(without_keys(query).as_deref(), Some("alt=sse&x=key&Key=e"));
        assert_eq!(without_keys("key=a"), None);
        assert_eq!(without_keys("a=%zz&&b").as_deref(), Some("a=%zz&&b"));
    }
}
