//! Long random walks through the quota engine. An independent recount checks every step.
//!
//! The first walk covers `Quotas`: reservations, settling, extension, progress, clock steps in both directions,
//! changed limits, added and removed quotas, restarts. The second covers the counters of an environment, which
//! decide how much to reserve: allowances, clamping, extended streams, overruns, shadow mode. The third covers three
//! environments that share two upstreams with quotas.
//!
//! Each walk has a million steps; the environment variable `TOLLGATE_WALK_STEPS` changes that.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_wrap)]

mod quotas;
mod random;
mod recount;
mod streams;
mod tied;

use crate::quotas::QuotaWalk;
use crate::random::steps;
use crate::streams::StreamWalk;
use crate::tied::TiedWalk;
use std::collections::HashMap;
use tollgate::config::{CompletionReserve, WhenShort};

#[test]
fn quotas_match_an_independent_recount_over_a_million_steps() {
    let steps = steps();
    let mut walk = QuotaWalk::new(0x7011_9a7e);
    for _ in 0..steps {
        walk.step();
    }
    while !walk.open.is_empty() {
        walk.settle();
    }
    walk.compare();
    assert!(walk.recounts.iter().all(|r| r.held() == 0), "everything is settled");
    let mut counts: Vec<_> = walk.counts.into_iter().collect();
    counts.sort_unstable();
    println!("{steps} steps, 0 mismatches: {counts:?}");
    for what in [
        "admitted",
        "denied",
        "settled",
        "extended",
        "overrun",
        "progressed",
        "limits changed",
        "quotas changed",
        "restarted",
    ] {
        assert!(counts.iter().any(|(name, n)| *name == what && *n > steps / 2_000), "{what}: {counts:?}");
    }
}

#[test]
fn streams_hold_and_settle_all_reservations_over_a_million_steps() {
    let adaptive = CompletionReserve::Adaptive;
    let rules = [
        (CompletionReserve::MaxTokens, WhenShort::Reject, true),
        (CompletionReserve::MaxTokens, WhenShort::Clamp, true),
        (CompletionReserve::Fixed(40), WhenShort::Reject, true),
        (CompletionReserve::None, WhenShort::Reject, true),
        (adaptive, WhenShort::Reject, true),
        (adaptive, WhenShort::Clamp, true),
        (adaptive, WhenShort::Clamp, false),
        (CompletionReserve::Fixed(40), WhenShort::Reject, false),
    ];
    let mut counts: HashMap<&str, u64> = HashMap::new();
    for (seed, (completion, when_short, enforce)) in (1..).zip(rules) {
        let mut walk = StreamWalk::new(seed, completion, when_short, enforce);
        for _ in 0..steps() / rules.len() as u64 {
            walk.step();
        }
        walk.settle_all();
        walk.compare();
        assert!(walk.recounts.iter().all(|r| r.held() == 0), "everything is settled");
        walk.counts.iter().for_each(|(what, n)| *counts.entry(what).or_default() += n);
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_unstable();
    println!("{} steps, 0 mismatches: {counts:?}", steps());
    for what in [
        "admitted",
        "denied",
        "clamped",
        "would be denied",
        "settled",
        "extended",
        "overrun",
        "limit changed",
    ] {
        assert!(counts.iter().any(|(name, n)| *name == what && *n > steps() / 2_000), "{what}: {counts:?}");
    }
}

#[test]
fn environments_share_upstreams_over_a_million_steps() {
    let adaptive = CompletionReserve::Adaptive;
    let rules = [
        (CompletionReserve::MaxTokens, WhenShort::Reject),
        (CompletionReserve::MaxTokens, WhenShort::Clamp),
        (CompletionReserve::Fixed(40), WhenShort::Reject),
        (CompletionReserve::None, WhenShort::Reject),
        (adaptive, WhenShort::Reject),
        (adaptive, WhenShort::Clamp),
    ];
    let mut counts: HashMap<&str, u64> = HashMap::new();
    for (seed, (completion, when_short)) in (1..).zip(rules) {
        let mut walk = TiedWalk::new(seed, completion, when_short);
        for _ in 0..steps() / rules.len() as u64 {
            walk.step();
        }
        walk.settle_all();
        walk.compare();
        assert!(walk.holds_nothing(), "everything is settled");
        walk.counts.iter().for_each(|(what, n)| *counts.entry(what).or_default() += n);
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_unstable();
    println!("{} steps, 0 mismatches: {counts:?}", steps());
    for what in [
        "admitted",
        "denied",
        "denied by the upstream alone",
        "clamped",
        "settled",
        "extended",
        "overrun",
        "limit changed",
    ] {
        assert!(counts.iter().any(|(name, n)| *name == what && *n > steps() / 2_000), "{what}: {counts:?}");
    }
}
