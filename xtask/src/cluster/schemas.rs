//! Schemas of other versions of Kubernetes, for kubeconform: each kind's, made from the OpenAPI
//! documents in the module `k8s.io/kubernetes`, strict about fields it does not know.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use xshell::{Shell, cmd};

use crate::files;

/// The versions, one in a line as in `go.sum`: the oldest and the newest that are supported.
const PINS: &str = "kubernetes.sum";

const REFERENCE: &str = "#/components/schemas/";

/// What `go mod download -json` says.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Module {
    dir: String,
    sum: String,
}

/// Writes `VERSION/KIND-GROUP-VERSION.json` for every kind, the name in small letters.
pub fn write(shell: &Shell, go: &Path, pins: &Path, to: &Path) -> Result<()> {
    let path = pins.join(PINS);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    for line in text.lines() {
        let mut words = line.split(' ');
        let [Some(module), Some(version), Some(sum)] = [(); 3].map(|()| words.next()) else {
            bail!("in {}: {line:?} is no MODULE VERSION SUM", path.display());
        };
        let said = cmd!(shell, "{go} mod download -json {module}@{version}")
            .quiet()
            .read()?;
        let found: Module = serde_json::from_str(&said).context("reading what go says")?;
        ensure!(
            found.sum == sum,
            "{module} {version} has the sum {}, not {sum} as in {}",
            found.sum,
            path.display()
        );
        write_version(
            &Path::new(&found.dir).join("api/openapi-spec/v3"),
            &to.join(version),
        )
        .with_context(|| format!("making schemas of {module} {version}"))?;
    }
    Ok(())
}

fn write_version(documents: &Path, to: &Path) -> Result<()> {
    for entry in
        fs::read_dir(documents).with_context(|| format!("reading {}", documents.display()))?
    {
        let document: Value = files::read_json(&entry?.path())?;
        let Some(schemas) = document["components"]["schemas"].as_object() else {
            continue;
        };
        for (name, schema) in schemas {
            // What belongs to every group, such as DeleteOptions, has more than one.
            if let Some([kind]) = schema["x-kubernetes-group-version-kind"]
                .as_array()
                .map(Vec::as_slice)
            {
                let content = serde_json::to_vec(&closed(name, schemas))?;
                files::replace(&to.join(file_name(kind)), &content)?;
            }
        }
    }
    Ok(())
}

/// As kubeconform's `{{.ResourceKind}}{{.KindSuffix}}`: of a group, its first label.
fn file_name(kind: &Value) -> String {
    let word = |key: &str| kind[key].as_str().unwrap_or_default().to_lowercase();
    let group = word("group");
    let group = group.split('.').next().unwrap_or_default();
    let parts = [&word("kind"), group, &word("version")];
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join("-") + ".json"
}

/// The schema with all that it refers to.
fn closed(name: &str, schemas: &Map<String, Value>) -> Value {
    let mut seen = BTreeSet::new();
    let mut left = vec![name.to_owned()];
    while let Some(name) = left.pop() {
        if seen.insert(name.clone()) {
            references(&schemas[&name], &mut left);
        }
    }
    let strict: Map<String, Value> = seen
        .into_iter()
        .map(|name| (name.clone(), strict(&schemas[&name])))
        .collect();
    json!({ "$ref": format!("{REFERENCE}{name}"), "components": { "schemas": strict } })
}

fn references(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            let reference = fields.get("$ref").and_then(Value::as_str);
            found.extend(
                reference
                    .and_then(|to| to.strip_prefix(REFERENCE))
                    .map(str::to_owned),
            );
            fields.values().for_each(|value| references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

/// What an API server would drop in silence is an error, as with `--validate=strict`.
fn strict(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if schema.get("properties").is_some() && schema.get("additionalProperties").is_none() {
        schema["additionalProperties"] = Value::Bool(false);
    }
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_brings_what_it_refers_to_and_nothing_else() {
        let schemas = json!({
            "Pod": { "properties": { "spec": { "allOf": [{ "$ref": "#/components/schemas/Spec" }] } } },
            "Spec": { "properties": { "inner": { "$ref": "#/components/schemas/Pod" } } },
            "Other": {},
        });
        let closed = closed("Pod", schemas.as_object().unwrap());
        assert_eq!(closed["$ref"], "#/components/schemas/Pod");
        let kept = closed["components"]["schemas"].as_object().unwrap();
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["Pod", "Spec"]);
        assert_eq!(kept["Pod"]["additionalProperties"], false);
    }

    #[test]
    fn files_are_named_as_kubeconform_looks_for_them() {
        let kind = |group: &str| json!({ "group": group, "version": "v1", "kind": "Ingress" });
        assert_eq!(
            file_name(&kind("networking.k8s.io")),
            "ingress-networking-v1.json"
        );
        assert_eq!(file_name(&kind("")), "ingress-v1.json");
    }
}
