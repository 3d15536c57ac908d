//! What has happened to orders, as it is told to others.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::orders::{Order, OrderId};

/// An event in the JSON format of CloudEvents 1.0.
/// <https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md>
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    specversion: String,
    /// UUIDv7: whoever has seen it before knows it by this.
    pub id: Uuid,
    source: String,
    #[serde(rename = "type")]
    pub kind: Kind,
    /// The order. Events of one order are told in the order in which they happened.
    pub subject: OrderId,
    pub time: Timestamp,
    /// In which trace it happened.
    /// <https://github.com/cloudevents/spec/blob/main/cloudevents/extensions/distributed-tracing.md>
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// What those who keep that trace say of it to one another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
    /// Who has caused it, where that was said.
    /// <https://github.com/cloudevents/spec/blob/main/cloudevents/extensions/authcontext.md>
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authid: Option<String>,
    datacontenttype: String,
    /// The order as it was right after. Events are kept by many and for long: they have no contacts.
    pub data: Order,
}

/// What an event comes from.
#[derive(Debug, Clone, Default)]
pub struct Cause {
    pub trace: Option<Trace>,
    pub subject: Option<String>,
}

/// A place in a trace, as W3C's fields say it.
/// <https://www.w3.org/TR/trace-context/>
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    pub parent: String,
    pub state: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    #[serde(rename = "order.placed.v1")]
    Placed,
    #[serde(rename = "order.cancelled.v1")]
    Cancelled,
}

impl Event {
    pub fn new(kind: Kind, order: &Order) -> Self {
        Self {
            specversion: "1.0".to_owned(),
            id: Uuid::now_v7(),
            source: "/v1/orders".to_owned(),
            kind,
            subject: order.id,
            time: order.updated_at,
            traceparent: None,
            tracestate: None,
            authid: None,
            datacontenttype: "application/json".to_owned(),
            data: Order {
                contact: None,
                ..order.clone()
            },
        }
    }
}

impl Event {
    /// In which trace, and by whom.
    #[must_use]
    pub fn caused_by(self, cause: Cause) -> Self {
        let (traceparent, tracestate) =
            cause.trace.map(|trace| (trace.parent, trace.state)).unzip();
        Self {
            traceparent,
            tracestate: tracestate.flatten(),
            authid: cause.subject,
            ..self
        }
    }

    /// In which trace it happened.
    pub fn trace(&self) -> Option<Trace> {
        Some(Trace {
            parent: self.traceparent.clone()?,
            state: self.tracestate.clone(),
        })
    }
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Placed => "order.placed.v1",
            Self::Cancelled => "order.cancelled.v1",
        }
    }
}
