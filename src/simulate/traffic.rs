//! The calls of one replay: those of environments that share upstreams with limits, or those of one environment.

use super::TraceCall;
use crate::clock::Timestamp;
use crate::config::{Environment, UpstreamSettings};
use smallvec::SmallVec;
use std::sync::Arc;

/// What one replay replays: the calls of environments that share upstreams with limits, also by way of others.
pub(super) struct Traffic<'a> {
    /// In the order of the config.
    pub(super) members: Vec<Member<'a>>,
    /// The upstreams with limits that any of the environments uses.
    pub(super) upstreams: Vec<&'a UpstreamSettings>,
    /// The calls of all environments, sorted by time.
    calls: Vec<(usize, &'a TraceCall)>,
}

/// An environment with its calls.
pub(super) struct Member<'a> {
    pub(super) environment: &'a Environment,
    pub(super) calls: &'a [TraceCall],
    /// Indices of its upstreams with limits.
    pub(super) upstreams: Vec<usize>,
    /// Index of the environment in the config.
    pub(super) place: usize,
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
        let member = Member { environment, calls, upstreams: Vec::new(), place: 0 };
        Self {
            members: vec![member],
            upstreams: Vec::new(),
            calls: calls.iter().map(|call| (0, call)).collect(),
        }
    }

    /// The environments of the config in groups: each with those that share an upstream with limits with it, also by way of
    /// others. `all`: the environments with their calls, each sorted by time.
    ///
    /// Of the calls of one millisecond, each environment of a group has one in turn, in the order of the config.
    pub(super) fn groups(all: &'a [(Arc<Environment>, Vec<TraceCall>)]) -> Vec<Self> {
        let mut left: Vec<usize> = (0..all.len()).collect();
        let mut groups = Vec::new();
        while !left.is_empty() {
            let mut group = Self { members: Vec::new(), upstreams: Vec::new(), calls: Vec::new() };
            group.add(left.remove(0), all);
            while let Some(found) = left.iter().position(|&at| group.shares(&all[at].0)) {
                group.add(left.remove(found), all);
            }
            group.members.sort_by_key(|member| member.place);
            group.sort_calls();
            groups.push(group);
        }
        groups
    }

    /// Adds the environment at this place of the config.
    fn add(&mut self, place: usize, all: &'a [(Arc<Environment>, Vec<TraceCall>)]) {
        let (environment, calls) = &all[place];
        let mut upstreams = Vec::new();
        for upstream in environment.all_upstreams().into_iter().filter(|upstream| upstream.has_limits()) {
            let at = self.index_of(upstream).unwrap_or_else(|| {
                self.upstreams.push(upstream);
                self.upstreams.len() - 1
            });
            if !upstreams.contains(&at) {
                upstreams.push(at);
            }
        }
        self.members.push(Member { environment, calls, upstreams, place });
    }

    fn sort_calls(&mut self) {
        let mut turns = Vec::new();
        for (index, member) in self.members.iter().enumerate() {
            turns.extend(turns_of(member.calls).map(|(turn, call)| (call.at, turn, index, call)));
        }
        turns.sort_by_key(|&(time, turn, index, _)| (time, turn, index));
        self.calls = turns.into_iter().map(|(.., index, call)| (index, call)).collect();
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
        let environment = self.members[environment].environment;
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
}

impl Member<'_> {
    /// The times of its first and last call.
    pub(super) fn span(&self) -> (Timestamp, Timestamp) {
        let ends = self.calls.first().zip(self.calls.last());
        ends.map_or_else(Default::default, |(first, last)| (first.at, last.at))
    }
}

/// Each call with the number of calls before it in its millisecond.
fn turns_of(calls: &[TraceCall]) -> impl Iterator<Item = (usize, &TraceCall)> {
    calls.chunk_by(|before, after| before.at == after.at).flat_map(|same| same.iter().enumerate())
}
