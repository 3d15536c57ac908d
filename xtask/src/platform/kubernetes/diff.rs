//! What a release changes in its environment, for people: one line for each value.
//!
//! Of a release that was just tried, it is what is there against what the API server would make of it
//! (`kubectl diff --server-side`), so that what others have changed shows, and what admission adds. Of one
//! that is kept it is what was rendered of both.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::Value;

use super::api::{self, Api, Kind};
use super::objects;
use super::render::Bundle;

/// Beyond so many lines nobody reads them.
const MOST: usize = 40;

/// What the server gives to each object, or a rollout sets: by kind, as JSON pointers (RFC 6901).
const NOT_TOLD: [(&str, &[&str]); 3] = [
    ("Deployment", &["/spec/replicas"]),
    (
        "Job",
        &[
            "/spec/selector",
            "/spec/template/metadata/labels/batch.kubernetes.io~1controller-uid",
            "/spec/template/metadata/labels/batch.kubernetes.io~1job-name",
            "/spec/template/metadata/labels/controller-uid",
            "/spec/template/metadata/labels/job-name",
        ],
    ),
    (
        "Service",
        &[
            "/spec/clusterIP",
            "/spec/clusterIPs",
            "/spec/selector/xtask.dev~1release",
        ],
    ),
];

/// Values by their places.
type Values = BTreeMap<String, String>;

/// What was rendered of one release against what was rendered of another.
pub fn rendered(stable: Option<&Bundle>, candidate: &Bundle) -> Vec<String> {
    let Some(stable) = stable else {
        return vec![all_new(candidate)];
    };
    let before = values(leaving(stable, candidate), stable.id.short());
    lines(&before, &values(candidate.all(), candidate.id.short()))
}

/// A release's objects, but for those that stay when it goes: of kinds that hold data.
fn leaving<'a>(stable: &'a Bundle, candidate: &'a Bundle) -> impl Iterator<Item = &'a Value> {
    let goes = |object: &&Value| {
        let is_it = |other: &Value| title(other) == title(object);
        let is_shared = stable.others.iter().any(is_it);
        !is_shared || objects::is_removable(object) || candidate.others.iter().any(is_it)
    };
    stable.all().filter(goes)
}

/// What is there of the release in service, and of what it shares, against `tried`: what the API server
/// would make of each object of `candidate`.
pub async fn live(
    api: &Api,
    stable: Option<&Bundle>,
    candidate: &Bundle,
    tried: &[Value],
) -> Result<Vec<String>> {
    let Some(stable) = stable else {
        return Ok(vec![all_new(candidate)]);
    };
    let mut before = Vec::new();
    for object in leaving(stable, candidate) {
        before.extend(there(api, stable, object).await?);
    }
    // What only the candidate brings along may be there by somebody else's doing.
    for object in &candidate.others {
        if !stable
            .others
            .iter()
            .any(|other| title(other) == title(object))
        {
            before.extend(api.get(&Kind::of(object)?, api::name(object)).await?);
        }
    }
    let after: Vec<&Value> = candidate
        .all()
        .zip(tried)
        .map(|(object, tried)| {
            if is_split(candidate, object) {
                object
            } else {
                tried
            }
        })
        .collect();
    let before = values(before.iter(), stable.id.short());
    Ok(lines(
        &before,
        &values(after.into_iter(), candidate.id.short()),
    ))
}

/// An object of the release in service as it is. What is the release's own and has been removed since is
/// what the API server would make of it, so that what it fills in is no change.
async fn there(api: &Api, stable: &Bundle, object: &Value) -> Result<Option<Value>> {
    if is_split(stable, object) {
        return Ok(Some(object.clone()));
    }
    let found = api.get(&Kind::of(object)?, api::name(object)).await?;
    let is_shared = |other: &Value| title(other) == title(object);
    match found {
        None if !stable.others.iter().any(is_shared) => {
            api.apply(object, true, true).await.map(Some)
        }
        found => Ok(found),
    }
}

/// Whether an object holds the split of the traffic: as it is there, it is a rollout's.
fn is_split(bundle: &Bundle, object: &Value) -> bool {
    let mut routes = [&bundle.route, &bundle.grpc_route].into_iter().flatten();
    routes.any(|route| title(route) == title(object))
}

fn all_new(candidate: &Bundle) -> String {
    let objects: Vec<String> = candidate.all().map(title).collect();
    format!("new: {}", objects.join(", "))
}

fn lines(before: &Values, after: &Values) -> Vec<String> {
    let mut lines = Vec::new();
    for (place, value) in after {
        match before.get(place) {
            Some(old) if old == value => {}
            Some(old) => lines.push(format!("~ {place}: {old} -> {value}")),
            None => lines.push(format!("+ {place}: {value}")),
        }
    }
    let gone = before.keys().filter(|place| !after.contains_key(*place));
    lines.extend(gone.map(|place| format!("- {place}")));
    let surplus = lines.len().saturating_sub(MOST);
    if surplus > 0 {
        lines.truncate(MOST);
        lines.push(format!("… and {surplus} more"));
    }
    lines
}

fn title(object: &Value) -> String {
    let kind = object["kind"].as_str().unwrap_or_default();
    format!("{kind} {}", api::name(object))
}

/// All values of a release's objects but their names and states.
fn values<'a>(objects: impl Iterator<Item = &'a Value>, short: &str) -> Values {
    let mut values = Values::new();
    // What differs between any two releases says nothing: their names, and what names them.
    let own = |text: &str| text.replace(short, "RELEASE");
    for object in objects {
        let kind = object["kind"].as_str().unwrap_or_default();
        let title = match kind {
            "ConfigMap" => format!("ConfigMap {}", without_hash(api::name(object))),
            _ => own(&title(object)),
        };
        let mut object = object.clone();
        let not_told = NOT_TOLD.iter().filter(|(of, _)| *of == kind);
        for place in not_told.flat_map(|(_, places)| *places) {
            remove(&mut object, place);
        }
        for (part, value) in object.as_object().into_iter().flatten() {
            if !["apiVersion", "kind", "metadata", "status"].contains(&part.as_str()) {
                flatten(&format!("{title} {part}"), value, &mut values);
            }
        }
    }
    for value in values.values_mut() {
        *value = own(value);
    }
    values
}

/// Removes what a JSON pointer leads to.
fn remove(object: &mut Value, place: &str) {
    if let Some((parent, name)) = place.rsplit_once('/')
        && let Some(Value::Object(fields)) = object.pointer_mut(parent)
    {
        fields.remove(&name.replace("~1", "/").replace("~0", "~"));
    }
}

/// The hash that kustomize adds to a generated name is the content's.
fn without_hash(name: &str) -> &str {
    name.rsplit_once('-').map_or(name, |(name, _)| name)
}

fn flatten(place: &str, value: &Value, into: &mut Values) {
    match value {
        Value::Null => {}
        Value::Object(fields) => {
            for (name, value) in fields {
                flatten(&format!("{place}.{name}"), value, into);
            }
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                // Where items have names, their order does not matter.
                let name = item["name"]
                    .as_str()
                    .map_or_else(|| i.to_string(), str::to_owned);
                flatten(&format!("{place}[{name}]"), item, into);
            }
        }
        // Of settings their keys are told, of other files their lines.
        Value::String(text) if text.contains('\n') => {
            if place.ends_with(".toml")
                && let Ok(settings) = toml::from_str(text)
            {
                return flatten(place, &settings, into);
            }
            for line in text
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
            {
                let line = line.split(" #").next().unwrap_or(line);
                let (key, value) = line.split_once('=').unwrap_or((line, ""));
                into.insert(format!("{place}: {}", key.trim()), value.trim().to_owned());
            }
        }
        other => {
            into.insert(place.to_owned(), other.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_of_one_name_are_told_apart_by_their_sections() {
        let text = "# told\n[redis]\nurl = \"a\" # there\n[[rabbitmq]]\nurl = \"b\"\n";
        let mut values = Values::new();
        flatten("data", &json!({ "default.toml": text }), &mut values);
        let all: Vec<_> = values.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(
            all,
            [
                "data.default.toml.rabbitmq[0].url=\"b\"",
                "data.default.toml.redis.url=\"a\""
            ]
        );
    }

    #[test]
    fn what_is_no_settings_is_told_by_its_lines() {
        let mut values = Values::new();
        flatten(
            "data",
            &json!({ "a.toml": "one = 1\ntwo =\n" }),
            &mut values,
        );
        assert_eq!(values.len(), 2, "{values:?}");
    }
}
