//! Routes with weighted backends, whatever their kind.
//!
//! A router learns of backends and of routes on separate ways. Where a route names a backend that
//! the router has not heard of yet, or has forgotten already, requests fail. So a backend is first
//! introduced without any traffic, and asked by a rule of its own until it answers; and one that
//! loses its traffic stays in the route with weight 0 until the next change.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::effect::{Asking, PROBE_HEADER, Sign};
use super::{Known, Traffic, Weights, point};
use crate::config::{Kubernetes as Settings, Service};
use crate::platform::kubernetes::api::{self, Api, Kind};
use crate::platform::kubernetes::fence::Fence;
use crate::platform::kubernetes::objects;
use crate::platform::kubernetes::render::{Bundle, grpc_route_name};

/// How long a router may take to say that it has taken a route.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);

/// What is particular to a kind of route.
pub trait Shape: Send + Sync {
    fn kind(&self) -> Kind;

    /// The kind for calls by gRPC, which may be split beside the other.
    fn grpc_kind(&self) -> Option<Kind> {
        None
    }

    /// How many rules a route may have.
    fn most_rules(&self) -> usize {
        usize::MAX
    }

    /// Below `spec`: the list of rules, and in a rule the list of backends.
    fn fields(&self) -> (&'static str, &'static str);

    /// Lets the answers of a rule, or of one of its backends, carry a header.
    fn mark(&self, part: &mut Value, header: &str, value: &str);

    /// Lets a rule only match requests with this header.
    fn restrict(&self, rule: &mut Value, header: &str, value: &str);

    /// Whether the router has taken this generation of the route, or why it does not.
    fn taken(&self, route: &Value, generation: u64) -> Taken;
}

pub enum Taken {
    Yes,
    NotYet,
    /// So far it refuses; what it lacks may come yet.
    Refused(String),
}

pub struct Weighted<S> {
    pub shape: S,
    pub settings: Settings,
    pub service: Service,
}

/// A backend of ours in a route: the short id of its release, and its weight.
type Backend = (String, u64);

/// A rule that leads to one release, and that only we know how to ask. What it answers shows that
/// this very version of the route is in effect.
struct Probe<'a> {
    short: &'a str,
    secret: &'a str,
}

/// A route that is to be changed.
struct Way {
    /// As the manifests have it.
    manifest: Value,
    /// The backends that it has now.
    present: Vec<Backend>,
    is_grpc: bool,
}

impl Way {
    fn serves_any(&self) -> bool {
        self.present.iter().any(|(_, weight)| *weight > 0)
    }

    /// One that got no traffic so far may be unknown to the router, even if it is in the route.
    fn serves(&self, short: &str) -> bool {
        let mut backends = self.present.iter();
        backends.any(|(other, weight)| other == short && *weight > 0)
    }
}

impl<S: Shape> Weighted<S> {
    /// The routes that a release's manifests have.
    async fn ways(&self, api: &Api, bundle: &Bundle) -> Result<Vec<Way>> {
        let mut ways = Vec::new();
        for manifest in [&bundle.route, &bundle.grpc_route].into_iter().flatten() {
            let kind = Kind::of(manifest)?;
            let current = api.get(&kind, api::name(manifest)).await?;
            let is_grpc = Some(&kind) == self.shape.grpc_kind().as_ref();
            ways.push(Way {
                // Where a release comes to nothing, what only it has brought along goes with it.
                manifest: match is_grpc {
                    true => objects::noted(manifest, current.as_ref(), &bundle.id),
                    false => manifest.clone(),
                },
                present: current.map_or_else(Vec::new, |route| self.backends(&route)),
                is_grpc,
            });
        }
        Ok(ways)
    }

    /// The backends of the first rule that leads to releases.
    fn backends(&self, route: &Value) -> Vec<Backend> {
        let (rules, backends) = self.shape.fields();
        let prefix = format!("{}-", self.settings.name);
        let ours = |rule: &Value| -> Vec<Backend> {
            api::items(&rule[backends])
                .filter_map(|backend| {
                    let short = backend["name"].as_str()?.strip_prefix(&prefix)?;
                    Some((short.to_owned(), backend["weight"].as_u64().unwrap_or(1)))
                })
                .collect()
        };
        api::items(&route["spec"][rules])
            .map(ours)
            .find(|backends| !backends.is_empty())
            .unwrap_or_default()
    }

    /// The route of the manifests with these backends, and a rule to probe it by.
    fn wanted(&self, route: &Value, split: &[Backend], probe: Option<&Probe<'_>>) -> Result<Value> {
        let (rules, backends) = self.shape.fields();
        let name = self.settings.name.as_str();
        let mut wanted = route.clone();
        let mut probes = Vec::new();
        let mut ours = 0;
        for rule in wanted["spec"][rules].as_array_mut().into_iter().flatten() {
            let like = api::items(&rule[backends])
                .find(|backend| backend["name"] == name)
                .cloned();
            // A rule that leads elsewhere is none of a rollout's business.
            let Some(like) = like else { continue };
            if api::items(&rule[backends]).count() > 1 {
                bail!(
                    "{}: a rule of the {} {} leads to the Service {name} and to others, too; a rollout \
                     has the weights of its rules to itself",
                    self.settings.overlay,
                    kind_of(route),
                    api::name(route)
                );
            }
            ours += 1;
            let backend = |short: &str, weight: u64| {
                let mut backend = like.clone();
                backend["name"] = json!(format!("{name}-{short}"));
                backend["weight"] = json!(weight);
                if let Some(header) = &self.settings.release_header {
                    self.shape.mark(&mut backend, header, short);
                }
                backend
            };
            if let Some(Probe { short, secret }) = probe {
                let mut own = rule.clone();
                own[backends] = json!([backend(short, 100)]);
                self.shape.restrict(&mut own, PROBE_HEADER, secret);
                self.shape.mark(&mut own, PROBE_HEADER, secret);
                probes.push(own);
            }
            rule[backends] = split
                .iter()
                .map(|(short, weight)| backend(short, *weight))
                .collect();
        }
        if ours == 0 {
            bail!(
                "{}: no rule of the {} {} leads to the Service {name}",
                self.settings.overlay,
                kind_of(route),
                api::name(route)
            );
        }
        if let Some(rules) = wanted["spec"][rules].as_array_mut() {
            rules.extend(probes);
            let most = self.shape.most_rules();
            if rules.len() > most {
                bail!(
                    "{}: the {} {} has too many rules: a rollout adds one for each of the {ours} that \
                     lead to the Service {name}, and {most} is as many as there may be",
                    self.settings.overlay,
                    kind_of(route),
                    api::name(route)
                );
            }
        }
        Ok(wanted)
    }

    /// Applies the route and waits until it is taken; what was taken over is told.
    async fn apply(
        &self,
        fence: &Fence<'_>,
        wanted: &Value,
        weights: &Weights,
    ) -> Result<Option<String>> {
        let (applied, taken_over) = super::apply(fence, wanted, weights).await?;
        let generation = applied["metadata"]["generation"].as_u64().unwrap_or(0);
        let kind = Kind::of(wanted)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let route = fence.api.get(&kind, api::name(wanted)).await?;
            let route = route.context("the route is gone")?;
            let taken = self.shape.taken(&route, generation);
            if matches!(taken, Taken::Yes) {
                return Ok(taken_over);
            }
            if Instant::now() > deadline {
                match taken {
                    Taken::Refused(why) => {
                        bail!("the route {} is refused: {why}", api::name(wanted))
                    }
                    _ => bail!(
                        "no router has taken the route {} within {} s: is there the one that it \
                         names, and is its controller running?",
                        api::name(wanted),
                        PATIENCE.as_secs()
                    ),
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until a way is in effect: a router that says it has taken a route may yet act on the one
    /// before.
    async fn see(&self, way: &Way, sign: Sign<'_>) -> Result<()> {
        let asking = match way.is_grpc {
            true => Asking::by_grpc(self.settings.grpc_address.as_deref().unwrap_or_default()),
            false => {
                let address = self.settings.address.as_deref().unwrap_or_default();
                Asking::by_http(&format!("{address}{}", self.service.ready_path))
            }
        };
        asking?.until(sign).await
    }
}

#[async_trait]
impl<S: Shape> Traffic for Weighted<S> {
    async fn weights(&self, api: &Api, known: &Known) -> Result<Weights> {
        let route = api.get(&self.shape.kind(), &self.settings.name).await?;
        let Some(route) = route else {
            return Ok(Vec::new());
        };
        let backends = self.backends(&route);
        let sum: u64 = backends.iter().map(|(_, weight)| weight).sum();
        Ok(backends
            .into_iter()
            .filter(|(_, weight)| *weight > 0)
            .filter_map(|(short, weight)| {
                let percent = (weight * 100 + sum / 2) / sum;
                let release = known.get(&short)?.clone();
                Some((release, u8::try_from(percent).unwrap_or(100)))
            })
            .collect())
    }

    async fn route(
        &self,
        fence: &Fence<'_>,
        bundle: &Bundle,
        front: &Value,
        weights: &Weights,
    ) -> Result<Option<String>> {
        let ways = self.ways(fence.api, bundle).await?;
        let split: Vec<Backend> = weights
            .iter()
            .map(|(release, weight)| (release.short().to_owned(), u64::from(*weight)))
            .collect();
        for way in ways.iter().filter(|way| way.serves_any()) {
            for (short, _) in split.iter().filter(|(short, _)| !way.serves(short)) {
                let mut introduced: Vec<Backend> = way.present.clone();
                introduced.retain(|(_, weight)| *weight > 0);
                introduced.push((short.clone(), 0));
                let secret = format!("{short}-{}", fence.token);
                let probe = Probe {
                    short,
                    secret: &secret,
                };
                let wanted = self.wanted(&way.manifest, &introduced, Some(&probe))?;
                self.apply(fence, &wanted, weights).await?;
                self.see(way, Sign::Probe(&secret)).await?;
            }
        }
        // Those are ready by now; whoever is killed after the next write need not come back to this.
        let mut taken_over = Vec::from_iter(point(fence, front, weights).await?);
        let releases: Vec<&str> = split.iter().map(|(short, _)| short.as_str()).collect();
        for way in &ways {
            let mut split = split.clone();
            for (short, weight) in &way.present {
                // What nobody gets requests from any more may go; what loses them just now stays.
                if *weight > 0 && !releases.contains(&short.as_str()) {
                    split.push((short.clone(), 0));
                }
            }
            // It has a rule of its own to be seen by: between two splits of the same releases, no other
            // answer tells which one is in effect.
            let secret = format!("{}-{}", fence.token, json!(split));
            let secret: String = secret
                .chars()
                .filter(|c| c.is_ascii_alphanumeric())
                .collect();
            let probe = releases.last().map(|short| Probe {
                short,
                secret: &secret,
            });
            let wanted = self.wanted(&way.manifest, &split, probe.as_ref())?;
            taken_over.extend(self.apply(fence, &wanted, weights).await?);
            if !weights.is_empty() {
                self.see(way, Sign::Probe(&secret)).await?;
                if let Some(header) = &self.settings.release_header {
                    let releases = &releases;
                    self.see(way, Sign::Releases { header, releases }).await?;
                }
            }
        }
        Ok((!taken_over.is_empty()).then(|| taken_over.join("; ")))
    }

    async fn settle(&self, fence: &Fence<'_>, stable: &Bundle) -> Result<()> {
        for way in self.ways(fence.api, stable).await? {
            if !way.present.is_empty() {
                let wanted = self.wanted(&way.manifest, &way.present, None)?;
                self.apply(fence, &wanted, &Vec::new()).await?;
            }
        }
        Ok(())
    }

    fn check(&self, bundle: &Bundle) -> Result<()> {
        let (settings, kind) = (&self.settings, self.shape.kind());
        let kind_of = |route: &Option<Value>| route.as_ref().map(Kind::of).transpose();
        if kind_of(&bundle.route)?.as_ref() != Some(&kind) {
            bail!(
                "{} renders no {} named {:?}, which kubernetes.traffic asks for",
                settings.overlay,
                kind.kind,
                settings.name
            );
        }
        if let Some(grpc) = kind_of(&bundle.grpc_route)? {
            if Some(&grpc) != self.shape.grpc_kind().as_ref() {
                bail!(
                    "{}: beside a {} nothing splits the {} {:?}",
                    settings.overlay,
                    kind.kind,
                    grpc.kind,
                    grpc_route_name(settings)
                );
            }
            if settings.grpc_address.is_none() {
                bail!(
                    "{} renders the {} {:?}, and kubernetes.grpc_address is missing: where clients reach it",
                    settings.overlay,
                    grpc.kind,
                    grpc_route_name(settings)
                );
            }
        }
        let probe = Probe {
            short: bundle.id.short(),
            secret: "0",
        };
        let split = [(bundle.id.short().to_owned(), 100)];
        for route in [&bundle.route, &bundle.grpc_route].into_iter().flatten() {
            self.wanted(route, &split, Some(&probe))?;
        }
        Ok(())
    }

    fn objects(&self) -> Vec<(Kind, String)> {
        let name = &self.settings.name;
        let mut objects = vec![
            (self.shape.kind(), name.clone()),
            (Kind::new("v1", "Service"), name.clone()),
        ];
        let grpc = self.shape.grpc_kind().into_iter();
        objects.extend(grpc.map(|kind| (kind, grpc_route_name(&self.settings))));
        objects
    }
}

fn kind_of(route: &Value) -> &str {
    route["kind"].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::gateway::Gateway;
    use super::*;
    use crate::platform::kubernetes::render::tests::{named, settings, sorted};

    fn weighted(grpc_address: Option<&str>) -> Weighted<Gateway> {
        let service = toml::from_str(
            r#"
            package = "service"
            binary = "service"
            config_dir = ""
            migrations_dir = ""
            ready_path = "/ready"
            metrics_path = "/metrics"
            drain_timeout = "1s"
            "#,
        );
        Weighted {
            shape: Gateway,
            settings: Settings {
                grpc_address: grpc_address.map(str::to_owned),
                ..settings()
            },
            service: service.unwrap(),
        }
    }

    /// A route of so many rules, each to these Services.
    fn route(kind: &str, rules: usize, services: &[&str]) -> Value {
        let name = match kind {
            "GRPCRoute" => "service-grpc",
            _ => "service",
        };
        let mut route = named(kind, name);
        route["apiVersion"] = json!("gateway.networking.k8s.io/v1");
        let services = services
            .iter()
            .map(|name| json!({ "name": name, "port": 80 }));
        let rule = json!({ "backendRefs": services.collect::<Vec<_>>() });
        route["spec"]["rules"] = vec![rule; rules].into();
        route
    }

    #[test]
    fn what_cannot_be_split_is_refused_before_anything_changes() {
        let http = route("HTTPRoute", 1, &["service"]);
        let grpc = route("GRPCRoute", 1, &["service"]);
        for (routes, address, why) in [
            (vec![], None, "renders no HTTPRoute named \"service\""),
            (
                vec![grpc.clone()],
                Some("http://grpc"),
                "renders no HTTPRoute",
            ),
            (
                vec![http.clone(), grpc.clone()],
                None,
                "kubernetes.grpc_address is missing",
            ),
            (
                vec![route("HTTPRoute", 1, &["other"])],
                None,
                "no rule of the HTTPRoute service leads to the Service service",
            ),
            (
                vec![route("HTTPRoute", 1, &["service", "other"])],
                None,
                "leads to the Service service and to others, too",
            ),
            (
                vec![route("HTTPRoute", 9, &["service"])],
                None,
                "too many rules",
            ),
        ] {
            let bundle = sorted(routes).unwrap();
            let refused = weighted(address).check(&bundle).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
            assert!(refused.starts_with("overlays/production"), "{refused}");
        }
        let bundle = sorted(vec![http, grpc]).unwrap();
        weighted(Some("http://grpc")).check(&bundle).unwrap();
        let bundle = sorted(vec![route("HTTPRoute", 8, &["service"])]).unwrap();
        weighted(None).check(&bundle).unwrap();
    }

    #[test]
    fn a_split_has_a_rule_to_be_seen_by() {
        let settings = Settings {
            release_header: Some("x-release".to_owned()),
            ..settings()
        };
        let weighted = Weighted {
            settings,
            ..weighted(None)
        };
        let split = [("one".to_owned(), 90), ("two".to_owned(), 10)];
        let probe = Probe {
            short: "two",
            secret: "s",
        };
        let manifest = route("HTTPRoute", 1, &["service"]);
        let wanted = weighted.wanted(&manifest, &split, Some(&probe)).unwrap();
        let rules = &wanted["spec"]["rules"];
        assert_eq!(weighted.backends(&wanted), split);
        assert_eq!(rules[0]["matches"], Value::Null);
        assert_eq!(rules[1]["backendRefs"][0]["name"], "service-two");
        let header = json!([{ "name": PROBE_HEADER, "value": "s" }]);
        assert_eq!(rules[1]["matches"], json!([{ "headers": header }]));
        assert_eq!(
            rules[1]["filters"][0]["responseHeaderModifier"]["set"],
            header
        );
        assert_eq!(rules[2], Value::Null);
    }
}
