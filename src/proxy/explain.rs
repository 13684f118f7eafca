//! Explains what would happen to a request, without sending it or charging anything.

use super::call::{self, Call};
use super::refusal;
use super::route::Endpoint;
use super::state::State;
use crate::body::detect_api;
use crate::error::ProxyError;
use crate::estimate::{EstimateSource, PromptEstimate};
use crate::ledger::{Demand, Forecast};
use crate::quota::Subject;
use bytes::Bytes;
use std::sync::Arc;

/// What would happen to a request.
pub(crate) struct Explanation {
    pub(crate) api: &'static str,
    pub(crate) model: String,
    /// The tokens that would be reserved for the prompt.
    pub(crate) prompt_tokens: u64,
    /// The count of the prompt before any correction, with its parts.
    pub(crate) counted: PromptEstimate,
    /// What the estimate comes from.
    pub(crate) source: EstimateSource,
    /// The name of the vocabulary.
    pub(crate) encoding: &'static str,
    pub(crate) forecast: Forecast,
    /// Whether the environment enforces its quotas.
    pub(crate) is_enforced: bool,
    /// The error that the request would get. `None`: it would be admitted.
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
    let demand = Demand {
        subject: Subject { caller: name, model },
        prompt: *prompt_tokens,
        generates: api.generates(),
        cap: call.completion_cap,
        completions: call.completions.max(1),
        backends: &[snapshot.backend(environment, model)],
    };
    let account = &snapshot.accounts[environment];
    account.refresh().await;
    let forecast = account.forecast(&demand);
    let error = forecast.obstacle.clone().map(|no_room| refusal::no_room_error(no_room, settings));
    Ok(Explanation {
        api: api.as_str(),
        model: model.clone(),
        prompt_tokens: *prompt_tokens,
        counted: *estimate,
        source: corrected.source,
        encoding: call.tokenizer.map_or("", |tokenizer| tokenizer.encoding.as_str()),
        forecast,
        is_enforced: account.is_enforcing(),
        error,
    })
}
