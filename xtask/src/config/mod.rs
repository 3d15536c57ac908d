//! `config/pipeline.toml`, parsed into types that cannot be wrong. Unknown keys are refused
//! with their line and the nearest known name.

mod names;
mod values;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::cargo;
use crate::cli::{Cli, Command};
pub use names::{nearest, unknown};
#[cfg(feature = "rollout")]
pub use values::Stage;
pub use values::{Probability, Ratio, Replicas, Secret, Stages, Time};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    state_dir: PathBuf,
    pub service: Service,
    #[serde(default)]
    pub smoke: Vec<Smoke>,
    pub environments: BTreeMap<String, Environment>,
    pub rollout: Rollout,
    pub judge: Judge,
    pub scrape: Scrape,
    prometheus: Option<Prometheus>,
    pub kubernetes: Option<Kubernetes>,
    #[serde(default)]
    pub load: Vec<LoadRequest>,
    pub demo: Option<Demo>,
    /// The workspace's root, which relative paths start from.
    #[serde(skip)]
    pub root: PathBuf,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    pub package: String,
    pub binary: String,
    #[serde(default)]
    pub arguments: Vec<String>,
    pub config_dir: PathBuf,
    pub migrations_dir: PathBuf,
    pub ready_path: String,
    pub metrics_path: String,
    pub drain_timeout: Time,
    #[serde(default)]
    pub variables: BTreeMap<String, String>,
}

/// One request whose answer shows that an environment works.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Smoke {
    pub name: String,
    #[serde(default)]
    pub method: Method,
    pub path: String,
    pub body: Option<String>,
    /// A bearer token, where callers must say who they are.
    pub secret: Option<Secret>,
    /// The status wanted; any 2xx unless given.
    pub status: Option<u16>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Method {
    #[default]
    Get,
    Post,
    Put,
    Delete,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    pub platform: PlatformKind,
    pub port: u16,
    pub replicas: Replicas,
    pub promotes_from: Option<String>,
    /// What the platform counts unless given.
    pub metrics: Option<MetricsKind>,
    /// What `[kubernetes]` says, otherwise for this environment.
    #[serde(default)]
    pub kubernetes: KubernetesChanges,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PlatformKind {
    Sandbox,
    Kubernetes,
}

/// Where a rollout's counts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricsKind {
    /// What the platform's proxy saw.
    Proxy,
    /// What the processes say of themselves, in Prometheus' format.
    Scrape,
    /// What a Prometheus, or whatever answers its queries, has of them.
    Prometheus,
}

/// How environments on Kubernetes are reached, and how their traffic is split.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kubernetes {
    /// The context of the user's kubeconfig; the cluster of `cargo xtask cluster` unless given.
    pub context: Option<String>,
    /// The tree of manifests that travels with each release.
    pub manifests: PathBuf,
    /// The directory in it that is rendered; `{environment}` is filled in.
    pub overlay: String,
    pub namespace: String,
    /// The name that the manifests give the service's Deployment, Service and image.
    pub name: String,
    /// Where nodes pull the image from.
    pub repository: String,
    /// Other images in the manifests, by the names that they have there: `REPOSITORY@sha256:…`, or
    /// `cluster` for what the cluster of `cargo xtask cluster` has under that name.
    #[serde(default)]
    pub images: BTreeMap<String, String>,
    /// Secrets that change by themselves, as certificates do: all others have a version in their names,
    /// since a change of one is a release.
    #[serde(default)]
    pub rotated_secrets: Vec<String>,
    pub traffic: TrafficKind,
    /// Where clients reach the environment; each must have one.
    pub address: Option<String>,
    /// The same by gRPC, for an environment that has a GRPCRoute.
    pub grpc_address: Option<String>,
    /// The header in which the gateway names the release that answered.
    pub release_header: Option<String>,
    /// The container's port with the metrics and the readiness.
    pub admin_port: u16,
}

/// For one environment.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KubernetesChanges {
    pub context: Option<String>,
    pub overlay: Option<String>,
    pub namespace: Option<String>,
    pub traffic: Option<TrafficKind>,
    pub address: Option<String>,
    pub grpc_address: Option<String>,
}

/// What splits the traffic between two releases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrafficKind {
    /// The numbers of pods behind one Service.
    Replicas,
    /// The weights of a Gateway API HTTPRoute, and of a GRPCRoute beside it.
    Gateway,
    /// The weights of a Contour HTTPProxy.
    HttpProxy,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollout {
    pub stages: Stages,
    pub min_stage: Time,
    pub max_stage: Time,
    pub max_hold: Time,
    pub ready_within: Time,
    pub window: Time,
    pub warm_up: Time,
    /// How long a replaced release goes on running without traffic; not at all unless given.
    pub keep_previous: Option<Time>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Judge {
    pub alpha: Probability,
    pub beta: Probability,
    /// Relative risk (1.5 = half as much again) that still counts as equal.
    pub margin: Ratio,
    pub tolerance: Probability,
    pub outage: Probability,
    pub latency_floor: Time,
    pub latency_tolerance: Probability,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scrape {
    pub requests: String,
    pub error_label: String,
    pub error_prefix: String,
    pub latency: String,
}

/// A server with Prometheus' query API: Prometheus, Thanos, Mimir, …
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prometheus {
    pub url: String,
    /// How often it scrapes the service.
    pub interval: Time,
    /// How long it may take to answer.
    pub timeout: Time,
    /// Selectors of counters, in PromQL; `{environment}` and `{namespace}` are filled in.
    pub requests: String,
    pub errors: String,
    pub latency: Option<String>,
    /// The label with the release's short id.
    pub release_label: String,
    /// The label that tells its processes apart.
    pub instance_label: String,
    /// Sent with each query, such as a tenant's name.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    pub username: Option<String>,
    /// The user's password; without a user's name, a bearer token.
    pub secret: Option<Secret>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadRequest {
    /// How often this request is sent, against the shares of the others.
    pub share: u32,
    #[serde(default)]
    pub method: Method,
    pub path: String,
    pub body: Option<String>,
    pub capture: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Demo {
    /// What the demo's own copy of these settings has instead in `[rollout]`.
    #[serde(default)]
    pub rollout: toml::Table,
    /// The same for `[judge]`.
    #[serde(default)]
    pub judge: toml::Table,
    pub change: Setting,
    pub mistake: Setting,
}

/// One key of a configuration file and a value for it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    pub file: String,
    pub key: String,
    pub value: toml::Value,
}

impl Pipeline {
    /// Reads `path`, which is relative to the workspace's root.
    pub fn load(path: &Path) -> Result<Self> {
        let root = cargo::root()?;
        let file = root.join(path);
        let text = std::fs::read_to_string(&file).with_context(|| {
            format!(
                "reading {}; name another file with --pipeline",
                file.display()
            )
        })?;
        let mut pipeline = Self::parse(&text).with_context(|| format!("in {}", path.display()))?;
        pipeline.root = root;
        Ok(pipeline)
    }

    fn parse(text: &str) -> Result<Self> {
        let pipeline: Self = toml::from_str(text).map_err(|error| explain(&error))?;
        let mut problems = Vec::new();
        let mut ports = BTreeMap::new();
        for (name, environment) in &pipeline.environments {
            if let Some(other) = ports.insert(environment.port, name) {
                problems.push(format!(
                    "environments.{name}.port = {}: environments.{other} has it too",
                    environment.port
                ));
            }
            if let Some(from) = &environment.promotes_from
                && !pipeline.environments.contains_key(from)
            {
                problems.push(format!(
                    "environments.{name}.promotes_from = {from:?}: there is no such environment"
                ));
            }
        }
        for name in pipeline.environments.keys() {
            problems.extend(pipeline.problems_of(name));
        }
        if problems.is_empty() {
            Ok(pipeline)
        } else {
            bail!("{}", problems.join("\n"))
        }
    }

    /// What does not fit together in an environment's settings.
    fn problems_of(&self, name: &str) -> Option<String> {
        let environment = &self.environments[name];
        match (environment.platform, environment.metrics) {
            (PlatformKind::Kubernetes, Some(MetricsKind::Proxy)) => Some(format!(
                "environments.{name}.metrics = \"proxy\": only the sandbox has a proxy that counts; \
                 take \"scrape\""
            )),
            (_, Some(MetricsKind::Prometheus)) if self.prometheus.is_none() => Some(format!(
                "environments.{name}.metrics = \"prometheus\" needs a section [prometheus]"
            )),
            (PlatformKind::Kubernetes, _) => {
                self.kubernetes(name).err().map(|error| error.to_string())
            }
            (PlatformKind::Sandbox, _) => None,
        }
    }

    /// The environment called `name`, or what there is instead.
    pub fn environment(&self, name: &str) -> Result<&Environment> {
        self.environments.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.environments.keys().map(String::as_str).collect();
            let hint = nearest(name, known.iter().copied())
                .map_or_else(String::new, |nearest| format!(" Did you mean {nearest:?}?"));
            anyhow!(
                "there is no environment {name:?} in the pipeline's settings; there is {}.{hint}",
                known.join(", ")
            )
        })
    }

    /// The settings of an environment on Kubernetes.
    pub fn kubernetes(&self, environment: &str) -> Result<Kubernetes> {
        let changes = self.environment(environment)?.kubernetes.clone();
        let Some(common) = self.kubernetes.clone() else {
            bail!(
                "environments.{environment}.platform = \"kubernetes\" needs a section [kubernetes]"
            );
        };
        let fill = |text: String| text.replace("{environment}", environment);
        let Some(address) = changes.address.or(common.address) else {
            bail!(
                "environments.{environment}.kubernetes.address is missing: where clients reach it"
            );
        };
        let namespace = fill(changes.namespace.unwrap_or(common.namespace));
        if !is_label(&namespace) {
            bail!(
                "kubernetes.namespace is {namespace:?} for {environment}: a namespace's name has at most 63 \
                 lower-case letters, digits and dashes, and {{environment}} is all that is filled in"
            );
        }
        Ok(Kubernetes {
            context: changes.context.or(common.context),
            overlay: fill(changes.overlay.unwrap_or(common.overlay)),
            namespace,
            traffic: changes.traffic.unwrap_or(common.traffic),
            address: Some(fill(address)),
            grpc_address: changes.grpc_address.or(common.grpc_address).map(fill),
            ..common
        })
    }

    pub fn prometheus(&self) -> Result<&Prometheus> {
        let settings = self.prometheus.as_ref();
        settings.context("metrics = \"prometheus\" needs a section [prometheus]")
    }

    /// The tree of manifests that travels with each release, where any environment may need it.
    pub fn manifests_dir(&self) -> Option<PathBuf> {
        let kubernetes = self.kubernetes.as_ref()?;
        Some(self.root.join(&kubernetes.manifests))
    }

    pub fn state_dir(&self) -> PathBuf {
        self.root.join(&self.state_dir)
    }

    /// The file's content with other values: each is a path of keys and what stands there.
    pub fn rewrite(path: &Path, changes: &[(Vec<&str>, toml::Value)]) -> Result<String> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let mut table: toml::Table = text
            .parse()
            .with_context(|| format!("in {}", path.display()))?;
        for (keys, value) in changes {
            let Some((last, sections)) = keys.split_last() else {
                continue;
            };
            let mut section = &mut table;
            for key in sections {
                let entry = section
                    .entry(*key)
                    .or_insert_with(|| toml::Table::new().into());
                section = entry.as_table_mut().with_context(|| {
                    format!(
                        "{}: {} is no section of {}",
                        keys.join("."),
                        key,
                        path.display()
                    )
                })?;
            }
            section.insert((*last).to_owned(), value.clone());
        }
        toml::to_string(&table).context("writing TOML")
    }
}

/// Whether a text is a label of DNS, as names of namespaces must be.
/// <https://kubernetes.io/docs/concepts/overview/working-with-objects/names/#dns-label-names>
fn is_label(text: &str) -> bool {
    let is_allowed = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    (1..=63).contains(&text.len())
        && text.bytes().all(is_allowed)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Whether a command may have to do with Kubernetes, or with what is spoken to over TLS as it is.
/// Settings that cannot be read are reported elsewhere.
pub fn on_kubernetes(cli: &Cli) -> bool {
    if let Command::Demo(args) = &cli.command {
        return args.platform == PlatformKind::Kubernetes;
    }
    Pipeline::load(&cli.pipeline).is_ok_and(|pipeline| {
        let mut environments = pipeline.environments.values();
        environments.any(|environment| {
            environment.platform == PlatformKind::Kubernetes
                || environment.metrics == Some(MetricsKind::Prometheus)
        })
    })
}

/// TOML's message, with the nearest known name for a key that is not known.
fn explain(error: &toml::de::Error) -> anyhow::Error {
    let mut quoted = error.message().split('`').skip(1).step_by(2);
    let unknown = quoted
        .next()
        .filter(|_| error.message().starts_with("unknown"));
    let hint = unknown
        .and_then(|unknown| nearest(unknown, quoted))
        .map_or_else(String::new, |name| format!("did you mean `{name}`?"));
    anyhow!("{error}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped() -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/pipeline.toml");
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn what_ships_can_be_used() {
        Pipeline::parse(&shipped()).unwrap();
    }

    #[test]
    fn wrong_settings_are_explained() {
        let cases = [
            (
                "window = \"1s\"",
                "windw = \"1s\"",
                vec!["windw", "did you mean `window`?", "line "],
            ),
            (
                "stages = [10, 25, 50, 75, 100]",
                "stages = [10, 50, 25, 100]",
                vec!["25 comes after 50", "line "],
            ),
            (
                "stages = [10, 25, 50, 75, 100]",
                "stages = [10, 101]",
                vec!["not 101"],
            ),
            (
                "stages = [10, 25, 50, 75, 100]",
                "stages = [10, 50]",
                vec!["must be 100"],
            ),
            (
                "port = 18081",
                "port = 18080",
                vec!["environments.staging.port", "18080"],
            ),
            (
                "promotes_from = \"staging\"",
                "promotes_from = \"stage\"",
                vec!["\"stage\""],
            ),
            (
                "replicas = 2",
                "replicas = 0",
                vec!["replicas must be 1 to 100", "line "],
            ),
            (
                "alpha = 0.03",
                "alpha = 3",
                vec!["alpha", "between 0 and 1"],
            ),
            (
                "min_stage = \"2s\"",
                "min_stage = \"-2s\"",
                vec!["such as \\\"5s\\\"", "line "],
            ),
            (
                "platform = \"sandbox\"",
                "platform = \"sandpit\"",
                vec!["sandpit", "did you mean `sandbox`?"],
            ),
        ];
        for (right, wrong, wanted) in cases {
            let text = shipped();
            assert!(text.contains(right), "{right}");
            let error = Pipeline::parse(&text.replacen(right, wrong, 1)).unwrap_err();
            let message = format!("{error:?}");
            for part in wanted {
                let part = part.replace("\\\"", "\"");
                assert!(message.contains(&part), "{wrong}: no {part:?} in {message}");
            }
        }
    }

    #[test]
    fn an_unknown_environment_names_the_nearest() {
        let pipeline = Pipeline::parse(&shipped()).unwrap();
        let error = pipeline.environment("prodution").unwrap_err().to_string();
        assert!(error.contains("Did you mean \"production\"?"), "{error}");
    }
}
