//! Identifies the caller of a request and the environment that it addresses.

use super::keys::{self, GatewayKeyHeaders, KeyOwner, PresentedKey};
use super::query;
use super::route::{self, Route};
use super::snapshot::Snapshot;
use crate::error::{GivenKey, ProxyError};
use crate::learned::Learned;
use http::request::Parts;
use smallvec::SmallVec;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;

/// The caller of a request, and the keys that must be removed before the request is forwarded.
#[derive(Clone, Copy)]
pub(super) struct IdentifiedCaller {
    /// Index of the environment in the config.
    pub(super) environment: usize,
    /// Index of the caller in the environment. `None`: the environment is open and the request has no known key.
    pub(super) index: Option<usize>,
    /// The headers that carry a key of this gateway.
    pub(super) key_headers: GatewayKeyHeaders,
    /// The query carries a key of this gateway, which must not be forwarded.
    pub(super) has_key_in_query: bool,
}

/// Determines environment and caller.
///
/// The path names the environment, else the key, else `default_environment`. An environment with keys accepts only
/// its own. A key of another environment is refused in every header, because the upstream would receive it.
pub(super) fn identify(
    snapshot: &Snapshot,
    route: &Route<'_>,
    head: &Parts,
) -> Result<IdentifiedCaller, ProxyError> {
    let presented = keys::presented_keys(&head.headers).map_err(ProxyError::InvalidHead)?;
    let unknown =
        || ProxyError::InvalidKey { given: given_key(&presented), header: route::key_header(route.path) };
    let known: SmallVec<[_; 2]> =
        owners(snapshot, &presented).filter_map(|(key, owner)| owner.map(|owner| (key, owner))).collect();
    let mut owners = known.iter().filter(|(key, _)| key.is_well_formed).map(|&(_, owner)| owner);
    let owner = owners.next();
    let environment = route
        .environment
        .or(owner.map(|owner| owner.environment))
        .or(snapshot.config.default_environment)
        .ok_or_else(unknown)?;
    if known.iter().any(|(_, owner)| owner.environment != environment) {
        // Without an environment in the path, the key would have named it in the usual form.
        let is_malformed = owner.is_none() && route.environment.is_none();
        let usual_form = is_malformed.then(|| route::key_header(route.path));
        return Err(ProxyError::WrongEnvironment { usual_form });
    }
    if owners.any(|other| Some(other) != owner) {
        return Err(ProxyError::InvalidHead("its API keys belong to different callers"));
    }
    if owner.is_none() && !snapshot.config.environments[environment].callers.is_empty() {
        return Err(unknown());
    }
    let mut key_headers = GatewayKeyHeaders::default();
    known.iter().for_each(|(key, _)| key_headers.add(key.header));
    let has_key_in_query = has_key_in_query(snapshot, head.uri.query(), environment)?;
    Ok(IdentifiedCaller {
        environment,
        index: owner.map(|owner| owner.caller),
        key_headers,
        has_key_in_query,
    })
}

fn given_key(presented: &[PresentedKey<'_>]) -> GivenKey {
    // `Bearer` alone: the variable with the key is empty.
    if presented.iter().all(|key| key.key.eq_ignore_ascii_case(b"bearer")) {
        GivenKey::None
    } else if presented.iter().any(|key| key.is_well_formed) {
        GivenKey::Unknown
    } else {
        GivenKey::NoBearer
    }
}

/// The principal of the requests that a caller of the config sends with the gateway's key alone.
pub(super) fn principal_of_caller(
    learned: &Learned,
    snapshot: &Snapshot,
    environment: usize,
    caller: Option<usize>,
) -> u64 {
    principal_hasher(learned, snapshot, environment, caller).finish()
}

fn principal_hasher(
    learned: &Learned,
    snapshot: &Snapshot,
    environment: usize,
    caller: Option<usize>,
) -> DefaultHasher {
    let begin = || {
        let environment = &snapshot.config.environments[environment];
        let mut hasher = learned.hasher();
        // The set of replicas may change.
        match &*environment.upstream.base_urls {
            [only] => only.hash(&mut hasher),
            _ => environment.upstream.name.hash(&mut hasher),
        }
        environment.name.hash(&mut hasher);
        caller.map(|index| &environment.callers[index].name).hash(&mut hasher);
        hasher
    };
    let slot = caller.map_or(0, |index| index + 1);
    snapshot.contexts[environment].principals[slot].get_or_init(begin).clone()
}

/// Identifies who sends a request. What the requests of one principal have taught does not show in the estimates of
/// another.
///
/// A principal is a caller of the config. Keys that are not the gateway's tell users of one caller apart if the upstream
/// receives them, and users of an open environment in any case. Users of an open environment without a key are
/// distinguished by their address.
pub(super) fn principal(
    learned: &Learned,
    snapshot: &Snapshot,
    caller: IdentifiedCaller,
    head: &Parts,
    address: IpAddr,
) -> u64 {
    let context = &snapshot.contexts[caller.environment];
    let mut hasher = principal_hasher(learned, snapshot, caller.environment, caller.index);
    if caller.index.is_some() && context.has_credentials {
        return hasher.finish();
    }
    let mut has_key = false;
    for (header, values) in keys::key_headers(&head.headers) {
        if caller.key_headers.has(header) {
            continue;
        }
        for value in values {
            has_key = true;
            (header.name(), value.as_bytes()).hash(&mut hasher);
        }
    }
    // Google's SDKs may send the key in the query.
    let query = head.uri.query().unwrap_or_default();
    for key in query::values_of("key", query) {
        has_key = true;
        ("key", key).hash(&mut hasher);
    }
    if caller.index.is_none() && !has_key {
        address.hash(&mut hasher);
    }
    hasher.finish()
}

/// Whether the query carries a key of this environment. A key in the query grants no access.
fn has_key_in_query(
    snapshot: &Snapshot,
    query: Option<&str>,
    environment: usize,
) -> Result<bool, ProxyError> {
    let Some(query) = query.filter(|_| !snapshot.keys.is_empty()) else { return Ok(false) };
    let Some(candidates) = query::candidates(query) else {
        return Err(ProxyError::InvalidHead("its query has too many parameters to search it for API keys"));
    };
    let mut found = false;
    for owner in candidates.iter().filter_map(|text| snapshot.keys.owner(&snapshot.config, text)) {
        if owner.environment != environment {
            return Err(ProxyError::WrongEnvironment { usual_form: None });
        }
        found = true;
    }
    Ok(found)
}

/// The owner of each key. A key that several headers repeat in a row is hashed once.
fn owners<'k>(
    snapshot: &Snapshot,
    presented: &'k [PresentedKey<'k>],
) -> impl Iterator<Item = (&'k PresentedKey<'k>, Option<KeyOwner>)> {
    let mut last: Option<(&[u8], Option<KeyOwner>)> = None;
    presented.iter().map(move |presented| {
        let repeated = last.filter(|(key, _)| *key == presented.key).map(|(_, owner)| owner);
        let owner = repeated.unwrap_or_else(|| snapshot.keys.owner(&snapshot.config, presented.key));
        last = Some((presented.key, owner));
        (presented, owner)
    })
}
