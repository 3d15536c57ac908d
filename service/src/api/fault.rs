//! What can go wrong, and the one table of what each interface says of it.

use axum::http::StatusCode;

use crate::adapters::storage::StorageError;
use crate::app::Error;

/// Something that went wrong, as a client may know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Unauthenticated,
    Forbidden,
    Invalid,
    Unreadable,
    NotJson,
    TooLarge,
    NotFound,
    WrongMethod,
    KeyReused,
    RateLimited,
    TooSlow,
    ReadOnly,
    Overloaded,
    Timeout,
    Internal,
}

/// How the interfaces name it: a relative reference for REST (RFC 9457, section 3.1.1), which in
/// capitals is GraphQL's `extensions.code`, a status code of HTTP and one of gRPC, and words.
pub struct Names {
    pub kind: &'static str,
    pub http: StatusCode,
    pub grpc: tonic::Code,
    pub title: &'static str,
}

impl Fault {
    pub fn names(self) -> Names {
        use StatusCode as Http;
        use tonic::Code as Grpc;
        let (kind, http, grpc, title) = match self {
            Self::Unauthenticated => (
                "unauthenticated",
                Http::UNAUTHORIZED,
                Grpc::Unauthenticated,
                "Say who you are, by a bearer token",
            ),
            Self::Forbidden => (
                "forbidden",
                Http::FORBIDDEN,
                Grpc::PermissionDenied,
                "You may not do this",
            ),
            Self::Invalid => (
                "invalid-request",
                Http::UNPROCESSABLE_ENTITY,
                Grpc::InvalidArgument,
                "The request is not valid",
            ),
            Self::Unreadable => (
                "unreadable",
                Http::BAD_REQUEST,
                Grpc::InvalidArgument,
                "The request cannot be read",
            ),
            Self::NotJson => (
                "not-json",
                Http::UNSUPPORTED_MEDIA_TYPE,
                Grpc::InvalidArgument,
                "The body must be application/json",
            ),
            Self::TooLarge => (
                "too-large",
                Http::PAYLOAD_TOO_LARGE,
                Grpc::OutOfRange,
                "The body is too large",
            ),
            Self::NotFound => ("not-found", Http::NOT_FOUND, Grpc::NotFound, "Not found"),
            Self::WrongMethod => (
                "method-not-allowed",
                Http::METHOD_NOT_ALLOWED,
                Grpc::Unimplemented,
                "Method not allowed",
            ),
            Self::KeyReused => (
                "idempotency-key-reused",
                Http::UNPROCESSABLE_ENTITY,
                Grpc::FailedPrecondition,
                "The Idempotency-Key belongs to another request",
            ),
            Self::RateLimited => (
                "rate-limited",
                Http::TOO_MANY_REQUESTS,
                Grpc::ResourceExhausted,
                "Too many requests",
            ),
            Self::TooSlow => (
                "too-slow",
                Http::TOO_MANY_REQUESTS,
                Grpc::ResourceExhausted,
                "Events came faster than they were read",
            ),
            Self::ReadOnly => (
                "read-only",
                Http::SERVICE_UNAVAILABLE,
                Grpc::Unavailable,
                "Orders cannot be changed at the moment",
            ),
            Self::Overloaded => (
                "overloaded",
                Http::SERVICE_UNAVAILABLE,
                Grpc::Unavailable,
                "Try again later",
            ),
            Self::Timeout => (
                "timeout",
                Http::GATEWAY_TIMEOUT,
                Grpc::DeadlineExceeded,
                "The request took too long, and may have been carried out all the same",
            ),
            Self::Internal => (
                "internal",
                Http::INTERNAL_SERVER_ERROR,
                Grpc::Internal,
                "Something went wrong here",
            ),
        };
        Names {
            kind,
            http,
            grpc,
            title,
        }
    }
}

impl From<&Error> for Fault {
    fn from(error: &Error) -> Self {
        match error {
            Error::Unauthenticated => Self::Unauthenticated,
            Error::Forbidden => Self::Forbidden,
            Error::Invalid(_) => Self::Invalid,
            Error::NotFound(_) => Self::NotFound,
            Error::KeyTaken => Self::KeyReused,
            Error::TooSlow(_) => Self::TooSlow,
            Error::Full => Self::Overloaded,
            Error::Storage(error) => match error {
                StorageError::ReadOnly => Self::ReadOnly,
                StorageError::Busy(_) => Self::Overloaded,
                StorageError::Schema { .. } | StorageError::Fenced(_) | StorageError::Failed(_) => {
                    Self::Internal
                }
            },
        }
    }
}
