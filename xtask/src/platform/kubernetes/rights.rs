//! What whoever rolls out must be allowed to do. It is looked at before anything is begun: a right that is
//! missing in the middle would leave a rollout half done.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::api::{self, Api, Kind};
use super::objects;
use super::render::Bundle;
use crate::config::{Kubernetes as Settings, TrafficKind};

/// A group of the API, a resource of it, verbs.
type Rule = (&'static str, &'static str, &'static [&'static str]);

const ALL: &[&str] = &["get", "create", "patch", "delete"];

/// What every rollout does.
const ALWAYS: [Rule; 14] = [
    ("", "configmaps", ALL),
    ("", "configmaps", &["list"]),
    ("coordination.k8s.io", "leases", &["get", "create", "patch"]),
    ("apps", "deployments", ALL),
    ("apps", "deployments", &["list"]),
    ("apps", "deployments/status", &["patch"]),
    ("", "services", ALL),
    ("autoscaling", "horizontalpodautoscalers", &["get", "list"]),
    ("batch", "jobs", &["list"]),
    ("policy", "poddisruptionbudgets", &["get"]),
    ("", "pods", &["get", "list"]),
    ("", "pods/log", &["get"]),
    ("", "pods/proxy", &["get"]),
    ("", "events", &["create", "list"]),
];
const AUTOSCALER: Rule = ("autoscaling", "horizontalpodautoscalers", ALL);
const BUDGET: Rule = ("policy", "poddisruptionbudgets", ALL);
const JOBS: Rule = ("batch", "jobs", ALL);

const GATEWAY: &str = "gateway.networking.k8s.io";
const ROUTE: &[&str] = &["get", "create", "patch"];

/// A verb on a resource of a group of the API.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    group: String,
    resource: String,
    verb: String,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        match self.group.as_str() {
            "" => Ok(()),
            group => write!(f, ".{group}"),
        }
    }
}

/// Refuses whoever lacks a right that a rollout of `bundle` needs, and names all that are lacking.
pub async fn check(api: &Api, settings: &Settings, bundle: &Bundle) -> Result<()> {
    let Ok(granted) = granted(api).await else {
        // Where nobody may ask, each call shows by itself what it lacks.
        return Ok(());
    };
    let mut lacking = Vec::new();
    for right in needed(settings, bundle)? {
        let is_granted = granted.iter().any(|rule| allows(rule, &right));
        // A list of rules may be incomplete: clouds have others, besides.
        if !is_granted && !is_allowed(api, &right).await.unwrap_or(true) {
            lacking.push(right.to_string());
        }
    }
    if lacking.is_empty() {
        return Ok(());
    }
    bail!(
        "in namespace {} you may not {}, which a rollout needs; k8s/deployer/ has the rights that are needed",
        api.namespace,
        lacking.join(", ")
    )
}

fn needed(settings: &Settings, bundle: &Bundle) -> Result<BTreeSet<Right>> {
    let mut rules = ALWAYS.to_vec();
    rules.extend(bundle.autoscaler.is_some().then_some(AUTOSCALER));
    rules.extend(bundle.budget.is_some().then_some(BUDGET));
    rules.extend((!bundle.jobs.is_empty()).then_some(JOBS));
    match settings.traffic {
        TrafficKind::Replicas => {}
        TrafficKind::HttpProxy => rules.push(("projectcontour.io", "httpproxies", ROUTE)),
        TrafficKind::Gateway => {
            rules.push((GATEWAY, "httproutes", ROUTE));
            // One that a release before has brought is looked for in any case.
            let grpc = bundle.grpc_route.as_ref().map_or(&["get"][..], |_| ALL);
            rules.push((GATEWAY, "grpcroutes", grpc));
        }
    }
    let mut rights = BTreeSet::new();
    for (group, resource, verbs) in rules {
        rights.extend(verbs.iter().map(|verb| right(group, resource, verb)));
    }
    for object in &bundle.others {
        let kind = Kind::of(object)?;
        let verbs = match objects::is_removable(object) {
            true => ALL,
            false => ROUTE,
        };
        let (group, resource) = (kind.group(), kind.plural());
        rights.extend(verbs.iter().map(|verb| right(group, &resource, verb)));
    }
    Ok(rights)
}

fn right(group: &str, resource: &str, verb: &str) -> Right {
    Right {
        group: group.to_owned(),
        resource: resource.to_owned(),
        verb: verb.to_owned(),
    }
}

/// The rules that the API server knows to hold for whoever asks.
/// <https://kubernetes.io/docs/reference/kubernetes-api/authorization-resources/self-subject-rules-review-v1/>
async fn granted(api: &Api) -> Result<Vec<Value>> {
    let spec = json!({ "namespace": api.namespace });
    let review = api.review("SelfSubjectRulesReview", spec).await?;
    Ok(api::items(&review["status"]["resourceRules"])
        .cloned()
        .collect())
}

fn allows(rule: &Value, right: &Right) -> bool {
    let has =
        |part: &str, wanted: &str| api::items(&rule[part]).any(|one| one == wanted || one == "*");
    // One that is for single objects says nothing of others.
    api::items(&rule["resourceNames"]).next().is_none()
        && has("verbs", &right.verb)
        && has("apiGroups", &right.group)
        && has("resources", &right.resource)
}

/// Whether the API server would let whoever asks do it.
/// <https://kubernetes.io/docs/reference/kubernetes-api/authorization-resources/self-subject-access-review-v1/>
async fn is_allowed(api: &Api, right: &Right) -> Result<bool> {
    let (resource, sub) = right
        .resource
        .split_once('/')
        .unwrap_or((&right.resource, ""));
    let spec = json!({ "resourceAttributes": {
        "namespace": api.namespace, "verb": right.verb, "group": right.group,
        "resource": resource, "subresource": sub,
    } });
    let review = api.review("SelfSubjectAccessReview", spec).await?;
    Ok(review["status"]["allowed"] == true)
}

#[cfg(test)]
mod tests {
    use super::super::render::tests::{named, settings, sorted};
    use super::*;

    /// The rules of the role that ships.
    fn shipped() -> Vec<Value> {
        let text = include_str!("../../../../k8s/deployer/role.yaml");
        let objects: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
        let role = objects.iter().find(|object| object["kind"] == "Role");
        api::items(&role.unwrap()["rules"]).cloned().collect()
    }

    #[test]
    fn the_role_that_ships_is_what_is_asked_for() {
        let of = |api_version: &str, kind: &str, name: &str| {
            let mut object = named(kind, name);
            object["apiVersion"] = json!(api_version);
            object
        };
        let bundle = sorted(vec![
            of("v1", "ServiceAccount", "service"),
            of("networking.k8s.io/v1", "NetworkPolicy", "service"),
            of("policy/v1", "PodDisruptionBudget", "service"),
            of("autoscaling/v2", "HorizontalPodAutoscaler", "service"),
            of("batch/v1", "Job", "service-migrate"),
            of("gateway.networking.k8s.io/v1", "HTTPRoute", "service"),
            of("gateway.networking.k8s.io/v1", "GRPCRoute", "service-grpc"),
        ]);
        let needed = needed(&settings(), &bundle.unwrap()).unwrap();
        let shipped = shipped();
        let lacking: Vec<&Right> = needed
            .iter()
            .filter(|right| !shipped.iter().any(|rule| allows(rule, right)))
            .collect();
        assert!(lacking.is_empty(), "{lacking:?}");
        let granted: usize = shipped
            .iter()
            .map(|rule| {
                let count = |part: &str| api::items(&rule[part]).count();
                count("verbs") * count("resources")
            })
            .sum();
        assert_eq!(needed.len(), granted);
    }

    #[test]
    fn a_rule_for_single_objects_is_none_for_all() {
        let right = right("apps", "deployments", "patch");
        let rule = |names: Value| {
            json!({
                "apiGroups": ["apps"], "resources": ["*"], "verbs": ["patch"], "resourceNames": names,
            })
        };
        assert!(allows(&rule(Value::Null), &right));
        assert!(!allows(&rule(json!(["service"])), &right));
    }
}
