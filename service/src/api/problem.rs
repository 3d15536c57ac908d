//! One shape for every answer that is not a success: problem details (RFC 9457). The other interfaces
//! make theirs from it.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::fault::Fault;
use crate::app::Error;
use crate::auth;
use crate::domain::orders::{FieldError, OrderId, Rejected};

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Problem {
    #[serde(skip)]
    pub fault: Fault,
    /// A stable name for programs, as a relative reference (RFC 9457, section 3.1.1).
    #[serde(rename = "type")]
    #[schema(value_type = String)]
    pub kind: &'static str,
    #[schema(value_type = String)]
    pub title: &'static str,
    pub status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The fields that are wrong, where the problem is the request's content.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub errors: Vec<FieldError>,
}

impl Problem {
    pub fn new(fault: Fault) -> Self {
        let names = fault.names();
        Self {
            fault,
            kind: names.kind,
            title: names.title,
            status: names.http.as_u16(),
            detail: None,
            errors: Vec::new(),
        }
    }

    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// The name in capitals, as GraphQL's and gRPC's clients know it.
    pub fn code(&self) -> String {
        self.kind.replace('-', "_").to_uppercase()
    }

    /// In one sentence.
    pub fn message(&self) -> &str {
        self.detail.as_deref().unwrap_or(self.title)
    }

    /// One field of a request is wrong.
    pub fn rejected(field: &str, reason: &str) -> Self {
        let (field, reason) = (field.into(), reason.into());
        Rejected(vec![FieldError { field, reason }]).into()
    }

    /// Something only a more exact status of HTTP's says.
    #[must_use]
    pub fn status(self, status: StatusCode) -> Self {
        Self {
            status: status.as_u16(),
            ..self
        }
    }
}

impl From<Rejected> for Problem {
    fn from(Rejected(errors): Rejected) -> Self {
        Self {
            errors,
            ..Self::new(Fault::Invalid)
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let problem = Self::new(Fault::from(&error));
        match error {
            Error::Invalid(rejected) => rejected.into(),
            Error::NotFound(_) => problem.detail(error.to_string()),
            // What storage says is logged, never sent.
            Error::Storage(error) => {
                tracing::error!(%error, "storage failed");
                problem
            }
            Error::Unauthenticated
            | Error::Forbidden
            | Error::KeyTaken
            | Error::TooSlow(_)
            | Error::Full => problem,
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let problem = self.clone();
        let mut response = (status, Json(self)).into_response();
        let json = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if status == StatusCode::UNAUTHORIZED {
            let headers = response.headers_mut();
            headers.insert(header::WWW_AUTHENTICATE, auth::CHALLENGE);
        }
        // For clients who speak something else than JSON.
        response.extensions_mut().insert(problem);
        response
    }
}

/// The id of an order, as every interface reads it.
pub fn order_id(text: &str, field: &str) -> Result<OrderId, Problem> {
    text.parse()
        .map_err(|_| Problem::rejected(field, "must be an order's id (a UUID)"))
}

/// The key of a request that may be sent again, as every interface reads it.
/// <https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/>
pub fn idempotency_key(key: Option<&str>) -> Result<Option<String>, Problem> {
    const MAX_KEY: usize = 255;
    let is_good = |key: &&str| {
        (1..=MAX_KEY).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic())
    };
    match key {
        Some(key) if !is_good(&key) => Err(Problem::rejected(
            "Idempotency-Key",
            "must have 1 to 255 visible ASCII characters",
        )),
        key => Ok(key.map(str::to_owned)),
    }
}
