//! What a release refers to by name must be the same for as long as the release is: a name that says
//! its version. What changes under its name would be rolled out by nobody and back by nobody.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use serde_json::Value;

use super::api;
use crate::config::Kubernetes as Settings;

/// The digits and letters that kustomize puts behind the names of what it generates.
/// <https://kubectl.docs.kubernetes.io/references/kustomize/kustomization/generatoroptions/>
const HASH: usize = 10;

/// Every ConfigMap of a release must have been generated.
pub fn check_config(config: &Value, overlay: &str) -> Result<()> {
    let name = api::name(config);
    if is_hash(last_part(name)) {
        return Ok(());
    }
    bail!(
        "{overlay}: the ConfigMap {name} has no hash in its name, so two releases would have one \
         between them; let a configMapGenerator of kustomize make it"
    );
}

/// Every Secret that the pods of `templates` need must have a version in its name, unless it is one of
/// those that change by themselves.
pub fn check_secrets<'a>(
    templates: impl IntoIterator<Item = &'a Value>,
    settings: &Settings,
) -> Result<()> {
    let named: BTreeSet<&str> = templates.into_iter().flat_map(secrets).collect();
    for name in named {
        let rotated = settings.rotated_secrets.iter().any(|known| known == name);
        if rotated || is_version(last_part(name)) {
            continue;
        }
        bail!(
            "{}: the Secret {name} has no version in its name, so a change of it would be no release, \
             and a rollback would not bring it back: name it {name}-v1, and the next one {name}-v2 \
             (or add it to kubernetes.rotated_secrets, where it changes by itself, as certificates do)",
            settings.overlay
        );
    }
    Ok(())
}

/// The Secrets that a pod template refers to, but for those that only pull its images.
fn secrets(template: &Value) -> Vec<&str> {
    let spec = &template["spec"];
    let containers = ["initContainers", "containers"].map(|key| api::items(&spec[key]));
    let mut names = Vec::new();
    for container in containers.into_iter().flatten() {
        let of_env = api::items(&container["env"]);
        names.extend(of_env.map(|env| &env["valueFrom"]["secretKeyRef"]["name"]));
        let whole = api::items(&container["envFrom"]);
        names.extend(whole.map(|from| &from["secretRef"]["name"]));
    }
    for volume in api::items(&spec["volumes"]) {
        names.push(&volume["secret"]["secretName"]);
        let projected = api::items(&volume["projected"]["sources"]);
        names.extend(projected.map(|source| &source["secret"]["name"]));
    }
    names.into_iter().filter_map(Value::as_str).collect()
}

fn last_part(name: &str) -> &str {
    name.rsplit_once('-').map_or("", |(_, last)| last)
}

fn is_hash(text: &str) -> bool {
    let is_of_hash = |letter: u8| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    text.len() == HASH && text.bytes().all(is_of_hash)
}

/// `v1`, `20260131` or a hash.
fn is_version(text: &str) -> bool {
    let digits = text.strip_prefix('v').unwrap_or(text);
    is_hash(text) || !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::platform::kubernetes::render::tests::settings;

    #[test]
    fn secrets_have_versions() {
        let with = |name: &str| {
            [
                json!({ "containers": [{ "env": [
                    { "name": "PLAIN", "value": "1" },
                    { "name": "URL", "valueFrom": { "secretKeyRef": { "name": name, "key": "url" } } },
                ] }] }),
                json!({ "containers": [], "initContainers": [{
                    "envFrom": [{ "secretRef": { "name": name } }],
                }] }),
                json!({ "volumes": [{ "name": "tls", "secret": { "secretName": name } }] }),
                json!({ "volumes": [{ "name": "all", "projected": { "sources": [
                    { "configMap": { "name": "plain" } }, { "secret": { "name": name } },
                ] } }] }),
            ]
            .map(|spec| json!({ "spec": spec }))
        };
        for name in ["database-v1", "database-20260131", "database-7f2kg9h6tc"] {
            check_secrets(&with(name), &settings()).unwrap();
        }
        for name in ["database", "database-tls", "v1", "database-v", "database-"] {
            for template in with(name) {
                let refused = check_secrets([&template], &settings()).unwrap_err();
                let said = format!("the Secret {name} has no version in its name");
                assert!(refused.to_string().contains(&said), "{refused}");
            }
        }
        let mut rotated = settings();
        rotated.rotated_secrets.push("database-tls".to_owned());
        check_secrets(&with("database-tls"), &rotated).unwrap();
    }

    #[test]
    fn configurations_are_generated() {
        let named = |name: &str| json!({ "metadata": { "name": name } });
        check_config(&named("service-config-7f2kg9h6tc"), "local").unwrap();
        let refused = check_config(&named("service-config"), "local").unwrap_err();
        assert!(refused.to_string().contains("configMapGenerator"));
    }
}
