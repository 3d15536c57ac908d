//! What a release needs besides its pods: made before them, and taken away again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::api::{self, Kind};
use super::fence::Fence;
use super::render::{Bundle, JOB_OF, MANAGED_BY, RELEASE, WORKLOAD};
use super::{
    Kubernetes, TICK, autoscalers, budgets, deployments, pods, record, release_of, services,
};
use crate::platform::StaleWriter;
use crate::release::ReleaseId;
use crate::rollout::engine::Plan;

/// How long what must be there before the pods, or must have run, may take.
const NEEDED: Duration = Duration::from_secs(300);
/// How many releases that run nothing are kept, besides those that can be gone back to.
const KEPT: usize = 5;
/// On an object of the environment: the id of the release that it first came with, until that
/// release has earned its place.
const BROUGHT_BY: &str = "xtask.dev/brought-by";

/// Kinds that hold nothing that could not be made again: only those are removed.
const REMOVABLE: [&str; 8] = [
    "GRPCRoute",
    "Ingress",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Role",
    "RoleBinding",
    "Service",
    "ServiceAccount",
];

pub(super) fn is_removable(object: &Value) -> bool {
    object["kind"]
        .as_str()
        .is_some_and(|kind| REMOVABLE.contains(&kind))
}

/// The environment's objects that one release brings and the others do without, of kinds that may be
/// removed.
fn only_in<'a>(
    one: &Bundle,
    others: impl IntoIterator<Item = &'a Bundle>,
) -> Result<Vec<(Kind, String)>> {
    let identity = |object: &Value| Ok((Kind::of(object)?, api::name(object).to_owned()));
    let all = |bundle: &Bundle| {
        bundle
            .others
            .iter()
            .chain(&bundle.grpc_route)
            .map(identity)
            .collect::<Result<Vec<_>>>()
    };
    let mut stays = Vec::new();
    for other in others {
        stays.extend(all(other)?);
    }
    let mut only = all(one)?;
    only.retain(|object| REMOVABLE.contains(&object.0.kind.as_str()) && !stays.contains(object));
    Ok(only)
}

/// An object that is not there yet, with a note of who brings it along.
fn brought_by(object: &Value, release: &ReleaseId) -> Value {
    let mut object = object.clone();
    object["metadata"]["annotations"][BROUGHT_BY] = json!(release);
    object
}

/// The same, where that is so of the object as it is there.
pub(super) fn noted(object: &Value, there: Option<&Value>, release: &ReleaseId) -> Value {
    let is_its = |there: &Value| api::annotation(there, BROUGHT_BY) == Some(release.as_str());
    match there.is_none_or(is_its) {
        true => brought_by(object, release),
        false => object.clone(),
    }
}

fn jobs() -> Kind {
    Kind::new("batch/v1", "Job")
}

impl Kubernetes {
    /// Makes what a release needs before its first pod can start, the environment's own objects
    /// included: those travel with the release.
    pub(super) async fn provide(&self, fence: &Fence<'_>, bundle: &Bundle) -> Result<()> {
        for object in &bundle.others {
            let there = self.api.get(&Kind::of(object)?, api::name(object)).await?;
            fence
                .apply(&noted(object, there.as_ref(), &bundle.id))
                .await?;
        }
        for config in &bundle.configs {
            fence.apply(config).await?;
        }
        for object in bundle.of_pods() {
            fence.apply(object).await?;
        }
        for object in bundle.others.iter().filter(|o| o["kind"] == "StatefulSet") {
            self.await_set(object).await?;
        }
        for job in &bundle.jobs {
            self.run_job(fence, job, bundle.id.short()).await?;
        }
        Ok(())
    }

    /// Puts back what new pods need and somebody has removed since.
    pub(super) async fn replace_lost(&self, fence: &Fence<'_>, bundle: &Bundle) -> Result<()> {
        let others = bundle.others.iter();
        let others = others.map(|object| brought_by(object, &bundle.id));
        let own = bundle.configs.iter().chain(bundle.of_pods()).cloned();
        for object in others.chain(own) {
            let kind = Kind::of(&object)?;
            if self.api.get(&kind, api::name(&object)).await?.is_none() {
                fence.apply(&object).await?;
            }
        }
        Ok(())
    }

    /// Why a release's jobs will never be done.
    pub(super) async fn broken_job(&self, short: &str) -> Result<Option<(String, Option<String>)>> {
        let api = self.api.impatient();
        let jobs = api.list(&jobs(), &self.of_release(short)).await?;
        let pods = api
            .list(&pods::kind(), &format!("{JOB_OF}={short}"))
            .await?;
        // Those of a job of the same name that was removed may still be there.
        let is_own = |pod: &Value| {
            let mut owners = api::items(&pod["metadata"]["ownerReferences"]);
            owners.any(|owner| {
                jobs.iter()
                    .any(|job| job["metadata"]["uid"] == owner["uid"])
            })
        };
        let pods: Vec<Value> = pods.into_iter().filter(is_own).collect();
        let broken = pods::broken_job(&jobs, &pods);
        if broken.is_some() || !pods.is_empty() {
            return Ok(broken);
        }
        // Of pods that are refused only events tell.
        for job in &jobs {
            if let Some(why) = pods::refused(&api, job).await? {
                return Ok(Some((why, None)));
            }
        }
        Ok(None)
    }

    /// Waits until an object is as `is_done` wants it; a release's job may turn out never to be.
    async fn until(
        &self,
        object: &Value,
        job_of: Option<&str>,
        is_done: impl Fn(&Value) -> bool,
    ) -> Result<()> {
        let (kind, name) = (Kind::of(object)?, api::name(object));
        let title = format!("the {} {name}", kind.kind);
        let deadline = Instant::now() + NEEDED;
        loop {
            let object = self.api.get(&kind, name).await?;
            let object = object.with_context(|| format!("{title} is gone"))?;
            if is_done(&object) {
                return Ok(());
            }
            if let Some(short) = job_of
                && let Some((why, _)) = self.broken_job(short).await?
            {
                bail!("{why}");
            }
            if Instant::now() > deadline {
                bail!("{title} is not done within {} s", NEEDED.as_secs());
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// Waits for what the release's pods need to be there when they start.
    async fn await_set(&self, set: &Value) -> Result<()> {
        self.until(set, None, |set| {
            let (status, wanted) = (&set["status"], set["spec"]["replicas"].as_u64());
            let seen =
                status["observedGeneration"].as_u64() >= set["metadata"]["generation"].as_u64();
            seen && status["readyReplicas"].as_u64().unwrap_or(0) >= wanted.unwrap_or(1)
        })
        .await
    }

    /// Runs a job to its end, once for each release.
    async fn run_job(&self, fence: &Fence<'_>, job: &Value, release: &str) -> Result<()> {
        if self.api.get(&jobs(), api::name(job)).await?.is_none() {
            fence.apply(job).await?;
        }
        self.until(job, Some(release), |job| {
            let mut conditions = api::items(&job["status"]["conditions"]);
            conditions.any(|c| c["type"] == "Complete" && c["status"] == "True")
        })
        .await
    }

    /// Takes away what a release that has not earned its place was the first to bring along.
    pub(super) async fn take_away(
        &self,
        fence: &Fence<'_>,
        candidate: &ReleaseId,
        stable: Option<&ReleaseId>,
    ) -> Result<()> {
        let stable = stable.map(|stable| self.bundle(stable)).transpose()?;
        for (kind, name) in only_in(self.bundle(candidate)?, stable)? {
            let is_brought =
                |there: &Value| api::annotation(there, BROUGHT_BY) == Some(candidate.as_str());
            fence.remove_where(&kind, &name, is_brought).await?;
        }
        self.remove_jobs(fence, candidate.short()).await
    }

    /// A release's jobs are run again the next time that it is rolled out.
    async fn remove_jobs(&self, fence: &Fence<'_>, short: &str) -> Result<()> {
        for job in self.api.list(&jobs(), &self.of_release(short)).await? {
            fence.remove(&jobs(), api::name(&job)).await?;
        }
        Ok(())
    }

    /// What another release has changed around the one in service goes back with it.
    pub(super) async fn restore(&self, fence: &Fence<'_>, stable: &ReleaseId) -> Result<()> {
        let bundle = self.bundle(stable)?;
        self.restore_others(fence, bundle).await?;
        if let Some(autoscaler) = &bundle.autoscaler {
            fence.take_over(autoscaler).await?;
        }
        let settled = self.traffic.settle(fence, bundle, &self.bundles).await;
        self.forgive_others(stable, settled).await
    }

    /// Before a release that was kept gets its traffic back: what its successor has changed around
    /// it. One that was started again has been given that already.
    pub(super) async fn turn_back(&self, fence: &Fence<'_>, plan: &Plan) -> Result<()> {
        let bundle = self.bundle(&plan.candidate)?;
        let left = plan.stable.as_ref().and_then(|id| self.bundles.get(id));
        if left.is_some_and(|left| left.others == bundle.others) {
            return Ok(());
        }
        let restored = self.restore_others(fence, bundle).await;
        self.told(&plan.candidate, "NotRestored", restored).await
    }

    async fn restore_others(&self, fence: &Fence<'_>, bundle: &Bundle) -> Result<()> {
        for object in &bundle.others {
            let applied = fence.apply(object).await.map(|_| ());
            self.forgive_others(&bundle.id, applied).await?;
        }
        Ok(())
    }

    /// Tells of what failed and nothing that serves depends on.
    pub(super) async fn told(
        &self,
        release: &ReleaseId,
        reason: &str,
        done: Result<()>,
    ) -> Result<()> {
        match done {
            Err(error) if !error.is::<StaleWriter>() => {
                self.event(release, "Warning", reason, &format!("{error:#}"))
                    .await;
                Ok(())
            }
            done => done,
        }
    }

    /// The way back does not end at what somebody else keeps: that is told.
    async fn forgive_others(&self, release: &ReleaseId, done: Result<()>) -> Result<()> {
        match done {
            Err(error) if api::is_owned_by_others(&error) => {
                self.event(release, "Warning", "OwnedByOthers", &format!("{error:#}"))
                    .await;
                Ok(())
            }
            done => done,
        }
    }

    /// Removes what was around a release that has ended and none of those that `stay` needs.
    pub(super) async fn leave_nothing<'a>(
        &self,
        fence: &Fence<'_>,
        ended: &ReleaseId,
        stay: impl Iterator<Item = &'a ReleaseId>,
    ) -> Result<()> {
        let Some(bundle) = self.bundles.get(ended) else {
            return Ok(());
        };
        let stay = stay.filter_map(|id| self.bundles.get(id));
        let mut removed = Ok(());
        for (kind, name) in only_in(bundle, stay)? {
            let gone = fence.remove_of(&self.settings.name, &kind, &name).await;
            removed = removed.and(gone);
        }
        self.told(ended, "NotRemoved", removed).await
    }

    /// Removes releases that run nothing and that nobody goes back to.
    pub(super) async fn forget_old(&self, fence: &Fence<'_>, plan: &Plan) -> Result<()> {
        let (record, _) = record::read(&self.api, &self.settings, &self.environment).await?;
        let earned = record.earned();
        let mut old = self.api.list(&deployments(), &self.labels()).await?;
        old.retain(|deployment| {
            let id = release_of(deployment);
            deployment["spec"]["replicas"] == 0
                && id.as_ref() != Some(&plan.candidate)
                && id != plan.stable
                && id.is_none_or(|id| !earned.contains(&id))
        });
        old.sort_by_key(|deployment| {
            deployment["metadata"]["creationTimestamp"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        });
        let surplus = old.len().saturating_sub(KEPT);
        for deployment in &old[..surplus] {
            let name = api::name(deployment);
            fence.remove(&services(), name).await?;
            fence.remove(&autoscalers(), name).await?;
            fence.remove(&budgets(), name).await?;
            if let Some(short) = api::label(deployment, RELEASE) {
                self.remove_jobs(fence, short).await?;
                let kept = record::release_name(&self.settings, short);
                fence.remove(&record::kind(), &kept).await?;
            }
            // The rest is found by it.
            fence.remove(&deployments(), name).await?;
        }
        match surplus {
            0 => Ok(()),
            _ => self.forget_configs(fence).await,
        }
    }

    /// Removes the configurations that none of the releases which are kept has, of whatever service: those
    /// of the same content have one name.
    async fn forget_configs(&self, fence: &Fence<'_>) -> Result<()> {
        let managed = format!("{MANAGED_BY}=xtask");
        let all = self.api.list(&record::kind(), &managed).await?;
        let mut needed = BTreeSet::new();
        for release in all.iter().filter(|one| api::label(one, RELEASE).is_some()) {
            // One that cannot be read may need any of them.
            let Ok(bundle) = record::bundle_of(release) else {
                return Ok(());
            };
            needed.extend(
                bundle
                    .configs
                    .iter()
                    .map(|config| api::name(config).to_owned()),
            );
        }
        let is_config = |one: &&Value| {
            one["immutable"] == true
                && api::label(one, RELEASE).is_none()
                && api::label(one, WORKLOAD) == Some(self.settings.name.as_str())
        };
        for config in all.iter().filter(is_config) {
            if !needed.contains(api::name(config)) {
                fence.remove(&record::kind(), api::name(config)).await?;
            }
        }
        Ok(())
    }
}
