//! A release's manifests for one environment: rendered by kustomize, then made its own.
//!
//! Releases live beside each other, so what runs a release carries the release's short id in its
//! name: its Deployment, the Service of its pods, its autoscaler, its jobs. Configurations carry
//! the hash of their content. Everything else belongs to the environment.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use xshell::{Shell, cmd};

use super::{api, versioned};
use crate::cluster::Cluster;
use crate::config::{Kubernetes as Settings, TrafficKind};
use crate::files;
use crate::release::{Recorded, ReleaseId};
use crate::setup::tools::Tools;

/// The Deployment that an object belongs to, as the manifests name it.
pub const WORKLOAD: &str = "xtask.dev/workload";
/// The short id of the release that an object belongs to.
pub const RELEASE: &str = "xtask.dev/release";
/// The whole id, and the version for people.
pub const RELEASE_ID: &str = "xtask.dev/release-id";
pub const VERSION: &str = "xtask.dev/version";

/// The short id of the release that a job's pod belongs to: it is none of the release's pods.
pub const JOB_OF: &str = "xtask.dev/job-of";

pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// In `kubernetes.images`: the image that the cluster of `cargo xtask cluster` has by that name.
const CLUSTER: &str = "cluster";

/// Kinds that no release can bring along, because they are the whole cluster's.
const OF_THE_CLUSTER: [&str; 16] = [
    "APIService",
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "GatewayClass",
    "IngressClass",
    "MutatingAdmissionPolicy",
    "MutatingAdmissionPolicyBinding",
    "MutatingWebhookConfiguration",
    "Namespace",
    "PersistentVolume",
    "PriorityClass",
    "StorageClass",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
    "ValidatingWebhookConfiguration",
];

/// All objects of a release in one environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bundle {
    pub id: ReleaseId,
    pub version: String,
    pub deployment: Value,
    /// The Service of this release's pods only.
    pub service: Value,
    pub autoscaler: Option<Value>,
    /// How many of its pods may be taken away at a time.
    #[serde(default)]
    pub budget: Option<Value>,
    /// Run to their end before the first pod starts.
    pub jobs: Vec<Value>,
    /// Immutable, named by their content.
    pub configs: Vec<Value>,
    /// The Service of all releases, and what splits the traffic in front of it.
    pub front: Value,
    pub route: Option<Value>,
    /// The same for calls by gRPC, where they have a route of their own.
    #[serde(default)]
    pub grpc_route: Option<Value>,
    /// What the environment has besides.
    pub others: Vec<Value>,
}

impl Bundle {
    /// Renders the release's manifests.
    pub fn render(recorded: &Recorded, settings: &Settings, kubectl: &Path) -> Result<Self> {
        let text = kustomize(recorded, settings, kubectl)?;
        let mut objects: Vec<Value> =
            serde_saphyr::from_multiple(&text).context("reading what kustomize has rendered")?;
        let of_cluster = settings
            .images
            .iter()
            .filter(|(_, image)| *image == CLUSTER);
        for (name, _) in of_cluster {
            let mut places = Vec::new();
            for object in &mut objects {
                images_named(name, object, &mut places);
            }
            // Of a cluster that is not ours nobody asks for it.
            if !places.is_empty() {
                let image = Cluster::open()?.image(name)?;
                places.into_iter().for_each(|place| *place = json!(image));
            }
        }
        Self::sort(recorded, settings, objects)
    }

    /// Gives each object its place.
    fn sort(recorded: &Recorded, settings: &Settings, objects: Vec<Value>) -> Result<Self> {
        let name = settings.name.as_str();
        let overlay = &settings.overlay;
        // By numbers of pods, whatever leads to the Service is split with it.
        let splits = settings.traffic != TrafficKind::Replicas;
        let (mut deployment, mut front, mut route) = (None, None, None);
        let (mut autoscaler, mut budget, mut grpc_route) = (None, None, None);
        let (mut jobs, mut configs, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for mut object in objects {
            mark(&mut object, name);
            let kind = object["kind"].as_str().unwrap_or_default().to_owned();
            let is_ours = api::name(&object) == name;
            match kind.as_str() {
                "Deployment" if is_ours => deployment = Some(object),
                "Service" if is_ours => front = Some(object),
                "GRPCRoute" if splits && api::name(&object) == grpc_route_name(settings) => {
                    grpc_route = Some(object);
                }
                "GRPCRoute" if splits && is_ours => bail!(
                    "{overlay}: the GRPCRoute {name:?} must have a name of its own, {:?}",
                    grpc_route_name(settings)
                ),
                "HTTPRoute" | "HTTPProxy" if splits && is_ours => {
                    if let Some(other) = route.replace(object) {
                        bail!(
                            "{overlay}: {} and {kind} are both named {name:?}, and only one can \
                             split the traffic",
                            other["kind"].as_str().unwrap_or_default()
                        );
                    }
                }
                "HorizontalPodAutoscaler" if is_ours => autoscaler = Some(object),
                "PodDisruptionBudget" if is_ours => budget = Some(object),
                "Job" => jobs.push(object),
                "ConfigMap" => {
                    versioned::check_config(&object, overlay)?;
                    configs.push(object);
                }
                "Secret" => bail!(
                    "{overlay}: the Secret {} would be kept with the release, for everybody to read; \
                     let whoever keeps your secrets make it, and name it by its version",
                    api::name(&object)
                ),
                kind if OF_THE_CLUSTER.contains(&kind) => bail!(
                    "{overlay}: {kind} {} is the whole cluster's; a release cannot bring it along",
                    api::name(&object)
                ),
                _ => others.push(object),
            }
        }
        let missing = |kind: &str| format!("{overlay} renders no {kind} named {name:?}");
        let mut bundle = Self {
            id: recorded.id.clone(),
            version: recorded.release.version.to_string(),
            deployment: deployment.with_context(|| missing("Deployment"))?,
            service: Value::Null,
            front: front.with_context(|| missing("Service"))?,
            autoscaler,
            budget,
            jobs,
            configs,
            route,
            grpc_route,
            others,
        };
        let templates = [&bundle.deployment].into_iter().chain(&bundle.jobs);
        versioned::check_secrets(templates.map(|owner| &owner["spec"]["template"]), settings)?;
        bundle.specialize(settings, &recorded.release.image)?;
        Ok(bundle)
    }

    /// Makes what runs the release its own.
    fn specialize(&mut self, settings: &Settings, digest: &str) -> Result<()> {
        let own = self.name(settings);
        let short = self.id.short().to_owned();
        let selector = self.front["spec"]["selector"].clone();
        if selector.as_object().is_none_or(serde_json::Map::is_empty) {
            bail!(
                "{}: the Service {} selects no pods",
                settings.overlay,
                settings.name
            );
        }
        // Of the front's own it needs neither the address nor the way in from outside.
        let mut ports = self.front["spec"]["ports"].clone();
        for port in ports.as_array_mut().into_iter().flatten() {
            if let Some(port) = port.as_object_mut() {
                port.remove("nodePort");
            }
        }
        self.service = self.front.clone();
        self.service["spec"] = json!({ "ports": ports, "selector": selector });
        self.service["spec"]["selector"][RELEASE] = json!(short);
        let spec = &mut self.deployment["spec"];
        spec["selector"]["matchLabels"][RELEASE] = json!(short);
        spec["template"]["metadata"]["labels"][RELEASE] = json!(short);
        spec["template"]["metadata"]["labels"][WORKLOAD] = json!(settings.name);
        let image = format!("{}@{digest}", settings.repository);
        let runs_it = api::items(&spec["template"]["spec"]["containers"])
            .any(|container| container["image"] == image);
        if !runs_it {
            bail!(
                "{}: no container of the Deployment {} has the image {:?}, so none would run {image}",
                settings.overlay,
                settings.name,
                settings.name
            );
        }
        if let Some(autoscaler) = &mut self.autoscaler {
            autoscaler["spec"]["scaleTargetRef"]["name"] = json!(own);
        }
        if let Some(budget) = &mut self.budget {
            budget["spec"]["selector"]["matchLabels"][RELEASE] = json!(short);
        }
        let owned = [&mut self.deployment, &mut self.service];
        let owned = owned.into_iter().chain(&mut self.autoscaler);
        for object in owned.chain(&mut self.budget) {
            object["metadata"]["name"] = json!(own);
            self_label(object, &self.id, &self.version);
        }
        for job in &mut self.jobs {
            job["metadata"]["name"] = json!(format!("{}-{short}", api::name(job)));
            self_label(job, &self.id, &self.version);
            job["spec"]["template"]["metadata"]["labels"][JOB_OF] = json!(short);
        }
        for config in &mut self.configs {
            config["immutable"] = json!(true);
        }
        Ok(())
    }

    /// The name of what runs this release.
    pub fn name(&self, settings: &Settings) -> String {
        name_of(settings, &self.id)
    }

    /// What is about the release's pods, and there before them.
    pub fn of_pods(&self) -> impl Iterator<Item = &Value> {
        [&self.service].into_iter().chain(&self.budget)
    }

    /// All of it, in the order in which it is needed.
    pub fn all(&self) -> impl Iterator<Item = &Value> {
        let one = [&self.deployment, &self.front];
        self.others
            .iter()
            .chain(&self.configs)
            .chain(&self.jobs)
            .chain(one)
            .chain(self.of_pods())
            .chain(&self.autoscaler)
            .chain(&self.route)
            .chain(&self.grpc_route)
    }
}

/// The name of the route for calls by gRPC. Not that of the other route: Contour tells routes apart by
/// their names alone, and gives the one the other's status.
pub fn grpc_route_name(settings: &Settings) -> String {
    format!("{}-grpc", settings.name)
}

/// The name of what runs a release.
pub fn name_of(settings: &Settings, id: &ReleaseId) -> String {
    format!("{}-{}", settings.name, id.short())
}

fn mark(object: &mut Value, workload: &str) {
    object["metadata"]["labels"][MANAGED_BY] = json!("xtask");
    object["metadata"]["labels"][WORKLOAD] = json!(workload);
}

fn self_label(object: &mut Value, id: &ReleaseId, version: &str) {
    object["metadata"]["labels"][RELEASE] = json!(id.short());
    object["metadata"]["annotations"][RELEASE_ID] = json!(id);
    object["metadata"]["annotations"][VERSION] = json!(version);
}

/// Where an object's containers have the image that the manifests call so.
fn images_named<'a>(name: &str, object: &'a mut Value, found: &mut Vec<&'a mut Value>) {
    match object {
        Value::Object(fields) => {
            for (key, value) in fields {
                let is_it = |image: &str| image.split([':', '@']).next() == Some(name);
                match key.as_str() {
                    "image" if value.as_str().is_some_and(is_it) => found.push(value),
                    _ => images_named(name, value, found),
                }
            }
        }
        Value::Array(all) => all
            .iter_mut()
            .for_each(|one| images_named(name, one, found)),
        _ => {}
    }
}

/// What kustomize makes of the release's own copy of the manifests, with its image's digest and
/// its configuration put in.
fn kustomize(recorded: &Recorded, settings: &Settings, kubectl: &Path) -> Result<String> {
    let release = &recorded.release;
    if release.manifests.is_empty() {
        bail!(
            "release {recorded} carries no manifests; make it again with `cargo xtask image`, \
             whose settings name them in [kubernetes]"
        );
    }
    let overlay = Path::new(&settings.overlay);
    let is_of_overlay = |path: &String| Path::new(path).starts_with(overlay);
    if !release.manifests.keys().any(is_of_overlay) {
        bail!(
            "kubernetes.overlay = {:?}: the manifests of release {recorded} have no such directory",
            settings.overlay
        );
    }
    let shell = Shell::new().context("finding the current directory")?;
    let dir = shell
        .create_temp_dir()
        .context("making a place to render in")?;
    for (path, text) in &release.manifests {
        files::replace(&dir.path().join("manifests").join(path), text.as_bytes())?;
    }
    for (name, text) in &release.config {
        files::replace(&dir.path().join("release").join(name), text.as_bytes())?;
    }
    let names: Vec<&String> = release.config.keys().collect();
    let mut images = vec![json!({
        "name": settings.name,
        "newName": settings.repository,
        "digest": release.image,
    })];
    for (name, image) in settings
        .images
        .iter()
        .filter(|(_, image)| *image != CLUSTER)
    {
        let Some((repository, digest)) = image.split_once('@') else {
            bail!("kubernetes.images.{name} = {image:?}: expected REPOSITORY@sha256:…");
        };
        images.push(json!({ "name": name, "newName": repository, "digest": digest }));
    }
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [format!("../manifests/{}", settings.overlay)],
        "images": images,
        "configMapGenerator": [{ "name": format!("{}-config", settings.name), "files": names }],
    });
    let own = dir.path().join("release/kustomization.yaml");
    files::replace(&own, kustomization.to_string().as_bytes())?;
    let place = dir.path().join("release");
    let ended = cmd!(shell, "{kubectl} kustomize {place}")
        .quiet()
        .ignore_status()
        .output()
        .context("starting kubectl")?;
    if !ended.status.success() {
        let said = String::from_utf8_lossy(&ended.stderr);
        let said = said.replace(&*dir.path().to_string_lossy(), "");
        bail!(
            "rendering {} of release {recorded}: {}",
            settings.overlay,
            said.trim()
        );
    }
    String::from_utf8(ended.stdout).context("reading what kustomize has rendered")
}

/// The program that renders.
pub fn kubectl() -> Result<std::path::PathBuf> {
    Tools::open()?.program("kubectl")
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn settings() -> Settings {
        Settings {
            context: None,
            manifests: "k8s".into(),
            overlay: "overlays/production".to_owned(),
            namespace: "production".to_owned(),
            name: "service".to_owned(),
            repository: "registry.example/service".to_owned(),
            images: std::collections::BTreeMap::new(),
            rotated_secrets: Vec::new(),
            traffic: TrafficKind::Gateway,
            address: None,
            grpc_address: None,
            release_header: None,
            admin_port: 9090,
        }
    }

    pub fn named(kind: &str, name: &str) -> Value {
        json!({ "kind": kind, "metadata": { "name": name } })
    }

    /// What is made of a Deployment and a Service, and these besides.
    pub fn sorted(more: Vec<Value>) -> Result<Bundle> {
        sorted_by(&settings(), more)
    }

    fn sorted_by(settings: &Settings, more: Vec<Value>) -> Result<Bundle> {
        let mut deployment = named("Deployment", "service");
        deployment["spec"] = json!({ "template": { "spec": { "containers": [
            { "image": "registry.example/service@sha256:1" },
        ] } } });
        let mut service = named("Service", "service");
        service["spec"] = json!({
            "selector": { "app": "service" }, "ports": [{ "port": 80, "nodePort": 30000 }],
        });
        let recorded = Recorded {
            id: "0123456789abcdef".into(),
            created_at: jiff::Timestamp::UNIX_EPOCH,
            release: crate::release::Release {
                image: "sha256:1".to_owned(),
                config: std::collections::BTreeMap::new(),
                manifests: std::collections::BTreeMap::new(),
                schema_version: 1,
                version: semver::Version::new(1, 0, 0),
            },
        };
        let objects = [deployment, service].into_iter().chain(more).collect();
        Bundle::sort(&recorded, settings, objects)
    }

    #[test]
    fn images_of_the_cluster_are_found_where_containers_are() {
        let mut object = json!({ "spec": { "template": { "spec": {
            "initContainers": [{ "image": "postgres:17" }],
            "containers": [{ "image": "postgres" }, { "image": "service" }],
        } } } });
        let mut found = Vec::new();
        images_named("postgres", &mut object, &mut found);
        let mut found: Vec<_> = found.iter().filter_map(|image| image.as_str()).collect();
        found.sort_unstable();
        assert_eq!(found, ["postgres", "postgres:17"]);
    }

    #[test]
    fn a_release_has_its_own_names() {
        let config = named("ConfigMap", "service-config-7f2kg9h6tc");
        let bundle = sorted(vec![config, named("HTTPRoute", "service")]).unwrap();
        assert_eq!(api::name(&bundle.deployment), "service-0123456789ab");
        assert_eq!(api::name(&bundle.service), "service-0123456789ab");
        let ports = json!([{ "port": 80 }]);
        assert_eq!(bundle.service["spec"]["ports"], ports);
        assert_eq!(bundle.front["spec"]["ports"][0]["nodePort"], 30000);
        assert_eq!(bundle.configs[0]["immutable"], true);
    }

    /// By numbers of pods nothing of a route is split: it is there as the manifests have it.
    #[test]
    fn a_route_that_splits_nothing_is_the_environments() {
        let settings = Settings {
            traffic: TrafficKind::Replicas,
            ..settings()
        };
        let bundle = sorted_by(&settings, vec![named("HTTPRoute", "service")]).unwrap();
        assert!(bundle.route.is_none());
        assert_eq!(api::name(&bundle.others[0]), "service");
    }

    #[test]
    fn what_no_release_can_bring_is_refused() {
        for (objects, why) in [
            (
                vec![named("Secret", "database-v1")],
                "for everybody to read",
            ),
            (
                vec![named("ValidatingAdmissionPolicy", "cost")],
                "is the whole cluster's",
            ),
            (vec![named("ConfigMap", "settings")], "has no hash"),
            (
                vec![named("GRPCRoute", "service")],
                "must have a name of its own, \"service-grpc\"",
            ),
            (
                vec![named("HTTPRoute", "service"), named("HTTPProxy", "service")],
                "HTTPRoute and HTTPProxy are both named",
            ),
        ] {
            let refused = sorted(objects).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
            assert!(refused.starts_with("overlays/production: "), "{refused}");
        }
    }
}
