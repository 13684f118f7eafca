//! API keys in a request's query. Google's SDKs may send them as `key`. A caller may also send one by mistake, under
//! any name.

use http::Uri;
use std::borrow::Cow;

/// Bounds of the work for one query: the number of texts that are looked up, and their bytes together. Looking up
/// takes some 100 microseconds at most. Queries of the APIs have a few texts.
const MAX_CANDIDATES: usize = 256;
const MAX_CANDIDATE_BYTES: usize = 64 * 1024;
/// A name or value is looked up after each of its first equals signs, up to this number.
const MAX_EQUALS_SIGNS: usize = 4;
/// Longer keys cannot be configured.
const MAX_KEY_BYTES: usize = crate::config::MAX_KEY_BYTES;

/// Whether a text is a key of the gateway.
pub(super) type IsKey<'a> = &'a dyn Fn(&[u8]) -> bool;

/// The texts in a query that an upstream could read as a key.
#[derive(Debug, Default)]
struct Candidates {
    texts: Vec<Vec<u8>>,
    bytes: usize,
    are_too_many: bool,
}

/// Every text in a query that an upstream could read as a key: names, values and their words, decoded in every way
/// that parsers of queries use. `None`: there are too many to look them up.
pub(super) fn candidates(query: &str) -> Option<Vec<Vec<u8>>> {
    let mut found = Candidates::default();
    for part in query.split('&') {
        found.add_part(part);
        // Some parsers also separate parameters by semicolons.
        if part.contains(';') {
            part.split(';').for_each(|piece| found.add_part(piece));
        }
    }
    (!found.are_too_many).then_some(found.texts)
}

impl Candidates {
    /// Adds the texts of one parameter.
    fn add_part(&mut self, part: &str) {
        self.add_decoded(part.as_bytes().to_vec());
        // In a form, a plus sign stands for a space.
        if part.contains('+') {
            self.add_decoded(part.replace('+', " ").into_bytes());
        }
    }

    /// Adds the texts of one parameter: as it is, decoded, and decoded twice.
    fn add_decoded(&mut self, mut text: Vec<u8>) {
        for _ in 0..3 {
            self.add_words(&text);
            let decoded = percent_decoded(&text);
            if self.are_too_many || decoded == text {
                return;
            }
            text = decoded;
        }
    }

    /// Adds the words of a text. Keys consist of printable characters.
    fn add_words(&mut self, text: &[u8]) {
        for word in text.split(|byte| !byte.is_ascii_graphic()) {
            self.add(word);
            for (at, _) in word.iter().enumerate().filter(|(_, byte)| **byte == b'=').take(MAX_EQUALS_SIGNS) {
                self.add(&word[..at]);
                self.add(&word[at + 1..]);
            }
            let is_punctuation = |byte: &u8| b",;:&=\"'()<>[]{}|".contains(byte);
            if word.iter().any(is_punctuation) {
                word.split(is_punctuation).for_each(|piece| self.add(piece));
            }
            if self.are_too_many {
                return;
            }
        }
    }

    fn add(&mut self, text: &[u8]) {
        if text.is_empty() || text.len() > MAX_KEY_BYTES || self.texts.iter().any(|known| known == text) {
            return;
        }
        self.bytes += text.len();
        if self.texts.len() == MAX_CANDIDATES || self.bytes > MAX_CANDIDATE_BYTES {
            self.are_too_many = true;
        } else {
            self.texts.push(text.to_vec());
        }
    }
}

/// A segment of a path without percent-encoding.
pub(super) fn decoded(segment: &str) -> String {
    String::from_utf8_lossy(&percent_decoded(segment.as_bytes())).into_owned()
}

/// The values of a parameter, decoded as a form: a plus sign stands for a space.
pub(super) fn values_of<'q>(name: &'q str, query: &'q str) -> impl Iterator<Item = Vec<u8>> + 'q {
    let form_decoded = |text: &str| percent_decoded(text.replace('+', " ").as_bytes());
    let pairs = query.split('&').map(|part| part.split_once('=').unwrap_or((part, "")));
    let named = pairs.filter(move |(given, _)| form_decoded(given) == name.as_bytes());
    named.map(move |(_, value)| form_decoded(value))
}

/// Decodes every `%` with two hexadecimal digits.
fn percent_decoded(text: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let digit =
            |at: usize| char::from(*after.get(at)?).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let byte = digit(0).zip(digit(1)).filter(|_| first == b'%').map(|(high, low)| high << 4 | low);
        decoded.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    decoded
}

/// The query to forward, without the parameters that hold a key: one for which `is_key` is true, or any parameter
/// `key` if `removes_key_parameter`.
pub(super) fn without_keys<'u>(
    uri: &'u Uri,
    removes_key_parameter: bool,
    is_key: Option<IsKey<'_>>,
) -> Option<Cow<'u, str>> {
    let query = uri.query()?;
    if !removes_key_parameter && is_key.is_none() {
        return Some(Cow::Borrowed(query));
    }
    let is_named_key = |part: &str| values_of("key", part).next().is_some();
    let holds_key = |part: &str| {
        let Some(is_key) = is_key else { return false };
        candidates(part).is_none_or(|texts| texts.iter().any(|text| is_key(text)))
    };
    let rest: Vec<&str> = query
        .split('&')
        .filter(|part| !(removes_key_parameter && is_named_key(part) || holds_key(part)))
        .collect();
    Some(rest.join("&")).filter(|rest| !rest.is_empty()).map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_of_a_parameter_are_decoded_as_a_form() {
        for (query, values) in [
            ("key=a&x=b&key=c", &["a", "c"][..]),
            ("%6bey=a%2Bb+c%", &["a+b c%"]),
            ("key", &[""]),
            ("key=", &[""]),
            ("keys=a&KEY=b&x=key&", &[]),
            ("", &[]),
        ] {
            let found: Vec<_> = values_of("key", query).collect();
            assert_eq!(found, values.iter().map(|value| value.as_bytes()).collect::<Vec<_>>(), "{query}");
        }
    }

    fn finds(query: &str, key: &str) -> bool {
        candidates(query).is_some_and(|texts| texts.iter().any(|text| text == key.as_bytes()))
    }

    fn forwarded(query: &str, removes_key_parameter: bool, key: Option<&str>) -> Option<String> {
        let uri: Uri = format!("/v1/x?{query}").parse().unwrap();
        let is_key = |text: &[u8]| key.is_some_and(|key| text == key.as_bytes());
        without_keys(&uri, removes_key_parameter, key.map(|_| &is_key as IsKey<'_>)).map(Cow::into_owned)
    }

    #[test]
    fn a_key_is_found_under_every_name_and_in_every_spelling() {
        for query in [
            "key=sk-1",
            "alt=sse&key=sk-1",
            "Key=sk-1",
            "%4bey=sk-1",
            "api_key=sk-1&x=1",
            "x=1;key=sk-1",
            "x=1;key=sk-1;y=2",
            "key=sk-1%20",
            "key=sk-1+",
            "key=+%09sk-1",
            "key=sk%2d1",
            "key=%73%6B%2D%31",
            "key=sk%252d1",
            "auth=Bearer%20sk-1",
            "auth=Bearer+sk-1",
            "filter={\"key\":\"sk-1\"}",
            "x=%7B%22key%22%3A%22sk-1%22%7D",
            "sk-1",
            "sk-1=",
            "=sk-1",
            "a=b=sk-1",
            "x=1&&sk-1",
            "keys=a,sk-1",
            "url=https%3A%2F%2Fh%2F%3Fa%3Db%26key%3Dsk-1",
        ] {
            assert!(finds(query, "sk-1"), "{query}");
        }
        for (query, key) in [
            ("key=a+b", "a+b"),
            ("key=a%2Bb", "a+b"),
            ("key=a==", "a=="),
            ("key=a%3db", "a=b"),
            ("key=a;b", "a;b"),
            ("key=a%26b", "a&b"),
        ] {
            assert!(finds(query, key), "{query}");
        }
        assert!(!finds("key=sk-12&x=sk", "sk-1"));
    }

    #[test]
    fn only_the_parameters_with_keys_are_removed() {
        let query = "alt=sse&key=a%62c&x=key&%6bey=d&Key=e&key=";
        assert_eq!(forwarded(query, true, None).as_deref(), Some("alt=sse&x=key&Key=e"));
        assert_eq!(forwarded(query, false, None).as_deref(), Some(query));
        assert_eq!(forwarded(query, false, Some("abc")).as_deref(), Some("alt=sse&x=key&%6bey=d&Key=e&key="));
        assert_eq!(forwarded(query, true, Some("e")).as_deref(), Some("alt=sse&x=key"));
        assert_eq!(forwarded("key=a", true, None), None);
        assert_eq!(forwarded("a=%zz&&b", true, Some("z")).as_deref(), Some("a=%zz&&b"));
    }

    #[test]
    fn the_work_for_a_long_query_is_bounded() {
        let many: Vec<_> = (0..1_000).map(|n| format!("p{n}={n}&")).collect();
        assert!(candidates(&many.concat()).is_none());
        assert!(candidates(&format!("x={}", "%41,".repeat(20_000))).is_some_and(|texts| texts.len() < 10));
        assert!(candidates(&format!("x={}", "a".repeat(60_000))).is_some());
        assert!(candidates(&format!("x={}", "=".repeat(60_000))).is_some());
        let long: Vec<_> = (0..30).map(|n| format!("{n}={}&", "a".repeat(4_000))).collect();
        assert!(candidates(&long.concat()).is_none());
    }

    /// A key's characters, each as it is or percent-encoded in either case.
    fn encoded(key: &str, choices: &[u8], encodes: &[u8]) -> String {
        key.bytes()
            .zip(choices.iter().cycle())
            .map(|(byte, choice)| {
                let must_encode = b"%&#\"<>\\^`{|}".contains(&byte) || encodes.contains(&byte);
                match choice % 3 {
                    0 if !must_encode => char::from(byte).to_string(),
                    1 => format!("%{byte:02x}"),
                    _ => format!("%{byte:02X}"),
                }
            })
            .collect()
    }

    proptest! {
        #[test]
        fn a_key_is_found_in_every_encoding(
            key in "[!-~]{8,40}",
            choices in prop::collection::vec(any::<u8>(), 1..40),
            name in "[A-Za-z_%0-9]{0,6}",
            before in "([a-z]{1,3}=[a-z0-9%+]{0,5}[&;]){0,4}",
            around in "(%20|\\+|%09|%0a){0,2}",
            after in "([&;][a-z]{1,3}=[a-z0-9%+]{0,5}){0,4}",
        ) {
            // A plus sign around the key is a space, and a semicolon around it a separator. So they must be encoded in it.
            let encodes: Vec<u8> = format!("{before}{around}{after}").bytes().filter(|b| b"+;".contains(b)).collect();
            let encoded = encoded(&key, &choices, &encodes);
            let equals = if name.is_empty() { "" } else { "=" };
            let query = format!("{before}{name}{equals}{around}{encoded}{around}{after}");
            prop_assert!(finds(&query, &key), "{query}");
            let uri: Uri = format!("/x?{query}").parse().unwrap();
            let rest = without_keys(&uri, false, Some(&|text: &[u8]| text == key.as_bytes()));
            prop_assert!(!rest.is_some_and(|rest| finds(&rest, &key)), "{query}");
        }

        #[test]
        fn no_query_causes_a_panic(query in "[ -~]{0,80}") {
            let _ = candidates(&query);
        }
    }
}
