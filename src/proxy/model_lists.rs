//! The list of models of an environment with routes: the union of what the upstreams of its routes list.
//!
//! The gateway requests the list of each upstream with the upstream's own key, at most once a minute, for all workers and callers. An
//! upstream that fails is left out.

use super::model_list::{self, ListedModel};
use super::models_request::models_request;
use crate::api::Dialect;
use crate::clock::Stopwatch;
use crate::config::{ApiKind, UpstreamSettings};
use crate::glob::Glob;
use crate::upstream::{Incoming, Upstream};
use bytes::BytesMut;
use http::HeaderMap;
use serde_json::json;
use std::collections::HashSet;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// An upstream is asked again after this time.
const MAX_AGE: Duration = Duration::from_mins(1);
/// The whole answer must arrive within this time.
const MAX_TIME: Duration = Duration::from_secs(5);
/// An upstream with a longer list is left out.
const MAX_LIST_BYTES: usize = 4 * 1024 * 1024;
/// Longer lists are parsed and joined on the blocking pool.
const MAX_INLINE_BYTES: usize = 64 * 1024;

/// What one upstream lists. All workers share it.
#[derive(Debug, Default)]
pub(super) struct CachedList(Mutex<Option<Inquiry>>);

/// The last time that an upstream was asked.
#[derive(Debug)]
struct Inquiry {
    asked: Stopwatch,
    answer: watch::Receiver<Option<Arc<UpstreamList>>>,
}

/// The models that an upstream lists.
#[derive(Debug)]
pub(super) struct UpstreamList {
    upstream: String,
    /// The dialect of the entries.
    dialect: Dialect,
    models: Vec<ListedModel>,
}

impl CachedList {
    /// The models of the upstream. `None`: it has failed to list them.
    pub(super) async fn get(&self, upstream: &Arc<Upstream>) -> Option<Arc<UpstreamList>> {
        let mut answer = self.inquire(upstream);
        // An error means that the task has ended without a list.
        let list = answer.wait_for(Option::is_some).await.ok()?;
        list.clone()
    }

    /// Asks the upstream, unless it was asked a short time ago.
    fn inquire(&self, upstream: &Arc<Upstream>) -> watch::Receiver<Option<Arc<UpstreamList>>> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inquiry) = last.as_ref().filter(|inquiry| inquiry.asked.elapsed() < MAX_AGE) {
            return inquiry.answer.clone();
        }
        let (sender, answer) = watch::channel(None);
        let upstream = upstream.clone();
        // A task of its own, so that a caller that disconnects leaves the answer to others.
        tokio::spawn(async move {
            match list_of(&upstream).await {
                Ok(list) => drop(sender.send(Some(Arc::new(list)))),
                Err(reason) => tracing::warn!(
                    upstream = upstream.settings().name,
                    reason,
                    "the models of an upstream are missing in the lists of models for the next minute, because it did not list them"
                ),
            }
        });
        *last = Some(Inquiry { asked: Stopwatch::start(), answer: answer.clone() });
        answer
    }
}

/// Asks an upstream for its models.
async fn list_of(upstream: &Upstream) -> Result<UpstreamList, String> {
    let settings = upstream.settings();
    let mut request = models_request(settings);
    request.target.push_str(whole_list(settings));
    let exchange = async {
        let sent = upstream.send(&request, Stopwatch::start(), &mut |_| {}).await;
        let (parts, incoming) = sent.map_err(|error| error.to_string())?;
        if !parts.status.is_success() {
            return Err(format!("it answered {}", parts.status));
        }
        read(incoming).await
    };
    let body = timeout(MAX_TIME, exchange).await.map_err(|_| format!("no answer within {MAX_TIME:?}"))??;
    let models = if body.len() <= MAX_INLINE_BYTES {
        model_list::listed(&body)
    } else {
        let body = body.freeze();
        spawn_blocking(move || model_list::listed(&body)).await.ok().flatten()
    };
    let models = models.ok_or("its answer is no list of models")?;
    let dialect = match settings.api {
        ApiKind::Anthropic => Dialect::Anthropic,
        ApiKind::Gemini => Dialect::Google,
        ApiKind::OpenAi | ApiKind::Azure => Dialect::OpenAi,
    };
    Ok(UpstreamList { upstream: settings.name.clone(), dialect, models })
}

/// The parameter that requests the whole list instead of its first page.
fn whole_list(upstream: &UpstreamSettings) -> &'static str {
    match upstream.api {
        ApiKind::Anthropic => "?limit=1000",
        ApiKind::Gemini => "?pageSize=1000",
        ApiKind::OpenAi | ApiKind::Azure => "",
    }
}

async fn read(mut incoming: Incoming) -> Result<BytesMut, String> {
    let mut body = BytesMut::new();
    while let Some(data) = poll_fn(|cx| incoming.poll_data(cx)).await {
        body.extend_from_slice(&data.map_err(|error| error.to_string())?);
        if body.len() > MAX_LIST_BYTES {
            return Err(format!("its list is longer than {MAX_LIST_BYTES} bytes"));
        }
    }
    Ok(body)
}

/// The SDK that requests a list of models, or the description of one.
pub(super) fn dialect(path: &str, headers: &HeaderMap) -> Dialect {
    if path.starts_with("/v1beta/") {
        Dialect::Google
    } else if headers.contains_key("anthropic-version") {
        Dialect::Anthropic
    } else {
        Dialect::OpenAi
    }
}

/// The union of lists as one SDK expects it: each model once, in the order of the lists. `allowed`: the patterns of the
/// models that the environment allows; empty: all.
pub(super) async fn union(lists: Vec<Arc<UpstreamList>>, allowed: &[Glob], dialect: Dialect) -> String {
    let bytes: usize = lists.iter().flat_map(|list| &list.models).map(|model| model.entry.len()).sum();
    if bytes <= MAX_INLINE_BYTES {
        return join(&lists, allowed, dialect);
    }
    let allowed = allowed.to_vec();
    spawn_blocking(move || join(&lists, &allowed, dialect)).await.unwrap_or_default()
}

fn join(lists: &[Arc<UpstreamList>], allowed: &[Glob], dialect: Dialect) -> String {
    let mut seen: HashSet<&str> = HashSet::new();
    let (mut entries, mut ids) = (Vec::new(), Vec::new());
    for list in lists {
        for ListedModel { id, entry } in &list.models {
            let is_allowed = allowed.is_empty() || allowed.iter().any(|pattern| pattern.matches(id));
            if !is_allowed || !seen.insert(id) {
                continue;
            }
            let entry = if list.dialect == dialect { entry.clone() } else { new_entry(list, id, dialect) };
            entries.push(entry);
            ids.push(id);
        }
    }
    let entries = entries.join(",");
    match dialect {
        Dialect::OpenAi | Dialect::Responses => format!(r#"{{"object":"list","data":[{entries}]}}"#),
        Dialect::Google => format!(r#"{{"models":[{entries}]}}"#),
        Dialect::Anthropic => {
            let (first, last) = (json!(ids.first()), json!(ids.last()));
            format!(r#"{{"data":[{entries}],"has_more":false,"first_id":{first},"last_id":{last}}}"#)
        }
    }
}

/// The entry of a model whose upstream lists it in the form of another SDK.
fn new_entry(list: &UpstreamList, id: &str, dialect: Dialect) -> String {
    let entry = match dialect {
        Dialect::OpenAi | Dialect::Responses => {
            json!({"id": id, "object": "model", "created": 0, "owned_by": list.upstream})
        }
        Dialect::Anthropic => {
            json!({"type": "model", "id": id, "display_name": id, "created_at": "1970-01-01T00:00:00Z"})
        }
        Dialect::Google => json!({"name": format!("models/{id}"), "displayName": id}),
    };
    entry.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(upstream: &str, dialect: Dialect, json: &str) -> Arc<UpstreamList> {
        let models = model_list::listed(json.as_bytes()).unwrap();
        Arc::new(UpstreamList { upstream: upstream.into(), dialect, models })
    }

    #[test]
    fn a_union_has_each_allowed_model_once_in_the_form_of_the_sdk() {
        let openai = r#"{"object":"list","data":[{"id":"gpt-4o","object":"model","x":1e2},{"id":"o3"},{"object":"model"}]}"#;
        let anthropic =
            r#"{"data":[{"type":"model","id":"claude-opus-4"},{"id":"gpt-4o"}],"has_more":false}"#;
        let google = r#"{"models":[{"name":"models/gemini-2.5-pro"}]}"#;
        let lists = [
            list("a", Dialect::OpenAi, openai),
            list("b", Dialect::Anthropic, anthropic),
            list("c", Dialect::Google, google),
        ];
        let allowed = ["gpt-*", "claude-*", "gemini-*"].map(Glob::new);
        assert_eq!(
            join(&lists, &allowed, Dialect::OpenAi),
            r#"{"object":"list","data":[{"id":"gpt-4o","object":"model","x":1e2},{"created":0,"id":"claude-opus-4","object":"model","owned_by":"b"},{"created":0,"id":"gemini-2.5-pro","object":"model","owned_by":"c"}]}"#
        );
        assert_eq!(
            join(&lists[1..], &allowed[1..], Dialect::Anthropic),
            r#"{"data":[{"type":"model","id":"claude-opus-4"},{"created_at":"1970-01-01T00:00:00Z","display_name":"gemini-2.5-pro","id":"gemini-2.5-pro","type":"model"}],"has_more":false,"first_id":"claude-opus-4","last_id":"gemini-2.5-pro"}"#
        );
        assert_eq!(
            join(&lists[1..], &[], Dialect::Google),
            r#"{"models":[{"displayName":"claude-opus-4","name":"models/claude-opus-4"},{"displayName":"gpt-4o","name":"models/gpt-4o"},{"name":"models/gemini-2.5-pro"}]}"#
        );
        assert_eq!(join(&[], &[], Dialect::OpenAi), r#"{"object":"list","data":[]}"#);
        assert!(join(&[], &[], Dialect::Anthropic).contains(r#""first_id":null"#));
    }
}
