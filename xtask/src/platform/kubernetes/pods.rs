//! What the pods of a release are doing, and what will not heal by waiting.

use anyhow::{Context, Result};
use serde_json::Value;

use super::api::{self, Api, Kind};
use crate::platform::InstanceStatus;

/// What the kubelet and its runtime call states that end only when somebody changes something.
/// <https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#container-states>
const HOPELESS: [&str; 8] = [
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ImageInspectError",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
];
/// A scheduler that has found no place for so long, in seconds, waits for somebody: what makes nodes has said by
/// then that it does.
const UNSCHEDULABLE: i64 = 30;

/// What says of a pod without a place that a node is being made for it: Kubernetes' autoscaler and Karpenter.
/// <https://github.com/kubernetes/autoscaler/blob/master/cluster-autoscaler/FAQ.md>,
/// <https://karpenter.sh/docs/troubleshooting/>
const NODE_COMES: [&str; 2] = ["TriggeredScaleUp", "Nominated"];
/// What says that none is.
const NO_NODE_COMES: &str = "NotTriggerScaleUp";

/// A Secret may come from somewhere else: what brings it has so long after the pod, in seconds.
const BRINGING: i64 = 10;

/// A job without a pod for so long, in seconds, is not being started at this moment.
const REFUSED: i64 = 5;

pub fn kind() -> Kind {
    Kind::new("v1", "Pod")
}

/// Whether the pod is on its way out: it gets no new requests, and counts for nothing.
pub fn is_going(pod: &Value) -> bool {
    !pod["metadata"]["deletionTimestamp"].is_null()
        || matches!(
            pod["status"]["phase"].as_str(),
            Some("Failed" | "Succeeded")
        )
}

fn condition<'a>(object: &'a Value, name: &str) -> Option<&'a Value> {
    api::items(&object["status"]["conditions"]).find(|condition| condition["type"] == name)
}

fn is(object: &Value, name: &str, status: &str) -> bool {
    condition(object, name).is_some_and(|condition| condition["status"] == status)
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    api::items(&pod["status"]["initContainerStatuses"])
        .chain(api::items(&pod["status"]["containerStatuses"]))
}

/// How many of a release's pods count, where one has to be ready for a while before it does: the API server's
/// clock says for how long it was.
/// <https://kubernetes.io/docs/concepts/workloads/controllers/deployment/#min-ready-seconds>
pub fn available(deployment: &Value) -> Option<u32> {
    deployment["spec"]["minReadySeconds"]
        .as_u64()
        .filter(|seconds| *seconds > 0)?;
    let available = deployment["status"]["availableReplicas"]
        .as_u64()
        .unwrap_or(0);
    u32::try_from(available).ok()
}

pub fn instance(pod: &Value) -> InstanceStatus {
    let ready = is(pod, "Ready", "True");
    let waiting =
        containers(pod).find_map(|container| container["state"]["waiting"]["reason"].as_str());
    let phase = pod["status"]["phase"].as_str().unwrap_or("Unknown");
    let restarts: u64 = containers(pod)
        .filter_map(|container| container["restartCount"].as_u64())
        .sum();
    InstanceStatus {
        name: api::name(pod).to_owned(),
        ready,
        state: match (ready, waiting) {
            (true, _) => "ready".to_owned(),
            (false, Some(waiting)) => waiting.to_owned(),
            (false, None) => phase.to_lowercase(),
        },
        pid: None,
        admin: None,
        restarts: u32::try_from(restarts).unwrap_or(u32::MAX),
        in_flight: 0,
    }
}

/// Why the release will not get ready by waiting, and the pod that shows it.
pub fn broken(
    deployment: &Value,
    pods: &[&Value],
    has_traffic: bool,
) -> Option<(String, Option<String>)> {
    for pod in pods {
        if let Some(why) = pod_broken(pod) {
            return Some((why, Some(api::name(pod).to_owned())));
        }
    }
    if has_traffic {
        return None;
    }
    let message = |condition: &Value| condition["message"].as_str().unwrap_or_default().to_owned();
    // What is said of what was wanted before says nothing.
    let said_of = deployment["status"]["observedGeneration"].as_u64();
    if said_of < deployment["metadata"]["generation"].as_u64() {
        return None;
    }
    // How long pods may take is said by rollout.ready_within, not by the Deployment's progress deadline: a
    // node for them may be on its way.
    let refused = condition(deployment, "ReplicaFailure").filter(|c| c["status"] == "True")?;
    Some((format!("its pods are refused: {}", message(refused)), None))
}

/// Why a pod gets no place on any node, for which no new one is being made; and the pod.
pub async fn unplaced(api: &Api, pods: &[&Value]) -> Result<Option<(String, Option<String>)>> {
    for pod in pods {
        let Some((why, since)) = unschedulable(pod) else {
            continue;
        };
        let name = api::name(pod);
        let events = events(api, name).await?;
        let has = |reason: &str| events.iter().any(|event| event["reason"] == reason);
        let is_late = seconds_since(&since).is_some_and(|waited| waited >= UNSCHEDULABLE);
        if (is_late || has(NO_NODE_COMES)) && !NODE_COMES.iter().any(|reason| has(reason)) {
            return Ok(Some((why, Some(name.to_owned()))));
        }
    }
    Ok(None)
}

/// That the scheduler has found no place, and since when.
fn unschedulable(pod: &Value) -> Option<(String, Value)> {
    let scheduled = condition(pod, "PodScheduled").filter(|c| c["reason"] == "Unschedulable")?;
    let message = scheduled["message"].as_str().unwrap_or_default();
    let why = format!("no node takes the pod {}: {message}", api::name(pod));
    Some((why, scheduled["lastTransitionTime"].clone()))
}

/// Why a job will never be done, and the pod that shows it.
pub fn broken_job(jobs: &[Value], pods: &[Value]) -> Option<(String, Option<String>)> {
    let newest = || pods.last().map(|pod| api::name(pod).to_owned());
    let failed = jobs.iter().find_map(|job| {
        let failed = condition(job, "Failed").filter(|c| c["status"] == "True")?;
        let why = failed["message"].as_str().unwrap_or_default();
        Some(format!("the job {} failed: {why}", api::name(job)))
    });
    let hopeless = |pod: &Value| Some((pod_broken(pod)?, Some(api::name(pod).to_owned())));
    failed
        .map(|why| (why, newest()))
        .or_else(|| pods.iter().find_map(hopeless))
}

fn pod_broken(pod: &Value) -> Option<String> {
    let name = api::name(pod);
    containers(pod).find_map(|container| {
        let waiting = &container["state"]["waiting"];
        let reason = waiting["reason"].as_str()?;
        // The first crash may be one of what it depends on; this is the second at least.
        let crashes = container["restartCount"].as_u64().unwrap_or(0);
        if !HOPELESS.contains(&reason) || (reason == "CrashLoopBackOff" && crashes < 1) {
            return None;
        }
        let message = waiting["message"].as_str().unwrap_or_default();
        let lacks_secret = reason == "CreateContainerConfigError"
            && message.starts_with("secret ")
            && message.ends_with(" not found");
        let age = seconds_since(&pod["metadata"]["creationTimestamp"]);
        let may_come = lacks_secret && age.is_some_and(|age| age < BRINGING);
        // The kubelet has not heard from the API server what there is.
        if may_come || message.starts_with("failed to sync ") {
            return None;
        }
        Some(format!("pod {name}: {reason}: {message}"))
    })
}

/// Seconds since a moment as the API server writes it.
fn seconds_since(moment: &Value) -> Option<i64> {
    let moment: jiff::Timestamp = moment.as_str()?.parse().ok()?;
    Some(jiff::Timestamp::now().as_second() - moment.as_second())
}

/// Why a job's pods cannot be created, where that was tried for a while.
pub async fn refused(api: &Api, job: &Value) -> Result<Option<String>> {
    let waited = seconds_since(&job["metadata"]["creationTimestamp"]);
    if waited.is_none_or(|waited| waited < REFUSED) {
        return Ok(None);
    }
    let name = api::name(job);
    let events = events(api, name).await?;
    // One of the same name that was removed has left events, too.
    let refused = events.iter().find(|event| {
        event["reason"] == "FailedCreate"
            && event["involvedObject"]["uid"] == job["metadata"]["uid"]
    });
    Ok(refused.map(|event| {
        let why = event["message"].as_str().unwrap_or_default();
        format!("the pods of {name} are refused: {why}")
    }))
}

/// The events of an object, by its name.
async fn events(api: &Api, name: &str) -> Result<Vec<Value>> {
    let namespace = &api.namespace;
    let path =
        format!("/api/v1/namespaces/{namespace}/events?fieldSelector=involvedObject.name%3D{name}");
    let events: Value = serde_json::from_str(&api.text(&path).await?).context("reading events")?;
    Ok(api::items(&events["items"]).cloned().collect())
}

/// What people want to see of a pod that does not get ready: its events and its last lines.
pub async fn explain(api: &Api, pod: &str) -> Vec<String> {
    let mut lines = Vec::new();
    // Whatever of this cannot be had is left out: it only explains.
    let events = events(api, pod).await.unwrap_or_default();
    for event in events.iter().filter(|event| event["type"] == "Warning") {
        lines.push(format!(
            "event of {pod}: {}: {}",
            event["reason"].as_str().unwrap_or_default(),
            event["message"].as_str().unwrap_or_default()
        ));
    }
    let Ok(Some(found)) = api.get(&kind(), pod).await else {
        return lines;
    };
    for container in containers(&found) {
        let name = container["name"].as_str().unwrap_or_default();
        let crashed = container["restartCount"].as_u64().unwrap_or(0) > 0;
        let mut said = api.logs(pod, name, crashed).await.unwrap_or_default();
        if said.is_empty() {
            said = api.logs(pod, name, false).await.unwrap_or_default();
        }
        lines.extend(said.iter().map(|line| format!("{pod}: {line}")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn waiting(reason: &str, restarts: u32) -> Value {
        json!({
            "metadata": { "name": "p" },
            "status": { "containerStatuses": [
                { "restartCount": restarts, "state": { "waiting": { "reason": reason, "message": "m" } } }
            ] },
        })
    }

    #[test]
    fn so_many_pods_count_as_are_available() {
        let deployment = |seconds: u32| {
            json!({
                "spec": { "minReadySeconds": seconds }, "status": { "availableReplicas": 1 },
            })
        };
        assert_eq!(available(&deployment(5)), Some(1));
        assert_eq!(available(&deployment(0)), None);
        assert_eq!(
            available(&json!({ "spec": { "minReadySeconds": 5 } })),
            Some(0)
        );
    }

    #[test]
    fn what_will_not_heal_is_told_from_what_may() {
        let why = |pod: &Value| broken(&Value::Null, &[pod], false).map(|(why, _)| why);
        assert_eq!(why(&waiting("ContainerCreating", 0)), None);
        assert_eq!(why(&waiting("ErrImagePull", 0)), None);
        assert_eq!(why(&waiting("CrashLoopBackOff", 0)), None);
        assert!(
            why(&waiting("CrashLoopBackOff", 1))
                .unwrap()
                .contains("pod p: CrashLoopBackOff")
        );
        assert!(why(&waiting("ImagePullBackOff", 0)).is_some());
    }

    #[test]
    fn a_secret_may_come_from_elsewhere() {
        let mut pod = waiting("CreateContainerConfigError", 0);
        let message = "/status/containerStatuses/0/state/waiting/message";
        *pod.pointer_mut(message).unwrap() = json!("secret \"token-v1\" not found");
        let age = |seconds: i64| {
            let mut pod = pod.clone();
            let created = jiff::Timestamp::now() - jiff::SignedDuration::from_secs(seconds);
            pod["metadata"]["creationTimestamp"] = json!(created);
            broken(&Value::Null, &[&pod], false)
        };
        assert_eq!(age(2), None);
        assert!(age(60).unwrap().0.contains("token-v1"));
        *pod.pointer_mut(message).unwrap() = json!("failed to sync secret cache: timed out");
        assert_eq!(broken(&Value::Null, &[&pod], false), None);
        *pod.pointer_mut(message).unwrap() = json!("couldn't find key token in Secret s");
        assert!(broken(&Value::Null, &[&pod], false).is_some());
    }

    #[test]
    fn a_pod_without_a_place_and_a_quota_are_named() {
        let pod = json!({
            "metadata": { "name": "p" },
            "status": { "conditions": [{
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                "message": "0/1 nodes", "lastTransitionTime": "2020-01-01T00:00:00Z",
            }] },
        });
        assert!(unschedulable(&pod).is_some());
        let quota = json!({ "status": { "conditions": [
            { "type": "ReplicaFailure", "status": "True", "message": "exceeded quota" }
        ] } });
        assert!(
            broken(&quota, &[], false)
                .unwrap()
                .0
                .contains("exceeded quota")
        );
    }
}
