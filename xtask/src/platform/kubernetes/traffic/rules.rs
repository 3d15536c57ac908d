//! The rules of routes: what a rollout makes of those that the manifests have.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::Bundles;
use super::effect::{PROBE_HEADER, Protocol};
use super::weighted::{Shape, Weighted};
use crate::platform::kubernetes::api::{self, Kind};
use crate::release::ReleaseId;

/// A backend of ours in a route: the short id of its release, and its weight.
pub type Backend = (String, u64);

/// A rule that leads to one release, and that only we know how to ask. What it answers shows that
/// this very version of the route is in effect.
pub struct Probe<'a> {
    pub short: &'a str,
    pub secret: &'a str,
}

impl<S: Shape> Weighted<S> {
    /// The backends of the first rule that leads to releases.
    pub fn backends(&self, route: &Value) -> Vec<Backend> {
        let (rules, backends) = self.shape.fields();
        let prefix = format!("{}-", self.settings.name);
        let ours = |rule: &Value| -> Vec<Backend> {
            api::items(&rule[backends])
                .filter_map(|backend| {
                    let short = backend["name"].as_str()?.strip_prefix(&prefix)?;
                    // Another Service's name may begin like ours.
                    ReleaseId::is_short(short).then_some(())?;
                    Some((short.to_owned(), backend["weight"].as_u64().unwrap_or(1)))
                })
                .collect()
        };
        api::items(&route["spec"][rules])
            .map(ours)
            .find(|backends| !backends.is_empty())
            .unwrap_or_default()
    }

    /// The rules of a route that lead to the service.
    pub fn ours<'a>(&self, route: &'a Value) -> impl Iterator<Item = &'a Value> {
        let (rules, backends) = self.shape.fields();
        let name = self.settings.name.clone();
        api::items(&route["spec"][rules])
            .filter(move |rule| api::items(&rule[backends]).any(|backend| backend["name"] == name))
    }

    /// Whether a route has room for the rules to probe it by.
    pub fn has_room(&self, route: &Value) -> bool {
        let all = api::items(&route["spec"][self.shape.fields().0]).count();
        all + self.ours(route).count() <= self.shape.most_rules()
    }

    /// The route of the manifests with these backends, and rules to probe it by where there is room.
    pub fn wanted(
        &self,
        route: &Value,
        split: &[Backend],
        probe: Option<&Probe<'_>>,
        bundles: &Bundles,
    ) -> Value {
        let (rules, backends) = self.shape.fields();
        let name = self.settings.name.as_str();
        let probe = probe.filter(|_| self.has_room(route));
        let by = Kind::of(route).ok().and_then(|kind| self.protocol(&kind));
        let by = by.unwrap_or(Protocol::Http);
        let mut wanted = route.clone();
        let mut probes = Vec::new();
        for rule in wanted["spec"][rules].as_array_mut().into_iter().flatten() {
            let like = api::items(&rule[backends])
                .find(|backend| backend["name"] == name)
                .cloned();
            // A rule that leads elsewhere is none of a rollout's business.
            let Some(like) = like else { continue };
            let backend = |short: &str, weight: u64| {
                let mut backend = like.clone();
                backend["name"] = json!(format!("{name}-{short}"));
                backend["weight"] = json!(weight);
                backend["port"] = self.port(short, &like["port"], by, bundles)?;
                if let Some(header) = &self.settings.release_header {
                    self.shape.mark(&mut backend, header, short);
                }
                Some(backend)
            };
            if let Some(Probe { short, secret }) = probe
                && let Some(backend) = backend(short, 100)
            {
                // Nothing else of the rule: what rewrites a path, say, needs the path that it matches.
                let mut own = json!({ backends: [backend] });
                let place = by.place_of_probe(probes.len());
                self.shape
                    .restrict(&mut own, by, &place, PROBE_HEADER, secret);
                if self.can_mark(by) {
                    self.shape.mark(&mut own, PROBE_HEADER, secret);
                }
                probes.push(own);
            }
            rule[backends] = split
                .iter()
                .filter_map(|(short, weight)| backend(short, *weight))
                .collect();
        }
        if let Some(rules) = wanted["spec"][rules].as_array_mut() {
            rules.extend(probes);
        }
        wanted
    }

    /// By which port a release gets what a route sends to `wanted`. One whose Service has no such port gets it
    /// as its own manifests say; and nothing where they know of none, as what is new is only in the other.
    fn port(&self, short: &str, wanted: &Value, by: Protocol, bundles: &Bundles) -> Option<Value> {
        let bundle = bundles.iter().find(|(id, _)| id.short() == short);
        let Some((_, bundle)) = bundle else {
            return Some(wanted.clone());
        };
        if api::items(&bundle.service["spec"]["ports"]).any(|port| port["port"] == *wanted) {
            return Some(wanted.clone());
        }
        let route = match by {
            Protocol::Http => bundle.route.as_ref(),
            Protocol::Grpc => bundle.grpc_route.as_ref(),
        };
        let backends = self.shape.fields().1;
        let mut own = api::items(&self.ours(route?).next()?[backends]);
        own.find(|backend| backend["name"] == self.settings.name)
            .map(|backend| backend["port"].clone())
    }

    /// Refuses rules that a rollout could not split.
    pub fn check_rules(&self, route: &Value) -> Result<()> {
        let (service, overlay) = (&self.settings.name, &self.settings.overlay);
        let (kind, name) = (kind_of(route), api::name(route));
        let backends = self.shape.fields().1;
        if self.ours(route).next().is_none() {
            bail!("{overlay}: no rule of the {kind} {name} leads to the Service {service}");
        }
        if self
            .ours(route)
            .any(|rule| api::items(&rule[backends]).count() > 1)
        {
            bail!(
                "{overlay}: a rule of the {kind} {name} leads to the Service {service} and to others, too; a \
                 rollout has the weights of its rules to itself"
            );
        }
        if !self.has_room(route) {
            bail!(
                "{overlay}: the {kind} {name} has too many rules: a rollout adds one for each that leads to \
                 the Service {service}, and {} is as many as there may be",
                self.shape.most_rules()
            );
        }
        Ok(())
    }
}

pub fn kind_of(route: &Value) -> &str {
    route["kind"].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::Traffic;
    use super::super::gateway::Gateway;
    use super::*;
    use crate::config::Kubernetes as Settings;
    use crate::platform::kubernetes::render::Bundle;
    use crate::platform::kubernetes::render::tests::{named, settings, sorted};

    fn weighted(grpc_address: Option<&str>) -> Weighted<Gateway> {
        Weighted {
            shape: Gateway,
            settings: Settings {
                grpc_address: grpc_address.map(str::to_owned),
                ..settings()
            },
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
        let split = [
            ("aaaaaaaaaaaa".to_owned(), 90),
            ("bbbbbbbbbbbb".to_owned(), 10),
        ];
        let probe = Probe {
            short: "bbbbbbbbbbbb",
            secret: "s",
        };
        let manifest = route("HTTPRoute", 1, &["service"]);
        let wanted = weighted.wanted(&manifest, &split, Some(&probe), &Bundles::new());
        let rules = &wanted["spec"]["rules"];
        assert_eq!(weighted.backends(&wanted), split);
        assert_eq!(rules[0]["matches"], Value::Null);
        assert_eq!(rules[1]["backendRefs"][0]["name"], "service-bbbbbbbbbbbb");
        let header = json!([{ "name": PROBE_HEADER, "value": "s" }]);
        let path = json!({ "type": "Exact", "value": "/xtask-probe/0" });
        assert_eq!(
            rules[1]["matches"],
            json!([{ "headers": header, "path": path }])
        );
        assert_eq!(
            rules[1]["filters"][0]["responseHeaderModifier"]["set"],
            header
        );
        assert_eq!(rules[2], Value::Null);
        // One that was kept from before this was refused goes back without.
        let full = route("HTTPRoute", 9, &["service", "other"]);
        let wanted = weighted.wanted(&full, &split, Some(&probe), &Bundles::new());
        let rules: Vec<&Value> = api::items(&wanted["spec"]["rules"]).collect();
        assert_eq!(rules.len(), 9);
        assert_eq!(rules[8]["backendRefs"][1]["name"], "service-bbbbbbbbbbbb");
    }

    /// A rule before ours may lead to a Service whose name begins as ours does.
    #[test]
    fn what_leads_to_another_service_is_no_split() {
        let mut manifest = route("HTTPRoute", 2, &["service"]);
        manifest["spec"]["rules"][0]["backendRefs"][0]["name"] = json!("service-admin");
        let weighted = weighted(None);
        assert_eq!(weighted.backends(&manifest), []);
        let split = [("aaaaaaaaaaaa".to_owned(), 100)];
        let wanted = weighted.wanted(&manifest, &split, None, &Bundles::new());
        assert_eq!(weighted.backends(&wanted), split);
        let rules = &wanted["spec"]["rules"];
        assert_eq!(rules[0]["backendRefs"][0]["name"], "service-admin");
    }

    /// Calls by gRPC come by a port of their own that the release before did not have.
    #[test]
    fn what_only_one_release_has_leads_to_it_alone() {
        let manifest = |port: u16, has_grpc: bool| {
            let mut grpc = route("GRPCRoute", 1, &["service"]);
            grpc["spec"]["rules"][0]["backendRefs"][0]["port"] = json!(port);
            let mut bundle =
                sorted([has_grpc.then_some(grpc)].into_iter().flatten().collect()).unwrap();
            bundle.service["spec"]["ports"] = json!([{ "port": 80 }, { "port": port }]);
            bundle
        };
        let split = [
            ("aaaaaaaaaaaa".to_owned(), 90),
            ("bbbbbbbbbbbb".to_owned(), 10),
        ];
        let between = |stable: Bundle, candidate: Bundle| {
            let wanted = candidate.grpc_route.clone().unwrap();
            let bundles = Bundles::from([
                (split[0].0.as_str().into(), stable),
                (split[1].0.as_str().into(), candidate),
            ]);
            let wanted = weighted(Some("http://grpc")).wanted(&wanted, &split, None, &bundles);
            let backends = api::items(&wanted["spec"]["rules"][0]["backendRefs"]);
            backends
                .map(|backend| (backend["weight"].as_u64(), backend["port"].as_u64()))
                .collect::<Vec<_>>()
        };
        let both = [(Some(90), Some(50051)), (Some(10), Some(50051))];
        assert_eq!(between(manifest(50051, true), manifest(50051, true)), both);
        let each_its_own = [(Some(90), Some(80)), (Some(10), Some(50051))];
        assert_eq!(
            between(manifest(80, true), manifest(50051, true)),
            each_its_own
        );
        let only_new = [(Some(10), Some(50051))];
        assert_eq!(
            between(manifest(80, false), manifest(50051, true)),
            only_new
        );
    }
}
