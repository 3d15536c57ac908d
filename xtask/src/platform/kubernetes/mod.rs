//! Environments on Kubernetes: one namespace each, one Deployment for each release.
//!
//! A release's objects carry its id in their names and never change, so going forward and going
//! back are the same two things: numbers of pods, and a split of the traffic. Nothing is scaled to
//! zero before something else serves, and no Deployment is rolled over in place.

mod api;
pub mod desk;
mod diff;
mod fence;
mod objects;
mod pods;
mod record;
mod render;
mod rights;
mod telling;
mod traffic;
mod versioned;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::{InstanceCounts, InstanceStatus, Platform, ReleaseStatus, Status};
use crate::config::{Kubernetes as Settings, MetricsKind, Pipeline, Stage, TrafficKind};
use crate::release::{Recorded, ReleaseId};
use crate::rollout::engine::{Action, Kind as Rollout, Mark, Plan};
use crate::rollout::metrics;
use api::{Api, Kind};
use fence::Fence;
use render::{Bundle, RELEASE, RELEASE_ID, VERSION, WORKLOAD, name_of};
use traffic::{Bundles, Known, Split, Traffic, Weights};

/// Looking costs the API server four calls.
const TICK: Duration = Duration::from_millis(400);
/// How often it is looked into why a release is not ready.
const LOOK: Duration = Duration::from_secs(4);
/// On a Deployment that runs nothing yet: what its pods need is being made.
const UNFINISHED: &str = "xtask.dev/unfinished";

/// One environment.
pub struct Kubernetes {
    pipeline: Arc<Pipeline>,
    settings: Settings,
    environment: String,
    api: Api,
    traffic: Box<dyn Traffic>,
    bundles: Bundles,
    /// What the API server would make of the release that is about to be rolled out, object by object.
    tried: Option<(ReleaseId, Vec<Value>)>,
    /// What was found out about a release that does not get ready, while its pods were there.
    troubles: Mutex<BTreeMap<ReleaseId, Trouble>>,
}

/// What people want to know of a release that does not get ready.
struct Trouble {
    /// Whether waiting will not help.
    is_final: bool,
    at: Instant,
    lines: Vec<String>,
}

fn deployments() -> Kind {
    Kind::new("apps/v1", "Deployment")
}

fn budgets() -> Kind {
    Kind::new("policy/v1", "PodDisruptionBudget")
}

fn autoscalers() -> Kind {
    Kind::new("autoscaling/v2", "HorizontalPodAutoscaler")
}

fn services() -> Kind {
    Kind::new("v1", "Service")
}

/// The release that an object belongs to.
fn release_of(object: &Value) -> Option<ReleaseId> {
    let id = api::annotation(object, RELEASE_ID)?;
    serde_json::from_value(json!(id)).ok()
}

impl Kubernetes {
    pub async fn open(pipeline: &Arc<Pipeline>, environment: &str) -> Result<Self> {
        let settings = pipeline.kubernetes(environment)?;
        let api = Api::open(&settings).await?;
        Ok(Self {
            pipeline: Arc::clone(pipeline),
            traffic: traffic::open(&settings),
            environment: environment.to_owned(),
            settings,
            api,
            bundles: Bundles::new(),
            tried: None,
            troubles: Mutex::default(),
        })
    }

    /// Where its journals, its lock and its requests are.
    pub async fn desk(pipeline: &Pipeline, environment: &str) -> Result<desk::ClusterDesk> {
        let settings = pipeline.kubernetes(environment)?;
        Ok(desk::ClusterDesk {
            api: Api::open(&settings).await?,
            // While nothing can be written down nothing may be done: an API server that is away is
            // waited for as long as a hold may last.
            patience: pipeline.rollout.max_hold.0,
            settings,
            environment: environment.to_owned(),
        })
    }

    fn labels(&self) -> String {
        format!("{WORKLOAD}={},{RELEASE}", self.settings.name)
    }

    fn of_release(&self, short: &str) -> String {
        format!("{WORKLOAD}={},{RELEASE}={short}", self.settings.name)
    }

    fn fence(&self, token: u64) -> Fence<'_> {
        Fence {
            api: &self.api,
            token,
            record: record::name(&self.settings),
        }
    }

    fn bundle(&self, id: &ReleaseId) -> Result<&Bundle> {
        let bundle = self.bundles.get(id);
        bundle.with_context(|| format!("release {} was not prepared", id.short()))
    }

    fn troubles(&self) -> MutexGuard<'_, BTreeMap<ReleaseId, Trouble>> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What runs a release, as it is.
    async fn release(
        &self,
        deployment: &Value,
        pods: &[Value],
        weights: &Weights,
    ) -> Option<ReleaseStatus> {
        let id = release_of(deployment)?;
        let short = id.short();
        let weight = weights
            .iter()
            .find(|(other, _)| *other == id)
            .map_or(0, |(_, weight)| *weight);
        let own: Vec<&Value> = pods
            .iter()
            .filter(|pod| api::label(pod, RELEASE) == Some(short) && !pods::is_going(pod))
            .collect();
        let desired = deployment["spec"]["replicas"].as_u64().unwrap_or(1);
        let unfinished = api::annotation(deployment, UNFINISHED).is_some();
        // One that runs nothing is made anew when it is needed.
        let edited = edited(deployment).filter(|_| desired > 0);
        let mut broken = edited.clone().map(|why| (why, None));
        if unfinished && broken.is_none() {
            broken = self.broken_job(short).await.unwrap_or_default();
        }
        if desired > 0 && broken.is_none() {
            broken = pods::broken(deployment, &own, weight > 0);
        }
        // Those of a release with traffic had places before, and wait for them.
        if desired > 0 && broken.is_none() && weight == 0 {
            let unplaced = pods::unplaced(&self.api.impatient(), &own).await;
            broken = unplaced.unwrap_or_default();
        }
        if (desired > 0 || unfinished) && weight == 0 {
            let unready = own.iter().find(|pod| !pods::instance(pod).ready);
            let pod = match &broken {
                Some((_, pod)) => pod.clone(),
                None => unready.map(|pod| api::name(pod).to_owned()),
            };
            let why = broken.as_ref().map(|(why, _)| why.as_str());
            self.look_into(&id, why, pod.as_deref()).await;
        }
        Some(ReleaseStatus {
            version: api::annotation(deployment, VERSION)
                .unwrap_or_default()
                .to_owned(),
            desired: u32::try_from(desired).unwrap_or(u32::MAX),
            weight,
            instances: own.into_iter().map(pods::instance).collect(),
            available: pods::available(deployment),
            broken: match edited {
                Some(_) => None,
                None => broken.map(|(why, _)| why),
            },
            edited,
            paused: paused(deployment),
            unfinished,
            release: id,
        })
    }

    /// Finds out about a release that is not ready, now and then, until it is known why.
    async fn look_into(&self, id: &ReleaseId, why: Option<&str>, pod: Option<&str>) {
        let known = self.troubles().get(id).is_some_and(|trouble| {
            trouble.is_final || (why.is_none() && trouble.at.elapsed() < LOOK)
        });
        if known || (why.is_none() && pod.is_none()) {
            return;
        }
        let mut lines = Vec::new();
        if let Some(pod) = pod {
            lines.extend(pods::explain(&self.api.impatient(), pod).await);
        }
        let trouble = Trouble {
            is_final: why.is_some(),
            at: Instant::now(),
            lines,
        };
        self.troubles().insert(id.clone(), trouble);
    }

    /// Whether a release stays what was rendered of it: it has earned its place, or there is something of
    /// it.
    async fn is_fixed(&self, id: &ReleaseId) -> Result<bool> {
        let (record, _) = record::read(&self.api, &self.settings, &self.environment).await?;
        if record.earned().contains(id) {
            return Ok(true);
        }
        let name = name_of(&self.settings, id);
        let there = self.api.get(&deployments(), &name).await?;
        Ok(there.is_some_and(|there| {
            there["spec"]["replicas"] != 0 || api::annotation(&there, UNFINISHED).is_some()
        }))
    }

    async fn scale(&self, fence: &Fence<'_>, release: &ReleaseId, replicas: u32) -> Result<()> {
        if replicas == 0 {
            return self.empty(fence, release, false).await;
        }
        let bundle = self.bundle(release)?;
        let name = bundle.name(&self.settings);
        let there = self.api.get(&deployments(), &name).await?;
        self.raise_floor(fence, &name, replicas).await?;
        if there
            .as_ref()
            .is_none_or(|there| there["spec"]["replicas"] == 0)
        {
            if let Some(edited) = there.as_ref().and_then(edited) {
                // What others have added would stay.
                self.event(release, "Warning", "MadeAnew", &edited).await;
                fence.remove(&deployments(), &name).await?;
            }
            // Whoever gives the release up must find that there is something of it.
            self.apply_deployment(fence, release, &with_pods(bundle, 0, true))
                .await?;
            self.provide(fence, bundle).await?;
        } else {
            self.replace_lost(fence, bundle).await?;
        }
        self.apply_deployment(fence, release, &with_pods(bundle, replicas, false))
            .await?;
        self.scaled(bundle, replicas).await;
        Ok(())
    }

    /// Ends a release's pods. While it is `unfinished`, more of it is still to be taken away.
    async fn empty(
        &self,
        fence: &Fence<'_>,
        release: &ReleaseId,
        is_unfinished: bool,
    ) -> Result<()> {
        let name = name_of(&self.settings, release);
        // An autoscaler would never let it go.
        fence.remove(&autoscalers(), &name).await?;
        let Some(bundle) = self.bundles.get(release) else {
            // Of one that nobody can say more of, at least this.
            let none = |_: &Value| Some(json!({ "spec": { "replicas": 0 } }));
            return fence.change(&deployments(), &name, none).await;
        };
        if self.api.get(&deployments(), &name).await?.is_none() {
            return Ok(());
        }
        self.apply_deployment(fence, release, &with_pods(bundle, 0, is_unfinished))
            .await?;
        if !is_unfinished {
            self.scaled(bundle, 0).await;
        }
        Ok(())
    }

    async fn scaled(&self, bundle: &Bundle, replicas: u32) {
        let (version, short) = (&bundle.version, bundle.id.short());
        let said = format!("{replicas} pods of {version} ({short})");
        self.event(&bundle.id, "Normal", "Scaled", &said).await;
    }

    async fn apply_deployment(
        &self,
        fence: &Fence<'_>,
        release: &ReleaseId,
        wanted: &Value,
    ) -> Result<()> {
        match fence.apply(wanted).await {
            // Whoever scaled it by hand is told, and the number is ours again: a rollback must not
            // wait for a person. Nor must the end of one that somebody has edited: it runs nothing then.
            Err(error)
                if api::is_owned_by_others(&error)
                    && (only_replicas(&error) || wanted["spec"]["replicas"] == 0) =>
            {
                let reason = match only_replicas(&error) {
                    true => "ScaledByOthers",
                    false => "EditedByOthers",
                };
                self.event(release, "Warning", reason, &format!("{error:#}"))
                    .await;
                fence.take_over(wanted).await.map(|_| ())
            }
            applied => applied.map(|_| ()),
        }
    }

    async fn route(&self, fence: &Fence<'_>, weights: &Weights) -> Result<()> {
        let bundle = match weights.last() {
            Some((release, _)) => self.bundle(release)?,
            // All traffic is taken away: any release's route will do.
            None => match self.bundles.values().next() {
                Some(bundle) => bundle,
                None => bail!("no release was prepared"),
            },
        };
        // One that was kept may have lost something meanwhile.
        for (release, _) in weights {
            // Traffic does not wait for what is not needed to move it.
            let replaced = self.replace_lost(fence, self.bundle(release)?).await;
            self.told(release, "NotReplaced", replaced).await?;
        }
        // Each release has its own labels: the Service must select those of the one that it leads to.
        let front = match traffic::in_service(weights) {
            Some(release) => &self.bundle(release)?.front,
            None => &bundle.front,
        };
        let routed = self
            .traffic
            .route(fence, bundle, front, weights, &self.bundles)
            .await?;
        if let Some(taken_over) = routed
            && let Some((release, _)) = weights.last()
        {
            self.event(release, "Warning", "TakenOver", &taken_over)
                .await;
        }
        // Behind a plain Service numbers of pods are the split: only what carries everything may grow there.
        let may_grow = match self.by_replicas() && weights.len() > 1 {
            true => &[],
            false => weights.as_slice(),
        };
        for (release, _) in may_grow {
            let scaled = self.let_scale(fence, release).await;
            self.told(release, "NotScaled", scaled).await?;
        }
        for (release, weight) in weights {
            let said = format!("{weight} % of the traffic");
            self.event(release, "Normal", "Routed", &said).await;
            self.condition(release, &said).await;
        }
        Ok(())
    }

    /// Lets the autoscaler of a release with traffic make more of it; fewer pods only once its place is on
    /// record.
    async fn let_scale(&self, fence: &Fence<'_>, release: &ReleaseId) -> Result<()> {
        let bundle = self.bundle(release)?;
        let Some(mut autoscaler) = bundle.autoscaler.clone() else {
            return Ok(());
        };
        let name = bundle.name(&self.settings);
        if self.api.get(&autoscalers(), &name).await?.is_some() {
            return Ok(());
        }
        let deployment = self.api.get(&deployments(), &name).await?;
        let there = deployment.context("its Deployment is gone")?["spec"]["replicas"].as_u64();
        if let Some((least, most)) = limits_from(&autoscaler, there.unwrap_or(1)) {
            autoscaler["spec"]["minReplicas"] = least.into();
            autoscaler["spec"]["maxReplicas"] = most.into();
        }
        fence.apply(&autoscaler).await.map(|_| ())
    }

    /// Keeps the autoscaler of the release that a rollout may come back to from making less of it than carries
    /// all of the traffic, or did: its share of that gets smaller.
    async fn keep_full(&self, fence: &Fence<'_>, plan: &Plan, release: &ReleaseId) -> Result<()> {
        let name = name_of(&self.settings, release);
        let there = self.api.get(&deployments(), &name).await?;
        let there = there.and_then(|there| u32::try_from(there["spec"]["replicas"].as_u64()?).ok());
        let full = plan.replicas.max(there.unwrap_or(0));
        self.raise_floor(fence, &name, full).await
    }

    /// Keeps an autoscaler, where the release has one, from going below so many pods.
    async fn raise_floor(&self, fence: &Fence<'_>, name: &str, replicas: u32) -> Result<()> {
        if self.api.get(&autoscalers(), name).await?.is_none() {
            return Ok(());
        }
        fence
            .change(&autoscalers(), name, |current| {
                let (least, most) = limits_from(current, u64::from(replicas))?;
                Some(json!({ "spec": { "minReplicas": least, "maxReplicas": most } }))
            })
            .await
    }

    async fn record(&self, fence: &Fence<'_>, plan: &Plan, mark: Mark) -> Result<()> {
        record::ensure(&self.api, &self.settings, &self.environment).await?;
        // The record comes last: once it is there, nobody comes back to the rest.
        if let Some(stable) = plan.stable_after(mark) {
            self.restore(fence, stable).await?;
            if self.bundle(stable)?.budget.is_some() {
                // Releases of before had one together, and a pod with two cannot be evicted.
                let name = &self.settings.name;
                fence.remove_of(name, &budgets(), name).await?;
            }
        }
        let name = record::name(&self.settings);
        fence
            .change(&record::kind(), &name, |object| {
                let mut record = record::of(object).ok()?;
                record.note(plan, mark);
                Some(json!({ "data": { "record": json!(record).to_string() } }))
            })
            .await?;
        self.event(&plan.candidate, "Normal", "Recorded", &mark.to_string())
            .await;
        self.condition(&plan.candidate, &mark.to_string()).await;
        // Nobody waits for this, and nothing that serves depends on it.
        let forgotten = self.forget_old(fence, plan).await;
        self.told(&plan.candidate, "NotRemoved", forgotten).await
    }
}

/// What runs a release, with so many pods; `is_unfinished` while other things of it are made or taken
/// away.
fn with_pods(bundle: &Bundle, replicas: u32, is_unfinished: bool) -> Value {
    let mut deployment = bundle.deployment.clone();
    deployment["spec"]["replicas"] = json!(replicas);
    if is_unfinished {
        deployment["metadata"]["annotations"][UNFINISHED] = json!("true");
    }
    deployment
}

/// The least and the most pods by which an autoscaler does not go below so many; `None` where it does not
/// anyway.
fn limits_from(autoscaler: &Value, floor: u64) -> Option<(u64, u64)> {
    let least = autoscaler["spec"]["minReplicas"].as_u64().unwrap_or(1);
    let most = autoscaler["spec"]["maxReplicas"].as_u64().unwrap_or(1);
    (least < floor).then_some((floor, most.max(floor)))
}

/// Who besides us has changed what runs a release: then it is that release no more.
fn edited(deployment: &Value) -> Option<String> {
    Some(format!(
        "{} has changed the pod template of the Deployment {}: it is not the release any more",
        other_owner(deployment, "f:template")?,
        api::name(deployment)
    ))
}

/// Who has stopped a release's Deployment: nothing that is applied to it is rolled out then.
/// <https://kubernetes.io/docs/concepts/workloads/controllers/deployment/#pausing-and-resuming-a-deployment>
fn paused(deployment: &Value) -> Option<String> {
    if deployment["spec"]["paused"] != true {
        return None;
    }
    let name = api::name(deployment);
    Some(format!(
        "{} has paused the Deployment {name}: `kubectl rollout resume deployment/{name}`",
        other_owner(deployment, "f:paused").unwrap_or("somebody")
    ))
}

/// Which field manager besides us has set something below `field` of the specification.
fn other_owner<'a>(object: &'a Value, field: &str) -> Option<&'a str> {
    let managers = api::items(&object["metadata"]["managedFields"]);
    let mut others = managers.filter(|entry| {
        entry["manager"] != api::FIELD_MANAGER
            && entry["subresource"].as_str().is_none_or(str::is_empty)
            && entry["fieldsV1"]["f:spec"]
                .as_object()
                .is_some_and(|fields| fields.contains_key(field))
    });
    others.next()?["manager"].as_str()
}

/// Whether a conflict is about the number of pods and nothing else.
fn only_replicas(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    let fields: Vec<&str> = text.matches(": .spec").collect();
    let replicas = text.matches(".spec.replicas").count();
    let all = text.matches(".spec.").count();
    replicas > 0 && all == replicas && fields.len() <= 1
}

#[async_trait]
impl Platform for Kubernetes {
    async fn status(&self) -> Result<Status> {
        let api = self.api.impatient();
        let (record, _) = record::read(&api, &self.settings, &self.environment).await?;
        let deployments = api.list(&deployments(), &self.labels()).await?;
        let pods = api.list(&pods::kind(), &self.labels()).await?;
        let known: Known = deployments
            .iter()
            .filter_map(release_of)
            .map(|id| (id.short().to_owned(), id))
            .collect();
        let Split { weights, unseen } = self.traffic.split(&api, &known).await?;
        let mut releases = Vec::new();
        for deployment in &deployments {
            releases.extend(self.release(deployment, &pods, &weights).await);
        }
        // Where somebody has removed the record, what gets all requests is in service all the same.
        let is_gone = record.stable.is_none() && record.history.is_empty();
        let served = match weights.as_slice() {
            [(only, 100)] if is_gone => Some(only.clone()),
            _ => None,
        };
        Ok(Status {
            releases,
            unseen,
            stable: record.stable.or(served),
            history: record.history,
        })
    }

    async fn prepare(&mut self, release: &Recorded) -> Result<()> {
        let kept = record::recall(&self.api, &self.settings, &release.id).await?;
        let kept = kept.map(|(_, bundle)| bundle);
        if let Some(bundle) = &kept
            && self.is_fixed(&release.id).await?
        {
            self.bundles.insert(release.id.clone(), bundle.clone());
            return Ok(());
        }
        // One that came to nothing is what the settings make of it by now.
        let bundle = Bundle::render(release, &self.settings, &render::kubectl()?)?;
        self.traffic.check(&bundle)?;
        rights::check(&self.api, &self.settings, &bundle).await?;
        record::ensure(&self.api, &self.settings, &self.environment).await?;
        // The server itself says what it would refuse, before anything is changed; and whose fields would be
        // taken away, but for numbers of pods, which are taken over.
        let mut tried = Vec::new();
        for object in bundle.all() {
            let mut object = object.clone();
            let is_numbers = ["Deployment", "HorizontalPodAutoscaler"]
                .iter()
                .any(|kind| object["kind"] == *kind);
            if object["kind"] == "Deployment" {
                object["spec"]["replicas"] = json!(0);
            }
            let answer = self.api.apply(&object, is_numbers, true).await;
            tried.push(answer.with_context(|| {
                format!(
                    "the API server would refuse what {} renders",
                    self.settings.overlay
                )
            })?);
        }
        self.tried = Some((release.id.clone(), tried));
        if kept.is_some_and(|kept| kept != bundle) {
            record::forget(&self.api, &self.settings, &release.id).await?;
        }
        record::keep(&self.api, &self.settings, release, &bundle).await?;
        self.bundles.insert(release.id.clone(), bundle);
        Ok(())
    }

    async fn claim(&self, token: u64) -> Result<()> {
        let fence = self.fence(token);
        record::ensure(&self.api, &self.settings, &self.environment).await?;
        fence
            .claim(&record::kind(), &record::name(&self.settings))
            .await?;
        for (kind, name) in self.traffic.objects() {
            fence.claim(&kind, &name).await?;
        }
        for kind in [deployments(), autoscalers()] {
            for object in self.api.list(&kind, &self.labels()).await? {
                fence.claim(&kind, api::name(&object)).await?;
            }
        }
        Ok(())
    }

    async fn apply(&self, plan: &Plan, action: &Action, token: u64) -> Result<()> {
        let fence = self.fence(token);
        match action {
            Action::Scale { release, replicas } => {
                let is_candidate = *release == plan.candidate;
                if let (true, 1.., Some(stable)) = (is_candidate, *replicas, &plan.stable) {
                    // From now on stable must be able to take everything back.
                    self.keep_full(&fence, plan, stable).await?;
                }
                if is_candidate && *replicas == 0 {
                    // Its pods go, and that there is something left to do stays on record meanwhile.
                    self.empty(&fence, release, true).await?;
                    if let Some(stable) = &plan.stable {
                        self.restore(&fence, stable).await?;
                    }
                    self.take_away(&fence, release, plan.stable.as_ref())
                        .await?;
                }
                self.scale(&fence, release, *replicas).await?;
                if !is_candidate && *replicas == 0 {
                    // A release that runs on may need what its successor does without.
                    let kept = plan.stable.as_ref().filter(|stable| *stable != release);
                    let stay = [Some(&plan.candidate), kept];
                    self.leave_nothing(&fence, release, stay.into_iter().flatten())
                        .await?;
                }
                Ok(())
            }
            Action::Route { weights } => {
                let gets_more = weights.iter().any(|(id, _)| *id == plan.candidate);
                match &plan.stable {
                    _ if plan.kind == Rollout::Rollback => self.turn_back(&fence, plan).await?,
                    Some(stable) if gets_more => self.keep_full(&fence, plan, stable).await?,
                    _ => {}
                }
                self.route(&fence, weights).await
            }
            Action::Record { mark } => self.record(&fence, plan, *mark).await,
        }
    }

    async fn stop(&self, release: &ReleaseId, token: u64) -> Result<()> {
        let fence = self.fence(token);
        self.scale(&fence, release, 0).await?;
        let (record, _) = record::read(&self.api, &self.settings, &self.environment).await?;
        match record.stable {
            // What is kept goes all at once: only the release in service stays.
            Some(stable) if self.bundles.contains_key(&stable) => {
                self.leave_nothing(&fence, release, [&stable].into_iter())
                    .await
            }
            _ => Ok(()),
        }
    }

    async fn counts(&self) -> Result<Vec<InstanceCounts>> {
        let path = &self.pipeline.service.metrics_path;
        metrics::scrape(self, path, &self.pipeline.scrape).await
    }

    async fn ask(&self, instance: &InstanceStatus, path: &str) -> Result<String> {
        let port = self.settings.admin_port;
        self.api
            .impatient()
            .ask_pod(&instance.name, port, path)
            .await
    }

    fn address(&self) -> String {
        self.settings.address.clone().unwrap_or_default()
    }

    fn tick(&self) -> Duration {
        TICK
    }

    fn metrics(&self) -> MetricsKind {
        MetricsKind::Scrape
    }

    fn stages(&self, wanted: &[Stage], replicas: u32) -> Vec<Stage> {
        self.traffic.stages(wanted, replicas)
    }

    /// A drain of its node, or a preemption, may take a pod at any time.
    fn least(&self) -> u32 {
        2
    }

    fn by_replicas(&self) -> bool {
        self.traffic.by_replicas()
    }

    fn traffic(&self) -> Option<TrafficKind> {
        Some(self.settings.traffic)
    }

    async fn recall(&self, id: &ReleaseId) -> Result<Option<Recorded>> {
        let recalled = record::recall(&self.api, &self.settings, id).await?;
        Ok(recalled.map(|(recorded, _)| recorded))
    }

    fn explain(&self, release: &ReleaseId) -> Vec<String> {
        let troubles = self.troubles();
        let known = troubles.get(release).map(|trouble| trouble.lines.clone());
        let mut lines = known.unwrap_or_default();
        lines.push(format!(
            "its pods: kubectl --namespace {} get pods --selector {RELEASE}={}",
            self.api.namespace,
            release.short()
        ));
        lines
    }

    async fn changes(&self, from: Option<&ReleaseId>, to: &ReleaseId) -> Vec<String> {
        let stable = from.and_then(|id| self.bundles.get(id));
        let Some(candidate) = self.bundles.get(to) else {
            return Vec::new();
        };
        match &self.tried {
            Some((id, tried)) if id == to => {
                diff::live(&self.api.impatient(), stable, candidate, tried)
                    .await
                    .unwrap_or_else(|error| {
                        vec![format!("what it changes is not known: {error:#}")]
                    })
            }
            _ => diff::rendered(stable, candidate),
        }
    }
}
