//! `GET /api/usage`: the usage history.

use super::Admin;
use super::answers::{AccessErrors, ErrorBody, QueryResult, read_query, refusal};
use crate::clock::{self, Timestamp};
use crate::store::{self, ReportQuery, ReportRow, ReportSubject, TooManyRows};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{StatusCode, header};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

/// The report covers this time if the query names no beginning.
const DEFAULT_TIME: &str = "1d";

/// The query parameters. Empty ones count as absent.
#[derive(serde::Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct UsageParameters {
    /// Only this environment.
    environment: String,
    /// Only this upstream, which must have limits: what all environments have used of it.
    upstream: String,
    /// Any of `environment,model,caller`, or of `upstream,model`. Default: `environment`, with `upstream`: `upstream`.
    group_by: Option<String>,
    /// A moment such as `2026-11-28T10:00:00Z`, or a duration before now. Default: `1d`.
    from: String,
    /// As `from`. Default: now.
    to: String,
    /// `hour`, `day`, `week`, `month`, or a duration of whole minutes. Default: `hour`.
    step: String,
    /// `json` or `csv`. Default: `json`.
    format: String,
}

impl Default for UsageParameters {
    fn default() -> Self {
        let none = String::new;
        let (from, step, format) = (DEFAULT_TIME.into(), "hour".into(), "json".into());
        Self { environment: none(), upstream: none(), group_by: None, from, to: none(), step, format }
    }
}

impl UsageParameters {
    /// `Err`: the fault.
    fn query(&self, now: Timestamp) -> Result<ReportQuery, String> {
        let moment = |text: &str, name| store::parse_moment(text, now).ok_or_else(|| unreadable(name));
        let columns = self.group_by.as_deref().map(store::parse_columns);
        let columns = columns.map(|columns| columns.ok_or_else(|| unreadable("group_by"))).transpose()?;
        let name = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let subject = ReportSubject::new(columns, name(&self.environment), name(&self.upstream));
        Ok(ReportQuery {
            from: moment(&self.from, "from")?,
            // The current minute belongs to the report.
            to: if self.to.is_empty() { now.plus_ms(60_000) } else { moment(&self.to, "to")? },
            step: store::parse_step(&self.step).ok_or_else(|| unreadable("step"))?,
            subject: subject
                .ok_or_else(|| format!("The parameters do not fit: {}.", ReportSubject::FAULT))?,
        })
    }
}

/// The answer.
#[derive(Serialize, ToSchema)]
struct UsageView {
    rows: Vec<ReportRow>,
}

/// The usage history, as JSON or CSV.
#[utoipa::path(get, path = "/api/usage", tag = "reports", params(UsageParameters), responses(
    (status = 200, description = "A row for each step and group. With `format=csv` the same as CSV.", body = UsageView),
    (status = 400, description = "`invalid_value`: a parameter is not valid, or upstreams are combined with environments or callers.", body = ErrorBody),
    (status = 404, description = "`no_history`: the gateway stores no usage history.", body = ErrorBody),
    (status = 422, description = "`too_many_rows`: the report has more rows than an answer may have.", body = ErrorBody),
    (status = 503, description = "`history_unavailable`: the store cannot be read.", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn report(State(admin): State<Admin>, query: QueryResult<UsageParameters>) -> Response {
    let parameters = match read_query(query) {
        Ok(parameters) => parameters,
        Err(refusal) => return *refusal,
    };
    let query = match parameters.query(clock::now()) {
        Ok(query) => query,
        Err(message) => return invalid(&message),
    };
    let is_csv = match parameters.format.as_str() {
        "json" => false,
        "csv" => true,
        _ => return invalid(&unreadable("format")),
    };
    let settings = admin.state.current().config.store.clone();
    if settings.memory {
        let message = "The gateway stores no usage history (store.memory: true).";
        return refusal(StatusCode::NOT_FOUND, "no_history", message);
    }
    let read = move || answer(&store::read_usage(&settings.path, &query)?, &query.subject, is_csv);
    match tokio::task::spawn_blocking(read).await.map_err(anyhow::Error::from).flatten() {
        Ok(response) => response,
        Err(error) if error.is::<TooManyRows>() => refusal(
            StatusCode::UNPROCESSABLE_ENTITY,
            "too_many_rows",
            &format!("The usage history: {error}."),
        ),
        Err(error) => {
            let message = format!(
                "The usage history cannot be read: {error:#}. Check that the file is there and that the gateway may read it."
            );
            refusal(StatusCode::SERVICE_UNAVAILABLE, "history_unavailable", &message)
        }
    }
}

fn answer(rows: &[ReportRow], subject: &ReportSubject, is_csv: bool) -> anyhow::Result<Response> {
    if !is_csv {
        return Ok(Json(UsageView { rows: rows.to_vec() }).into_response());
    }
    let headers = [
        (header::CONTENT_TYPE, "text/csv; charset=utf-8"),
        (header::CONTENT_DISPOSITION, "attachment; filename=\"tollgate-usage.csv\""),
    ];
    Ok((headers, store::to_csv(rows, subject)?).into_response())
}

fn invalid(message: &str) -> Response {
    refusal(StatusCode::BAD_REQUEST, "invalid_value", message)
}

/// The parameter with this name cannot be read.
fn unreadable(name: &str) -> String {
    format!(
        "The parameter '{name}' is not valid. from and to are moments such as 2026-11-28T10:00:00Z, or durations before now; step is hour, day, week, month or a duration of whole minutes; group_by is any of environment,model,caller, or of upstream,model; format is json or csv."
    )
}
