//! Journals, the writers' lock and requests in the environment's namespace, so that any machine
//! with the rights can look at a rollout, go on with it, or give it up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::api::{self, Api, Kind};
use super::fence::TOKEN;
use super::record;
use super::render::WORKLOAD;
use crate::config::Kubernetes as Settings;
use crate::platform::StaleWriter;
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

    fn place(&self, rollout: &str) -> String {
        format!(
            "ConfigMap {} in namespace {}",
            self.journal_name(rollout),
            self.api.namespace
        )
    }

    /// The objects of all journals, oldest first.
    async fn journals(&self) -> Result<Vec<Value>> {
        let labels = format!("{ROLLOUT},{WORKLOAD}={}", self.settings.name);
        let mut journals = self.api.list(&journal_kind(), &labels).await?;
        journals.sort_by(|a, b| api::name(a).cmp(api::name(b)));
        Ok(journals)
    }

    fn parse(&self, object: &Value) -> Result<Option<Journal>> {
        let place = format!(
            "ConfigMap {} in namespace {}",
            api::name(object),
            self.api.namespace
        );
        Journal::parse(place, text_of(object).as_bytes())
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
        let now = jiff::Timestamp::now();
        let last = match seen {
            Some(seen) => token_of(seen),
            // Somebody has removed the lease; the tokens that were given are still in use.
            None => self.last_token().await?,
        };
        let spec = json!({
            "holderIdentity": holder,
            "leaseDurationSeconds": LEASE.as_secs(),
            // RFC 3339 with microseconds, as the API server wants it.
            "acquireTime": now.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string(),
            "renewTime": now.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string(),
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
        let holder = Holder::me();
        let identity = holder.to_string();
        let mut seen = self.api.get(&lease_kind(), &self.lease_name()).await?;
        let began = Instant::now();
        while let Some(lease) = &seen {
            let theirs = holder_of(lease).to_owned();
            if theirs.is_empty() || Holder::is_dead(&theirs) {
                break;
            }
            if Holder::is_alive(&theirs) {
                return Ok(None);
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
        if holder.is_empty() || Holder::is_dead(holder) {
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
        let mut labels = record::labels(&self.settings);
        labels[ROLLOUT] = json!(rollout);
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": self.journal_name(&rollout), "labels": labels },
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
        let chunks = Chunks {
            api: self.api.patient(self.patience),
            name: self.journal_name(&rollout),
            token: writer.token,
            next: 1,
            size: 0,
        };
        let place = self.place(&rollout);
        let journal = Journal::begin(place, Box::new(chunks), started, state).await?;
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
        Ok(None)
    }

    async fn read(&self, rollout: &str) -> Result<Journal> {
        let object = self
            .api
            .get(&journal_kind(), &self.journal_name(rollout))
            .await?;
        let gone = || format!("the journal is gone: {}", self.place(rollout));
        self.parse(&object.with_context(gone)?)?.with_context(gone)
    }

    async fn for_writing(&self, writer: &Writer, journal: Journal) -> Result<Journal> {
        let rollout = journal.plan().rollout.clone();
        let name = self.journal_name(&rollout);
        let mut chunks = Chunks {
            api: self.api.patient(self.patience),
            name: name.clone(),
            token: writer.token,
            next: 1,
            size: 0,
        };
        let object = chunks.claim().await?;
        let journal = self.parse(&object)?;
        let journal =
            journal.with_context(|| format!("the journal is gone: {}", self.place(&rollout)))?;
        Ok(journal.kept_by(Box::new(chunks)))
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

/// A process, by its machine since it was started, its number, and when it was started: whether it
/// still lives can be told on its own machine, without waiting for a lease to run out.
struct Holder {
    machine: String,
    pid: u32,
    started: String,
}

impl Holder {
    fn me() -> Self {
        let pid = std::process::id();
        Self {
            machine: machine(),
            pid,
            started: started(pid).unwrap_or_default(),
        }
    }

    /// What is known of a holder on this machine.
    fn here(identity: &str) -> Option<bool> {
        let mut parts = identity.rsplitn(3, '/');
        let (start, pid, on) = (parts.next()?, parts.next()?, parts.next()?);
        let pid: u32 = pid.parse().ok()?;
        (!start.is_empty() && on == machine()).then(|| started(pid).as_deref() == Some(start))
    }

    fn is_dead(identity: &str) -> bool {
        Self::here(identity) == Some(false)
    }

    fn is_alive(identity: &str) -> bool {
        Self::here(identity) == Some(true)
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.machine, self.pid, self.started)
    }
}

/// The machine's name, the number of its present boot, and whose numbers of processes are meant.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    format!("{name}-{}", read("/proc/sys/kernel/random/boot_id").trim())
}

/// Field 22 of `/proc/PID/stat`.
fn started(pid: u32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18).map(str::to_owned)
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
            let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ");
            let change = json!({
                "metadata": { "resourceVersion": api::resource_version(&lease) },
                "spec": { "renewTime": now.to_string() },
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

    async fn current(&self) -> Result<Value> {
        let object = self.api.get(&journal_kind(), &self.name).await?;
        let object = object.with_context(|| format!("the ConfigMap {} is gone", self.name))?;
        let theirs = api::annotation(&object, TOKEN).and_then(|token| token.parse().ok());
        if theirs.unwrap_or(0) > self.token {
            return Err(StaleWriter.into());
        }
        Ok(object)
    }

    /// Takes the journal for this writer; from then on an older one's lines are refused.
    async fn claim(&mut self) -> Result<Value> {
        for _ in 0..20 {
            let object = self.current().await?;
            let change = json!({ "metadata": {
                "resourceVersion": api::resource_version(&object),
                "annotations": { TOKEN: self.token.to_string() },
            } });
            match self.api.merge(&journal_kind(), &self.name, &change).await {
                Ok(object) => {
                    let last = object["data"]
                        .as_object()
                        .and_then(|data| data.keys().max().cloned());
                    self.next = last.and_then(|key| key.parse::<u64>().ok()).unwrap_or(0) + 1;
                    self.size = text_of(&object).len();
                    return Ok(object);
                }
                Err(error) if api::is_conflict(&error) => {}
                Err(error) => return Err(error),
            }
        }
        bail!("the ConfigMap {} changes all the time", self.name)
    }
}

#[async_trait]
impl Keeper for Chunks {
    async fn append(&mut self, text: &str) -> Result<()> {
        let key = self.key();
        for _ in 0..20 {
            let object = self.current().await?;
            // The answer to the same write may have been lost.
            if object["data"][&key] != text {
                let change = json!({
                    "metadata": {
                        "resourceVersion": api::resource_version(&object),
                        "annotations": { TOKEN: self.token.to_string() },
                    },
                    "data": { &key: text },
                });
                match self.api.merge(&journal_kind(), &self.name, &change).await {
                    Ok(_) => {}
                    Err(error) if api::is_conflict(&error) => continue,
                    Err(error) => return Err(error),
                }
            }
            self.next += 1;
            self.size += text.len();
            return Ok(());
        }
        bail!("the ConfigMap {} changes all the time", self.name)
    }

    fn is_full(&self) -> bool {
        self.size > LIMIT
    }

    async fn replace(&mut self, text: &str) -> Result<()> {
        let key = self.key();
        for _ in 0..20 {
            let object = self.current().await?;
            let mut data = json!({ &key: text });
            for old in object["data"]
                .as_object()
                .into_iter()
                .flat_map(|data| data.keys())
            {
                if *old != key {
                    data[old] = Value::Null;
                }
            }
            let change = json!({
                "metadata": {
                    "resourceVersion": api::resource_version(&object),
                    "annotations": { TOKEN: self.token.to_string() },
                },
                "data": data,
            });
            match self.api.merge(&journal_kind(), &self.name, &change).await {
                Ok(_) => {
                    self.next += 1;
                    self.size = text.len();
                    return Ok(());
                }
                Err(error) if api::is_conflict(&error) => {}
                Err(error) => return Err(error),
            }
        }
        bail!("the ConfigMap {} changes all the time", self.name)
    }
}
