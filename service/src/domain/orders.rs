//! Orders: what a valid one is. A value of these types cannot be wrong.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

const MAX_CUSTOMER: usize = 64;
/// As long as an e-mail address can be (RFC 5321, section 4.5.3.1).
const MAX_CONTACT: usize = 254;
const MAX_SKU: usize = 32;
const MAX_QUANTITY: u32 = 10_000;
/// A million in the currency's main unit.
const MAX_UNIT_PRICE_CENTS: i64 = 100_000_000;

/// UUIDv7 (RFC 9562, section 5.7): ids sort by the time they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[schema(value_type = String, format = Uuid)]
pub struct OrderId(Uuid);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Open,
    Cancelled,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Order {
    pub id: OrderId,
    pub customer: String,
    /// ISO 4217.
    pub currency: String,
    pub status: Status,
    pub items: Vec<Item>,
    pub total_cents: i64,
    /// How to reach whoever has placed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub contact: Option<Contact>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    pub updated_at: Timestamp,
}

/// An e-mail address, a telephone number, whatever reaches somebody. No log shows it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contact(pub String);

impl fmt::Debug for Contact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(contact)")
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Item {
    pub sku: String,
    pub quantity: u32,
    pub unit_price_cents: i64,
}

/// What a client sends; not yet known to be valid.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OrderRequest {
    #[schema(
        min_length = 1,
        max_length = 64,
        pattern = r"^[^\u0000-\u001f\u007f-\u009f]*[^\u0000-\u001f\u007f-\u009f\s][^\u0000-\u001f\u007f-\u009f]*$"
    )]
    pub customer: String,
    /// ISO 4217.
    #[schema(pattern = "^[A-Z]{3}$")]
    pub currency: String,
    #[schema(min_items = 1, max_items = 50)]
    pub items: Vec<ItemRequest>,
    /// How to reach whoever places it; kept encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(
        value_type = Option<String>,
        min_length = 1,
        max_length = 254,
        pattern = r"^[^\u0000-\u001f\u007f-\u009f]*[^\u0000-\u001f\u007f-\u009f\s][^\u0000-\u001f\u007f-\u009f]*$"
    )]
    pub contact: Option<Contact>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ItemRequest {
    #[schema(
        min_length = 1,
        max_length = 32,
        pattern = r"^[^\u0000-\u001f\u007f-\u009f]*[^\u0000-\u001f\u007f-\u009f\s][^\u0000-\u001f\u007f-\u009f]*$"
    )]
    pub sku: String,
    #[schema(minimum = 1, maximum = 10000)]
    #[serde(deserialize_with = "whole")]
    pub quantity: u32,
    #[schema(minimum = 0, maximum = 100_000_000)]
    #[serde(deserialize_with = "whole")]
    pub unit_price_cents: i64,
}

/// What one customer has ordered and not cancelled, in one currency.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Total {
    pub currency: String,
    pub orders: i64,
    pub total_cents: i64,
}

/// Which page a client wants: `limit` orders older than `after`.
#[derive(Debug, Default)]
pub struct PageRequest {
    pub limit: Option<u32>,
    pub after: Option<OrderId>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Page {
    pub items: Vec<Order>,
    /// The `after` of the next page, where there is one.
    pub next: Option<OrderId>,
}

/// Every field that is wrong, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} invalid field(s)", .0.len())]
pub struct Rejected(pub Vec<FieldError>);

/// One wrong field; `field` is a JSON pointer (RFC 6901) into the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    pub field: String,
    pub reason: String,
}

impl Order {
    /// The order that `request` asks for, or all that is wrong with it.
    pub fn place(request: OrderRequest, max_items: usize) -> Result<Self, Rejected> {
        let mut wrong = Vec::new();
        let mut check = |ok: bool, field: String, reason: String| {
            if !ok {
                wrong.push(FieldError { field, reason });
            }
        };
        check(
            may_be_customer(&request.customer),
            "/customer".into(),
            format!("must have 1 to {MAX_CUSTOMER} printable characters"),
        );
        check(
            request.currency.len() == 3 && request.currency.bytes().all(|b| b.is_ascii_uppercase()),
            "/currency".into(),
            "must be three capital letters (ISO 4217)".into(),
        );
        let contact = request.contact.as_ref();
        check(
            contact.is_none_or(|contact| is_printable(&contact.0, MAX_CONTACT)),
            "/contact".into(),
            format!("must have 1 to {MAX_CONTACT} printable characters"),
        );
        check(
            (1..=max_items).contains(&request.items.len()),
            "/items".into(),
            format!("must have 1 to {max_items} items"),
        );
        for (i, item) in request.items.iter().enumerate() {
            check(
                is_printable(&item.sku, MAX_SKU),
                format!("/items/{i}/sku"),
                format!("must have 1 to {MAX_SKU} printable characters"),
            );
            check(
                (1..=MAX_QUANTITY).contains(&item.quantity),
                format!("/items/{i}/quantity"),
                format!("must be 1 to {MAX_QUANTITY}"),
            );
            check(
                (0..=MAX_UNIT_PRICE_CENTS).contains(&item.unit_price_cents),
                format!("/items/{i}/unit_price_cents"),
                format!("must be 0 to {MAX_UNIT_PRICE_CENTS}"),
            );
        }
        if !wrong.is_empty() {
            return Err(Rejected(wrong));
        }
        let now = now();
        let items = request
            .items
            .into_iter()
            .map(|item| Item {
                sku: item.sku,
                quantity: item.quantity,
                unit_price_cents: item.unit_price_cents,
            })
            .collect();
        let order = Self::assemble(
            OrderId(Uuid::now_v7()),
            request.customer,
            request.currency,
            Status::Open,
            items,
            (now, now),
        );
        Ok(Self {
            contact: request.contact,
            ..order
        })
    }

    /// The order as it was when it was placed.
    #[must_use]
    pub fn as_placed(self) -> Self {
        Self {
            status: Status::Open,
            updated_at: self.created_at,
            ..self
        }
    }

    /// An order without a contact from its parts, as storage keeps them; `times` are creation and last
    /// change.
    pub fn assemble(
        id: OrderId,
        customer: String,
        currency: String,
        status: Status,
        items: Vec<Item>,
        times: (Timestamp, Timestamp),
    ) -> Self {
        // Within the limits above the sum of 10,000 lines cannot overflow.
        let total_cents = items
            .iter()
            .map(|item| i64::from(item.quantity) * item.unit_price_cents)
            .sum();
        let (created_at, updated_at) = times;
        Self {
            id,
            customer,
            currency,
            status,
            items,
            total_cents,
            contact: None,
            created_at,
            updated_at,
        }
    }
}

/// A whole number, which JSON may also write as `2.0` (JSON Schema 2020-12, section 4.2.3).
fn whole<'de, D: Deserializer<'de>, T: TryFrom<i64>>(deserializer: D) -> Result<T, D::Error> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Whole(i64),
        Real(f64),
    }
    let number = match Number::deserialize(deserializer) {
        Ok(Number::Whole(number)) => Some(number),
        Ok(Number::Real(number)) if number.fract() == 0.0 && number.abs() <= EXACT => {
            Some(number as i64)
        }
        _ => None,
    };
    number
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| serde::de::Error::custom("expected a whole number in the allowed range"))
}

/// Now, to the millisecond that storage keeps.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

/// Whether an order can be of that customer.
pub fn may_be_customer(text: &str) -> bool {
    is_printable(text, MAX_CUSTOMER)
}

fn is_printable(text: &str, max: usize) -> bool {
    !text.trim().is_empty() && text.chars().count() <= max && !text.chars().any(char::is_control)
}

impl PageRequest {
    /// The number of orders asked for, `default` where the request does not say.
    pub fn limit(&self, default: u32, max: u32) -> Result<u32, Rejected> {
        match self.limit {
            None => Ok(default),
            Some(limit) if (1..=max).contains(&limit) => Ok(limit),
            Some(_) => Err(Rejected(vec![FieldError {
                field: "/limit".into(),
                reason: format!("must be 1 to {max}"),
            }])),
        }
    }
}

impl OrderId {
    pub fn as_uuid(self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for OrderId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl fmt::Display for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for OrderId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Cancelled => "cancelled",
        }
    }
}

impl FromStr for Status {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Open, Self::Cancelled]
            .into_iter()
            .find(|s| s.as_str() == text)
            .ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// What is accepted is within every limit, and its total is the sum of its lines.
        #[test]
        fn accepted_orders_are_valid(
            customer in ".{0,70}",
            currency in "[A-Za-z]{2,4}",
            lines in proptest::collection::vec((".{0,40}", 0u32..20_000, -5i64..200_000_000), 0..6),
        ) {
            let items = lines.iter().map(|(sku, quantity, unit_price_cents)| ItemRequest {
                sku: sku.clone(), quantity: *quantity, unit_price_cents: *unit_price_cents,
            }).collect();
            let contact = None;
            match Order::place(OrderRequest { customer, currency, items, contact }, 5) {
                Ok(order) => {
                    prop_assert!((1..=5).contains(&order.items.len()));
                    prop_assert!(order.items.iter().all(|i| i.quantity >= 1 && i.unit_price_cents >= 0));
                    let total: i64 = lines.iter().map(|(_, q, p)| i64::from(*q) * p).sum();
                    prop_assert_eq!(order.total_cents, total);
                }
                Err(Rejected(wrong)) => prop_assert!(!wrong.is_empty()),
            }
        }
    }
}
