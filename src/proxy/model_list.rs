//! Restricts the upstream's list of models to the models that the environment allows.

use crate::glob::Glob;
use crate::json::replace_lone_surrogates;
use crate::upstream::Incoming;
use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::future::poll_fn;
use std::time::Duration;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// A longer list passes unchanged.
const MAX_LIST_BYTES: usize = 4 * 1024 * 1024;
/// A longer list is restricted on the blocking pool.
const MAX_INLINE_BYTES: usize = 64 * 1024;
/// If the list takes longer to arrive, it passes unchanged.
const MAX_READ_TIME: Duration = Duration::from_secs(10);

/// Reads the list and removes the models that no pattern allows. Any other answer passes unchanged.
pub(super) async fn restrict(mut incoming: Incoming, headers: &mut HeaderMap, allowed: &[Glob]) -> Incoming {
    if headers.contains_key(header::CONTENT_ENCODING) {
        return incoming;
    }
    let mut read = BytesMut::new();
    let reading = async {
        while read.len() <= MAX_LIST_BYTES {
            match poll_fn(|cx| incoming.poll_data(cx)).await {
                Some(Ok(data)) => read.extend_from_slice(&data),
                Some(Err(error)) => return (false, Some(error)),
                None => return (true, None),
            }
        }
        (false, None)
    };
    let (is_whole, error) = timeout(MAX_READ_TIME, reading).await.unwrap_or_default();
    let read = read.freeze();
    let restricted = match read.len() {
        _ if !is_whole => None,
        ..=MAX_INLINE_BYTES => allowed_only(&read, allowed),
        _ => {
            let (list, allowed) = (read.clone(), allowed.to_vec());
            spawn_blocking(move || allowed_only(&list, &allowed)).await.ok().flatten()
        }
    };
    let Some(list) = restricted else { return incoming.with_read(read, error) };
    headers.remove(header::CONTENT_LENGTH);
    incoming.with_read(list, None)
}

/// The list as the providers send it: OpenAI and Anthropic name it `data`, Google `models`.
#[derive(Deserialize)]
struct ModelList<'l> {
    #[serde(borrow, alias = "models")]
    data: Vec<&'l RawValue>,
}

#[derive(Deserialize)]
struct ModelNames<'l> {
    #[serde(borrow)]
    id: Option<Cow<'l, str>>,
    /// Google's name: `models/` and the id.
    #[serde(borrow)]
    name: Option<Cow<'l, str>>,
}

/// The list without the models that no pattern allows. All other bytes stay. `None`: this is no list of models.
fn allowed_only(list: &Bytes, allowed: &[Glob]) -> Option<Bytes> {
    let json = std::str::from_utf8(list).ok()?;
    let ModelList { data } = serde_json::from_str(json).ok()?;
    let (first, last) = (data.first()?, data.last()?);
    let position = |text: &str| text.as_ptr().addr() - json.as_ptr().addr();
    let (start, end) = (position(first.get()), position(last.get()) + last.get().len());
    let kept: Vec<&str> =
        data.iter().map(|model| model.get()).filter(|model| is_allowed(model, allowed)).collect();
    Some([&json[..start], &kept.join(","), &json[end..]].concat().into())
}

/// Whether a pattern allows a model. One without a name stays.
fn is_allowed(model: &str, allowed: &[Glob]) -> bool {
    name_of(model).is_none_or(|name| allowed.iter().any(|pattern| pattern.matches(&name)))
}

/// The name of a model of a list.
fn name_of(model: &str) -> Option<String> {
    let model = replace_lone_surrogates(model.as_bytes());
    let ModelNames { id, name } = serde_json::from_slice(&model).ok()?;
    let name = id.or(name)?;
    Some(name.strip_prefix("models/").unwrap_or(&name).to_owned())
}

/// A model of a list.
#[derive(Debug)]
pub(super) struct ListedModel {
    pub(super) id: String,
    /// Its JSON, as the upstream sent it.
    pub(super) entry: String,
}

/// The models of a list, without those that have no name. `None`: this is no list of models.
pub(super) fn listed(list: &[u8]) -> Option<Vec<ListedModel>> {
    let ModelList { data } = serde_json::from_slice(list).ok()?;
    let entries = data.into_iter().map(RawValue::get);
    Some(
        entries
            .filter_map(|entry| Some(ListedModel { id: name_of(entry)?, entry: entry.to_owned() }))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_keeps_the_allowed_models_and_every_other_byte() {
        let allowed = ["gpt-4o*", "o3", "gemini-2*"].map(Glob::new);
        for (list, want) in [
            (
                r#"{"object":"list", "data":[ {"id":"gpt-4o","x":1e2} , {"id":"gpt-4.1"}, {"id":"o3"}], "y":2}"#,
                Some(r#"{"object":"list", "data":[ {"id":"gpt-4o","x":1e2},{"id":"o3"}], "y":2}"#),
            ),
            (
                r#"{"models":[{"name":"models/gemini-1.5-pro"},{"name":"models/gemini-2.5-pro"}],"nextPageToken":"a"}"#,
                Some(r#"{"models":[{"name":"models/gemini-2.5-pro"}],"nextPageToken":"a"}"#),
            ),
            (r#"{"data":[{"id":"a"},{"id":"b"}],"has_more":false}"#, Some(r#"{"data":[],"has_more":false}"#)),
            (r#"{"data":[{"object":"model"}]}"#, Some(r#"{"data":[{"object":"model"}]}"#)),
            (r#"{"data":[]}"#, None),
            (r#"{"id":"gpt-4o"}"#, None),
            ("[1,2", None),
        ] {
            let restricted = allowed_only(&Bytes::from_static(list.as_bytes()), &allowed);
            assert_eq!(restricted.as_deref(), want.map(str::as_bytes), "{list}");
        }
    }
}
