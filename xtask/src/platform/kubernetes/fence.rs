//! Writes that only the newest writer can make.
//!
//! The API server knows no fencing tokens. So each object that a rollout changes carries the newest
//! writer's in an annotation, and each write names the version of the object on which it found none
//! newer than its own: once a later writer has put its token there, that version is gone, and the
//! write is refused.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::api::{self, Api, Kind};
use super::record;
use super::render::WORKLOAD;
use crate::platform::StaleWriter;

pub const TOKEN: &str = "xtask.dev/token";
/// How often a write is repeated because somebody else has changed the object meanwhile. Controllers
/// write statuses all the time; nobody writes faster than this for long.
const ATTEMPTS: u32 = 20;

pub struct Fence<'a> {
    pub api: &'a Api,
    pub token: u64,
    /// The environment's record, which tells who the newest writer is where an object does not.
    pub record: String,
}

impl Fence<'_> {
    /// Makes an object as `wanted` says. Where somebody else owns one of its fields, this is refused,
    /// and the refusal names the owner and the field.
    pub async fn apply(&self, wanted: &Value) -> Result<Value> {
        self.apply_by(wanted, false).await
    }

    /// The same, with the fields taken over from whoever owns them.
    pub async fn take_over(&self, wanted: &Value) -> Result<Value> {
        self.apply_by(wanted, true).await
    }

    async fn apply_by(&self, wanted: &Value, force: bool) -> Result<Value> {
        let kind = Kind::of(wanted)?;
        for _ in 0..ATTEMPTS {
            match self.apply_once(&kind, wanted.clone(), force).await {
                Err(error) if api::is_race(&error) => {}
                applied => return applied,
            }
        }
        bail!("{} {} changes all the time", kind.kind, api::name(wanted))
    }

    async fn apply_once(&self, kind: &Kind, mut wanted: Value, force: bool) -> Result<Value> {
        match self.api.get(kind, api::name(&wanted)).await? {
            Some(current) => {
                let current = self.stamp(kind, current).await?;
                self.pin(&mut wanted, &current);
            }
            None => self.claim(&record::kind(), &self.record).await?,
        }
        wanted["metadata"]["annotations"][TOKEN] = json!(self.token.to_string());
        self.api.apply(&wanted, force, false).await
    }

    /// Changes the object that is there by what `change` makes of it; `None` changes nothing.
    pub async fn change(
        &self,
        kind: &Kind,
        name: &str,
        change: impl Fn(&Value) -> Option<Value>,
    ) -> Result<()> {
        for _ in 0..ATTEMPTS {
            match self.change_once(kind, name, &change).await {
                Err(error) if api::is_race(&error) => {}
                changed => return changed,
            }
        }
        bail!("{} {name} changes all the time", kind.kind)
    }

    async fn change_once(
        &self,
        kind: &Kind,
        name: &str,
        change: impl Fn(&Value) -> Option<Value>,
    ) -> Result<()> {
        let Some(current) = self.api.get(kind, name).await? else {
            bail!("{} {name} is gone", kind.kind);
        };
        let current = self.stamp(kind, current).await?;
        let Some(mut change) = change(&current) else {
            return Ok(());
        };
        self.pin(&mut change, &current);
        self.api.merge(kind, name, &change).await.map(|_| ())
    }

    /// Removes an object, unless a newer writer has it.
    pub async fn remove(&self, kind: &Kind, name: &str) -> Result<()> {
        self.remove_where(kind, name, |_| true).await
    }

    /// The same of a workload's: another's may have the same name.
    pub async fn remove_of(&self, workload: &str, kind: &Kind, name: &str) -> Result<()> {
        let is_its = |there: &Value| api::label(there, WORKLOAD) == Some(workload);
        self.remove_where(kind, name, is_its).await
    }

    /// The same, where what is there is what is meant.
    pub async fn remove_where(
        &self,
        kind: &Kind,
        name: &str,
        is_meant: impl Fn(&Value) -> bool,
    ) -> Result<()> {
        for _ in 0..ATTEMPTS {
            match self.remove_once(kind, name, &is_meant).await {
                Err(error) if api::is_race(&error) => {}
                removed => return removed,
            }
        }
        bail!("{} {name} changes all the time", kind.kind)
    }

    async fn remove_once(
        &self,
        kind: &Kind,
        name: &str,
        is_meant: impl Fn(&Value) -> bool,
    ) -> Result<()> {
        match self.api.get(kind, name).await?.filter(is_meant) {
            Some(current) => {
                let current = self.stamp(kind, current).await?;
                self.api.delete(&current).await
            }
            None => Ok(()),
        }
    }

    /// Takes an object for this writer, where there is one.
    pub async fn claim(&self, kind: &Kind, name: &str) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let Some(current) = self.api.get(kind, name).await? else {
                return Ok(());
            };
            match self.stamp(kind, current).await {
                Err(error) if api::is_race(&error) => {}
                stamped => return stamped.map(|_| ()),
            }
        }
        bail!("{} {name} changes all the time", kind.kind)
    }

    /// Puts our token on the object, unless it is there.
    async fn stamp(&self, kind: &Kind, current: Value) -> Result<Value> {
        let theirs = api::annotation(&current, TOKEN).and_then(|token| token.parse().ok());
        let theirs: u64 = theirs.unwrap_or(0);
        if theirs > self.token {
            return Err(StaleWriter.into());
        }
        if theirs == self.token {
            return Ok(current);
        }
        let mut change = json!({
            "metadata": { "annotations": { TOKEN: self.token.to_string() } }
        });
        self.pin(&mut change, &current);
        self.api.merge(kind, api::name(&current), &change).await
    }

    /// Makes a write one on this very version of the object.
    fn pin(&self, wanted: &mut Value, current: &Value) {
        for field in ["resourceVersion", "uid"] {
            wanted["metadata"][field] = current["metadata"][field].clone();
        }
    }
}
