//! The audit log: what was done to orders and by whom, each entry chained to the one before by its hash
//! (as in Haber and Stornetta, "How to time-stamp a digital document", 1991). Whoever changes, removes
//! or inserts an entry has to change all after it, and the last hash, which is kept elsewhere, tells.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::adapters::storage::{Storage, StorageError};
use crate::app::App;
use crate::duty;
use crate::hex::hex;

/// The lock's name.
pub const AUDIT: &str = "audit";
/// How many entries are looked at at a time.
const BATCH: u32 = 1000;

/// An entry as storage keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// From 1, without gaps.
    pub seq: i64,
    /// The event as it was written: JSON.
    pub event: String,
    pub hash: Vec<u8>,
}

/// What a log is like.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// So many entries, and the hash of the last one.
    Whole { entries: i64, last: String },
    /// The first entry that is not what was written, and why.
    Broken { seq: i64, why: String },
}

/// The hash of an entry behind another one; before the first there are no bytes.
pub fn hash(before: &[u8], seq: i64, event: &str) -> Vec<u8> {
    let mut digest = Sha256::new();
    digest.update(before);
    digest.update(seq.to_be_bytes());
    digest.update(event);
    digest.finalize().to_vec()
}

/// Chains what was done, until it is cancelled, which it may be at any point.
pub async fn run(app: Arc<App>) {
    duty::run(app, AUDIT, |app, fence| async move {
        Ok(app.storage().audit(BATCH, fence).await?)
    })
    .await;
}

/// Follows the chain from its beginning. `anchor` is a hash that an earlier look has found to be the
/// last one: where it is in no entry, the log was cut off, or written anew.
pub async fn verify(storage: &dyn Storage, anchor: Option<&str>) -> Result<Verdict, StorageError> {
    let (mut seq, mut last) = (0, Vec::new());
    // Of an empty log the last hash is empty.
    let anchor = anchor.filter(|anchor| !anchor.is_empty());
    let mut is_anchored = anchor.is_none();
    loop {
        let entries = storage.audited(seq, BATCH).await?;
        if entries.is_empty() {
            break;
        }
        for entry in entries {
            let broken = |why: &str| {
                let (seq, why) = (entry.seq, why.to_owned());
                Ok(Verdict::Broken { seq, why })
            };
            if entry.seq != seq + 1 {
                return broken(&format!("the entry before it has the number {seq}"));
            }
            if hash(&last, entry.seq, &entry.event) != entry.hash {
                return broken("its hash is not that of its content and the entries before it");
            }
            is_anchored |= anchor == Some(hex(&entry.hash).as_str());
            (seq, last) = (entry.seq, entry.hash);
        }
    }
    if !is_anchored {
        let why = "no entry has the hash that was the last one before".to_owned();
        return Ok(Verdict::Broken { seq, why });
    }
    let last = hex(&last);
    Ok(Verdict::Whole { entries: seq, last })
}
