//! The calls of one replay: those of the environment in focus and, if it shares upstreams that have limits, those of the
//! environments that share them.

use super::TraceCall;
use crate::clock::Timestamp;
use crate::config::{Environment, UpstreamSettings};
use smallvec::SmallVec;
use std::sync::Arc;

/// The index of the environment in focus.
pub(super) const FOCUS: usize = 0;

/// What one replay replays: the calls of the environment in focus, and everything that loads its upstreams.
pub struct Traffic<'a> {
    /// The environment in focus is the first one.
    pub(super) environments: Vec<&'a Environment>,
    /// The calls of the environment in focus.
    pub(super) calls_of_focus: &'a [TraceCall],
    /// The upstreams with limits that any of the environments uses; those of the environment in focus come first.
    pub(super) upstreams: Vec<&'a UpstreamSettings>,
    /// How many of `upstreams` the environment in focus uses.
    pub(super) upstreams_of_focus: usize,
    /// The calls of all environments, sorted by time.
    calls: Vec<(usize, &'a TraceCall)>,
}

/// An upstream that may serve a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target<'a> {
    /// Index into the upstreams with limits. `None`: it has no limits.
    pub(super) upstream: Option<usize>,
    /// The model, by the name that is sent.
    pub(super) model: &'a str,
}

impl<'a> Traffic<'a> {
    /// The calls of one environment. Limits of its upstreams do not apply.
    pub(super) fn alone(environment: &'a Environment, calls: &'a [TraceCall]) -> Self {
        Self {
            environments: vec![environment],
            calls_of_focus: calls,
            upstreams: Vec::new(),
            upstreams_of_focus: 0,
            calls: calls.iter().map(|call| (FOCUS, call)).collect(),
        }
    }

    /// The calls of the environment at `focus` and of all environments that share an upstream with limits with it, also
    /// by way of others. `all`: the environments of the config with their calls, each sorted by time.
    ///
    /// Of the calls of one millisecond, each environment has one in turn, in the order of the config.
    pub fn around(focus: usize, all: &'a [(Arc<Environment>, Vec<TraceCall>)]) -> Option<Self> {
        let (environment, calls) = all.get(focus)?;
        let mut traffic = Self::alone(environment, calls);
        traffic.add_upstreams(environment);
        traffic.upstreams_of_focus = traffic.upstreams.len();
        let mut members = vec![focus];
        let mut left: Vec<usize> = (0..all.len()).filter(|at| *at != focus).collect();
        while let Some(found) = left.iter().position(|&at| traffic.shares(&all[at].0)) {
            let at = left.remove(found);
            traffic.environments.push(&all[at].0);
            traffic.add_upstreams(&all[at].0);
            members.push(at);
        }
        if members.len() > 1 {
            let mut turns = Vec::new();
            for (index, &at) in members.iter().enumerate() {
                turns.extend(turns_of(&all[at].1).map(|(turn, call)| (call.at, turn, at, index, call)));
            }
            // The order does not depend on the focus, so the results of all reports agree.
            turns.sort_by_key(|&(time, turn, at, ..)| (time, turn, at));
            traffic.calls = turns.into_iter().map(|(.., index, call)| (index, call)).collect();
        }
        Some(traffic)
    }

    fn add_upstreams(&mut self, environment: &'a Environment) {
        let limited = environment.all_upstreams().into_iter().filter(|upstream| upstream.has_limits());
        for upstream in limited {
            if self.index_of(upstream).is_none() {
                self.upstreams.push(upstream);
            }
        }
    }

    fn shares(&self, environment: &Environment) -> bool {
        environment.all_upstreams().into_iter().any(|upstream| self.index_of(upstream).is_some())
    }

    fn index_of(&self, upstream: &UpstreamSettings) -> Option<usize> {
        self.upstreams.iter().position(|known| known.name == upstream.name)
    }

    /// The calls of all environments, sorted by time.
    pub(super) fn len(&self) -> usize {
        self.calls.len()
    }

    /// The index of a call's environment, and the call.
    pub(super) fn call(&self, at: usize) -> (usize, &'a TraceCall) {
        self.calls[at]
    }

    /// The upstreams that may serve a call, in the order in which they are tried.
    pub(super) fn targets(&self, environment: usize, call: &'a TraceCall) -> SmallVec<[Target<'a>; 1]> {
        if self.upstreams.is_empty() {
            return smallvec::smallvec![Target { upstream: None, model: &call.model }];
        }
        let environment = self.environments[environment];
        let route = call.api.and_then(|api| environment.route_of(api, &call.model));
        let Some(route) = route.and_then(|at| environment.routes.get(at)) else {
            let upstream = self.index_of(&environment.upstream);
            return smallvec::smallvec![Target { upstream, model: &call.model }];
        };
        let model = route.model.as_deref().unwrap_or(&call.model);
        route.upstreams.iter().map(|upstream| Target { upstream: self.index_of(upstream), model }).collect()
    }

    /// The times of the first and the last call of all environments.
    pub(super) fn span(&self) -> (Timestamp, Timestamp) {
        let ends = self.calls.first().zip(self.calls.last());
        ends.map_or_else(Default::default, |((_, first), (_, last))| (first.at, last.at))
    }

    /// The times of the first and the last call of the environment in focus.
    pub(super) fn span_of_focus(&self) -> (Timestamp, Timestamp) {
        let ends = self.calls_of_focus.first().zip(self.calls_of_focus.last());
        ends.map_or_else(Default::default, |(first, last)| (first.at, last.at))
    }
}

/// Each call with the number of calls before it in its millisecond.
fn turns_of(calls: &[TraceCall]) -> impl Iterator<Item = (usize, &TraceCall)> {
    calls.chunk_by(|before, after| before.at == after.at).flat_map(|same| same.iter().enumerate())
}
