//! The JSON shapes of errors: OpenAI's, Anthropic's and Google's.

use crate::api::Dialect;
use crate::quota::{Shortfall, Wait};
use http::StatusCode;
use serde_json::{Value, json};

/// The content of an error, which each dialect arranges in its own way.
pub(super) struct ErrorContent<'e> {
    pub(super) status: StatusCode,
    /// OpenAI's error type.
    pub(super) kind: &'static str,
    pub(super) code: &'static str,
    pub(super) message: String,
    /// The invalid field of the request.
    pub(super) param: Option<&'static str>,
    /// The quotas without room, of a denial. The first has the longest wait.
    pub(super) shortfalls: Option<&'e [Shortfall]>,
}

impl ErrorContent<'_> {
    /// The body of the answer. For a denial, `error.quotas` lists every quota without room, in each dialect.
    pub(super) fn body(&self, dialect: Dialect) -> Value {
        let Self { status, kind, code, message, param, shortfalls } = self;
        let mut body = match dialect {
            Dialect::OpenAi | Dialect::Responses => {
                json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
            }
            Dialect::Anthropic => {
                json!({"type": "error", "error": {"type": anthropic_type(*status), "message": message}})
            }
            Dialect::Google => {
                let name = google_status(*status);
                let details = self.google_details();
                json!({"error": {"code": status.as_u16(), "message": message, "status": name, "details": details}})
            }
        };
        if let Some(shortfalls) = shortfalls {
            body["error"]["quotas"] = shortfalls.iter().map(shortfall_json).collect();
        }
        body
    }

    /// The SSE event that ends an interrupted stream. `sequence_number` is that of the event, for streams that number
    /// their events.
    pub(super) fn event(&self, dialect: Dialect, sequence_number: Option<u64>) -> String {
        let mut body = self.body(dialect);
        match dialect {
            Dialect::OpenAi | Dialect::Google => format!("data: {body}\n\n"),
            Dialect::Anthropic => format!("event: error\ndata: {body}\n\n"),
            Dialect::Responses => {
                // The documented event has these fields at its top level. Some clients read `error` instead, as in
                // other streams.
                for field in ["code", "message", "param"] {
                    body[field] = body["error"][field].clone();
                }
                body["type"] = "error".into();
                body["sequence_number"] = sequence_number.unwrap_or(0).into();
                format!("event: error\ndata: {body}\n\n")
            }
        }
    }

    /// The details that Google's client libraries read: the reason, and when to retry.
    fn google_details(&self) -> Value {
        let mut details = vec![json!({
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": self.code.to_ascii_uppercase(),
            "domain": "tollgate",
        })];
        let wait = self.shortfalls.and_then(|shortfalls| shortfalls.first()).map(|s| s.wait);
        if let Some(Wait::Ms(ms)) = wait {
            details.push(json!({
                "@type": "type.googleapis.com/google.rpc.RetryInfo",
                "retryDelay": format!("{}s", ms.div_ceil(1_000).max(1)),
            }));
        }
        details.into()
    }
}

/// The SDK's name in a message.
pub(super) fn sdk(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::OpenAi | Dialect::Responses => "An OpenAI SDK",
        Dialect::Anthropic => "An Anthropic SDK",
        Dialect::Google => "A Google SDK",
    }
}

/// Anthropic's error types by status, as its documentation lists them.
fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    }
}

/// Google's names for statuses (`google.rpc.Code`).
fn google_status(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "UNAUTHENTICATED",
        403 => "PERMISSION_DENIED",
        404 => "NOT_FOUND",
        405 => "UNIMPLEMENTED",
        429 => "RESOURCE_EXHAUSTED",
        502 | 503 => "UNAVAILABLE",
        504 => "DEADLINE_EXCEEDED",
        400..=499 => "INVALID_ARGUMENT",
        _ => "INTERNAL",
    }
}

fn shortfall_json(shortfall: &Shortfall) -> Value {
    let Shortfall { quota, remaining, requested, wait, .. } = shortfall;
    let retry_after_ms = match wait {
        Wait::Ms(ms) => Some((*ms).max(1)),
        Wait::Never => None,
    };
    let mut json = json!({
        "scope": quota.scope.as_str(),
        "kind": quota.kind.as_str(),
        "per": quota.per.text,
        "limit": quota.limit,
        "remaining": remaining,
        "requested": requested,
        "retry_after_ms": retry_after_ms,
    });
    if !quota.scope.name().is_empty() {
        json["name"] = quota.scope.name().into();
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(status: StatusCode, code: &'static str) -> ErrorContent<'static> {
        let message = "A message.".to_owned();
        ErrorContent { status, kind: "invalid_request_error", code, message, param: None, shortfalls: None }
    }

    #[test]
    fn errors_have_the_shape_of_each_dialect() {
        let error = content(StatusCode::UNAUTHORIZED, "invalid_api_key");
        let [openai, anthropic, google] =
            [Dialect::OpenAi, Dialect::Anthropic, Dialect::Google].map(|dialect| error.body(dialect));
        assert_eq!(openai["error"]["code"], "invalid_api_key");
        assert_eq!(anthropic["type"], "error");
        assert_eq!(anthropic["error"]["type"], "authentication_error");
        assert_eq!(
            (&google["error"]["code"], &google["error"]["status"]),
            (&json!(401), &json!("UNAUTHENTICATED"))
        );
        assert_eq!(google["error"]["details"][0]["reason"], "INVALID_API_KEY");
        for body in [openai, anthropic, google] {
            assert_eq!(body["error"]["message"], error.message);
        }
    }

    #[test]
    fn every_status_has_an_error_type_in_each_dialect() {
        for (status, anthropic, google) in [
            (400, "invalid_request_error", "INVALID_ARGUMENT"),
            (403, "permission_error", "PERMISSION_DENIED"),
            (404, "not_found_error", "NOT_FOUND"),
            (405, "invalid_request_error", "UNIMPLEMENTED"),
            (413, "request_too_large", "INVALID_ARGUMENT"),
            (415, "invalid_request_error", "INVALID_ARGUMENT"),
            (429, "rate_limit_error", "RESOURCE_EXHAUSTED"),
            (500, "api_error", "INTERNAL"),
            (502, "api_error", "UNAVAILABLE"),
            (503, "overloaded_error", "UNAVAILABLE"),
            (504, "timeout_error", "DEADLINE_EXCEEDED"),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!((anthropic_type(status), google_status(status)), (anthropic, google), "{status}");
        }
    }

    #[test]
    fn error_events_have_the_shape_of_each_dialect() {
        let error = content(StatusCode::BAD_GATEWAY, "upstream_disconnected");
        let data = |event: &str| -> Value {
            let data = event.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
            serde_json::from_str(data).unwrap()
        };
        for (dialect, first_line) in [
            (Dialect::OpenAi, "data: {\"error\""),
            (Dialect::Responses, "event: error"),
            (Dialect::Anthropic, "event: error"),
            (Dialect::Google, "data: {\"error\""),
        ] {
            let event = error.event(dialect, None);
            assert!(event.starts_with(first_line) && event.ends_with("}\n\n"), "{event}");
            assert_eq!(data(&event)["error"]["message"], error.message);
        }
        let responses = data(&error.event(Dialect::Responses, Some(7)));
        assert_eq!(
            (&responses["type"], &responses["code"]),
            (&json!("error"), &json!("upstream_disconnected"))
        );
    }
}
