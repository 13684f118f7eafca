//! Estimates of recorded requests, uncorrected and calibrated in several orders.

use crate::exchange::Exchange;
use std::collections::HashMap;
use tollgate::api::Api;
use tollgate::body::{Body, BodyText};
use tollgate::calibrations::Calibrations;
use tollgate::estimate::{EstimateSource, Model, Models, RequestKind};
use tollgate::learned::{EstimateScope, Learned, ReportedAnswer};

/// A request with its estimate and its reported tokens.
pub(crate) struct Measured {
    pub(crate) id: String,
    pub(crate) api: Api,
    pub(crate) provider: String,
    pub(crate) model: String,
    pub(crate) kind: RequestKind,
    pub(crate) features: Vec<String>,
    /// The estimate before calibration.
    pub(crate) estimated: u64,
    pub(crate) reported: u64,
    /// Reported completion tokens without reasoning; 0: not reported.
    completion: u64,
    /// Reported tokens of the answer's reasoning.
    reasoning: u64,
    /// The body of the request.
    body: String,
    rules: Model,
    /// The provider adds text that the gateway cannot see, or the request refers to stored content.
    pub(crate) is_partial: bool,
    /// The request has media by URL, which the gateway does not fetch.
    pub(crate) has_urls: bool,
}

impl Measured {
    pub(crate) fn has(&self, features: &[&str]) -> bool {
        self.features.iter().any(|f| features.contains(&f.as_str()))
    }

    /// The relative error of an estimate.
    pub(crate) fn error(&self, estimate: u64) -> f64 {
        estimate.abs_diff(self.reported) as f64 / self.reported as f64
    }
}

/// Estimates a request that was recorded byte for byte and whose prompt tokens were reported.
pub(crate) fn estimate(exchange: &Exchange) -> Option<Measured> {
    let (api, text) = (exchange.api()?, exchange.exact_request()?);
    let reported = exchange.reported().filter(|&tokens| tokens > 0)?;
    let body_text = BodyText::of(text.as_bytes()).ok()?;
    let body = Body::read(api, &body_text).map_err(|fault| eprintln!("{}: {fault}", exchange.id)).ok()?;
    let named = body.model.as_deref().or(exchange.model.as_deref()).unwrap_or_default().to_owned();
    let rules = Models::default().named(&named).at(exchange.service());
    let estimate = body.prompt.estimate(&rules);
    Some(Measured {
        id: exchange.id.clone(),
        api,
        provider: exchange.provider.clone(),
        model: named,
        kind: estimate.kind,
        features: exchange.features.clone(),
        estimated: estimate.tokens(),
        reported,
        completion: exchange.visible_completion(),
        reasoning: exchange.reasoning(),
        body: text.to_owned(),
        rules,
        is_partial: estimate.is_partial,
        has_urls: exchange.has(&["file", "audio", "image_url", "image_data"]) && has_urls(text),
    })
}

/// Whether a member whose name ends in "url" has a URL.
fn has_urls(json: &str) -> bool {
    let is_web = |rest: &str| {
        rest.trim_start_matches(|c: char| c == ':' || c.is_ascii_whitespace()).starts_with("\"http")
    };
    json.match_indices("url\"").any(|(at, name)| is_web(&json[at + name.len()..]))
}

/// The estimate of a request, corrected by the answers that precede it in one order of the exchanges.
#[derive(Clone, Copy)]
pub(crate) struct Corrected {
    /// Number of earlier answers to requests of the same kind.
    pub(crate) answers: u32,
    pub(crate) tokens: u64,
    /// Whether the request continues a conversation whose last request was answered earlier in the order.
    pub(crate) is_continuation: bool,
}

/// The corrected estimates in five orders of the exchanges: the recorded order and four fixed random orders.
pub(crate) fn orders(exchanges: &[Measured]) -> Vec<Vec<Corrected>> {
    (0..5).map(|seed| corrected(exchanges, &order(exchanges.len(), seed))).collect()
}

fn order(length: usize, seed: u64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..length).collect();
    if seed > 0 {
        let mut state = seed;
        for at in (1..length).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            all.swap(at, usize::try_from(state >> 33).unwrap() % (at + 1));
        }
    }
    all
}

fn corrected(exchanges: &[Measured], order: &[usize]) -> Vec<Corrected> {
    let mut providers: Vec<&str> = exchanges.iter().map(|e| e.provider.as_str()).collect();
    providers.sort_unstable();
    providers.dedup();
    let learned = Learned::new(Calibrations::new(providers.iter().copied()));
    let mut answers: HashMap<(&str, &str, RequestKind), u32> = HashMap::new();
    let none = Corrected { answers: 0, tokens: 0, is_continuation: false };
    let mut all = vec![none; exchanges.len()];
    for &at in order {
        let e = &exchanges[at];
        let answers = answers.entry((&e.provider, &e.model, e.kind)).or_default();
        let upstream = providers.binary_search(&e.provider.as_str()).unwrap();
        let scope = EstimateScope { upstream, principal: 0 };
        let text = BodyText::of(e.body.as_bytes()).unwrap();
        let mut body = Body::read(e.api, &text).unwrap();
        let recall = learned.recall(scope, e.api, &e.model, &mut body.prompt);
        let estimate = body.prompt.estimate(&e.rules);
        let corrected = learned.correct(&recall, &e.model, &estimate);
        let is_continuation = corrected.source == EstimateSource::Conversation;
        all[at] = Corrected { answers: *answers, tokens: corrected.tokens, is_continuation };
        learned.learn(
            &recall,
            &e.model,
            &estimate,
            ReportedAnswer { prompt: e.reported, completion: e.completion, reasoning: e.reasoning },
        );
        *answers += u32::from(!e.is_partial);
    }
    all
}

/// The quantile of the values at `share`.
pub(crate) fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let at = (values.len() as f64 * share) as usize;
    values.get(at.min(values.len().saturating_sub(1))).copied().unwrap_or(0.0)
}
