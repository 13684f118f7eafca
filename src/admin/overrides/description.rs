//! The parts of the OpenAPI description that several requests of overrides have in common.

use crate::admin::answers::ErrorBody;
use utoipa::{IntoParams, IntoResponses};

/// The quota of an environment that a path names.
#[derive(serde::Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(in crate::admin) struct QuotaPath {
    /// The name of the environment.
    pub(super) environment: String,
    /// `total_tokens`, `prompt_tokens`, `completion_tokens` or `requests`.
    pub(super) kind: String,
    /// The period as the config writes it.
    pub(super) per: String,
}

/// The quota of an upstream that a path names.
#[derive(serde::Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(in crate::admin) struct UpstreamQuotaPath {
    /// The name of the upstream.
    pub(super) upstream: String,
    /// `total_tokens`, `prompt_tokens`, `completion_tokens` or `requests`.
    pub(super) kind: String,
    /// The period as the config writes it.
    pub(super) per: String,
}

/// The refusals of a change that names one quota of an upstream.
#[derive(IntoResponses)]
#[allow(dead_code)] // describes answers, and is never made
pub(super) enum UpstreamQuotaErrors {
    /// `invalid_json`, `invalid_value`: the body or a parameter is not valid.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// `unknown_upstream`, `unknown_quota`
    #[response(status = 404)]
    Unknown(ErrorBody),
    /// `quota_store_unavailable`: Redis is unavailable, and nothing was changed.
    #[response(status = 503)]
    RedisUnavailable(ErrorBody),
}

/// The refusals of a change that names one quota.
#[derive(IntoResponses)]
#[allow(dead_code)] // describes answers, and is never made
pub(super) enum QuotaErrors {
    /// `invalid_json`, `invalid_value`: the body or a parameter is not valid.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// `unknown_environment`, `unknown_quota`
    #[response(status = 404)]
    Unknown(ErrorBody),
    /// `quota_store_unavailable`: Redis is unavailable, and nothing was changed.
    #[response(status = 503)]
    RedisUnavailable(ErrorBody),
}

/// The refusals of a change of a whole environment.
#[derive(IntoResponses)]
#[allow(dead_code)] // describes answers, and is never made
pub(super) enum EnvironmentErrors {
    /// `invalid_value`: the request has a query parameter.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// `unknown_environment`
    #[response(status = 404)]
    Unknown(ErrorBody),
    /// `quota_store_unavailable`: Redis is unavailable, and nothing was changed.
    #[response(status = 503)]
    RedisUnavailable(ErrorBody),
}

/// The refusals of a body.
#[derive(IntoResponses)]
#[allow(dead_code)] // describes answers, and is never made
pub(super) enum BodyErrors {
    /// `invalid_json`, `invalid_value`: the body or a parameter is not valid.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// `request_timeout`: the body did not arrive in time.
    #[response(status = 408)]
    Timeout(ErrorBody),
    /// `request_body_too_large`: the body is larger than 64 KiB.
    #[response(status = 413)]
    TooLarge(ErrorBody),
}
