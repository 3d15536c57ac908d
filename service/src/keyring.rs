//! Encryption of what must not be read by whoever reads a database, its copies or a cache:
//! AES-256-GCM (NIST SP 800-38D) with random nonces.
//!
//! The first key encrypts. The others are for what was encrypted before, until `service rotate-keys`
//! has encrypted it anew.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

const MAX_ID: usize = 32;

/// Some keys, of which the first encrypts.
#[derive(Clone)]
pub struct Keyring(Arc<[Key]>);

struct Key {
    id: String,
    key: RandomizedNonceKey,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyringError {
    #[error("it is encrypted by {0:?}, which is not among the keys")]
    UnknownKey(String),
    #[error("it was changed, moved, or encrypted by another key of the same name")]
    NotAuthentic,
    #[error("it could not be encrypted")]
    Failed,
}

impl Keyring {
    /// The length of the key's name, its name, a nonce, and the encrypted text with its tag. It can
    /// only be decrypted in the same place.
    pub fn encrypt(&self, place: &str, text: &[u8]) -> Result<Vec<u8>, KeyringError> {
        let key = self.0.first().ok_or(KeyringError::Failed)?;
        let mut encrypted = text.to_vec();
        let nonce = key
            .key
            .seal_in_place_append_tag(Aad::from(place), &mut encrypted)
            .map_err(|_| KeyringError::Failed)?;
        let mut all = key.prefix();
        all.extend(nonce.as_ref());
        all.extend(encrypted);
        Ok(all)
    }

    pub fn decrypt(&self, place: &str, encrypted: &[u8]) -> Result<Vec<u8>, KeyringError> {
        let (length, rest) = encrypted.split_first().ok_or(KeyringError::NotAuthentic)?;
        let (id, rest) = rest
            .split_at_checked(usize::from(*length))
            .ok_or(KeyringError::NotAuthentic)?;
        let key = self.0.iter().find(|key| key.id.as_bytes() == id);
        let key = key.ok_or_else(|| {
            let id = String::from_utf8_lossy(id);
            KeyringError::UnknownKey(id.chars().take(MAX_ID).collect())
        })?;
        let (nonce, text) = rest
            .split_first_chunk::<NONCE_LEN>()
            .ok_or(KeyringError::NotAuthentic)?;
        let mut text = text.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let text = key.key.open_in_place(nonce, Aad::from(place), &mut text);
        text.map(|text| text.to_vec())
            .map_err(|_| KeyringError::NotAuthentic)
    }

    /// Whether the first key has encrypted it.
    pub fn is_current(&self, encrypted: &[u8]) -> bool {
        let first = self.0.first();
        first.is_some_and(|first| encrypted.starts_with(&first.prefix()))
    }
}

impl Key {
    fn prefix(&self) -> Vec<u8> {
        // Names are short.
        let length = u8::try_from(self.id.len()).unwrap_or(u8::MAX);
        [&[length], self.id.as_bytes()].concat()
    }
}

/// `NAME:KEY`, several with commas between them, where a key is 32 bytes in base64.
impl FromStr for Keyring {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let keys = text.split(',').map(|text| {
            let (id, key) = text.trim().split_once(':').unwrap_or_default();
            let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if id.is_empty() || id.len() > MAX_ID || !id.chars().all(is_name) {
                return Err("expected NAME:KEY, several with commas between them".to_owned());
            }
            let key = STANDARD.decode(key).ok();
            let key = key.and_then(|key| RandomizedNonceKey::new(&AES_256_GCM, &key).ok());
            let key = key.ok_or_else(|| {
                format!(
                    "the key {id} is not 32 bytes in base64, as `openssl rand -base64 32` makes them"
                )
            })?;
            let id = id.to_owned();
            Ok(Key { id, key })
        });
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        let is_twice = |key: &Key| keys.iter().filter(|other| other.id == key.id).count() > 1;
        match keys.iter().find(|key| is_twice(key)) {
            Some(key) => Err(format!("there are two keys of the name {}", key.id)),
            None => Ok(Self(keys.into())),
        }
    }
}

impl<'de> Deserialize<'de> for Keyring {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Only that there is one: two configurations that differ in it have the same hash.
impl Serialize for Keyring {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("(secret)")
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "old:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    const NEW: &str = "new:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

    fn keyring(keys: &[&str]) -> Keyring {
        keys.join(",").parse().unwrap()
    }

    #[test]
    fn old_keys_decrypt_and_the_first_encrypts() {
        let before = keyring(&[OLD]);
        let both = keyring(&[NEW, OLD]);
        let encrypted = before.encrypt("a", b"ada").unwrap();
        assert!(before.is_current(&encrypted) && !both.is_current(&encrypted));
        assert_eq!(both.decrypt("a", &encrypted).unwrap(), b"ada");
        let anew = both.encrypt("a", b"ada").unwrap();
        assert!(both.is_current(&anew));
        let unknown = KeyringError::UnknownKey("new".to_owned());
        assert_eq!(before.decrypt("a", &anew), Err(unknown));
        // The same text twice looks different.
        assert_ne!(both.encrypt("a", b"ada").unwrap(), anew);
    }

    #[test]
    fn what_was_changed_or_moved_is_not_believed() {
        let keyring = keyring(&[OLD]);
        let encrypted = keyring.encrypt("a", b"ada").unwrap();
        let refused = Err(KeyringError::NotAuthentic);
        assert_eq!(keyring.decrypt("b", &encrypted), refused);
        for at in 4..encrypted.len() {
            let mut changed = encrypted.clone();
            changed[at] ^= 1;
            assert_eq!(keyring.decrypt("a", &changed), refused, "byte {at}");
            assert_eq!(
                keyring.decrypt("a", &encrypted[..at]),
                refused,
                "{at} bytes"
            );
        }
        assert_eq!(keyring.decrypt("a", &[]), refused);
        let of_another = format!("old:{}", NEW.split_once(':').unwrap().1);
        let other: Keyring = of_another.parse().unwrap();
        assert_eq!(other.decrypt("a", &encrypted), refused);
    }

    #[test]
    fn wrong_keys_are_explained_and_not_shown() {
        let twice = format!("{OLD},{OLD}");
        for (text, wanted) in [
            ("", "expected NAME:KEY"),
            ("c2VjcmV0", "expected NAME:KEY"),
            ("a b:c2VjcmV0", "expected NAME:KEY"),
            ("a:c2VjcmV0", "the key a is not 32 bytes"),
            ("a:not base64", "the key a is not 32 bytes"),
            (&twice, "two keys of the name old"),
        ] {
            let why = text.parse::<Keyring>().unwrap_err();
            assert!(why.contains(wanted), "{text:?}: {why}");
            assert!(!why.contains("c2VjcmV0"), "{why}");
        }
    }
}
