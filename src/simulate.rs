//! Replays a trace of calls through the quota engine on a virtual clock. The report shows which calls the quotas
//! admit, and compares several reservation modes with an oracle.
//!
//! The calls of environments that share upstreams with limits are replayed together, each through the quotas of its own
//! environment. One replay as configured serves the reports of all of them. In another mode only one environment differs, so
//! that each report has replays of its own.
//!
//! Every answer is a stream: the first token follows after a delay, the others at a constant rate. A denied call
//! is not repeated, and no call waits in the wait queue (`max_wait` is ignored).

mod chart;
mod history;
mod meter;
mod parallel;
mod replay;
mod report;
mod request_log;
mod search;
mod timeline;
mod trace;
mod traffic;
mod words;

use crate::config::{CompletionReserve, Environment, OnOverrun, WhenShort};
use crate::ledger::Rules;
use std::time::Duration;

pub use history::{history_start, refused_in_history};
pub use report::{SimulationReport, reports};
pub use request_log::{RequestLog, read_request_log};
pub use search::SearchBudget;
pub use trace::{TraceCall, TraceFault, read_trace};

/// The speed of all answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Delay from the request to the first token.
    pub first_token: Duration,
    /// Rate after the first token; more than 0.
    pub tokens_per_second: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { first_token: Duration::from_millis(400), tokens_per_second: 30.0 }
    }
}

/// How a replay reserves tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    /// By the settings of the environment.
    Configured,
    /// The prompt only.
    PromptOnly,
    /// Nothing. The answer is charged at its end.
    Afterwards,
    /// The prompt and `max_tokens` of the request, or `default_max_tokens`.
    MaxTokens,
    /// The prompt and this quantile of recent completions.
    Adaptive(f64),
    /// Exactly the amounts that the answer will use. A real gateway cannot predict them; the other modes are
    /// compared with this one.
    Oracle,
}

impl Mode {
    /// The modes that a report compares with the configured one.
    const OTHERS: [Self; 7] = [
        Self::Afterwards,
        Self::PromptOnly,
        Self::MaxTokens,
        Self::Adaptive(0.5),
        Self::Adaptive(0.9),
        Self::Adaptive(0.99),
        Self::Oracle,
    ];

    /// The name in reports.
    fn name(self) -> String {
        match self {
            Self::Configured => "as configured".into(),
            Self::Afterwards => "charge afterwards".into(),
            Self::PromptOnly => "prompt only".into(),
            Self::MaxTokens => "max_tokens".into(),
            Self::Adaptive(q) => format!("adaptive {q}"),
            Self::Oracle => "oracle".into(),
        }
    }

    /// Whether the environment is configured so. The oracle knows the length of answers, which no config does.
    fn is_configured(self, environment: &Environment) -> bool {
        let (own, configured) = (self.rules(environment), Rules::of(environment));
        self != Self::Oracle && (own.reserve, own.enforce) == (configured.reserve, configured.enforce)
    }

    fn rules(self, environment: &Environment) -> Rules {
        let mut rules = Rules::of(environment);
        let reserve = &mut rules.reserve;
        if self != Self::Configured {
            reserve.prompt = true;
            reserve.when_short = WhenShort::Reject;
            reserve.on_overrun = OnOverrun::Finish;
            // The comparison is between enforced quotas, also if the environment is in shadow mode.
            rules.enforce = true;
        }
        match self {
            Self::Configured => {}
            Self::Afterwards => {
                reserve.prompt = false;
                reserve.completion = CompletionReserve::None;
            }
            Self::PromptOnly => reserve.completion = CompletionReserve::None,
            // The replay sets the cap of an oracle call to the length of its answer.
            Self::MaxTokens | Self::Oracle => reserve.completion = CompletionReserve::MaxTokens,
            Self::Adaptive(quantile) => {
                reserve.completion = CompletionReserve::Adaptive;
                reserve.quantile = quantile;
            }
        }
        rules
    }
}

#[cfg(test)]
mod tests;
