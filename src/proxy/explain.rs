//! Explains what would happen to a request, without sending it or charging anything.

use super::call::{self, Call};
use super::refusal;
use super::route::Endpoint;
use super::state::State;
use crate::body::detect_api;
use crate::error::ProxyError;
use crate::estimate::{EstimateSource, PromptEstimate};
use crate::ledger::{Demand, Forecast, NoRoom};
use crate::quota::Subject;
use bytes::Bytes;
use std::sync::Arc;

/// What would happen to a request.
pub(crate) struct Explanation {
    pub(crate) api: &'static str,
    pub(crate) model: String,
    /// The number of the route that takes the request, from 1. `None`: no route takes it.
    pub(crate) route: Option<usize>,
    /// The names of the upstreams, in the order in which they would be tried.
    pub(crate) upstreams: Vec<String>,
    /// The model name that would be sent.
    pub(crate) sent_model: String,
    /// The tokens that would be reserved for the prompt.
    pub(crate) prompt_tokens: u64,
    /// The count of the prompt before any correction, with its parts.
    pub(crate) counted: PromptEstimate,
    /// What the estimate comes from.
    pub(crate) source: EstimateSource,
    /// The name of the vocabulary.
    pub(crate) encoding: &'static str,
    pub(crate) forecast: Forecast,
    pub(crate) is_admitted: bool,
    /// Why the request does not fit. `None`: it fits. In shadow mode it is admitted although the environment's quotas have no
    /// room.
    pub(crate) error: Option<ProxyError>,
}

/// Explains a request of an environment, by its index, and of a caller, by its index in the environment.
///
/// # Errors
/// The gateway would not accept the body.
pub(crate) async fn explain(
    state: &State,
    environment: usize,
    caller: Option<usize>,
    body: Bytes,
) -> Result<Explanation, ProxyError> {
    let snapshot = state.current();
    let api = detect_api(&body);
    let call = call::parse_example(state, &snapshot, (environment, caller), api, body).await?;
    let settings = &snapshot.config.environments[environment];
    call.check_model(Endpoint::Counted(api), settings)?;
    let name: Option<&Arc<str>> = caller.map(|index| &snapshot.contexts[environment].callers[index]);
    let Call { prompt_tokens, estimate, corrected, model, .. } = &call;
    let destination = snapshot.contexts[environment].destinations.get(call.destination);
    let backends: Vec<_> =
        destination.upstreams.iter().map(|&upstream| snapshot.backend(upstream, call.name_sent())).collect();
    let demand = Demand {
        subject: Subject { caller: name, model },
        prompt: *prompt_tokens,
        generates: api.generates(),
        cap: call.completion_cap,
        completions: call.completions.max(1),
        backends: &backends,
    };
    let account = &snapshot.accounts[environment];
    account.refresh().await;
    let forecast = account.forecast(&demand);
    let denies = |no_room: &NoRoom| account.is_enforcing() || no_room.is_of_upstream();
    let is_admitted = !forecast.obstacle.as_ref().is_some_and(denies);
    let error = forecast.obstacle.clone().map(|no_room| refusal::no_room_error(no_room, settings));
    let destinations = &snapshot.contexts[environment].destinations;
    let upstreams = destination.upstreams.iter();
    Ok(Explanation {
        api: api.as_str(),
        model: model.clone(),
        route: destinations.route_number(call.destination),
        upstreams: upstreams.map(|&upstream| snapshot.upstreams[upstream].settings.name.clone()).collect(),
        sent_model: call.name_sent().to_owned(),
        prompt_tokens: *prompt_tokens,
        counted: *estimate,
        source: corrected.source,
        encoding: call.tokenizer.map_or("", |tokenizer| tokenizer.encoding.as_str()),
        forecast,
        is_admitted,
        error,
    })
}
