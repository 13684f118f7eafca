//! The hand-over of the gates to a new process, for a restart without a gap.

use super::gate::{Gate, LeftGate};
use super::{MAX_MODELS, ModelGate, ProviderLimits};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// The gates of one upstream on their way to a new process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LeftLimits {
    /// Identifies the provider's account whose limits these are.
    pub(crate) account: String,
    models: Vec<LeftModel>,
}

#[derive(Debug, Serialize, Deserialize)]
struct LeftModel {
    model: String,
    refusals: u64,
    gate: LeftGate,
}

impl ProviderLimits {
    /// What a new process continues with. `account`: identifies the provider's account. `None`: nothing is known.
    pub(crate) fn leave(&self, account: String) -> Option<LeftLimits> {
        let models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        let left = models.iter().filter_map(|(model, known)| {
            let (gate, refusals) = (known.lock(), known.refusals.load(Ordering::Relaxed));
            let is_informed = refusals > 0 || gate.is_informed();
            is_informed.then(|| LeftModel {
                model: model.to_string(),
                refusals,
                gate: gate.leave(self.now()),
            })
        });
        let models: Vec<LeftModel> = left.collect();
        (!models.is_empty()).then_some(LeftLimits { account, models })
    }

    /// Continues the gates of an old process.
    pub(crate) fn take_over(&self, left: LeftLimits) {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        for LeftModel { model, refusals, gate } in left.models.into_iter().take(MAX_MODELS) {
            let gate = Mutex::new(Gate::continued(self.now(), &gate));
            let new = ModelGate { gate, refusals: refusals.into(), ..ModelGate::default() };
            models.insert(model.into(), Arc::new(new));
        }
    }
}
