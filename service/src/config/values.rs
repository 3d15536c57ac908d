//! Values of settings, which cannot be wrong once they are read. Those that nobody may see show nothing.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer, Serialize};

/// A scheme, host and perhaps port (RFC 6454), as browsers send it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Origin(pub String);

/// From 0, none, to 1, all.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Share(pub f64);

/// What nobody may see: neither logs, errors nor dumps show it.
#[derive(Clone, Deserialize)]
pub struct Secret(SecretString);

impl Secret {
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Only whether there is one: two configurations that differ in it have the same hash.
impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("(secret)")
    }
}

/// A broker's or a cache's address. It may hold a password, which is never shown.
#[derive(Clone, Deserialize)]
pub struct ServerUrl(pub String);

/// A time limit: more than zero, at most an hour; written `250ms`, `5s`, `2m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeout(pub Duration);

/// A log filter in the syntax of `tracing_subscriber::filter::Targets`.
#[derive(Debug, Clone, Serialize)]
pub struct LogFilter(pub String);

/// The database's address; its scheme chooses the storage adapter. It may hold a password, which
/// is never shown.
#[derive(Clone)]
pub struct DatabaseUrl(pub String);

/// The databases that there is an adapter for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Sqlite,
    Postgres,
}

impl<'de> Deserialize<'de> for Timeout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let duration = jiff::SignedDuration::from_str(&text)
            .ok()
            .and_then(|duration| Duration::try_from(duration).ok())
            .filter(|duration| !duration.is_zero() && *duration <= Duration::from_secs(3600));
        duration.map(Timeout).ok_or_else(|| {
            serde::de::Error::custom(
                "expected a time of more than 0 and at most 1h, such as \"5s\"",
            )
        })
    }
}

impl Serialize for Timeout {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}ms", self.0.as_millis()))
    }
}

impl<'de> Deserialize<'de> for Origin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let host = ["https://", "http://"]
            .iter()
            .find_map(|s| text.strip_prefix(s));
        let is_host = |host: &str| {
            let is_good =
                |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.:[]".contains(c);
            !host.is_empty() && host.chars().all(is_good)
        };
        match host {
            Some(host) if is_host(host) => Ok(Self(text)),
            _ => Err(serde::de::Error::custom(
                "expected an origin such as \"https://shop.example\", without a path",
            )),
        }
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match f64::deserialize(deserializer)? {
            share if (0.0..=1.0).contains(&share) => Ok(Self(share)),
            _ => Err(serde::de::Error::custom("expected a share from 0.0 to 1.0")),
        }
    }
}

impl FromStr for LogFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<tracing_subscriber::filter::Targets>() {
            Ok(_) => Ok(Self(text.to_owned())),
            Err(error) => Err(format!("not a log filter: {error}")),
        }
    }
}

impl<'de> Deserialize<'de> for LogFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for DatabaseUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match scheme(&text) {
            Some(_) => Ok(DatabaseUrl(text)),
            None => Err(serde::de::Error::custom(
                "expected an address that starts with \"sqlite:\" or \"postgres:\"",
            )),
        }
    }
}

impl DatabaseUrl {
    pub fn scheme(&self) -> Scheme {
        scheme(&self.0).unwrap_or(Scheme::Sqlite)
    }
}

fn scheme(url: &str) -> Option<Scheme> {
    match url.split_once(':')?.0 {
        "sqlite" => Some(Scheme::Sqlite),
        "postgres" | "postgresql" => Some(Scheme::Postgres),
        _ => None,
    }
}

/// Addresses are shown and hashed without their passwords: a hash must not tell whether a guess at
/// one is right.
macro_rules! without_its_password {
    ($($address:ty),*) => {$(
        impl fmt::Display for $address {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&without_password(&self.0))
            }
        }

        impl fmt::Debug for $address {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $address {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )*};
}
without_its_password!(ServerUrl, DatabaseUrl);

/// `scheme://user:password@host/…?password=…` with stars for the passwords.
pub fn without_password(url: &str) -> String {
    let parts = url.split_once("://").and_then(|(scheme, rest)| {
        let (user, place) = rest.rsplit_once('@')?;
        let (user, _) = user.split_once(':')?;
        Some(format!("{scheme}://{user}:***@{place}"))
    });
    let url = parts.unwrap_or_else(|| url.to_owned());
    let mut words = url.split("password=");
    let mut masked = words.next().unwrap_or_default().to_owned();
    for rest in words {
        let end = rest.find(['&', '"']).unwrap_or(rest.len());
        masked.push_str("password=***");
        masked.push_str(&rest[end..]);
    }
    masked
}
