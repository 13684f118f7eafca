//! The cells of an environment in Redis: names, and the calendar periods that the script cannot compute.

use crate::clock::Timestamp;
use crate::quota::{CalendarPeriod, Quota, Scope, Window};

/// The cells of an environment, one for each quota: their names in Redis, and the calendar classes that they belong to. Quotas
/// of one class have the same periods.
#[derive(Clone, Debug)]
pub struct Cells {
    quotas: Vec<Quota>,
    names: Vec<String>,
    classes: Vec<(String, CalendarPeriod)>,
}

impl Cells {
    /// The cells of these quotas.
    pub fn new(quotas: &[Quota], now: Timestamp) -> Self {
        let mut classes: Vec<(String, CalendarPeriod)> = Vec::new();
        for quota in quotas {
            let Window::Calendar { unit, zone } = &quota.window else { continue };
            let class = calendar_class(quota);
            if classes.iter().all(|(known, _)| *known != class) {
                classes.push((class, CalendarPeriod::new(1, *unit, zone.clone(), now)));
            }
        }
        Self { quotas: quotas.to_vec(), names: quotas.iter().map(cell_name).collect(), classes }
    }

    /// The quotas, in the config's order.
    pub fn quotas(&self) -> &[Quota] {
        &self.quotas
    }

    /// The name of a cell. `index`: its quota in the config's order.
    pub(super) fn name(&self, index: usize) -> &str {
        &self.names[index]
    }

    /// Whether a cell has calendar periods.
    pub(super) fn is_calendar(&self, index: usize) -> bool {
        matches!(self.quotas[index].window, Window::Calendar { .. })
    }

    /// The arguments with the current period of each calendar class. `redis_time`: the estimated time on Redis's clock.
    pub(super) fn period_arguments(&mut self, redis_time: Timestamp) -> Vec<String> {
        let mut arguments = vec![self.classes.len().to_string()];
        for (class, calendar) in &mut self.classes {
            calendar.roll(redis_time);
            arguments.extend([class.clone(), calendar.start().0.to_string(), calendar.end().0.to_string()]);
        }
        arguments
    }
}

/// The name of a quota's cell, which does not depend on the limit.
fn cell_name(quota: &Quota) -> String {
    let window = match quota.window {
        Window::Rolling { .. } => "rolling".to_owned(),
        // A quota with another time zone has another cell. The first node that joins with it continues the replaced cell.
        Window::Calendar { .. } => calendar_class(quota),
    };
    let Quota { scope, kind, per, .. } = quota;
    match scope {
        Scope::Environment => format!("{kind}/{}/{window}", per.ms),
        Scope::Caller(_) | Scope::Model(_) | Scope::Upstream(_) | Scope::UpstreamModel(_) => {
            format!("{kind}/{}/{window}/{}/{}", per.ms, scope.as_str(), scope.name())
        }
    }
}

/// The calendar class of a quota; empty for a rolling quota.
pub(super) fn calendar_class(quota: &Quota) -> String {
    match &quota.window {
        Window::Rolling { .. } => String::new(),
        Window::Calendar { unit, zone } => {
            format!("{unit:?}/{}", zone.iana_name().unwrap_or("UTC")).to_lowercase()
        }
    }
}
