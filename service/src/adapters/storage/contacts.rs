//! The column `orders.contact`, which nobody reads without the service's keys.

use uuid::Uuid;

use super::StorageError;
use crate::domain::orders::{Contact, Order};
use crate::keyring::{Keyring, KeyringError};

pub(super) const AFTER: &str = "SELECT id, contact FROM orders
     WHERE contact IS NOT NULL AND id > $1 ORDER BY id LIMIT $2";
pub(super) const CHANGE: &str = "UPDATE orders SET contact = $1 WHERE id = $2 AND contact = $3";

/// An order's contact as it is kept.
pub(super) fn encrypted(
    keyring: Option<&Keyring>,
    order: &Order,
) -> Result<Option<Vec<u8>>, StorageError> {
    let Some(Contact(contact)) = &order.contact else {
        return Ok(None);
    };
    let place = place(order.id.as_uuid());
    let encrypted = keys(keyring)?.encrypt(&place, contact.as_bytes());
    encrypted.map(Some).map_err(failed)
}

/// The contact that is kept for an order.
pub(super) fn decrypted(
    keyring: Option<&Keyring>,
    order: Uuid,
    encrypted: &[u8],
) -> Result<Contact, StorageError> {
    let text = keys(keyring)?.decrypt(&place(order), encrypted);
    let text = String::from_utf8(text.map_err(failed)?);
    text.map(Contact)
        .map_err(|_| failed(KeyringError::NotAuthentic))
}

/// What is kept, by the first key; `None` where it is so already.
pub(super) fn anew(
    keyring: Option<&Keyring>,
    order: Uuid,
    encrypted: &[u8],
) -> Result<Option<Vec<u8>>, StorageError> {
    let keys = keys(keyring)?;
    if keys.is_current(encrypted) {
        return Ok(None);
    }
    let place = place(order);
    let text = keys.decrypt(&place, encrypted).map_err(failed)?;
    keys.encrypt(&place, &text).map(Some).map_err(failed)
}

fn place(order: Uuid) -> String {
    format!("orders.contact of {order}")
}

fn keys(keyring: Option<&Keyring>) -> Result<&Keyring, StorageError> {
    let missing = || StorageError::Failed("there are contacts, and no encryption_keys".to_owned());
    keyring.ok_or_else(missing)
}

fn failed(error: KeyringError) -> StorageError {
    StorageError::Failed(format!("a contact: {error}"))
}
