//! The settings that decide about requests.

use crate::config::{
    CompletionReserve, Environment, OnOverrun, ReserveSettings, UpstreamSettings, WhenShort,
};
use std::time::Duration;

/// The settings that determine which requests an environment admits and what it reserves.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How much is reserved.
    pub reserve: ReserveSettings,
    /// `false` (shadow mode): a request that does not fit is admitted and only reported.
    pub enforce: bool,
    /// Maximum requests in flight.
    pub max_in_flight: Option<u64>,
}

impl Rules {
    /// The rules of an environment of the config.
    pub fn of(environment: &Environment) -> Self {
        Self {
            reserve: environment.reserve,
            enforce: environment.enforce,
            max_in_flight: environment.max_in_flight,
        }
    }

    /// The rules of an upstream of the config. A demand states the amounts itself, so nothing is forecast.
    pub(in crate::ledger) fn of_upstream(upstream: &UpstreamSettings) -> Self {
        let reserve = ReserveSettings {
            prompt: true,
            completion: CompletionReserve::MaxTokens,
            quantile: 0.0,
            default_max_tokens: 0,
            when_short: WhenShort::Reject,
            on_overrun: OnOverrun::Finish,
            max_wait: Duration::ZERO,
        };
        Self { reserve, enforce: true, max_in_flight: upstream.max_in_flight }
    }

    /// The only fraction of the config. It becomes an integer before any decision depends on it.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(super) fn quantile_ppm(&self) -> u32 {
        (self.reserve.quantile * 1e6) as u32
    }
}
