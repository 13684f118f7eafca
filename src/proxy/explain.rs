//! Explains what would happen to a request, without sending it or charging anything.

use super::call::{self, Call};
use super::candidates::Candidates;
use super::choice::Obstacle;
use super::refusal;
use super::route::Endpoint;
use super::snapshot::Snapshot;
use super::state::State;
use crate::body::detect_api;
use crate::error::ProxyError;
use crate::estimate::{EstimateSource, PromptEstimate};
use crate::ledger::{Account, Demand, Forecast, NoRoom};
use crate::quota::{Amounts, Subject};
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
    let Call { prompt_tokens, estimate, corrected, model, .. } = &*call;
    let destination = snapshot.contexts[environment].destinations.get(call.destination);
    let candidates = Candidates::new(destination, &snapshot.upstreams);
    let backends: Vec<_> =
        candidates.order().iter().map(|&upstream| snapshot.backend(upstream, call.name_sent())).collect();
    let demand = Demand {
        subject: Subject { caller: name, model },
        prompt: *prompt_tokens,
        generates: api.generates(),
        cap: call.completion_cap,
        completions: call.completions.max(1),
        backends: &backends,
        may_clamp: true,
    };
    let account = &snapshot.accounts[environment];
    account.refresh().await;
    let Outcome { forecast, obstacle, is_admitted } =
        outcome(&snapshot, account, &demand, candidates.order());
    let error = obstacle.map(|(obstacle, upstream)| match obstacle {
        Obstacle::NoRoom(no_room) => refusal::no_room_error(no_room, settings),
        Obstacle::Held(wait) => refusal::held(&snapshot, environment, upstream, wait),
    });
    let destinations = &snapshot.contexts[environment].destinations;
    let upstreams = candidates.order().iter();
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

/// What would happen to a request at its upstreams.
struct Outcome {
    forecast: Forecast,
    /// Why it does not fit, and the upstream where that is so.
    obstacle: Option<(Obstacle, usize)>,
    is_admitted: bool,
}

/// The outcome at the upstream that would receive the request. If none would: at the one where it fits first. A request is
/// clamped only if no upstream has room for all of it.
fn outcome(snapshot: &Snapshot, account: &Account, demand: &Demand<'_>, upstreams: &[usize]) -> Outcome {
    let whole = outcome_of(snapshot, account, &Demand { may_clamp: false, ..*demand }, upstreams);
    if whole.is_admitted { whole } else { outcome_of(snapshot, account, demand, upstreams) }
}

fn outcome_of(snapshot: &Snapshot, account: &Account, demand: &Demand<'_>, upstreams: &[usize]) -> Outcome {
    let denies = |no_room: &NoRoom| account.is_enforcing() || no_room.is_of_upstream();
    let mut soonest: Option<(Forecast, (Obstacle, usize))> = None;
    for (&upstream, backend) in upstreams.iter().zip(demand.backends) {
        let single = Demand { backends: std::slice::from_ref(backend), ..*demand };
        let forecast = account.forecast(&single);
        let amounts = forecast.required.max(Amounts::of_request(demand.prompt, 0));
        let no_room = forecast.obstacle.clone();
        let denial = no_room.clone().filter(denies).map(Obstacle::NoRoom).or_else(|| {
            let held = snapshot.provider_limits[upstream].hold_of(backend.model, amounts);
            held.map(Obstacle::Held)
        });
        let Some(denial) = denial else {
            let obstacle = no_room.map(|no_room| (Obstacle::NoRoom(no_room), upstream));
            return Outcome { forecast, obstacle, is_admitted: true };
        };
        if soonest.as_ref().is_none_or(|(_, (earlier, _))| denial.fits_before(earlier)) {
            soonest = Some((forecast, (denial, upstream)));
        }
    }
    match soonest {
        Some((forecast, obstacle)) => Outcome { forecast, obstacle: Some(obstacle), is_admitted: false },
        None => Outcome { forecast: account.forecast(demand), obstacle: None, is_admitted: true },
    }
}
