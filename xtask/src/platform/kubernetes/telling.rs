//! What users of kubectl see of a rollout: events, and a condition on the Deployment.

use serde_json::json;

use super::render::name_of;
use super::{Kubernetes, api};
use crate::release::ReleaseId;

impl Kubernetes {
    /// Tells whoever describes the Deployment. What is only told may fail.
    pub(super) async fn event(&self, release: &ReleaseId, kind: &str, reason: &str, message: &str) {
        let name = name_of(&self.settings, release);
        let unique = jiff::Timestamp::now().as_nanosecond();
        let now = api::time();
        let event = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": { "name": format!("{name}.{unique:x}") },
            "involvedObject": {
                "apiVersion": "apps/v1", "kind": "Deployment", "name": name,
                "namespace": self.api.namespace,
            },
            "type": kind, "reason": reason, "message": message, "action": reason,
            "eventTime": api::micro_time(), "firstTimestamp": now, "lastTimestamp": now, "count": 1,
            "reportingComponent": "xtask", "reportingInstance": "xtask",
            "source": { "component": "xtask" },
        });
        let _ = self.api.impatient().create(&event).await;
    }

    /// The same as a condition, which stays.
    pub(super) async fn condition(&self, release: &ReleaseId, message: &str) {
        let now = api::time();
        let status = json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": { "name": name_of(&self.settings, release) },
            "status": { "conditions": [{
                "type": "xtask.dev/Rollout", "status": "True", "reason": "Rollout",
                "message": message, "lastUpdateTime": now, "lastTransitionTime": now,
            }] },
        });
        let _ = self.api.impatient().apply_status(&status).await;
    }
}
