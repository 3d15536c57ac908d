//! One error shape for every answer that is not a success: problem details (RFC 9457).

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::adapters::storage::StorageError;
use crate::app::Error;
use crate::domain::orders::{FieldError, Rejected};

#[derive(Debug, Serialize)]
pub struct Problem {
    /// A stable name for programs, as a relative reference (RFC 9457, section 3.1.1).
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub title: &'static str,
    pub status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The fields that are wrong, where the problem is the request's content.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

impl Problem {
    pub fn new(status: StatusCode, kind: &'static str, title: &'static str) -> Self {
        Self {
            kind,
            title,
            status: status.as_u16(),
            detail: None,
            errors: Vec::new(),
        }
    }

    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }
}

impl From<Rejected> for Problem {
    fn from(Rejected(errors): Rejected) -> Self {
        let status = StatusCode::UNPROCESSABLE_ENTITY;
        Self {
            errors,
            ..Self::new(status, "invalid-request", "The request is not valid")
        }
    }
}

/// The one table from what went wrong to what the client is told.
impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(rejected) => rejected.into(),
            Error::NotFound(_) => {
                Self::new(StatusCode::NOT_FOUND, "not-found", "Not found").detail(error.to_string())
            }
            Error::KeyTaken => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency-key-reused",
                "The Idempotency-Key belongs to another request",
            ),
            // What storage says is logged, never sent.
            Error::Storage(error) => {
                tracing::error!(%error, "storage failed");
                match error {
                    StorageError::ReadOnly => Self::new(
                        StatusCode::SERVICE_UNAVAILABLE,
                        "read-only",
                        "Orders cannot be changed at the moment",
                    ),
                    StorageError::Busy(_) => Self::overloaded(),
                    StorageError::Schema { .. } | StorageError::Failed(_) => Self::internal(),
                }
            }
        }
    }
}

impl Problem {
    /// One field of a request is wrong.
    pub fn rejected(field: &str, reason: &str) -> Self {
        let (field, reason) = (field.into(), reason.into());
        Rejected(vec![FieldError { field, reason }]).into()
    }

    pub fn overloaded() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "overloaded",
            "Try again later",
        )
    }

    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "Something went wrong here",
        )
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        let json = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
