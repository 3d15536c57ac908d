//! What an environment has on record in its cluster: its stable release, how rollouts ended, what
//! people asked for, and each release whole, so that any machine can go on.

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::api::{self, Api, Kind};
use super::render::{Bundle, RELEASE, WORKLOAD};
use crate::config::Kubernetes as Settings;
use crate::platform::{HistoryEntry, note};
use crate::release::{Recorded, ReleaseId};
use crate::rollout::engine::{Mark, Plan, Request, RequestKind};

/// How many ends of rollouts are kept.
const HISTORY: usize = 50;

/// How many releases to go back to are kept.
const EARNED: usize = 5;

/// Kept as JSON in a ConfigMap.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Record {
    pub environment: String,
    pub stable: Option<ReleaseId>,
    /// Oldest first.
    pub history: Vec<HistoryEntry>,
}

impl Record {
    /// The newest releases that can be gone back to: those whose last mark is a good one.
    pub fn earned(&self) -> Vec<ReleaseId> {
        let mut seen: Vec<&ReleaseId> = Vec::new();
        let mut earned = Vec::new();
        for entry in self.history.iter().rev() {
            if seen.contains(&&entry.release) {
                continue;
            }
            seen.push(&entry.release);
            if entry.mark == Mark::Healthy && earned.len() < EARNED {
                earned.push(entry.release.clone());
            }
        }
        earned
    }

    /// Takes down how a rollout has ended.
    pub fn note(&mut self, plan: &Plan, mark: Mark) {
        self.stable = plan.stable_after(mark).cloned();
        note(&mut self.history, &plan.rollout, plan.marks(mark));
        self.forget_old();
    }

    /// Drops the oldest entries; but however many failures came since, not those of the releases that can be
    /// gone back to.
    fn forget_old(&mut self) {
        let newest = |id: &ReleaseId| self.history.iter().rposition(|entry| entry.release == *id);
        let earned: Vec<usize> = self.earned().iter().filter_map(newest).collect();
        let mut surplus = self.history.len().saturating_sub(HISTORY);
        let mut at = 0;
        self.history.retain(|_| {
            let goes = surplus > 0 && !earned.contains(&at);
            surplus -= usize::from(goes);
            at += 1;
            !goes
        });
    }
}

pub fn kind() -> Kind {
    Kind::new("v1", "ConfigMap")
}

pub fn name(settings: &Settings) -> String {
    format!("{}-rollouts", settings.name)
}

/// What is on record, and what was asked for; nothing where there has been no rollout.
pub async fn read(
    api: &Api,
    settings: &Settings,
    environment: &str,
) -> Result<(Record, Option<Request>)> {
    let Some(object) = api.get(&kind(), &name(settings)).await? else {
        // Who may not try to write finds out later.
        match api.apply(&empty(settings, environment), false, true).await {
            Err(error) if Api::is_missing(&error) => return Err(no_namespace(api)),
            _ => return Ok((Record::default(), None)),
        }
    };
    let record = of(&object)?;
    if !record.environment.is_empty() && record.environment != environment {
        bail!(
            "namespace {} holds the environment {} of {}; give {environment} a namespace of its own",
            api.namespace,
            record.environment,
            settings.name
        );
    }
    Ok((record, request_of(&object)?))
}

/// What the object says.
pub fn of(object: &Value) -> Result<Record> {
    let damaged = || format!("the ConfigMap {} is damaged", api::name(object));
    match object["data"]["record"].as_str() {
        Some(text) => serde_json::from_str(text).with_context(damaged),
        None => Ok(Record::default()),
    }
}

fn request_of(object: &Value) -> Result<Option<Request>> {
    let damaged = || format!("the ConfigMap {} is damaged", api::name(object));
    let text = object["data"]["request"].as_str();
    text.map(|text| serde_json::from_str(text).with_context(damaged))
        .transpose()
}

/// The object for an environment in which nothing has happened yet.
fn empty(settings: &Settings, environment: &str) -> Value {
    let record = Record {
        environment: environment.to_owned(),
        ..Record::default()
    };
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": name(settings), "labels": labels(settings) },
        "data": { "record": json!(record).to_string() },
    })
}

pub fn labels(settings: &Settings) -> Value {
    json!({ "app.kubernetes.io/managed-by": "xtask", WORKLOAD: settings.name })
}

/// Makes sure that there is a record to be changed.
pub async fn ensure(api: &Api, settings: &Settings, environment: &str) -> Result<()> {
    if api.get(&kind(), &name(settings)).await?.is_some() {
        return Ok(());
    }
    match api.create(&empty(settings, environment)).await {
        // Another command was faster.
        Err(error) if api::is_there_already(&error) => Ok(()),
        Err(error) if Api::is_missing(&error) => Err(no_namespace(api)),
        created => created.map(|_| ()),
    }
}

fn no_namespace(api: &Api) -> anyhow::Error {
    anyhow!(
        "there is no namespace {0} (kubernetes.namespace): create it (`kubectl create namespace {0}`) and give \
         the deployer its rights there (k8s/deployer/)",
        api.namespace
    )
}

/// Leaves a request for whoever drives the rollout. It needs no lock: the newest one counts.
pub async fn ask(
    api: &Api,
    settings: &Settings,
    environment: &str,
    request: Request,
) -> Result<()> {
    ensure(api, settings, environment).await?;
    loop {
        let object = api.get(&kind(), &name(settings)).await?;
        let object = object.context("the record of rollouts is gone")?;
        let mut request = request;
        let last = request_of(&object)?;
        if last == Some(request) {
            // The answer to our own write was lost.
            return Ok(());
        }
        if let Some(last) = last
            && last.number >= request.number
        {
            if request.kind != RequestKind::Abort {
                bail!("somebody else has asked for something meanwhile; see `canary status`");
            }
            request.number = last.number + 1;
        }
        let change = json!({
            "metadata": { "resourceVersion": api::resource_version(&object) },
            "data": { "request": json!(request).to_string() },
        });
        match api.merge(&kind(), &name(settings), &change).await {
            // What was read is looked at again: an abort must not be overwritten.
            Err(error) if api::is_race(&error) => {}
            asked => return asked.map(|_| ()),
        }
    }
}

pub fn release_name(settings: &Settings, short: &str) -> String {
    format!("{}-release-{short}", settings.name)
}

/// Keeps a release and what was rendered of it; a release never changes.
pub async fn keep(
    api: &Api,
    settings: &Settings,
    recorded: &Recorded,
    bundle: &Bundle,
) -> Result<()> {
    let short = recorded.id.short();
    let mut labels = labels(settings);
    labels[RELEASE] = json!(short);
    let object = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": release_name(settings, short), "labels": labels },
        "immutable": true,
        "data": { "release": json!(recorded).to_string(), "bundle": json!(bundle).to_string() },
    });
    match api.create(&object).await {
        Err(error) if api::is_there_already(&error) => Ok(()),
        created => created.map(|_| ()),
    }
}

/// Lets a release that came to nothing be kept as something else.
pub async fn forget(api: &Api, settings: &Settings, id: &ReleaseId) -> Result<()> {
    match api
        .get(&kind(), &release_name(settings, id.short()))
        .await?
    {
        Some(kept) => api.delete(&kept).await,
        None => Ok(()),
    }
}

/// A release that was kept here, by its id.
pub async fn recall(
    api: &Api,
    settings: &Settings,
    id: &ReleaseId,
) -> Result<Option<(Recorded, Bundle)>> {
    let name = release_name(settings, id.short());
    let Some(object) = api.get(&kind(), &name).await? else {
        return Ok(None);
    };
    let damaged = || damaged(&name);
    let release = object["data"]["release"].as_str().with_context(damaged)?;
    let recorded: Recorded = serde_json::from_str(release).with_context(damaged)?;
    let bundle = bundle_of(&object)?;
    if recorded.release.id()? != *id {
        bail!("{}: its content is another release's", damaged());
    }
    Ok(Some((recorded, bundle)))
}

/// What was rendered of a release that was kept.
pub fn bundle_of(object: &Value) -> Result<Bundle> {
    let damaged = || damaged(api::name(object));
    let bundle = object["data"]["bundle"].as_str().with_context(damaged)?;
    serde_json::from_str(bundle).with_context(damaged)
}

fn damaged(name: &str) -> String {
    format!("the ConfigMap {name} is damaged; remove it and name the release again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_failures_leave_a_release_to_go_back_to() {
        let mut record = Record::default();
        let mut end = |release: &str, mark| {
            record.history.push(HistoryEntry {
                release: release.into(),
                rollout: String::new(),
                mark,
                at: jiff::Timestamp::now(),
            });
            record.forget_old();
        };
        for good in ["first", "second"] {
            end(good, Mark::Healthy);
        }
        for number in 0..2 * HISTORY {
            end(&format!("bad-{number}"), Mark::RolledBack);
        }
        let earned: [ReleaseId; 2] = ["second".into(), "first".into()];
        assert_eq!(record.earned(), earned);
        assert_eq!(record.history.len(), HISTORY);

        // What is kept of each is its newest word, however often it came.
        let mut record = Record::default();
        for number in 0..2 * HISTORY {
            record.history.push(HistoryEntry {
                release: ["first", "second"][number % 2].into(),
                rollout: number.to_string(),
                mark: Mark::Healthy,
                at: jiff::Timestamp::now(),
            });
            record.forget_old();
        }
        assert_eq!(record.history.len(), HISTORY);
    }
}
