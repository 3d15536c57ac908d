//! Journals, the writers' lock and requests in the environment's namespace, so that any machine
//! with the rights can look at a rollout, go on with it, or give it up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::api::{self, Api, Kind};
use super::fence::{Fence, TOKEN};
use super::record;
use super::render::WORKLOAD;
use crate::config::Kubernetes as Settings;
use crate::owner;
use crate::rollout::desk::{Desk, Lock, Writer};
use crate::rollout::engine::{Request, State};
use crate::rollout::journal::{Journal, Keeper, Started};

/// A holder that has not renewed the lease for so long, as seen from here, has lost it. Clocks of
/// different machines are never compared.
const LEASE: Duration = Duration::from_secs(15);
const RENEW: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(500);
/// Characters of a journal from which on it is compacted. The API server takes one mebibyte.
const LIMIT: usize = 400 << 10;
/// How many ended rollouts' journals are kept.
const KEPT: usize = 10;

const ROLLOUT: &str = "xtask.dev/rollout";

pub struct ClusterDesk {
    pub api: Api,
    pub settings: Settings,
    pub environment: String,
    /// How long writing the journal is tried for.
    pub patience: Duration,
}

fn lease_kind() -> Kind {
    Kind::new("coordination.k8s.io/v1", "Lease")
}

fn journal_kind() -> Kind {
    Kind::new("v1", "ConfigMap")
}

impl ClusterDesk {
    fn lease_name(&self) -> String {
        record::name(&self.settings)
    }

    /// ConfigMaps are named in lower case.
    fn journal_name(&self, rollout: &str) -> String {
        format!("{}-rollout-{}", self.settings.name, rollout.to_lowercase())
    }

    /// Where the journal of that name is, for people.
    fn place(&self, name: &str) -> String {
        format!("ConfigMap {name} in namespace {}", self.api.namespace)
    }

    fn chunks(&self, writer: &Writer, name: &str) -> Chunks {
        Chunks {
            api: self.api.patient(self.patience),
            record: record::name(&self.settings),
            name: name.to_owned(),
            token: writer.token,
            next: 1,
            size: 0,
        }
    }

    /// The objects of all journals, oldest first.
    async fn journals(&self) -> Result<Vec<Value>> {
        let labels = format!("{ROLLOUT},{WORKLOAD}={}", self.settings.name);
        let mut journals = self.api.list(&journal_kind(), &labels).await?;
        journals.sort_by(|a, b| api::name(a).cmp(api::name(b)));
        Ok(journals)
    }

    fn parse(&self, object: &Value) -> Result<Option<Journal>> {
        Journal::parse(self.place(api::name(object)), text_of(object).as_bytes())
    }

    /// The newest token that any writer has left on the record.
    async fn last_token(&self) -> Result<u64> {
        let name = record::name(&self.settings);
        let record = self.api.get(&record::kind(), &name).await?;
        let token = record
            .as_ref()
            .and_then(|record| api::annotation(record, TOKEN));
        Ok(token.and_then(|token| token.parse().ok()).unwrap_or(0))
    }

    /// Takes the lease as it was seen, or says that somebody else was faster.
    async fn take(&self, seen: Option<&Value>, holder: &str) -> Result<Option<Value>> {
        let now = api::micro_time();
        let last = match seen {
            Some(seen) => token_of(seen),
            // Somebody has removed the lease; the tokens that were given are still in use.
            None => self.last_token().await?,
        };
        let spec = json!({
            "holderIdentity": holder,
            "leaseDurationSeconds": LEASE.as_secs(),
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": last + 1,
        });
        let taken = match seen {
            None => {
                let lease = json!({
                    "apiVersion": "coordination.k8s.io/v1",
                    "kind": "Lease",
                    "metadata": {
                        "name": self.lease_name(),
                        "labels": record::labels(&self.settings),
                    },
                    "spec": spec,
                });
                self.api.create(&lease).await
            }
            Some(seen) => {
                let change = json!({
                    "metadata": { "resourceVersion": api::resource_version(seen) },
                    "spec": spec,
                });
                self.api
                    .merge(&lease_kind(), &self.lease_name(), &change)
                    .await
            }
        };
        match taken {
            Ok(lease) => Ok(Some(lease)),
            Err(error) if api::is_conflict(&error) => {
                // Our own call may have been repeated after its answer was lost.
                let lease = self.api.get(&lease_kind(), &self.lease_name()).await?;
                Ok(lease.filter(|lease| holder_of(lease) == holder))
            }
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl Desk for ClusterDesk {
    async fn lock(&self) -> Result<Option<Writer>> {
        record::ensure(&self.api, &self.settings, &self.environment).await?;
        let identity = owner::this_process();
        let mut seen = self.api.get(&lease_kind(), &self.lease_name()).await?;
        let began = Instant::now();
        while let Some(lease) = &seen {
            let theirs = holder_of(lease).to_owned();
            match owner::lives(&theirs) {
                _ if theirs.is_empty() => break,
                Some(false) => break,
                Some(true) => return Ok(None),
                None => {}
            }
            // Of another machine: only a lease that nobody renews is free.
            tokio::time::sleep(POLL).await;
            let again = self.api.get(&lease_kind(), &self.lease_name()).await?;
            let unchanged = again.as_ref().is_some_and(|again| {
                holder_of(again) == theirs
                    && again["spec"]["renewTime"] == lease["spec"]["renewTime"]
            });
            if !unchanged
                && again
                    .as_ref()
                    .is_some_and(|again| !holder_of(again).is_empty())
            {
                return Ok(None);
            }
            if !unchanged {
                seen = again;
            } else if began.elapsed() > LEASE {
                break;
            }
        }
        let Some(lease) = self.take(seen.as_ref(), &identity).await? else {
            return Ok(None);
        };
        let token = token_of(&lease);
        let renewal = Renewal {
            api: self.api.impatient(),
            name: self.lease_name(),
            holder: identity,
        };
        let renewal = Arc::new(renewal);
        let task = tokio::spawn(Arc::clone(&renewal).run());
        Ok(Some(Writer::new(
            token,
            Box::new(LeaseLock { renewal, task }),
        )))
    }

    async fn is_busy(&self) -> Result<bool> {
        let Some(lease) = self.api.get(&lease_kind(), &self.lease_name()).await? else {
            return Ok(false);
        };
        let holder = holder_of(&lease);
        if holder.is_empty() || owner::lives(holder) == Some(false) {
            return Ok(false);
        }
        // For people: here the clocks of two machines are good enough.
        let renewed = lease["spec"]["renewTime"].as_str();
        let renewed: Option<jiff::Timestamp> = renewed.and_then(|at| at.parse().ok());
        Ok(renewed.is_some_and(|renewed| {
            jiff::Timestamp::now().as_second() - renewed.as_second() <= LEASE.as_secs() as i64
        }))
    }

    async fn create(&self, writer: &Writer, started: Started, state: State) -> Result<Journal> {
        let rollout = started.plan.rollout.clone();
        let name = self.journal_name(&rollout);
        let mut labels = record::labels(&self.settings);
        labels[ROLLOUT] = json!(rollout);
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": name, "labels": labels },
            "data": {},
        });
        self.api.create(&object).await.or_else(|error| {
            // Repeated after its answer was lost; the name is this rollout's alone.
            if api::is_there_already(&error) {
                Ok(object)
            } else {
                Err(error)
            }
        })?;
        let chunks = Box::new(self.chunks(writer, &name));
        let journal = Journal::begin(self.place(&name), chunks, started, state).await?;
        let journals = self.journals().await?;
        let surplus = journals.len().saturating_sub(KEPT + 1);
        for old in &journals[..surplus] {
            self.api.delete(old).await?;
        }
        Ok(journal)
    }

    async fn newest(&self) -> Result<Option<Journal>> {
        for object in self.journals().await?.iter().rev() {
            if let Some(journal) = self.parse(object)? {
                return Ok(Some(journal));
            }
        }
        // That there is no such place must not be taken for peace in it.
        record::read(&self.api, &self.settings, &self.environment).await?;
        Ok(None)
    }

    async fn read(&self, rollout: &str) -> Result<Journal> {
        let name = self.journal_name(rollout);
        let object = self.api.get(&journal_kind(), &name).await?;
        let gone = || format!("the journal is gone: {}", self.place(&name));
        self.parse(&object.with_context(gone)?)?.with_context(gone)
    }

    async fn for_writing(&self, writer: &Writer, journal: Journal) -> Result<Journal> {
        let rollout = &journal.plan().rollout;
        let mut chunks = self.chunks(writer, &self.journal_name(rollout));
        chunks.claim().await?;
        Ok(self.read(rollout).await?.kept_by(Box::new(chunks)))
    }

    async fn ask(&self, request: Request) -> Result<()> {
        record::ask(&self.api, &self.settings, &self.environment, request).await
    }

    async fn request(&self) -> Result<Option<Request>> {
        let read = record::read(&self.api, &self.settings, &self.environment).await?;
        Ok(read.1)
    }
}

fn holder_of(lease: &Value) -> &str {
    lease["spec"]["holderIdentity"].as_str().unwrap_or_default()
}

/// Each taking of the lease raises this number: it is the fencing token.
fn token_of(lease: &Value) -> u64 {
    lease["spec"]["leaseTransitions"].as_u64().unwrap_or(0)
}

struct Renewal {
    api: Api,
    name: String,
    holder: String,
}

impl Renewal {
    /// Renews the lease until it is another's. What fails is tried again: that somebody else has
    /// taken over is seen by the fencing of every write, not here.
    async fn run(self: Arc<Self>) {
        loop {
            tokio::time::sleep(RENEW).await;
            let Ok(Some(lease)) = self.api.get(&lease_kind(), &self.name).await else {
                continue;
            };
            if holder_of(&lease) != self.holder {
                return;
            }
            let change = json!({
                "metadata": { "resourceVersion": api::resource_version(&lease) },
                "spec": { "renewTime": api::micro_time() },
            });
            // A failure is repeated in a moment.
            let _ = self.api.merge(&lease_kind(), &self.name, &change).await;
        }
    }

    async fn give_back(&self) -> Result<()> {
        let Some(lease) = self.api.get(&lease_kind(), &self.name).await? else {
            return Ok(());
        };
        if holder_of(&lease) != self.holder {
            return Ok(());
        }
        let change = json!({
            "metadata": { "resourceVersion": api::resource_version(&lease) },
            "spec": { "holderIdentity": "" },
        });
        self.api
            .merge(&lease_kind(), &self.name, &change)
            .await
            .map(|_| ())
    }
}

struct LeaseLock {
    renewal: Arc<Renewal>,
    task: tokio::task::JoinHandle<()>,
}

#[async_trait]
impl Lock for LeaseLock {
    async fn release(self: Box<Self>) {
        self.task.abort();
        // Where that fails, it runs out by itself.
        let _ = self.renewal.give_back().await;
    }
}

impl Drop for LeaseLock {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A journal as numbered pieces of a ConfigMap's data, so that an entry is a small write.
struct Chunks {
    api: Api,
    record: String,
    name: String,
    token: u64,
    next: u64,
    size: usize,
}

fn text_of(object: &Value) -> String {
    let mut pieces: Vec<(&String, &str)> = object["data"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key, value.as_str()?)))
        .collect();
    pieces.sort();
    pieces.into_iter().map(|(_, text)| text).collect()
}

impl Chunks {
    fn key(&self) -> String {
        format!("{:08}", self.next)
    }

    fn fence(&self) -> Fence<'_> {
        Fence {
            api: &self.api,
            token: self.token,
            record: self.record.clone(),
        }
    }

    /// Takes the journal for this writer; from then on an older one's lines are refused.
    async fn claim(&mut self) -> Result<()> {
        self.fence().claim(&journal_kind(), &self.name).await?;
        let object = self.api.get(&journal_kind(), &self.name).await?;
        let object = object.with_context(|| format!("the ConfigMap {} is gone", self.name))?;
        let keys = object["data"].as_object().map(|data| data.keys());
        let last = keys.and_then(|keys| keys.max()?.parse::<u64>().ok());
        self.next = last.unwrap_or(0) + 1;
        self.size = text_of(&object).len();
        Ok(())
    }
}

#[async_trait]
impl Keeper for Chunks {
    async fn append(&mut self, text: &str) -> Result<()> {
        let key = self.key();
        // The answer to the same write may have been lost.
        let add = |object: &Value| {
            (object["data"][&key] != text).then(|| json!({ "data": { &key: text } }))
        };
        self.fence()
            .change(&journal_kind(), &self.name, add)
            .await?;
        self.next += 1;
        self.size += text.len();
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.size > LIMIT
    }

    async fn replace(&mut self, text: &str) -> Result<()> {
        let key = self.key();
        let replace = |object: &Value| {
            let mut data = json!({ &key: text });
            let old = object["data"].as_object().into_iter().flatten();
            for (old, _) in old.filter(|(old, _)| **old != key) {
                data[old] = Value::Null;
            }
            Some(json!({ "data": data }))
        };
        self.fence()
            .change(&journal_kind(), &self.name, replace)
            .await?;
        self.next += 1;
        self.size = text.len();
        Ok(())
    }
}
