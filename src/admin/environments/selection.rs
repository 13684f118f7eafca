//! The query parameters `sort`, `limit` and `fields` of `GET /api/environments`.

use super::{EnvironmentList, EnvironmentState, EnvironmentView, EnvironmentsParameters};
use crate::admin::answers::refusal;
use axum::Json;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde_json::Value;

/// Maximum number of quotas in an answer to a query with `limit`.
const MAX_QUOTAS: usize = 400;

/// The fields of an environment that `fields` may name.
const ENVIRONMENT_FIELDS: &[&str] = &[
    "name",
    "upstream",
    "in_flight",
    "refused_last_minute",
    "quotas",
    "quotas_omitted",
    "totals",
    "enforce",
    "enforce_override",
    "shared",
];
/// The fields of a quota that `fields` may name.
const QUOTA_FIELDS: &[&str] = &[
    "scope",
    "name",
    "kind",
    "per",
    "window",
    "timezone",
    "limit",
    "burst",
    "level",
    "unlimited",
    "held",
    "used",
    "reset_seconds",
    "resets_at",
    "rate",
    "exhausts_at",
    "refused_last_minute",
    "source",
    "override",
];

/// Which environments and fields an answer has, and in which order.
pub(super) struct Selection {
    is_sorted: bool,
    limit: Option<usize>,
    /// `None`: all fields.
    fields: Option<Fields>,
}

/// The selected fields.
struct Fields {
    environment: Vec<String>,
    /// Empty: all fields, if `environment` has `quotas`.
    quota: Vec<String>,
}

impl Selection {
    pub(super) fn new(parameters: &EnvironmentsParameters) -> Result<Self, Box<Response>> {
        let EnvironmentsParameters { sort, limit, fields } = parameters;
        let is_sorted = match sort.as_str() {
            "" => false,
            "used" => true,
            _ => return Err(invalid("sort", "Use 'used': environments with the largest used share first.")),
        };
        let limit = match limit.as_str() {
            "" => None,
            text => match text.parse() {
                Ok(limit) if limit > 0 => Some(limit),
                _ => return Err(invalid("limit", "Use a whole number of environments, at least 1.")),
            },
        };
        Ok(Self { is_sorted, limit, fields: Fields::parse(fields)? })
    }

    /// The answer with these environments.
    pub(super) fn answer(&self, all: Vec<EnvironmentState>) -> Response {
        let environments: Vec<_> =
            self.select(all).into_iter().map(|(state, kept)| state.view_of(&kept)).collect();
        match &self.fields {
            None => Json(EnvironmentList { environments }).into_response(),
            Some(fields) => {
                let environments = environments.iter().filter_map(|view| fields.of(view)).collect::<Vec<_>>();
                Json(serde_json::json!({ "environments": environments })).into_response()
            }
        }
    }

    /// The answer with this environment.
    pub(super) fn answer_one(&self, state: EnvironmentState) -> Response {
        let Some((state, kept)) = self.select(vec![state]).pop() else {
            return Json(Value::Null).into_response();
        };
        let view = state.view_of(&kept);
        match &self.fields {
            None => Json(view).into_response(),
            Some(fields) => Json(fields.of(&view)).into_response(),
        }
    }

    /// The selected environments, each with the indices of its selected quotas, in the order of the answer.
    fn select(&self, mut all: Vec<EnvironmentState>) -> Vec<(EnvironmentState, Vec<usize>)> {
        if self.is_sorted {
            all.sort_by_cached_key(|state| {
                std::cmp::Reverse(OrderedShare(state.shares().fold(0.0, f64::max)))
            });
        }
        all.truncate(self.limit.unwrap_or(usize::MAX));
        let max = if self.limit.is_some() { MAX_QUOTAS } else { usize::MAX };
        let mut kept = most_used(&all, max);
        if self.is_sorted {
            for (state, kept) in all.iter().zip(&mut kept) {
                let shares: Vec<f64> = state.shares().collect();
                kept.sort_by_key(|&index| {
                    std::cmp::Reverse(OrderedShare(shares.get(index).copied().unwrap_or(0.0)))
                });
            }
        }
        all.into_iter().zip(kept).collect()
    }
}

/// At most `max` quotas: first those of environments, then those of callers and models, the most used first. For each
/// environment: the indices of its quotas, in the order of the config.
fn most_used(all: &[EnvironmentState], max: usize) -> Vec<Vec<usize>> {
    let indices = |state: &EnvironmentState| 0..state.snapshot.levels.len();
    if all.iter().map(|state| state.snapshot.levels.len()).sum::<usize>() <= max {
        return all.iter().map(|state| indices(state).collect()).collect();
    }
    let mut ranked: Vec<(bool, OrderedShare, usize, usize)> = Vec::new();
    for (at, state) in all.iter().enumerate() {
        let of_environment = state.snapshot.levels.iter().map(|level| level.quota.scope.name().is_empty());
        let quotas = of_environment.zip(state.shares()).enumerate();
        ranked.extend(quotas.map(|(index, (first, share))| (first, OrderedShare(share), at, index)));
    }
    ranked.sort_by_key(|&(first, share, ..)| std::cmp::Reverse((first, share)));
    let mut kept = vec![Vec::new(); all.len()];
    for (_, _, at, index) in ranked.into_iter().take(max) {
        if let Some(kept) = kept.get_mut(at) {
            kept.push(index);
        }
    }
    kept.iter_mut().for_each(|kept| kept.sort_unstable());
    kept
}

/// A share, with the total order of numbers.
#[derive(Clone, Copy, Debug)]
struct OrderedShare(f64);

impl Ord for OrderedShare {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for OrderedShare {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for OrderedShare {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for OrderedShare {}

impl Fields {
    /// `None`: the text is empty, which selects all fields.
    fn parse(text: &str) -> Result<Option<Self>, Box<Response>> {
        let mut fields = Self { environment: Vec::new(), quota: Vec::new() };
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let of_quota = name.strip_prefix("quotas.").unwrap_or(name);
            if ENVIRONMENT_FIELDS.contains(&name) {
                fields.environment.push(name.to_owned());
            } else if QUOTA_FIELDS.contains(&of_quota) {
                fields.quota.push(of_quota.to_owned());
            } else {
                let known = format!(
                    "Fields of an environment: {}. Fields of a quota: {}; write quotas.name for the name of a quota.",
                    ENVIRONMENT_FIELDS.join(", "),
                    QUOTA_FIELDS.join(", ")
                );
                return Err(invalid("fields", &known));
            }
        }
        let is_empty = fields.environment.is_empty() && fields.quota.is_empty();
        Ok((!is_empty).then_some(fields))
    }

    fn of(&self, view: &EnvironmentView) -> Option<Value> {
        let Ok(Value::Object(mut environment)) = serde_json::to_value(view) else { return None };
        let has = |name: &str| self.environment.iter().any(|known| known == name);
        let has_quotas = has("quotas") || !self.quota.is_empty();
        environment.retain(|name, _| match name.as_str() {
            "quotas" => has_quotas,
            "quotas_omitted" => has_quotas || has(name),
            _ => has(name),
        });
        if let Some(Value::Array(quotas)) = environment.get_mut("quotas")
            && !self.quota.is_empty()
        {
            for quota in quotas.iter_mut().filter_map(Value::as_object_mut) {
                quota.retain(|name, _| self.quota.iter().any(|known| known == name));
            }
        }
        Some(Value::Object(environment))
    }
}

#[allow(clippy::unnecessary_box_returns)] // the error of a Result
fn invalid(name: &str, values: &str) -> Box<Response> {
    let message = format!("The parameter '{name}' is not valid. {values}");
    Box::new(refusal(StatusCode::BAD_REQUEST, "invalid_value", &message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::environments::QuotaView;
    use utoipa::openapi::{RefOr, Schema};

    fn described_fields(schema: &RefOr<Schema>) -> Vec<&str> {
        let RefOr::T(Schema::Object(object)) = schema else { return Vec::new() };
        object.properties.keys().map(String::as_str).collect()
    }

    #[test]
    fn every_field_of_an_environment_and_of_a_quota_can_be_selected() {
        use utoipa::PartialSchema as _;
        for (schema, known) in
            [(EnvironmentView::schema(), ENVIRONMENT_FIELDS), (QuotaView::schema(), QUOTA_FIELDS)]
        {
            let (mut described, mut known) = (described_fields(&schema), known.to_vec());
            described.sort_unstable();
            known.sort_unstable();
            assert_eq!(described, known);
        }
    }
}
