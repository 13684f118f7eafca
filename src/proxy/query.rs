//! API keys in a request's query, where Google's SDKs may send them.

use http::Uri;
use std::borrow::Cow;

/// The decoded value of every parameter `key`.
pub(super) fn keys(query: &str) -> impl Iterator<Item = Cow<'_, str>> {
    form_urlencoded::parse(query.as_bytes()).filter(|(name, _)| name == "key").map(|(_, value)| value)
}

/// The query to forward, without its keys if `removes_keys`.
pub(super) fn forwarded(uri: &Uri, removes_keys: bool) -> Option<Cow<'_, str>> {
    let query = uri.query()?;
    if removes_keys { without_keys(query).map(Cow::Owned) } else { Some(Cow::Borrowed(query)) }
}

/// The query without its parameters `key`; all other parameters are unchanged. `None`: no parameter is left.
fn without_keys(query: &str) -> Option<String> {
    let is_key = |part: &&str| form_urlencoded::parse(part.as_bytes()).any(|(name, _)| name == "key");
    let rest: Vec<&str> = query.split('&').filter(|part| !is_key(part)).collect();
    Some(rest.join("&")).filter(|rest| !rest.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_in_every_encoding() {
        let query = "alt=sse&key=a%62c&x=key&%6bey=d&Key=e&key=";
        assert_eq!(keys(query).collect::<Vec<_>>(), ["abc", "d", ""]);
        assert_eq!(without_keys(query).as_deref(), Some("alt=sse&x=key&Key=e"));
        assert_eq!(without_keys("key=a"), None);
        assert_eq!(without_keys("a=%zz&&b").as_deref(), Some("a=%zz&&b"));
    }
}
